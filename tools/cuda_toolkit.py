"""CUDA for setup.py and tools/backend.py: whether kernels are built, by which nvcc, for which architectures, and how.

Environment: AEVB_CUDA=0|1, AEVB_CUDA_ARCHS, CUDA_HOME or CUDA_PATH, CXX, NVCC_CCBIN.
"""

import ast
import ctypes
import os
import re
import shutil
import site
import sys
import sysconfig
import tempfile
from dataclasses import dataclass

from compilation import USUAL_SECONDS, Job, run, stop

MINIMUM = (12, 0)
LAST_GUESS = "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
PTX = ("90", "120")  # also as PTX, for GPUs that none of the architectures covers
# Seconds of one core for an architecture, where they are more than a few.
SECONDS = {"likelihood": 13, "gaussian": 28, "log_ratio": 24}
LIKELIHOODS = "csrc/formulas/likelihood_list.h"


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def switch():
    """AEVB_CUDA: "0", "1", or "" where it is not set."""
    value = os.environ.get("AEVB_CUDA", "").strip()
    if value not in ("", "0", "1"):
        stop(f"AEVB_CUDA is {value!r}; it takes 0 (no CUDA kernels) or 1 (fail where they cannot be built).")
    return value


def site_folders():
    """Where packages may be: those of the build, and those of the environment being installed into."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += site.getsitepackages([sys.base_prefix])  # where a virtual environment shares the system's packages
    return list(dict.fromkeys(folders))


def candidates():
    """Where nvcc is, the first choice first. CUDA_HOME hides the machine's other toolkits, even if it holds none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")]
    places += [os.path.join(folder, "nvidia", "cu13", "bin", "nvcc") for folder in site_folders()]  # as PyPI has it
    if not home:
        places.append(LAST_GUESS)
    return [place for place in dict.fromkeys(places) if place and os.path.isfile(place)]


class UnusableError(Exception):
    """Why an nvcc cannot be used: a phrase without the machine's paths, and what nvcc printed."""

    def __init__(self, phrase, output=""):
        super().__init__(phrase)
        self.output = output


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str
    architectures: tuple  # that nvcc compiles for
    runtime: str  # the folder of libcudart_static.a

    def compile_command(self, *arguments):
        """Our own nvcc call: the C++ compiler is the one that compiles the rest."""
        words = os.environ.get("CXX", "c++").split()
        compiler = next((word for word in words if os.path.basename(word) not in ("ccache", "sccache")), "c++")
        host = [] if os.environ.get("NVCC_CCBIN") else ["-ccbin", compiler]
        return [self.nvcc, "-std=c++17", *host, *arguments]


def examine(nvcc):
    """The Toolkit that `nvcc` belongs to, after it has compiled an empty kernel."""
    status, output = run([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+)", output)
    if status or not release:
        raise UnusableError("nvcc --version fails", output)
    version = ".".join(release.groups())
    if tuple(map(int, release.groups())) < MINIMUM:
        raise UnusableError(f"nvcc {version} is older than {MINIMUM[0]}.{MINIMUM[1]}")
    architectures = tuple(re.findall(r"compute_(\d+)\b", run([nvcc, "--list-gpu-arch"])[1]))
    if not architectures:
        raise UnusableError(f"nvcc {version} --list-gpu-arch fails")
    # nvcc may be a script or a link that leads to the toolkit, so it is asked where the toolkit is.
    _, output = run([nvcc, "--dryrun", "-v", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    folders = re.findall(r'"-L([^"]+)"', output)
    folders += [os.path.join(top.group(1).strip(), lib) for lib in ("lib64", "lib")] if top else []
    runtime = next((f for f in folders if os.path.isfile(os.path.join(f, "libcudart_static.a"))), None)
    if not runtime:
        raise UnusableError(f"nvcc {version} has no libcudart_static.a", output)
    toolkit = Toolkit(nvcc, version, architectures, os.path.realpath(runtime))
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "empty.cu")
        with open(source, "w") as file:
            file.write("#include <cuda_runtime.h>\n__global__ void empty() {}\n")
        arch = f"-arch=sm_{architectures[0]}"
        status, output = run(toolkit.compile_command(arch, "-c", source, "-o", source + ".o"))
    if status:
        raise UnusableError(f"nvcc {version} cannot compile an empty kernel", output)
    return toolkit


def find():
    """The first toolkit that works, or None; and where there is none, why, in a phrase."""
    reasons = []
    for nvcc in candidates():
        try:
            return examine(nvcc), ""
        except UnusableError as e:
            reasons.append(str(e))
            print(f"aevb: {nvcc} is not used: {e}\n{e.output}".rstrip(), flush=True)
    home = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    reasons.append(f"no nvcc found in {home}" if home else "no nvcc found")
    return None, reasons[0]


def driver_version():
    """The CUDA version that the machine's NVIDIA driver supports, such as (13, 0), or None."""
    try:
        driver, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def torch_cuda(folder):
    """The CUDA version that the torch in `folder` was built for, such as (13, 0); None for a build without."""
    with open(os.path.join(folder, "version.py")) as file:
        line = re.search(r"^cuda\b.*=\s*(.+)$", file.read(), re.MULTILINE)
    version = ast.literal_eval(line.group(1)) if line else None
    return tuple(int(part) for part in version.split(".")[:2]) if version else None


def visible_gpus():
    """The architectures of the GPUs that a program on this machine would see: by the driver, or else by nvidia-smi."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        driver = None
    found, count = set(), ctypes.c_int()
    if driver and not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)):
        for device in range(count.value):
            parts = [ctypes.c_int(), ctypes.c_int()]
            for part, attribute in zip(parts, (75, 76), strict=True):  # compute capability, major and minor
                driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            found.add("".join(str(part.value) for part in parts))
    elif "CUDA_VISIBLE_DEVICES" not in os.environ:  # which nvidia-smi knows nothing of
        _, output = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        found = {"".join(pair) for pair in re.findall(r"^(\d+)\.(\d+)$", output, re.MULTILINE)}
    return sorted(found, key=int)


def is_for_this_machine(arguments):
    """Whether what setup.py makes is used where it is made: all but a wheel that nobody is about to install."""
    if not any(argument.startswith("bdist") for argument in arguments):
        return True
    try:  # pip and uv install by way of a wheel, and are the process above
        with open(f"/proc/{os.getppid()}/cmdline", errors="replace") as file:
            return not {"install", "sync", "add"}.isdisjoint(file.read().split("\0"))
    except OSError:
        return False


def choose_architectures(toolkit, this_machine=False):
    """What to compile for, and whether these are the GPUs of this machine: AEVB_CUDA_ARCHS; the GPUs here, where the
    build is for them and this nvcc knows them; or those of ARCHITECTURES that this nvcc knows."""
    text = os.environ.get("AEVB_CUDA_ARCHS", "").strip()
    wanted = [] if text == "all" else visible_gpus() if text == "native" else re.findall(r"[^;,\s]+", text)
    if text == "native" and not wanted:
        stop("AEVB_CUDA_ARCHS is 'native', and no GPU is to be seen here: say which, such as AEVB_CUDA_ARCHS=90.")
    here = visible_gpus() if this_machine and not wanted and text != "all" else []
    if here and all(arch in toolkit.architectures and int(arch) >= int(ARCHITECTURES[0]) for arch in here):
        return here, True
    if not wanted:
        return [arch for arch in ARCHITECTURES if arch in toolkit.architectures], False
    for arch in wanted:
        if arch not in toolkit.architectures:
            known = " ".join(sorted(toolkit.architectures, key=int))
            stop(
                f"AEVB_CUDA_ARCHS is {text!r}, and nvcc {toolkit.version} does not compile for {arch!r}: it takes "
                f"'native', 'all', or numbers separated by ; of {known}."
            )
    return sorted(set(wanted), key=int), text == "native"


def architecture_flags(architectures):
    """Machine code for each, and PTX of the newest, and of those that more GPUs can use."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    ptx = [a for a in architectures if a in PTX or a == architectures[-1]]
    return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]


def likelihoods():
    """The names of the likelihoods that csrc has."""
    with open(LIKELIHOODS) as file:
        return re.findall(r"^ *X\((\w+),", file.read(), re.MULTILINE)


@dataclass(frozen=True)
class Kernels:
    """The CUDA kernels of a build: how they are compiled and linked."""

    toolkit: Toolkit
    architectures: list
    here: bool  # they are those of this machine's GPUs
    debug: bool

    def decision(self):
        unknown = [f"sm_{arch}" for arch in ARCHITECTURES if arch not in self.toolkit.architectures and not self.here]
        built = " ".join(f"sm_{arch}" for arch in self.architectures) + (", found here," if self.here else "")
        older = f", which is too old for {' '.join(unknown)}" if unknown else ""
        return f"built for {built} by nvcc {self.toolkit.version}{older}"

    def link_flags(self):
        """The run-time is linked statically, so that no CUDA library is needed to import; torch's CUDA half, where it
        has one, comes with libtorch.so, of which no symbol is used."""
        flags = [f"-L{self.toolkit.runtime}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        return [*flags, "-Wl,--no-as-needed", "-ltorch"]

    def command(self, source, target, *defines):
        # One sequence of IEEE operations, as on the CPU: no contraction, nothing flushed, exact division and root.
        flags = ["-O3", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
        host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-ffile-prefix-map={os.getcwd()}/="]
        flags += [part for flag in host for part in ("-Xcompiler", flag)]
        flags += ["-Xptxas", "-warn-spills,-warn-lmem-usage", "-Xfatbin", "-compress-all"]
        flags += ["-g", "-lineinfo"] if self.debug else []
        flags += architecture_flags(self.architectures)
        return self.toolkit.compile_command(*flags, *defines, "-MD", "-MF", target + ".d", "-c", source, "-o", target)

    def jobs(self, sources, folder):
        """What is to be compiled to objects in `folder`: likelihood.cu once for each likelihood."""
        found = []
        for source in sources:
            name = os.path.splitext(os.path.basename(source))[0]
            seconds = SECONDS.get(name, USUAL_SECONDS) * len(self.architectures)
            for one in likelihoods() if name == "likelihood" else [""]:
                target = os.path.join(folder, f"{source}{'.' if one else ''}{one}.o")
                command = self.command(source, target, *([f"-DAEVB_LIKELIHOOD={one}"] if one else []))
                found.append(Job(source, target, tuple(command), seconds, self.toolkit.version))
        return found


def decide(debug, torch, this_machine=False):
    """The Kernels to build with the torch in the folder `torch`, or None; and the decision, a phrase for
    aevb._C.build_info()."""
    asked = switch()
    if asked == "0":
        return None, "not built (AEVB_CUDA=0)"
    if not asked and not torch_cuda(torch):
        return None, "not built (torch was a build without CUDA; AEVB_CUDA=1 builds them all the same)"
    toolkit, reason = find()
    driver = driver_version()
    if toolkit and not asked and driver and driver[0] < int(toolkit.version.split(".")[0]):
        return None, f"not built (nvcc is {toolkit.version}, and the GPU's driver is for CUDA {driver[0]}.{driver[1]})"
    if toolkit:
        kernels = Kernels(toolkit, *choose_architectures(toolkit, this_machine), debug)
        return kernels, kernels.decision()
    if asked == "1":
        stop(f"AEVB_CUDA=1 asks for CUDA kernels, and they cannot be built: {reason}. Set CUDA_HOME to a toolkit.")
    return None, f"not built ({reason})"
