"""Files of a run, and their replacement by a new run's files.

The new run's first files, config.json and a checkpoint, are written beside the old ones, in a folder of their own.
Once they are whole and on the disk, that folder gets its final name, and the new run counts as the folder's run.
Whoever opens the run folder next removes the old run's files and moves the new ones to their place. This is finished
however often it is interrupted. Before the renaming nothing is removed. A file is removed only if its name is one that
a run or its answers use.

An answer is the output of a command about a run, such as `aevb sample`.
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
OWN = (CONFIG, METRICS, MODEL, BEST)  # written by training alone
TRAINED = (*OWN, *PICTURES)  # left by training
ANSWERS = ("reconstructions", "samples", "latent", "impute", "denoise", "manifold", "traverse", "interpolate")
ANSWER_FILES = (REPORT, *(name + suffix for name in ANSWERS for suffix in (".png", ".npy", ".npz")))
_NAMED = tuple(dict.fromkeys((*TRAINED, EVALUATION, *ANSWER_FILES)))
_BEGUN, _NEXT = ".next-run.part", ".next-run"


class RunFolderError(OSError):
    """Error of a run folder that is taken or cannot be written.

    Its text is a sentence.
    """


class LockedError(RunFolderError):
    """Error of a run folder in which another process or trainer trains."""


def holds_run(path: Path) -> bool:
    """Whether a folder has a file that training leaves, checkpoints aside."""
    return any((path / file).exists() for file in TRAINED)


def is_free(path: Path) -> bool:
    """Whether a folder has no file named like a run's or answer's.

    Checkpoints are not looked at.
    """
    return not any((path / file).exists() for file in _NAMED)


def check_may_be_replaced(path: Path, data: str) -> None:
    """Raises RunFolderError unless a new run may replace the folder's files.

    Args:
        path: the folder.
        data: the images that the new run is to train on.

    Raises:
        RunFolderError: the replacement would delete a file that no run wrote, or `data`.
    """
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
    """Returns the files that a run and its answers left, without checkpoints."""
    names = (*_NAMED, *(f".{name}.part" for name in _NAMED))
    found = [path / name for name in names]
    if _options(path).get("tensorboard") is True:  # otherwise another program wrote them
        found += path.glob(TENSORBOARD)
    return [file for file in found if file.is_symlink() or file.is_file()]


def _options(path: Path) -> Mapping[str, Any]:
    """Returns the contents of config.json, empty if it has no JSON object."""
    try:
        options = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, dict) else {}


def _is_of_a_run(options: Mapping[str, Any]) -> bool:
    """Whether the contents of config.json are a run's.

    Many programs have a file of that name. The run may be of a version with other options.
    """
    known = {field.name for field in fields(TrainConfig)}
    return "out" in options and (set(options) <= known or {"data", "latent_dim", "estimator"} <= set(options))


def _is_same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except OSError:  # a file is missing
        return False


# ---- beside, then in place ------------------------------------------------------------------------------------------


def begin_beside(path: Path) -> Path:
    """Returns a new empty folder for the next run's first files."""
    drop_begun(path)
    (path / _BEGUN).mkdir()
    return path / _BEGUN


def drop_begun(path: Path) -> None:
    """Remove a run that has begun beside."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path / _BEGUN)


def take_place(path: Path) -> None:
    """Put the run that has begun beside in the old run's place.

    Its files must be on the disk.
    """
    sync(path / _BEGUN)
    os.rename(path / _BEGUN, path / _NEXT)
    sync(path)
    finish_taking_place(path)


def is_taking_place(path: Path) -> bool:
    """Whether a replacement was begun and is not finished."""
    return (path / _NEXT).is_dir()


def finish_taking_place(path: Path) -> None:
    """Finish an interrupted `take_place`, wherever it stopped; otherwise do nothing."""
    begun = path / _NEXT
    if not is_taking_place(path):
        return
    for checkpoint in Checkpoints(begun).there():  # a single file, moved after the old files are removed
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
    """Lock that keeps other processes and trainers from training in a folder.

    It lasts until `release` or the process's end. On a file system without locks it does nothing.

    Args:
        path: the folder.

    Raises:
        LockedError: another process or trainer has the lock.
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
        """Release the lock."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:  # os.open may have failed
            self.release()
