"""A Gaussian decoder's output, and its log p(x|z) for datapoints of any layout."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class GaussianOutput(NamedTuple):
    """What a Gaussian decoder says of x: N(mean, exp(logvar)). `FusedELBO` with likelihood="gaussian" takes it as
    `recon`.

    mean is (*samples, *batch, *datapoint). logvar has its shape (a decoder with a second head), or is shared: a tensor
    (D,) with an element for each of a datapoint's, or one that broadcasts to mean, as () does, or a number.
    """

    mean: Tensor
    logvar: Tensor | float = 0.0


class _Rows(NamedTuple):
    """The same with each datapoint flat: mean (*samples, *batch, D), x (*batch, D)."""

    mean: Tensor
    x: Tensor
    logvar: Tensor | float


def _rows(output: GaussianOutput, x: Tensor, batch: torch.Size) -> _Rows:
    mean, logvar = output
    if x.shape[: len(batch)] != batch:
        raise ValueError(f"x has shape {tuple(x.shape)} and kl is of a batch {tuple(batch)}; expected x (*batch, ...)")
    D = x.shape[len(batch) :].numel()
    for samples in range(mean.dim() - len(batch) + 1):
        first = samples + len(batch)
        if mean.shape[samples:first] == batch and mean.shape[first:].numel() == D:
            rows = mean.shape[:first]
            break
    else:
        raise ValueError(
            f"recon's mean has shape {tuple(mean.shape)}; with batch {tuple(batch)} and x of shape {tuple(x.shape)}, "
            f"expected (*samples, *batch, *datapoint) with {D} elements in a datapoint"
        )
    if isinstance(logvar, Tensor) and logvar.dim() > 0 and logvar.shape != (D,):
        try:
            logvar = logvar.expand(mean.shape).reshape(*rows, D)
        except RuntimeError:
            raise ValueError(
                f"recon's logvar has shape {tuple(logvar.shape)} and its mean {tuple(mean.shape)}; expected the same "
                f"shape, one that broadcasts to it, or ({D},), an element for each of a datapoint's"
            ) from None
    return _Rows(mean.reshape(*rows, D), x.reshape(*batch, D), logvar)


def log_prob_of(
    output: GaussianOutput, x: Tensor, batch: torch.Size, x_scale: float | None, sigmoid_means: bool
) -> Tensor:
    """log p(x|z), (*samples, *batch), of x (*batch, *datapoint). The datapoint may be laid out differently in the
    two."""
    mean, x, logvar = _rows(output, x, batch)
    return ops.gaussian_log_prob(mean, x, logvar, x_scale, sigmoid=sigmoid_means, validate_args=False)


class _Sum(torch.autograd.Function):
    """`factor` times the sum of log p(x|z) over rows. Its gradients are taken in the forward pass, those that are asked
    for where 1 flows back."""

    @staticmethod
    def forward(ctx, mean, x, logvar, options, factor):
        needs = ctx.needs_input_grad
        log_prob, *found = ops.log_prob_and_grad(mean, x, logvar, *options, factor, ops.as_bits((needs[0], needs[2])))
        ctx.save_for_backward(mean, x, logvar, *found)
        ctx.options, ctx.factor = options, factor
        return factor * log_prob.sum()

    @staticmethod
    def backward(ctx, grad):
        mean, x, logvar, *found = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or needs[1] or ops.is_batched(grad):

            def formula(mean, x, logvar):
                return ctx.factor * ops.likelihood_formula(mean, x, logvar, *ctx.options).sum()

            return *ops.reference_gradients(formula, (mean, x, logvar), (), needs, (grad,)), None, None
        if ops.kept_graph():
            found = [f * grad for f in found]
        elif float(grad) != 1:
            found = [f.mul_(grad) for f in found]
        return found[0] if needs[0] else None, None, found[1] if needs[2] else None, None, None


def sum_log_prob(
    output: GaussianOutput, x: Tensor, batch: torch.Size, x_scale: float | None, sigmoid_means: bool, factor: float
) -> Tensor:
    """`factor` times the sum over datapoints of the mean over samples of log p(x|z): a number, on a CPU with its
    gradients in one pass."""
    mean, x, logvar = _rows(output, x, batch)
    samples = mean.shape[:-1].numel() // max(batch.numel(), 1)
    factor = factor / samples if samples else math.nan
    arguments = ops.gaussian_arguments(mean, x, logvar, x_scale, sigmoid_means)
    if ops.goes_ahead(*arguments):
        return _Sum.apply(*arguments[:3], arguments[3:], factor)
    return factor * ops.gaussian_log_prob(mean, x, logvar, x_scale, sigmoid=sigmoid_means, validate_args=False).sum()
