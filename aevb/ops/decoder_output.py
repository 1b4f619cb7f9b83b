"""log p(x|z) from a decoder's output, for datapoints of any shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks.batch_dims import datapoints
from ..likelihoods.base import Likelihood, Parameter
from .autograd import KernelFunction, as_bits, times
from .likelihood import goes_ahead, likelihood_formula, likelihood_log_prob, log_prob_and_grad, log_prob_op

Parameters = tuple[Parameter, ...]


def _rows(family: Likelihood, params: Parameters, x: Tensor, batch: torch.Size) -> tuple[Parameters, Tensor]:
    """Returns params and x with each datapoint flattened.

    Args:
        family: the likelihood.
        params: the likelihood's parameters, the first (*samples, *batch, *datapoint).
        x: (*batch, *datapoint).
        batch: the batch shape.

    Returns:
        (params, x): the first parameter (*samples, *batch, D), and x (*batch, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    first, *others = params
    assert isinstance(first, Tensor)
    flat_x = datapoints(x, batch)
    D = flat_x.shape[-1]
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
    return tuple(flat), flat_x


def log_prob_of(family: Likelihood, params: Parameters, x: Tensor, batch: torch.Size, x_scale: float | None) -> Tensor:
    """Returns log p(x|z), (*samples, *batch), of x (*batch, *datapoint).

    The datapoint's shape may differ between params and x, if the number of elements is the same.
    """
    params, x = _rows(family, params, x, batch)
    return likelihood_log_prob(family, params, x, x_scale)


class _Sum(KernelFunction):
    """factor * sum of log p(x|z) over rows, with gradients computed forward.

    The forward pass computes the needed gradients for an upstream gradient of 1. The backward pass multiplies them by
    the upstream gradient.
    """

    public, num_tensors, rare = "log_prob", 3, (1,)

    @staticmethod
    def forward(ctx, p0, x, p1, options, factor):
        needs = ctx.needs_input_grad
        log_prob, *found = log_prob_and_grad(p0, x, p1, *options, factor, as_bits((needs[0], needs[2])))
        ctx.save_for_backward(p0, x, p1, *found)
        ctx.options, ctx.factor = options, factor
        return factor * log_prob.sum()

    @staticmethod
    def formula(ctx):
        return lambda p0, x, p1: ctx.factor * likelihood_formula(p0, x, p1, *ctx.options).sum(), ()

    @staticmethod
    def kernel_gradients(ctx, tensors, taken, needs, grad):
        grad0, grad1 = times(taken, grad)
        return grad0 if needs[0] else None, None, grad1 if needs[2] else None


def sum_log_prob(
    family: Likelihood, params: Parameters, x: Tensor, batch: torch.Size, x_scale: float | None, factor: float
) -> Tensor:
    """Returns factor * sum of log p(x|z) over datapoints, averaged over samples.

    The result is a scalar. In float32 on a CPU its value and gradients are computed in one pass.
    """
    params, x = _rows(family, params, x, batch)
    first = params[0]
    assert isinstance(first, Tensor)
    samples = first.shape[:-1].numel() // max(batch.numel(), 1)
    factor = factor / samples if samples else math.nan
    p0, p1, *options = family.kernel_arguments(params)
    if goes_ahead(p0, x, p1):
        return _Sum.apply(p0, x, p1, (*options, x_scale), factor)
    return factor * log_prob_op(p0, x, p1, *options, x_scale).sum()
