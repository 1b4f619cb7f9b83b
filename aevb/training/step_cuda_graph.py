"""Training step captured in a CUDA graph."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _torch
from . import cuda_graphs
from .objectives import Objective
from .step import AutogradStep, Outcome


@dataclass
class GraphStep:
    """Training step on a GPU, captured in a CUDA graph.

    Batch, noise, gradients and update are one launch. The first steps run uncaptured, and so do batches of another
    size.

    Args:
        step: the step to capture.
        batch_size: the batch size of the captured step.
        warm_up: the number of steps before the capture.
    """

    step: AutogradStep
    batch_size: int
    warm_up: int = 3

    def __post_init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given_up = False
        self.inputs: _GraphInputs | None = None

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        """Train on one batch, as `AutogradStep` does."""
        if self.given_up or len(index) != self.batch_size:
            return self.step(index, batch_seed, noise_seed)
        if self.inputs is None:
            self.inputs = _GraphInputs(index, batch_seed, noise_seed)
        self.inputs.set(index, batch_seed, noise_seed, _beta_of(self.step.objective))
        if self.warm_up > 0:
            self.warm_up -= 1
            return cuda_graphs.beside(self._take)
        if self.graph is None and not self._capture():
            return self.step(index, batch_seed, noise_seed)
        assert self.graph is not None
        self.graph.replay()
        return Outcome(self.outcome.numbers.clone())

    def _take(self) -> Outcome:
        """Take a step on the inputs' memory, which the graph reads.

        The objective's beta, a number, is read from there too.
        """
        assert self.inputs is not None
        objective = self.step.objective
        if objective.beta is None:
            return self.step(*self.inputs.tensors)
        beta, objective.beta = objective.beta, self.inputs.beta
        try:
            return self.step(*self.inputs.tensors)
        finally:
            objective.beta = beta

    def _capture(self) -> bool:
        self.step.optimizer.zero_grad(set_to_none=True)
        try:
            self.graph, self.outcome = cuda_graphs.capture(self._take)
        except RuntimeError as error:
            self.given_up = True
            first: BaseException = error  # if the end of the capture failed too, the first error is the cause
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).splitlines()[0] if str(first) else type(first).__name__
            warnings.warn(
                f"the training step could not be captured in a CUDA graph ({reason}), so it runs op by op: the same "
                "numbers, more slowly",
                stacklevel=3,
            )
        return self.graph is not None


def _beta_of(objective: Objective) -> Tensor | float:
    return 1.0 if objective.beta is None else objective.beta


class _GraphInputs:
    """Inputs that a captured step reads anew each time.

    A value is copied only when it has changed.

    Args:
        given: the index and the seeds, from which the memory is made.
    """

    def __init__(self, *given: Tensor):
        self.tensors = tuple(t.clone() for t in given)
        self.beta = torch.ones((), device=given[0].device)
        self.known: list[object] = [None] * (len(given) + 1)

    def set(self, *given: Tensor | float) -> None:
        """Set the index, the seeds and beta."""
        for i, (to, value) in enumerate(zip((*self.tensors, self.beta), given, strict=True)):
            # The version tells of writes to the same tensor.
            now = (value, _torch.version_of(value)) if isinstance(value, Tensor) else value
            before = self.known[i]
            if isinstance(value, Tensor):
                if not (isinstance(before, tuple) and before[0] is value and before[1] == _torch.version_of(value)):
                    to.copy_(value)
            elif before != value:
                to.fill_(value)
            self.known[i] = now
