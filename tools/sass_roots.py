# SPDX-License-Identifier: Apache-2.0
"""Compares the reciprocal and the square root of formulas/elementary.h with nvcc's own, in machine code."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import sass

SOURCE = """#include "formulas/elementary.h"
#define KERNEL(name, f) extern "C" __global__ void name(const float* a, float* y) { float x = *a; *y = f; }
KERNEL(ours_rcp, aevb::rcp_in_range(x))
KERNEL(nvcc_rcp, 1.0f / x)
KERNEL(ours_sqrt, aevb::sqrt_in_range(x))
KERNEL(nvcc_sqrt, sqrtf(x))
"""


def check(kernels: Sequence[sass.Kernel]) -> list[str]:
    """rcp_in_range and sqrt_in_range are what nvcc's IEEE division and root do where they take no slow path.

    So they are correctly rounded where those are: the values must be the same expressions of the operand, and nvcc's
    test for its fast path must let all of 2^-60 .. 2^60 pass.
    """
    failures = []
    named = {k.name: k for k in kernels}
    for name in ("rcp", "sqrt"):
        ours, nvcc = named[f"ours_{name}"], named[f"nvcc_{name}"]
        if (mine := stored_value(ours)) != (theirs := stored_value(nvcc)):
            failures.append(f"{name}_in_range is {mine}, and nvcc's own is {theirs}.")
        # Each binade's ends: nvcc tests the exponent alone, or for an interval.
        ends = [(e + 127 << 23) + m for e in range(-60, 60) for m in (0, 0x7FFFFF)] + [60 + 127 << 23]
        if slow := [bits for bits in ends if not takes_fast_path(nvcc, bits)]:
            x = struct.unpack("f", struct.pack("I", slow[0]))[0]
            failures.append(f"{name}_in_range promises 2^-60 .. 2^60, and nvcc's own has a slow path for {x:g}.")
    return failures


Value = tuple[bool, str]  # negated, expression


def stored_value(kernel: sass.Kernel) -> str:
    """What the kernel stores, as an expression of the x that it loads, on the path without a call."""
    values: dict[str, Value] = {}

    def value(operand: str) -> Value:
        text = operand.removeprefix("-").removesuffix(".reuse")
        negated, expression = values.get(text, (False, text))
        return negated != operand.startswith("-"), expression

    def product(a: Value, b: Value) -> Value:
        return a[0] != b[0], " * ".join(sorted((a[1], b[1])))

    for i in path_without_calls(kernel):
        # .FTZ changes nothing: no intermediate result is subnormal for an operand in 2^-60 .. 2^60.
        kind, sources = i.opcode.replace(".FTZ", ""), i.operands[1:]
        if i.base == "LDG":
            result = (False, "x")
        elif i.base == "MUFU":
            result = (False, f"{kind}({'-' * value(sources[0])[0]}{value(sources[0])[1]})")
        elif kind == "FMUL":
            negated, text = product(value(sources[0]), value(sources[1]))
            result = (negated, f"({text})")
        elif kind == "FFMA":  # -(a b + c) is -a b - c, rounded to nearest
            negated, text = product(value(sources[0]), value(sources[1]))
            c = value(sources[2])
            result = (negated, f"fma({text}, {'-' * (c[0] != negated)}{c[1]})")
        elif kind == "FADD" and sources[1] == "-RZ":
            result = value(sources[0])
        elif i.stores:
            negated, text = value(sources[0])
            return "-" * negated + text
        else:
            result = (False, f"{kind} at {i.address:#x}")
        if i.operands:
            values[i.operands[0]] = result
    raise sass.Unreadable(f"{kernel.name} stores nothing.")


def path_without_calls(kernel: sass.Kernel) -> list[sass.Instruction]:
    def walk(block: int, seen: frozenset[int]) -> list[sass.Instruction] | None:
        code = kernel.blocks[block]
        if any(i.base == "CALL" for i in code):
            return None
        if any(i.stores for i in code):
            return code
        tails = (walk(s, seen | {s}) for s in kernel.successors[block] if s not in seen)
        return next((code + tail for tail in tails if tail is not None), None)

    if (path := walk(kernel.root.header, frozenset())) is None:
        raise sass.Unreadable(f"{kernel.name} has no path without a call.")
    return path


def takes_fast_path(kernel: sass.Kernel, bits: int) -> bool:
    """Whether the kernel makes no call for an operand of these bits: its integer test of them, carried out."""
    values: dict[str, int] = {"RZ": 0}

    def value(operand: str) -> int:
        return values[operand.removesuffix(".reuse")] if operand[0] in "RP" else int(operand, 0)

    block: int | None = kernel.root.header
    while block is not None:
        following = kernel.successors[block]
        for i in kernel.blocks[block]:
            sources = [o for o in i.operands[1:] if o not in ("PT", "!PT")]
            if i.base == "CALL":
                return False
            if i.stores:
                return True
            if i.base == "LDG":
                values[i.operands[0]] = bits
            elif i.base in ("IADD3", "IADD", "VIADD") and all(o in values or o[0] not in "RUc" for o in sources):
                values[i.operands[0]] = sum(map(value, sources)) & 0xFFFFFFFF
            elif i.opcode == "LOP3.LUT" and sources[2:4] == ["RZ", "0xc0"] and sources[0] in values:
                values[i.operands[0]] = value(sources[0]) & value(sources[1])
            elif i.opcode == "ISETP.GT.U32.AND" and sources[0] in values:
                values[i.operands[0]] = int(value(sources[0]) > value(sources[1]))
            elif i.jumps and i.conditional:
                if (predicate := i.guard.removeprefix("!")) not in values:
                    raise sass.Unreadable(f"{kernel.name}: the test for the slow path is not understood.")
                jumps = bool(values[predicate]) != i.guard.startswith("!")
                following = following[:1] if jumps else following[1:]
            elif i.operands:
                values.pop(i.operands[0], None)
        block = following[0] if following else None
    raise sass.Unreadable(f"{kernel.name} stores nothing.")


# ---- the command ----------------------------------------------------------------------------------------------------
