"""A path to a source: which reader is for what is there."""

from __future__ import annotations

import gzip
import importlib.resources
from pathlib import Path

import numpy as np

from .arrays import mat, npy, npz
from .folder import image_folder
from .idx import idx_directory, idx_file, is_idx_directory
from .named import NAMED
from .source import Part, Source
from .text import amat_directory, amat_file, is_amat

DIGITS_TEST = 297

_READERS = {".npy": (npy, b"\x93NUMPY"), ".npz": (npz, b"PK"), ".mat": (mat, b"MATLAB")}


def open_path(path: Path) -> Source:
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    raise FileNotFoundError(
        f"there is no data at {str(path)!r}; expected 'digits', {', '.join(map(repr, NAMED))}, a directory with "
        "MNIST's IDX files, with .amat files or with images, or an IDX, .npy, .npz, .mat or .amat file"
    )


def _directory(path: Path) -> Source:
    if is_idx_directory(path):
        return idx_directory(path)
    found = amat_directory(path) or image_folder(path)
    if found is None:
        raise FileNotFoundError(
            f"{str(path)!r} has no data; expected MNIST's IDX files, .amat files ending in _train, _valid and _test, "
            "or images, in it or in subfolders"
        )
    return found


def _file(path: Path) -> Source:
    if is_amat(path):
        return amat_file(path)
    if (known := _READERS.get(path.suffix.lower())) is None:
        return idx_file(path)
    reader, magic = known
    with path.open("rb") as file:
        start = file.read(len(magic))
    if start != magic:
        how = f"starts with {start!r}" if start else "is empty"
        raise ValueError(f"{path} {how}; expected a {path.suffix} file, which starts with {magic!r}")
    return reader(path)


def digits() -> Source:
    file = importlib.resources.files("aevb") / "datasets" / "digits.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    rows = np.array([[int(value) for value in line.split(",")] for line in text.splitlines()])
    images = rows[:, :-1].astype(np.uint8)
    return Source("digits", {"train": Part(images, rows[:, -1], "digits")}, max_value=16, num_test=DIGITS_TEST)
