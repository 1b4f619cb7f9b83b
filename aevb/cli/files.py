"""The files of an answer: where they go, and in which forms."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..training import pictures
from ..training.run_dir import write_answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training.trainer import Trainer


@dataclass(frozen=True)
class Answer:
    """What a command found: the files that it wrote, and a text to print."""

    files: list[Path]
    text: str = ""

    def __str__(self) -> str:
        files = "\n".join(f"written  {path}" for path in self.files)
        return f"{self.text}\n{files}" if self.text else files


class Out:
    """Where an answer goes: files of the run folder, or what `out` says: a file, whose suffix says which of the forms,
    that one alone, or a folder for the files under their usual names. Checked before anything is computed.

    Raises ValueError for another suffix, or where a file would replace the run's data, or one of `inputs`, which are
    asked about.
    """

    def __init__(
        self,
        trainer: Trainer,
        name: str,
        out: str | None,
        forms: Sequence[str],
        always: Sequence[str],
        inputs: Sequence[str | None] = (),
    ):
        self.always = list(always)
        path = trainer.folder.path if out is None else Path(out).expanduser()
        if out is None or path.is_dir() or not path.suffix:
            self.stem = path / name
        elif path.suffix in forms:
            self.stem, self.always = path.with_suffix(""), [path.suffix]
        else:
            raise ValueError(f"out is {out!r}; expected a name that ends in {' or '.join(forms)}, or a folder")
        taken = {Path(given).expanduser().resolve() for given in inputs if given}
        data = Path(trainer.config.data).expanduser().resolve()
        for path in map(self._path, self.always):
            if path.resolve() == data:
                raise ValueError(
                    f"{path} would be replaced by the answer, and it is what the run was trained on; choose another out"
                )
            if path.resolve() in taken:
                raise ValueError(
                    f"{path} would be replaced by the answer, and it is what was asked about; choose another out"
                )

    def _path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def write(self, **forms: Callable[[], bytes]) -> list[Path]:
        """Each form by its suffix without the dot, made only where it is wanted."""
        return [write_answer(self._path(s), forms[s[1:]]()) for s in self.always]


Run = str | PathLike[str]


def forms(save_array: bool) -> list[str]:
    return [".png", ".npy"] if save_array else [".png"]


def npy(array: Tensor) -> Callable[[], bytes]:
    return lambda: to_bytes(lambda file: np.save(file, array.cpu().numpy(), allow_pickle=False))


def png(figure: Callable[[], Figure]) -> Callable[[], bytes]:
    return lambda: pictures.png(figure())


def to_bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def at_least_1(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")
