"""Dispatch from a path to the reader of its format."""

from __future__ import annotations

import gzip
import importlib.resources
import os
from pathlib import Path, PurePath

import numpy as np

from .arrays import mat, npy, npz
from .download import NAMED
from .folder import image_folder, is_image
from .idx import idx_file
from .part_files import form, part_files
from .parts import named_parts, not_read
from .raw import Part, Source
from .text import amat_file, is_amat

DIGITS_TEST = 297

_READERS = {".npy": (npy, b"\x93NUMPY"), ".npz": (npz, b"PK"), ".mat": (mat, b"MATLAB")}


def open_path(path: Path) -> Source:
    """Returns the source at a path: a directory or a file.

    Raises:
        FileNotFoundError: Nothing is there, or no data.
        ValueError: A file of another kind.
    """
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    raise FileNotFoundError(
        f"there is no data at {str(path)!r}; expected 'digits', {', '.join(map(repr, NAMED))}, a directory with "
        "MNIST's IDX files, with .amat files or with images, or an IDX, .npy, .npz, .mat or .amat file"
    )


def _directory(path: Path) -> Source:
    """Returns the source of a directory.

    It is tried in this order: files whose names say parts, then images, then such files in subfolders.
    """
    files, folders = _below(path)
    images = [file for file in files if is_image(file)]
    arrays = [file for file in files if not is_image(file) and form(path / file)]
    own = [file for file in arrays if len(file.parts) == 1]
    if own and (found := part_files(path, own)) is not None:
        if of_images := named_parts(sorted({image.parts[0] for image in images if len(image.parts) > 1})):
            raise ValueError(
                f"{path} has {own[0]}, and images in {next(iter(of_images))}/, and both name parts; expected one of "
                "them"
            )
        return found
    if images:
        return image_folder(path, images, folders, not_read(arrays))
    if arrays and (found := part_files(path, arrays)) is not None:
        return found
    if len(arrays) == 1:
        return _file(path / arrays[0])
    if arrays:
        raise FileNotFoundError(
            f"{str(path)!r} has {', '.join(map(str, arrays[:3]))}, and no names that say parts; expected some such as "
            "train.npy and test.npy, or the path of one file"
        )
    raise FileNotFoundError(
        f"{str(path)!r} has no data; expected MNIST's IDX files, .amat files ending in _train, _valid and _test, "
        ".npy, .npz or .mat files such as train.npy and test.npy, or images, in it or in subfolders"
    )


def _below(root: Path) -> tuple[list[PurePath], list[PurePath]]:
    """Returns the files and folders below `root`, however deep, without hidden ones."""
    files, folders, seen = [], [], set()
    for path, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if (real := os.path.realpath(path)) in seen:  # a link back
            inner.clear()
            continue
        seen.add(real)
        here = PurePath(path).relative_to(root)
        files += [here / name for name in names if not name.startswith(".")]
        folders += [here / name for name in inner]
    return sorted(files), sorted(folders)


def _file(path: Path) -> Source:
    if is_amat(path):
        return amat_file(path)
    if (known := _READERS.get(path.suffix.lower())) is None:
        _check_form(path)
        return idx_file(path)
    reader, magic = known
    with path.open("rb") as file:
        start = file.read(len(magic))
    if start != magic:
        how = f"starts with {start!r}" if start else "is empty"
        raise ValueError(f"{path} {how}; expected a {path.suffix} file, which starts with {magic!r}")
    return reader(path)


# Conversions of unsupported formats to supported ones.
_CONVERTED = {
    **dict.fromkeys(
        (".csv", ".tsv", ".txt"), "numpy.save('images.npy', numpy.genfromtxt(FILE, delimiter=',', skip_header=1))"
    ),
    **dict.fromkeys((".pt", ".pth"), "numpy.save('images.npy', torch.load(FILE).numpy())"),
    **dict.fromkeys((".h5", ".hdf5"), "numpy.save('images.npy', h5py.File(FILE)['name'][:])"),
    **dict.fromkeys(
        (".parquet", ".feather", ".xlsx"), "numpy.save('images.npy', pandas.read_parquet(FILE).to_numpy())"
    ),
    **dict.fromkeys((".pkl", ".pickle"), "numpy.save('images.npy', pickle.load(open(FILE, 'rb')))"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".rar", ".7z"), "unpack it, and give the folder"),
}


def _check_form(path: Path) -> None:
    """Refuses a file whose suffix is of an unreadable kind.

    Raises:
        ValueError: Another kind of file; the message says how to convert it.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz" and path.stem.endswith(".tar"):
        suffix = ".tar"
    if is_image(path):
        raise ValueError(f"{path} is one image; expected a folder of images, all of one size")
    if suffix in _CONVERTED:
        how = _CONVERTED[suffix].replace("FILE", repr(path.name))
        raise ValueError(
            f"{path} is a {suffix} file; expected .npy, .npz, .mat, .amat, IDX, or a folder of images: {how}"
        )


def digits() -> Source:
    """Returns the source of UCI's optical digits, shipped with the package."""
    file = importlib.resources.files("aevb") / "datasets" / "digits.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    rows = np.array([[int(value) for value in line.split(",")] for line in text.splitlines()])
    images = rows[:, :-1].astype(np.uint8)
    return Source("digits", {"train": Part(images, rows[:, -1], "digits")}, max_value=16, num_test=DIGITS_TEST)
