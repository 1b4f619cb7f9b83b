"""Raw output of a file reader, before splitting and conversion."""

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
    """Returns the name for a data set and its run's folder.

    It is never empty: an empty name would be the folder of all runs.
    """
    return path.name.strip(".").split(".")[0] or "data"


class Part(NamedTuple):
    """Arrays of a part as a file has them.

    Attributes:
        images: (N, ...).
        labels: (N,), or None.
        where: The file, for errors.
        observed: Which values are observed, bool, of the images' shape; None where all are.
    """

    images: np.ndarray | MappedImages
    labels: np.ndarray | None
    where: str
    observed: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the images as in the file."""
        return self.images.file_shape if isinstance(self.images, MappedImages) else self.images.shape


@dataclass(frozen=True)
class Source:
    """A data set as read: its parts, before they are split.

    Attributes:
        name: Name of the data set.
        parts: "train", and optionally "test" and "validation".
        max_value: Largest value of a pixel, or None to find it from the values.
        image_shape: (H, W) or (C, H, W), or None to find it from the array's shape.
        num_test: Images to hold out as the test part, or None for a tenth. It counts for a source without a test part.
        note: Remark for the data set's description.
        label_names: Names of the labels 0, 1, ..., where a source says them.
    """

    name: str
    parts: Mapping[str, Part]
    max_value: int | None = None
    image_shape: tuple[int, ...] | None = None
    num_test: int | None = None
    note: str = ""
    label_names: tuple[str, ...] = ()


def check_labels(labels: np.ndarray, labels_where: object, count: int, where: object) -> None:
    """Checks that a file has a label for each image of another.

    Raises:
        ValueError: Another number of labels.
    """
    if labels.ndim < 2 and labels.size != count:
        raise ValueError(f"{labels_where} has {labels.size} labels; expected {count}, one an image of {where}")


def need(module: str, package: str, extra: str, what: str) -> ModuleType:
    """Returns an optional module.

    Args:
        module: Name of the module.
        package: Name of the package that has it.
        extra: Name of the extra of aevb that installs it.
        what: Subject of the error, such as a file.

    Raises:
        ImportError: The module is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install 'aevb[{extra}]', or pip install {package}"
        ) from error
