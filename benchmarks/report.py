"""`python -m benchmarks.report`: the speed table of this machine, and benchmarks/results/<machine>.json.

All providers of a case are measured in one run and in turns, a short burst each, so that a machine that drifts does so
for all of them. A round is one burst of each. The ratio is that of the medians over all calls; its range holds the
middle half of the rounds' own ratios.

PyTorch's CPU tensors come from malloc, which gives large ones back to the system and pays for each page again; aevb
keeps its results' memory. So the large cases are measured a second time with a malloc that keeps memory too (glibc).
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import aevb
from aevb import _C

from . import cases

RESULTS = Path(__file__).parent / "results"
FLAGS = re.compile(r"avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16")
LARGE = 2**20  # elements of an input
BURST = 0.03  # seconds


# ---- the machine ----------------------------------------------------------------------------------------------------


def cpu() -> tuple[str, list[str]]:
    """Model name, and the flags that matter to vector code."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return model, sorted(flag for flag in flags if FLAGS.fullmatch(flag))


def machine(model: str, threads: int) -> str:
    """A file name for a CPU: "AMD EPYC 9B45 128-Core Processor" is amd-epyc-9b45-2-threads."""
    model = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {threads} threads").strip("-")


def describe() -> dict:
    model, flags = cpu()
    build = _C.build_info()
    return {
        "machine": machine(model, cases.THREADS),
        "cpu": model,
        "flags": flags,
        "threads": cases.THREADS,
        "isa": _C.cpu_isa(),
        "compiler": build.get("compiler"),
        "aevb": aevb.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # before; above about 0.5, other work was running
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def keep_memory() -> bool:
    """From here on malloc keeps what is freed. There is no way back within the process."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


# ---- measuring ------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def measure(providers: Sequence[cases.Provider], seconds: float) -> dict:
    """Times the providers in turns, for about `seconds` each, and compares the first with the others."""
    bursts: dict[str, list[list[float]]] = {p.name: [] for p in providers}
    spent, rounds = 0.0, 0
    while rounds < 5 or spent < seconds * len(providers):
        turn = rounds % len(providers)
        for provider in (*providers[turn:], *providers[:turn]):
            bursts[provider.name].append(timed := cases.timed(provider.call, BURST))
            spent += sum(timed) * (1 + 1 / len(timed))
        rounds += 1
    found: dict[str, dict[str, Any]] = {}
    for p in providers:
        times = [t for burst in bursts[p.name] for t in burst]
        found[p.name] = {**quartiles(times), "calls": len(times), "rounds": rounds, "settings": p.settings}
        if p.tried:
            found[p.name]["tried"] = dict(p.tried)
    ours, *peers = (p.name for p in providers)
    best = min(peers, key=lambda name: found[name]["median"])
    by_round = [statistics.median(b) / statistics.median(a) for a, b in zip(bursts[ours], bursts[best], strict=True)]
    ratio = {**quartiles(by_round), "median": found[best]["median"] / found[ours]["median"]}
    untuned = min(found[name]["median"] for name in peers if name != "tuned") / found[ours]["median"]
    return {"providers": found, "fastest_peer": best, "ratio": ratio, "ratio_untuned": untuned}


def copies(elements: int) -> list[float]:
    """Bytes read and written in a second by copies of a tensor far larger than the caches."""
    source, target = torch.ones(elements), torch.zeros(elements)
    return [8 * elements / seconds for seconds in cases.timed(lambda: (target.copy_(source),), 0.1)]


def run(quick: bool) -> dict:
    torch.set_num_threads(cases.THREADS)
    results: dict = {**describe(), "unit": "seconds", "cases": {}, "cases_keeping_memory": {}}
    if results["load"] > 0.5:
        print(f"The load is {results['load']:.1f}: other work is running, and the figures will not be worth keeping.")
    seconds, elements = (0.3, 2**24) if quick else (3.0, 2**26)
    bandwidth, large = copies(elements), []
    for work in cases.WORK:
        print(f"{work.name} ...", flush=True)
        case = cases.Case(work)
        providers = case.providers()
        results["cases"][work.name] = {"target": work.target, **measure(providers, seconds)}
        bandwidth += copies(elements)
        if case.inputs[0].numel() >= LARGE:
            large.append((work, providers))
    results["copy_bytes_per_second"] = quartiles(bandwidth)
    if keep_memory():
        for work, providers in large:
            print(f"{work.name}, malloc keeping memory ...", flush=True)
            results["cases_keeping_memory"][work.name] = measure(providers, seconds)
    return results


# ---- the table ------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def row(name: str, case: Mapping) -> str:
    found = case["providers"]
    medians = [duration(found[p]["median"]) if p in found else "" for p in cases.PROVIDERS]
    ratio, target = case["ratio"], case.get("target")
    reached = case["ratio_untuned"]
    verdict = "" if target is None else f"{target:g}x: {'met' if reached >= target else 'missed'}"
    speed = f"**{ratio['median']:.1f}x** ({ratio['q1']:.1f} - {ratio['q3']:.1f})"
    return f"| {' | '.join([name, *medians, f'{reached:.2f}x', verdict, speed])} |"


def table(results: Mapping) -> str:
    """The results as Markdown: what the README shows."""
    lines = [
        "| forward + backward | aevb | eager | torch.compile | ... tuned | against the faster of eager and compile "
        "| target | against the fastest of all (middle half of rounds) |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
        *(row(name, case) for name, case in results["cases"].items()),
    ]
    lines += [row(f"{name}, malloc keeping memory", case) for name, case in results["cases_keeping_memory"].items()]
    copy = results["copy_bytes_per_second"]["median"] / 1e9
    lines += [
        "",
        f"{results['cpu']}, {results['threads']} threads, {results['isa']}; torch {results['torch']}, "
        f"compiler {results['compiler']}; {results['date']}. Medians, float32, Python call included; a copy moves "
        f"{copy:.1f} GB/s.",
    ]
    if training := results.get("training"):
        lines.append(f"MNIST after {training['epochs']} epochs: test ELBO {training['test_elbo']:.2f} nats.")
    return "\n".join(lines)


def training_result(metrics: Path) -> dict:
    """The last test ELBO that a training run wrote down."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    tested = [r for r in rows if "test_elbo" in r]
    if not tested:
        raise SystemExit(f"{metrics} has no line with a test_elbo")
    return {"data": "MNIST", "epochs": tested[-1]["epoch"], "test_elbo": tested[-1]["test_elbo"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Measures aevb against PyTorch.")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="a short look; writes nothing unless --output is given")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print this JSON's table")
    parser.add_argument("--training", type=Path, metavar="METRICS", help="add a run's test ELBO on MNIST to the JSON")
    options = parser.parse_args(arguments)

    if options.table:
        file = options.table
        results = json.loads(file.read_text())
    else:
        results = run(options.quick)
        file = (options.output or RESULTS) / f"{results['machine']}.json"
        if file.exists() and (before := json.loads(file.read_text()).get("training")):
            results["training"] = before
    if options.training:
        results["training"] = training_result(options.training)
    write = options.training if options.table else options.output or not options.quick
    if write:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}")
    if write:
        print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
