"""Training run in a folder, from start or checkpoint to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..data.fingerprint import check_same_data, fingerprint
from ..models import BaseVAE
from ..models.own import metadata_of
from .checkpoint import Checkpoint, Checkpoints, unpack
from .config import check_same_run
from .loop import TrainingLoop
from .metrics import Evaluation, NotFiniteError
from .progress import Progress
from .run_dir import BEST, METRICS, MODEL, RunFolder, RunFolderError, default_folder, holds_run


class Run:
    """Training run that writes metrics, models and checkpoints to its folder.

    It takes a training loop from its present state to the last epoch.

    Args:
        loop: the training loop.
        draw: draws the pictures of the model in its present state to the folder given.
        how_to_go_on: returns the command that resumes the run in the folder given, for the sentence about an interrupt.
    """

    def __init__(self, loop: TrainingLoop, draw: Callable[[RunFolder], None], how_to_go_on: Callable[[Path], str]):
        self.loop, self.state, self.config = loop, loop.state, loop.config
        self.draw, self.how_to_go_on = draw, how_to_go_on
        self.processes, self.first = loop.processes, loop.processes.is_first
        self.data = fingerprint(loop.dataset)
        # Before anything is deleted, since errors at the first epoch's end would come too late.
        self.summary_writer = _summary_writer() if self.config.tensorboard else None
        _check_can_be_written(self.state.model)
        self.last_epoch = self.config.epochs if self.config.resume else self.state.epoch + self.config.epochs
        loop.schedule.steps = loop.steps_of(self.last_epoch)
        self.opened: RunFolder | None = None  # on rank 0: has the lock, and `beside` of a new run
        self.metrics: dict[str, float] = {}
        self.seconds_before = 0.0
        try:
            data = self._begin()
        except BaseException:
            self.close()
            raise
        self.resumed = data is not None
        self._last_checkpoint = time.perf_counter() if self.resumed else -math.inf
        self.begun = time.perf_counter()
        self.stop = _Stop()

    def _begin(self) -> bytes | None:
        """Open the folder; load its checkpoint, if any, and return the bytes."""
        opened: tuple[str, bytes | None] = self._open() if self.first else ("", None)
        path, data = self.processes.share(opened)
        self.folder = RunFolder.at(path)
        self.checkpoints = Checkpoints(self.folder.path)
        if data is not None:
            self._go_on(unpack(data, self.checkpoints.path))
        return data

    def close(self) -> None:
        """Let other processes train in the folder.

        A run that never began leaves no trace there.
        """
        if self.opened is not None:
            self.opened.close()

    @property
    def _has_begun(self) -> bool:
        """Whether the folder's files are this run's, not an older run's."""
        return self.opened is None or self.opened.beside is None

    def _open(self) -> tuple[str, bytes | None]:
        """Returns the folder's path, and the bytes of the checkpoint to resume.

        A new run has None in place of the bytes.
        """
        config, name = self.config, self.loop.dataset.name
        # As a resumed run will read them from config.json.
        asked = dataclasses.replace(config, epochs=self.last_epoch, overwrite=False, resume=False)
        options = dataclasses.asdict(asked)
        path = default_folder(name) if config.out is None else Path(config.out).expanduser()
        if not (config.resume and holds_run(path)):
            self.opened = RunFolder(path if config.resume else config.out, name, options, config.overwrite)
            return str(self.opened.path), None
        folder = self.opened = RunFolder.locked(path)
        check_same_run(folder.config(), config, path)
        data, wrong = Checkpoints(path).read()
        for sentence in wrong:
            warnings.warn(f"{sentence}; the checkpoint before it is used", stacklevel=4)
        if data is None and any((path / name).exists() for name in (METRICS, MODEL)):
            raise RunFolderError(
                f"{path} holds a run without a checkpoint, which cannot go on; choose another folder, or say that it "
                "may be overwritten (--overwrite)"
            )
        if data is not None:
            self._check(unpack(data, path).numbers)
        folder.write_options(options)
        return str(folder.path), data

    def _check(self, numbers: dict[str, Any]) -> None:
        """Check a checkpoint's data, and its epochs against the number asked for.

        Raises:
            ValueError: the images differ, or more epochs are done than asked for.
        """
        check_same_data(numbers["run"]["data"], self.loop.dataset, self.data)
        if numbers["epoch"] > self.last_epoch:
            raise ValueError(
                f"epochs is {self.last_epoch}, but the run has done {numbers['epoch']}; expected as many or more, in "
                "all"
            )

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, and cut metrics.jsonl to its length at that time."""
        self.loop.load_state_dict(checkpoint)
        run = checkpoint.numbers["run"]
        self.metrics, self.seconds_before = run["metrics"], run["seconds"]
        if self.first:
            self.folder.cut_metrics(run["metrics_bytes"])

    @property
    def seconds(self) -> float:
        """Seconds of training, with the time before the run was resumed."""
        return self.seconds_before + time.perf_counter() - self.begun

    def train(self) -> dict[str, float]:
        """Train to the last epoch, or until patience runs out.

        Returns:
            The last line of metrics.jsonl.

        Raises:
            NotFiniteError: a loss, a weight or a held-out ELBO is not finite; the text says which came first.
            KeyboardInterrupt: a signal asked the run to stop, and its checkpoint is written.
        """
        loop, state = self.loop, self.state
        images = len(loop.dataset.train_images)
        done = state.epoch * images + state.metrics.count
        if state.epoch < self.last_epoch and not self._is_over() and not self.resumed:
            self._checkpoint()  # a state to return to, whatever happens
        shown = self.config.progress and self.first
        total = images * self.last_epoch
        with self.stop, self._board() as board, Progress(total, done, self.last_epoch, shown) as progress:
            try:
                while state.epoch < self.last_epoch and not self._is_over():
                    progress.begin(state.epoch + 1)
                    self._epoch(progress)
                    self._after_epoch(progress, board)
                    self._checkpoint_if_due()
                self._checkpoint()
            except NotFiniteError as error:
                raise self._explained(error) from error
        return self.metrics

    def _is_over(self) -> bool:
        """Whether `patience` epochs have passed without a better validation ELBO."""
        patience, best = self.config.patience, self.state.best
        return patience is not None and bool(best) and self.state.epoch - best["epoch"] >= patience

    def _epoch(self, progress: Progress) -> None:
        alone = self.processes.size == 1  # several processes must decide together
        for _ in self.loop.epoch(progress.add, lambda: alone and (self.stop.asked or self._is_late())):
            self._checkpoint_if_due()

    def _after_epoch(self, progress: Progress, board: Any) -> None:
        loop, state = self.loop, self.state
        averages: dict[str, Evaluation] = {"train": loop.last_epoch}
        for part in reversed(loop.held_out):  # validation, test
            averages[part] = loop.evaluate(part)
            if not math.isfinite(averages[part].elbo):
                found = loop.explain_held_out(part)
                text = f"the {part} ELBO is {averages[part].elbo} after step {state.step}"
                text = text if found is None else f"{text}: {found.text}"
                raise NotFiniteError(text, state.step)
        self.metrics = {
            "epoch": state.epoch,
            "step": state.step,
            **{
                f"{part}_{field.name}": value
                for part, average in averages.items()
                for field in dataclasses.fields(average)
                if not math.isnan(value := getattr(average, field.name))
            },
            "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
            "seconds": round(self.seconds, 3),
        }
        progress.end(averages["train"], f"test {averages['test'].elbo:.2f}")
        is_best = self._note_best(averages.get("validation"))
        if not self.first:
            return
        self._write_model(MODEL)
        if is_best:
            self._write_model(BEST)
        self.folder.append_metrics(self.metrics)
        if board is not None:
            for name, value in self.metrics.items():
                if name not in ("epoch", "step"):
                    board.add_scalar(name.replace("_", "/", 1), value, state.step)

    def _write_model(self, name: str) -> Path:
        state = self.state
        data = json.dumps(self.data)
        return self.folder.write_model(name, state.model, epoch=state.epoch, step=state.step, data=data)

    def _note_best(self, validation: Evaluation | None) -> bool:
        best = self.state.best
        if validation is None or (best and validation.elbo <= best["elbo"]):
            return False
        self.state.best = {"elbo": validation.elbo, "epoch": self.state.epoch}
        return True

    # ---- checkpoints ----

    def _checkpoint_if_due(self) -> None:
        """Write a checkpoint if it is due or a signal arrived.

        Raises:
            KeyboardInterrupt: a signal asked the run to stop; the checkpoint is written.
        """
        due = self._seconds_since_checkpoint >= self.config.checkpoint_seconds
        if self.processes.size > 1:  # all processes must decide alike
            wants = torch.tensor([float(due and self.first), float(self.stop.asked)])
            due, stop = (bool(value) for value in self.processes.sum(wants).tolist())
        else:
            stop = self.stop.asked
        if due or stop:
            self._checkpoint()
        if stop:
            raise KeyboardInterrupt

    @property
    def _seconds_since_checkpoint(self) -> float:
        return time.perf_counter() - self._last_checkpoint

    def _is_late(self) -> bool:
        """Whether a checkpoint is due before the next look at the losses."""
        return 0 < self.config.checkpoint_seconds <= self._seconds_since_checkpoint

    def _checkpoint(self) -> None:
        """Write a checkpoint, unless a loss or a weight is not finite.

        A new run's first checkpoint makes it take the place of an older run.
        """
        loop, state = self.loop, self.state
        for _ in state.metrics.read(wait=True):  # only losses that are still on a GPU
            pass
        if not loop.weights_are_finite():
            raise NotFiniteError(f"the weights are not finite after step {state.step}", state.step)
        self._last_checkpoint = time.perf_counter()
        if not self.first:
            return
        beside = None if self.opened is None else self.opened.beside
        folder = beside or self.folder
        checkpoint = state.state_dict()
        checkpoint.numbers["run"] = {
            "metrics": self.metrics,
            "metrics_bytes": folder.sync_metrics(),
            "seconds": self.seconds,
            "data": self.data,
        }
        checkpoints = Checkpoints(folder.path)
        with folder.writing(checkpoints.path.name):
            checkpoints.write(state.step, checkpoint)
        if self.opened is not None and beside is not None:
            self.opened.take_place()

    # ---- errors and interrupts ----

    def _explained(self, error: NotFiniteError) -> NotFiniteError:
        """Returns the error with its first cause and the files kept.

        The cause is found by taking the steps since the last checkpoint again.
        """
        loop, state = self.loop, self.state
        model = f"{self.folder.path / MODEL} is of epoch {self.metrics['epoch']}" if self.metrics else ""
        kept = "nothing is saved yet" if self._has_begun else f"{self.folder.path} keeps the run that was there"
        saved = model or kept
        data = self.processes.share(self.checkpoints.read()[0] if self.first and self._has_begun else None)
        found = None
        if data is not None:
            checkpoint = unpack(data, self.checkpoints.path)
            loop.load_state_dict(checkpoint)
            saved = f"{model}, the checkpoint" if model else f"the checkpoint in {self.folder.path} is"
            saved = f"{saved} of step {state.step}"
            found = loop.replay(error.step)
        what = str(error)
        if found is not None:
            what = f"{found.text}, at step {state.step + 1}"
        return NotFiniteError(
            f"training stopped because {what}; {saved} (a smaller --learning-rate or a --clip-norm may help)",
            error.step if found is None else state.step + 1,
        )

    def after_interrupt(self) -> str:
        """Save the model and its pictures, and return a sentence about it.

        Weights that are not finite are not saved.
        """
        state = self.state
        interrupted = f"interrupted after {state.epoch} epochs, {state.step} steps"
        if not self.first:
            return interrupted
        if not self._has_begun:
            return f"interrupted before the run began; {self.folder.path} keeps the one that was there"
        if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
            return f"{interrupted}; the weights are not finite, so {self.folder.path} keeps what it had"
        path = self._write_model(MODEL)
        self.draw(self.folder)
        how = self.how_to_go_on(self.folder.path)
        return f"{interrupted}; the model so far is in {path}, with pictures of it beside it, and {how} goes on"

    @contextlib.contextmanager
    def _board(self) -> Iterator[Any]:
        """Yields TensorBoard's writer, or None."""
        if self.summary_writer is None or not self.first:
            yield None
            return
        # A resumed run writes the events after its last checkpoint again.
        with self.summary_writer(str(self.folder.path), purge_step=self.state.step + 1) as board:
            yield board


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f'tensorboard is set, but TensorBoard is missing ({error}); `pip install "aevb[tensorboard]"` has it'
        ) from error
    return SummaryWriter


def _check_can_be_written(model: BaseVAE) -> None:
    try:
        metadata_of(model)
    except TypeError as error:
        raise ValueError(
            f"the options of the model, a {type(model).__name__}, cannot be written to a file ({error}); expected "
            "numbers of Python's and texts"
        ) from error


class _Stop:
    """Context in which Ctrl-C and SIGTERM ask the run to stop.

    One process stops after its present step or evaluation; several stop after the next look at the losses. A second
    signal of either kind stops the run at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Replaces only the default handlers: another handler is the caller's choice.
                if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads within the context, and restore it after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make PyTorch raise within the context for operations without a deterministic algorithm.

    Args:
        wanted: whether to do so; otherwise nothing changes.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition for determinism
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
