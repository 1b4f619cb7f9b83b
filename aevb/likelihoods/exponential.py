"""The exponential likelihood, of waiting times and intensities."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor, distributions

from .base import Likelihood, Parameter, register, tensors


@register
@dataclasses.dataclass(frozen=True)
class Exponential(Likelihood):
    """Exponential likelihood of x >= 0 with log-rates r.

    log p(x|z) is ``sum_i (r_i - x_i exp(r_i))``.
    """

    name: ClassVar[str] = "exponential"
    params: ClassVar[tuple[str, ...]] = ("log_rate",)
    support: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def distribution(self, log_rate: Tensor) -> distributions.Exponential:  # type: ignore[override]
        """Returns Exponential(exp(log_rate))."""
        return distributions.Exponential(log_rate.exp(), validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each element.

        log_rate is clamped at 88 in the exponential, so that it does not overflow float32.
        """
        (log_rate,) = tensors(params)
        return log_rate - x * log_rate.clamp(max=88).exp()
