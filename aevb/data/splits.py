"""Split and conversion of a source into a `Dataset`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from .dataset import Dataset
from .memmap import MappedImages
from .missing import Mask, Missing, with_missing
from .raw import Part, Source
from .sentences import number
from .shapes import image_shape
from .value_ranges import KINDS, agreed, converted

FILE_TEST_FRACTION = 10  # one image in 10 is the test part of a source without one

Images = Tensor | MappedImages


class _Rows(NamedTuple):
    """Some images of a part, with what belongs to each."""

    images: Images
    labels: Tensor | None
    observed: Tensor | None
    rows: Tensor

    def chosen(self, index: Tensor) -> _Rows:
        """Returns some of the images."""
        images, labels, observed, rows = self
        return _Rows(
            images.part(index) if isinstance(images, MappedImages) else images[index],
            None if labels is None else labels[index],
            None if observed is None else observed[index],
            rows[index],
        )


@takes_plain_values
def dataset(
    source: Source, validation: float, split_seed: int, missing: Missing | None = None, mask: Mask = None
) -> Dataset:
    """Returns a source's data set, split by the rule of `load`.

    Raises:
        ValueError: As `load`.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; expected the fraction to hold out, from 0 up and below 1")
    if not 0 <= split_seed < 2**32:
        raise ValueError(f"split_seed is {split_seed}; expected 0 to {2**32 - 1}")
    shape, notes = _shape(source)
    source = with_missing(source, shape, missing, mask)
    kind, more = _kind(source)
    parts = {name: _rows(part, source, kind) for name, part in source.parts.items()}
    train, test, held_out = parts["train"], parts.get("test"), parts.get("validation")
    if test is None:
        if len(train.images) < 2:
            raise ValueError(
                f"{source.parts['train'].where} holds one image; expected at least 2, one of them for the test"
            )
        num_test = source.num_test or math.ceil(len(train.images) / FILE_TEST_FRACTION)
        # numpy's compatibility policy freezes RandomState's stream, so that the split never changes.
        test, train = _split(train, np.random.RandomState(split_seed).permutation(len(train.images)), num_test)
    if held_out is None and validation > 0:
        count = math.ceil(validation * len(train.images))
        if count >= len(train.images):
            raise ValueError(
                f"validation is {validation} of {len(train.images)} training images; expected to leave one for training"
            )
        order = np.random.RandomState([split_seed, 1]).permutation(len(train.images))
        held_out, train = _split(train, order, count)
    found = {"train": train, "test": test, **({} if held_out is None else {"validation": held_out})}
    return Dataset(
        name=source.name,
        image_shape=shape,
        max_value=source.max_value
        or (train.images.max_value if isinstance(train.images, MappedImages) else KINDS[kind].max_value),
        train_images=train.images,
        test_images=test.images,
        train_labels=train.labels,
        test_labels=test.labels,
        validation_images=None if held_out is None else held_out.images,
        validation_labels=None if held_out is None else held_out.labels,
        note="; ".join([*notes, *more]),
        label_names=source.label_names,
        observed={name: part.observed for name, part in found.items() if part.observed is not None},
        rows={name: part.rows for name, part in found.items()} if len(source.parts) == 1 else None,
        largest=1 if kind == "fractions" else None,
    )


def _split(part: _Rows, permutation: np.ndarray, count: int) -> tuple[_Rows, _Rows]:
    """Returns the first `count` of a permutation, and the rest."""
    order = torch.from_numpy(permutation)
    return part.chosen(order[:count]), part.chosen(order[count:])


def _shape(source: Source) -> tuple[tuple[int, ...], list[str]]:
    """Returns the images' shape, and notes on it."""
    shapes, notes = {}, [source.note] if source.note else []
    for part in source.parts.values():
        shape, _, note = image_shape(part.shape, part.where)
        shapes[part.where] = source.image_shape or shape
        if note and source.image_shape is None and note not in notes:
            notes.append(note)
    (first, shape), *others = shapes.items()
    for where, other in others:
        if other != shape:
            raise ValueError(f"{where} has images of {other}, {first} of {shape}; expected one shape")
    return shape, notes


def _kind(source: Source) -> tuple[str, list[str]]:
    """Returns the values' kind in KINDS, and notes on it."""
    images = source.parts["train"].images
    if isinstance(images, MappedImages):
        _check_mapped(list(source.parts.values()), images)
        return images.kind, ["0..255 in the file"] if images.kind == "bytes" and images.max_value == 1 else []
    if source.max_value is not None:
        return "bytes", []
    arrays = [(part.images.reshape(len(part.images), -1), part.where) for part in source.parts.values()]  # type: ignore[union-attr]
    kind = agreed(arrays)
    notes = [KINDS[kind].words] if KINDS[kind].words else []
    if kind == "bytes" and (largest := max(int(values.max()) for values, _ in arrays)) < 128:
        notes.append(f"the largest value is {largest}, and 255 would be white")
    return kind, notes


def _check_mapped(parts: list[Part], train: MappedImages) -> None:
    """Checks that parts on the disk share value kind and dtype."""
    for images, where in ((part.images, part.where) for part in parts):
        if not isinstance(images, MappedImages) or (images.kind, images.dtype) != (train.kind, train.dtype):
            raise ValueError(
                f"{train.path} and {where} have values of several ranges or types; expected 0..255, bits or [0, 1] for "
                "all, of one dtype"
            )


def _rows(part: Part, source: Source, kind: str) -> _Rows:
    """Returns all images of a part, as they are kept, with labels and masks."""
    rows = torch.arange(len(part.images))
    observed = None if part.observed is None else torch.from_numpy(_flat(part.observed, part.where))
    if isinstance(part.images, MappedImages):
        return _Rows(part.images, _labels(part), observed, rows)
    flat = _flat(part.images, part.where)
    images = torch.from_numpy(flat) if source.max_value is not None else converted(flat, kind)
    return _Rows(images, _labels(part), observed, rows)


def _flat(array: np.ndarray, where: str) -> np.ndarray:
    """Returns an array of images as (N, D), the channels before the rest."""
    if image_shape(array.shape, where)[1]:
        array = np.moveaxis(array, -1, 1)
    return np.ascontiguousarray(array).reshape(len(array), -1)


def _labels(part: Part) -> Tensor | None:
    labels = part.labels
    if labels is None:
        return None
    labels = labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else _classes(labels, len(part.images))
    if labels.shape != (len(part.images),):
        raise ValueError(
            f"{part.where} has labels of shape {tuple(labels.shape)}; expected ({len(part.images)},), one an image"
        )
    if labels.dtype.kind not in "buif":
        raise ValueError(f"{part.where} has labels of {labels.dtype}; expected classes, whole numbers")
    if labels.dtype.kind == "f" and not (good := np.isfinite(labels) & (labels == np.rint(labels))).all():
        row = int(np.argmin(good))
        raise ValueError(f"{part.where} has {number(labels[row])} as the label of image {row}; expected whole numbers")
    return torch.from_numpy(labels.astype(np.int64))


def _classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the classes of one-hot labels; other labels as they are."""
    if labels.ndim != 2 or count not in labels.shape or labels.dtype.kind not in "buif":
        return labels
    rows = labels if len(labels) == count else labels.T
    is_one_hot = ((rows == rows.max()).sum(1) == 1).all() and len(np.unique(rows)) == 2
    return rows.argmax(1) if is_one_hot else labels
