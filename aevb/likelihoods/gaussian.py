"""The Gaussian likelihood (Kingma & Welling 2013, appendix C.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import Tensor
from torch.distributions import Normal

from .base import Formula, Likelihood, Parameter, finite, for_each_element, register, tensors
from .outputs import GaussianOutput, LinearLogits


@register
@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """Gaussian likelihood N(mean, exp(logvar)) of each element of x.

    log p(x|z) is ``-1/2 sum_i ((x_i - m_i)^2 exp(-logvar_i) + logvar_i + log(2 pi))``.

    Args:
        sigmoid_means: The decoder gives the logits of the means m (section 5).
        variance: Variance of each element for a decoder that gives means alone.

    Raises:
        ValueError: A variance that is not finite or not above 0.
    """

    sigmoid_means: bool = False
    variance: float = 1.0
    name: ClassVar[str] = "gaussian"
    params: ClassVar[tuple[str, ...]] = ("mean", "logvar")
    noise: ClassVar[tuple[str, ...]] = ("sigma",)
    initial: ClassVar[tuple[float, ...]] = (0.0, -2.0)  # for pixels in [0, 1]: from 0, logvar would first have to fall

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance is {self.variance}; expected a finite number above 0")

    def _mean(self, output: Tensor) -> Tensor:
        return output.sigmoid() if self.sigmoid_means else output

    def distribution(self, output: Tensor, logvar: Tensor) -> Normal:  # type: ignore[override]
        """Returns N(mean, exp(logvar))."""
        return Normal(self._mean(output), (0.5 * logvar).exp(), validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each element."""
        output, logvar = tensors(params)
        standard = (x - self._mean(output)) * (-0.5 * logvar).exp()
        return -0.5 * (standard * standard + logvar + math.log(2.0 * math.pi))

    def variance_of(self, params: tuple[Parameter, ...]) -> Tensor:
        """Returns Var[x_i|z] = exp(logvar_i), of the mean's shape."""
        output, logvar = tensors(params)
        return logvar.to(output.dtype).exp().expand_as(output)

    def sample(self, params: tuple[Parameter, ...], noise: Tensor) -> Tensor:
        """Returns mean + sqrt(variance) * noise."""
        return self.mean(params) + self.variance_of(params).sqrt() * noise

    @property
    def is_whole(self) -> bool:
        """Whether a decoder gives one tensor alone: never here."""
        return False

    def parameters(self, recon: Any) -> tuple[Parameter, ...]:
        """Returns (mean, logvar) of recon: a tensor of means, or a `GaussianOutput`.

        Raises:
            ValueError: recon is of another likelihood, or has its own variance beside the option `variance`.
        """
        if isinstance(recon, Tensor):
            return recon, math.log(self.variance)
        if not isinstance(recon, tuple) or isinstance(recon, LinearLogits) or len(recon) != 2:
            raise ValueError(
                f"recon is a {type(recon).__name__}, of the Bernoulli likelihood; expected a tensor of means or a "
                "GaussianOutput"
            )
        if self.variance != 1.0:
            raise ValueError(
                f"variance is {self.variance}, but recon is a {type(recon).__name__}, which has its own; leave one out"
            )
        return tuple(recon)

    def output(self, first: Tensor, second: Parameter) -> GaussianOutput:
        """Returns the parameters as a `GaussianOutput`."""
        return GaussianOutput(first, second)

    def spread_of(self, variance: float) -> float:
        """Returns log(variance), the logvar."""
        return math.log(variance)

    def kernel_arguments(self, params: tuple[Parameter, ...]) -> tuple[Tensor, Tensor | None, str, float]:
        """Returns p0, p1, the kernel's name and its scalar, for op `log_prob`.

        A logvar that is a number takes a kernel with a fixed variance.
        """
        mean, logvar = params
        assert isinstance(mean, Tensor)
        name = "gaussian_sigmoid" if self.sigmoid_means else "gaussian"
        if isinstance(logvar, Tensor):
            return mean, for_each_element(logvar, mean), name, 0.0
        return mean, None, f"{name}_fixed", finite("logvar", logvar)

    def linear_kernel(self, outputs: int, shared: Parameter | None) -> tuple[str, float, Parameter | None]:
        """Returns the kernel's name, its scalar and the shared logvar.

        Raises:
            ValueError: A number of parameters other than two, or a variance option beside a logvar.
        """
        name = "gaussian_sigmoid" if self.sigmoid_means else "gaussian"
        if outputs == 1 and shared is None:
            shared = math.log(self.variance)
        elif self.variance != 1.0:
            raise ValueError(
                f"variance is {self.variance}, but recon is a LinearOutput, which has its own; leave one out"
            )
        super().linear_kernel(outputs, shared)
        if shared is None or isinstance(shared, Tensor):
            return name, 0.0, shared
        return f"{name}_fixed", finite("logvar", shared), None

    @classmethod
    def formulas(cls) -> dict[str, Formula]:
        """Returns log p(x|z) in plain PyTorch, by kernel name."""
        found: dict[str, Formula] = {}
        for name, family in (("gaussian", cls()), ("gaussian_sigmoid", cls(sigmoid_means=True))):

            def formula(p0, target, p1, family=family):
                return family.reference((p0, p1), *target)

            found[name] = found[f"{name}_fixed"] = formula
        return found
