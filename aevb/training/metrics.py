"""What the steps of an epoch gave, and their averages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import SingleProcess
from .objectives import Reports


@dataclass(frozen=True)
class Evaluation:
    """Averages per datapoint, in nats: elbo = log_likelihood - kl.

    While "iwae" or "dreg" train, elbo is their bound, which has no such terms: log_likelihood is NaN. Where z is given,
    there is log_likelihood alone.
    """

    elbo: float
    log_likelihood: float
    kl: float


class NotFiniteError(FloatingPointError):
    """Something is not finite. Its text is a sentence; `step` is the first step that saw it."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class EpochMetrics:
    """The losses of an epoch's steps. They are written where they are, and read without waiting for a GPU.

    The sums are the same whenever they are read, as long as it is after the same steps.
    """

    def __init__(
        self,
        processes: SingleProcess,
        reports: Reports,
        totals: tuple[float, float, int] = (0.0, 0.0, 0),
        constant: float = 0.0,
    ):
        """`reports`: what an objective's loss is minus. `constant`: what log p(x|z) has that the loss leaves out."""
        self.processes, self.device, self.reports, self.constant = processes, processes.device, reports, constant
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.rows: list[Tensor] = []
        self.pending: list[tuple[list[int], list[int], Tensor, torch.cuda.Event | None]] = []
        self.elbo, self.kl, self.count = totals

    @property
    def totals(self) -> tuple[float, float, int]:
        """The sums over the images that were read; a new ledger goes on from them."""
        return self.elbo, self.kl, self.count

    def add(self, step: int, size: int, numbers: Tensor) -> None:
        """A step's `Outcome.numbers`; size is the number of images."""
        self.steps.append(step)
        self.sizes.append(size)
        self.rows.append(numbers)

    def read(self, wait: bool) -> Iterator[tuple[int, Evaluation]]:
        """(images, averages) of what has arrived since the last call; with `wait`, of everything.

        Raises NotFiniteError, naming the step and the term, where a loss is not finite.
        """
        if self.rows:
            numbers, event = torch.stack(self.rows), None
            if self.device.type == "cuda":
                numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.pending.append((self.steps, self.sizes, numbers, event))
            self.steps, self.sizes, self.rows = [], [], []
        # Processes read together, so none may go by what has arrived for it.
        wait = wait or self.processes.size > 1
        while self.pending and (wait or self.pending[0][3] is None or self.pending[0][3].query()):
            steps, sizes, numbers, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            weights = torch.tensor(sizes, dtype=torch.float64).unsqueeze(1)
            # An image has weight 0 where a process had none left of a small batch.
            sums = torch.cat([numbers.double() * weights, weights], 1)
            losses, kls, excess, images = self.processes.sum(sums).unbind(1)
            _check_finite(steps, losses, kls)
            elbos, count = excess - losses, int(images.sum())
            for elbo, kl in zip(elbos.tolist(), kls.tolist(), strict=True):  # whenever they are read, in this order
                self.elbo, self.kl = self.elbo + elbo, self.kl + kl
            self.count += count
            yield count, self._averages(float(elbos.sum()), float(kls.sum()), count)

    @property
    def average(self) -> Evaluation:
        """The averages of what was read, each image with the same weight."""
        return self._averages(self.elbo, self.kl, self.count)

    def _averages(self, elbo: float, kl: float, count: int) -> Evaluation:
        reported = elbo / count + self.constant
        if self.reports == "log_likelihood":  # of z that are given
            return Evaluation(math.nan, reported, math.nan)
        log_likelihood = math.nan if self.reports == "bound" else (elbo + kl) / count + self.constant
        return Evaluation(reported, log_likelihood, kl / count)


def _check_finite(steps: list[int], losses: Tensor, kls: Tensor) -> None:
    for i in (~losses.isfinite()).nonzero().flatten().tolist():
        finite_kl = kls[i].isfinite()
        term, value = ("log-likelihood", -losses[i]) if finite_kl else ("KL divergence", kls[i])
        raise NotFiniteError(f"the {term} is {float(value)} at step {steps[i]}", steps[i])
