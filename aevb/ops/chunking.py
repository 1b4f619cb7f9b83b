"""Chunked log-likelihood and gradients of a linear decoder layer, without full logits.

The rows of the decoder's last hidden layer are processed one chunk at a time. For each chunk:

1. A matrix product computes the chunk's logits.
2. The likelihood kernel reads the logits while they are in the cache, and writes their gradient over them.
3. Two matrix products add the chunk's share of the gradients of the hidden layer and the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..likelihoods.base import above_floor, above_floor_backward
from ..likelihoods.target import Target
from .likelihood import Factor
from .matmul import packed, product, rows_product

# Bytes of a chunk's logits. On a CPU they stay in the second-level cache. On a GPU products of fewer rows do not fill
# the device.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
FEWEST_ROWS = {"cpu": 256, "cuda": 1024}  # with fewer rows the products are too small to be fast

_log_prob = torch.ops.aevb.log_prob_forward.default
_gradient = torch.ops.aevb.log_prob_backward.default
_both = torch.ops.aevb.log_prob_and_grad.default
_both_in_place = torch.ops.aevb.log_prob_and_grad_.default


class Kernel(NamedTuple):
    """Likelihood kernel for a linear layer's output, (..., P * D).

    The output holds the likelihood's P parameters side by side, D numbers each.

    Args:
        likelihood: name of the kernel.
        scalar: the likelihood's fixed number, if it has one.
        shared: a second parameter, (D,), that is no output of the layer.
        floor: replaces the second parameter o of two by ``floor + softplus(o - floor)``, as a model's decoder does.
    """

    likelihood: str
    scalar: float = 0.0
    shared: Tensor | None = None
    floor: float | None = None

    def log_prob(self, out: Tensor, target: Target) -> Tensor:
        """Returns log p(x|z) of a chunk, (samples, datapoints).

        Args:
            out: (samples, datapoints, P * D), the layer's output.
            target: of x (datapoints, D).
        """
        x, x_scale, x_weight, offset = target
        p0, p1 = self._parameters(out, x)
        return _log_prob(p0, x, p1, x_weight, offset, self.likelihood, self.scalar, x_scale)

    def both(self, out: Tensor, target: Target, factor: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns log p(x|z) of a chunk and `factor` times its gradients.

        Args:
            out: (samples, datapoints, P * D), the layer's output; the kernel may overwrite it with its gradient.
            target: of x (datapoints, D).
            factor: upstream gradient, the same for every row.

        Returns:
            (log_prob, grad_out, grad_shared). grad_shared has one row of D for each row of out, or is None.
        """
        x, x_scale, x_weight, offset = target
        options = x_weight, offset, self.likelihood, self.scalar, x_scale, factor
        if self.shared is None and out.shape[-1] == x.shape[-1]:
            return _both_in_place(out, x, *options), out, None
        p0, p1 = self._parameters(out, x)
        log_prob, *grads = _both(p0, x, p1, *options, 3)
        return log_prob, *self._of_out(out, *grads)

    def gradient(self, out: Tensor, target: Target, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of out and `shared` for a per-row upstream gradient.

        Args:
            out: (samples, datapoints, P * D), the layer's output.
            target: of x (datapoints, D).
            upstream: (samples, datapoints), the gradient of log p(x|z).

        Returns:
            (grad_out, grad_shared). grad_shared has one row of D for each row of out, or is None.
        """
        x, x_scale, x_weight, offset = target
        p0, p1 = self._parameters(out, x)
        needs = 1 if p1 is None else 3
        grads = _gradient(p0, x, p1, x_weight, offset, self.likelihood, self.scalar, x_scale, upstream, needs)
        return self._of_out(out, *grads) if p1 is not None else (grads[0], None)

    def _parameters(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        D = x.shape[-1]
        if self.shared is not None:
            return out, self.shared.expand(out.shape)
        if out.shape[-1] == D:
            return out, None
        second = out[..., D:]
        if self.floor is not None:
            second = above_floor(self.floor, second)
        return out[..., :D], second

    def _of_out(self, out: Tensor, grad0: Tensor, grad1: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.shared is not None:
            return grad0, grad1
        if self.floor is not None:
            grad1 = above_floor_backward(self.floor, out[..., grad0.shape[-1] :], grad1)
        # Under autocast a GPU computes softplus in float32.
        return torch.cat([grad0, grad1.to(grad0.dtype)], -1), None


def sizes_of(h: Tensor, x: Tensor) -> tuple[int, int]:
    """Returns (L, B), the numbers of samples and datapoints.

    Args:
        h: (*samples, *batch, H), the last hidden layer.
        x: (*batch, D).
    """
    B = x.shape[:-1].numel()
    return h.shape[: h.dim() - x.dim()].numel(), B


class Chunk(NamedTuple):
    """Samples [first, last) of datapoints [begin, end).

    The rows are contiguous in a tensor [L * B, ...] with one row per sample and datapoint. In x they are the rows
    [begin, end).
    """

    first: int
    last: int
    begin: int
    end: int

    def rows(self, t: Tensor, B: int) -> Tensor:
        """Returns the chunk's rows, [samples * datapoints, ...], of t.

        t is [L * B, ...].
        """
        return t[self.first * B + self.begin : (self.last - 1) * B + self.end]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of samples and datapoints in the chunk."""
        return self.last - self.first, self.end - self.begin


def rows_of_chunk(weight: Tensor) -> int:
    """Returns the rows of a chunk: `rows_in_cache`, but at least FEWEST_ROWS."""
    return max(rows_in_cache(weight), FEWEST_ROWS[_device_type(weight)])


def rows_in_cache(weight: Tensor) -> int:
    """Returns the number of rows whose output of `weight` takes CHUNK_BYTES."""
    return CHUNK_BYTES[_device_type(weight)] // (max(weight.shape[0], 1) * weight.element_size())


def _device_type(t: Tensor) -> str:
    return "cpu" if t.device.type == "cpu" else "cuda"


def chunks_of(L: int, B: int, rows: int) -> Iterator[Chunk]:
    """Yields chunks of at most `rows` rows, for L samples, B datapoints.

    The partition depends on L, B and rows alone, and so does the order of all sums over chunks.

    Yields:
        Parts of one sample where rows < B, else whole samples. Nothing if L or B is 0.
    """
    if B == 0 or L == 0:
        return
    if rows < B:
        step = -(-B // -(-B // rows))  # chunks of nearly one size
        for sample in range(L):
            for begin in range(0, B, step):
                yield Chunk(sample, sample + 1, begin, min(begin + step, B))
    else:
        step = rows // B
        for first in range(0, L, step):
            yield Chunk(first, min(first + step, L), 0, B)


def for_rows(weight: Tensor, rows: int, factor: Tensor) -> Tensor:
    """Returns `factor`, packed for oneDNN if `rows` take several chunks.

    Args:
        weight: (P * D, H), which sets the size of a chunk.
        rows: number of rows of all chunks.
        factor: weight or its transpose, an operand of each chunk's product.
    """
    return packed(factor) if rows > rows_of_chunk(weight) else factor


class Gradients:
    """Gradients of h, weight, bias and the shared parameter, accumulated over chunks.

    A gradient that is not needed is None. Sums over chunks are float32, whatever the dtype of the products.

    Args:
        h: (R, H) or (L, B, H), the last hidden layer.
        weight: (P * D, H).
        bias: (P * D,).
        needs: whether the gradients of h, weight and bias are needed.
    """

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor, needs: Sequence[bool]):
        self.inputs = weight, bias
        self.needs = needs
        rows = h.shape[:-1].numel()
        self.weight_to_h = for_rows(weight, rows, weight.t()) if needs[0] else None
        self.h = torch.ops.aevb.empty(h, h.shape) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.shared: Tensor | None = None

    def add(
        self,
        h: Tensor,
        grad_logits: Tensor,
        grad_h: Tensor | None,
        row_weight: Tensor | None = None,
        grad_shared: Tensor | None = None,
    ) -> None:
        """Add a chunk's share of every needed gradient.

        Args:
            h: (rows, H), the chunk's rows of the last hidden layer.
            grad_logits: (rows, P * D), the gradient of the layer's output.
            grad_h: the chunk's part of the gradient of h, to be filled; None if not needed.
            row_weight: (rows,), multiplies each row of grad_logits and grad_shared; None for 1.
            grad_shared: (rows, D), the gradient of the shared parameter for each row; None if not needed.
        """
        if grad_h is not None:
            assert self.weight_to_h is not None
            out = grad_h.view(h.shape) if grad_h.is_contiguous() and grad_h.dtype == grad_logits.dtype else None
            found = product(grad_logits, self.weight_to_h, out=out)
            found = found if row_weight is None else found.mul_(row_weight.unsqueeze(1))
            if found is not out:
                grad_h.copy_(found.view_as(grad_h))
        if self.needs[1]:
            if row_weight is not None:
                weighed = torch.ops.aevb.empty(h, h.shape)
                h = torch.mul(h, row_weight.unsqueeze(1).to(h.dtype), out=weighed)
            self.weight = rows_product(grad_logits, h, self.weight).float()
        if self.needs[2]:
            share = _sum_of_rows(grad_logits, row_weight)
            self.bias = share if self.bias is None else self.bias.add_(share)
        if grad_shared is not None:
            share = _sum_of_rows(grad_shared, row_weight)
            self.shared = share if self.shared is None else self.shared.add_(share)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of h, weight and bias; None if not needed.

        The gradients of weight and bias have the dtype of their tensor, and are 0 if no chunk was added.
        """
        found: list[Tensor | None] = []
        for needed, grad, like in zip(self.needs[1:], (self.weight, self.bias), self.inputs, strict=True):
            if not needed:
                found.append(None)
            elif grad is None:  # no chunk was added
                found.append(torch.zeros_like(like))
            else:
                found.append(grad.to(like.dtype).contiguous())
        return self.h, found[0], found[1]


def _sum_of_rows(t: Tensor, row_weight: Tensor | None) -> Tensor:
    if row_weight is None:
        return t.sum(0, dtype=torch.float32)
    return torch.mv(t.t(), row_weight.to(t.dtype)).float()


# ---- sums whose upstream gradient is known --------------------------------------------------------------------------


class Sum(NamedTuple):
    """Scalar sum over chunks of a function of log p(x|z).

    Args:
        chunks: the chunks that cover all rows.
        weigh: (log_prob, samples, datapoints) -> (share, grad_log_prob, grad_log_ratio), for slices samples and
            datapoints. `share` is the chunk's part of the sum. grad_log_prob is None where it is the number `factor`
            for every row. grad_log_ratio is None where the sum does not depend on log_ratio.
        factor: the gradient of the sum by log p(x|z) if it is the same for all rows, else None.
        log_prob_of: log_prob -> the chunk's part of the sum of factor * log p(x|z), where that is another sum.
    """

    chunks: Iterable[Chunk]
    weigh: Callable[[Tensor, slice, slice], tuple[Tensor, Tensor | None, Tensor | None]]
    factor: float | None
    log_prob_of: Callable[[Tensor, slice], Tensor] | None = None


def sum_of_log_prob(h: Tensor, weight: Tensor, x: Tensor, factor: Factor) -> Sum:
    """Returns the `Sum` of factor * log p(x|z) over all rows."""
    chunks = chunks_of(*sizes_of(h, x), rows_of_chunk(weight))
    if isinstance(factor, Tensor):
        factors = factor.detach().reshape(-1)

        def weigh_each(log_prob, samples, datapoints):
            grad = factors[datapoints].expand_as(log_prob)
            return (grad * log_prob).sum(dtype=torch.float64), grad, None

        return Sum(chunks, weigh_each, None)

    def weigh(log_prob, samples, datapoints):
        return factor * log_prob.sum(dtype=torch.float64), None, None

    return Sum(chunks, weigh, factor)


def sum_of_bounds(
    h: Tensor, weight: Tensor, x: Tensor, log_ratio: Tensor, beta: Tensor | float, factor: Factor
) -> Sum | None:
    """Returns the `Sum` of factor * importance-weighted bound over datapoints.

    Each chunk holds all L samples of its datapoints, because the normalised importance weights need them all.

    Args:
        h: (L, *batch, H), the last hidden layer.
        weight: (P * D, H).
        x: (*batch, D).
        log_ratio: (L, *batch), log q(z|x) - log p(z).
        beta: weight of log_ratio.
        factor: multiplies the sum, or each datapoint's bound.

    Returns:
        The sum, or None if L is 0 or more than 8 times the rows of a chunk.
    """
    L, B = sizes_of(h, x)
    rows = rows_of_chunk(weight)
    if 8 * rows < L or L == 0:
        return None
    ratios = log_ratio.detach().reshape(L, B)
    factors = factor.detach().reshape(B) if isinstance(factor, Tensor) else None

    def weigh(log_prob, samples, datapoints):
        log_weight = log_prob - beta * ratios[samples, datapoints]
        bounds = torch.logsumexp(log_weight, 0) - math.log(L)
        if factors is None:
            grad = factor * torch.softmax(log_weight, 0)
            return factor * bounds.sum(dtype=torch.float64), grad, -beta * grad
        grad = factors[datapoints] * torch.softmax(log_weight, 0)
        return (factors[datapoints] * bounds).sum(dtype=torch.float64), grad, -beta * grad

    def log_prob_of(log_prob, datapoints):
        of_each = log_prob.mean(0)
        return (of_each * (factor if factors is None else factors[datapoints])).sum(dtype=torch.float64)

    step = max(rows // L, 1)
    chunks = (Chunk(0, L, begin, min(begin + step, B)) for begin in range(0, B, step))
    return Sum(chunks, weigh, None, log_prob_of)


class Taken(NamedTuple):
    """Value of a `Sum` (0-d, float64) and its requested gradients, else None.

    log_prob is the sum of factor * log p(x|z), averaged over samples.
    """

    value: Tensor
    log_prob: Tensor
    h: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    shared: Tensor | None  # (D,), float32
    log_ratio: Tensor | None  # (L, B)


def take(
    what: Sum, h: Tensor, weight: Tensor, bias: Tensor, target: Target, kernel: Kernel, needs: Sequence[bool]
) -> Taken:
    """Returns the value of a `Sum` and its gradients, in one pass.

    Args:
        what: the `Sum`.
        h: (*samples, *batch, H), the last hidden layer.
        weight: (P * D, H).
        bias: (P * D,).
        target: of x (*batch, D).
        kernel: the likelihood's kernel.
        needs: whether the gradients of h, weight, bias, the kernel's shared parameter and log_ratio are needed.
    """
    L, B = sizes_of(h, target.x)
    H, D = h.shape[-1], target.x.shape[-1]
    training = any(needs[:4])
    samples, rows = h.reshape(L, B, H), target.rows()
    gradients = Gradients(samples, weight, bias, needs[:3])
    grad_log_ratio = torch.empty(L, B, device=h.device) if needs[4] else None
    value = torch.zeros((), dtype=torch.float64, device=h.device)
    log_prob_sum = value if what.log_prob_of is None else torch.zeros_like(value)
    decoder = for_rows(weight, L * B, weight)
    for chunk in what.chunks:
        samples_of, datapoints = slice(chunk.first, chunk.last), slice(chunk.begin, chunk.end)
        h_chunk = samples[samples_of, datapoints].reshape(-1, H)
        target_chunk = rows.part(chunk.begin, chunk.end)
        out = product(h_chunk, decoder, bias).view(*chunk.shape, weight.shape[0])
        if training:  # out becomes its gradient, in place where possible, without row weights
            log_prob, out, grad_shared = kernel.both(out, target_chunk, 1.0 if what.factor is None else what.factor)
        else:
            log_prob, grad_shared = kernel.log_prob(out, target_chunk), None
        share, grad, grad_ratio = what.weigh(log_prob, samples_of, datapoints)
        value += share
        if what.log_prob_of is not None:
            log_prob_sum += what.log_prob_of(log_prob, datapoints)
        if training:
            grad_h = None if gradients.h is None else gradients.h[samples_of, datapoints]
            row_weight = None if grad is None else grad.reshape(-1)
            grad_shared = grad_shared.view(-1, D) if grad_shared is not None and needs[3] else None
            gradients.add(h_chunk, out.view(len(h_chunk), -1), grad_h, row_weight, grad_shared)
        if grad_log_ratio is not None:
            assert grad_ratio is not None
            grad_log_ratio[samples_of, datapoints] = grad_ratio
    grad_h, grad_weight, grad_bias = gradients.result()
    grad_h = None if grad_h is None else grad_h.view(h.shape)
    return Taken(value, log_prob_sum, grad_h, grad_weight, grad_bias, gradients.shared, grad_log_ratio)
