"""The Bernoulli likelihood (Kingma & Welling 2013, appendix C.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli

from .base import Formula, Likelihood, Parameter, register
from .outputs import LinearLogits


@register
@dataclasses.dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Bernoulli likelihood from logits l, or from probabilities; x may be soft.

    log p(x|z) is ``sum_i (x_i l_i - log(1 + exp(l_i)))`` with x in [0, 1].

    Args:
        from_probs: The parameter holds probabilities p. log p(x|z) is then ``sum_i (x_i log p_i + (1 - x_i) log(1 -
            p_i))``, each logarithm clamped at -100, as in `F.binary_cross_entropy`.
    """

    from_probs: bool = False
    name: ClassVar[str] = "bernoulli"
    params: ClassVar[tuple[str, ...]] = ("logits",)
    support: ClassVar[tuple[float, float]] = (0.0, 1.0)
    of_bits: ClassVar[bool] = True
    noise: ClassVar[tuple[str, ...]] = ("flip", "sigma")

    def distribution(self, output: Tensor) -> TorchBernoulli:  # type: ignore[override]
        """Returns Bernoulli(p) of logits or probabilities."""
        return TorchBernoulli(**{"probs" if self.from_probs else "logits": output}, validate_args=False)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each element, for x in [0, 1]."""
        (output,) = params
        assert isinstance(output, Tensor)
        entropy = F.binary_cross_entropy if self.from_probs else F.binary_cross_entropy_with_logits
        return -entropy(output, x.expand_as(output), reduction="none")

    def sample(self, params: tuple[Parameter, ...], noise: Tensor) -> Tensor:
        """Returns bits, by the normals' cumulative probability below the mean."""
        return (torch.special.ndtr(noise) < self.mean(params)).to(noise.dtype)

    def parameters(self, recon: Any) -> tuple[Parameter, ...]:
        """Returns the logits or probabilities that recon holds.

        Raises:
            ValueError: recon is of another likelihood.
        """
        if isinstance(recon, tuple) and not isinstance(recon, LinearLogits):
            raise ValueError(
                f"recon is a {type(recon).__name__}; expected likelihood='gaussian' with it, not {self.name!r}"
            )
        return super().parameters(recon)

    def kernel_arguments(self, params: tuple[Parameter, ...]) -> tuple[Tensor, Tensor | None, str, float]:
        """Returns p0, no p1, the name of the kernel, and no scalar."""
        (output,) = params
        assert isinstance(output, Tensor)
        return output, None, "bernoulli_probs" if self.from_probs else "bernoulli_logits", 0.0

    def linear_kernel(self, outputs: int, shared: Parameter | None) -> tuple[str, float, Parameter | None]:
        """Returns the kernel's name, its scalar and no shared parameter.

        Raises:
            ValueError: from_probs is set, or the last layer gives another number than one per element.
        """
        if self.from_probs:
            raise ValueError("from_probs is set, but LinearLogits are logits; leave it out")
        super().linear_kernel(outputs, shared)
        return "bernoulli_logits", 0.0, None

    @classmethod
    def formulas(cls) -> dict[str, Formula]:
        """Returns log p(x|z) in plain PyTorch, by kernel name."""
        logits, probs = cls(), cls(from_probs=True)
        return {
            "bernoulli_logits": lambda p0, target, _: logits.reference((p0,), *target),
            "bernoulli_probs": lambda p0, target, _: probs.reference((p0,), *target),
        }
