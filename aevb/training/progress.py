"""Progress of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from .metrics import Evaluation

LINE_SECONDS = 10.0  # at least, between two lines without a terminal


class Progress:
    """Progress bar, or lines where standard error is no terminal.

    A line is printed at the end of an epoch, at most every 10 s, and within a longer epoch every 30 s. The last
    epoch always has its line.

    Args:
        total: the number of images in all epochs.
        done: the number of images done before.
        epochs: the number of epochs.
        shown: whether to print.
    """

    def __init__(self, total: int, done: int, epochs: int, shown: bool):
        self.total, self.done, self.epochs, self.shown = total, done, epochs, shown
        self.epoch, self.held_out = 0, ""
        self.begun, self.begun_at = time.perf_counter(), done
        self.last_line = -LINE_SECONDS
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit=" images", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""
        self.epoch = epoch
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)

    def add(self, images: int, averages: Evaluation) -> None:
        """Count further images, and show the averages over them."""
        self.done += images
        if self.bar is not None:
            self.bar.set_postfix_str(f"{terms(averages)}{self.held_out}", refresh=False)
            self.bar.update(images)
        elif self.shown and time.perf_counter() - self.begun >= self.last_line + 3 * LINE_SECONDS:
            self._line(averages)

    def end(self, averages: Evaluation, held_out: str) -> None:
        """End an epoch.

        Args:
            averages: the epoch's averages.
            held_out: a text with the ELBO of the held-out images, shown from now on.
        """
        self.held_out = f", {held_out}"
        if self.shown and self.bar is None:
            elapsed = time.perf_counter() - self.begun
            if elapsed >= self.last_line + LINE_SECONDS or self.epoch == self.epochs:
                self._line(averages)

    def _line(self, averages: Evaluation) -> None:
        self.last_line = elapsed = time.perf_counter() - self.begun
        speed = (self.done - self.begun_at) / max(elapsed, 1e-9)
        left = (self.total - self.done) / max(speed, 1e-9)
        print(
            f"epoch {self.epoch}/{self.epochs}, {terms(averages)}{self.held_out}, {speed:,.0f} images/s, "
            f"{tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )


def terms(averages: Evaluation) -> str:
    """Returns the averages as text: the ELBO, its log-likelihood and its KL.

    A bound without these terms comes with the KL alone; where z is given there is only the log-likelihood.
    """
    if math.isnan(averages.elbo):
        return f"log-likelihood {averages.log_likelihood:.2f}"
    if math.isnan(averages.log_likelihood):
        return f"bound {averages.elbo:.2f} (KL {averages.kl:.2f})"
    return f"ELBO {averages.elbo:.2f} (log-likelihood {averages.log_likelihood:.2f}, KL {averages.kl:.2f})"
