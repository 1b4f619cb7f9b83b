"""Decoder outputs that stand for a tensor of likelihood parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LinearLogits(NamedTuple):
    """Logits ``h @ weight.T + bias`` of a linear last layer, uncomputed.

    `FusedELBO` takes them as `recon`, and then never holds the logits in memory.

    Attributes:
        h: (..., H), input of the last layer.
        weight: (D, H).
        bias: (D,), or None.
    """

    h: Tensor  # (..., H)
    weight: Tensor  # (D, H)
    bias: Tensor | None = None  # (D,)

    def materialize(self) -> Tensor:
        """Returns the logits, (..., D)."""
        return F.linear(self.h, self.weight, self.bias)


class LinearOutput(NamedTuple):
    """Likelihood parameters ``h @ weight.T + bias`` of a last layer, uncomputed.

    `FusedELBO` takes them as `recon`. The layer gives the parameters side by side: of two, the first D outputs are the
    first parameter.

    Attributes:
        h: (..., H), input of the last layer.
        weight: (P * D, H), for P parameters per element.
        bias: (P * D,), or None.
        shared: A second parameter that does not come from h: (D,), () or a number.
        floor: If given, the second output o stands for ``floor + softplus(o - floor)``.
    """

    h: Tensor  # (..., H)
    weight: Tensor  # (P * D, H)
    bias: Tensor | None = None  # (P * D,)
    shared: Tensor | float | None = None  # (D,), () or a number
    floor: float | None = None
    """Lower bound of the second output, by a softplus."""


class GaussianOutput(NamedTuple):
    """Gaussian decoder output N(mean, exp(logvar)) of x.

    `FusedELBO` with likelihood="gaussian" takes it as `recon`.

    Attributes:
        mean: (*samples, *batch, *datapoint).
        logvar: Of mean's shape (a decoder with a second head), or shared. Shared: a tensor (D,) with one element per
            element of a datapoint, a tensor that broadcasts to mean, such as (), or a number.
    """

    mean: Tensor
    logvar: Tensor | float = 0.0
