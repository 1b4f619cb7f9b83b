"""Which files in a folder are a run's, and how those of a new run take the place of those of an old one.

The new run's first files, config.json and a checkpoint, are written beside, in a folder of their own. When they are
whole and on the disk that folder gets its final name, and from then on the new run is the one that is there: whoever
opens the folder next removes the old run's files and moves the new ones to their place, however often that is stopped.
Before that moment nothing is removed. No file is removed that a run did not write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import MODEL, replace, sync
from .checkpoint import FOLDER, Checkpoints
from .config import TrainConfig

CONFIG, METRICS, BEST = "config.json", "metrics.jsonl", "best.safetensors"
EVALUATION = "evaluation.json"
PICTURES = ("reconstructions.png", "samples.png", "latent.png")
TENSORBOARD = "events.out.tfevents.*"
REPORT = "report.html"
OWN = (CONFIG, METRICS, MODEL, BEST)  # what only training writes
TRAINED = (*OWN, *PICTURES)  # what training leaves
ANSWERS = ("reconstructions", "samples", "latent", "impute", "denoise", "manifold", "traverse", "interpolate")
ANSWER_FILES = (REPORT, *(name + suffix for name in ANSWERS for suffix in (".png", ".npy", ".npz")))
_NAMED = tuple(dict.fromkeys((*TRAINED, EVALUATION, *ANSWER_FILES)))
_BEGUN, _NEXT = ".next-run.part", ".next-run"


class RunFolderError(OSError):
    """The run folder is taken, or cannot be written to. Its text is a sentence."""


class LockedError(RunFolderError):
    """Another process, or another trainer of this one, is training in the folder."""


def holds_run(path: Path) -> bool:
    return any((path / file).exists() for file in TRAINED)


def is_free(path: Path) -> bool:
    """Whether no file there has a name that a run, or an answer to it, would have."""
    return not any((path / file).exists() for file in _NAMED)


def check_may_be_replaced(path: Path, data: str) -> None:
    """Raises RunFolderError where a new run in the folder would cost something that no run wrote, or `data`, the images
    that it is to train on."""
    if not (is_free(path) or _is_of_a_run(_options(path))):
        found = ", ".join(name for name in _NAMED if (path / name).exists())
        raise RunFolderError(
            f"{path} holds {found}, but no {CONFIG} of a run, so nobody knows whether a run wrote that; it is kept: "
            "choose another folder, or move it away"
        )
    for file in (*(path / name for name in _NAMED), *Checkpoints(path).there()):
        if file.is_dir() and not file.is_symlink():
            raise RunFolderError(f"{file} is a folder, which no run wrote; it is kept: choose another folder")
        if _is_same(file, Path(data).expanduser()):
            raise RunFolderError(
                f"{file} is what to train on, and would be deleted with the run that is there; move it, or choose "
                "another folder"
            )
    if os.path.lexists(path / FOLDER) and not (path / FOLDER).is_dir():
        raise RunFolderError(f"{path / FOLDER} is no folder, and checkpoints are to be in it; choose another folder")


def left_by_run(path: Path) -> list[Path]:
    """The files that a run and the answers to it left there, but for checkpoints."""
    names = (*_NAMED, *(f".{name}.part" for name in _NAMED))
    found = [path / name for name in names]
    if _options(path).get("tensorboard") is True:  # or others wrote them
        found += path.glob(TENSORBOARD)
    return [file for file in found if file.is_symlink() or file.is_file()]


def _options(path: Path) -> Mapping[str, Any]:
    """What config.json holds; nothing where that is not a run's."""
    try:
        options = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, dict) else {}


def _is_of_a_run(options: Mapping[str, Any]) -> bool:
    """Whether config.json is a run's, perhaps of a version with other options: many programs have a file so named."""
    known = {field.name for field in fields(TrainConfig)}
    return "out" in options and (set(options) <= known or {"data", "latent_dim", "estimator"} <= set(options))


def _is_same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except OSError:  # one of them is not there
        return False


# ---- beside, then in place ------------------------------------------------------------------------------------------


def begin_beside(path: Path) -> Path:
    """An empty folder for the first files of a run that is to take the place of what is there."""
    drop_begun(path)
    (path / _BEGUN).mkdir()
    return path / _BEGUN


def drop_begun(path: Path) -> None:
    """Takes back a run that has begun beside."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path / _BEGUN)


def take_place(path: Path) -> None:
    """The run that has begun beside, whose files are on the disk, is the one that is there."""
    sync(path / _BEGUN)
    os.rename(path / _BEGUN, path / _NEXT)
    sync(path)
    finish_taking_place(path)


def is_taking_place(path: Path) -> bool:
    """Whether there is something to be finished."""
    return (path / _NEXT).is_dir()


def finish_taking_place(path: Path) -> None:
    """Goes on with what `take_place` did, from wherever it was stopped; nothing where it was not."""
    begun = path / _NEXT
    if not is_taking_place(path):
        return
    for checkpoint in Checkpoints(begun).there():  # which is one, and is gone from there once the old ones are
        _unlink(Checkpoints(path).there())
        (path / FOLDER).mkdir(exist_ok=True)
        _move(checkpoint, path / FOLDER / checkpoint.name)
    if (begun / CONFIG).exists():
        _unlink(file for file in left_by_run(path) if file != path / CONFIG)
        os.replace(begun / CONFIG, path / CONFIG)
    for folder in (begun / FOLDER, begun):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(folder)
    sync(path)


def _unlink(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _move(file: Path, to: Path) -> None:
    try:
        os.replace(file, to)
    except OSError as error:
        if error.errno != errno.EXDEV:  # checkpoints/ may be a link to another disk
            raise
        replace(to, file.read_bytes(), durably=True)
        os.unlink(file)


# ---- one process at a time ------------------------------------------------------------------------------------------


class Lock:
    """Keeps other processes from training in a folder, for as long as it is held and the process lives.

    Raises LockedError where another has it. On a file system that knows no locks it does nothing.
    """

    def __init__(self, path: Path):
        self.descriptor: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise LockedError(
                f"{path} is being trained in by another process or trainer; wait for it, or choose another folder"
            ) from None
        except OSError:
            self.release()

    def release(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:  # os.open may have failed
            self.release()
