"""Files of arrays: numpy's .npy and .npz, and MATLAB's .mat."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .mapped import MappedImages, open_npy
from .shapes import image_shape
from .source import Part, Source, need

MAPPED_ABOVE = 1 << 30  # bytes; a smaller file is read as a whole
IMAGE_KEYS = ("x", "images", "data", "arr_0")
LABEL_KEYS = ("y", "labels", "label")
PARTS = {"train": "train", "test": "test", "val": "validation", "valid": "validation"}

FREY_SHAPE = (28, 20)
_FREY_KEY = "ff"


def npy(path: Path) -> Source:
    array = open_npy(path)
    image_shape(array.shape, str(path))
    images = MappedImages(path) if array.nbytes > MAPPED_ABOVE else np.array(array)
    return Source(path.name.split(".")[0], {"train": Part(images, None, str(path))})


def npz(path: Path) -> Source:
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            for part, key, label_key in _part_keys(names) or [_keys(names, path)]:
                labels = None if label_key is None else arrays[label_key]
                parts[part] = Part(arrays[key], labels, f"{path} [{key}]")
    except _Unclear:
        raise
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path} holds Python objects, which are not loaded; expected arrays of numbers"
            ) from error
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return Source(path.name.split(".")[0], parts)


class _Unclear(ValueError):
    """No name of an array says that it holds the images."""


def _part_keys(names: list[str]) -> list[tuple[str, str, str | None]]:
    """(part, key of its images, key of its labels), of what is named as Keras does; [] where nothing is."""
    if "x_train" not in names:
        return []
    return [
        (part, f"x_{key}", f"y_{key}" if f"y_{key}" in names else None)
        for key, part in PARTS.items()
        if f"x_{key}" in names
    ]


def _keys(names: list[str], path: Path, more: tuple[str, ...] = ()) -> tuple[str, str, str | None]:
    lower = {name.lower(): name for name in names}
    images = next((lower[key] for key in (*IMAGE_KEYS, *more) if key in lower), None)
    if images is None and len(names) == 1:
        images = names[0]
    if images is None:
        raise _Unclear(
            f"{path} has {', '.join(map(repr, names)) or 'nothing in it'}; expected images as one of "
            f"{', '.join(IMAGE_KEYS)}, with y or labels, or x_train, y_train, x_test, y_test"
        )
    return "train", images, next((lower[key] for key in LABEL_KEYS if key in lower), None)


def mat(path: Path) -> Source:
    matlab = need("scipy.io", "scipy", "data", f"{path}, a MATLAB file,")
    try:
        arrays: Mapping[str, Any] = matlab.loadmat(path)
    except NotImplementedError as error:  # HDF5
        raise ValueError(f"{path} is of MATLAB 7.3; expected MATLAB 5 to 7.2: save it with '-v7'") from error
    except Exception as error:  # of many kinds, where a file is damaged
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    arrays = {name: array for name, array in arrays.items() if not name.startswith("__")}
    _, key, label_key = _keys(list(arrays), path, (_FREY_KEY,))
    images = arrays[key]
    where = f"{path} [{key}]"
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "buif":
        raise ValueError(f"{where} is no array of numbers; expected images")
    labels = None if label_key is None else arrays[label_key]
    name = path.name.split(".")[0]
    frey_dim = FREY_SHAPE[0] * FREY_SHAPE[1]
    if images.ndim == 2 and frey_dim in images.shape:
        rows = images.T if images.shape[0] == frey_dim else images
        return Source(name, {"train": Part(rows, labels, where)}, image_shape=FREY_SHAPE)
    images, note = _datapoints_first(images)
    return Source(name, {"train": Part(images, labels, where)}, note=note)


def _datapoints_first(images: np.ndarray) -> tuple[np.ndarray, str]:
    """An array of MATLAB's, where the datapoints are often the last dimension, and a note where they were."""
    if images.ndim == 2:
        by_column = _is_square(images.shape[0]) and not _is_square(images.shape[1])
    else:
        by_column = images.shape[-1] == max(images.shape) and images.shape[0] != images.shape[-1]
    if not by_column:
        return images, ""
    return np.moveaxis(images, -1, 0), "the last dimension of the array counts the images"


def _is_square(n: int) -> bool:
    return n > 1 and round(n**0.5) ** 2 == n
