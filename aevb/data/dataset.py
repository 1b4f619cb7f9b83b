"""The parts of a data set: `Dataset`, its images and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks.arguments import converted
from .loaded import LoadedImages
from .memmap import MappedImages


@dataclass(frozen=True)
class Dataset:
    """Images, split into a training, a test and optionally a validation part.

    Images are (N, data_dim), flattened in the order of `image_shape`. They are tensors, or `MappedImages` on the disk;
    the training images may be `LoadedImages` of a DataLoader. Their dtype is uint8 with values 0..max_value, so that
    value * x_scale is in [0, 1]. Or it is float32 in [0, 1] with max_value 1. Labels are int64, (N,), or None.

    Attributes:
        name: Name of the data set.
        image_shape: (H, W) or (C, H, W).
        max_value: Largest value of a pixel.
        train_images: Images of the training part.
        test_images: Images of the test part.
        train_labels: Labels of the training part.
        test_labels: Labels of the test part.
        validation_images: Images of the validation part, or None.
        validation_labels: Labels of the validation part.
        note: Remark of `load` on the source.
        label_names: Names of the labels 0, 1, ..., as from the subfolders of a folder of images.
        observed: Masks by the names of their parts, "train" say: bool, (N, data_dim) or (data_dim,), True where a value
            is observed. Of missing values nothing is used, and the images hold 0 there, whatever was given. A part
            without missing values has no mask.
        rows: Rows of the source that each part's images were, by the names of the parts, where one array was split.
        largest: What `max_value` is in the source, or None for the same.

    Raises:
        ValueError: Images, labels or masks of another type, shape or range; an empty part; a NaN that is not missing.
    """

    name: str
    image_shape: tuple[int, ...]
    max_value: int
    train_images: Tensor | MappedImages | LoadedImages
    test_images: Tensor | MappedImages
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    validation_images: Tensor | MappedImages | None = None
    validation_labels: Tensor | None = None
    note: str = ""
    label_names: tuple[str, ...] = ()
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        hints: dict[str, Any] = {"name": str, "image_shape": tuple[int, ...], "max_value": int}
        for name, hint in {**hints, "label_names": tuple[str, ...]}.items():
            object.__setattr__(self, name, converted(name, getattr(self, name), hint))
        self._take_masks()
        dtypes = {}
        for part, images, labels in self._parts():
            self._check_images(f"{part}_images", images)
            dtypes[part] = images.dtype
            if labels is not None and tuple(labels.shape) != (len(images),):
                raise ValueError(
                    f"{part}_labels has shape {tuple(labels.shape)}; expected ({len(images)},), one an image"
                )
            names = len(self.label_names)
            if names and labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < names:
                ends = f"{int(labels.min())}..{int(labels.max())}"
                raise ValueError(
                    f"{part}_labels lie in {ends}, and there are {names} label_names; expected a name for each"
                )
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"the parts have images of {dtypes}; expected one dtype")
        if self.validation_images is None and self.validation_labels is not None:
            raise ValueError("there are validation_labels but no validation_images; expected both, or neither")

    def _parts(self):
        yield "train", self.train_images, self.train_labels
        yield "test", self.test_images, self.test_labels
        if self.validation_images is not None:
            yield "validation", self.validation_images, self.validation_labels

    def _take_masks(self) -> None:
        """Keeps the masks of parts that have missing values, and puts 0 where values are missing."""
        if not isinstance(self.observed, Mapping):
            raise ValueError(
                f"observed is a {type(self.observed).__name__}; expected masks by the names of their parts: "
                'observed={"train": mask, "test": mask}'
            )
        images = {part: images for part, images, _ in self._parts()}
        found = {}
        for part, mask in self.observed.items():
            if part not in images:
                raise ValueError(f"observed has {part!r}; expected parts of the data: {', '.join(images)}")
            mask = self._mask(part, images[part], mask)
            if mask.all():
                continue
            found[part] = mask
            kept = images[part].masked_fill(~mask, 0)
            if not torch.equal(kept, images[part]):
                object.__setattr__(self, f"{part}_images", kept)
        if "train" in found and not found["train"].any():
            raise ValueError("observed['train'] is False everywhere; expected some values to be observed")
        object.__setattr__(self, "observed", found)
        if self.rows is not None and {p: len(rows) for p, rows in self.rows.items()} != {
            p: len(x) for p, x in images.items()
        }:
            object.__setattr__(self, "rows", None)  # of images that gave way to others

    def _mask(self, part: str, images: Any, mask: Any) -> Tensor:
        """Returns a part's mask, bool, (N, data_dim)."""
        if not isinstance(images, Tensor):
            raise ValueError(
                f"observed has {part!r}, whose images are {type(images).__name__}; expected images in memory, a tensor"
            )
        known = isinstance(mask, Tensor) and mask.dtype == torch.bool
        if not known or tuple(mask.shape) not in (tuple(images.shape), tuple(images.shape[1:])):
            what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"observed[{part!r}] is {what}; expected torch.bool {tuple(images.shape)} or "
                f"{tuple(images.shape[1:])}, True where a value is observed"
            )
        return mask.expand(images.shape).contiguous()

    def _check_images(self, name: str, images: Tensor | MappedImages | LoadedImages) -> None:
        shape = tuple(images.shape)
        known = images.dtype == torch.uint8 or (images.dtype == torch.float32 and self.max_value == 1)
        if not known or len(shape) != 2 or shape[1] != self.data_dim:
            raise ValueError(
                f"{name} is {images.dtype} {shape}; expected torch.uint8 (N, {self.data_dim}), "
                "or torch.float32 in [0, 1] with max_value=1"
            )
        if shape[0] == 0:
            raise ValueError(f"{name} is empty; expected at least one image")
        if isinstance(images, LoadedImages):  # it checks its batches
            return
        if isinstance(images, MappedImages):  # checks values when read
            if images.max_value != self.max_value:
                raise ValueError(f"max_value is {self.max_value}; expected {images.max_value}, that of {images.path}")
            return
        smallest, largest = (float(value) for value in images.aminmax())
        if not (smallest >= 0 and largest <= self.max_value):
            wrong = largest if smallest >= 0 else smallest
            hint = ", and an observed= that is False where a NaN is missing" if math.isnan(wrong) else ""
            raise ValueError(f"{name} holds {wrong:g}; expected values in 0..{self.max_value}{hint}")

    @property
    def data_dim(self) -> int:
        """Number of pixels times channels of an image."""
        return math.prod(self.image_shape)

    @property
    def x_scale(self) -> float:
        """Factor that maps values to [0, 1]: 1 / max_value."""
        return 1 / self.max_value

    @property
    def values(self) -> str:
        """Description of the pixels' values."""
        if self.train_images.dtype != torch.uint8:
            return "values in [0, 1]"
        return "bits" if self.max_value == 1 else f"values 0..{self.max_value}"

    @property
    def description(self) -> str:
        """One line on the data set: sizes, shape, values, and the note."""
        counts = [f"{len(images):,} {part.replace('train', 'training')}" for part, images, _ in self._parts()]
        size = "x".join(map(str, self.image_shape))
        text = f"{self.name}: {', '.join(counts)} images of {size}, {self.values}"
        if isinstance(self.train_images, MappedImages):
            text += f", read from {self.train_images.path} as they are used"
        if isinstance(self.train_images, LoadedImages):
            text += ", the training images from a DataLoader"
        return "; ".join(filter(None, [text, self.note, *self._on_missing()]))

    def _on_missing(self) -> list[str]:
        """Returns notes on missing values: how many, and where nothing at all is observed."""
        if not self.observed:
            return []
        total = sum(images.shape[0] for _, images, _ in self._parts()) * self.data_dim
        lacking = sum(int((~mask).sum()) for mask in self.observed.values())
        notes = [f"{lacking / total:.1%} of the values are missing"]
        if empty := sum(int((~mask.any(1)).sum()) for mask in self.observed.values()):
            notes.append(f"images without any observed value: {empty:,}")
        if "train" in self.observed and (unseen := int((~self.observed["train"].any(0)).sum())):
            notes.append(f"pixels missing in all training images, of which nothing is learned: {unseen:,}")
        return notes
