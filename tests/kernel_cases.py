"""Calls of every kernel, for tests that hold one device's results to another's, or to tests/golden's, bit for bit.

Their arguments are the same numbers on every machine and under every PyTorch: of NumPy's RandomState, whose stream is
frozen, and by arithmetic that rounds in one way. Those of torch.randn differ with the instruction set.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aevb import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, rows shorter and longer than a run of 4 or 8, odd lengths, whole groups (512) and tiles (1024, 2048,
# 4096), and one more or less, many parts; and nothing at all.
LATENT_SHAPES = [
    *[(1, 1), (7, 20), (1000, 1), (1000, 3), (300, 2), (400, 50), (3, 5, 41), (9, 64), (9, 65), (5, 257), (5, 512)],
    *[(3, 513), (33, 784), (3, 1023), (2, 2048), (2, 2049), (2, 4096), (3, 4097), (1, 100_003), (4, 0), (0, 4)],
]
SHORT_ROWS = [(60, columns) for columns in (4, 5, 8, 9, 16, 17, 32, 33)]  # how they are summed depends on their length
PIXEL_SHAPES = [
    *[(1, 1), (9, 7), (130, 8), (100, 33), (64, 784), (3, 1271), (2, 5, 513), (2, 4104), (5, 32_769), (1, 200_003)],
    *[(1, 65_536), (3, 0), (0, 5)],
]
SEED = 2**40 + 5


_random = np.random.RandomState()  # to make one takes 250 us, to seed it again 5


def randn(seed: int, *size: int) -> Tensor:
    """Standard normals, float32."""
    _random.seed(seed)
    return torch.from_numpy(np.asarray(_random.standard_normal(size), np.float32))


def rand(seed: int, *size: int) -> Tensor:
    """Multiples of 2^-24 in [0, 1), float32."""
    _random.seed(seed)
    return torch.from_numpy(np.asarray(_random.randint(0, 2**24, size, np.uint32), np.float32)) / 2**24


@dataclass
class Case:
    name: str
    op: str  # of torch.ops.aevb
    args: tuple[Any, ...]
    held: tuple[str, tuple[Any, ...]] | None = None
    """The op and the arguments under which tests/golden has its bits, where these are not its own."""
    is_golden: bool = True
    """Whether tests/golden has its bits."""

    def on(self, device: str) -> "Case":
        """The same call with its tensors on another device, strides and offsets kept."""
        return Case(self.name, self.op, tuple(_moved(a, device) for a in self.args))

    def __str__(self) -> str:
        shapes = [f"{tuple(a.shape)} {str(a.dtype)[6:]}" if isinstance(a, Tensor) else repr(a) for a in self.args]
        return f"{self.op}({', '.join(shapes)}) {self.name}"


def _moved(value, device: str):
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype)
    whole.set_(value.untyped_storage())
    moved = whole.to(device)
    return moved.as_strided(value.shape, value.stride(), value.storage_offset())


def with_edges(t: Tensor, seed: int) -> Tensor:
    """t with some infinities, NaNs, zeros and numbers that over- and underflow in it."""
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e4, -1e4, 88.8, -103.5, 1e38, 1e-40])
    at = rand(seed, *t.shape)
    return torch.where(at < 0.02, edges[(at * 1e6).long() % len(edges)], t)


def seeds_of(shape: tuple[int, ...]) -> Tensor:
    """Seeds that differ in both their words."""
    return torch.arange(math.prod(shape)).view(shape) * (0x9E3779B97F4A7C15 - 2**64) + SEED


def views(t: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in other ways."""
    wide = torch.cat([t, torch.zeros_like(t)], dim=-1)
    odd = torch.cat([t, torch.zeros_like(t[..., :1])], dim=-1)
    shifted = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return {
        "half of wider rows": wide[..., : t.shape[-1]],
        "rows an odd distance apart": odd[..., : t.shape[-1]],
        "not aligned": shifted,
        "transposed": t.mT.contiguous().mT,
    }


def cases() -> Iterator[Case]:
    yield from _noise()
    yield from _pixels()
    for dtype in DTYPES:
        yield from _latents(dtype)
        yield from _log_ratios(dtype)
        yield from _priors(dtype)
        yield from _likelihoods(dtype)
        yield from _gaussian_likelihoods(dtype)
        yield from _losses(dtype)
        yield from _other_likelihoods(dtype)
        yield from _weights(dtype)


def _noise() -> Iterator[Case]:
    for seed in (0, -1, SEED):
        yield Case("one seed", "normal", (torch.tensor(seed), [10_007]))
    for size in ([100, 5], [100, 8], [7, 3, 4], [50, 1], [0, 3]):
        seeds = torch.arange(size[0]) * 2**35 - 7
        yield Case("seeds", "normal", (seeds, size))
    yield Case("", "mix_seed", (torch.arange(5000) * 2**50, torch.arange(5000) - 1000))
    x = torch.arange(-(2**31), 2**31, 99_991).to(torch.int32).view(torch.float32)
    in_range = x[(x.abs() >= 2.0**-60) & (x.abs() <= 2.0**60)].abs()
    for name in ("exp", "expm1", "expm1_minus_x", "tanh", "log", "log_one_minus", "bfloat16", "float16"):
        yield Case(name, "elementary", (name, x))
    yield Case("exp_minus", "elementary", ("exp_minus", x[~(x < 0)]))
    for name in ("log1p", "rcp", "sqrt"):
        yield Case(name, "elementary", (name, in_range))


def _pixels() -> Iterator[Case]:
    for shape in ((9, 784), (20, 16), (7, 33), (3, 1), (2, 1271), (4, 256), (0, 5), (4, 0)):
        u = rand(30, *shape)
        for max_value in (255, 16, 1):
            images = torch.where(u < 0.5, torch.zeros(()), 1 + (2 * u - 1) * max_value).clamp_max(max_value)
            images = images.to(torch.uint8)
            yield Case(f"up to {max_value}", "binarize", (images, None, torch.tensor(SEED), max_value))
        index = torch.arange(3 * shape[0]) * 5 % max(shape[0], 1)
        yield Case("some of them", "binarize", (images, index, torch.tensor(-3), 255))
        yield Case("not aligned", "binarize", (views(images)["not aligned"], index, torch.tensor(7), 1))


def _latents(dtype) -> Iterator[Case]:  # noqa: C901  a list of cases
    def sample(name, mu, logvar, seed, num_samples):
        z = mu.shape if num_samples is None else (num_samples, *mu.shape)
        args = (mu, logvar, seed, num_samples)
        yield Case(name, "sample_gaussian_forward", args)
        grad_z, grad_kl = (3 * randn(5, *z)).to(dtype), 3 * randn(6, *mu.shape[:-1])
        for grads in ((grad_z, grad_kl), (grad_z, None), (None, grad_kl), (None, None)):
            which = " and ".join(n for n, g in zip(("z", "kl"), grads, strict=True) if g is not None)
            yield Case(f"{name}, through {which or 'nothing'}", "sample_gaussian_backward", (*args, *grads))

    def kl(name, mu, logvar):
        yield Case(name, "gaussian_kl_forward", (mu, logvar))
        grads = {"": 3 * randn(7, *mu.shape[:-1]), ", one gradient": torch.tensor(0.3).expand(mu.shape[:-1])}
        for which, grad in grads.items():
            yield Case(name + which, "gaussian_kl_backward", (mu, logvar, grad))

    for shape in LATENT_SHAPES:
        mu, logvar = randn(1, *shape), 2 * randn(2, *shape)
        for name, m, v in (("", mu, logvar), ("edges", with_edges(mu, 3), with_edges(logvar, 4))):
            yield from sample(name, m.to(dtype), v.to(dtype), torch.tensor(SEED), None)
            yield from kl(name, m.to(dtype), v.to(dtype))
    for shape in SHORT_ROWS:
        yield Case("", "gaussian_kl_forward", (randn(1, *shape).to(dtype), randn(2, *shape).to(dtype)))
    for shape in ((7, 20), (3, 5, 41), (9, 50), (2, 3), (3, 2050)):
        mu, logvar = randn(8, *shape).to(dtype), randn(9, *shape).to(dtype)
        for num_samples in (0, 1, 3, 4, 16, 17, 40) if shape[-1] < 100 else (3, 20):
            z = (num_samples, *shape)
            for dims in range(len(z)):
                yield from sample(f"seeds {tuple(z[:dims])}", mu, logvar, seeds_of(z[:dims]), num_samples)
        yield from sample("a seed each", mu, logvar, torch.arange(shape[0]), None)
        for name, view in views(mu).items():
            yield from sample(name, view, logvar, torch.tensor(SEED), None)
            yield from sample(name, view, views(logvar)[name], torch.tensor(SEED), 2)
            yield from kl(name, view, logvar)
        grad_z = views(randn(10, *shape).to(dtype))
        for name, grad in grad_z.items():
            args = (mu, logvar, torch.tensor(SEED), None, grad, None)
            yield Case(f"grad_z {name}", "sample_gaussian_backward", args)


def _log_ratios(dtype) -> Iterator[Case]:  # noqa: C901  a list of cases
    gradients = (i % 3 for i in itertools.count(DTYPES.index(dtype)))

    def sample(name, mu, logvar, seed, num_samples, layout=lambda grad_z: grad_z, edges=False):
        """With the next of the three gradients: the forward op, and the backward op with all that may flow into it and
        with a part."""
        z, gradient = mu.shape if num_samples is None else (num_samples, *mu.shape), next(gradients)
        args = (mu, logvar, seed, num_samples, gradient)
        yield Case(name, "sample_gaussian_log_ratio_forward", args)
        grads = 3 * randn(26, *z), 3 * randn(27, *z[:-1]), rand(28, *z[:-1])
        grads = [with_edges(g, 29 + i) for i, g in enumerate(grads)] if edges else grads
        grad_z, grad, weight = layout(grads[0].to(dtype)), grads[1], grads[2] if gradient == 2 else None
        part = ((grad_z, None, None), (None, grad, None), (None, None, weight))[gradient]
        for which, some in (("everything", (grad_z, grad, weight)), ("a part", part)):
            yield Case(f"{name}, through {which}", "sample_gaussian_log_ratio_backward", (*args, *some))

    for shape in LATENT_SHAPES:
        mu, logvar = randn(1, *shape), 2 * randn(2, *shape)
        yield from sample("", mu.to(dtype), logvar.to(dtype), torch.tensor(SEED), None)
        mu, logvar = with_edges(mu, 3).to(dtype), with_edges(logvar, 4).to(dtype)
        yield from sample("edges", mu, logvar, torch.tensor(SEED), None, edges=True)
    for shape in SHORT_ROWS:
        for name, scale in (("", 1), ("the prior", 0)):  # whose terms are 0 or -0
            mu, logvar = scale * randn(1, *shape).to(dtype), scale * randn(2, *shape).abs().to(dtype)
            yield Case(name, "sample_gaussian_log_ratio_forward", (mu, logvar, torch.tensor(SEED), 3, 0))
    for shape in ((1, 1), (2, 3), (7, 20), (3, 5, 41), (9, 50), (1, 700), (100, 20), (3, 2050), (2, 33_000)):
        mu, logvar = randn(8, *shape).to(dtype), randn(9, *shape).to(dtype)
        counts = (0, 1, 3, 16, 17, 40) if math.prod(shape) < 3000 else (3, 17) if shape[-1] < 3000 else (2,)
        for i, num_samples in enumerate(counts):
            z = (num_samples, *shape)
            for dims in sorted({0, 1 + i % (len(z) - 1), len(z) - 1}):
                seeds = seeds_of(z[:dims])
                yield from sample(f"seeds {tuple(z[:dims])}", mu, logvar, seeds, num_samples, edges=num_samples == 17)
        if shape[-1] < 33_000:
            yield from sample("a seed each", mu, logvar, torch.arange(shape[0]), None)
            for name, view in views(mu).items():
                yield from sample(name, view, views(logvar)[name], torch.tensor(SEED), 2)
                yield from sample(f"grad_z {name}", mu, view, torch.tensor(SEED), None, lambda g, n=name: views(g)[n])


def _priors(dtype) -> Iterator[Case]:
    """Of all that a prior and a range of logvar may be."""
    gradients = (i % 3 for i in itertools.count(DTYPES.index(dtype)))
    needs = itertools.cycle((15, 15, 3, 7, 12, 9))
    turn, no_range = itertools.count(), (None, None)

    def calls(name, mu, logvar, prior, seed, num_samples, limits=no_range, edges=False):
        z, gradient = mu.shape if num_samples is None else (num_samples, *mu.shape), next(gradients)
        grads = 3 * randn(73, *z), 3 * randn(74, *z[:-1]), rand(75, *z[:-1]), 3 * randn(76, *mu.shape[:-1])
        grad_z, grad, weight, grad_kl = (with_edges(g, 77 + i) for i, g in enumerate(grads)) if edges else grads
        grad_z, weight = grad_z.to(dtype), weight if gradient == 2 else None
        yield Case(name, "gaussian_kl_with_prior_forward", (mu, logvar, *prior, *limits))
        yield Case(name, "gaussian_kl_with_prior_backward", (mu, logvar, *prior, *limits, grad_kl, next(needs)))
        args = (mu, logvar, *prior, seed, num_samples, *limits)
        yield Case(name, "sample_gaussian_with_prior_forward", args)
        some = ((grad_z, grad_kl), (None, grad_kl), (grad_z, None))[next(turn) % 3]
        yield Case(name, "sample_gaussian_with_prior_backward", (*args, *some, next(needs)))
        args = (mu, logvar, *prior, seed, num_samples, gradient, *limits)
        yield Case(name, "sample_gaussian_log_ratio_with_prior_forward", args)
        part = ((None, grad, weight, 0.3 * grad), (grad_z, None, None, None))[next(turn) % 2]
        for some in ((grad_z, grad, weight, grad), part):
            yield Case(name, "sample_gaussian_log_ratio_with_prior_backward", (*args, *some, next(needs)))

    seed = torch.tensor(SEED)
    for i, shape in enumerate(LATENT_SHAPES):
        mu, logvar = randn(80, *shape).to(dtype), 2 * randn(81, *shape).to(dtype)
        each, shared = (randn(82, *shape), randn(83, *shape)), (randn(84, shape[-1]), randn(85, shape[-1]))
        yield from calls("a prior each", mu, logvar, each, seed, None)
        yield from calls("one prior, and a range", mu, logvar, shared, seed, 2, (-0.5, 1.0))
        mu, logvar = with_edges(mu.float(), 86).to(dtype), with_edges(logvar.float(), 87).to(dtype)
        mixed = with_edges(each[0], 88), with_edges(shared[1], 89)
        yield from calls("edges", mu, logvar, mixed, seed, None, (no_range, (-30.0, 20.0))[i % 2], True)
        if i % 3 == 0:
            yield from calls("a range", mu, logvar, (None, None), seed, None, ((-30.0, 0.7), (-1e9, 80.0))[i % 2])
    for shape in ((7, 20), (3, 5, 41), (3, 2050)):
        mu, logvar = randn(90, *shape).to(dtype), randn(91, *shape).to(dtype)
        each, shared = (randn(92, *shape), randn(93, *shape)), (randn(94, shape[-1]), randn(95, shape[-1]))
        for num_samples in (0, 16, 17) if shape[-1] < 1000 else (17,):
            seeds = seeds_of((num_samples, *shape)[: num_samples % 3])
            yield from calls("a prior each", mu, logvar, each, seeds, num_samples)
            yield from calls("one prior", mu, logvar, shared, seeds, num_samples)
        for name, view in views(mu).items():
            yield from calls(name, view, views(logvar)[name], shared, seed, 2)
            yield from calls(f"prior {name}", mu, logvar, (each[0], views(each[1])[name]), seed, None)
        expanded = tuple(t.expand(shape) for t in shared)
        yield from calls("expanded", mu, logvar, expanded, seed, None)
    for rows in (1, 64, 65, 1000):  # how a shared prior's gradient is summed
        mu, logvar = randn(96, rows, 5).to(dtype), randn(97, rows, 5).to(dtype)
        yield from calls("one prior", mu, logvar, (randn(98, 5), randn(99, 5)), seed, 3)


def targets(shape: tuple[int, ...]) -> dict[str, tuple[Tensor, float | None]]:
    """By name: targets and x_scale."""
    u = rand(11, *shape)
    return {
        "soft": (u, None),
        "bool": (u < 0.4, None),
        "uint8": ((256 * u).to(torch.uint8), 1 / 255),
        "bfloat16": (u.bfloat16(), None),
        "float16": (u.half(), None),
        "scaled": (100 * u, 0.01),
    }


def _likelihoods(dtype) -> Iterator[Case]:
    def log_prob(name, output, x, x_scale, from_probs=False):
        args = (output, x, None, None, None, "bernoulli_probs" if from_probs else "bernoulli_logits", 0.0, x_scale)
        held, grad = (output, x, x_scale, from_probs), 3 * randn(12, *output.shape[:-1])
        yield Case(name, "log_prob_forward", args, ("bernoulli_log_prob_forward", held))
        yield Case(name, "log_prob_backward", (*args, grad, 1), ("bernoulli_log_prob_backward", (*held, grad)))
        yield Case(name, "log_prob_and_grad", (*args, 0.7, 1), ("bernoulli_log_prob_and_grad", (*held, 0.7)))

    for shape in PIXEL_SHAPES:
        logits = 4 * randn(13, *shape)
        for name, (x, x_scale) in targets(shape).items():
            yield from log_prob(name, logits.to(dtype), x, x_scale)
        x = targets(shape)["soft"][0]
        yield from log_prob("edges", with_edges(logits, 14).to(dtype), with_edges(x, 15), None)
        u = rand(16, *shape)
        probs = torch.where(u < 0.05, (u < 0.03).float(), rand(17, *shape)).to(dtype)
        yield from log_prob("probs", probs, x, None, True)
        yield from log_prob("probs, uint8", probs, *targets(shape)["uint8"], True)
    for shape in ((6, 24), (5, 50), (3, 784)):  # of x; several samples of logits for each
        for name, (x, x_scale) in targets(shape).items():
            yield from log_prob(f"samples, {name}", randn(18, 7, *shape).to(dtype), x, x_scale)
        logits, x = randn(19, *shape).to(dtype), rand(20, *shape)
        for name, view in views(logits).items():
            yield from log_prob(f"logits {name}", view, x, None)
            yield from log_prob(f"x {name}", logits, views(x)[name], None)
            yield from log_prob(f"logits and uint8 x {name}", view, views((255 * x).to(torch.uint8))[name], 1 / 255)


def _gaussian_likelihoods(dtype) -> Iterator[Case]:
    needs = itertools.cycle(([1, 1], [1, 0], [0, 1], [1, 1], [0, 0]))  # not in step with sigmoid

    def log_prob(name, mean, x, x_scale, logvar, fixed=0.0):
        for sigmoid in (False, True):
            kind = f"gaussian{'_sigmoid' if sigmoid else ''}{'_fixed' if logvar is None else ''}"
            args, held = (mean, x, logvar, None, None, kind, fixed, x_scale), (mean, x, logvar, fixed, x_scale, sigmoid)
            yield Case(name, "log_prob_forward", args, ("gaussian_log_prob_forward", held))
            for op, factor in (("backward", 3 * randn(32, *mean.shape[:-1])), ("and_grad", 0.7)):
                need = next(needs)
                more = (factor, need[0] + 2 * need[1])
                yield Case(name, f"log_prob_{op}", (*args, *more), (f"gaussian_log_prob_{op}", (*held, factor, need)))

    dtypes = itertools.cycle((dtype, dtype, torch.float32, torch.bfloat16))  # of logvar
    for shape in PIXEL_SHAPES:
        mean, logvar = 2 * randn(33, *shape), 3 * randn(34, *shape)
        for name, (x, x_scale) in targets(shape).items():
            yield from log_prob(f"{name}, a logvar each", mean.to(dtype), x, x_scale, logvar.to(next(dtypes)))
            yield from log_prob(f"{name}, one logvar", mean.to(dtype), x, x_scale, None, -0.7)
        x, edges = targets(shape)["soft"][0], with_edges(mean, 35).to(dtype)
        yield from log_prob("edges", edges, with_edges(x, 36), None, with_edges(logvar, 37).to(dtype))
        yield from log_prob("edges, narrow", edges, with_edges(x, 36), None, None, -300.0)
        shared = logvar.reshape(-1)[: shape[-1]].to(dtype).expand(shape) if logvar.numel() else logvar.to(dtype)
        yield from log_prob("rows share logvar", mean.to(dtype), x, None, shared)
    for shape in ((6, 24), (5, 50), (3, 784)):  # of x; several samples of means for each
        for name, (x, x_scale) in targets(shape).items():
            mean, logvar = randn(38, 7, *shape).to(dtype), randn(39, 7, *shape).to(next(dtypes))
            yield from log_prob(f"samples, {name}", mean, x, x_scale, logvar)
            yield from log_prob(f"samples, {name}, one logvar", mean, x, x_scale, None, 1.3)
        mean, logvar, x = randn(40, *shape).to(dtype), randn(41, *shape).to(dtype), rand(42, *shape)
        halves = torch.cat([mean, logvar], -1).chunk(2, -1)
        yield from log_prob("halves of one output", halves[0], x, None, halves[1])
        for name, view in views(mean).items():
            yield from log_prob(f"mean {name}", view, x, None, logvar)
            yield from log_prob(f"mean and logvar {name}", view, x, None, views(logvar)[name])
            yield from log_prob(f"logvar {name}", mean, x, None, views(logvar.bfloat16())[name])
            yield from log_prob(f"x {name}, one logvar", mean, views(x)[name], None, None, 0.3)


def _other_likelihoods(dtype) -> Iterator[Case]:
    """Of what the list has beyond the Bernoulli and the Gaussian."""
    others = {n: p for n, p in _C.likelihoods().items() if not n.startswith(("bernoulli", "gaussian"))}
    needs = itertools.cycle((3, 1, 2, 3, 0))
    for likelihood, names in others.items():

        def calls(name, p0, x, x_scale, p1, likelihood=likelihood):
            args = (p0, x, p1, None, None, likelihood, 0.0, x_scale)
            yield Case(name, "log_prob_forward", args, is_golden=False)
            for op, factor in (("backward", 3 * randn(52, *p0.shape[:-1])), ("and_grad", 0.7)):
                need = 1 if p1 is None else next(needs)
                yield Case(name, f"log_prob_{op}", (*args, factor, need), is_golden=False)

        for shape in ((1, 1), (9, 7), (64, 784), (3, 1271), (2, 4104), (3, 0), (0, 5)):
            p0, p1 = randn(50, *shape), randn(51, *shape) if len(names) == 2 else None
            for name, (x, x_scale) in targets(shape).items():
                yield from calls(name, p0.to(dtype), x, x_scale, None if p1 is None else p1.to(dtype))
            x, second = targets(shape)["soft"][0], None if p1 is None else with_edges(p1, 53).to(dtype)
            yield from calls("edges", with_edges(p0, 54).to(dtype), with_edges(x, 55), None, second)
        p0, p1, x = randn(56, 7, 5, 50).to(dtype), randn(57, 7, 5, 50).to(dtype), rand(58, 5, 50)
        yield from calls("samples", p0, x, None, p1 if len(names) == 2 else None)
        if len(names) == 2:
            yield from calls("rows share it", p0, x, None, p1[0, 0].expand(p0.shape))
            halves = torch.cat([p0, p1], -1).chunk(2, -1)
            yield from calls("halves of one output", halves[0], x, None, halves[1])


def _weights(dtype) -> Iterator[Case]:
    """Masks, weights and offsets, of every likelihood."""
    needs = itertools.cycle((3, 1, 2))
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))  # of weights

    def weights_of(shape):
        u = rand(60, *shape)
        yield "a mask", u < 0.6
        yield "all of a mask", torch.ones(shape, dtype=torch.bool)
        yield "bytes", torch.where(u < 0.6, (255 * u).to(torch.uint8) | 1, 0)
        yield "weights", torch.where(u < 0.6, 3 * u, 0.0).to(next(dtypes))
        yield "rows share a mask", (u.reshape(-1, shape[-1])[0] < 0.6).expand(shape) if u.numel() else u < 0.6
        yield "no weights", None

    for likelihood, names in _C.likelihoods().items():

        def calls(name, p0, x, p1, weight, offset, likelihood=likelihood):
            args = (p0, x, p1, weight, offset, likelihood, 0.4, None)
            yield Case(name, "log_prob_forward", args, is_golden=False)
            for op, factor in (("backward", 3 * randn(61, *p0.shape[:-1])), ("and_grad", 0.7)):
                need = 1 if p1 is None else next(needs)
                yield Case(name, f"log_prob_{op}", (*args, factor, need), is_golden=False)

        def parameters(*size, names=names):
            p0, p1 = randn(62, *size), randn(63, *size) if len(names) == 2 else None
            p0 = torch.sigmoid(p0) if names == ["probs"] else p0
            return p0.to(dtype), None if p1 is None else p1.to(dtype)

        for shape in ((1, 1), (9, 7), (12, 784), (3, 1271), (2, 33_000), (3, 0), (0, 5)):
            p0, p1 = parameters(*shape)
            for name, weight in weights_of(shape):
                offset = randn(64, *shape[:-1]) if name != "a mask" else None
                x = rand(65, *shape)
                x = x if weight is None else torch.where(weight != 0, x, torch.nan)
                yield from calls(name, p0, x, p1, weight, offset)
        p0, p1 = parameters(3, 5, 50)
        x, weight = rand(66, 5, 50), rand(67, 5, 50) < 0.5
        yield from calls("samples", p0, x > 0.5, p1, weight, randn(68, 5))
        for name, view in views(weight).items():
            yield from calls(f"mask {name}", p0, x, p1, view, None)


def _losses(dtype) -> Iterator[Case]:
    def loss(name, recon, x, mu, logvar, beta, reduction, from_probs=False):
        kl = 20 * rand(43, *mu.shape[:-1])
        grad = randn(21, *(mu.shape[:-1] if reduction == 0 else ()))
        likelihood = "bernoulli_probs" if from_probs else "bernoulli_logits"
        for held_op, args in (("negative_elbo", (mu, logvar)), ("negative_elbo_with_kl", (kl, None))):
            for which, more in (("forward", ()), ("backward", (grad,)), ("and_grad", ())):
                held_args = (recon, x, *args, beta, 0.7, reduction, from_probs, None, *more)
                held = f"{held_op}_{which}", held_args if args[1] is not None else held_args[:3] + held_args[4:]
                needs = (7,) if more else ()
                args_of = (recon, x, *args, beta, 0.7, reduction, likelihood, None, *more, *needs)
                yield Case(name, f"negative_elbo_{which}", args_of, held)
            terms = recon, x, *args, beta, 0.7, reduction, likelihood, None
            yield Case(name, "negative_elbo_terms_forward", terms)
            yield Case(name, "negative_elbo_terms_and_grad", terms)

    for samples, batch, pixels in (
        ((), (1,), 7),
        ((), (100,), 784),
        ((), (0,), 4),
        ((), (2048,), 5),
        ((), (2049,), 8),
        ((), (5000,), 3),
        ((), (3, 5), 33),
        ((1,), (9,), 16),
        ((4,), (9,), 17),
        ((600,), (2,), 12),
        ((3, 2), (5,), 24),
    ):
        recon, x = 4 * randn(22, *samples, *batch, pixels), rand(23, *batch, pixels)
        mu, logvar = randn(24, *batch, 6).to(dtype), randn(25, *batch, 6).to(dtype)
        for beta in (None, torch.tensor(0.3)):
            for reduction in (0, 1, 2):
                name = f"{samples} samples, {'no beta' if beta is None else 'beta'}, reduction {reduction}"
                yield from loss(name, recon.to(dtype), x, mu, logvar, beta, reduction)
        probs = rand(44, *recon.shape).to(dtype)
        yield from loss("probs", probs, x, mu, logvar, None, 1, True)


def gradients_over(case: Case, ops=torch.ops.aevb) -> tuple[Tensor, ...]:
    """The gradients of a `*_backward` case of a reduced loss, by the op that writes recon's over that for a loss'
    gradient of 1, which the forward pass took."""
    *arguments, grad, _ = case.args
    _, recon_for_1 = ops.negative_elbo_and_grad.default(*arguments)
    return recon_for_1, *ops.negative_elbo_backward_.default(*arguments, grad, recon_for_1)


def reduced_losses() -> Iterator[Case]:
    """The backward passes of losses that are one number, also of an upstream gradient of 1."""
    for dtype in DTYPES:
        for case in _losses(dtype):
            if case.op.endswith("_backward") and case.args[-2].dim() == 0:
                yield case
                one, held = torch.tensor(1.0), case.held
                assert held is not None
                yield Case(f"{case.name}, 1", case.op, (*case.args[:-2], one, 7), (held[0], (*held[1][:-1], one)))
