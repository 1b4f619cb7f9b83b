"""Losses of an epoch's steps, and their averages."""

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

    Under "iwae" and "dreg", elbo is their bound, which has no such terms: log_likelihood is NaN. Where z is given,
    elbo and kl are NaN.
    """

    elbo: float
    log_likelihood: float
    kl: float


class NotFiniteError(FloatingPointError):
    """Error of a loss, weight or ELBO that is not finite.

    Its text is a sentence.

    Attributes:
        step: the first step that saw it.
    """

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class EpochMetrics:
    """Losses of an epoch's steps, read without waiting for a GPU.

    The losses stay on their device until they are read. The sums after a step do not depend on when they are read.

    Args:
        processes: the processes that train together.
        reports: the quantity that the loss is minus: "elbo", "bound" or "log_likelihood".
        totals: the sums to continue from, as `totals` has them.
        constant: the part of log p(x|z) that the loss leaves out, for each datapoint.
    """

    def __init__(
        self,
        processes: SingleProcess,
        reports: Reports,
        totals: tuple[float, float, int] = (0.0, 0.0, 0),
        constant: float = 0.0,
    ):
        self.processes, self.device, self.reports, self.constant = processes, processes.device, reports, constant
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.rows: list[Tensor] = []
        self.pending: list[tuple[list[int], list[int], Tensor, torch.cuda.Event | None]] = []
        self.elbo, self.kl, self.count = totals

    @property
    def totals(self) -> tuple[float, float, int]:
        """Sums of ELBO and KL over the images read, and their number.

        A new `EpochMetrics` can continue from them.
        """
        return self.elbo, self.kl, self.count

    def add(self, step: int, size: int, numbers: Tensor) -> None:
        """Add the losses of a step.

        Args:
            step: the number of the step.
            size: the number of images in it.
            numbers: its `Outcome.numbers`.
        """
        self.steps.append(step)
        self.sizes.append(size)
        self.rows.append(numbers)

    def read(self, wait: bool) -> Iterator[tuple[int, Evaluation]]:
        """Yields averages over the steps whose losses arrived since the last call.

        Args:
            wait: whether to wait for the losses of all steps.

        Yields:
            The number of images, and the averages over them.

        Raises:
            NotFiniteError: a loss is not finite; the text names the step and the term.
        """
        if self.rows:
            numbers, event = torch.stack(self.rows), None
            if self.device.type == "cuda":
                numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.pending.append((self.steps, self.sizes, numbers, event))
            self.steps, self.sizes, self.rows = [], [], []
        # The sum is over processes, so all must read the same steps, whatever has arrived.
        wait = wait or self.processes.size > 1
        while self.pending and (wait or self.pending[0][3] is None or self.pending[0][3].query()):
            steps, sizes, numbers, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            weights = torch.tensor(sizes, dtype=torch.float64).unsqueeze(1)
            # A process without images of a small batch took another image, which has weight 0 here.
            sums = torch.cat([numbers.double() * weights, weights], 1)
            losses, kls, excess, images = self.processes.sum(sums).unbind(1)
            _check_finite(steps, losses, kls)
            elbos, count = excess - losses, int(images.sum())
            for elbo, kl in zip(elbos.tolist(), kls.tolist(), strict=True):  # fixed order of additions
                self.elbo, self.kl = self.elbo + elbo, self.kl + kl
            self.count += count
            yield count, self._averages(float(elbos.sum()), float(kls.sum()), count)

    @property
    def average(self) -> Evaluation:
        """Averages over the losses read, each image with the same weight."""
        return self._averages(self.elbo, self.kl, self.count)

    def _averages(self, elbo: float, kl: float, count: int) -> Evaluation:
        reported = elbo / count + self.constant
        if self.reports == "log_likelihood":  # z is given
            return Evaluation(math.nan, reported, math.nan)
        log_likelihood = math.nan if self.reports == "bound" else (elbo + kl) / count + self.constant
        return Evaluation(reported, log_likelihood, kl / count)


def _check_finite(steps: list[int], losses: Tensor, kls: Tensor) -> None:
    for i in (~losses.isfinite()).nonzero().flatten().tolist():
        finite_kl = kls[i].isfinite()
        term, value = ("log-likelihood", -losses[i]) if finite_kl else ("KL divergence", kls[i])
        raise NotFiniteError(f"the {term} is {float(value)} at step {steps[i]}", steps[i])
