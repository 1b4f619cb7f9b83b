"""One run on a machine: its device, its time, what it measured, and the file that has it."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import math
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aevb
from aevb import _C

from ..measure import Json, cpu, quartiles
from ..training import learn
from . import steps
from .checks import check, check_bare
from .clocks import CapturedSeries, CudaSeries, Series, take_turns
from .work import Function, M, Work, gradients

CACHE_MULTIPLE = 4  # the sets of tensors are so many times as large as the L2 cache


class OutOfTimeError(Exception):
    pass


class Session:
    """What was measured is in a file that is written after each part."""

    def __init__(self, device: str, seconds: float, quick: bool, file: Path | None, data: str | None = None):
        self.device, self.quick, self.file, self.data = device, quick, file, data
        self.cuda = device != "cpu"
        self.started = time.perf_counter()
        self.until = self.started + seconds
        self.in_graph: type[Series] = CapturedSeries if self.cuda else Series
        self.seconds, self.rounds = (0.01, 2) if quick else (0.15, 7)  # of a timing, at least
        self.found: Json = {
            **describe(self.cuda),
            **{"seconds": 0.0, "ops": [], "small": [], "steps": [], "profiles": {}, "skipped": [], "wrong": []},
        }
        self.cache = self.found["l2_bytes"] if self.cuda else 0
        self.copy_rates: list[float] = []
        self.seconds_before = 0.0  # of a session that this one goes on with
        self.filling_caches = False  # of compilers: what tunes itself by the clock is left for a quiet GPU

    # ---- parts of it, and what becomes of those that fail ----

    def save(self) -> None:
        self.found["seconds"] = round(self.seconds_before + time.perf_counter() - self.started, 1)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def need(self, seconds: float) -> None:
        if time.perf_counter() + seconds > self.until:
            raise OutOfTimeError(f"no time left for what takes about {seconds:.0f} s")

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """Does a part; what fails is written down, and the rest goes on."""
        print(f"{time.perf_counter() - self.started:6.1f} s  {what}", flush=True)
        torch._dynamo.reset()  # dynamo gives up on a function that was compiled for 8 sizes
        found = self.guarded(what, function)
        self.save()
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # where an error has broken CUDA, each part says so
                torch.cuda.empty_cache()
        return found

    def guarded(self, what: str, function: Callable[[], Any]) -> Any:
        """What the function gives, or None where it fails, which is written down."""
        try:
            return function()
        except (OutOfTimeError, torch.OutOfMemoryError) as e:
            self.found["skipped"].append(f"{what}: {_first_line(e)}")
        except Exception as e:
            traceback.print_exc()
            self.found["wrong"].append(f"{what}: {type(e).__name__}: {_first_line(e)}")
            gc.collect()  # the traceback's tensors; not while another graph is captured
        return None

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # ---- what is measured ----

    def bandwidth(self) -> None:
        elements = 2**16 if self.quick else 256 * M
        source, target = torch.randn(elements, device=self.device), torch.empty(elements, device=self.device)
        copy = (CudaSeries if self.cuda else Series)([lambda: target.copy_(source)])
        until = time.perf_counter() + self.seconds  # clocks rise under load
        while time.perf_counter() < until:
            copy.sample()
        self.copy_rates += [2 * source.numel() * source.element_size() / copy.sample() for _ in range(20)]
        self.found["copy_bytes_per_second"] = quartiles(self.copy_rates)
        for result in self.found["ops"]:
            for timing in result["directions"].values():
                timing["of_copy"] = self._of_copy(timing["bytes_per_second"])

    def _of_copy(self, rate: float) -> float:
        return rate / self.found["copy_bytes_per_second"]["median"]

    def _sets(self, bytes_of_one: float) -> int:
        return min(128, max(1, math.ceil(CACHE_MULTIPLE * self.cache / bytes_of_one)))

    def op(self, work: Work, peers: bool) -> None:
        """The bare op in each direction, and, beside the peers, forward and backward through autograd."""
        self.need(1)
        sets = [
            (work.inputs(self.device), work.upstream(self.device)) for _ in range(self._sets(work.bytes("forward")))
        ]
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=self.device)
        check_bare(work, sets[0][0], seed, sets[0][1])
        calls = [work.bare([t.detach() for t in inputs], seed, upstream) for inputs, upstream in sets]
        series = {
            direction: self.in_graph([c[direction] for c in calls], self.wait, self.quick) for direction in calls[0]
        }
        result: Json = {
            **{"op": work.op, "dtype": work.dtype, "targets": work.targets, "rows": work.rows, "width": work.width},
            **{"sets": len(sets), "directions": {}},
        }
        for direction, timing in take_turns(series, self.seconds, self.rounds).items():
            result["directions"][direction] = {**timing, **self._rate(work, direction, timing["median"])}
        series.clear()
        self.found["ops"].append(result)
        if peers:
            times = self._beside_peers(work, sets, self._ways(work), self.in_graph)
            ours = times["aevb"]
            result["directions"]["forward+backward"] = ours | self._rate(work, "forward+backward", ours["median"])
            result["peers"] = times

    def _rate(self, work: Work, direction: str, seconds: float) -> Json:
        moved = work.bytes(direction)
        return {"bytes": moved, "bytes_per_second": moved / seconds, "of_copy": self._of_copy(moved / seconds)}

    def _ways(self, work: Work) -> dict[str, Function]:
        """Who does it through autograd: aevb, eager PyTorch in all ways, the plainest compiled, and Triton."""
        ways = work.peers()
        plainest = next(iter(ways))
        functions: dict[str, Function] = {"aevb": work.aevb()}
        functions |= {f"eager ({way})": f for way, f in ways.items()}
        functions[f"compile ({plainest})"] = self.compiled(ways[plainest])
        if work.op == "FusedELBO" and self.cuda and not self.quick and not self.filling_caches:
            functions["compile max-autotune"] = self.compiled(ways[plainest], mode="max-autotune-no-cudagraphs")
            if work.targets == "float32":
                from . import triton_loss

                functions["triton"] = triton_loss.loss
        return functions

    def _beside_peers(self, work: Work, sets: list, functions: dict[str, Function], clock: type[Series]) -> Json:
        """Forward and backward of each, checked; those that are wrong are not timed."""

        def made(name: str, function: Function) -> Series:
            self.need(4 if "compile" in name else 1)
            inputs, upstream = sets[0]
            check(work, function, inputs, upstream)
            if work.op == "FusedELBO":
                check(work, function, inputs, [torch.full_like(upstream[0], -0.3)])
            return clock([functools.partial(gradients, function, i, u) for i, u in sets], self.wait, self.quick)

        series = {}
        for name, function in functions.items():
            what = f"{work.name}, {work.rows} x {work.width}, {name}"
            found = self.guarded(what, functools.partial(made, name, function))
            if found is not None:
                series[name] = found
        if "aevb" not in series:
            raise AssertionError("there is nothing to compare with")
        return take_turns(series, self.seconds, self.rounds)

    def compiled(self, function: Function, **options: Any) -> Function:
        if not self.cuda:
            return torch.compile(function, dynamic=False, backend="aot_eager")
        return torch.compile(function, dynamic=False, **options)

    def small(self, work: Work) -> None:
        """Forward and backward from Python, through autograd."""
        sets = [(work.inputs(self.device), work.upstream(self.device)) for _ in range(8)]
        ways = self._ways(work)
        if self.cuda and not self.quick:
            plainest = next(iter(work.peers().values()))
            ways["compile, reduce-overhead"] = _marking_steps(self.compiled(plainest, mode="reduce-overhead"))
        times = self._beside_peers(work, sets, ways, Series)
        self.found["small"].append({"op": work.op, "rows": work.rows, "width": work.width, "providers": times})

    def training_step(self, batch: int, tf32: bool = False) -> None:
        """A whole training step of a 784-500-20 VAE with Adam, from Python."""
        self.need(10)
        case = steps.StepCase(self.device, batch, self.data, tf32)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            self._training_step(case, f"training step, batch {batch}{', tf32' if tf32 else ''}")
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    def _training_step(self, case: steps.StepCase, what: str) -> None:
        made: dict[str, steps.Step] = {}
        losses: dict[str, float] = {}

        def learned(name: str, make: Callable[[], steps.Step]) -> steps.Step:
            self.need(4)
            step = make()
            losses[name] = step.learn(6 if self.quick else 60)
            off = losses[name] / losses["eager"] - 1  # other noise, the same weights and data
            if not self.filling_caches:
                said = f"after as many steps the loss is {losses[name]:.2f}, eager's {losses['eager']:.2f}"
                assert abs(off) < 0.03, said
            assert step.draws_noise(), "two steps with the same images have the same loss, or quite another"
            return step

        for name, make in case.providers().items():
            step = self.guarded(f"{what}, {name}", functools.partial(learned, name, make))
            if step is not None:
                made[name] = step
        count = 1 if self.quick else 20
        series = {
            name: Series([step] * count, getattr(step, "wait", self.wait), self.quick) for name, step in made.items()
        }
        times = take_turns(series, 4 * self.seconds, self.rounds)
        about = {"batch": case.batch, "tf32": case.tf32, "losses": losses, "providers": times}
        self.found["steps"].append(about)
        for name in ("aevb, trainer", "eager, captured") if self.cuda and not case.tf32 else ():
            if name in made:
                found = self.guarded(f"{what}, {name}, profile", functools.partial(steps.profile, made[name]))
                self.found["profiles"][f"{what}, {name}"] = found

    def commands(self, runs: int) -> None:
        """From a command to a trained model, by `aevb train` and by scripts."""
        assert self.data, "the commands need MNIST: --data DIR"

        def save(found: Json) -> None:
            self.found["commands"] = found
            self.save()

        learn(self.data, runs, 30, self.device, save)


def _marking_steps(function: Function) -> Function:
    def call(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*inputs)

    return call


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ---- the machine ----------------------------------------------------------------------------------------------------


def describe(cuda: bool) -> Json:
    about: Json = {
        "machine": "dry-run",
        "aevb": aevb.__version__,
        "kernels": _C.build_info()["cuda"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu()[0],
        "cpus": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "unit": "seconds",
    }
    if not cuda:
        return about
    properties = torch.cuda.get_device_properties(torch.device("cuda"))
    return about | {
        "machine": re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        **smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"),
    }


def smi(*names: str) -> Json:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = lines[0].split(", ") if lines else []
    return dict(zip(names, values, strict=False))
