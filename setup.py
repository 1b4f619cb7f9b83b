"""Builds aevb._C. What is installed, and how, is in pyproject.toml.

Environment: AEVB_CUDA=0|1, CXX, MAX_JOBS, DEBUG=1 (no optimisation, debug information), AEVB_SANITIZE=1 (DEBUG, under
AddressSanitizer and UBSan).
"""

import os
import shutil
import subprocess
import sys
import sysconfig

import setuptools
from setuptools import Extension, setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/checks.cpp",
    "csrc/cpu/elbo_ops.cpp",
    "csrc/cpu/gaussian_ops.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_plain.cpp",
    "csrc/cpu/likelihood_ops.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/tensors.cpp",
]
STABLE_ABI = "0x020b000000000000"  # torch 2.11: the binary loads into it and into every later one


def stop(sentence):
    sys.exit(f"\naevb: {sentence}\n")


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def check_machine():
    """Says in one sentence what is missing, before a compiler says it in a thousand lines."""
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
        import pybind11  # noqa: F401
        import torch
    except ModuleNotFoundError as e:
        stop(f"{e.name} is missing in the build environment: pip install 'torch>=2.11' pybind11 ninja setuptools.")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        stop(f"torch {torch.__version__} is installed, and aevb needs 2.11 or later: pip install -U torch.")


def cuda_decision():
    """Whether CUDA kernels are built, and why, in a sentence."""
    if flag("AEVB_CUDA"):
        stop("AEVB_CUDA=1 asks for CUDA kernels, and this version has none yet.")
    return "not built (this version has no CUDA kernels yet)"


def compiler_flags(include_dirs):
    flags = ["-std=c++17", "-fno-wrapv", "-fvisibility=hidden", "-fopenmp-simd", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    # One sequence of IEEE operations everywhere: no contraction to fma, and nothing that assumes finite numbers. The
    # last two only promise that nobody reads errno or the floating-point exception flags.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # No path of the machine that compiled it in the binary or in its messages.
    flags += [f"-ffile-prefix-map={path}/=" for path in (*include_dirs, os.path.dirname(os.path.abspath(__file__)))]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    if flag("AEVB_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        return [*flags, "-O1", "-g", *sanitizers], sanitizers
    if flag("DEBUG"):
        return [*flags, "-O0", "-g"], []
    return [*flags, "-O3", "-g0"], ["-s"]


def extension():
    import pybind11
    from torch.utils import cpp_extension

    include_dirs = [pybind11.get_include(), *cpp_extension.include_paths()]
    compile_flags, link_flags = compiler_flags(include_dirs)
    cuda = cuda_decision()
    print(f"aevb: CUDA kernels {cuda}", flush=True)
    return Extension(
        "aevb._C",
        SOURCES,
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("AEVB_CUDA_DECISION", f'"{cuda}"')],
        extra_compile_args=compile_flags,
        extra_link_args=[*link_flags, "-Wl,--exclude-libs,ALL"],
        language="c++",
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self):
            super().run()
            # Python started in the checkout finds aevb/ here before the installed one; without this copy it would find
            # a package without kernels.
            if not self.inplace and not flag("AEVB_SANITIZE"):
                self.copy_extensions_to_source()

    return Build


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old to read pyproject.toml: pip install -U 'setuptools>=77'.")
build_requested = any(c.startswith(("build", "bdist", "develop", "editable", "install")) for c in sys.argv[1:])
if build_requested:
    check_machine()
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
else:
    setup()  # metadata only: torch need not be there
