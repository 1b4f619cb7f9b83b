"""Missing values of a source: NaN, or what a mask says; and masks in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .arrays import numbers, numbers_by_name
from .memmap import MappedImages
from .parts import PARTS, read
from .raw import Part, Source
from .shapes import flattened, image_shape

Missing = Literal["nan"]
Mask = str | os.PathLike[str] | np.ndarray | Tensor | Mapping[str, Any] | None

EXPECTED = "bool or 0 and 1: 1 or True where a value is observed"


def with_missing(source: Source, shape: tuple[int, ...], missing: Missing | None, mask: Mask) -> Source:
    """Returns a source whose parts say what is observed, with 0 in place of what is missing.

    0 is a value of every kind, so that the kind is recognised by observed values alone.

    Args:
        source: The source.
        shape: Its images' shape, (H, W) or (C, H, W).
        missing: "nan": a NaN is a missing value.
        mask: A file or an array, or arrays by the names of parts, as `load` takes it.

    Raises:
        ValueError: A mask of another shape or of other values, or a source that can have no missing values.
    """
    if missing is None and mask is None:
        return source
    masks = {} if mask is None else _masks(mask, source, shape)
    parts = {name: _with_missing(part, missing, masks.get(name)) for name, part in source.parts.items()}
    return Source(**{**vars(source), "parts": parts})


def _with_missing(part: Part, missing: Missing | None, mask: np.ndarray | None) -> Part:
    images = part.images
    if isinstance(images, MappedImages):
        raise ValueError(
            f"{part.where} is too large to be read into memory, and values of a file that stays on the disk cannot be "
            "missing; expected a smaller file, such as a part of it or one of uint8 with a mask"
        )
    is_nan = missing == "nan" and images.dtype.kind == "f"
    observed = ~np.isnan(images) if is_nan else np.ones(images.shape, bool)
    if mask is not None:
        if len(mask) not in (1, len(images)):
            raise ValueError(
                f"the mask of {part.where} has {len(mask)} masks; expected 1, or {len(images)}, one an image"
            )
        observed &= _as_in_file(mask, images.shape, part.where)
    return part._replace(images=np.where(observed, images, images.dtype.type(0)), observed=observed)


def _as_in_file(mask: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Returns masks, (M, D), laid out as the images of a file of that shape."""
    if image_shape(shape, where)[1]:
        return np.moveaxis(mask.reshape(len(mask), -1, *shape[1:3]), 1, -1)
    return mask.reshape(len(mask), *shape[1:])


def _masks(mask: Mask, source: Source, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns the masks of each part, bool, (1, D) or (N, D)."""
    found = _read(mask) if isinstance(mask, str | os.PathLike) else mask
    where = str(mask) if isinstance(mask, str | os.PathLike) else "the mask"
    if isinstance(found, Mapping):
        return _by_part(found, source, shape, where)
    masks = flat_masks(_array(found), shape, where)
    if len(masks) > 1 and len(source.parts) > 1:
        raise ValueError(
            f"{where} has {len(masks)} masks, and {source.name} the parts {', '.join(source.parts)}; expected one mask "
            "for all images, or masks by the names of the parts: a .npz file with train and test, say"
        )
    return dict.fromkeys(source.parts, masks)


def _by_part(masks: Mapping[str, Any], source: Source, shape: tuple[int, ...], where: str) -> dict[str, np.ndarray]:
    """Returns the masks whose names say parts; one without such a name is the training part's."""
    found: dict[str, np.ndarray] = {}
    for name, array in masks.items():
        said = read(name).parts or (("train",) if len(masks) == 1 else ())
        if len(said) != 1 or said[0] in found:
            raise ValueError(f"{where} has {name!r}; expected one mask for a part, by names such as {', '.join(PARTS)}")
        if said[0] not in source.parts:
            raise ValueError(
                f"{where} has {name!r}, and {source.name} the parts {', '.join(source.parts)}; expected masks of these"
            )
        found[said[0]] = flat_masks(_array(array), shape, f"{where} [{name}]")
    return found


def _read(path: str | os.PathLike[str]) -> np.ndarray | Mapping[str, np.ndarray]:
    file = Path(path).expanduser()
    if file.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"mask is {str(path)!r}; expected a .npy file, or a .npz file with a mask for each part")
    return numbers(file) if file.suffix.lower() == ".npy" else numbers_by_name(file)


def _array(mask: Any) -> np.ndarray:
    return mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)


def flat_masks(array: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Returns masks, bool, (M, D), from the shape of an image, of one channel, or of several images.

    Args:
        array: The masks.
        shape: The images' shape, (H, W) or (C, H, W).
        where: The file, for errors.

    Raises:
        ValueError: Another shape, or values other than 0 and 1.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds {array.dtype}; expected {EXPECTED}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{where} holds values other than 0 and 1; expected 1 or True where a pixel is observed")
    if array.shape == shape[-2:]:
        array = np.broadcast_to(array, shape)
    return flattened(array, shape, where).astype(bool)
