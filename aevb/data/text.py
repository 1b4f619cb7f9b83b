"""Reader of .amat text files.

It is the format of the binarized MNIST of Larochelle & Murray (2011).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from .raw import Part, Source, name_of

_ENDINGS = {"train": "train", "validation": "valid", "test": "test"}


def is_amat(path: Path) -> bool:
    """Whether a file's name ends in .amat or .amat.gz."""
    return path.name.lower().removesuffix(".gz").endswith(".amat")


def amat_file(path: Path) -> Source:
    """Returns the source of an .amat file, as a training part."""
    return Source(name_of(path), {"train": amat_part(path)})


def check_amat(parts: Collection[str], files: Sequence[Path], where: Path) -> None:
    """Checks that a folder has the three files of binarized MNIST.

    Raises:
        FileNotFoundError: A part is missing.
    """
    if missing := [ending for part, ending in _ENDINGS.items() if part not in parts]:
        raise FileNotFoundError(
            f"{str(where)!r} has {', '.join(file.name for file in files)}; expected files ending in _train.amat, "
            f"_valid.amat and _test.amat, each gzipped (.gz) or not; missing: {', '.join(missing)}"
        )


def amat_part(path: Path) -> Part:
    """Returns the images of an .amat file, without labels.

    Raises:
        ValueError: A file that is truncated, damaged, or not of numbers.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged: its gzip data ends with {str(error)!r}") from error
    images = _digits(text)
    return Part(_numbers(text, path) if images is None else images, None, str(path))


def _digits(text: bytes) -> np.ndarray | None:
    """Returns bits of fixed-length lines of 0 and 1, or None.

    It is 20 times faster than `_numbers`. Lines have a space after each digit and one length.
    """
    length = text.find(b"\n") + 1
    if length < 2 or len(text) % length:
        return None
    lines = np.frombuffer(text, np.uint8).reshape(-1, length)
    values, spaces = lines[:, : length - 1 : 2] - ord("0"), lines[:, 1 : length - 1 : 2]
    if (values > 1).any() or (spaces != ord(" ")).any() or (lines[:, -1] != ord("\n")).any():
        return None
    return values


def _numbers(text: bytes, path: Path) -> np.ndarray:
    lines = text.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; expected an image a line")
    width = len(lines[0].split())
    rows = np.empty((len(lines), width), np.float32)
    for i, line in enumerate(lines):
        words = line.split()
        if len(words) != width:
            raise ValueError(f"{path}, line {i + 1} has {len(words)} values; expected {width}, as in line 1")
        try:
            rows[i] = words
        except ValueError as error:
            raise ValueError(f"{path}, line {i + 1}: {error}; expected numbers") from error
    return rows
