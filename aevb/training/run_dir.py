"""Run folders: what a training run leaves on disk, written so that nothing already there is lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import MODEL, replace, safetensors, saveable, sync_file
from ..models import BaseVAE
from .checkpoint import CheckpointError, Checkpoints, unpack
from .config import TrainConfig
from .run_files import (
    ANSWER_FILES,
    BEST,
    CONFIG,
    EVALUATION,
    METRICS,
    OWN,
    PICTURES,
    REPORT,
    TENSORBOARD,
    Lock,
    LockedError,
    RunFolderError,
    begin_beside,
    check_may_be_replaced,
    drop_begun,
    finish_taking_place,
    holds_run,
    is_free,
    is_taking_place,
    left_by_run,
    take_place,
)

__all__ = [
    "ANSWER_FILES",
    "BEST",
    "CONFIG",
    "EVALUATION",
    "METRICS",
    "MODEL",
    "PICTURES",
    "REPORT",
    "TENSORBOARD",
    "RunFolder",
    "RunFolderError",
    "data_of",
    "default_folder",
    "holds_run",
    "load",
    "saved_at",
    "write_answer",
]


class RunFolder:
    """A folder that belongs to one run: config.json, metrics.jsonl, model.safetensors, best.safetensors, checkpoints,
    pictures, evaluation.json.

    A file is complete or absent: each is written beside its place and moved there; a line of metrics that does not fit
    is taken back.

    Args:
        path: the folder, made where it is missing; None for runs/<name>, or runs/<name>-2, -3, ... where it is taken.
        name: what the run is of.
        options: written to config.json, with `out` the folder's path.
        overwrite: a run that the folder holds gives way, once the first files of this one are written: `beside`, then
            `take_place`. Other files in it are left alone.

    Raises:
        RunFolderError: the folder holds a run and overwrite is False, or files with a run's names that no run wrote;
            another process trains there; it cannot be made or written to; a full disk.
    """

    path: Path
    lock: Lock | None = None
    """Of the folder of a run that begins or goes on: until it is released, no other process trains there."""
    beside: RunFolder | None = None
    """Where the first files of a run go that is to take the place of another; then `take_place`."""

    def __init__(self, path: str | os.PathLike[str] | None, name: str, options: Mapping[str, Any], overwrite: bool):
        if path is None and not overwrite:
            self._take_numbered(name)
        else:
            self._take(default_folder(name) if path is None else Path(path).expanduser())
        try:
            self._begin(options, overwrite)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path) -> None:
        """Makes the folder, and locks it."""
        self.path = path
        with self.writing(""):
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path)
            finish_taking_place(path)

    def _take_numbered(self, name: str) -> None:
        """The first folder that nobody has, or is about to."""
        for k in itertools.count(1):
            path = default_folder(name if k == 1 else f"{name}-{k}")
            if not is_free(path):
                continue
            with contextlib.suppress(LockedError):
                self._take(path)
                if is_free(path):
                    return
            self.close()

    def _begin(self, options: Mapping[str, Any], overwrite: bool) -> None:
        if holds_run(self.path) and not overwrite:
            raise RunFolderError(
                f"{self.path} already holds a run, which is kept; choose another folder, go on with it (--resume), "
                "or say that it may be overwritten (--overwrite)"
            )
        check_may_be_replaced(self.path, str(options.get("data", "")))
        with self.writing(""):
            drop_begun(self.path)
            if left_by_run(self.path) or Checkpoints(self.path).there():
                self.beside = RunFolder.at(begin_beside(self.path))
        (self.beside or self).write_options(options, self.path, durably=self.beside is not None)

    def take_place(self) -> None:
        """The run that has begun beside is the one that is there: the files of the one before are removed."""
        with self.writing(""):
            take_place(self.path)
        self.beside = None

    def close(self) -> None:
        """Lets others train there; a run that has begun beside, and did not take its place, is taken back."""
        if self.beside is not None:
            with contextlib.suppress(OSError):
                drop_begun(self.path)
        if self.lock is not None:
            self.lock.release()

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that is there, whatever it holds."""
        folder = cls.__new__(cls)
        folder.path = Path(path).expanduser()
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str], needs_model: bool = True) -> RunFolder:
        """The folder of a run that is there, for more to be written to it.

        Raises FileNotFoundError where there is no run, or none that saved a model.
        """
        folder = cls.at(path)
        folder.finish_taking_place()
        wanted = (CONFIG, MODEL) if needs_model else (CONFIG,)
        missing = [name for name in wanted if not (folder.path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder.path} holds no run{' with a saved model' if needs_model else ''}: it has no "
                f"{' and no '.join(missing)}; expected a folder that `aevb train` left"
            )
        return folder

    @classmethod
    def locked(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that holds a run, to go on with. Raises RunFolderError where another process trains there."""
        folder = cls.at(path)
        with folder.writing(""):
            folder.lock = Lock(folder.path)
            finish_taking_place(folder.path)
            drop_begun(folder.path)
        return folder

    def finish_taking_place(self) -> None:
        """What a process did not come to that was killed while its run took the place of another."""
        if is_taking_place(self.path):
            with contextlib.suppress(LockedError), self.writing(""):  # where one is at it, that one finishes
                lock = Lock(self.path)
                try:
                    finish_taking_place(self.path)
                finally:
                    lock.release()

    def options(self) -> dict[str, Any]:
        """What config.json holds. Raises ValueError where it is damaged, FileNotFoundError where it is missing."""
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{self.path} has no {CONFIG}, so nobody knows what its run is of; expected a folder that `aevb train` "
                "left"
            )
        try:
            options = json.loads((self.path / CONFIG).read_text())
            if not isinstance(options, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise ValueError(f"{self.path / CONFIG} is damaged: {error}") from error
        return options

    def config(self) -> TrainConfig:
        """The run's options. Raises ValueError where config.json is damaged, or of another version."""
        return TrainConfig.of(self.options(), self.path / CONFIG)

    def write_options(self, options: Mapping[str, Any], out: Path | None = None, durably: bool = False) -> None:
        """Writes config.json, with `out` the folder's path, or the one that it will have."""
        text = json.dumps({**options, "out": str(out or self.path)}, indent=2)
        self.write(CONFIG, text.encode() + b"\n", durably)

    def write(self, name: str, data: bytes, durably: bool = False) -> Path:
        """Writes or replaces a file, whole or not at all."""
        with self.writing(name):
            return replace(self.path / name, data, durably)

    def write_model(self, name: str, model: BaseVAE, **metadata: object) -> Path:
        """Writes or replaces a file of weights, with the model's sizes and `metadata` as strings in its header."""
        text = {**model.metadata(), **{key: str(value) for key, value in metadata.items()}}
        return self.write(name, safetensors(saveable(model.state_dict()), text))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        line = json.dumps(metrics).encode() + b"\n"
        with self.writing(METRICS), open(self.path / METRICS, "ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise

    def sync_metrics(self) -> int:
        """Forces metrics.jsonl to the disk; its length in bytes."""
        path = self.path / METRICS
        if not path.exists():
            return 0
        with self.writing(METRICS), open(path, "rb") as file:
            sync_file(file)
            return os.fstat(file.fileno()).st_size

    def cut_metrics(self, length: int) -> None:
        """Takes back what metrics.jsonl has beyond its first `length` bytes, which a checkpoint knows. Raises
        RunFolderError where it has fewer."""
        path = self.path / METRICS
        data = path.read_bytes() if path.exists() else b""
        if len(data) < length:
            raise RunFolderError(
                f"{path} has {len(data)} bytes, but had {length} when the checkpoint was written; put it back, or "
                "start the run anew (--overwrite)"
            )
        if len(data) > length:
            with self.writing(METRICS):
                replace(path, data[:length], durably=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except RunFolderError:
            raise
        except OSError as error:
            kept = "; whatever the run had saved before is kept" if name else ""
            raise RunFolderError(f"cannot write {self.path / name}: {error.strerror or error}{kept}") from error


def saved_at(path: Path) -> tuple[int, int]:
    """The epoch and the step of the weights that `write_model` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return int(metadata.get("epoch", 0)), int(metadata.get("step", 0))


def data_of(path: Path) -> dict[str, Any] | None:
    """What the run noted of its images: with the weights, or before that only in a checkpoint; None where nowhere."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        noted = (file.metadata() or {}).get("data")
    if noted is not None:
        return json.loads(noted)
    try:
        data, _ = Checkpoints(path.parent).read()
    except CheckpointError:
        return None
    return None if data is None else unpack(data, path).numbers["run"]["data"]


def default_folder(name: str) -> Path:
    return Path("runs", name)


def write_answer(path: Path, data: bytes) -> Path:
    """Writes or replaces an answer's file, whole or not at all; makes its folder. A picture may be drawn anew.

    Raises RunFolderError: it would replace the run's model or history, or cannot be written.
    """
    if path.name in OWN and holds_run(path.parent):
        raise RunFolderError(f"{path} is a training run's own file, which is kept; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return replace(path, data)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: str | os.PathLike[str], *, best: bool = False) -> BaseVAE:
    """The model of a run's folder, or of a file of weights, in `eval()`.

    Args:
        path: the folder, `runs/digits` say, or a .safetensors file.
        best: of a folder, the model of the epoch with the best ELBO of the validation images, not the last epoch's.

    Returns:
        An `aevb.VAE` or `aevb.ConvVAE`, on the CPU: to `reconstruct`, `sample`, `embed`, `impute`, `denoise`.

    Raises:
        FileNotFoundError: there is no such run or file. ValueError: the file is damaged, or holds something else.

    Example::

        model = aevb.load("runs/digits")
        digits = model.sample(16)
    """
    path = Path(path)
    if best and path.is_dir():
        if not (path / BEST).is_file():
            raise FileNotFoundError(
                f"{path} has no {BEST}; expected a run that was trained with validation images, or best=False"
            )
        path /= BEST
    return BaseVAE.load(path).eval()
