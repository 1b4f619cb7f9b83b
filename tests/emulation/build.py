"""Builds CUDA sources for the CPU with g++ and cuda_shim.h, for tests; gives the emulated ops, and their controls.

What is built is kept in $AEVB_EMULATION_CACHE (or a folder of the user's in the temporary directory), under a name made
from its sources and flags, and is used again as long as those are the same.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++").split()
# Under tools/sanitize.sh, what Python loads must be built for it too.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

# As in setup.py, one sequence of IEEE operations. Kernels reinterpret pointers, as CUDA allows.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DAEVB_EMULATE", f"-I{HERE}", "-fno-strict-aliasing"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def has_sanitizers() -> bool:
    """Whether the compiler comes with AddressSanitizer and UBSan."""
    return all(os.path.isabs(_run([*COMPILER, f"-print-file-name=lib{name}.so"]).strip()) for name in ("asan", "ubsan"))


def library(name: str, sources: Sequence[Path], *, sanitize: bool = SANITIZED, extra_flags: Sequence[str] = ()) -> Path:
    """The shared library of the sources (.cu, .cpp) and of control.cpp."""
    return _build(f"{name}.so", [*sources, HERE / "control.cpp"], sanitize, extra_flags, ["-shared"])


def program(name: str, sources: Sequence[Path], *, sanitize: bool = SANITIZED, extra_flags: Sequence[str] = ()) -> Path:
    """The program of the sources."""
    return _build(name, sources, sanitize, extra_flags, [])


@functools.cache
def emulated_library() -> Path:
    """Every op's CUDA kernels and glue, as torch.ops.aevb_emulated for CPU tensors."""
    from torch.utils import cpp_extension

    sources = [path for path in CSRC.glob("*.cpp") if path.name != "bindings.cpp"]
    sources += [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp"), HERE / "gpu.cpp"]
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    flags += [f"-L{path}" for path in cpp_extension.library_paths()]
    return library("aevb_emulated", sorted(sources), extra_flags=[*flags, "-ltorch_cpu"])


@functools.cache
def emulated_ops():
    """torch.ops.aevb_emulated, built and loaded."""
    import torch

    torch.ops.load_library(emulated_library())
    return torch.ops.aevb_emulated


@functools.cache
def emulated_control() -> "Control":
    emulated_ops()
    return Control(emulated_library())


class Launch(NamedTuple):
    grid: int
    threads: int


class Control:
    """The order in which a library's threads and blocks run, and the record of what it launched."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.aevb_emulation_launches.restype = ctypes.c_int64

    @contextlib.contextmanager
    def order(self, order: str, seed: int = 0) -> Iterator[None]:
        """Within it the order is "forward", "reverse" or "shuffled" (by the seed); after it, forward."""
        number = ["forward", "reverse", "shuffled"].index(order)
        self._library.aevb_emulation_set_order(number, ctypes.c_uint64(seed))
        try:
            yield
        finally:
            self._library.aevb_emulation_set_order(0, ctypes.c_uint64(0))

    @contextlib.contextmanager
    def multiprocessors(self, count: int) -> Iterator[None]:
        """Within it the emulated ops take their GPU to have so many multiprocessors."""
        self._library.aevb_emulation_set_multiprocessors(count)
        try:
            yield
        finally:
            self._library.aevb_emulation_set_multiprocessors(132)

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Launch]]:
        """Gives a list that holds, after the block, what was launched within it."""
        launches: list[Launch] = []
        self._library.aevb_emulation_reset_record()
        yield launches
        n = self._library.aevb_emulation_launches(None, None, ctypes.c_int64(0))
        grids, threads = ((ctypes.c_int64 * n)() for _ in range(2))
        self._library.aevb_emulation_launches(grids, threads, ctypes.c_int64(n))
        launches += map(Launch, grids, threads)


def _build(
    name: str, sources: Sequence[Path], sanitize: bool, extra_flags: Sequence[str], link_flags: Sequence[str]
) -> Path:
    flags = [*FLAGS, *(["-O1", "-g", *SANITIZERS] if sanitize else ["-O2"]), *extra_flags]
    if "fma" in _cpu_flags():
        flags.append("-mfma")  # what fmaf() computes is the same without it, by a slow function
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags), sources))
    target = _cache() / f"{_hash(*(path.name for path in objects), *link_flags)}-{name}"
    return _make(target, ["-o", "{}", *map(str, objects), *flags, *link_flags])


def _compile(source: Path, flags: Sequence[str]) -> Path:
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.inl"), *HERE.glob("*.h")]
    contents = [path.read_text() for path in [source, *sorted(headers)]]
    target = _cache() / f"{_hash(str(source), _compiler_version(), *flags, *contents)}-{source.stem}.o"
    return _make(target, [*flags, "-c", "-o", "{}", "-x", "c++", str(source)])


def _make(target: Path, arguments: Sequence[str]) -> Path:
    """Runs the compiler to make the target, unless it is there; "{}" stands for the file to write."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _run([*COMPILER, *(str(made) if argument == "{}" else argument for argument in arguments)])
            made.rename(target)  # at once, so that nobody finds half a file
    return target


def _run(command: Sequence[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout


def _cache() -> Path:
    default = Path(tempfile.gettempdir()) / f"aevb-emulation-{os.getuid()}"
    folder = Path(os.environ.get("AEVB_EMULATION_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set AEVB_EMULATION_CACHE to a folder of your own")
    return folder


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _compiler_version() -> str:
    return _run([*COMPILER, "--version"])


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])
