"""Split and conversion of a source into a `Dataset`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from .dataset import Dataset
from .memmap import MappedImages
from .raw import Part, Source
from .sentences import number
from .shapes import image_shape
from .value_ranges import KINDS, agreed, converted

FILE_TEST_FRACTION = 10  # one image in 10 is the test part of a source without one

Images = Tensor | MappedImages
Labelled = tuple[Images, Tensor | None]


@takes_plain_values
def dataset(source: Source, validation: float, split_seed: int) -> Dataset:
    """Returns a source's data set, split by the rule of `load`.

    Raises:
        ValueError: As `load`.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; expected the fraction to hold out, from 0 up and below 1")
    if not 0 <= split_seed < 2**32:
        raise ValueError(f"split_seed is {split_seed}; expected 0 to {2**32 - 1}")
    shape, kind, note = _shape_and_kind(source)
    parts = {name: (_images(part, source, kind), _labels(part)) for name, part in source.parts.items()}
    train, test, held_out = parts["train"], parts.get("test"), parts.get("validation")
    if test is None:
        if len(train[0]) < 2:
            raise ValueError(
                f"{source.parts['train'].where} holds one image; expected at least 2, one of them for the test"
            )
        num_test = source.num_test or math.ceil(len(train[0]) / FILE_TEST_FRACTION)
        # numpy's compatibility policy freezes RandomState's stream, so that the split never changes.
        test, train = _split(train, np.random.RandomState(split_seed).permutation(len(train[0])), num_test)
    if held_out is None and validation > 0:
        count = math.ceil(validation * len(train[0]))
        if count >= len(train[0]):
            raise ValueError(
                f"validation is {validation} of {len(train[0])} training images; expected to leave one for training"
            )
        order = np.random.RandomState([split_seed, 1]).permutation(len(train[0]))
        held_out, train = _split(train, order, count)
    return Dataset(
        name=source.name,
        image_shape=shape,
        max_value=source.max_value
        or (train[0].max_value if isinstance(train[0], MappedImages) else KINDS[kind].max_value),
        train_images=train[0],
        test_images=test[0],
        train_labels=train[1],
        test_labels=test[1],
        validation_images=None if held_out is None else held_out[0],
        validation_labels=None if held_out is None else held_out[1],
        note=note,
        label_names=source.label_names,
    )


def _split(part: Labelled, permutation: np.ndarray, count: int) -> tuple[Labelled, Labelled]:
    """Returns the first `count` of a permutation, and the rest."""
    order = torch.from_numpy(permutation)
    first, rest = order[:count], order[count:]
    return _rows(part, first), _rows(part, rest)


def _rows(part: Labelled, index: Tensor) -> Labelled:
    images, labels = part
    chosen = images.part(index) if isinstance(images, MappedImages) else images[index]
    return chosen, None if labels is None else labels[index]


def _shape_and_kind(source: Source) -> tuple[tuple[int, ...], str, str]:
    """Returns the images' shape, the kind in KINDS, and notes."""
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
    images = source.parts["train"].images
    if isinstance(images, MappedImages):
        _check_mapped(list(source.parts.values()), images)
        notes += ["0..255 in the file"] if images.kind == "bytes" and images.max_value == 1 else []
        return shape, images.kind, "; ".join(notes)
    if source.max_value is not None:
        return shape, "bytes", "; ".join(notes)
    arrays = [(part.images.reshape(len(part.images), -1), part.where) for part in source.parts.values()]  # type: ignore[union-attr]
    kind = agreed(arrays)
    notes += [KINDS[kind].words] if KINDS[kind].words else []
    if kind == "bytes" and (largest := max(int(values.max()) for values, _ in arrays)) < 128:
        notes.append(f"the largest value is {largest}, and 255 would be white")
    return shape, kind, "; ".join(notes)


def _check_mapped(parts: list[Part], train: MappedImages) -> None:
    """Checks that parts on the disk share value kind and dtype."""
    for images, where in ((part.images, part.where) for part in parts):
        if not isinstance(images, MappedImages) or (images.kind, images.dtype) != (train.kind, train.dtype):
            raise ValueError(
                f"{train.path} and {where} have values of several ranges or types; expected 0..255, bits or [0, 1] for "
                "all, of one dtype"
            )


def _images(part: Part, source: Source, kind: str) -> Images:
    images = part.images
    if isinstance(images, MappedImages):
        return images
    if image_shape(images.shape, part.where)[1]:
        images = np.moveaxis(images, -1, 1)
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    if source.max_value is not None:
        return torch.from_numpy(flat)
    return converted(flat, kind)


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
