"""The Laplace likelihood, whose log is an absolute error."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor, distributions

from .base import Likelihood, Parameter, register, tensors


@register
@dataclasses.dataclass(frozen=True)
class Laplace(Likelihood):
    """Laplace likelihood with a mean m and log-scale s per element.

    log p(x|z) is ``-sum_i (|x_i - m_i| exp(-s_i) + s_i + log 2)``.
    """

    name: ClassVar[str] = "laplace"
    params: ClassVar[tuple[str, ...]] = ("mean", "log_scale")
    initial: ClassVar[tuple[float, ...]] = (0.0, -1.35)

    def distribution(self, mean: Tensor, log_scale: Tensor) -> distributions.Laplace:  # type: ignore[override]
        """Returns Laplace(mean, exp(log_scale))."""
        return distributions.Laplace(mean, log_scale.exp(), validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each element.

        -log_scale is clamped at 88 in the exponential, so that it does not overflow float32.
        """
        mean, log_scale = tensors(params)
        return -(x - mean).abs() * (-log_scale).clamp(max=88).exp() - log_scale - math.log(2)

    def spread_of(self, variance: float) -> float:
        """Returns the log-scale of that variance: 0.5 log(variance / 2)."""
        return 0.5 * math.log(variance / 2)
