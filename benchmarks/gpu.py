"""`python -m benchmarks.gpu`: the kernels on a GPU, as a fraction of its copy bandwidth and beside PyTorch.

How it measures:

* The ceiling is the bandwidth of device-to-device copies of a large tensor, bytes read plus bytes written, in this run.
* A time is that of a CUDA graph that holds one call for each of several sets of tensors, by CUDA events, divided by the
  number of calls. So nobody's time contains what Python and launching cost, and small tensors do not come from the L2
  cache: the sets together are CACHE_MULTIPLE times as large as it. Results are kept until the capture ends, so that
  each call writes memory of its own.
* Providers take turns, as in benchmarks/report.py; ratios are those of the medians. Before anything is timed, it is
  compared with `aevb.reference` in float64, over all elements.
* A training step is timed as a person runs it, from Python: many steps between two events.
* What would not fit into the time (`--seconds`) or the memory is skipped, and listed.

`--device cpu` is a dry run: the same code on CPU tensors, timed by the clock, without graphs. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aevb
from aevb import _C
from aevb.data import Targets
from aevb.steps import training_step

from . import cases
from .measure import RESULTS, duration, quartiles

M = 2**20
SIZES = (1 * M, 4 * M, 16 * M, 64 * M, 256 * M)  # elements
PEER_SIZES = (64 * M, 16 * M)  # where the peers are timed too
TARGET_SIZE = 64 * M
LATENT_WIDTH, PIXELS, LATENTS = 128, 784, 20  # of rows; the loss has 20 latents for 784 pixels
CACHE_MULTIPLE = 4  # the sets of tensors are so many times as large as the L2 cache
X_SCALE = 1 / 255
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

Function = Callable[..., Any]
Json = dict[str, Any]

# ---- the work -------------------------------------------------------------------------------------------------------

# Bytes that an element of the large tensors has to move through memory: each input read once, each result written once.
# e and t are the bytes of an element of the inputs and of the targets; what belongs to rows comes on top (ROW_BYTES).
ELEMENT_BYTES: dict[tuple[str, str], Callable[[int, int], float]] = {
    ("sample_gaussian", "forward"): lambda e, t: 3 * e,  # mu, logvar -> z
    ("sample_gaussian", "backward"): lambda e, t: 5 * e,  # mu, logvar, grad z -> grad mu, grad logvar
    ("sample_gaussian_log_ratio", "forward"): lambda e, t: 3 * e,  # the same
    ("sample_gaussian_log_ratio", "backward"): lambda e, t: 5 * e,
    ("gaussian_kl", "forward"): lambda e, t: 2 * e,  # mu, logvar ->
    ("gaussian_kl", "backward"): lambda e, t: 4 * e,  # mu, logvar -> grad mu, grad logvar
    ("bernoulli_log_prob", "forward"): lambda e, t: e + t,  # logits, x ->
    ("bernoulli_log_prob", "backward"): lambda e, t: 2 * e + t,  # logits, x -> grad logits
    ("FusedELBO", "forward"): lambda e, t: e + t + 2 * e * LATENTS / PIXELS,  # logits, x, mu, logvar ->
    ("FusedELBO", "backward"): lambda e, t: 2 * e + t + 4 * e * LATENTS / PIXELS,  # the same -> three gradients
    ("normal", "forward"): lambda e, t: e,  # -> eps
}
SAMPLING = ("sample_gaussian", "sample_gaussian_log_ratio")
ROW_BYTES = {**dict.fromkeys((*SAMPLING, "gaussian_kl", "bernoulli_log_prob"), 4), "FusedELBO": 0, "normal": 0}
WIDTHS = {
    **dict.fromkeys(SAMPLING, LATENT_WIDTH),
    "gaussian_kl": LATENT_WIDTH,
    "bernoulli_log_prob": PIXELS,
    "FusedELBO": PIXELS,
}


def sample_log_ratio(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, 0.5 * (z * z - eps * eps - logvar).sum(-1)


def with_uint8(function: Function) -> Function:
    """A peer for pixels: it makes targets of them first."""

    def scaled(logits, x, *rest):
        return function(logits, x.to(logits.dtype) * X_SCALE, *rest)

    return scaled


@dataclass(frozen=True)
class Work:
    """One op at one size: `elements` of `dtype`, targets of dtype `targets`."""

    op: str
    dtype: str
    targets: str | None
    elements: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype}" + (f", {self.targets} targets" if self.targets else "")

    @property
    def shape(self) -> tuple[int, int]:
        width = WIDTHS.get(self.op, self.elements)
        return max(1, self.elements // width), width

    @property
    def x_scale(self) -> float | None:
        return X_SCALE if self.targets == "uint8" else None

    def bytes(self, direction: str) -> float:
        """That one call has to move."""
        rows, width = self.shape
        e, t = (DTYPES[d].itemsize if d else 0 for d in (self.dtype, self.targets))
        directions = direction.split("+")
        return sum(rows * (width * ELEMENT_BYTES[self.op, d](e, t) + ROW_BYTES[self.op]) for d in directions)

    def inputs(self, device: str) -> list[Tensor]:
        """Random tensors; those of `dtype` that are differentiated ask for a gradient."""
        rows, width = self.shape
        dtype = DTYPES[self.dtype]
        if self.op == "normal":
            return [torch.randint(-(2**63), 2**63 - 1, (), device=device)]
        if self.op in (*SAMPLING, "gaussian_kl"):
            return [torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
        assert self.targets
        logits = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
        if self.targets == "uint8":
            x = torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device)
        else:
            x = torch.rand(rows, width, dtype=DTYPES[self.targets], device=device)
        if self.op == "bernoulli_log_prob":
            return [logits, x]
        latents = [torch.randn(rows, LATENTS, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
        return [logits, x, *latents]

    def upstream(self, device: str) -> list[Tensor]:
        rows, width = self.shape
        row = torch.randn(rows, device=device)
        if self.op in SAMPLING:
            return [torch.randn(rows, width, dtype=DTYPES[self.dtype], device=device), row]
        return [torch.randn((), device=device)] if self.op == "FusedELBO" else [row]

    # The bare ops, without autograd: what the kernels themselves take.

    def forward(self, inputs: list[Tensor], seed: Tensor) -> Any:
        ops = torch.ops.aevb
        if self.op == "normal":
            return ops.normal.default(inputs[0], [self.elements])
        if self.op == "sample_gaussian":
            return ops.sample_gaussian_forward.default(*inputs, seed, None)
        if self.op == "sample_gaussian_log_ratio":
            return ops.sample_gaussian_log_ratio_forward.default(*inputs, seed, None, 0)
        if self.op == "gaussian_kl":
            return ops.gaussian_kl_forward.default(*inputs)
        if self.op == "bernoulli_log_prob":
            return ops.bernoulli_log_prob_forward.default(*inputs, self.x_scale, False)
        return ops.negative_elbo_forward.default(*inputs, None, 1.0, 1, False, self.x_scale)

    def backward(self, inputs: list[Tensor], seed: Tensor, upstream: list[Tensor]) -> Any:
        ops = torch.ops.aevb
        if self.op == "sample_gaussian":
            return ops.sample_gaussian_backward.default(*inputs, seed, None, *upstream)
        if self.op == "sample_gaussian_log_ratio":
            return ops.sample_gaussian_log_ratio_backward.default(*inputs, seed, None, 0, *upstream, None)
        if self.op == "gaussian_kl":
            return ops.gaussian_kl_backward.default(*inputs, *upstream)
        if self.op == "bernoulli_log_prob":
            return ops.bernoulli_log_prob_backward.default(*inputs, self.x_scale, False, *upstream)
        return ops.negative_elbo_backward.default(*inputs, None, 1.0, 1, False, self.x_scale, *upstream)

    # The providers, as functions of the inputs.

    def aevb(self) -> Function:
        if self.op == "sample_gaussian":
            return aevb.sample_gaussian
        if self.op == "sample_gaussian_log_ratio":
            return aevb.sample_gaussian_log_ratio
        if self.op == "gaussian_kl":
            return aevb.gaussian_kl
        if self.op == "bernoulli_log_prob":
            return functools.partial(aevb.bernoulli_log_prob, x_scale=self.x_scale)
        return aevb.FusedELBO(x_scale=self.x_scale)

    def peers(self) -> dict[str, Function]:
        """The ways to write the op in PyTorch, those of benchmarks/cases.py, the plainest first."""
        ways: dict[str, dict[str, Function]] = {
            "sample_gaussian": {"as written": cases.sample, "one exp, addcmul": cases.sample_one_exp},
            "sample_gaussian_log_ratio": {"as written": sample_log_ratio},
            "gaussian_kl": {"as written": lambda mu, logvar: 0.5 * cases.kl_terms(mu, logvar).sum(-1)},
            "bernoulli_log_prob": {
                "binary_cross_entropy_with_logits": cases.bernoulli,
                "softplus": cases.bernoulli_softplus,
            },
            "FusedELBO": {"binary_cross_entropy_with_logits": cases.loss, "softplus": cases.loss_softplus},
        }
        scaled = with_uint8 if self.targets == "uint8" else lambda f: f
        return {way: scaled(f) for way, f in ways[self.op].items()}

    # What all of them must give.

    def reference(self, inputs: list[Tensor], eps: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs in float64, of some of the rows."""
        r = aevb.reference
        if self.op == "sample_gaussian":
            return r.sample_gaussian(inputs[0], inputs[1], eps=eps)
        if self.op == "sample_gaussian_log_ratio":
            return r.sample_gaussian_log_ratio(inputs[0], inputs[1], eps=eps)
        if self.op == "gaussian_kl":
            return (r.gaussian_kl(inputs[0], inputs[1]),)
        if self.op == "bernoulli_log_prob":
            return (r.bernoulli_log_prob(inputs[0], inputs[1], self.x_scale),)
        return (r.FusedELBO(reduction="sum", x_scale=self.x_scale)(*inputs) / self.shape[0],)


def outputs_of(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    found = function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def differentiated(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


# ---- checking -------------------------------------------------------------------------------------------------------

BLOCK = 4 * M  # elements compared at once, so that float64 takes little memory


def check(work: Work, function: Function, inputs: list[Tensor], upstream: list[Tensor]) -> None:
    """Raises AssertionError unless a provider's values and gradients are the reference's, in float64, on its noise."""
    outputs = outputs_of(function, inputs)
    grads = torch.autograd.grad(outputs, differentiated(inputs), upstream)
    compare(work, inputs, upstream, [o.detach() for o in outputs], list(grads))


def compare(
    work: Work, inputs: list[Tensor], upstream: list[Tensor], outputs: list[Tensor], grads: list[Tensor]
) -> None:
    whole = work.op == "FusedELBO"  # one number for all rows
    rows, width = work.shape
    step = max(1, BLOCK // width)
    tolerance = 1e-5 if work.dtype == "float32" else 0.05  # peers compute in bfloat16
    total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        ins = [t.detach()[part].double() if t.is_floating_point() else t[part] for t in inputs]
        ins = [t.requires_grad_(i.requires_grad) for t, i in zip(ins, inputs, strict=True)]
        eps = recovered_noise(ins, outputs[0][part], tolerance) if work.op in SAMPLING else None
        expected = work.reference(ins, eps)
        ups = [g.double() if whole else g[part].double() for g in upstream]
        expected_grads = torch.autograd.grad(expected, differentiated(ins), ups)
        for found, wanted in zip(grads, expected_grads, strict=True):
            assert_close(found[part], wanted, tolerance)
        if whole:
            total += expected[0].detach()
        else:
            for found, wanted in zip(outputs, expected, strict=True):
                assert_close(found[part], wanted.detach(), tolerance)
    if whole:
        assert_close(outputs[0], total, tolerance)


def recovered_noise(inputs: list[Tensor], z: Tensor, tolerance: float) -> Tensor:
    """The noise that a sample was made with; it must be standard normal."""
    mu, logvar = (t.detach() for t in inputs)
    eps = (z.double() - mu) * torch.exp(-0.5 * logvar)
    n = eps.numel()
    assert abs(eps.mean().item()) < 6 / n**0.5 + 0.1 * tolerance, "the noise does not have mean 0"
    assert abs(eps.var().item() - 1) < 6 * (2 / n) ** 0.5 + tolerance, "the noise does not have variance 1"
    return eps


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    scale = wanted.abs().max() if wanted.numel() else wanted.new_zeros(())
    allowed = tolerance * (wanted.abs() + 0.3 * scale)
    excess = (found.double() - wanted).abs() - allowed
    assert not bool((~(excess <= 0)).any()), f"off by {(found.double() - wanted).abs().max().item():.3g} of {scale:.3g}"


# ---- clocks ---------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


class Series:
    """Calls, one for each set of tensors, that are timed together, by the host's clock: for a dry run."""

    SAMPLE = 0.0  # seconds that one timing takes at least

    def __init__(self, calls: Sequence[Call]):
        self.calls = len(calls)
        self.replay = self.prepare(calls)
        self.replay()
        self.repeats = max(1, math.ceil(self.SAMPLE / max(self.elapsed(self.replay), 1e-9)))

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Something that makes all the calls."""

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def elapsed(self, work: Call) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def sample(self) -> float:
        """Seconds of one call."""

        def work() -> None:
            for _ in range(self.repeats):
                self.replay()

        return self.elapsed(work) / (self.repeats * self.calls)


class CudaSeries(Series):
    """The calls from Python, timed by events."""

    SAMPLE = 3e-4

    def elapsed(self, work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class CapturedSeries(CudaSeries):
    """The calls in a CUDA graph."""

    def prepare(self, calls: Sequence[Call]) -> Call:
        self.graph, _ = captured(lambda: [call() for call in calls], lambda: [call() for call in calls[:3]])
        return self.graph.replay


def captured(work: Callable[[], Any], warm_up: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `work`, and what that returned: its memory stays the graph's own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


def take_turns(series: dict[str, Series], seconds: float, at_least: int) -> Json:
    """Times all of them in rounds, the first in turn; {name: median, quartiles, rounds}."""
    samples: dict[str, list[float]] = {name: [] for name in series}
    until, rounds = time.perf_counter() + seconds * len(series), 0
    while rounds < at_least or (time.perf_counter() < until and rounds < 500):
        names = list(series)
        turn = rounds % len(names)
        for name in (*names[turn:], *names[:turn]):
            samples[name].append(series[name].sample())
        rounds += 1
    return {name: {**quartiles(times), "rounds": rounds} for name, times in samples.items()}


# ---- running --------------------------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    pass


class Run:
    """One run: its device, its time, and what it found so far, in a file that is written after each step."""

    def __init__(self, device: str, seconds: float, quick: bool, file: Path | None):
        self.device, self.quick, self.file = device, quick, file
        self.cuda = device != "cpu"
        self.until = time.perf_counter() + seconds
        self.in_graph: type[Series] = CapturedSeries if self.cuda else Series
        self.from_python: type[Series] = CudaSeries if self.cuda else Series
        self.seconds, self.rounds = (0.01, 2) if quick else (0.15, 7)  # of a timing, at least
        self.found: Json = {**describe(self.cuda), "seconds": 0.0, "ops": [], "steps": [], "skipped": [], "wrong": []}
        self.cache = self.found["l2_bytes"] if self.cuda else 0
        self.started = time.perf_counter()
        self.copy_rates: list[float] = []

    def save(self) -> None:
        self.found["seconds"] = round(time.perf_counter() - self.started, 1)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def need(self, seconds: float) -> None:
        if time.perf_counter() + seconds > self.until:
            raise OutOfTimeError(f"no time left for what takes about {seconds:.0f} s")

    def attempt(self, what: str, function: Callable[[], None]) -> None:
        """Does a part; what fails is written down, and the rest goes on."""
        print(f"{time.perf_counter() - self.started:6.1f} s  {what}", flush=True)
        torch._dynamo.reset()  # dynamo gives up on a function that was compiled for 8 sizes
        try:
            function()
        except (OutOfTimeError, torch.OutOfMemoryError) as e:
            self.found["skipped"].append(f"{what}: {first_line(e)}")
        except Exception as e:
            traceback.print_exc()
            self.found["wrong"].append(f"{what}: {type(e).__name__}: {first_line(e)}")
            gc.collect()  # the traceback's tensors; not while another graph is captured
        self.save()
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # where an error has broken CUDA, each part says so
                torch.cuda.empty_cache()

    def sets(self, bytes_of_one: float) -> int:
        return min(128, max(1, math.ceil(CACHE_MULTIPLE * self.cache / bytes_of_one)))

    # -- parts

    def bandwidth(self) -> None:
        elements = 2**16 if self.quick else 256 * M
        source, target = torch.randn(elements, device=self.device), torch.empty(elements, device=self.device)
        copy = self.from_python([lambda: target.copy_(source)])
        until = time.perf_counter() + self.seconds  # clocks rise under load
        while time.perf_counter() < until:
            copy.sample()
        self.copy_rates += [2 * source.numel() * source.element_size() / copy.sample() for _ in range(20)]
        self.found["copy_bytes_per_second"] = quartiles(self.copy_rates)
        for result in self.found["ops"]:
            for timing in result["directions"].values():
                timing["of_copy"] = self.of_copy(timing["bytes_per_second"])

    def of_copy(self, rate: float) -> float:
        return rate / self.found["copy_bytes_per_second"]["median"]

    def op(self, work: Work, peers: bool) -> None:
        """The bare op forward and backward, and, beside the peers, both through autograd."""
        self.need(1)
        device, count = self.device, self.sets(work.bytes("forward"))
        sets = [(work.inputs(device), work.upstream(device)) for _ in range(count)]
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=device)
        bare = [([t.detach() for t in inputs], upstream) for inputs, upstream in sets]
        result: Json = {
            "op": work.op, "dtype": work.dtype, "targets": work.targets, "elements": math.prod(work.shape),
            "shape": work.shape, "sets": count, "directions": {},
        }  # fmt: skip
        self.check_bare(work, sets[0], seed)
        series = {"forward": self.in_graph([functools.partial(work.forward, i, seed) for i, _ in bare])}
        if work.op != "normal":
            series["backward"] = self.in_graph([functools.partial(work.backward, i, seed, u) for i, u in bare])
        for direction, timing in take_turns(series, self.seconds, self.rounds).items():
            result["directions"][direction] = {**timing, **self.rate(work, direction, timing["median"])}
        series.clear()
        self.found["ops"].append(result)
        if peers:
            self.beside_peers(work, sets, result)

    def check_bare(self, work: Work, tensors: tuple[list[Tensor], list[Tensor]], seed: Tensor) -> None:
        inputs, upstream = tensors
        with torch.no_grad():
            outputs = work.forward(inputs, seed)
            if work.op == "normal":
                sample = outputs[: 16 * M].double()
                assert abs(sample.mean().item()) < 6 / sample.numel() ** 0.5, "the noise does not have mean 0"
                assert abs(sample.var().item() - 1) < 6 * (2 / sample.numel()) ** 0.5, (
                    "the noise does not have variance 1"
                )
                return
            grads = work.backward(inputs, seed, upstream)
        outputs, grads = ([*t] if isinstance(t, tuple) else [t] for t in (outputs, grads))
        compare(work, inputs, upstream, outputs, grads)

    def rate(self, work: Work, direction: str, seconds: float) -> Json:
        moved = work.bytes(direction)
        return {"bytes": moved, "bytes_per_second": moved / seconds, "of_copy": self.of_copy(moved / seconds)}

    def beside_peers(self, work: Work, sets: list[tuple[list[Tensor], list[Tensor]]], result: Json) -> None:
        """Forward and backward by aevb, eager PyTorch and torch.compile, through autograd."""
        ways = work.peers()
        functions: dict[str, Function] = {"aevb": work.aevb()}
        functions |= {f"eager ({way})": f for way, f in ways.items()}
        plainest = next(iter(ways))
        functions[f"compile ({plainest})"] = self.compiled(ways[plainest])
        series = {}
        for name, function in functions.items():
            try:
                self.need(8 if name.startswith("compile") else 2)
                check(work, function, *sets[0])
                calls = [functools.partial(gradients, function, inputs, upstream) for inputs, upstream in sets]
                series[name] = self.in_graph(calls)
            except (OutOfTimeError, torch.OutOfMemoryError) as e:
                if name == "aevb":
                    raise
                self.found["skipped"].append(f"{work.name}, {work.elements} elements, {name}: {first_line(e)}")
            except Exception as e:
                if name == "aevb":
                    raise
                traceback.print_exc()
                self.found["wrong"].append(f"{work.name}, {name}: {type(e).__name__}: {first_line(e)}")
        times = take_turns(series, self.seconds, self.rounds)
        both = {**times["aevb"], **self.rate(work, "forward+backward", times["aevb"]["median"]), "peers": {}}
        for peer in ("eager", "compile"):
            ways_found = {name: t for name, t in times.items() if name.startswith(peer)}
            if ways_found:
                best = min(ways_found, key=lambda name: ways_found[name]["median"])
                ratio = ways_found[best]["median"] / times["aevb"]["median"]
                both["peers"][peer] = {**ways_found[best], "way": best, "ratio": ratio}
        result["directions"]["forward+backward"] = both

    def compiled(self, function: Function, mode: str = "default") -> Function:
        if not self.cuda:
            return torch.compile(function, dynamic=False, backend="aot_eager")
        return torch.compile(function, dynamic=False, mode=mode)

    def steps(self, batch: int) -> None:
        """A whole training step of a 784-500-20 VAE with Adam, from Python."""
        providers: dict[str, Callable[[], Step]] = {
            "eager": lambda: Step(self.device, batch, plain_loss),
            "aevb": lambda: Step(self.device, batch, fused_loss),
            "compile": lambda: Step(self.device, batch, self.compiled(plain_loss)),
            "aevb, trainer": lambda: TrainerStep(self.device, batch, fused_loss),
            "aevb, trainer, bf16": lambda: TrainerStep(self.device, batch, fused_loss, bf16=True),
        }
        if self.cuda:
            providers |= {
                "compile, reduce-overhead": lambda: Step(
                    self.device, batch, self.compiled(plain_loss, "reduce-overhead"), marks_steps=True
                ),
                "aevb, captured": lambda: CapturedStep(self.device, batch, fused_loss),
                "eager, captured": lambda: CapturedStep(self.device, batch, plain_loss),
            }
        self.need(10)
        steps, losses = {}, {}
        for name, make in providers.items():
            try:
                self.need(4)
                step = make()
                losses[name] = step.learn(6 if self.quick else 60)
                steps[name] = step
            except OutOfTimeError as e:
                self.found["skipped"].append(f"training step, batch {batch}, {name}: {first_line(e)}")
            except Exception as e:
                traceback.print_exc()
                self.found["wrong"].append(f"training step, batch {batch}, {name}: {type(e).__name__}: {first_line(e)}")
        for name, loss in losses.items():  # other noise, the same weights and data
            assert abs(loss / losses["eager"] - 1) < 0.03, f"after as many steps the loss is {losses}: {name} differs"
        series = {name: self.from_python([step] * (1 if self.quick else 20)) for name, step in steps.items()}
        times = take_turns(series, 4 * self.seconds, self.rounds)
        self.found["steps"].append({"batch": batch, "losses": losses, "providers": times})


def gradients(function: Function, inputs: list[Tensor], upstream: list[Tensor]) -> Any:
    return torch.autograd.grad(function(*inputs), differentiated(inputs), upstream)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ---- training steps -------------------------------------------------------------------------------------------------


def plain_loss(model: aevb.VAE, x: Tensor) -> Tensor:
    """What a person would write."""
    mu, logvar = model.encoder(x).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return cases.loss(model.decoder(z), x, mu, logvar)


CRITERION = aevb.FusedELBO()


def fused_loss(model: aevb.VAE, x: Tensor) -> Tensor:
    z, kl = aevb.sample_gaussian(*model.encoder(x).chunk(2, -1))
    return CRITERION(model.decoder(z), x, kl=kl)


class Step:
    """A training step as a call: the next of 8 batches, forward, backward, fused Adam."""

    def __init__(self, device: str, batch: int, loss: Function, marks_steps: bool = False):
        generator = torch.Generator().manual_seed(1)
        self.model = aevb.VAE(PIXELS, 500, LATENTS, generator=generator).to(device)
        capturable = isinstance(self, CapturedStep)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True, capturable=capturable)
        grey = torch.linspace(0, 1, PIXELS) ** 3  # some pixels are rarely set, so that there is something to learn
        self.batches = [(torch.rand(batch, PIXELS, generator=generator) < grey).float().to(device) for _ in range(8)]
        self.loss_of, self.marks_steps, self.done = loss, marks_steps, 0
        self.loss = torch.zeros((), device=device)

    def next_batch(self) -> Tensor:
        self.done += 1
        return self.batches[self.done % len(self.batches)]

    def train(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model, x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self) -> None:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        self.loss = self.train(self.next_batch())

    def learn(self, steps: int) -> float:
        """The average of the last 5 losses after as many steps."""
        losses = []
        while self.done < steps:
            self()
            losses.append(self.loss.item())
        return statistics.mean(losses[-5:])


class CapturedStep(Step):
    """The same, recorded once in a CUDA graph and replayed; a batch is copied to where the graph reads it."""

    def __init__(self, device: str, batch: int, loss: Function):
        super().__init__(device, batch, loss)
        self.x = self.batches[0].clone()
        self.graph, self.loss = captured(lambda: self.train(self.x), self.warm_up)

    def warm_up(self) -> None:
        for _ in range(3):
            self.x.copy_(self.next_batch())
            self.train(self.x)

    def __call__(self) -> None:
        self.x.copy_(self.next_batch())
        self.graph.replay()


class TrainerStep(Step):
    """The step of `aevb.Trainer`: images are bytes on the device, gathered within it, and on a GPU all of it is a CUDA
    graph."""

    def __init__(self, device: str, batch: int, loss: Function, bf16: bool = False):
        super().__init__(device, batch, loss)
        images = Targets((255 * torch.cat(self.batches)).to(torch.uint8).cpu(), "threshold", 255, device)
        capturable = torch.device(device).type == "cuda"
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True, capturable=capturable)
        self.step = training_step(self.model, aevb.FusedELBO(), optimizer, images, batch, bf16)
        self.index = torch.arange(len(self.batches) * batch, device=device).split(batch)
        self.seeds = torch.arange(1000, device=device).unbind()

    def __call__(self) -> None:
        self.done += 1
        seed = self.seeds[self.done % len(self.seeds)]
        self.loss = self.step(self.index[self.done % len(self.index)], seed, seed).loss


# ---- the machine ----------------------------------------------------------------------------------------------------


def describe(cuda: bool) -> Json:
    about: Json = {
        "machine": "dry-run",
        "aevb": aevb.__version__,
        "kernels": _C.build_info()["cuda"],
        "torch": torch.__version__,
        "python": platform.python_version(),
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
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


# ---- the plan -------------------------------------------------------------------------------------------------------


Kind = tuple[str, str, str | None]  # op, dtype of the inputs, dtype of the targets
KINDS: list[Kind] = [  # with peers, the most wanted first
    ("FusedELBO", "float32", "float32"),
    ("sample_gaussian", "float32", None),
    ("bernoulli_log_prob", "float32", "float32"),
    ("gaussian_kl", "float32", None),
    ("sample_gaussian_log_ratio", "float32", None),
    ("FusedELBO", "bfloat16", "uint8"),
    ("sample_gaussian", "bfloat16", None),
    ("bernoulli_log_prob", "bfloat16", "uint8"),
    ("gaussian_kl", "bfloat16", None),
]
ALONE: list[Kind] = [
    ("normal", "float32", None),
    ("bernoulli_log_prob", "float32", "uint8"),
    ("bernoulli_log_prob", "float32", "bfloat16"),
    ("bernoulli_log_prob", "bfloat16", "float32"),
    ("bernoulli_log_prob", "bfloat16", "bfloat16"),
]


def plan(quick: bool) -> Iterator[tuple[Work, bool]]:
    """The work, and whether the peers do it too, the most wanted first."""
    peer_sizes, sizes = ((2**15,), (2**13, 2**15)) if quick else (PEER_SIZES, SIZES)
    for kind in KINDS:
        yield Work(*kind, peer_sizes[0]), True
    for kind in ALONE:
        yield Work(*kind, peer_sizes[0]), False
    for size in peer_sizes[1:]:
        yield from ((Work(*kind, size), True) for kind in KINDS)
    for size in sizes:
        yield from ((Work(*kind, size), False) for kind in KINDS if size not in peer_sizes)
        yield from ((Work(*kind, size), False) for kind in ALONE if size != peer_sizes[0])


# ---- targets and the table ------------------------------------------------------------------------------------------


def op_result(results: Json, op: str, dtype: str, targets: str | None) -> Json | None:
    """That at TARGET_SIZE; of a dry run the largest there is."""
    found = [r for r in results["ops"] if (r["op"], r["dtype"], r["targets"]) == (op, dtype, targets)]
    return min(found, key=lambda r: abs(r["elements"] - TARGET_SIZE), default=None)


def verdicts(results: Json) -> list[Json]:
    """Each target: what it is of, what was wanted, what was measured (None: nothing), and whether it is met."""
    found: list[Json] = []

    def add(what: str, wanted: float, measured: float | None, unit: str) -> None:
        met = measured is not None and measured >= wanted
        found.append({"target": what, "wanted": wanted, "measured": measured, "unit": unit, "met": met})

    def of_copy(op: str, dtype: str, targets: str | None, wanted: float) -> None:
        result = op_result(results, op, dtype, targets)
        for direction in ("forward", "backward") if op != "normal" else ("forward",):
            measured = result["directions"].get(direction, {}).get("of_copy") if result else None
            add(f"{Work(op, dtype, targets, 0).name}, {direction}: of the copy bandwidth", wanted, measured, "")

    for op in ("sample_gaussian", "gaussian_kl", "bernoulli_log_prob", "FusedELBO", "normal"):
        of_copy(op, "float32", "float32" if op in ("bernoulli_log_prob", "FusedELBO") else None, 0.9)
    of_copy("bernoulli_log_prob", "bfloat16", "uint8", 0.8)
    of_copy("FusedELBO", "bfloat16", "uint8", 0.8)
    of_copy("sample_gaussian", "bfloat16", None, 0.6)
    loss = op_result(results, "FusedELBO", "float32", "float32")
    peers = (loss or {}).get("directions", {}).get("forward+backward", {}).get("peers", {})
    for peer, wanted in (("eager", 3.0), ("compile", 1.3)):
        add(f"FusedELBO float32, forward and backward: against {peer}", wanted, peers.get(peer, {}).get("ratio"), "x")
    for batch in (100, 1000):
        times: Json = next((s["providers"] for s in results["steps"] if s["batch"] == batch), {})
        captured = times.get("aevb, trainer", {}).get("median")
        for peer, wanted in (("eager", 3.0), ("compile, reduce-overhead", 1.5)):
            theirs = times.get(peer, {}).get("median")
            ratio = theirs / captured if theirs and captured else None
            add(f"the trainer's step, captured, batch {batch}: against {peer}", wanted, ratio, "x")
    return found


def rows_of(results: Json) -> dict[str, dict[int, Json]]:
    """By name and number of elements."""
    found: dict[str, dict[int, Json]] = {}
    for r in results["ops"]:
        work = Work(r["op"], r["dtype"], r["targets"], r["elements"])
        found.setdefault(work.name, {})[r["elements"]] = r
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["", f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def table(results: Json) -> str:
    """The results as Markdown, in short."""
    lines = [f"### {results.get('gpu', 'A dry run on the CPU: no figure here means anything')}", ""]
    if copy := results.get("copy_bytes_per_second"):
        lines += [f"A copy moves {copy['median'] / 1e9:.0f} GB/s ({copy['q1'] / 1e9:.0f} - {copy['q3'] / 1e9:.0f})."]
    lines += [f"torch {results['torch']}; kernels {results['kernels']}; {results['date']}; {results['seconds']:.0f} s."]
    lines += [f"Skipped: {text}" for text in results["skipped"]]
    lines += [f"WRONG: {text}" for text in results["wrong"]]
    by_name = rows_of(results)
    lines += markdown(["of the copy bandwidth, forward / backward", *size_names(results)], fractions(results, by_name))
    lines += markdown(["forward + backward", "elements", "aevb", "eager", "torch.compile"], beside(by_name))
    steps = [
        [f"batch {step['batch']}", name, duration(t["median"]), f"{duration(t['q1'])} - {duration(t['q3'])}"]
        for step in results["steps"]
        for name, t in step["providers"].items()
    ]
    lines += markdown(["training step", "", "median", "middle half"], steps)
    targets = []
    for v in verdicts(results):
        form = "{:.2f}x" if v["unit"] else "{:.0%}"
        measured = "not measured" if v["measured"] is None else form.format(v["measured"])
        verdict = "" if v["measured"] is None else "reached" if v["met"] else "missed"
        targets.append([v["target"], form.format(v["wanted"]), measured, verdict])
    return "\n".join([*lines, *markdown(["target", "wanted", "measured", ""], targets)])


def sizes_in(results: Json) -> list[int]:
    """Powers of two, which the elements, being whole rows, only nearly are."""
    return sorted({round_size(r["elements"]) for r in results["ops"]})


def round_size(elements: int) -> int:
    return 2 ** round(math.log2(elements))


def size_names(results: Json) -> list[str]:
    return [f"{size / M:.3g}M" for size in sizes_in(results)]


def fractions(results: Json, by_name: dict[str, dict[int, Json]]) -> list[list[str]]:
    rows = []
    for name, by_size in by_name.items():
        found = {round_size(elements): r["directions"] for elements, r in by_size.items()}
        cells = []
        for size in sizes_in(results):
            parts = [found.get(size, {}).get(direction) for direction in ("forward", "backward")]
            cells.append(" / ".join(f"{part['of_copy']:.0%}" for part in parts if part))
        rows.append([name, *cells])
    return rows


def beside(by_name: dict[str, dict[int, Json]]) -> list[list[str]]:
    rows = []
    for name, by_size in by_name.items():
        for elements, r in sorted(by_size.items()):
            if both := r["directions"].get("forward+backward"):
                ratios = [both["peers"].get(peer, {}).get("ratio") for peer in ("eager", "compile")]
                cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
                rows.append([name, f"{elements / M:.3g}M", duration(both["median"]), *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where something failed or gave wrong results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures aevb on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="a short look, at small sizes")
    parser.add_argument("--seconds", type=float, default=230.0, help="what would end later is skipped")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print this JSON's table")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --quick is a dry run without one")
    if cuda and not _C.build_info()["cuda"].startswith("built"):
        parser.error(f"aevb's CUDA kernels are {_C.build_info()['cuda']}")
    folder = options.out or (RESULTS if cuda and not options.quick else None)
    run = Run(options.device, options.seconds, options.quick, None)
    run.file = folder / f"{run.found['machine']}.json" if folder else None
    torch.manual_seed(0)
    try:
        everything(run)
    except KeyboardInterrupt:
        run.found["skipped"].append("the rest: interrupted")
    run.found["targets"] = verdicts(run.found)
    run.save()
    print(f"\n{table(run.found)}")
    if run.file:
        print(f"\nwritten to {run.file}")
    return int(bool(run.found["wrong"]))


def everything(run: Run) -> None:
    run.attempt("copy bandwidth", run.bandwidth)
    if "copy_bytes_per_second" not in run.found:
        return
    todo = list(plan(run.quick))
    for work, peers in todo[:4]:
        run.attempt(f"{work.name}, {work.elements / M:.3g}M", functools.partial(run.op, work, peers))
    for batch in (100,) if run.quick else (100, 1000):
        run.attempt(f"training step, batch {batch}", functools.partial(run.steps, batch))
    for work, peers in todo[4:]:
        run.attempt(f"{work.name}, {work.elements / M:.3g}M", functools.partial(run.op, work, peers))
    run.attempt("copy bandwidth", run.bandwidth)


if __name__ == "__main__":
    sys.exit(main())
