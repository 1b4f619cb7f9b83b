"""Every likelihood of the registry, forward and backward, against PyTorch: `python -m benchmarks.likelihoods`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from . import cases
from .measure import cpu

ROUNDS = 40


def times(case: cases.Case, seconds: float) -> dict[str, list[float]]:
    """Seconds of each provider's best way, in alternation; all are checked against the reference first."""
    torch._dynamo.reset()  # which compiles one function a few times only
    calls = {}
    for name in ("aevb", "eager", "compile"):
        ways = case.ways(name)
        calls[name] = ways[cases.fastest(ways)[0]]
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name] += cases.timed(call, seconds / ROUNDS / len(calls), at_least=1)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.likelihoods", description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=784)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each likelihood")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(
        f"{cpu()[0]}, {options.threads} threads, torch {torch.__version__}; {options.rows} x {options.dim}, float32\n"
    )
    print("| forward and backward | aevb | eager | compile | faster than the best of both |")
    print("|---|--:|--:|--:|--:|")
    for work in cases.of_every_likelihood(options.rows, options.dim):
        found = times(cases.Case(work), options.seconds)
        median = {name: statistics.median(seconds) for name, seconds in found.items()}
        best = min(median["eager"], median["compile"])
        cells = [f"{1e3 * median[name]:.2f} ms" for name in ("aevb", "eager", "compile")]
        print(f"| {work.name.split()[0]} | {' | '.join(cells)} | {best / median['aevb']:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
