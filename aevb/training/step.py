"""One step of training: a batch, its noise, the gradients, the update."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _torch
from ..models import BaseVAE
from ..ops.plain_modules import has_hooks, is_hooked
from .objectives import SGVB, Objective, Terms, objective_of


@dataclass(frozen=True)
class Outcome:
    """A step's loss, mean KL, and loss + ELBO, which is not 0 under a beta other than 1, free bits or a capacity."""

    numbers: Tensor  # (3,), float32, without a graph

    @property
    def loss(self) -> Tensor:
        return self.numbers[0]

    @property
    def kl(self) -> Tensor:
        return self.numbers[1]


@dataclass
class AutogradStep:
    """A step by autograd, for any model and objective.

    Attributes:
        objective: the loss; a `FusedELBO` stands for its `SGVB`.
        batch: (index, seed) to x of those images.
        x_scale: what multiplies x, or None.
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
        """Trains on images `index`, (B,). The noise of an image is a function of it and of the seeds, 0-d tensors."""
        outcome = self.gradients(self.batch(index, batch_seed), self.noise_seeds(noise_seed, index))
        self.update()
        return outcome

    def update(self) -> None:
        """The optimizer's step without the profiling around it, which takes 50 us, and a second at the first."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        optimizer = self.optimizer
        if has_own_step(optimizer):
            optimizer.step()
        else:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(optimizer)

    def noise_seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """Returns a seed for each z of images `index`."""
        return self.objective.seeds(seed, index)

    def gradients(self, x: Tensor, seeds: Tensor) -> Outcome:
        """Sets the gradients of the loss, as the parameters' .grad."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.terms(x, seeds)
        terms.loss.backward()
        return outcome_of(terms)

    def terms(self, x: Tensor, seeds: Tensor) -> Terms:
        """Returns the loss on x, as the batch gives it, and its parts."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.objective.terms(self.model, x, self.x_scale, seeds, self.of_whole_batch)

    def of_whole_batch(self, kl: Tensor) -> Tensor:
        """Returns kl such that its mean is that of the whole batch, which free bits and a capacity go by."""
        return kl


def outcome_of(terms: Terms) -> Outcome:
    """Returns the numbers of a loss, without its graph."""
    return Outcome(torch.stack([terms.loss.detach(), terms.kl, terms.excess]))


def has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step is more than that of a class of PyTorch's or of aevb's."""
    return bool(
        _torch.has_optimizer_hooks(optimizer)
        or "step" in vars(optimizer)  # a scheduler's
        or not type(optimizer).__module__.startswith(("torch.optim.", "aevb."))
    )


def calls_others(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step runs somebody's Python, which a graph would leave out."""
    return (
        is_hooked(model) or (isinstance(objective, SGVB) and has_hooks(objective.criterion)) or has_own_step(optimizer)
    )
