# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels, reads their machine code, and fails on what must not be in it. No GPU is needed.

    python tools/sass_check.py                    every csrc/cuda/*.cu: the checks, and a table of costs
    python tools/sass_check.py --loops FILE.cu    its kernels' loops as well, with their instructions

Fails on: a warning, a spill, a stack frame; local memory, float64, and calls (the slow paths of division and square
root); a vector kernel without 16-byte accesses; a kernel below its floor; a reciprocal or square root of
formulas/elementary.h that is not nvcc's own.

The table says how many instructions a kernel spends on an element, and from them which part of the memory bandwidth it
can reach at most on three GPUs: an upper bound, since it knows nothing of latencies. The costs are those of the loops
in which a kernel spends its time, on the common path (sass.Kernel.common_path); the count with every branch is in
brackets.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cuda_toolkit
import sass
import sass_roots

ROOT = Path(__file__).resolve().parent.parent
# As in tools/cuda_toolkit.py.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]

# ---- what each kernel does ------------------------------------------------------------------------------------------

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "uint8": 1}


@dataclass(frozen=True)
class Stream:
    """What is read or written of each element. As text: "name:type" or "name:bytes", with > before what is written and
    ! after what is not accessed in vectors."""

    size: int
    written: bool
    scalar: bool


@dataclass(frozen=True)
class Work:
    """What the table and the rule on 16-byte accesses know of a kernel. A kernel may have several entries.

    kernel   A regular expression for the whole name, as the table prints it. Its named groups are types.
    streams  What the hot loop reads and writes of each element. The first is accessed 16 bytes at a time, and others as
             many elements at a time. "" is for kernels that need no speed: only the rules for all kernels hold.
    around   Elements that a thread handles in one pass of the loops around the hot one, from inside out. A loop that is
             not listed is not counted; one that was unrolled may stay listed.
    whole    Elements that a thread handles in all, to count what is outside of loops. 0: not counted.
    shared   Where a loop reads the elements back from shared memory: how many a thread handles in a pass of it, and of
             the loops around it, as in `around`. Their cost is added.
    floor    Percent of the H200's bandwidth that the instructions must leave room for, by the type T: about what they
             do now, so that it is not lost.
    note     What sets the entry apart from others of the same kernel.

    The hot loop is the innermost one of which a pass reads and writes whole streams, or the whole kernel; so the
    streams also say what a kernel must do in 16-byte accesses. `around` is a function of the types' sizes.
    """

    kernel: str
    streams: str
    around: Callable[[dict[str, int]], Sequence[float]] = lambda t: ()
    whole: float = 0
    shared: Sequence[float] = ()
    floor: dict[str, float] = field(default_factory=dict)
    note: str = ""


WORK = [
    Work(
        r"gaussian_tile<(?P<T>\w+),true,true>",
        "mu:T logvar:T >z:T",
        whole=16,
        shared=(16, 16),
        floor={"fp32": 78, "bf16": 40},
    ),
    Work(r"gaussian_tile<(?P<T>\w+),true,true>", ">z:T", note=" +1 sample"),
    Work(r"gaussian_tile<(?P<T>\w+),false,true>", "mu:T logvar:T", whole=16, shared=(16, 16)),
    Work(
        r"gaussian_gradient<(?P<T>\w+),false,true>",  # the branch for the KL's gradient is not on the shortest path
        "mu:T logvar:T grad_z:T >grad_mu:T >grad_logvar:T",
        note=" of z",
        floor={"fp32": 90, "bf16": 60},
    ),
    Work(r"gaussian_gradient<(?P<T>\w+),true,true>", "grad_z:T", note=" +1 sample"),
    Work(
        r"log_ratio_tile<(?P<T>\w+),true>",
        "mu:T logvar:T >z:T",
        shared=(8,),
        floor={"fp32": 61, "bf16": 37},
    ),
    Work(
        r"log_ratio_tile<(?P<T>\w+),true>",
        ">z:T",
        shared=(8,),
        note=" +1 sample",
        floor={"fp32": 40, "bf16": 22},
    ),
    Work(
        r"log_ratio_gradient<(?P<T>\w+),false,true>",
        "mu:T logvar:T grad_z:T >grad_mu:T >grad_logvar:T",
        floor={"fp32": 95, "bf16": 68},
    ),
    Work(
        r"log_ratio_gradient<(?P<T>\w+),true,true>",
        "grad_z:T",
        note=" +1 sample",
        floor={"fp32": 44, "bf16": 24},
    ),
    Work("normal_runs", ">eps:4"),
    Work(
        r"log_prob_rows<BernoulliLogits,false,[48],(?P<T>\w+),(?P<X>\w+)>",
        "output:T x:X",
        around=lambda t: (256 // t["T"],),
        floor={"fp32": 90, "bf16": 75},
    ),
    Work(
        r"log_prob_rows<BernoulliLogits,true,[48],(?P<T>\w+),(?P<X>\w+)>",
        "output:T x:X >grad:T",
        around=lambda t: (256 // t["T"],),
        floor={"fp32": 90, "bf16": 80},
    ),
    Work(
        r"log_prob_gradient<BernoulliLogits,[48],(?P<T>\w+),(?P<X>\w+)>",
        "output:T x:X >grad:T",
        floor={"fp32": 90, "bf16": 80},
    ),
    Work(
        r"log_prob_rows<BernoulliProbs,false,[48],(?P<T>\w+),AnyDtype>",
        "output:T x:4!",
        around=lambda t: (256 // t["T"],),
    ),
    Work(r"log_prob_rows<BernoulliProbs,true,[48],(?P<T>\w+),AnyDtype>", "output:T x:4! >grad:T"),
    Work(r"log_prob_gradient<BernoulliProbs,[48],(?P<T>\w+),AnyDtype>", "output:T x:4! >grad:T"),
    Work(
        r"log_prob_rows<GaussianMeans<\w+>,false,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T x:X",
        around=lambda t: (256 // t["T"],),
        floor={"fp32": 95, "bf16": 95},
    ),
    Work(
        r"log_prob_rows<GaussianMeans<\w+>,true,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T x:X >grad:T",
        floor={"fp32": 95, "bf16": 95},
    ),
    Work(
        r"log_prob_gradient<GaussianMeans<\w+>,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T x:X >grad:T",
        floor={"fp32": 95, "bf16": 95},
    ),
    Work(
        r"log_prob_rows<GaussianMeansAndLogvars<\w+>,false,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T logvar:T x:X",
        around=lambda t: (256 // t["T"],),
        floor={"fp32": 95, "bf16": 95},
    ),
    Work(
        r"log_prob_rows<GaussianMeansAndLogvars<\w+>,true,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T logvar:T x:X >grad_mean:T >grad_logvar:T",
        floor={"fp32": 95, "bf16": 90},
    ),
    Work(
        r"log_prob_gradient<GaussianMeansAndLogvars<\w+>,[48],(?P<T>\w+),(?P<X>fp32)>",
        "mean:T logvar:T x:X >grad_mean:T >grad_logvar:T",
        floor={"fp32": 95, "bf16": 90},
    ),
    Work(r"log_prob_(rows|gradient)<Gaussian\w+<\w+>(,\w+)?,[148],\w+,AnyDtype>", ""),  # other dtypes together
    Work("binarize_pixels<true>", "images:1 >x:1", whole=16),
    # Unaligned rows, sums of a few numbers a row, and what only tests call.
    Work(r"(gaussian|log_ratio)_(tile|gradient)<[\w,]+,false>|log_prob_(rows<\w+,\w+|gradient<\w+),1,\w+,\w+>", ""),
    Work(
        r"binarize_pixels<false>|join_parts|mix_seeds|datapoint_losses<\w+,\w+>|elementary_function|scale_elements", ""
    ),
]


def read_streams(text: str, sizes: dict[str, int]) -> list[Stream]:
    types = [(s, s.rstrip("!").split(":")[1]) for s in text.split()]
    return [Stream(sizes[t] if t in sizes else int(t), s[0] == ">", s[-1] == "!") for s, t in types]


# ---- what a GPU can do ----------------------------------------------------------------------------------------------

# Threads' instructions a clock and multiprocessor, as in the CUDA best practices guide's table "throughput of native
# arithmetic instructions". Integer multiplications share the FMA units: all of them on sm_80, half of them later; one
# with a 64-bit or high result takes two slots. Conversions other than I2FP and F2FP go at XU's rate.
ISSUE, IMAD, ALU, XU, LSU = 128, 64, 64, 16, 32


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    fma: int

    @property
    def bytes_per_clock(self) -> float:
        return self.bytes_per_second / (self.multiprocessors * self.hertz)

    @property
    def rates(self) -> dict[str, int]:
        return {"issue": ISSUE, "fma": self.fma, "imad": IMAD, "alu": ALU, "xu": XU, "lsu": LSU}


GPUS = {
    80: Gpu("A100", 108, 1.41e9, 2.04e12, 64),
    90: Gpu("H200", 132, 1.98e9, 4.8e12, 128),
    100: Gpu("B200", 148, 1.965e9, 8e12, 128),
}
JUDGED = 90  # budget and floor are those of the H200

PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 IDP",
    "imad": "IMAD",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "lsu": "LDG STG LD ST LDS STS LDSM LDGSTS SHFL ATOM ATOMG ATOMS RED",
    "control": "BRA JMP BRX EXIT CALL RET BSSY BSYNC BREAK BMOV BAR WARPSYNC YIELD NOP MEMBAR DEPBAR CCTL S2R CS2R LDC",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


def slots(code: Iterable[sass.Instruction]) -> Counter[str]:
    """Slots that the instructions take of each pipe; `issue` is their number."""
    count: Counter[str] = Counter()
    for i in code:
        pipe = PIPE_OF.get(i.base, "uniform" if i.base[0] == "U" or i.base in ("R2UR", "S2UR") else "alu")
        two = (pipe == "imad" and {"WIDE", "HI"} & set(i.parts)) or i.base in ("FFMA2", "FMUL2", "FADD2")
        count["issue"] += 1
        count[pipe] += 2 if two else 1
    count["fma"] += count["imad"]
    return count


# Threads, blocks and KiB of shared memory that a multiprocessor holds.
RESIDENT = {
    75: (1024, 16, 64),
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    120: (1536, 24, 100),
}


@dataclass(frozen=True)
class Occupancy:
    registers: int
    threads: int  # that a multiprocessor holds at a time


def resident_threads(arch: int, registers: int, shared: int, block: int) -> int:
    """Threads that a multiprocessor holds at a time, by registers and static shared memory."""
    threads, blocks, kib = RESIDENT[arch]
    warps = 4 * (16384 // (-(-registers // 8) * 8 * 32))  # a quarter of the register file each, registers by 8
    return block * min(warps * 32 // block, threads // block, blocks, kib * 1024 // (shared + 1024))


# ---- compiling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    source: Path
    arch: int
    cubin: Path
    usage: dict[str, tuple[int, int]]  # registers and bytes of static shared memory, by kernel
    failures: list[str]


def find_compiler() -> str:
    if not (found := cuda_toolkit.candidates()):
        raise FileNotFoundError("nvcc is missing: put it on PATH, or set CUDA_HOME.")
    return found[0]


def compile_cubin(source: Path, arch: int, folder: Path) -> Build:
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    command = [find_compiler(), *FLAGS, *STRICT, f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    failures = [line for line in text.splitlines() if re.search(r"\b(warning|error|fatal)\b", line)]
    if done.returncode and not failures:
        failures = [f"nvcc failed: {text.strip()[-400:]}"]
    usage: dict[str, tuple[int, int]] = {}
    memory: dict[str, int] = {}
    # "Function properties for NAME" and its bytes, then "Used N registers" of the kernel named before.
    name = ""
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            memory[name] = max(memory.get(name, 0), int(found[1]), int(found[2]))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usage[name] = (int(found[1]), int(shared[1]) if shared else 0)
    short = dict(zip(usage, sass.demangle(usage), strict=True))
    failures += [
        f"{short.get(name, name)}: {size} bytes of stack: registers spill, or an array is indexed at run time."
        for name, size in memory.items()
        if size
    ]
    where = f"{source.name} sm_{arch}: "
    return Build(source, arch, cubin, {short[n]: u for n, u in usage.items()}, [where + f for f in failures])


# ---- rules ----------------------------------------------------------------------------------------------------------

FLOAT64 = re.compile(r"^(DADD|DMUL|DFMA|DSETP|DMNMX)\b|\.F64\b|^MUFU\.\w+64H")

# On sm_80, a shuffle of a warp that may have diverged: called only where it has.
SYNCHRONISATION = re.compile(r"__cuda_sm70_\w*sync")


def forbidden(kernel: sass.Kernel) -> list[str]:
    """What no kernel may contain."""
    found = []

    def first(what: str, hits: Iterable[sass.Instruction], advice: str) -> None:
        if hit := next(iter(hits), None):
            found.append(f"{kernel.name}: {what} ({hit.opcode} at {hit.address:#x}): {advice}")

    code = kernel.instructions
    first("local memory", (i for i in code if i.base in ("LDL", "STL")), "registers spill, or an array is indexed.")
    first("float64", (i for i in code if FLOAT64.search(i.opcode)), "a constant without f, or a double variable.")
    targets = {"".join(i.targets) or i.opcode for i in code if i.base == "CALL" and not i.jumps}
    for target in sorted(t for t in targets if not SYNCHRONISATION.search(t)):
        function = re.sub(r"^\$__internal_\d+_\$", "", target)
        found.append(f"{kernel.name}: calls {function}: a division or root that is not *_in_range, or nothing inlined.")
    return found


@dataclass(frozen=True)
class Cost:
    """A kernel's costs on one architecture, per element."""

    kernel: str
    note: str
    arch: int
    bytes: float  # of global memory
    slots: dict[str, float]
    all_branches: float  # instructions, with those that are skipped on the common path
    floor: float
    breakdown: str

    @property
    def clocks(self) -> float:
        """Clocks of a multiprocessor for an element, if the memory is never late."""
        return max(self.slots.get(pipe, 0) / rate for pipe, rate in GPUS[self.arch].rates.items())

    @property
    def memory_clocks(self) -> float:
        return self.bytes / GPUS[self.arch].bytes_per_clock

    @property
    def percent(self) -> float:
        """The part of the memory bandwidth that the instructions allow."""
        return 100 * min(1, self.memory_clocks / self.clocks)

    @property
    def tightest(self) -> str:
        """The pipe with the least room, and how much of what it can do at full bandwidth the kernel uses."""
        rates = GPUS[self.arch].rates
        pipe = max(rates, key=lambda pipe: self.slots.get(pipe, 0) / rates[pipe])
        return f"{pipe} {100 * self.clocks / self.memory_clocks:.0f}%"


def vectors(path: Iterable[sass.Instruction], streams: Sequence[Stream]) -> float:
    """How many vectors of every stream a path reads and writes; 0 where they are not as many.

    A vector is what fills 16 bytes of the first stream.
    """
    length = 16 // streams[0].size
    found = Counter((i.stores, i.bytes) for i in path if i.base in sass.GLOBAL)
    expected: Counter[tuple[bool, int]] = Counter()
    for stream in streams:
        if not stream.scalar:
            size = length * stream.size
            expected[stream.written, min(size, 16)] += max(1, size // 16)
    wide = {found[access] / n for access, n in expected.items() if access[1] == 16}
    # Of narrower accesses there may be others as well: a seed, a row's gradient.
    enough = all(found[access] >= n * max(wide) for access, n in expected.items())
    return wide.pop() if enough and len(wide) == 1 else 0


def hot_chain(kernel: sass.Kernel, streams: Sequence[Stream]) -> tuple[float, list[sass.Region]]:
    """The elements that a pass of the hot loop handles, the loop, and what is around it."""
    found = [(vectors(kernel.common_path(chain[0]), streams), chain) for chain in kernel.root.chains()]
    around = {id(region) for n, chain in found if n for region in chain[1:]}
    innermost = [(n, chain) for n, chain in found if n and id(chain[0]) not in around]
    if not innermost:
        return 0, []
    n, chain = max(innermost, key=lambda hot: hot[0])
    return n * (16 // streams[0].size), chain


def shared_chain(kernel: sass.Kernel, elements: float) -> list[sass.Region]:
    """The longest of the loops that read so many floats from shared memory in a pass, and what is around it."""

    def reads(chain: list[sass.Region]) -> float:
        return sum(i.bytes / 4 for i in kernel.common_path(chain[0]) if i.base == "LDS")

    found = [chain for chain in kernel.root.chains() if not chain[0].children and reads(chain) == elements]
    return max(found, key=lambda chain: len(kernel.common_path(chain[0])), default=[])


def cost(kernel: sass.Kernel, arch: int, work: Work, names: dict[str, str]) -> Cost | str:
    """What a kernel of these types spends on an element, or what is wrong with it."""
    types = {group: SIZES[name] for group, name in names.items()}
    streams = read_streams(work.streams, types)
    elements, chain = hot_chain(kernel, streams)
    if not chain:
        return f"{kernel.name}: no loop accesses {work.streams} in vectors of 16 bytes."
    # Each part: what it is called, a region, the loop in it that is counted elsewhere, elements of a pass.
    parts = list_parts("hot loop", chain, [elements, *(n for n in work.around(types) if n > elements)])
    if work.whole and len(chain) > 1:
        parts.append(("whole kernel", chain[-1], chain[-2], work.whole))
    if work.shared:
        if not (summing := shared_chain(kernel, work.shared[0])):
            return f"{kernel.name}: no loop reads {work.shared[0]:g} elements from shared memory in a pass."
        parts += list_parts("shared", summing, work.shared)
    total: dict[str, float] = defaultdict(float)
    breakdown, branches = [], 0.0
    for name, region, inner, n in parts:
        path = kernel.common_path(region, inner)
        breakdown.append(f"{name} {len(path) / n:.1f}")
        branches += len(kernel.own(region) if inner else kernel.code(region.blocks)) / n
        for pipe, count in slots(path).items():
            total[pipe] += count / n
    width, floor = sum(s.size for s in streams), work.floor.get(names.get("T", ""), 0)
    return Cost(kernel.name, work.note, arch, width, dict(total), branches, floor, " + ".join(breakdown))


Part = tuple[str, sass.Region, sass.Region | None, float]


def list_parts(name: str, chain: Sequence[sass.Region], elements: Sequence[float]) -> list[Part]:
    loops = zip(chain, [None, *chain], elements, strict=False)
    return [(f"around {name}" if inner else name, region, inner, n) for region, inner, n in loops]


def check_costs(kernel: sass.Kernel, arch: int, works: Sequence[Work], costs: list[Cost]) -> list[str]:
    """Adds a kernel's costs to `costs`, and returns what is wrong with it."""
    matches = [(work, match) for work in works if (match := re.fullmatch(work.kernel, kernel.name))]
    failures = [] if matches else [f"{kernel.name}: WORK in tools/sass_check.py has no entry for it."]
    for work, match in matches:
        if unknown := set(match.groupdict().values()) - set(SIZES):
            failures.append(f"{kernel.name}: SIZES in tools/sass_check.py has no {unknown.pop()}.")
        elif work.streams:
            result = cost(kernel, arch, work, match.groupdict())
            failures += [result] if isinstance(result, str) else []
            costs += [result] if isinstance(result, Cost) else []
    return failures


# ---- the table ------------------------------------------------------------------------------------------------------


def print_table(costs: Sequence[Cost], occupancies: dict[tuple[str, int], Occupancy]) -> list[str]:
    """Prints the costs; returns what is below its floor."""
    gpu, archs = GPUS[JUDGED], sorted({c.arch for c in costs})
    if JUDGED not in archs:
        return []
    percents = {(c.kernel, c.note, c.arch): f"{c.percent:3.0f}%" for c in costs}
    room = ", ".join(f"{rate / gpu.bytes_per_clock:.2f} {pipe}" for pipe, rate in gpu.rates.items())
    print(f"Instructions of a thread for an element on sm_{JUDGED}, and the part of the memory bandwidth they allow.")
    print(f"Room for each byte at the {gpu.name}'s full bandwidth: {room}.\n")
    print(
        f"{'kernel':48} reg thr.  B  instr [all]   fma imad  alu  xu tightest  ",
        *(f"{GPUS[arch].name:>4}" for arch in archs),
    )
    below = []
    for c in (c for c in costs if c.arch == JUDGED):
        o = occupancies[c.kernel, c.arch]
        fma, imad, alu, xu = (c.slots.get(pipe, 0) for pipe in ("fma", "imad", "alu", "xu"))
        print(
            f"{(c.kernel + c.note)[:48]:48} {o.registers:3} {o.threads:4} {c.bytes:3g} {c.slots['issue']:5.1f}",
            f"{f'[{c.all_branches:.0f}]':>5} {fma:5.1f} {imad:4.1f} {alu:4.1f} {xu:3.1f} {c.tightest:10}",
            *(percents.get((c.kernel, c.note, arch), "  - ") for arch in archs),
        )
        if c.percent < c.floor:
            below.append(
                f"{c.kernel}: {c.percent:.0f}% of the {gpu.name}'s bandwidth at most; its floor is {c.floor:g}%."
            )
    most = max(occupancies, key=lambda where: occupancies[where].registers)
    least = min(occupancies, key=lambda where: occupancies[where].threads)
    print(f"\nMost registers: {occupancies[most].registers} ({most[0]}, sm_{most[1]}).")
    print(f"Fewest threads on a multiprocessor: {occupancies[least].threads} ({least[0]}, sm_{least[1]}).")
    return below


# ---- the command ----------------------------------------------------------------------------------------------------


def check(
    sources: Sequence[Path],
    archs: Sequence[int] = (80, 90, 100),
    compile_only: Sequence[int] = (75, 86, 89, 120),
    works: Sequence[Work] = WORK,
    jobs: int = 2,
    loops: bool = False,
) -> list[str]:
    """Compiles and checks the sources, prints the table, and returns what failed, a sentence each."""
    failures: list[str] = []
    costs: list[Cost] = []
    threads: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(compile_cubin, s, a, Path(folder)) for s in sources for a in (*archs, *compile_only)]
        builds = [task.result() for task in tasks]
        for build in builds:
            failures += build.failures
            if build.arch not in archs or not build.cubin.exists():
                continue
            found: list[str] = []
            for kernel in sass.read(build.cubin):
                threads[kernel.name] = kernel.max_threads
                found += forbidden(kernel)
                try:
                    found += check_costs(kernel, build.arch, works, costs)
                    if loops and build.arch == JUDGED:
                        sass.print_loops(kernel)
                        ours = [c for c in costs if (c.kernel, c.arch) == (kernel.name, JUDGED)]
                        print(*(f"an element{c.note}: {c.breakdown}\n" for c in ours))
                except sass.Unreadable as e:
                    found.append(str(e))
            failures += [f"{build.source.name} sm_{build.arch}: {f}" for f in found]
    return failures + print_table(costs, occupancy(builds, threads))


def check_roots(archs: Sequence[int] = (80, 90, 100), jobs: int = 2) -> list[str]:
    """Whether rcp_in_range and sqrt_in_range are nvcc's own on every architecture."""
    failures = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        source = Path(folder) / "roots.cu"
        source.write_text(sass_roots.SOURCE)
        for build in pool.map(lambda arch: compile_cubin(source, arch, Path(folder)), archs):
            found = [] if build.failures else sass_roots.check(sass.read(build.cubin))
            failures += [*build.failures, *(f"sm_{build.arch}: {f}" for f in found)]
    return failures


def occupancy(builds: Sequence[Build], threads: dict[str, int]) -> dict[tuple[str, int], Occupancy]:
    """Registers and resident threads of every kernel on every architecture; blocks of 256 where no bound is stated."""
    return {
        (name, b.arch): Occupancy(registers, resident_threads(b.arch, registers, shared, threads.get(name) or 256))
        for b in builds
        for name, (registers, shared) in b.usage.items()
    }


def architectures(text: str) -> list[int]:
    return [int(arch) for arch in text.split(",") if arch]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources; all of csrc/cuda by default")
    parser.add_argument("--archs", type=architectures, default=[80, 90, 100], help="compiled and read: 80,90,100")
    parser.add_argument("--compile-only", type=architectures, default=[75, 86, 89, 120], help="only compiled")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time: 2")
    parser.add_argument("--loops", action="store_true", help="list the kernels' loops")
    options = parser.parse_args()
    sources = options.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if unknown := set(options.archs) - set(GPUS):
        parser.error(
            f"--archs takes those whose GPUs are in GPUS, {','.join(map(str, GPUS))}, and not {unknown.pop()}."
        )
    compile_only = [arch for arch in options.compile_only if arch not in options.archs]
    try:
        failures = check(sources, options.archs, compile_only, WORK, options.jobs, options.loops)
        failures += check_roots(options.archs, options.jobs)
    except (FileNotFoundError, sass.Unreadable) as e:
        sys.exit(f"sass_check: {e}")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(sources)} sources, {len(failures)} failures.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
