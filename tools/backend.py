"""PEP 517 build backend: setuptools, building against the torch of the environment being installed into.

pip builds in an isolated environment that lacks torch. Downloading a second one would take gigabytes and might give
another version than the one that will load the result, so the torch already installed is used, and only where there is
none (or one too old) is torch asked for. Under uv the target environment is out of sight, and torch is asked for.

Where the kernels will run on CUDA and no nvcc works, nvcc's own packages are asked for: 105 MB, and no toolkit needed.
"""

import importlib.metadata
import os
import sys

import compilation
import cuda_toolkit
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MINIMUM_TORCH = (2, 11)
# nvcc with all that it needs, of one release. 13.0: what it builds runs with the drivers of every CUDA 13.
NVCC = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"
NVCC_RELEASE = "==13.0.*"
NVCC_RELEASE_BESIDE_TORCH = ">=13,<14"  # torch asks for parts of the toolkit too, of the release that it was built with


def _installed_torch():
    """The directory that holds a torch new enough, or None."""
    for path in cuda_toolkit.site_folders():
        if not os.path.isdir(os.path.join(path, "torch", "include")):
            continue
        for found in importlib.metadata.distributions(name="torch", path=[path]):
            if tuple(int(part) for part in found.version.split(".")[:2]) >= MINIMUM_TORCH:
                return path
    return None


def _why_cuda(torch):
    """In words, why kernels are wanted from CUDA 13, the oldest whose nvcc is on PyPI; None where they are not."""
    if cuda_toolkit.switch() == "1":
        return "AEVB_CUDA=1"
    cuda = cuda_toolkit.torch_cuda(os.path.join(torch, "torch")) if torch else None
    if cuda and cuda >= (13, 0):
        return f"torch is built for CUDA {cuda[0]}.{cuda[1]}"
    driver = cuda_toolkit.driver_version()
    if driver and driver >= (13, 0) and (cuda or not torch):
        return f"the GPU's driver is for CUDA {driver[0]}.{driver[1]}"
    if cuda:
        print(
            f"aevb: torch is built for CUDA {cuda[0]}.{cuda[1]}, for which PyPI has no nvcc: no CUDA kernels. They are "
            "built with a CUDA toolkit's nvcc on PATH, or, for drivers of CUDA 13, with AEVB_CUDA=1.",
            flush=True,
        )
    return None


def _nvcc_requirements(torch):
    """nvcc's packages, where no nvcc works and CUDA kernels are wanted."""
    asked = cuda_toolkit.switch()
    if asked == "0" or cuda_toolkit.flag("AEVB_SANITIZE"):
        return []
    if torch and not asked and not cuda_toolkit.torch_cuda(os.path.join(torch, "torch")):
        return []
    if cuda_toolkit.find()[0]:
        return []
    why = _why_cuda(torch)
    if not why:
        return []
    print(f"aevb: {why}, and no nvcc works here, so the build asks for nvcc's packages", flush=True)
    return [NVCC + (NVCC_RELEASE if torch else NVCC_RELEASE_BESIDE_TORCH)]


def _requirements(base):
    torch = _installed_torch()
    if not torch:
        print("aevb: no installed torch >= 2.11 found, so the build asks for one", flush=True)
        base = [*base, "torch>=2.11", "numpy"]
    return [*base, *_nvcc_requirements(torch)]


def _with_torch(build, *args, **kwargs):
    path = _installed_torch()
    if path and path not in sys.path:
        sys.path.append(path)  # last, so that the isolated environment's own packages win
    compilation.under_pip = True
    return build(*args, **kwargs)


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(*args, **kwargs):
    return _with_torch(build_meta.build_wheel, *args, **kwargs)


def build_editable(*args, **kwargs):
    return _with_torch(build_meta.build_editable, *args, **kwargs)
