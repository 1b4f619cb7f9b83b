"""Makes the files of tests/golden again, or says what keeps it from that:

    python tests/make_golden.py                # where calls or runs were added, changed or taken away
    python tests/make_golden.py "The line."    # where results are others: the line of CHANGELOG.md that says why

bits.json has two digests of each group of calls in golden_cases.py: of what goes in, so that other inputs are not taken
for other bits, and of what comes out. numbers.json has what is held to a tolerance: numbers that still hold stay as
they are. The folder of a run is never made again: it is of its version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import golden_cases
import golden_runs
import numpy as np
import torch
from golden_cases import Call
from torch import Tensor

from aevb import _C, files
from aevb.ops import autograd

HERE = Path(__file__).resolve().parent
GOLDEN, CHANGELOG = HERE / "golden", HERE.parent / "CHANGELOG.md"
BITS, NUMBERS = GOLDEN / "bits.json", GOLDEN / "numbers.json"
RUN = GOLDEN / "run-55b551f"
FIRST = "as of 55b551f"
WORDS = "bits changed"
ADVICE = (
    f'a change of results needs a line in CHANGELOG.md with the words "{WORDS}" and a reason, and then `python '
    f'tests/make_golden.py "that line"`'
)
# Of the largest number in a tensor. In half precision products are rounded to it: four units in the last place.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}

# ---- bits -----------------------------------------------------------------------------------------------------------


class Digests(NamedTuple):
    inputs: str
    results: str


# Of each dtype the integers of its size, the largest of them, and the bits of infinity: above these are, but for the
# sign, the NaNs.
FLOATS = {
    torch.float32: (torch.int32, np.int32(0x7FFFFFFF), np.int32(0x7F800000)),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), np.int16(0x7F80)),
    torch.float16: (torch.int16, np.int16(0x7FFF), np.int16(0x7C00)),
}


def as_bytes(value: Any) -> bytes:
    """What a digest is of: a tensor's dtype, shape and bits, with one NaN for all."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    flat = value.detach().contiguous().view(-1)
    if value.dtype in FLOATS:
        integer, largest, infinity = FLOATS[value.dtype]
        bits = flat.view(integer).numpy()
        is_nan = (bits & largest) > infinity
        bits = np.where(is_nan, largest, bits) if is_nan.any() else bits
    else:
        bits = flat.numpy()
    return f"{value.dtype} {tuple(value.shape)}".encode() + bits.tobytes()


class _Seen:
    """The digests of the last inputs, since many calls have them in common."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, bytes]] = {}

    def digest(self, value: Any) -> bytes:
        if id(value) not in self.known:
            if len(self.known) > 50:
                self.known.clear()
            self.known[id(value)] = value, hashlib.sha256(as_bytes(value)).digest()
        return self.known[id(value)][1]


def digests_of(calls: Iterable[Call]) -> dict[str, Digests]:
    """By group; the order of a group's calls counts."""
    found: dict[str, tuple[Any, Any]] = {}
    seen = _Seen()
    for call in calls:
        inputs, results = found.setdefault(call.group, (hashlib.sha256(), hashlib.sha256()))
        inputs.update(b"".join(map(seen.digest, call.inputs)) + b";")
        for value in call.results:
            results.update(as_bytes(value))
        results.update(b";")
    return {
        group: Digests(inputs.hexdigest()[:16], results.hexdigest())
        for group, (inputs, results) in sorted(found.items())
    }


def read_bits() -> tuple[str, dict[str, Digests]]:
    """The reason for which the digests are as they are, and these by group."""
    held = json.loads(BITS.read_text())
    return held["reason"], {group: Digests(*text.split()) for group, text in held["digests"].items()}


def write_bits(reason: str, digests: Mapping[str, Digests]) -> None:
    held = {"reason": reason, "digests": {group: " ".join(both) for group, both in sorted(digests.items())}}
    files.replace(BITS, json.dumps(held, indent=1).encode() + b"\n")


class Differences(NamedTuple):
    """Groups that are not as they are held."""

    changed: list[str]
    """Of the same inputs, other bits."""
    other_inputs: list[str]
    not_held: list[str]
    gone: list[str]

    @classmethod
    def between(cls, found: Mapping[str, Digests], held: Mapping[str, Digests]) -> Differences:
        both = [group for group in found if group in held]
        return cls(
            [g for g in both if found[g].inputs == held[g].inputs and found[g].results != held[g].results],
            [g for g in both if found[g].inputs != held[g].inputs],
            [g for g in found if g not in held],
            [g for g in held if g not in found],
        )

    def __str__(self) -> str:
        """A paragraph for each kind that there is, and what is to be done about it."""
        texts = {
            "have other bits than those in tests/golden": (self.changed, ADVICE),
            "have other inputs than those in tests/golden": (
                self.other_inputs,
                "which says nothing of bits: either the calls were changed, and `python tests/make_golden.py` is next, "
                "or this machine makes other inputs of the same seeds",
            ),
            "are not in tests/golden": (self.not_held, "`python tests/make_golden.py` adds them"),
            "of tests/golden are not called": (self.gone, "`python tests/make_golden.py` takes them out"),
        }
        return "\n".join(_listed(groups, what, advice) for what, (groups, advice) in texts.items() if groups)


def _listed(names: list[str], what: str, advice: str) -> str:
    return "\n  ".join([f"{len(names)} {what}; {advice}:", *names])


# ---- numbers --------------------------------------------------------------------------------------------------------

Numbers = list[list[float]]


def some_of(t: Tensor) -> list[float]:
    """A tensor's numbers, or where they are many some of them and the root of their mean square."""
    flat = t.detach().double().flatten()
    if len(flat) > 6:
        flat = torch.cat([flat[torch.arange(5) * (len(flat) - 1) // 4], flat.square().mean().sqrt().view(1)])
    return [float(f"{value:.8g}") for value in flat.tolist()]


def numbers_of_calls() -> dict[str, Numbers]:
    return {call.group: [some_of(t) for t in call.results] for call in golden_cases.library_calls()}


def numbers_of_training() -> dict[str, Numbers]:
    """Of each short run, for each term a list over its epochs."""
    found = {"what PyTorch draws": [some_of(t) for t in golden_runs.draws()]}
    for name in golden_runs.TRAINED:
        terms = torch.tensor(list(golden_runs.training(name)), dtype=torch.float64)
        found[f"training {name}"] = [some_of(term) for term in terms.unbind(1)]
    return found


def numbers_of_run(copy: Path) -> dict[str, Numbers]:
    """What the run of another version answers, and its metrics when it has gone on, for each a list over its epochs;
    `copy` is one of the folder, which is written to."""
    name = RUN.name
    found = {f"{name} {question}": [some_of(answer)] for question, answer in golden_runs.answers(copy, copy)}
    golden_runs.go_on(copy)
    lines = golden_runs.metrics(copy)
    metrics = {f"{name} {key}": [[float(f"{line[key]:.8g}") for line in lines]] for key in lines[0]}
    return found | metrics


def read_numbers() -> dict[str, Numbers]:
    return json.loads(NUMBERS.read_text())


def write_numbers(numbers: Mapping[str, Numbers]) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(numbers[name])}" for name in sorted(numbers))
    files.replace(NUMBERS, f"{{\n{lines}\n}}\n".encode())


def off_by(name: str, found: Numbers, held: Numbers) -> float:
    """How far numbers are from those held, in units of what is allowed."""
    tolerance = next((value for dtype, value in TOLERANCES.items() if f" {dtype}" in name), 1e-5)
    if [len(part) for part in found] != [len(part) for part in held]:
        return float("inf")
    worst = 0.0
    for part, expected in zip(found, held, strict=True):
        allowed = tolerance * max(map(abs, expected), default=0.0)
        for a, b in zip(part, expected, strict=True):
            if a != b:
                worst = max(worst, abs(a - b) / allowed if allowed and a == a else float("inf"))
    return worst


def wrong_numbers(found: Mapping[str, Numbers], held: Mapping[str, Numbers]) -> dict[str, float]:
    """The names whose numbers do not hold, and by how often what is allowed they are off."""
    off = {name: off_by(name, numbers, held[name]) for name, numbers in found.items() if name in held}
    return {name: value for name, value in off.items() if value > 1}


def told(wrong: Mapping[str, float]) -> str:
    names = [f"{name}: off by {value:.3g} times what is allowed" for name, value in wrong.items()]
    return _listed(names, "are not the numbers in tests/golden", ADVICE)


# ---- the command ----------------------------------------------------------------------------------------------------


def in_changelog(line: str) -> bool:
    return " ".join(line.split()) in " ".join(CHANGELOG.read_text().split())


def objection(reason: str | None, before: str, changed: bool) -> str | None:
    """Why the files cannot be written with this reason, if so."""
    if not changed:
        return "no result changed: leave the reason out" if reason else None
    if not reason:
        return ADVICE
    if WORDS not in reason or not in_changelog(reason):
        return f'the reason is {reason!r}; expected a line of CHANGELOG.md that has the words "{WORDS}" in it'
    if reason == before:
        return f"the reason is {reason!r}, that of the last change; expected a line of this one's own"
    return None


def digests_everywhere() -> dict[str, Digests]:
    """The digests, which must be the same from every instruction set and several threads."""
    found: dict[str, Digests] = {}
    for isa in _C.build_info()["isas"].split(", "):
        _C.set_cpu_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            here = digests_of(golden_cases.calls())
            differences = Differences.between(here, found or here)
            if any(differences):
                sys.exit(f"{isa} kernels and {threads} threads give other bits than those before:\n{differences}")
            found = here
            print(f"the bits of {isa} kernels, {threads} threads: {len(found)} groups", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reason", nargs="?", help="the line of CHANGELOG.md")
    reason = parser.parse_args().reason

    autograd._reference_on.clear()  # the kernels, whatever the machine
    before, held_bits = read_bits() if BITS.exists() else (FIRST, {})
    held_numbers = read_numbers() if NUMBERS.exists() else {}
    bits = digests_everywhere()
    torch.set_num_threads(1)
    numbers = numbers_of_calls() | numbers_of_training()
    with tempfile.TemporaryDirectory() as folder:
        numbers |= numbers_of_run(Path(shutil.copytree(RUN, Path(folder, RUN.name))))

    differences, wrong = Differences.between(bits, held_bits), wrong_numbers(numbers, held_numbers)
    print(differences)
    if wrong:
        print(told(wrong))
    if text := objection(reason, before, bool(differences.changed or wrong)):
        sys.exit(text)
    write_bits(reason or before, bits)
    kept = {name: held_numbers[name] for name in numbers if name in held_numbers and name not in wrong}
    write_numbers(numbers | kept)
    print(f"written  {BITS}\nwritten  {NUMBERS}")


if __name__ == "__main__":
    main()
