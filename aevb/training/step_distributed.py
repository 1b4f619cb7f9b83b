"""Training step of several processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .distributed import SingleProcess
from .objectives import SGVB, Terms
from .step import AutogradStep, Outcome, outcome_of


class _Loss(nn.Module):
    """Loss of a step as a module, for DistributedDataParallel to wrap."""

    def __init__(self, step: AutogradStep):
        super().__init__()
        self.model = step.model  # DistributedDataParallel finds the parameters in it
        self.terms = step.terms

    def forward(self, x: Tensor, seeds: Tensor, observed: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self.terms(x, seeds, observed))


@dataclass
class DistributedStep(AutogradStep):
    """Training step in which each process takes its part of the batch.

    DistributedDataParallel adds up the processes' gradients. But for the order of additions, the sum is the gradient
    that one process would have. The outcome is of this process's part.

    Args:
        processes: the processes that train together.
    """

    processes: SingleProcess | None = None
    share: float = field(default=1.0, init=False)  # this process's part of the batch

    def __post_init__(self) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().__post_init__()
        self.parallel = DistributedDataParallel(_Loss(self), gradient_as_bucket_view=True)

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        """Train on one batch, of which each process takes its part."""
        assert self.processes is not None
        part = self.processes.part(index)
        # DistributedDataParallel averages over processes. A process without an image takes part with weight 0.
        self.share = len(part) / len(index)
        weight = self.share * self.processes.size
        part = part if len(part) else index[:1]
        self.optimizer.zero_grad(set_to_none=True)
        x, seeds = self.batch(part, batch_seed), self.noise_seeds(noise_seed, part)
        terms = Terms(*self.parallel(x, seeds, self.observed(part)))
        (weight * terms.loss).backward()
        self.update()
        return outcome_of(terms)

    def of_whole_batch(self, kl: Tensor) -> Tensor:
        """Returns the KL with its mean shifted to the whole batch's mean.

        Only free bits and a capacity depend on that mean: without them the KL is returned as it is.
        """
        criterion = self.objective.criterion if isinstance(self.objective, SGVB) else None
        if criterion is None or (criterion.free_bits is None and criterion.capacity is None):
            return kl
        assert self.processes is not None
        mean = kl.detach().mean(0)
        return kl + (self.processes.sum(self.share * mean).to(kl) - mean)
