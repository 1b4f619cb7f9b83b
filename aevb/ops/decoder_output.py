"""log p(x|z) from a decoder's output, for datapoints of any shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..likelihoods.base import Likelihood, Parameter
from ..likelihoods.target import Target
from .autograd import KernelFunction, as_bits, times
from .likelihood import (
    Factor,
    factored_sum,
    goes_ahead,
    likelihood_formula,
    likelihood_log_prob,
    log_prob_and_grad,
    log_prob_op,
)

Parameters = tuple[Parameter, ...]


def _rows(family: Likelihood, params: Parameters, target: Target, batch: torch.Size) -> tuple[Parameters, Target]:
    """Returns params and target with each datapoint flattened.

    Args:
        family: the likelihood.
        params: the likelihood's parameters, the first (*samples, *batch, *datapoint).
        target: of x (*batch, *datapoint).
        batch: the batch shape.

    Returns:
        (params, target): the first parameter (*samples, *batch, D), and x (*batch, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    first, *others = params
    assert isinstance(first, Tensor)
    x, flat_target = target.x, target.flat(batch)
    D = flat_target.x.shape[-1]
    for samples in range(first.dim() - len(batch) + 1):
        last = samples + len(batch)
        if first.shape[samples:last] == batch and first.shape[last:].numel() == D:
            rows = first.shape[:last]
            break
    else:
        raise ValueError(
            f"recon's {family.params[0]} has shape {tuple(first.shape)}; with batch {tuple(batch)} and x of shape "
            f"{tuple(x.shape)}, expected (*samples, *batch, *datapoint) with {D} elements in a datapoint"
        )
    flat: list[Parameter] = [first.reshape(*rows, D)]
    for name, p in zip(family.params[1:], others, strict=True):
        if isinstance(p, Tensor) and p.dim() > 0 and p.shape != (D,):
            try:
                p = p.expand(first.shape).reshape(*rows, D)
            except RuntimeError:
                raise ValueError(
                    f"recon's {name} has shape {tuple(p.shape)} and its {family.params[0]} {tuple(first.shape)}; "
                    f"expected the same shape, one that broadcasts to it, or ({D},), an element for each of a "
                    "datapoint's"
                ) from None
        flat.append(p)
    return tuple(flat), flat_target


def log_prob_of(family: Likelihood, params: Parameters, target: Target, batch: torch.Size) -> Tensor:
    """Returns log p(x|z), (*samples, *batch), of x (*batch, *datapoint).

    The datapoint's shape may differ between params and x, if the number of elements is the same.
    """
    return likelihood_log_prob(family, *_rows(family, params, target, batch))


class _Sum(KernelFunction):
    """factor * sum of log p(x|z) over rows, with gradients computed forward.

    The forward pass computes the needed gradients for an upstream gradient of 1. The backward pass multiplies them by
    the upstream gradient.
    """

    public, num_tensors, rare = "log_prob", 5, (1, 3, 4)

    @staticmethod
    def forward(ctx, p0, x, p1, weight, offset, options, factor):
        needs = ctx.needs_input_grad
        inputs = p0, x, p1, weight, offset
        log_prob, *found = log_prob_and_grad(*inputs, *options, factor, as_bits((needs[0], needs[2])))
        ctx.save_for_backward(*inputs, *found)
        ctx.options, ctx.factor = options, factor
        return factor * log_prob.sum()

    @staticmethod
    def formula(ctx):
        return lambda *inputs: ctx.factor * likelihood_formula(*inputs, *ctx.options).sum(), ()

    @staticmethod
    def kernel_gradients(ctx, tensors, taken, needs, grad):
        grad0, grad1 = times(taken, grad)
        return grad0 if needs[0] else None, None, grad1 if needs[2] else None, None, None


def sum_log_prob(family: Likelihood, params: Parameters, target: Target, batch: torch.Size, factor: Factor) -> Tensor:
    """Returns the sum over datapoints of factor * log p(x|z), averaged over samples.

    The result is a scalar. In float32 on a CPU, and for one factor, its value and gradients are computed in one pass.
    """
    params, target = _rows(family, params, target, batch)
    first = params[0]
    assert isinstance(first, Tensor)
    samples = first.shape[:-1].numel() // max(batch.numel(), 1)
    factor = factor / samples if samples else math.nan
    p0, p1, *options = family.kernel_arguments(params)
    x, x_scale, weight, offset = target
    # A gradient of the offset comes from the op, whose backward pass has one by the kernel.
    learns_offset = offset is not None and offset.requires_grad
    if not isinstance(factor, Tensor) and not learns_offset and goes_ahead(p0, x, p1):
        return _Sum.apply(p0, x, p1, weight, offset, (*options, x_scale), factor)
    return factored_sum(factor, log_prob_op(p0, x, p1, weight, offset, *options, x_scale))
