# SPDX-License-Identifier: Apache-2.0
"""Reads a cubin's machine code: kernels, their loops, and the path that most threads take through a loop."""

from __future__ import annotations

import operator
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\S+):$")
SECTION = re.compile(r"^\s*\.section\s+(\S+?),")
TARGET = re.compile(r"`\((\S+?)\)")
GLOBAL, SHARED = ("LDG", "STG", "LD", "ST"), ("LDS", "STS")


class Unreadable(Exception):
    """The machine code has something that this reader does not understand."""


def find_disassembler() -> str:
    """nvdisasm: on PATH, or where PyPI's package puts it."""
    folders = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"))
    for folder in (None, *folders):
        if found := shutil.which("nvdisasm", path=folder):
            return found
    raise FileNotFoundError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm, or put CUDA's bin folder on PATH.")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate under which it runs, such as "!P0", or ""
    opcode: str
    operands: tuple[str, ...]

    @cached_property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def base(self) -> str:
        return self.parts[0]

    @cached_property
    def targets(self) -> list[str]:
        """The labels that it may jump to, or the function that it calls."""
        if self.base in ("BRX", "JMX"):
            return re.findall(r"\.L_\w+", ",".join(self.operands))  # BRX R2 -0x100 (*"BRANCH_TARGETS .L_1,.L_2"*)
        return TARGET.findall(self.operands[-1]) if self.jumps or self.base == "CALL" else []

    @property
    def jumps(self) -> bool:
        # ptxas also leaves some loops by CALL.REL.NOINC to a label, which nothing returns from.
        return self.base in ("BRA", "JMP", "BRX", "JMX") or (self.base == "CALL" and "`(.L_" in self.operands[-1])

    @property
    def conditional(self) -> bool:
        # BRA P0, BRA.U UP0 and BRA.DIV name the condition as an operand.
        return bool(self.guard) or (self.base in ("BRA", "JMP") and len(self.operands) > 1)

    @property
    def bytes(self) -> int:
        """Bytes that a thread reads from or writes to global or shared memory; 0 where it does neither."""
        if self.base not in (*GLOBAL, *SHARED):
            return 0
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[part] for part in self.parts if part in widths), 4)

    @property
    def stores(self) -> bool:
        return self.base in ("STG", "ST", "STS")


@dataclass
class Region:
    """A loop, or the whole kernel: the blocks in it, and the loops directly inside."""

    header: int
    blocks: set[int]
    children: list[Region] = field(default_factory=list)

    def chains(self, around: Sequence[Region] = ()) -> Iterator[list[Region]]:
        """This region and all inside, each with those around it, from inside out."""
        chain = [self, *around]
        for child in self.children:
            yield from child.chains(chain)
        yield chain


@dataclass
class Kernel:
    name: str  # demangled, without its parameters
    instructions: list[Instruction]
    labels: dict[str, int]  # addresses
    max_threads: int = 0  # of __launch_bounds__; 0: not stated

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        """Straight runs of instructions, by their first address."""
        starts = {self.instructions[0].address} | set(self.labels.values())
        blocks: dict[int, list[Instruction]] = {}
        new = True
        for instruction in self.instructions:
            if new or instruction.address in starts:
                blocks[instruction.address] = block = []
            block.append(instruction)
            new = instruction.jumps or instruction.base in ("EXIT", "RET")
        return blocks

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        starts = list(self.blocks)
        result = {}
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            last = self.blocks[start][-1]
            ahead = [] if following is None else [following]
            result[start] = [self.labels[target] for target in last.targets] if last.jumps else []
            if last.jumps and not result[start]:
                raise Unreadable(f"{self.name}: where {last.opcode} at {last.address:#x} jumps is not said.")
            if last.conditional or not (last.jumps or last.base in ("EXIT", "RET")):
                result[start] += ahead
        return result

    def postorder(self, start: int, within: set[int] | None = None) -> list[int]:
        order: list[int] = []
        seen = {start}
        stack = [(start, iter(self.successors[start]))]
        while stack:
            node, ahead = stack[-1]
            for s in ahead:
                if s not in seen and (within is None or s in within):
                    seen.add(s)
                    stack.append((s, iter(self.successors[s])))
                    break
            else:
                order.append(node)
                stack.pop()
        return order

    @cached_property
    def root(self) -> Region:
        """The kernel as a region; its natural loops nest inside."""
        entry = self.instructions[0].address
        order = self.postorder(entry)[::-1]
        predecessors: dict[int, list[int]] = {b: [] for b in order}
        for b in order:
            for s in self.successors[b]:
                predecessors[s].append(b)
        dominators = {b: set(order) for b in order}
        dominators[entry] = {entry}
        changed = True
        while changed:
            changed = False
            for b in order[1:]:
                new = {b} | set.intersection(*(dominators[p] for p in predecessors[b]))
                if new != dominators[b]:
                    dominators[b], changed = new, True
        loops: dict[int, set[int]] = {}
        for b in order:
            for header in self.successors[b]:
                if header in dominators[b]:  # the edge goes back: the loop is what reaches it without its header
                    body = loops.setdefault(header, {header})
                    stack = [b]
                    while stack:
                        if (node := stack.pop()) not in body:
                            body.add(node)
                            stack += predecessors[node]
        root = Region(entry, set(order))
        for header, body in sorted(loops.items(), key=lambda loop: -len(loop[1])):
            parent = root
            while inner := next((c for c in parent.children if header in c.blocks and body <= c.blocks), None):
                parent = inner
            parent.children.append(Region(header, body))
        return root

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        return [i for b in sorted(blocks) for i in self.blocks[b] if i.base != "NOP"]

    def own(self, region: Region) -> list[Instruction]:
        """All of a region's instructions but those of the loops inside."""
        return self.code(region.blocks.difference(*(c.blocks for c in region.children)))

    def common_path(self, region: Region, through: Region | None = None) -> list[Instruction]:
        """The instructions of one pass through a region; of the loop `through` inside, only that it is passed.

        Of all ways through, it is the one with the most 16-byte accesses, of these one with the fewest other loops,
        then with the most special functions (MUFU), then with the fewest instructions. So rare branches are left out,
        such as a row's end or noise that begins inside a counter, but no work is. A loop on the way counts as one pass.
        Beside `through`, loops are avoided first: they do what it leaves, or the same for other rows.
        """
        inside = {b: c for c in region.children for b in c.blocks}
        best: dict[int, tuple[tuple[int, ...], list[Instruction]]] = {}
        for b in self.postorder(region.header, region.blocks):  # what follows a block comes before it
            child = inside.get(b)
            if child and b != child.header:
                continue
            if child:
                code = [] if child is through else self.common_path(child)
                ahead = {s for c in child.blocks for s in self.successors[c]} - child.blocks
            else:
                code, ahead = self.blocks[b], set(self.successors[b])
            rest = [best[s] for s in ahead if s in best and s != region.header]
            ends = region is self.root and not child and code[-1].base == "EXIT"
            if region.header in ahead or ends:
                rest.append(((0, 0, 0, 0, 0), []))
            if rest:
                score, tail = max(rest, key=lambda found: found[0])
                wide, work = sum(i.bytes >= 16 for i in code), sum(i.base == "MUFU" for i in code)
                loop = -int(child is not None and child is not through)
                ways = (int(child is through), loop, wide) if through else (0, wide, loop)
                step = (*ways, work, -len(code))
                best[b] = tuple(map(operator.add, score, step)), code + tail
        if region.header not in best:
            raise Unreadable(f"{self.name} has a loop with two entries.")
        return [i for i in best[region.header][1] if i.base != "NOP"]


TYPES = {"unsigned char": "uint8", "BFloat16": "bf16", "Float16": "fp16", "float": "fp32"}


def demangle(names: Iterable[str]) -> list[str]:
    """C++ names without their parameters, namespaces and spaces, and with short types: rows<Bernoulli,8,bf16,uint8>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in text.splitlines()]


def short_name(name: str) -> str:
    name = re.sub(r"^void ", "", name.replace("(anonymous namespace)::", ""))
    depth = 0
    for end, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:end]
            break
    for long, short in TYPES.items():
        name = re.sub(rf"\b{long}\b", short, name)
    return re.sub(r"\b\w+::", "", name).replace(", ", ",")


def read(cubin: str | os.PathLike[str]) -> list[Kernel]:
    """The kernels of a cubin."""
    done = subprocess.run([find_disassembler(), cubin], capture_output=True, text=True)
    if done.returncode:
        raise Unreadable(f"nvdisasm cannot read {cubin}: {done.stderr.strip()}")
    return parse(done.stdout)


def parse(text: str) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    threads: dict[str, int] = {}
    section, bounds_next = "", False
    pending: list[str] = []
    for line in text.splitlines():
        if found := SECTION.match(line):
            section, pending, bounds_next = found[1], [], False
        elif "EIATTR_MAX_THREADS" in line:
            bounds_next = True
        elif bounds_next and ".word" in line:
            threads[section.removeprefix(".nv.info.")] = int(line.split(".word")[1], 0)
            bounds_next = False
        elif not section.startswith(".text."):
            continue
        elif found := LABEL.match(line):
            pending.append(found[1])
        elif found := INSTRUCTION.match(line):
            name = section.removeprefix(".text.")
            kernel = kernels.setdefault(name, Kernel(name, [], {}))
            address = int(found[1], 16)
            kernel.labels.update(dict.fromkeys(pending, address))
            pending = []
            operands = tuple(o.strip() for o in found[4].split(",")) if found[4] else ()
            kernel.instructions.append(Instruction(address, found[2] or "", found[3], operands))
    for (name, kernel), short in zip(kernels.items(), demangle(kernels), strict=True):
        kernel.name, kernel.max_threads = short, threads.get(name, 0)
    return sorted(kernels.values(), key=lambda k: k.name)


def print_loops(kernel: Kernel) -> None:
    """Lists a kernel's loops, nested, with their instructions and accesses on the common path."""

    def show(region: Region, depth: int) -> None:
        path = kernel.common_path(region)
        end = kernel.blocks[max(region.blocks)][-1].address
        accesses = Counter(f"{i.base}.{8 * i.bytes}" for i in path if i.bytes)
        print(
            f"{'  ' * depth}{'loop' if depth else kernel.name} {region.header:#x}..{end:#x}:",
            f"{len(path)} instructions; its own with all branches {len(kernel.own(region))};",
            *(f"{n} {width}" for width, n in accesses.items()),
        )
        for child in region.children:
            show(child, depth + 1)

    show(kernel.root, 0)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for kernel in read(path):
            print_loops(kernel)
