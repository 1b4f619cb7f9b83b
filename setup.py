"""Builds aevb._C. What is installed, and how, is in pyproject.toml; the CUDA kernels are tools/cuda_toolkit.py's.

Environment: AEVB_CUDA=0|1, AEVB_CUDA_ARCHS, CUDA_HOME, CXX, MAX_JOBS, DEBUG=1 (no optimisation, debug information),
AEVB_SANITIZE=1 (DEBUG, under AddressSanitizer and UBSan, without CUDA).
"""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
import compilation
import cuda_toolkit
from compilation import stop
from cuda_toolkit import flag

STABLE_ABI = "0x020b000000000000"  # torch 2.11: the binary loads into it and into every later one


def compiler():
    return os.environ.get("CXX", "c++").split()


def check_machine():
    """Says in one sentence what is missing, before a compiler says it in a thousand lines; gives the versions of
    compiler and torch, and torch's folder."""
    if not sys.platform.startswith("linux"):
        stop(f"the kernels are built on Linux so far, and this is {sys.platform}.")
    command = compiler()
    if not shutil.which(command[0]):
        stop(f"no C++ compiler found ({command[0]!r}): install GCC 9 or later (Debian: apt install g++) or set CXX.")
    about = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    macros = dict(line.split(" ", 2)[1:] for line in about.splitlines() if line.count(" ") >= 2)
    version = macros.get("__VERSION__", "another compiler")
    if "__clang__" in macros:
        stop("the kernels need GCC (they use its target pragmas), and CXX is clang: set CXX=g++.")
    if int(macros.get("__GNUC__", "0")) < 9:
        stop(f"the kernels need GCC 9 or later, and {command[0]} is {version}.")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        stop("Python.h is missing: install Python's development files (Debian: apt install python3-dev).")
    found = importlib.util.find_spec("torch")
    if not found or not found.origin:
        stop("torch is missing in the build environment: pip install 'torch>=2.11' setuptools.")
    folder = os.path.dirname(found.origin)
    with open(os.path.join(folder, "version.py")) as file:
        torch = re.search(r"^__version__\s*=\s*'([^']+)'", file.read(), re.MULTILINE).group(1)
    if tuple(int(part) for part in torch.split(".")[:2]) < (2, 11):
        stop(f"torch {torch} is installed, and aevb needs 2.11 or later: pip install -U torch.")
    return f"{version}, torch {torch}", folder


def compiler_flags(include_dirs):
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    # One sequence of IEEE operations everywhere: no contraction to fma, and nothing that assumes finite numbers. The
    # last two only promise that nobody reads errno or the floating-point exception flags.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # No path of the machine that compiled it in the binary or in its messages.
    flags += [f"-ffile-prefix-map={path}/=" for path in (*include_dirs, os.getcwd())]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    flags += ["-Werror=switch"]  # a likelihood, dtype or activation that a switch leaves out is none of those it names
    if flag("AEVB_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        return [*flags, "-O1", "-g", *sanitizers], sanitizers
    if flag("DEBUG"):
        return [*flags, "-O0", "-g"], []
    return [*flags, "-DNDEBUG", "-O3", "-g0"], ["-s"]


class Build(build_ext):
    """Compiles by tools/compilation.py, C++ and CUDA at once, and leaves the linking to setuptools."""

    def build_extension(self, ext):
        ext.extra_objects = compilation.compile_all(ext.jobs(self.build_temp), compilation.max_jobs())
        ext.depends = ext.extra_objects
        super().build_extension(ext)

    def run(self):
        super().run()
        # Python started in the checkout finds aevb/ here before the installed one; without this copy it would find
        # a package without kernels.
        if not self.inplace and not flag("AEVB_SANITIZE"):
            self.copy_extensions_to_source()


def extension(versions, torch, kernels, decision):
    include_dirs = [os.path.join(torch, "include"), sysconfig.get_path("include")]
    compile_flags, link_flags = compiler_flags(include_dirs)
    command = [*compiler(), *(f"-I{path}" for path in include_dirs), *compile_flags]
    sources = [*glob.glob("csrc/*.cpp"), *glob.glob("csrc/cpu/*.cpp")]
    if kernels:
        sources += glob.glob("csrc/cuda/*.cpp")
        link_flags = [*link_flags, *kernels.link_flags()]

    def jobs(folder):
        found = kernels.jobs(sorted(glob.glob("csrc/cuda/*.cu")), folder) if kernels else []
        for source in sorted(sources):
            target = os.path.join(folder, source + ".o")
            about = [f'-DAEVB_CUDA_DECISION="{decision}"'] if source == "csrc/bindings.cpp" else []
            words = (*command, *about, "-MMD", "-MF", target + ".d", "-c", source, "-o", target)
            seconds = compilation.SECONDS.get(source, compilation.USUAL_SECONDS)
            found.append(compilation.Job(source, target, words, seconds, versions))
        return found

    ext = Extension(
        "aevb._C",
        [],
        library_dirs=[os.path.join(torch, "lib")],
        libraries=["torch_cpu"],
        extra_link_args=["-Wl,--exclude-libs,ALL", *link_flags],
        language="c++",
    )
    ext.jobs = jobs
    return ext


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old to read pyproject.toml: pip install -U 'setuptools>=77'.")
arguments = sys.argv[1:]
if any(argument.startswith(("build", "bdist", "develop", "editable", "install")) for argument in arguments):
    versions, torch = check_machine()
    kernels, decision = None, "not built (AEVB_SANITIZE=1)"
    if not flag("AEVB_SANITIZE"):
        this_machine = cuda_toolkit.is_for_this_machine(arguments)
        kernels, decision = cuda_toolkit.decide(flag("DEBUG"), torch, this_machine)
    compilation.say(f"CUDA kernels {decision}")
    if kernels:
        print(f"aevb: nvcc is {kernels.toolkit.nvcc}", flush=True)
    setup(ext_modules=[extension(versions, torch, kernels, decision)], cmdclass={"build_ext": Build})
else:
    setup()  # metadata only: torch need not be there
