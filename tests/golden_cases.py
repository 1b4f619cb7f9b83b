"""What tests/golden holds of the ops: calls of every op and every public function, in groups.

Of `calls` the bits are held. Where PyTorch has a part in a result, as in the gradient of what rows share, it adds two
numbers, for which there is one order. Of `library_calls` the numbers are held, to a tolerance: products, sums of more,
and exponentials there are PyTorch's, and differ from processor to processor.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from kernel_cases import DTYPES, cases, gradients_over, rand, randn, reduced_losses, seeds_of, views
from torch import Tensor

import aevb
from aevb import _C
from aevb.checks.choices import ESTIMATORS

# Rows around the widths of vectors, the 32 lanes, groups of 512, and chunks of 32768.
LENGTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 511, 512, 513, 784, 32_769)
SEED = 2**45 + 11
ops = torch.ops.aevb


class Call(NamedTuple):
    group: str
    """The op, the dtype, and which of the calls."""
    inputs: Sequence[Any]
    results: Sequence[Any]


# Ops that gave one gradient less, of nothing, when their bits were taken down.
SECOND_OF_NOTHING = ("bernoulli_log_prob_backward", "bernoulli_log_prob_and_grad", "negative_elbo_with_kl_backward")


def calls() -> Iterator[Call]:
    """All whose bits are held."""
    yield from kernels()
    yield from numbers_and_bits()
    yield from layers()
    for dtype in DTYPES:
        for length in LENGTHS:
            yield from latents(dtype, length)
            yield from likelihoods(dtype, length)
            yield from losses(dtype, length)


def kernels() -> Iterator[Call]:
    """The calls of kernel_cases.py; those of one op, dtype and kind in one group, whatever their shapes."""
    layouts = "|".join(views(torch.zeros(1, 1)))
    for case in cases():
        if not case.is_golden:
            continue
        kind = re.sub(r" ?\([^()]*\)|, through.*", "", case.name)
        kind = re.sub(layouts, "in other layouts", kind) or "ordinary"
        results = getattr(ops, case.op).default(*case.args)
        results = results if isinstance(results, tuple) else (results,)
        first = case.args[0]
        dtype = f" {name_of(first.dtype)}" if isinstance(first, Tensor) and first.is_floating_point() else ""
        op, args = case.held or (case.op, case.args)
        if op in SECOND_OF_NOTHING:
            results = results[:-1]
        yield Call(f"{op}{dtype}: {kind}", args, results)
    for case in reduced_losses():
        op, args = case.held or (case.op, case.args)
        results = gradients_over(case)
        results = results[:-1] if op in SECOND_OF_NOTHING else results
        yield Call(f"{op}_ {name_of(args[0].dtype)}: ordinary", args, results)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).requires_grad_()


@functools.cache
def upstream(number: int, shape: torch.Size) -> Tensor:
    """A gradient for a function's output of that number and shape, never 1."""
    return 3 * randn(100 + number, *shape)


def differentiated(group: str, outputs: Tensor | Sequence[Tensor], wanted: Sequence[Tensor], *others: Any) -> Call:
    """A function's results and the gradients of the inputs `wanted`; its other inputs are `others`."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads = [upstream(i, o.shape).to(o.dtype) for i, o in enumerate(outputs)]
    found = torch.autograd.grad(outputs, wanted, grads)
    return Call(group, (*wanted, *others, *grads), (*outputs, *found))


# ---- bits -----------------------------------------------------------------------------------------------------------


def numbers_and_bits() -> Iterator[Call]:
    """Random numbers, bits, and sums."""
    for n in (*LENGTHS, 100_003):
        x = randn(50, 1, n)
        yield Call("row_sum: ordinary", (x,), (_C.row_sum(x.numpy()),))
    for counter, key in (((0, 0, 0, 0), (0, 0)), ((2**32 - 1,) * 4, (2**32 - 1,) * 2), ((1, 2, 3, 4), (5, 6))):
        yield Call("philox: ordinary", (counter, key), (_C.philox(counter, key),))
    index = torch.arange(7) * 2**33 - 5
    for seed, at in ((3, 4), (-1, index), (index, 2**40), (index.unsqueeze(-1), index)):
        yield Call("aevb.mix_seed: numbers and tensors", (seed, at), (aevb.mix_seed(seed, at),))
    for n in LENGTHS:
        images = (256 * rand(51, 5, n)).to(torch.uint8)
        for at in (None, torch.tensor([4, 0, 4, 2])):
            for seed in (SEED, torch.tensor(-7)):
                bits = aevb.binarize(images, at, seed=seed), aevb.binarize(images // 64, at, seed=seed, max_value=3)
                yield Call("aevb.binarize: numbers and tensors", (images, at, seed), bits)


def layers() -> Iterator[Call]:
    """What a layer has beside its product."""
    for n in LENGTHS[:-1]:
        for rows in (1, 30) if n < 511 else (3, 520):
            yield from layer(rows, n)


def layer(rows: int, n: int) -> Iterator[Call]:
    u = rand(60, rows, n)
    pixels = torch.where(u < 0.3, 850 * u, 0.0).to(torch.uint8)
    weight, bias, grad = randn(61, 9, n), randn(62, 9), randn(63, rows, 9)
    for kind, x, x_scale in (("bits", pixels > 0, None), ("pixels", pixels, 1 / 255)):
        yield Call(f"density: {kind}", (x,), (ops.density(x),))
        for activation in range(3):
            for b in (None, bias):
                args = (x, x_scale, weight, b, activation)
                yield Call(f"sparse_linear float32: {kind}", args, (ops.sparse_linear(*args),))
        args = (x, x_scale, grad)
        yield Call(f"sparse_linear_weight_grad float32: {kind}", args, (ops.sparse_linear_weight_grad(*args),))
    bias, grad = randn(64, n), randn(65, rows, n)
    for activation in range(3):
        out = randn(66, rows, n)
        for b in (None, bias):
            result = out.clone()
            ops.bias_activation_(result, b, activation)
            yield Call("bias_activation_ float32: ordinary", (out, b, activation), (result,))
        args = (result, grad, activation)
        yield Call("activation_backward float32: ordinary", args, ops.activation_backward(*args))
        over = grad.clone()
        grad_bias = ops.activation_backward_(result, over, activation)
        yield Call("activation_backward_ float32: ordinary", args, (over, grad_bias))


def latents(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """The posterior's functions, under seeds of every shape that they take: a prefix of z's."""
    mu, logvar = leaf(randn(70, 2, D), dtype), leaf(2 * randn(71, 2, D), dtype)
    both = (mu, logvar)
    for num_samples in (None, 2):
        z = (2, D) if num_samples is None else (2, 2, D)
        names = ("one seed", "a seed a sample", "a seed a row") if num_samples else ("one seed", "a seed a row")
        for dims, name in enumerate(names):
            seed = SEED if dims == 0 and num_samples is None else seeds_of(z[:dims])
            kind = f"{name_of(dtype)}: {'samples, ' if num_samples else ''}{name}"
            found = aevb.sample_gaussian(mu, logvar, num_samples, seed=seed)
            yield differentiated(f"aevb.sample_gaussian {kind}", found, both, seed)
            for gradient in ("total", "path", *(("doubly_reparameterized",) if num_samples else ())):
                found = aevb.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=gradient, seed=seed)
                yield differentiated(f"aevb.sample_gaussian_log_ratio {kind}, {gradient}", found, both, seed)
    divisor = next((d for d in (2, 3, 7, 31) if D % d == 0), 1)
    for groups in (None, 1, divisor, D):
        kl = aevb.gaussian_kl(mu, logvar, groups)
        yield differentiated(f"aevb.gaussian_kl {name_of(dtype)}: {'groups' if groups else 'whole'}", kl, both, groups)


def targets(*shape: int) -> dict[str, tuple[Tensor, float | None]]:
    """By name: x and x_scale."""
    u = rand(72, *shape)
    return {"soft": (u, None), "bool": (u < 0.4, None), "uint8": ((256 * u).to(torch.uint8), 1 / 255)}


def likelihoods(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """log p(x|z) of one sample and of three."""
    name = name_of(dtype)
    for kind, (x, x_scale) in targets(2, D).items():
        for samples in ((), (3,)):
            logits = leaf(4 * randn(73, *samples, 2, D), dtype)
            log_prob = aevb.bernoulli_log_prob(logits, x, x_scale)
            yield differentiated(f"aevb.bernoulli_log_prob {name}: {kind}", log_prob, (logits,), x, x_scale)
            over = logits.detach().clone()
            log_prob = ops.log_prob_and_grad_(over, x, None, None, "bernoulli_logits", 0.0, x_scale, -0.7)
            yield Call(f"bernoulli_log_prob_and_grad_ {name}: {kind}", (logits, x, x_scale), (log_prob, over))
    for kind, samples in (("soft", ()), ("soft", (3,)), ("bool", ()), ("uint8", ())):
        mean = leaf(2 * randn(74, *samples, 2, D), dtype)
        yield from gaussian_likelihoods(name, kind, mean, *targets(2, D)[kind])


def gaussian_likelihoods(name: str, kind: str, mean: Tensor, x: Tensor, x_scale: float | None) -> Iterator[Call]:
    """Of a logvar an element, one that rows share, one number, and one that is learned, whose own gradient PyTorch
    adds up."""
    logvar = 3 * randn(75, *mean.shape)
    shared = leaf(logvar.flatten()[: mean.shape[-1]].clone(), torch.float32)
    logvars: dict[str, tuple[Tensor | float, bool]] = {
        "a logvar each": (leaf(logvar, mean.dtype), True),
        "a bfloat16 logvar each": (leaf(logvar, torch.bfloat16), True),
        "a logvar a pixel": (shared, mean.dim() == 2),  # of two rows
        "one logvar": (-0.7, False),
        "a learned logvar": (torch.tensor(0.3), False),
    }
    for which, (value, has_gradient) in logvars.items():
        for sigmoid in (False, True):
            log_prob = aevb.gaussian_log_prob(mean, x, value, x_scale, sigmoid=sigmoid)
            wanted = (mean, value) if has_gradient else (mean,)
            others = (x, x_scale, sigmoid) if has_gradient else (x, x_scale, sigmoid, value)
            yield differentiated(f"aevb.gaussian_log_prob {name}: {kind}, {which}", log_prob, wanted, *others)


def losses(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """FusedELBO, of two datapoints and up to three samples."""
    for group, loss, wanted, others in (*bernoulli_losses(dtype, D), *gaussian_losses(dtype, D)):
        yield differentiated(f"aevb.FusedELBO {name_of(dtype)}: {group}", loss, wanted, *others)


Loss = tuple[str, Tensor | Sequence[Tensor], Sequence[Tensor], Sequence[Any]]


def bernoulli_losses(dtype: torch.dtype, D: int) -> Iterator[Loss]:
    mu, logvar = leaf(randn(80, 2, 6), dtype), leaf(randn(81, 2, 6), dtype)
    x = rand(82, 2, D)

    def logits(*samples: int) -> Tensor:
        return leaf(4 * randn(83, *samples, 2, D), dtype)

    closed: dict[str, tuple[dict[str, Any], Tensor, Tensor]] = {
        "beta": ({"beta": 0.3}, logits(), x),
        "a beta tensor": ({"beta": torch.tensor(0.3)}, logits(3), x),
        "probabilities": ({"from_probs": True, "beta": 1.7}, leaf(rand(84, 2, D), dtype), x),
        "uint8": ({"x_scale": 1 / 255}, logits(), (256 * x).to(torch.uint8)),
        "free bits": ({"free_bits": 0.4, "groups": 2}, logits(), x),
        "capacity": ({"capacity": 1.5, "beta": 2.5}, logits(3), x),
        "a capacity tensor": ({"capacity": torch.tensor(8.5)}, logits(), x),
    }
    for reduction in ("none", "mean", "sum"):
        for name, (options, recon, target) in closed.items():
            criterion = aevb.FusedELBO(**options, reduction=reduction)
            loss = criterion(recon, target, mu, logvar)
            yield f"{name}, {reduction}", loss, (recon, mu, logvar), (target, *options.values())
        for estimator in ESTIMATORS:
            for num_samples in (None, 2):
                if not ESTIMATORS[estimator].importance_weighted:
                    recon = logits(*([] if num_samples is None else [num_samples]))
                    criterion = aevb.FusedELBO(0.3, reduction, estimator=estimator, num_samples=num_samples)
                    z, kl = criterion.sample(mu, logvar, seed=SEED)
                    yield f"{estimator}, {reduction}", (criterion(recon, x, kl=kl), z), (recon, mu, logvar), (x,)


def gaussian_losses(dtype: torch.dtype, D: int) -> Iterator[Loss]:
    mu, logvar = leaf(randn(80, 2, 6), dtype), leaf(randn(81, 2, 6), dtype)
    x, mean = rand(82, 2, D), leaf(2 * randn(85, 2, D), dtype)
    each, shared = leaf(2 * randn(86, 2, D), dtype), leaf(2 * randn(87, D), torch.float32)
    outputs: dict[str, tuple[dict[str, Any], Any, Sequence[Tensor]]] = {
        "fixed variance": ({"variance": 0.2}, mean, ()),
        "a logvar each": ({"sigmoid_means": True}, aevb.GaussianOutput(mean, each), (each,)),
        "a logvar a pixel": ({"sigmoid_means": True}, aevb.GaussianOutput(mean, shared), (shared,)),
        "one logvar": ({}, aevb.GaussianOutput(mean, -0.7), ()),
    }
    for reduction in ("none", "mean", "sum"):
        for name, (options, recon, learned) in outputs.items():
            criterion = aevb.FusedELBO(0.3, reduction, likelihood="gaussian", **options)
            yield f"gaussian, {name}, {reduction}", criterion(recon, x, mu, logvar), (mean, *learned, mu, logvar), (x,)
        for estimator in ("sgvb-a", "stl"):
            criterion = aevb.FusedELBO(0.3, reduction, likelihood="gaussian", estimator=estimator)
            z, kl = criterion.sample(mu, logvar, seed=SEED)
            loss = criterion(aevb.GaussianOutput(mean, each), x, kl=kl)
            yield f"gaussian, {estimator}, {reduction}", (loss, z), (mean, each, mu, logvar), (x,)


# ---- numbers --------------------------------------------------------------------------------------------------------


def library_calls() -> Iterator[Call]:
    """All whose numbers are held."""
    for dtype in DTYPES:
        yield from sums_of_many(dtype)
        for D in (7, 33):
            yield from linear_logits(dtype, D)
            yield from importance_weighted(dtype, D)
    yield from bounds()
    yield from whole_layers()


def sums_of_many(dtype: torch.dtype) -> Iterator[Call]:
    """Gradients that PyTorch adds up or has formulas for, and free bits of many groups."""
    name = name_of(dtype)
    recon, x = leaf(4 * randn(83, 4, 5, 17), dtype), rand(82, 5, 17).requires_grad_()
    mu, logvar = leaf(randn(80, 5, 6), dtype), leaf(randn(81, 5, 6), dtype)
    beta = torch.tensor(0.3, requires_grad=True)
    loss = aevb.FusedELBO(beta)(recon, x, mu, logvar)
    yield differentiated(f"aevb.FusedELBO {name}: gradients of all", loss, (recon, x, mu, logvar, beta))
    for options in ({"free_bits": 0.4}, {"capacity": 4.0}):
        loss = aevb.FusedELBO(**options, reduction="none")(recon, x.detach(), mu, logvar)
        yield differentiated(f"aevb.FusedELBO {name}: {next(iter(options))}", loss, (recon, mu, logvar))
    for estimator in ("sgvb-a", "stl"):
        criterion = aevb.FusedELBO(estimator=estimator, num_samples=4)
        z, kl = criterion.sample(mu, logvar, seed=SEED)
        loss = criterion(recon, x.detach(), kl=kl)
        yield differentiated(f"aevb.FusedELBO {name}: {estimator}, samples", (loss, z), (recon, mu, logvar))
    learned = torch.tensor(0.3, requires_grad=True)
    log_prob = aevb.gaussian_log_prob(recon, x, learned)
    yield differentiated(f"aevb.gaussian_log_prob {name}: gradients of all", log_prob, (recon, x, learned))


def linear_logits(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """The fused last layer."""
    name, x = f"{name_of(dtype)}, {D} pixels", rand(82, 2, D)
    mu, logvar = leaf(randn(80, 2, 6), dtype), leaf(randn(81, 2, 6), dtype)
    layer = leaf(randn(88, 3, 2, 5), dtype), leaf(randn(89, D, 5), dtype), leaf(randn(90, D), dtype)
    for reduction in ("none", "mean", "sum"):
        log_prob = aevb.linear_bernoulli_log_prob(*layer, x, reduction=reduction)
        yield differentiated(f"aevb.linear_bernoulli_log_prob {name}: {reduction}", log_prob, layer)
        loss = aevb.FusedELBO(0.3, reduction)(aevb.LinearLogits(*layer), x, mu, logvar)
        yield differentiated(f"aevb.FusedELBO {name}: LinearLogits, {reduction}", loss, (*layer, mu, logvar))


def importance_weighted(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """The importance-weighted estimators, from logits, Gaussians and LinearLogits."""
    x, mu, logvar = rand(82, 2, D), leaf(randn(80, 2, 6), dtype), leaf(randn(81, 2, 6), dtype)
    layer = leaf(0.3 * randn(88, 3, 2, 5), dtype), leaf(randn(89, D, 5), dtype), leaf(randn(90, D), dtype)
    mean, each = leaf(randn(91, 3, 2, D), dtype), leaf(randn(92, 3, 2, D), dtype)
    recons: dict[str, tuple[Any, Sequence[Tensor], str]] = {
        "logits": (mean, (mean,), "bernoulli"),
        "LinearLogits": (aevb.LinearLogits(*layer), layer, "bernoulli"),
        "gaussian": (aevb.GaussianOutput(mean, each), (mean, each), "gaussian"),
    }
    for estimator in ("iwae", "dreg"):
        for reduction in ("none", "mean"):
            for kind, (recon, wanted, likelihood) in recons.items():
                criterion = aevb.FusedELBO(0.7, reduction, likelihood=likelihood, estimator=estimator, num_samples=3)
                z, kl = criterion.sample(mu, logvar, seed=SEED)
                group = f"aevb.FusedELBO {name_of(dtype)}, {D} pixels: {estimator} of {kind}, {reduction}"
                yield differentiated(group, (criterion(recon, x, kl=kl), z), (*wanted, mu, logvar))


def bounds() -> Iterator[Call]:
    log_prob, kl = randn(93, 5, 4).requires_grad_(), randn(94, 5, 4).requires_grad_()
    for f in (aevb.elbo, aevb.importance_weighted_bound):
        yield differentiated(f"aevb.{f.__name__} float32: samples", f(log_prob, kl, 0.7), (log_prob, kl))


def whole_layers() -> Iterator[Call]:
    weight, bias = randn(95, 4, 17).requires_grad_(), randn(96, 4).requires_grad_()
    u = rand(97, 9, 17)
    for kind, x, x_scale in (
        ("bits", u < 0.2, None),
        ("pixels", (400 * (u - 0.5)).clamp_min(0).to(torch.uint8), 1 / 255),
    ):
        for activation in ("none", "tanh", "relu"):
            out = aevb.linear(x, weight, bias, activation, x_scale)
            yield differentiated(f"aevb.linear float32: {kind}, {activation}", out, (weight, bias))
    x = randn(98, 9, 17).requires_grad_()
    for activation in ("none", "tanh", "relu"):
        out = aevb.linear(x, weight, bias, activation)
        yield differentiated(f"aevb.linear float32: numbers, {activation}", out, (x, weight, bias))
