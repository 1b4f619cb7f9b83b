"""What a reader of files gives, before it is split and converted."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from .memmap import MappedImages


def name_of(path: Path) -> str:
    """What a data set is called, and its run's folder: never nothing, which would be the folder of all runs."""
    return path.name.strip(".").split(".")[0] or "data"


class Part(NamedTuple):
    """Arrays as a file has them: images (N, ...), labels (N,) or None; and the file, for errors."""

    images: np.ndarray | MappedImages
    labels: np.ndarray | None
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.file_shape if isinstance(self.images, MappedImages) else self.images.shape


@dataclass(frozen=True)
class Source:
    """The parts that a source has: "train", perhaps "test" and "validation". max_value is None where it is to be found
    from the values; num_test, of a source without a test part, how many to hold out, or None for a tenth;
    label_names, what the labels 0, 1, ... are called, where a source says it."""

    name: str
    parts: Mapping[str, Part]
    max_value: int | None = None
    image_shape: tuple[int, ...] | None = None
    num_test: int | None = None
    note: str = ""
    label_names: tuple[str, ...] = ()


def check_labels(labels: np.ndarray, labels_where: object, count: int, where: object) -> None:
    """That a file has a label for each image of another."""
    if labels.ndim < 2 and labels.size != count:
        raise ValueError(f"{labels_where} has {labels.size} labels; expected {count}, one an image of {where}")


def need(module: str, package: str, extra: str, what: str) -> ModuleType:
    """An optional module. Raises ImportError, a sentence with what to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install 'aevb[{extra}]', or pip install {package}"
        ) from error
