"""Half the squared error, as a likelihood."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor, distributions

from .base import Likelihood, Parameter, register
from .gaussian import Gaussian


@register
@dataclasses.dataclass(frozen=True)
class MSE(Likelihood):
    """Half the squared error: -1/2 sum_i (x_i - m_i)^2.

    It is a Gaussian's log p(x|z) of variance 1 without its constant, -D/2 log(2 pi), and so no density. `density`, the
    Gaussian, takes its place in importance weights, log p(x) and evaluation.
    """

    name: ClassVar[str] = "mse"
    params: ClassVar[tuple[str, ...]] = ("mean",)

    def distribution(self, mean: Tensor) -> distributions.Normal:  # type: ignore[override]
        """Returns N(mean, 1)."""
        return distributions.Normal(mean, mean.new_ones(()), validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns -1/2 (x_i - m_i)^2 of each element."""
        return -0.5 * (x - params[0]).square()

    @property
    def density(self) -> Gaussian:
        """The Gaussian of variance 1, which is normalised."""
        return Gaussian()

    def constant(self, D: int) -> float:
        """Returns -D/2 log(2 pi)."""
        return -0.5 * D * math.log(2 * math.pi)
