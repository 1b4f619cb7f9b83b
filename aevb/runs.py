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

from .checkpoints import CheckpointError, Checkpoints, unpack
from .config import TrainConfig
from .files import replace, safetensors, saveable
from .models import BaseVAE

CONFIG, METRICS, MODEL, BEST = "config.json", "metrics.jsonl", "model.safetensors", "best.safetensors"
EVALUATION = "evaluation.json"
PICTURES = ("reconstructions.png", "samples.png", "latent.png")
TENSORBOARD = "events.out.tfevents.*"
REPORT = "report.html"
TRAINED = (CONFIG, METRICS, MODEL, BEST, *PICTURES)  # what training leaves
ANSWERS = ("reconstruct", "sample", "embed", "impute", "denoise", "manifold", "traverse", "interpolate")
ANSWER_FILES = (REPORT, *(name + suffix for name in ANSWERS for suffix in (".png", ".npy", ".npz")))


class RunFolderError(OSError):
    """The run folder is taken, or cannot be written to. Its text is a sentence."""


class RunFolder:
    """A folder that belongs to one run: config.json, metrics.jsonl, model.safetensors, best.safetensors, checkpoints,
    pictures, evaluation.json.

    A file is complete or absent: each is written beside its place and moved there; a line of metrics that does not fit
    is taken back.

    Args:
        path: the folder, made where it is missing; None for runs/<name>, or runs/<name>-2, -3, ... where it is taken.
        name: what the run is of.
        options: written to config.json, with `out` the folder's path.
        overwrite: delete the run that the folder holds. Other files in it are left alone.

    Raises:
        RunFolderError: the folder holds a run and overwrite is False; it cannot be made or written to; a full disk.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str] | None, name: str, options: Mapping[str, Any], overwrite: bool):
        if path is None:
            numbered = (default_folder(name if k == 1 else f"{name}-{k}") for k in itertools.count(1))
            self.path = next(p for p in numbered if overwrite or not holds_run(p))
        else:
            self.path = Path(path).expanduser()
        with self.writing(""):
            self.path.mkdir(parents=True, exist_ok=True)
        if holds_run(self.path):
            if not overwrite:
                raise RunFolderError(
                    f"{self.path} already holds a run, which is kept; choose another folder, go on with it (--resume), "
                    "or say that it may be overwritten (--overwrite)"
                )
            with self.writing(""):
                for file in (*TRAINED, EVALUATION, *ANSWER_FILES):
                    (self.path / file).unlink(missing_ok=True)
                for events in self.path.glob(TENSORBOARD):
                    events.unlink()
        with self.writing(""):
            Checkpoints(self.path).remove()  # of a run whose other files somebody took away
        self.write_options(options)

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
        wanted = (CONFIG, MODEL) if needs_model else (CONFIG,)
        missing = [name for name in wanted if not (folder.path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder.path} holds no run{' with a saved model' if needs_model else ''}: it has no "
                f"{' and no '.join(missing)}; expected a folder that `aevb train` left"
            )
        return folder

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

    def write_options(self, options: Mapping[str, Any]) -> None:
        """Writes config.json, with `out` the folder's path."""
        self.write(CONFIG, json.dumps({**options, "out": str(self.path)}, indent=2).encode() + b"\n")

    def write(self, name: str, data: bytes) -> Path:
        """Writes or replaces a file, whole or not at all."""
        with self.writing(name):
            return replace(self.path / name, data)

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
            os.fsync(file.fileno())
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
    """Writes or replaces a file that is no part of a training run, whole or not at all; makes its folder.

    Raises RunFolderError: it would replace what training left, or cannot be written.
    """
    if path.name in TRAINED and holds_run(path.parent):
        raise RunFolderError(f"{path} is a training run's own file, which is kept; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return replace(path, data)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error


def holds_run(path: Path) -> bool:
    return any((path / file).exists() for file in TRAINED)
