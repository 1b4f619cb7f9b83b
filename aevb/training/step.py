"""Training step: batch, noise, gradients and update."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _torch
from ..data import Targets
from ..models import BaseVAE
from ..ops.plain_modules import has_hooks, is_hooked
from .objectives import SGVB, Objective, Terms, objective_of


@dataclass(frozen=True)
class Outcome:
    """Loss, mean KL, and loss + ELBO of a step.

    The last is not 0 under a beta other than 1, free bits or a capacity.
    """

    numbers: Tensor  # (3,), float32, without a graph

    @property
    def loss(self) -> Tensor:
        """Loss of the batch, 0-d."""
        return self.numbers[0]

    @property
    def kl(self) -> Tensor:
        """Mean KL of the batch, 0-d."""
        return self.numbers[1]


@dataclass
class AutogradStep:
    """Training step by autograd, for any model and objective.

    Args:
        model: the VAE.
        objective: the loss; a `FusedELBO` stands for its `SGVB`.
        optimizer: the optimizer of the model's parameters.
        batch: returns x of the images with an index, from (index, seed).
        x_scale: the factor of x, or None.
        bf16: whether the matrix products are in bfloat16.
        clip_norm: the largest norm of the gradient, to which it is scaled down; None for no limit.
    """

    model: BaseVAE
    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: Callable[[Tensor, Tensor], Tensor]
    x_scale: float | None
    bf16: bool = False
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        self.objective = objective_of(self.objective)

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        """Train on one batch.

        The noise of an image is a function of the image's number and the seeds.

        Args:
            index: (B,), the numbers of the images.
            batch_seed: 0-d, the seed of the images' bits.
            noise_seed: 0-d, the seed of the samples of z.
        """
        x, seeds = self.batch(index, batch_seed), self.noise_seeds(noise_seed, index)
        outcome = self.gradients(x, seeds, self.observed(index))
        self.update()
        return outcome

    def update(self) -> None:
        """Clip the gradients if `clip_norm` is set, and update the parameters.

        PyTorch's profiling around an optimizer's step is left out: it takes 50 us, and a second at the first step.
        """
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        optimizer = self.optimizer
        if has_own_step(optimizer):
            optimizer.step()
        else:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(optimizer)

    def observed(self, index: Tensor) -> Tensor | None:
        """Returns the masks of the images `index`, None where nothing is missing."""
        return self.batch.mask(index) if isinstance(self.batch, Targets) else None

    def noise_seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """Returns the seed of each z of the images `index`."""
        return self.objective.seeds(seed, index)

    def gradients(self, x: Tensor, seeds: Tensor, observed: Tensor | None = None) -> Outcome:
        """Set the gradients of the loss as the parameters' `.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.terms(x, seeds, observed)
        terms.loss.backward()
        return outcome_of(terms)

    def terms(self, x: Tensor, seeds: Tensor, observed: Tensor | None = None) -> Terms:
        """Returns the loss on x, as `batch` returns it, and its parts."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.objective.terms(self.model, x, self.x_scale, seeds, self.of_whole_batch, observed)

    def of_whole_batch(self, kl: Tensor) -> Tensor:
        """Returns the KL with its mean shifted to the whole batch's mean.

        Free bits and a capacity depend on that mean.
        """
        return kl


def outcome_of(terms: Terms) -> Outcome:
    """Returns the outcome of a loss and its parts, without their graph."""
    return Outcome(torch.stack([terms.loss.detach(), terms.kl, terms.excess]))


def has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a user's code takes part in the optimizer's step.

    It does in a hook, a replaced `step`, or a class from outside `torch.optim` and aevb.
    """
    return bool(
        _torch.has_optimizer_hooks(optimizer)
        or "step" in vars(optimizer)  # a scheduler replaces it
        or not type(optimizer).__module__.startswith(("torch.optim.", "aevb."))
    )


def calls_others(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step runs user-defined Python, which a CUDA graph would skip."""
    return (
        is_hooked(model) or (isinstance(objective, SGVB) and has_hooks(objective.criterion)) or has_own_step(optimizer)
    )
