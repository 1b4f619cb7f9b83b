"""log p(x|z) of a linear decoder layer, without its full logits.

The logits of L samples of B datapoints are L * B * D numbers, and their gradient is as large. Most VAE code runs out of
memory on the two. Here they exist only one chunk of rows at a time: see `aevb.ops.chunking`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..bounds import importance_weighted_bound
from ..checks.choices import REDUCTIONS, unknown
from ..checks.errors import check_dense, is_dense
from ..likelihoods import Bernoulli, Likelihood, LinearLogits, LinearOutput, named
from ..likelihoods.base import above_floor, finite
from ..likelihoods.target import Target, real, target_of
from ..likelihoods.values import is_wanted, look_once
from .autograd import DifferentiableOp, KernelFunction, from_bits, on_reference, times
from .chunking import (
    Gradients,
    Kernel,
    chunks_of,
    for_rows,
    rows_in_cache,
    rows_of_chunk,
    sizes_of,
    sum_of_bounds,
    sum_of_log_prob,
    take,
)
from .likelihood import FORMULAS, Factor, factored_sum
from .matmul import product

Linear = LinearLogits | LinearOutput

# ---- log_prob, and its gradients for any upstream gradient ----------------------------------------------------------


class _Read(NamedTuple):
    """The op's arguments after x, as chunks are computed with them."""

    kernel: Kernel
    target: Target


def _read(x, shared, x_weight, offset, likelihood, scalar, x_scale, floor) -> _Read:
    return _Read(Kernel(likelihood, scalar, shared, floor), Target(x, x_scale, x_weight, offset))


def _forward(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, *others: Any) -> Tensor:
    kernel, target = _read(x, *others)
    L, B = sizes_of(h, x)
    rows, target = h.reshape(L * B, h.shape[-1]), target.rows()
    log_prob = torch.empty(L * B, dtype=torch.float32, device=h.device)
    decoder = for_rows(weight, L * B, weight)
    for chunk in chunks_of(L, B, 2 * rows_of_chunk(weight)):  # twice the rows: no gradient takes up cache
        out = product(chunk.rows(rows, B), decoder, bias).view(*chunk.shape, weight.shape[0])
        chunk.rows(log_prob, B).copy_(kernel.log_prob(out, target.part(chunk.begin, chunk.end)).view(-1))
    return log_prob.view(h.shape[:-1])


def _backward(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, shared: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, grad, needs = others
    kernel, target = _read(x, shared, *arguments)
    L, B = sizes_of(h, x)
    rows, target, grads = h.reshape(L * B, h.shape[-1]), target.rows(), grad.reshape(L * B)
    needed = from_bits(needs, 4)
    gradients = Gradients(rows, weight, bias, needed[:3])
    decoder = for_rows(weight, L * B, weight)
    for chunk in chunks_of(L, B, rows_of_chunk(weight)):
        h_chunk = chunk.rows(rows, B)
        out = product(h_chunk, decoder, bias).view(*chunk.shape, weight.shape[0])
        upstream = chunk.rows(grads, B).view(chunk.shape)
        grad_out, grad_shared = kernel.gradient(out, target.part(chunk.begin, chunk.end), upstream)
        gradients.add(
            h_chunk,
            grad_out.view(len(h_chunk), weight.shape[0]),
            None if gradients.h is None else chunk.rows(gradients.h, B),
            grad_shared=_rows_of(grad_shared, needed[3]),
        )
    nothing = h.new_empty(0)
    grad_h, grad_weight, grad_bias = gradients.result()
    grad_shared = _like(gradients.shared, shared, needed[3])
    return (
        nothing if grad_h is None else grad_h.view(h.shape),
        nothing if grad_weight is None else grad_weight,
        nothing if grad_bias is None else grad_bias,
        nothing if grad_shared is None else grad_shared,
    )


def _rows_of(grad_shared: Tensor | None, needed: bool) -> Tensor | None:
    return grad_shared.flatten(0, -2) if grad_shared is not None and needed else None


def _like(grad: Tensor | None, shared: Tensor | None, needed: bool) -> Tensor | None:
    """Returns the sum over chunks in shared's dtype; zeros without rows.

    None if there is no shared parameter, or its gradient is not needed.
    """
    if shared is None or not needed:
        return None
    return torch.zeros_like(shared) if grad is None else grad.to(shared.dtype)


_library = torch.library.Library("aevb", "FRAGMENT")  # kept: the ops live as long as it does
_ARGUMENTS = (
    "Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor? shared, Tensor? x_weight, Tensor? offset, str likelihood, "
    "float scalar, float? x_scale, float? floor"
)
_library.define(f"linear_log_prob({_ARGUMENTS}) -> Tensor")
_library.define(f"linear_log_prob_forward({_ARGUMENTS}) -> Tensor")
_library.define(
    f"linear_log_prob_backward({_ARGUMENTS}, Tensor grad, int needs) -> (Tensor grad_h, Tensor grad_weight, "
    "Tensor grad_bias, Tensor grad_shared)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("linear_log_prob", _forward, _device)
    _library.impl("linear_log_prob_forward", _forward, _device)
    _library.impl("linear_log_prob_backward", _backward, _device)


def _formula(h: Any, weight: Any, bias: Any, x: Any, *others: Any) -> Tensor:
    """Returns the op's result in plain PyTorch."""
    (likelihood, scalar, shared, floor), target = _read(x, *others)
    out, D = F.linear(h, weight, bias), x.shape[-1]
    if shared is not None or out.shape[-1] == D:
        return FORMULAS[likelihood](out, target, scalar if shared is None else shared)
    first, second = out[..., :D], out[..., D:]
    second = second if floor is None else above_floor(floor, second)
    return FORMULAS[likelihood](first, target, second)


_linear_log_prob = DifferentiableOp(
    "linear_log_prob",
    7,
    (0, 1, 2, 4),
    _formula,
    lambda h, *_: h.new_empty(h.shape[:-1], dtype=torch.float32),
    only_needed=True,
)


class _OneChunk(KernelFunction):
    """log p(x|z) of rows that fit one chunk.

    The forward pass computes the gradient of the layer's output too, if one is needed.
    """

    public, num_tensors, rare = "linear_log_prob", 7, (3, 5, 6)

    @staticmethod
    def forward(ctx, h, weight, bias, x, shared, x_weight, offset, *options):
        kernel, target = _read(x, shared, x_weight, offset, *options)
        L, B = sizes_of(h, x)
        out = product(h.reshape(L * B, h.shape[-1]), weight, bias).view(*h.shape[:-1], weight.shape[0])
        grad_shared = None
        if any(ctx.needs_input_grad[:5]):
            log_prob, out, grad_shared = kernel.both(out, target, 1.0)
        else:
            log_prob = kernel.log_prob(out, target)
        ctx.save_for_backward(h, weight, bias, x, shared, x_weight, offset, out, grad_shared)
        ctx.options = options
        return log_prob

    @staticmethod
    def formula(ctx):
        return _formula, ctx.options

    @staticmethod
    def kernel_gradients(ctx, tensors, taken, needs, grad):
        (h, weight, bias, _, shared, *_), (grad_out, grad_shared) = tensors, taken
        rows = h.reshape(-1, h.shape[-1])
        gradients = Gradients(rows, weight, bias, needs[:3])
        row_weight, grad_shared = grad.reshape(-1), _rows_of(grad_shared, needs[4])
        gradients.add(rows, grad_out.view(len(rows), weight.shape[0]), gradients.h, row_weight, grad_shared)
        grad_h, grad_weight, grad_bias = gradients.result()
        grad_h = None if grad_h is None else grad_h.view(h.shape)
        return grad_h, grad_weight, grad_bias, None, _like(gradients.shared, shared, needs[4]), None, None


# ---- sums whose upstream gradient is known in the forward pass ------------------------------------------------------


class _Known(KernelFunction):
    """Value of a `Sum`, with its gradients computed in the forward pass.

    They are for an upstream gradient of 1. The backward pass multiplies them by the upstream gradient. `formula_of` is
    the same function in plain PyTorch. The second result is the sum of log p(x|z) in the first, without a gradient.
    """

    public, num_tensors, rare = "linear_log_prob", 8, (3, 5, 6)

    @staticmethod
    def forward(ctx, h, weight, bias, x, shared, x_weight, offset, log_ratio, options, what, formula_of):
        needs = ctx.needs_input_grad
        kernel, target = _read(x, shared, x_weight, offset, *options)
        value, log_prob, *found, grad_shared, grad_log_ratio = take(
            what, h, weight, bias, target, kernel, (*needs[:3], needs[4], needs[7])
        )
        found.append(_like(grad_shared, shared, needs[4]))
        found.append(None if grad_log_ratio is None else grad_log_ratio.view(log_ratio.shape))
        ctx.save_for_backward(h, weight, bias, x, shared, x_weight, offset, log_ratio, *found)
        ctx.formula_of, ctx.options = formula_of, options
        value, log_prob = value.float(), log_prob.float()
        ctx.mark_non_differentiable(log_prob)
        return value, log_prob

    @staticmethod
    def formula(ctx):
        return ctx.formula_of, ctx.options

    @staticmethod
    def kernel_gradients(ctx, tensors, taken, needs, grad):
        grad_h, grad_weight, grad_bias, grad_shared, grad_log_ratio = times(taken, grad)
        return grad_h, grad_weight, grad_bias, None, grad_shared, None, None, grad_log_ratio


# ---- public functions -----------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Arguments of the op `linear_log_prob`."""

    h: Tensor
    weight: Tensor
    bias: Tensor
    x: Tensor
    shared: Tensor | None
    x_weight: Tensor | None
    offset: Tensor | None
    options: tuple[str, float, float | None, float | None]  # likelihood, scalar, x_scale, floor


def _checked(family: Likelihood, output: Linear, target: Target) -> _Call:
    """Returns the checked arguments of the op.

    h, weight and bias have one dtype: under autocast, autocast's. A bias of None becomes zeros.
    """
    h, weight, bias = output[:3]
    x, x_scale, x_weight, offset = target
    shared, floor = (output.shared, output.floor) if isinstance(output, LinearOutput) else (None, None)
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    D = x.shape[-1] if x.dim() else 0
    P = len(family.params) if isinstance(output, LinearOutput) and weight.dim() == 2 and D else 1
    P = 1 if D and weight.dim() == 2 and weight.shape[0] == D else P
    width = "D" if P == 1 else f"{P} D"
    if h.dim() < 1 or weight.dim() != 2 or h.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; expected "
            f"(..., H), ({width}, H) and ({width},)"
        )
    batch = x.dim() - 1
    if x.dim() < 1 or weight.shape[0] != P * D or h.shape[:-1][h.dim() - 1 - batch :] != x.shape[:-1]:
        raise ValueError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)} and x {tuple(x.shape)}; expected x (*batch, "
            f"D) and h (*samples, *batch, H) for a weight ({width}, H)"
        )
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight, bias = (t.to(dtype) for t in (h, weight, bias))
    if not h.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"h is {h.dtype}, weight {weight.dtype} and bias {bias.dtype}; expected one dtype")
    if not h.device == weight.device == bias.device == x.device:
        raise ValueError(
            f"h is on {h.device}, weight on {weight.device}, bias on {bias.device} and x on {x.device}; expected one "
            "device"
        )
    kernel, scalar, shared = family.linear_kernel(P, shared)
    if shared is not None:
        if not isinstance(shared, Tensor):
            shared = torch.full((), finite(family.params[1], shared), dtype=torch.float32, device=h.device)
        if shared.shape not in ((), (1,), (D,)):
            raise ValueError(
                f"shared has shape {tuple(shared.shape)}; expected ({D},), an element for each of x's, or ()"
            )
        shared = shared.float().expand(D).contiguous()  # float32 for its gradient, a sum over rows
    return _Call(h, weight, bias, x, shared, x_weight, offset, (kernel, scalar, x_scale, floor))


def linear_log_prob(
    likelihood: Likelihood | str,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    x_scale: float | None = None,
    *,
    shared: Tensor | float | None = None,
    floor: float | None = None,
    x_weight: Tensor | None = None,
    offset: Tensor | None = None,
    reduction: str = "none",
    validate_args: bool | None = None,
) -> Tensor:
    """Log-likelihood of a linear decoder layer, without its full output.

    ``log p(x|z) = log_prob(likelihood, h @ weight.T + bias, x)``, where the layer's output holds the likelihood's
    parameters side by side. The rows of h are processed in chunks whose outputs stay in the cache. Memory that grows
    with the number of rows is h, its gradient, and one number a row.

    Args:
        likelihood: an object of `aevb.likelihoods`, or a name.
        h: (..., H), the decoder's last hidden layer: (B, H), or (L, B, H) for L samples.
        weight: (P * D, H) for P parameters, of h's dtype: float32, bfloat16 or float16. Under autocast h, weight and
            bias become autocast's dtype.
        bias: (P * D,), of h's dtype, or None.
        x: (..., D), h's last leading dimensions, used again for each sample and never expanded; bool or floating, or
            uint8 with x_scale.
        x_scale: multiplies x: 1/255 for pixels in 0..255.
        shared: a second parameter that does not come from h, such as a variance for each element: (D,), () or a number.
            Its gradient is summed over rows in an order that depends on their number alone.
        floor: replaces the second output o of two by ``floor + softplus(o - floor)``.
        x_weight: of x's shape or broadcast to it, as the `weight` of `log_prob`: a mask, or weights of x's elements.
        offset: x's leading dimensions or broadcast to them, as for `log_prob`: added to the first parameter.
        reduction: "none" for one value a row; "mean" or "sum" over rows. The forward pass computes the gradients of a
            mean or sum, if any is needed. Exceptions are a compiled graph, and float16, whose gradients need a loss
            scale first.
        validate_args: whether to check the values of x, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        h's leading dimensions, or a number; float32, in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown likelihood or reduction; or x outside the
            support, when validated.
        RuntimeError: dtypes that no kernel takes.
    """
    family = named(likelihood) if isinstance(likelihood, str) else likelihood
    output = LinearOutput(h, weight, bias, shared, floor)
    return _log_prob_of(
        "linear_log_prob", family, output, Target(x, x_scale, x_weight, offset), reduction, validate_args
    )


def linear_bernoulli_log_prob(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    x_scale: float | None = None,
    *,
    x_weight: Tensor | None = None,
    offset: Tensor | None = None,
    reduction: str = "none",
    validate_args: bool | None = None,
) -> Tensor:
    """Log-likelihood of a linear Bernoulli decoder layer, without its full logits.

    ``log p(x|z) = bernoulli_log_prob(h @ weight.T + bias, x)``: ``sum_i (x_i l_i - log(1 + exp(l_i)))`` (Kingma &
    Welling 2013, appendix C.1). The rows of h are processed in chunks whose logits stay in the cache. Memory that grows
    with the number of rows is h, its gradient, and one number a row.

    Args:
        h: (..., H), the decoder's last hidden layer: (B, H), or (L, B, H) for L samples.
        weight: (D, H), of h's dtype: float32, bfloat16 or float16. Under autocast h, weight and bias become autocast's
            dtype.
        bias: (D,), of h's dtype, or None.
        x: (..., D), h's last leading dimensions: targets in [0, 1], used again for each sample and never expanded; bool
            or floating, or uint8 with x_scale.
        x_scale: multiplies x: 1/255 for pixels in 0..255.
        x_weight: as for `linear_log_prob`.
        offset: as for `linear_log_prob`.
        reduction: "none" for one value a row, with any upstream gradient; the backward pass computes the logits again
            where there is more than one chunk. "mean" or "sum" over rows: the forward pass computes all gradients, if
            any is needed, and the backward pass only multiplies them. Exceptions are a compiled graph, and float16,
            whose gradients need a loss scale first.
        validate_args: whether to check the values of x, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        h's leading dimensions, or a number; float32, in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown reduction; or targets outside [0, 1], when
            validated.
        RuntimeError: dtypes that no kernel takes.
    """
    output = LinearLogits(h, weight, bias)
    target = Target(x, x_scale, x_weight, offset)
    return _log_prob_of("linear_bernoulli_log_prob", Bernoulli(), output, target, reduction, validate_args)


def _log_prob_of(
    function: str, family: Likelihood, output: Linear, given: Target, reduction: str, validate_args: bool | None
) -> Tensor:
    h, weight, x = output.h, output.weight, given.x
    if not (is_dense(h) and is_dense(x)):
        check_dense(function, h=h, weight=weight, x=x)
    target = target_of(function, real(x, h), given.x_scale, given.weight, given.offset, x.shape[:-1])
    if validate_args is not False and is_wanted(function, validate_args, x):
        look_once(function, validate_args, family, None, target)
    rows = h.shape[:-1].numel()
    if reduction == "none":
        return rows_log_prob(family, output, target)
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    return sum_log_prob(family, output, target, 1.0 if reduction == "sum" else 1.0 / rows if rows else math.nan)


def rows_log_prob(family: Likelihood, output: Linear, target: Target) -> Tensor:
    """Returns log p(x|z) of each row, without a check of values.

    The shape is h's leading dimensions.
    """
    call = _checked(family, output, target)
    h, weight = call.h, call.weight
    *tensors, options = call
    rows = h.shape[:-1].numel()
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled() or on_reference(h)
    apply = _linear_log_prob if plain or not 0 < rows <= rows_in_cache(weight) else _OneChunk.apply
    return apply(*tensors, *options)


def _may_know(h: Tensor) -> bool:
    """Whether gradients may be computed in the forward pass.

    In float16 they would underflow before the loss scale multiplies them.
    """
    return not torch.compiler.is_compiling() and h.dtype != torch.float16


def sum_log_prob(family: Likelihood, output: Linear, target: Target, factor: Factor) -> Tensor:
    """Returns the sum of factor * log p(x|z) over all rows, a scalar.

    Value and gradients are computed in one pass, except in a compiled graph and in float16. A factor of each datapoint,
    (*batch,), gets no gradient.
    """
    call = _checked(family, output, target)
    h, weight = call.h, call.weight
    *tensors, options = call

    def formula(*inputs_and_options):
        inputs, _, options = inputs_and_options[:7], inputs_and_options[7], inputs_and_options[8:]
        return factored_sum(factor, _formula(*inputs, *options))

    if on_reference(h):
        return formula(*tensors, None, *options)
    if not _may_know(h):
        return factored_sum(factor, _linear_log_prob(*tensors, *options))
    return _Known.apply(*tensors, None, options, sum_of_log_prob(h, weight, target.x, factor), formula)[0]


def sum_importance_weighted_bound(
    family: Likelihood,
    output: Linear,
    target: Target,
    log_ratio: Tensor,
    beta: Tensor | float,
    factor: Factor,
) -> tuple[Tensor, Tensor]:
    """Returns the sum of factor * `importance_weighted_bound` over datapoints.

    Beside it, without a gradient: the sum of factor * the mean over samples of log p(x|z). Both are scalars. Value and
    gradients are computed in one pass where `sum_of_bounds` can. Exceptions are a compiled graph, float16, and a beta
    that needs a gradient.

    Args:
        family: the likelihood.
        output: the decoder's last layer, with h (L, *batch, H).
        target: of x (*batch, D).
        log_ratio: (L, *batch), log q(z|x) - log p(z).
        beta: weight of log_ratio.
        factor: multiplies the sum, or (*batch,) each datapoint's bound; it gets no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    call = _checked(family, output, target)
    h, weight = call.h, call.weight
    *tensors, options = call
    if h.shape[:-1] != log_ratio.shape:
        raise ValueError(
            f"h has shape {tuple(h.shape)} and log_ratio {tuple(log_ratio.shape)}; expected (L, *batch, H) and (L, "
            "*batch)"
        )

    def both(log_prob, bound_of):
        bound = bound_of(log_prob, log_ratio, beta)
        return factored_sum(factor, bound), factored_sum(factor, log_prob.detach().mean(0))

    def formula(*inputs_and_options):
        inputs, log_ratio, options = inputs_and_options[:7], inputs_and_options[7], inputs_and_options[8:]
        log_prob = _formula(*inputs, *options)
        return factored_sum(factor, reference.importance_weighted_bound(log_prob, log_ratio, beta))

    if on_reference(h):
        return both(_formula(*tensors, *options), reference.importance_weighted_bound)
    learned_beta = isinstance(beta, Tensor) and beta.requires_grad
    known = _may_know(h) and not learned_beta
    what = sum_of_bounds(h, weight, target.x, log_ratio, beta, factor) if known else None
    if what is None:
        return both(_linear_log_prob(*tensors, *options), importance_weighted_bound)
    return _Known.apply(*tensors, log_ratio, options, what, formula)
