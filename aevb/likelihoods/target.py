"""What log p(x|z) is computed of: x, with weights of its elements and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.batch_dims import datapoints
from ..checks.errors import check_dense

MASKS = (torch.bool, torch.uint8)
# What kernels read x as. Other real numbers have a plain meaning in float32; a byte may be a bit or a pixel.
_READ = {torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8}


class Target(NamedTuple):
    """Data x of log p(x|z), and how its elements count.

    Attributes:
        x: (*batch, *datapoint).
        x_scale: Multiplies x, or None.
        weight: Of x's shape. bool or uint8 selects elements, floats weigh them, and an element of 0 takes no part.
        offset: (*batch,), float32: added to the likelihood's first parameter.
    """

    x: Tensor
    x_scale: float | None = None
    weight: Tensor | None = None
    offset: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a weight nor an offset."""
        return self.weight is None and self.offset is None

    def flat(self, batch: Sequence[int]) -> Target:
        """Returns the target with each datapoint flat, x (*batch, D).

        Raises:
            ValueError: x does not begin with the batch.
        """
        weight = None if self.weight is None else datapoints(self.weight, batch)
        return Target(datapoints(self.x, batch), self.x_scale, weight, self.offset)

    def rows(self) -> Target:
        """Returns the target (*batch, D) with one batch dimension, (B, D)."""
        if self.x.dim() == 2:
            return self
        D = self.x.shape[-1]
        weight = None if self.weight is None else self.weight.reshape(-1, D)
        return Target(
            self.x.reshape(-1, D), self.x_scale, weight, None if self.offset is None else self.offset.reshape(-1)
        )

    def part(self, begin: int, end: int) -> Target:
        """Returns the datapoints [begin, end) of a target (B, D)."""
        weight = None if self.weight is None else self.weight[begin:end]
        return Target(self.x[begin:end], self.x_scale, weight, None if self.offset is None else self.offset[begin:end])

    def selected(self) -> Tensor:
        """Returns x with 0 for the elements that take no part."""
        return self.x if self.weight is None else torch.where(self.weight != 0, self.x, torch.zeros_like(self.x))


def real(x: Tensor, first: Tensor) -> Tensor:
    """Returns x in a dtype that kernels read: whole numbers and float64 as float32.

    Beside a first parameter of float64, which no kernel takes, it stays as it is; so does what has no plain meaning.
    """
    if x.dtype in _READ or first.dtype == torch.float64 or x.is_complex() or x.is_quantized:
        return x
    return x.float()


def target_of(
    function: str, x: Tensor, x_scale: float | None, weight: Tensor | None, offset: Tensor | None, batch: Sequence[int]
) -> Target:
    """Returns the target with weight and offset in the shapes that kernels take.

    Args:
        function: The calling function's name, for errors.
        x: (*batch, *datapoint).
        x_scale: Multiplies x.
        weight: Of x's shape, or broadcast to it.
        offset: (*batch,), or broadcast to it.
        batch: The batch shape.

    Raises:
        ValueError: A shape that does not broadcast, or a weight that requires a gradient.
        TypeError: A weight or offset that is no dense tensor.
    """
    if weight is not None:
        check_dense(function, weight=weight)
        if weight.requires_grad:
            raise ValueError(
                f"{function}: weight requires a gradient, and log p(x|z) gives it none; expected weight.detach()"
            )
        if weight.dtype == torch.float64:
            weight = weight.to(x.dtype if x.dtype == torch.float64 else torch.float32)
        weight = _expanded(function, "weight", weight, x.shape, "x's shape")
    if offset is not None:
        check_dense(function, offset=offset)
        offset = offset if offset.dtype == torch.float64 else offset.float()
        offset = _expanded(function, "offset", offset, batch, "the batch's shape, one number for each datapoint")
    return Target(x, x_scale, weight, offset)


def datapoint_weights(function: str, weight: Tensor, batch: Sequence[int]) -> Tensor:
    """Returns a weight for each datapoint, (*batch,), float32 or float64.

    Raises:
        ValueError: A shape that does not broadcast to the batch's.
        TypeError: A weight that is no dense tensor.
    """
    check_dense(function, datapoint_weight=weight)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return _expanded(function, "datapoint_weight", weight, batch, "one number for each datapoint")


def _expanded(function: str, name: str, t: Tensor, shape: Sequence[int], what: str) -> Tensor:
    if t.shape == tuple(shape):
        return t
    try:
        return t.expand(*shape)
    except RuntimeError:
        raise ValueError(
            f"{function}: {name} has shape {tuple(t.shape)}; expected {tuple(shape)}, {what}, or one that broadcasts "
            "to it"
        ) from None


def is_mask(weight: Tensor) -> bool:
    """Whether a weight selects elements, and does not weigh them."""
    return weight.dtype in MASKS
