"""What a decoder may give in place of a tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LinearLogits(NamedTuple):
    """The logits ``h @ weight.T + bias`` of a decoder whose last layer is linear, before anybody computes them.

    `FusedELBO` takes them as `recon`; their memory is then never needed.
    """

    h: Tensor  # (..., H)
    weight: Tensor  # (D, H)
    bias: Tensor | None = None  # (D,)

    def materialize(self) -> Tensor:
        """The logits themselves, (..., D)."""
        return F.linear(self.h, self.weight, self.bias)


class LinearOutput(NamedTuple):
    """The parameters of any likelihood, ``h @ weight.T + bias``, before anybody computes them.

    `FusedELBO` takes them as `recon`. The layer gives the parameters side by side: of two, the first D outputs are the
    first one's. `shared` is a second parameter that does not come from h.
    """

    h: Tensor  # (..., H)
    weight: Tensor  # (P * D, H)
    bias: Tensor | None = None  # (P * D,)
    shared: Tensor | float | None = None  # (D,), () or a number
    floor: float | None = None
    """Where it is given, the second output o stands for ``floor + softplus(o - floor)``."""


class GaussianOutput(NamedTuple):
    """What a Gaussian decoder says of x: N(mean, exp(logvar)). `FusedELBO` with likelihood="gaussian" takes it as
    `recon`.

    mean is (*samples, *batch, *datapoint). logvar has its shape (a decoder with a second head), or is shared: a tensor
    (D,) with an element for each of a datapoint's, or one that broadcasts to mean, as () does, or a number.
    """

    mean: Tensor
    logvar: Tensor | float = 0.0
