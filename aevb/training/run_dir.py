"""Run folders: files that a training run leaves on disk.

They are written so that no file already there is lost.
"""

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
from ..models.own import metadata_of
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
    """Folder that belongs to one training run.

    It has config.json, metrics.jsonl, model.safetensors, best.safetensors, checkpoints, pictures and evaluation.json.
    A file is complete or absent: each is written beside its place and moved there. A line of metrics that does not fit
    on the disk is removed again.

    Args:
        path: the folder, made where it is missing. None stands for runs/<name>, or runs/<name>-2, -3, ... where that
            is taken; with overwrite, for runs/<name>.
        name: the name of the data set.
        options: the contents of config.json, in which `out` becomes the folder's path.
        overwrite: whether a run in the folder gives way. It does so once the first files of the new run are written to
            `beside`, by `take_place`. Other files in the folder are left alone.

    Raises:
        RunFolderError: the folder holds a run and overwrite is False, or has files with a run's names that no run
            wrote. Another process trains there. The folder cannot be made or written to, or the disk is full.
    """

    path: Path
    lock: Lock | None = None
    """Lock of a run that begins or resumes: no other process trains in the folder until its release."""
    beside: RunFolder | None = None
    """Folder of a new run's first files, until `take_place` puts it in the place of an older run."""

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
        """Make and lock the folder, and finish a replacement interrupted there."""
        self.path = path
        with self.writing(""):
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path)
            finish_taking_place(path)

    def _take_numbered(self, name: str) -> None:
        """Take the first numbered folder that is neither used nor locked."""
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
        """Write config.json, to `beside` where an older run is to give way."""
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
        """Put the run in `beside` in the place of the older run.

        The older run's files are removed.
        """
        with self.writing(""):
            take_place(self.path)
        self.beside = None

    def close(self) -> None:
        """Release the lock, and remove a run still in `beside`."""
        if self.beside is not None:
            with contextlib.suppress(OSError):
                drop_begun(self.path)
        if self.lock is not None:
            self.lock.release()

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Returns a folder without checks and without its lock, whatever it holds."""
        folder = cls.__new__(cls)
        folder.path = Path(path).expanduser()
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str], needs_model: bool = True) -> RunFolder:
        """Returns the folder of an existing run, for further files.

        Args:
            path: the folder.
            needs_model: whether the run must have saved a model.

        Raises:
            FileNotFoundError: the folder holds no run, or its run has saved no model.
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
        """Returns the folder of a run to resume, with its lock.

        Raises:
            RunFolderError: another process trains there.
        """
        folder = cls.at(path)
        with folder.writing(""):
            folder.lock = Lock(folder.path)
            finish_taking_place(folder.path)
            drop_begun(folder.path)
        return folder

    def finish_taking_place(self) -> None:
        """Finish the replacement of a run that a killed process left unfinished."""
        if is_taking_place(self.path):
            with contextlib.suppress(LockedError), self.writing(""):  # the process that has the lock finishes it
                lock = Lock(self.path)
                try:
                    finish_taking_place(self.path)
                finally:
                    lock.release()

    def options(self) -> dict[str, Any]:
        """Returns the contents of config.json.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is damaged.
        """
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
        """Returns the run's options.

        Raises:
            FileNotFoundError: config.json is missing.
            ValueError: config.json is damaged, or of another version.
        """
        return TrainConfig.of(self.options(), self.path / CONFIG)

    def write_options(self, options: Mapping[str, Any], out: Path | None = None, durably: bool = False) -> None:
        """Write config.json.

        Args:
            options: its contents, in which `out` becomes the folder's path.
            out: the path that the folder will have, if it is another.
            durably: whether to force the file to the disk.
        """
        text = json.dumps({**options, "out": str(out or self.path)}, indent=2)
        self.write(CONFIG, text.encode() + b"\n", durably)

    def write(self, name: str, data: bytes, durably: bool = False) -> Path:
        """Write or replace a file, whole or not at all."""
        with self.writing(name):
            return replace(self.path / name, data, durably)

    def write_model(self, name: str, model: BaseVAE, **metadata: object) -> Path:
        """Write or replace a file of weights.

        Its header has the model's sizes and `metadata`, as strings.
        """
        text = {**metadata_of(model), **{key: str(value) for key, value in metadata.items()}}
        return self.write(name, safetensors(saveable(model.state_dict()), text))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
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
        """Force metrics.jsonl to the disk, and return its length in bytes."""
        path = self.path / METRICS
        if not path.exists():
            return 0
        with self.writing(METRICS), open(path, "rb") as file:
            sync_file(file)
            return os.fstat(file.fileno()).st_size

    def cut_metrics(self, length: int) -> None:
        """Cut metrics.jsonl to its length at the time of a checkpoint.

        Args:
            length: that length in bytes, which the checkpoint has.

        Raises:
            RunFolderError: the file is shorter.
        """
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
        """Turn an OSError within the context into a RunFolderError.

        Args:
            name: the file that is written; "" for the folder itself.

        Raises:
            RunFolderError: the file cannot be written; the text gives its path and the reason.
        """
        try:
            yield
        except RunFolderError:
            raise
        except OSError as error:
            kept = "; whatever the run had saved before is kept" if name else ""
            raise RunFolderError(f"cannot write {self.path / name}: {error.strerror or error}{kept}") from error


def saved_at(path: Path) -> tuple[int, int]:
    """Returns the epoch and the step of weights that `write_model` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return int(metadata.get("epoch", 0)), int(metadata.get("step", 0))


def data_of(path: Path) -> dict[str, Any] | None:
    """Returns the fingerprint of a run's images, or None without one.

    The header of the weights has it. Weights of earlier versions lack it, and only a checkpoint has it.

    Args:
        path: the file of weights in the run's folder.
    """
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
    """Returns the folder runs/<name>, the default for a data set."""
    return Path("runs", name)


def write_answer(path: Path, data: bytes) -> Path:
    """Write or replace a command's output file, whole or not at all.

    The folder is made where it is missing. A picture of a run may be replaced.

    Raises:
        RunFolderError: the file is the run's config, model or history, or cannot be written.
    """
    if path.name in OWN and holds_run(path.parent):
        raise RunFolderError(f"{path} is a training run's own file, which is kept; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return replace(path, data)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: str | os.PathLike[str], *, best: bool = False) -> BaseVAE:
    """Returns the model of a run folder or weights file, in `eval()`.

    Args:
        path: the folder, such as `runs/digits`, or a .safetensors file.
        best: whether to load, from a folder, the model of the epoch with the best validation ELBO, not the last
            epoch's.

    Returns:
        An `aevb.VAE` or `aevb.ConvVAE` on the CPU, with `reconstruct`, `sample`, `embed`, `impute` and `denoise`.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: the file is damaged, or holds no model.

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
