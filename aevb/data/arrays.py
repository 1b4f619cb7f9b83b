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
_FREY_DIM = 28 * 20
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
    keys = _part_keys(list(arrays)) or [_keys(list(arrays), path, (_FREY_KEY,))]
    for _, key, _ in keys:
        if not isinstance(arrays[key], np.ndarray) or arrays[key].dtype.kind not in "buif":
            raise ValueError(f"{path} [{key}] is no array of numbers; expected images")
    train = arrays[keys[0][1]].shape  # which says it for all
    is_frey = len(train) == 2 and _FREY_DIM in train
    last = _datapoints_are_last(train)
    parts = {}
    for part, key, label_key in keys:
        images = np.moveaxis(arrays[key], -1, 0) if last else arrays[key]
        parts[part] = Part(images, None if label_key is None else arrays[label_key], f"{path} [{key}]")
    note = "the last dimension of the array counts the images" if last and not is_frey else ""
    return Source(path.name.split(".")[0], parts, image_shape=FREY_SHAPE if is_frey else None, note=note)


def _datapoints_are_last(shape: tuple[int, ...]) -> bool:
    """Of an array of MATLAB's, which often has them so."""
    if len(shape) != 2:
        return shape[-1] == max(shape) and shape[0] != shape[-1]
    if _FREY_DIM in shape:
        return shape[0] == _FREY_DIM
    return _is_square(shape[0]) and not _is_square(shape[1])


def _is_square(n: int) -> bool:
    return n > 1 and round(n**0.5) ** 2 == n
