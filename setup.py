"""Builds aevb._C. What is installed, and how, is in pyproject.toml; the CUDA kernels are tools/cuda_toolkit.py's.

Environment: AEVB_CUDA=0|1, AEVB_CUDA_ARCHS, CUDA_HOME, CXX, MAX_JOBS, DEBUG=1 (no optimisation, debug information),
AEVB_SANITIZE=1 (DEBUG, under AddressSanitizer and UBSan, without CUDA).
"""

import glob
import os
import shutil
import subprocess
import sys
import sysconfig

import setuptools
from setuptools import Extension, setup

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
import compilation
import cuda_toolkit
from compilation import stop
from cuda_toolkit import flag

STABLE_ABI = "0x020b000000000000"  # torch 2.11: the binary loads into it and into every later one


def check_machine():
    """Says in one sentence what is missing, before a compiler says it in a thousand lines; gives torch's folder."""
    if not sys.platform.startswith("linux"):
        stop(f"the kernels are built on Linux so far, and this is {sys.platform}.")
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        stop(f"no C++ compiler found ({compiler[0]!r}): install GCC 9 or later (Debian: apt install g++) or set CXX.")
    about = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    macros = dict(line.split(" ", 2)[1:] for line in about.splitlines() if line.count(" ") >= 2)
    if "__clang__" in macros:
        stop("the kernels need GCC (they use its target pragmas), and CXX is clang: set CXX=g++.")
    if int(macros.get("__GNUC__", "0")) < 9:
        stop(f"the kernels need GCC 9 or later, and {compiler[0]} is {macros.get('__VERSION__', 'another compiler')}.")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        stop("Python.h is missing: install Python's development files (Debian: apt install python3-dev).")
    try:
        import torch
    except ModuleNotFoundError as e:
        stop(f"{e.name} is missing in the build environment: pip install 'torch>=2.11' pybind11 ninja setuptools.")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        stop(f"torch {torch.__version__} is installed, and aevb needs 2.11 or later: pip install -U torch.")
    return os.path.dirname(torch.__file__)


def compiler_flags(include_dirs):
    flags = ["-std=c++17", "-fno-wrapv", "-fvisibility=hidden", "-fopenmp-simd", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    # One sequence of IEEE operations everywhere: no contraction to fma, and nothing that assumes finite numbers. The
    # last two only promise that nobody reads errno or the floating-point exception flags.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # No path of the machine that compiled it in the binary or in its messages.
    flags += [f"-ffile-prefix-map={path}/=" for path in (*include_dirs, os.path.dirname(os.path.abspath(__file__)))]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    flags += ["-Werror=switch"]  # a likelihood, dtype or activation that a switch leaves out is none of those it names
    if flag("AEVB_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        return [*flags, "-O1", "-g", *sanitizers], sanitizers
    if flag("DEBUG"):
        return [*flags, "-O0", "-g"], []
    return [*flags, "-O3", "-g0"], ["-s"]


def pybind11_headers():
    """pybind11's own, or where it is not installed the copy among torch's headers."""
    try:
        import pybind11
    except ModuleNotFoundError:
        return []
    return [pybind11.get_include()]


def extension(kernels, decision):
    from torch.utils import cpp_extension

    include_dirs = [*pybind11_headers(), *cpp_extension.include_paths()]
    compile_flags, link_flags = compiler_flags(include_dirs)
    sources = sorted([*glob.glob("csrc/*.cpp"), *glob.glob("csrc/cpu/*.cpp")])
    macros = [("AEVB_CUDA_DECISION", f'"{decision}"')]
    if kernels:
        sources += sorted(glob.glob("csrc/cuda/*.cpp"))
        link_flags += kernels.link_flags()
    return Extension(
        "aevb._C",
        sources,
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=macros,
        extra_compile_args=compile_flags,
        extra_link_args=["-Wl,--exclude-libs,ALL", *link_flags],
        language="c++",
    )


def build_command(kernels):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            if kernels:
                jobs = kernels.jobs(sorted(glob.glob("csrc/cuda/*.cu")), self.build_temp)
                ext.extra_objects = compilation.compile_all(jobs, compilation.max_jobs())
            compilation.say_cost(ext.sources)
            super().build_extension(ext)

        def run(self):
            super().run()
            # Python started in the checkout finds aevb/ here before the installed one; without this copy it would find
            # a package without kernels.
            if not self.inplace and not flag("AEVB_SANITIZE"):
                self.copy_extensions_to_source()

    return Build


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old to read pyproject.toml: pip install -U 'setuptools>=77'.")
arguments = sys.argv[1:]
if any(argument.startswith(("build", "bdist", "develop", "editable", "install")) for argument in arguments):
    torch = check_machine()
    kernels, decision = None, "not built (AEVB_SANITIZE=1)"
    if not flag("AEVB_SANITIZE"):
        this_machine = cuda_toolkit.is_for_this_machine(arguments)
        kernels, decision = cuda_toolkit.decide(flag("DEBUG"), torch, this_machine)
    compilation.say(f"CUDA kernels {decision}")
    if kernels:
        print(f"aevb: nvcc is {kernels.toolkit.nvcc}", flush=True)
    setup(ext_modules=[extension(kernels, decision)], cmdclass={"build_ext": build_command(kernels)})
else:
    setup()  # metadata only: torch need not be there
