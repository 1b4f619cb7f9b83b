"""log p(x|z) of a decoder whose last layer is linear, without its logits.

The logits of L samples of B datapoints are L * B * D numbers, and their gradient as many: what most VAE code runs out
of memory on. Here they exist a chunk of rows at a time: a matrix product makes the chunk's logits, the likelihood and
its derivative are taken while they are in the cache, and two more products give their share of the gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops, reference
from .bounds import importance_weighted_bound
from .choices import REDUCTIONS, unknown
from .chunks import (
    LIKELIHOOD,
    Gradients,
    both_kernel,
    chunks_of,
    for_rows,
    gradient_kernel,
    log_prob_kernel,
    rows_in_cache,
    rows_of_chunk,
    sizes_of,
    sum_of_bounds,
    sum_of_log_prob,
    take,
)
from .explain import check_dense, is_dense
from .likelihoods import LinearLogits
from .products import product
from .ranges import check_bernoulli, is_wanted, look_once

# ---- log_prob, and its gradients for any upstream gradient ----------------------------------------------------------


def _forward(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, x_scale: float | None) -> Tensor:
    L, B = sizes_of(h, x)
    rows, x_rows = h.reshape(L * B, h.shape[-1]), x.reshape(B, x.shape[-1])
    log_prob = torch.empty(L * B, dtype=torch.float32, device=h.device)
    decoder = for_rows(weight, L * B, weight)
    for chunk in chunks_of(L, B, 2 * rows_of_chunk(weight)):  # no gradient is beside the logits
        logits = product(chunk.rows(rows, B), decoder, bias)
        chunk.rows(log_prob, B).copy_(
            log_prob_kernel(
                logits.view(*chunk.shape, weight.shape[0]),
                x_rows[chunk.begin : chunk.end],
                None,
                LIKELIHOOD,
                0.0,
                x_scale,
            ).view(-1)
        )
    return log_prob.view(h.shape[:-1])


def _backward(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, x_scale: float | None, grad: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    L, B = sizes_of(h, x)
    rows, x_rows, grads = h.reshape(L * B, h.shape[-1]), x.reshape(B, x.shape[-1]), grad.reshape(L * B)
    gradients = Gradients(rows, weight, bias, ops.from_bits(needs, 3))
    decoder = for_rows(weight, L * B, weight)
    for chunk in chunks_of(L, B, rows_of_chunk(weight)):
        h_chunk = chunk.rows(rows, B)
        logits = product(h_chunk, decoder, bias).view(*chunk.shape, weight.shape[0])
        upstream = chunk.rows(grads, B).view(chunk.shape)
        grad_logits, _ = gradient_kernel(
            logits, x_rows[chunk.begin : chunk.end], None, LIKELIHOOD, 0.0, x_scale, upstream, 1
        )
        gradients.add(
            h_chunk,
            grad_logits.view(len(h_chunk), weight.shape[0]),
            None if gradients.h is None else chunk.rows(gradients.h, B),
        )
    nothing = h.new_empty(0)
    grad_h, grad_weight, grad_bias = gradients.result()
    return (
        nothing if grad_h is None else grad_h.view(h.shape),
        nothing if grad_weight is None else grad_weight,
        nothing if grad_bias is None else grad_bias,
    )


_library = torch.library.Library("aevb", "FRAGMENT")  # keep: the ops live as long as it does
_SCHEMA = "(Tensor h, Tensor weight, Tensor bias, Tensor x, float? x_scale) -> Tensor"
_library.define(f"linear_bernoulli_log_prob{_SCHEMA}")
_library.define(f"linear_bernoulli_log_prob_forward{_SCHEMA}")
_library.define(
    "linear_bernoulli_log_prob_backward(Tensor h, Tensor weight, Tensor bias, Tensor x, float? x_scale, Tensor grad,"
    " int needs) -> (Tensor grad_h, Tensor grad_weight, Tensor grad_bias)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("linear_bernoulli_log_prob", _forward, _device)
    _library.impl("linear_bernoulli_log_prob_forward", _forward, _device)
    _library.impl("linear_bernoulli_log_prob_backward", _backward, _device)

_linear_bernoulli_log_prob = ops.differentiable(
    "linear_bernoulli_log_prob",
    4,
    (0, 1, 2),
    reference.linear_bernoulli_log_prob,
    lambda h, weight, bias, x, x_scale: h.new_empty(h.shape[:-1], dtype=torch.float32),
    only_needed=True,
)


class _OneChunk(torch.autograd.Function):
    """log_prob of rows so few that they are one chunk, whose logits turn into their gradient in the forward pass."""

    @staticmethod
    def forward(ctx, h, weight, bias, x, x_scale):
        L, B = sizes_of(h, x)
        logits = product(h.reshape(L * B, h.shape[-1]), weight, bias).view(*h.shape[:-1], weight.shape[0])
        if any(ctx.needs_input_grad[:3]):
            log_prob = both_kernel(logits, x, LIKELIHOOD, 0.0, x_scale, 1.0)
        else:
            log_prob = log_prob_kernel(logits, x, None, LIKELIHOOD, 0.0, x_scale)
        ctx.save_for_backward(h, weight, bias, x, logits)
        ctx.x_scale = x_scale
        return log_prob

    @staticmethod
    def backward(ctx, grad):
        *tensors, grad_logits = ctx.saved_tensors
        h, weight, bias, _ = tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or needs[3] or ops.is_batched(grad):
            formula = reference.linear_bernoulli_log_prob
            return *ops.reference_gradients(formula, tensors, (ctx.x_scale,), needs, (grad,)), None
        rows = h.reshape(-1, h.shape[-1])
        gradients = Gradients(rows, weight, bias, needs[:3])
        gradients.add(rows, grad_logits.view(len(rows), weight.shape[0]), gradients.h, grad.reshape(-1))
        grad_h, grad_weight, grad_bias = gradients.result()
        return None if grad_h is None else grad_h.view(h.shape), grad_weight, grad_bias, None, None


# ---- sums whose upstream gradient is known in the forward pass ------------------------------------------------------


class _Known(torch.autograd.Function):
    """A `Sum`, whose gradients but for a factor are taken in the forward pass; `formula` is the same function in plain
    PyTorch."""

    @staticmethod
    def forward(ctx, h, weight, bias, x, log_ratio, x_scale, what, formula):
        needs = ctx.needs_input_grad
        value, *found, grad_log_ratio = take(what, h, weight, bias, x, x_scale, (*needs[:3], needs[4]))
        found.append(None if grad_log_ratio is None else grad_log_ratio.view(log_ratio.shape))
        ctx.save_for_backward(h, weight, bias, x, log_ratio, *found)
        ctx.formula, ctx.x_scale = formula, x_scale
        return value.float()

    @staticmethod
    def backward(ctx, grad):
        h, weight, bias, x, log_ratio, *found = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() or needs[3] or ops.is_batched(grad):
            tensors = (h, weight, bias, x, log_ratio)
            return *ops.reference_gradients(ctx.formula, tensors, (ctx.x_scale,), needs, (grad,)), *(None,) * 3
        # Of a graph that is not kept nobody else will ask for these again: no second copy is needed.
        keep = ops.kept_graph()
        if keep or not (grad.is_cpu and float(grad) == 1):
            found = [f if f is None else f * grad.to(f.dtype) if keep else f.mul_(grad.to(f.dtype)) for f in found]
        grad_h, grad_weight, grad_bias, grad_log_ratio = found
        return grad_h, grad_weight, grad_bias, None, grad_log_ratio, *(None,) * 3


# ---- what is called -------------------------------------------------------------------------------------------------


def _checked(logits: LinearLogits, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, weight and bias (zeros where there is none), of one dtype, autocast's where it is on."""
    h, weight, bias = logits
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    if h.dim() < 1 or weight.dim() != 2 or h.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; expected "
            "(..., H), (D, H) and (D,)"
        )
    batch = x.dim() - 1
    if x.dim() < 1 or x.shape[-1] != weight.shape[0] or h.shape[:-1][h.dim() - 1 - batch :] != x.shape[:-1]:
        raise ValueError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)} and x {tuple(x.shape)}; expected x (*batch, "
            "D) and h (*samples, *batch, H) for a weight (D, H)"
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
    return h, weight, bias


def linear_bernoulli_log_prob(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    x_scale: float | None = None,
    *,
    reduction: str = "none",
    validate_args: bool | None = None,
) -> Tensor:
    """log p(x|z) of a Bernoulli decoder whose last layer is linear, without its logits ever being in memory.

    ``bernoulli_log_prob(h @ weight.T + bias, x)``: ``sum_i (x_i l_i - log(1 + exp(l_i)))`` (Kingma & Welling 2013,
    appendix C.1). The rows of h are gone through in chunks whose logits stay in the cache. What grows with the number
    of rows is h, its gradient, and one number a row.

    Args:
        h: (..., H), the decoder's last hidden layer: (B, H), or (L, B, H) for L samples.
        weight, bias: (D, H) and (D,) or None, of h's dtype: float32, bfloat16 or float16. Under autocast they become
            autocast's.
        x: (..., D), h's last leading dimensions: targets in [0, 1], used again for each sample and never expanded; bool
            or floating, or uint8 with x_scale.
        x_scale: multiplies x: 1/255 for pixels in 0..255.
        reduction: "none" for one value a row; any gradient may flow back, and the backward pass computes the chunks'
            logits again, where there is more than one. "mean" or "sum" over rows: all gradients are computed in the
            forward pass, where one may flow back, and the backward pass only multiplies (but in a compiled graph, and
            in float16, whose gradients need a loss scale first).
        validate_args: look at the targets, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        h's leading dimensions, or a number; float32, in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, targets outside [0, 1] when
        validated. RuntimeError: dtypes that no kernel takes.
    """
    if not (is_dense(h) and is_dense(x)):
        check_dense("linear_bernoulli_log_prob", h=h, weight=weight, x=x)
    if validate_args is not False and is_wanted("linear_bernoulli_log_prob", validate_args, x):
        look_once("linear_bernoulli_log_prob", validate_args, check_bernoulli, None, x, x_scale, False)
    logits = LinearLogits(h, weight, bias)
    rows = h.shape[:-1].numel()
    if reduction == "none":
        h, weight, bias = _checked(logits, x)
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled() or ops.on_reference(h)
        apply = _linear_bernoulli_log_prob if plain or not 0 < rows <= rows_in_cache(weight) else _OneChunk.apply
        return apply(h, weight, bias, x, x_scale)
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    return sum_log_prob(logits, x, x_scale, 1.0 if reduction == "sum" else 1.0 / rows if rows else math.nan)


def _may_know(h: Tensor) -> bool:
    """Whether gradients may be taken in the forward pass. In float16 they would underflow before a loss scale comes."""
    return not torch.compiler.is_compiling() and h.dtype != torch.float16


def sum_log_prob(logits: LinearLogits, x: Tensor, x_scale: float | None, factor: float) -> Tensor:
    """`factor` times the sum of log p(x|z) over all rows, a number, with its gradients in one pass."""
    h, weight, bias = _checked(logits, x)

    def formula(h, weight, bias, x, _, x_scale):
        return factor * reference.linear_bernoulli_log_prob(h, weight, bias, x, x_scale).sum()

    if ops.on_reference(h):
        return formula(h, weight, bias, x, None, x_scale)
    if not _may_know(h):
        return factor * _linear_bernoulli_log_prob(h, weight, bias, x, x_scale).sum()

    return _Known.apply(h, weight, bias, x, None, x_scale, sum_of_log_prob(h, weight, x, factor), formula)


def sum_importance_weighted_bound(
    logits: LinearLogits,
    x: Tensor,
    x_scale: float | None,
    log_ratio: Tensor,
    beta: Tensor | float,
    factor: float,
) -> Tensor:
    """`factor` times the sum over datapoints of `importance_weighted_bound`, with its gradients in one pass. Samples
    are in the first dimension."""
    h, weight, bias = _checked(logits, x)
    if h.shape[:-1] != log_ratio.shape:
        raise ValueError(
            f"h has shape {tuple(h.shape)} and log_ratio {tuple(log_ratio.shape)}; expected (L, *batch, H) and (L, "
            "*batch)"
        )

    def formula(h, weight, bias, x, log_ratio, x_scale):
        log_prob = reference.linear_bernoulli_log_prob(h, weight, bias, x, x_scale)
        return factor * reference.importance_weighted_bound(log_prob, log_ratio, beta).sum()

    if ops.on_reference(h):
        return formula(h, weight, bias, x, log_ratio, x_scale)
    learned_beta = isinstance(beta, Tensor) and beta.requires_grad
    known = _may_know(h) and not learned_beta
    what = sum_of_bounds(h, weight, x, log_ratio, beta, factor) if known else None
    if what is None:
        log_prob = _linear_bernoulli_log_prob(h, weight, bias, x, x_scale)
        return factor * importance_weighted_bound(log_prob, log_ratio, beta).sum()
    return _Known.apply(h, weight, bias, x, log_ratio, x_scale, what, formula)
