"""log p(x|z) of any likelihood, and samples of p(x|z)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks.errors import check_dense
from ..checks.seeds import int64
from ..likelihoods import REGISTRY, Bernoulli, Gaussian, Likelihood, named
from ..likelihoods.base import Formula, Parameter, computed
from ..likelihoods.target import Target, real, target_of
from ..likelihoods.values import is_wanted, look_once
from .autograd import (
    Derived,
    DifferentiableOp,
    GradientInForward,
    fake_gradient,
    from_bits,
    kept_graph,
    on_reference,
)
from .random import noise_of

_ops = torch.ops.aevb
_BERNOULLI, _GAUSSIAN, _SIGMOID = Bernoulli(), Gaussian(), Gaussian(sigmoid_means=True)
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def _in_float32_on_cpu(t: Tensor) -> bool:
    """Whether to compute a gradient before its upstream gradient is known.

    The upstream gradient multiplies it later. In half precision the gradient would be rounded twice. On a GPU that pass
    over memory costs as much as it saves.
    """
    return t.dtype == torch.float32 and t.is_cpu


def likelihood_formula(p0, x, p1, weight, offset, likelihood, scalar, x_scale):
    """Returns the op `log_prob` in plain PyTorch."""
    return FORMULAS[likelihood](p0, Target(x, x_scale, weight, offset), scalar if p1 is None else p1)


# log p(x|z) from (p0, target, p1 or the likelihood's number), by the names of csrc/formulas/likelihood_list.h.
FORMULAS: dict[str, Formula] = {name: f for cls in REGISTRY.values() for name, f in cls.formulas().items()}


def _needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


log_prob_and_grad = _ops.log_prob_and_grad.default


def _log_prob_with_grad(p0, x, p1, *others):
    return log_prob_and_grad(p0, x, p1, *others, 1.0, 3 if _needs_gradient(p1) else 1)


def _times_rows(gradient: Tensor, grad: Tensor) -> Tensor:
    """Returns `gradient`, times the upstream gradient `grad` of each row."""
    grad = grad.unsqueeze(-1)
    return gradient * grad if kept_graph() else gradient.mul_(grad)


def _log_prob_grad(tensors, options, grad0, grad1, grad):
    return _times_rows(grad0, grad), _times_rows(grad1, grad) if _needs_gradient(tensors[2]) else None


def _all_in_float32(p0, x, p1, *_):
    return _in_float32_on_cpu(p0) and (p1 is None or p1.dtype == torch.float32)


def goes_ahead(p0: Tensor, x: Tensor, p1: Tensor | None) -> bool:
    """Whether a log p(x|z) sum gets its gradients in the forward pass."""
    if on_reference(p0) or _is_compiling():
        return False
    needed = (p0.requires_grad or _needs_gradient(p1)) and _grad_enabled()
    return needed and _all_in_float32(p0, x, p1)


# Likelihoods of x - p0, whose gradients by the two differ in their sign.
_OF_RESIDUALS = {"gaussian", "gaussian_fixed", "laplace", "mse"}


def _x_grad(tensors, options, grad0):
    _, x, *_ = tensors
    *_, x_scale = options
    return (grad0.float() * -(1.0 if x_scale is None else x_scale)).sum_to_size(x.shape).to(x.dtype)


def _offset_grad(tensors, options, grad0):
    return grad0.sum(-1, dtype=torch.float32).sum_to_size(tensors[4].shape)


log_prob_op = DifferentiableOp(
    "log_prob",
    5,
    (0, 2),
    likelihood_formula,
    lambda p0, *_: p0.new_empty(p0.shape[:-1], dtype=torch.float32),
    only_needed=True,
    in_forward=GradientInForward(_all_in_float32, _log_prob_with_grad, _log_prob_grad),
    derived={
        1: Derived(lambda options: options[0] in _OF_RESIDUALS, _x_grad),
        4: Derived(lambda options: True, _offset_grad),
    },
)


@torch.library.register_fake("aevb::log_prob_and_grad")
def _(p0, x, p1, weight, offset, likelihood, scalar, x_scale, grad_scale, needs):
    grads = [fake_gradient(t, p0, need) for t, need in zip((p0, p1), from_bits(needs, 2), strict=True)]
    return p0.new_empty(p0.shape[:-1], dtype=torch.float32), *grads


@torch.library.register_fake("aevb::log_prob_and_grad_")
def _(p0, x, weight, offset, likelihood, scalar, x_scale, grad_scale):
    return p0.new_empty(p0.shape[:-1], dtype=torch.float32)


def bernoulli_log_prob(
    logits: Tensor,
    x: Tensor,
    x_scale: float | None = None,
    *,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    validate_args: bool | None = None,
) -> Tensor:
    """Log-likelihood of a Bernoulli decoder from its logits, summed over D.

    ``log p(x|z) = sum_i (x_i l_i - log(1 + exp(l_i)))`` (Kingma & Welling 2013, appendix C.1), finite for any finite
    logit.

    Args:
        logits: (..., D), float32, bfloat16 or float16; the arithmetic is float32. It may have extra leading dimensions
            of samples: x is used again for each, never expanded.
        x: (..., D): targets in [0, 1], soft ones too; bool or floating, or uint8 with x_scale.
        x_scale: multiplies x: 1/255 for pixels in 0..255, 1 for uint8 in {0, 1}.
        weight: as for `log_prob`.
        offset: as for `log_prob`.
        validate_args: whether to check the values of x, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), logits' leading dimensions, float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: targets outside [0, 1], when validated.
    """
    if not (type(logits) is Tensor is type(x)):
        check_dense("bernoulli_log_prob", logits=logits, x=x)
    target = _target("bernoulli_log_prob", logits, x, x_scale, weight, offset)
    if validate_args is not False and is_wanted("bernoulli_log_prob", validate_args, x):
        look_once("bernoulli_log_prob", validate_args, _BERNOULLI, logits, target)
    return log_prob_op(logits, target.x, None, target.weight, target.offset, "bernoulli_logits", 0.0, x_scale)


def gaussian_log_prob(
    mean: Tensor,
    x: Tensor,
    logvar: Tensor | float = 0.0,
    x_scale: float | None = None,
    *,
    sigmoid: bool = False,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    validate_args: bool | None = None,
) -> Tensor:
    """Log-likelihood of a Gaussian decoder, summed over the last dimension.

    ``log p(x|z) = log N(x; m, exp(logvar)) = -1/2 sum_i ((x_i - m_i)^2 exp(-logvar_i) + logvar_i + log(2 pi))`` (Kingma
    & Welling 2013, appendix C.2). m is the mean, or its sigmoid, which keeps it within (0, 1) (section 5).

    Args:
        mean: (..., D), float32, bfloat16 or float16; the arithmetic is float32. It may have extra leading dimensions of
            samples: x is used again for each, never expanded. Any strides: mean and logvar may be the two halves of
            one (..., 2 D) output, which are read where they are.
        x: (..., D), floating, or bool, or uint8 with x_scale.
        logvar: the logarithm of the variance. A tensor of mean's shape is a variance learned for each element. A shared
            tensor broadcasts to that shape, as (D,) and () do. A number is a fixed variance. float32, bfloat16 or
            float16, whatever mean is. Below -176 the residual is divided by a standard deviation of e^-88.
        x_scale: multiplies x: 1/255 for pixels in 0..255, 1 for uint8 in {0, 1}.
        sigmoid: whether mean holds the logits of m.
        weight: as for `log_prob`.
        offset: as for `log_prob`.
        validate_args: whether to check the values of x, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), mean's leading dimensions, float32, in nats: the logarithm of a density, which may be above 0.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a number for logvar that is not finite; an x that is not finite, when validated.
    """
    if not (type(mean) is Tensor is type(x)):
        check_dense("gaussian_log_prob", mean=mean, x=x)
    target = _target("gaussian_log_prob", mean, x, x_scale, weight, offset)
    family = _SIGMOID if sigmoid else _GAUSSIAN
    if validate_args is not False and is_wanted("gaussian_log_prob", validate_args, x):
        look_once("gaussian_log_prob", validate_args, family, mean, target)
    return likelihood_log_prob(family, (mean, logvar), target)


def log_prob(
    likelihood: Likelihood | str,
    params: Tensor | tuple[Parameter, ...],
    x: Tensor,
    x_scale: float | None = None,
    *,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    validate_args: bool | None = None,
) -> Tensor:
    """Log-likelihood log p(x|z) of any likelihood, summed over the last dimension.

    With weights w it is ``sum_i w_i log p(x_i|z)``.

    Args:
        likelihood: an object of `aevb.likelihoods`, or the name of one, with its default options.
        params: the likelihood's parameters, each (..., D): a tensor, or a tuple in the order of `likelihood.params`.
            The first is float32, bfloat16 or float16, of any strides, and may have extra leading dimensions of samples.
            A second one has its shape, or is shared: (D,), (), or a number.
        x: (..., D): floating, bool, or uint8 with x_scale; used again for each sample, never expanded.
        x_scale: multiplies x: 1/255 for pixels in 0..255.
        weight: of x's shape, or broadcast to it. bool or uint8 is a mask: the elements where it is 0 take no part, by
            selection, so that a NaN there harms neither the value nor a gradient. Floats, 0 or more, weigh the
            elements; 0 selects as a mask does. An all-true mask gives the bits of none. It gets no gradient.
        offset: x's leading dimensions, or broadcast to them: added to the first parameter in float32, such as the
            logarithm of an exposure. It gets a gradient.
        validate_args: whether to check the values of x, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), the first parameter's leading dimensions, float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: an unknown likelihood, parameters of another one, a weight that requires a gradient, or x outside
            the likelihood's support, when validated.
    """
    family = named(likelihood) if isinstance(likelihood, str) else likelihood
    params = family.parameters(params)
    first = params[0]
    if not (type(first) is Tensor is type(x)):
        check_dense("log_prob", **{family.params[0]: first, "x": x})
    target = _target("log_prob", first, x, x_scale, weight, offset)
    if validate_args is not False and is_wanted(key := f"log_prob, {family.name}", validate_args, x):
        look_once(key, validate_args, family, first, target)  # type: ignore[arg-type]
    return likelihood_log_prob(family, params, target)


def _target(
    function: str, first: Any, x: Tensor, x_scale: float | None, weight: Tensor | None, offset: Tensor | None
) -> Target:
    x = real(x, first)
    if weight is None and offset is None:
        return Target(x, x_scale)
    return target_of(function, x, x_scale, weight, offset, x.shape[:-1])


def sample_likelihood(
    likelihood: Likelihood | str, params: Tensor | tuple[Parameter, ...], *, seed: Tensor | int
) -> Tensor:
    """Sample x of p(x|z), of the first parameter's shape.

    The sample is a function of the seed: element i is made of the i-th standard normal of `seed`. It goes through the
    inverse of the likelihood's distribution function, unless the likelihood has a shorter way.

    Args:
        likelihood: as for `log_prob`.
        params: as for `log_prob`.
        seed: an int, or an int64 tensor whose shape is a prefix of the parameters', one for each block.

    Returns:
        x, in the first parameter's shape and dtype, float32 where that is a half; without a gradient.

    Raises:
        ValueError: an unknown likelihood, or parameters of another one.
    """
    family = named(likelihood) if isinstance(likelihood, str) else likelihood
    with torch.no_grad():
        params = tuple(computed(p) if isinstance(p, Tensor) else p for p in family.parameters(params))
        first = params[0]
        assert isinstance(first, Tensor)
        noise = noise_of(int64(seed, "seed").to(first.device), tuple(first.shape)).to(first.dtype)
        return family.sample(params, noise)


def likelihood_log_prob(family: Likelihood, params: tuple[Parameter, ...], target: Target) -> Tensor:
    """Returns log p(x|z), summed over the last dimension; values are not checked."""
    p0, p1, *options = family.kernel_arguments(params)
    return log_prob_op(p0, target.x, p1, target.weight, target.offset, *options, target.x_scale)


Factor = float | Tensor  # of all rows, or (*batch,), one for each datapoint


def factored_sum(factor: Factor, rows: Tensor) -> Tensor:
    """Returns the sum of factor * rows, (*samples, *batch)."""
    return (factor * rows).sum() if isinstance(factor, Tensor) else factor * rows.sum()


def reconstruction_log_prob(family: Likelihood, recon: Tensor, target: Target, rows: tuple[int, ...]) -> Tensor:
    """Returns log p(x|z), (L, *batch), of a reconstruction; `rows` is (L, *batch).

    recon is (L, *batch, *datapoint) and x (*batch, *datapoint). The datapoint's shape may differ between recon and x,
    if the number of elements is the same.

    Raises:
        ValueError: shapes that do not fit.
    """
    x = target.x
    fits = tuple(x.shape[: len(rows) - 1]) == rows[1:] and tuple(recon.shape[: len(rows)]) == rows
    if not fits or recon[:1].numel() != x.numel():
        raise ValueError(
            f"recon has shape {tuple(recon.shape)}, x {tuple(x.shape)} and kl {rows}; expected recon (L, *batch, "
            "*datapoint), x (*batch, *datapoint) and kl (L, *batch). With a decoder that takes one batch dimension: "
            "decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])"
        )
    flat = target.flat(rows[1:])
    return likelihood_log_prob(family, (recon.reshape(*rows, flat.x.shape[-1]),), flat)
