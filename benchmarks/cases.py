"""What is timed: the ops, and who does them.

A call is forward and backward in float32, from Python, with random upstream gradients; of a loss, with 1, as
`loss.backward()` has it. The providers:

* `aevb`: the public function, its seed drawn inside;
* `eager`: the leanest PyTorch for the same numbers;
* `compile`: that, through `torch.compile(dynamic=False)`, already compiled and warm;
* `tuned`: the same with Inductor settings that a person could find;
* `jax`: the same in `jax.jit`, if JAX is installed (the extra `bench`).

There is more than one way to write a peer, and which is fastest depends on the shape and the machine. So all of a
provider's ways are tried, and the fastest stands for it; `Provider.settings` says which it was. Nothing is timed before
its values and gradients have been compared with `aevb.reference` in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aevb
from aevb.likelihoods import REGISTRY, Likelihood

THREADS = 2
PROVIDERS = ("aevb", "eager", "compile", "tuned", "jax")

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Call = Callable[[], object]

# ---- the peers in PyTorch -------------------------------------------------------------------------------------------


def kl_terms(mu, logvar):
    return mu * mu + torch.exp(logvar) - 1 - logvar


def sample(mu, logvar):
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return z, 0.5 * kl_terms(mu, logvar).sum(-1)


def sample_one_exp(mu, logvar):
    sd = torch.exp(0.5 * logvar)
    return torch.addcmul(mu, sd, torch.randn_like(mu)), 0.5 * (mu * mu + sd * sd - 1 - logvar).sum(-1)


SAMPLES = 50


def sample_log_ratio(mu, logvar):
    eps = torch.randn(SAMPLES, *mu.shape)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, 0.5 * (z * z - eps * eps - logvar).sum(-1)


def sample_log_ratio_addcmul(mu, logvar):
    eps = torch.randn(SAMPLES, *mu.shape)
    z = torch.addcmul(mu, torch.exp(0.5 * logvar), eps)
    return z, 0.5 * (z.square().sum(-1) - eps.square().sum(-1) - logvar.sum(-1))


def bernoulli(logits, x):
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def bernoulli_softplus(logits, x):
    return (x * logits - F.softplus(logits)).sum(-1)


def loss(logits, x, mu, logvar):
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    return (nll + 0.5 * kl_terms(mu, logvar).sum()) / mu.shape[0]


def loss_softplus(logits, x, mu, logvar):
    return ((F.softplus(logits) - x * logits).sum() + 0.5 * kl_terms(mu, logvar).sum()) / mu.shape[0]


def compiled(function: Function, **options) -> Function:
    return torch.compile(function, dynamic=False, options=options or None)


NO_WRAPPER = {"cpp_wrapper": True}  # Inductor's calls from C++: less Python a call
ATEN_NOISE = {"fallback_random": True}  # ATen's randn, not Inductor's, which is slow on a CPU

# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """One line of the table. `eager` are the ways to write the peer in PyTorch, each tried by `compile` too, and with
    each of the settings of `tuned`; `jax` names a function of benchmarks/jax_peers.py."""

    name: str
    inputs: Callable[[], list[Tensor]]
    aevb: Function
    reference: Function
    eager: Mapping[str, Function]
    jax: str
    elements: int  # of the largest tensor
    traffic: int  # bytes that a forward and a backward pass must read and write
    tuned: Sequence[Mapping[str, bool]] = (NO_WRAPPER,)
    target: float | None = None  # how many times faster than the fastest peer
    unit_upstream: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def latents(batch: int, dim: int) -> list[Tensor]:
    return [torch.randn(batch, dim, requires_grad=True) for _ in range(2)]


def images(batch: int, dim: int) -> list[Tensor]:
    logits = torch.randn(batch, dim)
    logits[logits == 0] = 1  # where softplus in JAX, in a jitted loss, has the gradient 0 instead of 1/2
    return [logits.requires_grad_(), torch.rand(batch, dim)]


def sample_work(batch: int, dim: int, target: float | None = None) -> Work:
    return Work(
        f"sample+KL {batch}x{dim}",
        lambda: latents(batch, dim),
        aevb.sample_gaussian,
        aevb.reference.sample_gaussian,
        {"as written": sample, "one exp, addcmul": sample_one_exp},
        "sample",
        batch * dim,
        # mu, logvar, z; mu, logvar, z's gradient, theirs; a KL and its gradient a row
        4 * batch * (8 * dim + 2),
        (ATEN_NOISE, ATEN_NOISE | NO_WRAPPER),
        target,
    )


def log_ratio_work(batch: int, dim: int) -> Work:
    """Many samples, and log q(z|x) - log p(z) of each: what importance weighting starts from."""
    return Work(
        f"sample+log ratio {SAMPLES}x{batch}x{dim}",
        lambda: latents(batch, dim),
        lambda mu, logvar: aevb.sample_gaussian_log_ratio(mu, logvar, SAMPLES),
        lambda mu, logvar, **noise: aevb.reference.sample_gaussian_log_ratio(mu, logvar, SAMPLES, **noise),
        {"as written": sample_log_ratio, "addcmul": sample_log_ratio_addcmul},
        "sample_log_ratio",
        SAMPLES * batch * dim,
        4 * batch * (SAMPLES * (2 * dim + 2) + 6 * dim),
        (ATEN_NOISE, ATEN_NOISE | NO_WRAPPER),
    )


def bernoulli_work(batch: int, dim: int, target: float | None = None) -> Work:
    return Work(
        f"Bernoulli {batch}x{dim}",
        lambda: images(batch, dim),
        aevb.bernoulli_log_prob,
        aevb.reference.bernoulli_log_prob,
        {"binary_cross_entropy_with_logits": bernoulli, "softplus": bernoulli_softplus},
        "bernoulli",
        batch * dim,
        4 * batch * (5 * dim + 2),  # logits and targets twice, or them once and the gradient twice more
        target=target,
    )


def loss_work(batch: int, dim: int, latent_dim: int) -> Work:
    return Work(
        f"FusedELBO {batch}x{dim}/{latent_dim}",
        lambda: [*images(batch, dim), *latents(batch, latent_dim)],
        aevb.FusedELBO(),
        aevb.reference.FusedELBO(),
        {"binary_cross_entropy_with_logits": loss, "softplus": loss_softplus},
        "loss",
        batch * dim,
        4 * batch * (3 * dim + 6 * latent_dim),
        unit_upstream=True,
    )


def likelihood_work(family: Likelihood, batch: int, dim: int) -> Work:
    """log p(x|z) of any likelihood, against its distribution in PyTorch."""

    def inputs() -> list[Tensor]:
        params = [0.5 * torch.randn(batch, dim) for _ in family.params]
        x = torch.rand(batch, dim) if family.support[0] == 0 else torch.randn(batch, dim)
        return [*(p.requires_grad_() for p in params), x]

    def by(log_prob: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> Function:
        return lambda *given: log_prob(given[:-1], given[-1])

    def fused(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return aevb.log_prob(family, params if len(params) > 1 else params[0], x, validate_args=False)

    as_density = family.density == family

    def distribution(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
        if not as_density:
            return family.reference(params, x)
        return family.distribution(*params).log_prob(x).sum(-1)

    return Work(
        f"{family.name} {batch}x{dim}",
        inputs,
        by(fused),
        by(family.reference),
        {"torch.distributions": by(distribution), "formula": by(family.reference)},
        "",
        batch * dim,
        4 * batch * (2 * (len(family.params) + 1) * dim + 2),
    )


def elements(logits, x, weight):
    return (weight * -F.binary_cross_entropy_with_logits(logits, x, reduction="none")).sum(-1)


def selected(logits, x, weight):
    return torch.where(weight != 0, -F.binary_cross_entropy_with_logits(logits, x, reduction="none"), 0).sum(-1)


def weighted_work(name: str, batch: int, dim: int) -> Work:
    """The Bernoulli with a mask, or with weights of its elements."""
    is_mask = name == "mask"

    def inputs() -> list[Tensor]:
        weight = torch.rand(batch, dim)
        return [*images(batch, dim), weight < 0.5 if is_mask else weight]

    return Work(
        f"Bernoulli, {name} {batch}x{dim}",
        inputs,
        lambda logits, x, weight: aevb.bernoulli_log_prob(logits, x, weight=weight),
        lambda logits, x, weight: aevb.reference.bernoulli_log_prob(logits, x, weight=weight),
        {"product": elements} | ({"selection": selected} if is_mask else {}),
        "",
        batch * dim,
        batch * ((5 * 4 + 2 * (1 if is_mask else 4)) * dim + 8),
    )


def of_every_likelihood(batch: int = 1000, dim: int = 784) -> list[Work]:
    """The registry's, with their options as they are by default; and one with a mask, and with weights."""
    found = [likelihood_work(cls(), batch, dim) for cls in REGISTRY.values()]
    return [*found, weighted_work("mask", batch, dim), weighted_work("weights", batch, dim)]


WORK = (
    sample_work(100, 20, 2.5),
    sample_work(1000, 50, 2.5),
    sample_work(16384, 128, 8.0),
    sample_work(65536, 128, 8.0),
    log_ratio_work(100, 50),
    bernoulli_work(100, 784, 2.5),
    bernoulli_work(1000, 784, 2.5),
    bernoulli_work(16384, 784, 7.0),
    bernoulli_work(65536, 784, 7.0),
    loss_work(100, 784, 20),
    loss_work(1000, 784, 20),
    loss_work(16384, 784, 20),
)


def sweep() -> list[Work]:
    """From a thousand to a hundred million elements."""
    sizes = [10**k for k in range(3, 9)]
    found = [sample_work(max(n // 128, 1), 128) for n in sizes]
    found += [bernoulli_work(max(n // 784, 1), 784) for n in sizes]
    return list({work.name: work for work in found}.values())


def find(name: str) -> Work:
    return next(work for work in (*WORK, *sweep()) if work.name == name)


# ---- the providers --------------------------------------------------------------------------------------------------


def timed(call: Call, seconds: float, at_least: int = 2) -> list[float]:
    """Seconds of each of a burst of calls, after one that is not counted."""
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def fastest(calls: Mapping[str, Call]) -> tuple[str, dict[str, float]]:
    """Which of the ways is the fastest, and the least seconds of each in a short probe, where there is a choice."""
    probes: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(5 if len(calls) > 1 else 0):
        for way, call in calls.items():
            probes[way] += timed(call, 0.02, at_least=1)
    tried = {way: min(times) for way, times in probes.items() if times}
    return min(tried, key=lambda way: tried[way], default=next(iter(calls))), tried


@dataclass(frozen=True)
class Provider:
    name: str
    call: Call
    settings: str  # which way of writing or compiling it
    tried: Mapping[str, float]  # seconds, by those ways: the least in a short probe, where there is a choice


OTHERS: dict[str, Callable[[Case], dict[str, Call]]] = {}
"""Providers of other libraries, by the modules that have them: jax_peers.py."""


class Case:
    """The inputs and upstream gradients of some work, and its providers, each checked and warm."""

    def __init__(self, work: Work):
        torch.manual_seed(0)
        self.work = work
        self.inputs = work.inputs()
        self.wanted = [i for i, t in enumerate(self.inputs) if t.requires_grad]
        outputs = self._outputs(work.aevb, self.inputs)
        self.upstream = [torch.ones_like(t) if work.unit_upstream else torch.randn_like(t) for t in outputs]
        self.has_noise = "sample" in work.name
        self._expected = None if self.has_noise else self._by_reference()

    @staticmethod
    def _outputs(function: Function, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
        outputs = function(*inputs, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _by_reference(self, **noise: Tensor) -> list[Tensor]:
        """Values and gradients, in float64."""
        batch = len(self.inputs[0])
        rows = max(1, 2**24 * batch // self.inputs[0].numel())  # at a time: float64 takes memory
        if rows >= batch:
            return self._part_by_reference(self.inputs, self.upstream, noise)
        found = []
        for first in range(0, batch, rows):

            def part(t: Tensor, first: int = first) -> Tensor:
                return t[first : first + rows]

            noise_part = {name: part(t) for name, t in noise.items()}
            found.append(self._part_by_reference([*map(part, self.inputs)], [*map(part, self.upstream)], noise_part))
        return [torch.cat(part) for part in zip(*found, strict=True)]

    def _part_by_reference(
        self, inputs: Sequence[Tensor], upstream: Sequence[Tensor], noise: Mapping[str, Tensor]
    ) -> list[Tensor]:
        inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        outputs = self._outputs(self.work.reference, inputs, **noise)
        gradients = torch.autograd.grad(outputs, [inputs[i] for i in self.wanted], [g.double() for g in upstream])
        return [t.detach() for t in (*outputs, *gradients)]

    def check(self, found: Sequence[Tensor]) -> None:
        """Raises AssertionError unless values and gradients are the reference's. Noise is recovered from the sample."""
        expected = self._expected
        if expected is None:
            mu, logvar = (t.detach().double() for t in self.inputs[:2])
            eps = (found[0].detach().double() - mu) * torch.exp(-0.5 * logvar)
            n = eps.numel()
            assert abs(eps.mean()) < 5 / n**0.5, "the noise does not have mean 0"
            assert abs(eps.var() - 1) < 5 * (2 / n) ** 0.5, "the noise does not have variance 1"
            expected = self._by_reference(eps=eps)
        for a, b in zip(found, expected, strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a.detach().double(), b, rtol=1e-5, atol=1e-6 * scale)

    def run(self, function: Function) -> list[Tensor]:
        """Values and gradients."""
        outputs = self._outputs(function, self.inputs)
        return [*outputs, *torch.autograd.grad(outputs, [self.inputs[i] for i in self.wanted], self.upstream)]

    def call(self, function: Function) -> Call:
        inputs, wanted, upstream = self.inputs, [self.inputs[i] for i in self.wanted], self.upstream

        def call():
            return torch.autograd.grad(function(*inputs), wanted, upstream)

        return call

    def ways(self, name: str, only: str | None = None) -> dict[str, Call]:
        """The ways of a provider as calls, or one of them, each checked and warm."""
        if name in OTHERS:
            found = OTHERS[name](self)
            return found if only is None else {only: found[only]}
        functions: dict[str, Function] = {}
        if name == "aevb":
            functions = {"public API": self.work.aevb}
        elif name == "eager":
            functions = dict(self.work.eager)
        elif name == "compile":
            functions = {way: compiled(function) for way, function in self.work.eager.items()}
        else:
            for options in self.work.tuned:
                how = " and ".join(options)
                functions |= {f"{way}, {how}": compiled(f, **options) for way, f in self.work.eager.items()}
        calls = {}
        for way, function in functions.items():
            if only not in (None, way):
                continue
            self.check(self.run(function))
            calls[way] = self.call(function)
            timed(calls[way], 0.05)
        return calls

    def provider(self, name: str, way: str | None = None) -> Provider:
        """Builds, checks and warms up `name`, in the fastest of its ways or in one."""
        calls = self.ways(name, way)
        best, tried = fastest(calls)
        return Provider(name, calls[best], best, tried)
