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
    """log p(x|z) = -sum_i |x_i - m_i| exp(-s_i) + s_i + log 2."""

    name: ClassVar[str] = "laplace"
    params: ClassVar[tuple[str, ...]] = ("mean", "log_scale")
    initial: ClassVar[tuple[float, ...]] = (0.0, -1.35)

    def distribution(self, mean: Tensor, log_scale: Tensor) -> distributions.Laplace:  # type: ignore[override]
        return distributions.Laplace(mean, log_scale.exp(), validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        mean, log_scale = tensors(params)
        return -(x - mean).abs() * (-log_scale).clamp(max=88).exp() - log_scale - math.log(2)

    def spread_of(self, variance: float) -> float:
        return 0.5 * math.log(variance / 2)
