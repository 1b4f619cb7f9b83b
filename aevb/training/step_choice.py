"""Choice of the training step, and the key of its cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Targets
from ..losses.elbo import FusedELBO
from ..models import BaseVAE
from ..ops.plain_modules import is_plain
from .distributed import ProcessGroup, SingleProcess
from .objectives import SGVB, Objective, objective_of
from .step import AutogradStep, calls_others
from .step_cuda_graph import GraphStep
from .step_direct import DirectStep, is_known
from .step_distributed import DistributedStep


def training_step(
    model: BaseVAE,
    objective: Objective | FusedELBO,
    optimizer: torch.optim.Optimizer,
    batch: Targets,
    batch_size: int,
    bf16: bool,
    clip_norm: float | None = None,
    processes: SingleProcess | None = None,
) -> AutogradStep | GraphStep:
    """Returns the fastest training step that model, loss and device allow."""
    loss = objective_of(objective)
    if batch.observed is not None and not loss.takes_masks():
        raise ValueError(
            f"values are missing, and the objective, a {type(loss).__name__}, has a terms_given without observed; "
            "expected terms_given(..., observed=None), which leaves out what is missing"
        )
    parts = (model, loss, optimizer, batch, batch.x_scale, bf16, clip_norm)
    if isinstance(processes, ProcessGroup):
        return DistributedStep(*parts, processes)
    direct = DirectStep.fits(model, loss, batch.images, bf16)
    step = (DirectStep if direct else AutogradStep)(*parts)
    # Streamed images are gathered by the CPU, which a graph cannot capture.
    in_graph = batch.images.is_cuda and not batch.streamed and not calls_others(model, loss, optimizer)
    return GraphStep(step, batch_size) if in_graph else step


class _Same:
    """Object in a cache key, equal to itself alone.

    The key keeps the object alive, so that no other object gets its place in memory.
    """

    __slots__ = ("value",)

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def step_key(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> tuple:
    """Cache key of a training step: rebuild the step when it changes.

    A captured step contains addresses and hyperparameters, so the key has them too.
    """
    parameters = list(model.parameters())
    found: list = [*objective.settings(), optimizer, *model.modules(), *parameters]
    found += [getattr(model, name, None) for name in ("family", "variance", "min_variance")]
    found += [is_known(model), calls_others(model, objective, optimizer)]
    found += [isinstance(objective, SGVB) and is_plain(objective.criterion, FusedELBO)]
    if any(p.is_cuda for p in parameters):
        states = [t for p in parameters for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        found += [t.data_ptr() for t in (*parameters, *states)]
        found += [repr({k: _where(v) for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    kinds = nn.Module | Tensor | torch.optim.Optimizer | Objective
    return tuple(_Same(x) if isinstance(x, kinds) else x for x in found)


def _where(option: object) -> object:
    """Returns a tensor's address; any other option stays as it is.

    A captured step reads a tensor's value anew each time.
    """
    return option.data_ptr() if isinstance(option, Tensor) else option
