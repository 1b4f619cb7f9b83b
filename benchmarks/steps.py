"""What is timed: a step of training a 784-500-20 VAE with Adam, and who takes it.

The images are MNIST's, binarized: the first layer's speed is a matter of how many pixels are set. Three kinds of step:
on batches that are there as each provider likes them best; "from the data set", where the batch is gathered and
binarized anew within the step; and importance-weighted, of 50 samples.

Before it is timed, each provider's gradients are compared with a float64 loss of plain PyTorch on the noise that it
drew, and its loss after some steps with the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aevb
from aevb.data import Targets, load
from aevb.training.step import AutogradStep
from aevb.training.step_choice import training_step

from .cases import ATEN_NOISE, NO_WRAPPER, Provider, compiled, fastest, kl_terms, timed

PIXELS, HIDDEN, LATENTS = 784, 500, 20
SHAPES = ((HIDDEN, PIXELS), (2 * LATENTS, HIDDEN), (HIDDEN, LATENTS), (PIXELS, HIDDEN))  # of the weights
BATCHES = 8
LEARNED = 40  # steps, after which the providers' losses are compared
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class StepWork:
    """`targets` are how many times faster than each peer aevb is meant to be."""

    name: str
    batch: int
    samples: int = 1
    from_data: bool = False
    bf16: bool = False
    targets: tuple[tuple[str, float], ...] = ()

    @property
    def peers(self) -> tuple[str, ...]:
        return ("aevb in float32",) if self.bf16 else ("eager", "compile", "jax")

    @property
    def flops(self) -> int:
        """Of the matrix products, as if no pixel were 0: forward, by the weights, and by all but the first's input."""
        rows, first, *others = self.batch * self.samples, *(2 * a * b for a, b in SHAPES)
        return self.batch * (2 * first + 3 * others[0]) + 3 * rows * sum(others[1:])


FAST = (("compile", 2.0), ("jax", 1.2))
STEPS = (
    StepWork("batch 100", 100, targets=FAST),
    StepWork("batch 1000", 1000, targets=FAST),
    StepWork("batch 4096", 4096, targets=FAST),
    StepWork("batch 100, from the data set", 100, from_data=True),
    StepWork("batch 1000, from the data set", 1000, from_data=True),
    StepWork("batch 20, IWAE of 50 samples", 20, samples=50, targets=(("jax", 1.5),)),
    StepWork("batch 1000, bf16", 1000, bf16=True, targets=(("aevb in float32", 1.4),)),
)


def find(name: str) -> StepWork:
    return next(work for work in STEPS if work.name == name)


# ---- the same numbers for everybody ---------------------------------------------------------------------------------


def initial() -> list[np.ndarray]:
    """Weight and bias of each layer."""
    random = np.random.RandomState(0)
    found = []
    for rows, columns in SHAPES:
        found.append((random.randn(rows, columns) * (2 / (rows + columns)) ** 0.5).astype(np.float32))
        found.append(np.zeros(rows, np.float32))
    return found


def images(data: str) -> Tensor:
    dataset = load(Path(data))
    if dataset.data_dim != PIXELS:
        raise ValueError(f"{data} has images of {dataset.data_dim} pixels; expected MNIST's {PIXELS}")
    assert isinstance(dataset.train_images, Tensor)
    return dataset.train_images


def plain_loss(weights: list[Tensor], x: Tensor, eps: Tensor) -> Tensor:
    """What a person would write; eps is (B, D), or (L, B, D) for the importance-weighted bound."""
    w0, b0, w1, b1, w2, b2, w3, b3 = weights
    mu, logvar = F.linear(torch.tanh(F.linear(x, w0, b0)), w1, b1).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * eps
    logits = F.linear(torch.tanh(F.linear(z, w2, b2)), w3, b3)
    if eps.dim() == 2:
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (nll + 0.5 * kl_terms(mu, logvar).sum()) / x.shape[0]
    nll = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    log_ratio = 0.5 * (z * z - eps * eps - logvar).sum(-1)
    return -(torch.logsumexp(-nll - log_ratio, 0) - np.log(len(eps))).mean()


def check(found: list[Tensor], x: Tensor, eps: Tensor, rtol: float) -> None:
    """Raises AssertionError unless `found` are the gradients at the initial weights."""
    weights = [torch.from_numpy(w).double().requires_grad_() for w in initial()]
    expected = torch.autograd.grad(plain_loss(weights, x.double(), eps.double()), weights)
    for a, b in zip(found, expected, strict=True):
        error = float((a.detach().double() - b).norm() / b.norm())
        assert error < rtol, f"a gradient is off by {error:.2g} of its size"


# ---- the providers --------------------------------------------------------------------------------------------------


OTHERS: dict[str, Callable[[StepCase], dict[str, _Step]]] = {}
"""Providers of other libraries, by the modules that have them: jax_steps.py."""


class StepCase:
    """The images of some work, and its providers, each checked, after the same number of steps."""

    def __init__(self, work: StepWork, data: str):
        torch.manual_seed(0)
        self.work = work
        grey = images(data)
        order = torch.randperm(len(grey), generator=torch.Generator().manual_seed(1))
        self.index = order[: BATCHES * work.batch].split(work.batch)
        self.grey = grey
        self.bits = [aevb.binarize(grey, index, seed=2) for index in self.index]
        self.eps_shape = (work.batch, LATENTS) if work.samples == 1 else (work.samples, work.batch, LATENTS)

    def ways(self, name: str) -> dict[str, _Step]:
        if name == "aevb":
            return {"Trainer's step": _Aevb(self, self.work.bf16)}
        if name == "aevb in float32":
            return {"Trainer's step": _Aevb(self, bf16=False)}
        if name in OTHERS:
            return OTHERS[name](self)
        torch_ways: Mapping[str, Callable] = {"fused Adam": lambda f: f}
        if name == "compile":
            torch_ways = {
                "fused Adam": compiled,
                "fused Adam, fallback_random": lambda f: compiled(f, **ATEN_NOISE),
                "fused Adam, fallback_random, cpp_wrapper": lambda f: compiled(f, **ATEN_NOISE, **NO_WRAPPER),
            }
        return {way: _Torch(self, how) for way, how in torch_ways.items()}

    def provider(self, name: str) -> tuple[Provider, float]:
        """And its loss after LEARNED steps."""
        ways, learned = self.ways(name), []
        for step in ways.values():
            step.check()
            losses = []
            for _ in range(LEARNED):
                step()
                losses.append(step.loss())
            learned.append(sum(losses[-BATCHES:]) / BATCHES)
            timed(step, 0.1)
        best, tried = fastest(ways)
        return Provider(name, ways[best], best, tried), learned[list(ways).index(best)]


class _Step:
    """A training step as a call: the next of some batches, forward, backward, Adam."""

    done = 0

    def __call__(self) -> None:
        raise NotImplementedError

    def loss(self) -> float:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class _There:
    """Batches that are there already, in the place of `Targets`."""

    x_scale = None

    def __init__(self, bits: list[Tensor]):
        self.images = torch.cat(bits)
        self.index = list(torch.arange(len(self.images)).split(len(bits[0])))
        self.bits = dict(zip(map(id, self.index), bits, strict=True))

    def __call__(self, index: Tensor, seed: Tensor) -> Tensor:
        return self.bits[id(index)]


class _Aevb(_Step):
    """The step of `aevb.Trainer`."""

    def __init__(self, case: StepCase, bf16: bool):
        work = case.work
        self.case = case
        model = aevb.VAE(PIXELS, HIDDEN, LATENTS)
        for parameter, value in zip(model.parameters(), initial(), strict=True):
            parameter.data.copy_(torch.from_numpy(value))
        self.parameters = list(model.parameters())
        many: Any = {"estimator": "iwae", "num_samples": work.samples} if work.samples > 1 else {}
        optimizer = torch.optim.Adam(self.parameters, LEARNING_RATE, fused=True)
        batches: Any = Targets(case.grey, "dynamic", 255) if work.from_data else _There(case.bits)
        self.index = list(case.index) if work.from_data else batches.index
        self.seeds = list(torch.arange(1000).unbind())
        self.step = training_step(model, aevb.FusedELBO(**many), optimizer, batches, work.batch, bf16)

    def __call__(self) -> None:
        seed = self.seeds[self.done % len(self.seeds)]
        self.last = self.step(self.index[self.done % BATCHES], seed, seed).loss
        self.done += 1

    def loss(self) -> float:
        return float(self.last)

    def check(self) -> None:
        step = self.step
        assert isinstance(step, AutogradStep)
        x, seeds = self.case.bits[0], step.noise_seeds(self.seeds[1], self.index[0])
        step.gradients(x, seeds)
        found = [p.grad for p in self.parameters if p.grad is not None]
        eps = aevb.reference.normal(seeds, self.case.eps_shape)
        check(found, x, eps, rtol=0.03 if step.bf16 else 1e-4)


class _Torch(_Step):
    def __init__(self, case: StepCase, how: Callable):
        work = case.work
        self.case = case
        self.parameters = [nn.Parameter(torch.from_numpy(w)) for w in initial()]
        self.optimizer = torch.optim.Adam(self.parameters, LEARNING_RATE, fused=True)
        shape = case.eps_shape
        if work.from_data:
            grey = case.grey.float() / 255  # as floats: no conversion in the step
            self.batches: list[tuple[Tensor, ...]] = [(index,) for index in case.index]
            self.function = how(lambda w, index: plain_loss(w, torch.bernoulli(grey[index]), torch.randn(shape)))
        else:
            self.batches = [(x.float(),) for x in case.bits]
            self.function = how(lambda w, x: plain_loss(w, x, torch.randn(shape)))
        self.given = how(plain_loss)  # the same with its noise as an argument, for the check

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.last = self.function(self.parameters, *self.batches[self.done % BATCHES])
        self.last.backward()
        self.optimizer.step()
        self.done += 1

    def loss(self) -> float:
        return float(self.last.detach())

    def check(self) -> None:
        x, eps = self.case.bits[0].float(), torch.randn(self.case.eps_shape)
        check(list(torch.autograd.grad(self.given(self.parameters, x, eps), self.parameters)), x, eps, rtol=1e-4)
