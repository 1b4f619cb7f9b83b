"""Timing providers against each other: in processes of their own, by turns, a short burst each."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aevb
from aevb import _C
from aevb.ops import matmul as products

from . import cases

RESULTS = Path(__file__).parent / "results"
BURST = 0.03  # seconds
PAUSE = 0.005  # between two providers: threads of the last one go to sleep
FLAGS = re.compile(r"avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16")
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # malloc keeps what is freed (glibc)
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "AEVB_CACHE_MB": "0"}


Json = dict[str, Any]

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


def machine(model: str, isa: str, threads: int) -> str:
    """A file name for a CPU: "AMD EPYC 9B45 128-Core Processor" is amd-epyc-9b45-avx512-2-threads."""
    model = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {isa} {threads} threads").strip("-")


def describe() -> Json:
    model, flags = cpu()
    build = _C.build_info()
    found = {
        "machine": machine(model, _C.cpu_isa(), cases.THREADS),
        "cpu": model,
        "flags": flags,
        "threads": cases.THREADS,
        "isa": _C.cpu_isa(),
        "products": products.route(),
        "compiler": build.get("compiler"),
        "aevb": aevb.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # before; above about 0.5, other work was running
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if has_jax():
        import importlib.metadata

        found["jax"] = importlib.metadata.version("jax")
    return found


def has_jax() -> bool:
    return all(importlib.util.find_spec(name) for name in ("jax", "optax"))


def providers() -> list[str]:
    """Those of cases.py that are here."""
    return [name for name in cases.PROVIDERS if name != "jax" or has_jax()]


def copies(elements: int = 2**26) -> list[float]:
    """Bytes read and written in a second by copies of a tensor far larger than the caches."""
    torch.set_num_threads(cases.THREADS)
    source, target = torch.ones(elements), torch.zeros(elements)
    return [8 * elements / seconds for seconds in cases.timed(lambda: target.copy_(source), 0.1)]


def peak_flops() -> float:
    """Multiply-adds times two in a second, by the best matrix product of some: what no float32 product here exceeds by
    much."""
    torch.set_num_threads(cases.THREADS)
    best = 0.0
    for n in (768, 1024, 1536):
        a, b = torch.randn(n, n), torch.randn(n, n)
        best = max(best, 2 * n**3 / min(cases.timed(partial(products.product, a, b), 0.3)))
    return best


# ---- providers in processes of their own ----------------------------------------------------------------------------


class WorkerError(Exception):
    """What a worker says went wrong, in a sentence."""


class Process:
    """A worker.py, to be used as a context."""

    def __init__(self, provider: str, environment: dict[str, str] | None = None):
        self.provider = provider
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", provider],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, do: str, **arguments: Any) -> Json:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.provider} ended with status {self.process.wait()} at {do} {arguments}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.provider}, {do} {arguments}: {answer['error']}")
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Build = Callable[[Process], Json]


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median, "q1": q1, "q3": q3}


def race(names: Sequence[str], build: Build, seconds: float, environment: dict[str, str] | None = None) -> Json:
    """Times providers in turns, for about `seconds` each; the first is compared with each of the others.

    `build` tells a worker what to build, by its name, and returns what is to be said of it."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Process(name, environment)) for name in names}
        found = {name: build(worker) for name, worker in workers.items()}
        bursts: dict[str, list[list[float]]] = {name: [] for name in names}
        spent, rounds = 0.0, 0
        while rounds < 5 or spent < seconds * len(names):
            turn = rounds % len(names)
            for name in (*names[turn:], *names[:turn]):
                time.sleep(PAUSE)
                times = workers[name].ask("burst", seconds=BURST)["times"]
                bursts[name].append(times)
                spent += sum(times) * (1 + 1 / len(times))
            rounds += 1
    for name in names:
        times = [t for burst in bursts[name] for t in burst]
        found[name] |= {**quartiles(times), "calls": len(times), "rounds": rounds}
    ours, *peers = names
    for name in peers:
        by_round = [
            statistics.median(b) / statistics.median(a) for a, b in zip(bursts[ours], bursts[name], strict=True)
        ]
        found[name]["ratio"] = {**quartiles(by_round), "median": found[name]["median"] / found[ours]["median"]}
    return {"providers": found, "fastest_peer": min(peers, key=lambda name: found[name]["median"], default=None)}
