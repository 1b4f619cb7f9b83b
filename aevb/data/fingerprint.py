"""What tells that a run's data are the images that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import Dataset, MappedImages

SOME = 1000  # images of a part that are read, evenly spread, where not all are


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a run notes of its images, as JSON holds it: of each part the number and a SHA-256 of some; of images in
    memory a SHA-256 of all."""
    parts = {"train": dataset.train_images, "test": dataset.test_images, "validation": dataset.validation_images}
    present = {name: images for name, images in parts.items() if images is not None}
    found: dict[str, Any] = {
        "images": len(dataset.train_images),
        "data_dim": dataset.data_dim,
        "sha256_of_some": _some(dataset.train_images),
        "image_shape": list(dataset.image_shape),
        "max_value": dataset.max_value,
        **{f"{name}_images": len(images) for name, images in present.items() if name != "train"},
        **{f"sha256_of_some_{name}": _some(images) for name, images in present.items() if name != "train"},
    }
    if not any(isinstance(images, MappedImages) for images in present.values()):
        found["sha256"] = _digest(*present.values())
    return found


def check_same_data(noted: Mapping[str, Any] | None, dataset: Dataset, now: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError where the images are others than those of which a run noted `noted`: a version before this one
    noted less, and one that noted nothing is believed. `now` is the data set's fingerprint, where it is known."""
    if not noted:
        return
    now = fingerprint(dataset) if now is None else now
    # Not what only one of them has: a version noted less, or a file is read from the disk that was in memory.
    other = {key: value for key, value in noted.items() if key in now and now[key] != value}
    if other:
        raise ValueError(
            f"the run was of other data: {other}, now { ({key: now[key] for key in other}) }; expected the same images "
            f"as {dataset.name} had when it began, read and split by the options in the run's config.json"
        )


def _some(images: Tensor | MappedImages) -> str:
    count = len(images)
    return _digest(images[torch.arange(min(count, SOME)) * count // min(count, SOME)])


def _digest(*images: Tensor | MappedImages) -> str:
    digest = hashlib.sha256()
    for part in images:
        assert isinstance(part, Tensor)
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
