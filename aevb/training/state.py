"""The state of a training run: all that the rest of it depends on, between two steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.elbo import FusedELBO
from ..models import BaseVAE
from .checkpoint import Checkpoint
from .metrics import EpochMetrics
from .objectives import SGVB, Objective
from .optimizers import load_optimizer_state, optimizer_state


class TrainState:
    """A model, its optimizer and its loss, and how far their training is.

    Attributes:
        model, optimizer, objective: what is trained, and by what; each may be changed between epochs.
        epoch: how many epochs are done.
        step: how many steps are done.
        steps_done: how many of them are of the epoch that has begun.
        metrics: the losses of that epoch.
        best: the epoch with the best ELBO of the validation images, and that ELBO; empty without one.
    """

    metrics: EpochMetrics

    def __init__(self, model: BaseVAE, optimizer: torch.optim.Optimizer, criterion: FusedELBO, device: torch.device):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.objective: Objective = SGVB(criterion)
        self._criterion = criterion
        self.epoch = self.step = self.steps_done = 0
        self.best: dict[str, Any] = {}

    @property
    def criterion(self) -> FusedELBO:
        """The criterion of `SGVB`; setting it makes that the objective."""
        return self._criterion

    @criterion.setter
    def criterion(self, criterion: FusedELBO) -> None:
        self.objective, self._criterion = SGVB(criterion), criterion

    def state_dict(self) -> Checkpoint:
        """Returns the state, between two steps whose losses were read."""
        tensors, rest = optimizer_state(self.optimizer)
        return Checkpoint(
            {
                **{f"model.{name}": t for name, t in self.model.state_dict().items()},
                **{f"optimizer.{name}": t for name, t in tensors.items()},
                **{f"rng.{name}": t for name, t in _rng_states(self.device).items()},
            },
            {
                "epoch": self.epoch,
                "step": self.step,
                "steps_done": self.steps_done,
                "totals": self.metrics.totals,
                "best": self.best,
                "optimizer": rest,
            },
        )

    def load_state_dict(self, checkpoint: Checkpoint) -> tuple[float, float, int]:
        """Puts back what `state_dict` gave, and returns the totals of the epoch's metrics.

        PyTorch's own generators are put back too, since a model with dropout draws from them.

        Raises:
            ValueError: the state is another model's or optimizer's.
        """
        tensors, numbers = checkpoint
        try:
            self.model.load_state_dict(_under("model.", tensors))
            load_optimizer_state(self.optimizer, _under("optimizer.", tensors), numbers["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the checkpoint is of another model or optimizer: {error}") from error
        self.epoch, self.step, self.steps_done = (numbers[key] for key in ("epoch", "step", "steps_done"))
        self.best = dict(numbers["best"])
        states = _under("rng.", tensors)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)
        return tuple(numbers["totals"])


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
