"""The files of an answer: where they go, and in which forms."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..training import pictures
from ..training.run_dir import write_answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training.trainer import Trainer
    from .options import OutputOptions


@dataclass(frozen=True)
class Answer:
    """Answer of a command: the files that it wrote, and a text.

    Attributes:
        files: Paths of the files.
        text: Lines to print before their names.
    """

    files: list[Path]
    text: str = ""

    def __str__(self) -> str:
        files = "\n".join(f"written  {path}" for path in self.files)
        return f"{self.text}\n{files}" if self.text else files


class Out:
    """Place of an answer's files, checked before anything is computed.

    It is the run folder, or `out`: a folder for the files under their usual names, or one file. The suffix of this file
    says its form, and no other is written.

    Args:
        trainer: The run that is asked.
        name: The files' usual name, without a suffix.
        out: A file or folder; None for the run folder.
        forms: Suffixes that a file may have.
        always: Suffixes of the files in a folder.
        inputs: Paths that the command reads, and may not replace.

    Raises:
        ValueError: Another suffix, or a file that would replace the run's data or one of `inputs`.
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

    @classmethod
    def of_images(
        cls,
        trainer: Trainer,
        name: str,
        output: OutputOptions,
        inputs: Sequence[str | None] = (),
        array: bool = False,
    ) -> Out:
        """Returns the place of a picture, and of its array if wanted."""
        always = [".png", ".npy"] if output.save_array or array else [".png"]
        return cls(trainer, name, output.out, (".png", ".npy"), always, inputs)

    def _path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def write(self, **forms: Callable[[], bytes]) -> list[Path]:
        """Write the files.

        Args:
            **forms: Makers of each form by its suffix without the dot; a form that is not wanted is not made.

        Returns:
            The files' paths.
        """
        return [write_answer(self._path(s), forms[s[1:]]()) for s in self.always]


def npy(array: Tensor) -> Callable[[], bytes]:
    """Returns the maker of a .npy file."""
    return lambda: to_bytes(lambda file: np.save(file, array.cpu().numpy(), allow_pickle=False))


def png(figure: Callable[[], Figure]) -> Callable[[], bytes]:
    """Returns the maker of a .png file, which draws the figure."""
    return lambda: pictures.png(figure())


def to_bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    """Returns the bytes that a function writes to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def at_least_1(**counts: int) -> None:
    """Check that options are positive.

    Raises:
        ValueError: A count is below 1; the sentence has its name.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")
