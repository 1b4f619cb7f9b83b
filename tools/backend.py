"""PEP 517 build backend: setuptools, building against the torch of the environment being installed into.

pip builds in an isolated environment that lacks torch. Downloading a second one would take gigabytes and might give
another version than the one that will load the result, so the torch already installed is used, and only where there is
none (or one too old) is torch asked for. Under uv the target environment is out of sight, and torch is asked for.
"""

import importlib.metadata
import os
import site
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MINIMUM_TORCH = (2, 11)


def _installed_torch():
    """The directory that holds a torch new enough, or None."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    paths += site.getsitepackages([sys.base_prefix])  # where a virtual environment shares the system's packages
    for path in paths:
        if not os.path.isdir(os.path.join(path, "torch", "include")):
            continue
        for found in importlib.metadata.distributions(name="torch", path=[path]):
            if tuple(int(part) for part in found.version.split(".")[:2]) >= MINIMUM_TORCH:
                return path
    return None


def _requirements(base):
    if _installed_torch():
        return base
    print("aevb: no installed torch >= 2.11 found, so the build asks for one", flush=True)
    return [*base, "torch>=2.11", "numpy"]


def _with_torch(build, *args, **kwargs):
    path = _installed_torch()
    if path and path not in sys.path:
        sys.path.append(path)  # last, so that the isolated environment's own packages win
    return build(*args, **kwargs)


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(*args, **kwargs):
    return _with_torch(build_meta.build_wheel, *args, **kwargs)


def build_editable(*args, **kwargs):
    return _with_torch(build_meta.build_editable, *args, **kwargs)
