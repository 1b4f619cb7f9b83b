"""Fingerprint of a run's images, to detect that they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import Dataset, MappedImages
from .loaded import LoadedImages

SOME = 1000  # evenly spread images of a part that are hashed


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Returns the fingerprint of a data set's images, as JSON holds it.

    It has the number and shape of the images and, for each part, a SHA-256 of some, with their masks. Images of a
    DataLoader have none. A data set in memory also has a SHA-256 of all images.
    """
    parts = {"train": dataset.train_images, "test": dataset.test_images, "validation": dataset.validation_images}
    present = {name: images for name, images in parts.items() if images is not None}
    masks = dataset.observed
    of_some = {
        name: _some(images, masks.get(name)) for name, images in present.items() if not isinstance(images, LoadedImages)
    }
    found: dict[str, Any] = {
        "images": len(dataset.train_images),
        "data_dim": dataset.data_dim,
        **({"sha256_of_some": of_some["train"]} if "train" in of_some else {}),
        "image_shape": list(dataset.image_shape),
        "max_value": dataset.max_value,
        **{f"{name}_images": len(images) for name, images in present.items() if name != "train"},
        **{f"sha256_of_some_{name}": digest for name, digest in of_some.items() if name != "train"},
    }
    in_memory = [images for images in present.values() if isinstance(images, Tensor)]
    if len(in_memory) == len(present):
        found["sha256"] = _digest(*in_memory, *(masks[name] for name in present if name in masks))
    return found


def check_same_data(noted: Mapping[str, Any] | None, dataset: Dataset, now: Mapping[str, Any] | None = None) -> None:
    """Checks that the images have the fingerprint that a run noted.

    Only keys that both fingerprints have are compared, since an older version noted less. Without a noted fingerprint
    nothing is checked.

    Args:
        noted: Fingerprint from the run.
        dataset: The data set now.
        now: Its fingerprint, if known.

    Raises:
        ValueError: The images differ.
    """
    if not noted:
        return
    now = fingerprint(dataset) if now is None else now
    # Only common keys: an older version noted less, and images on the disk have no SHA-256 of all.
    other = {key: value for key, value in noted.items() if key in now and now[key] != value}
    if other:
        raise ValueError(
            f"the run was of other data: {other}, now { ({key: now[key] for key in other}) }; expected the same images "
            f"as {dataset.name} had when it began, read and split by the options in the run's config.json"
        )


def _some(images: Tensor | MappedImages, observed: Tensor | None) -> str:
    count = len(images)
    some = torch.arange(min(count, SOME)) * count // min(count, SOME)
    return _digest(images[some], *([] if observed is None else [observed[some]]))


def _digest(*images: Tensor | MappedImages) -> str:
    digest = hashlib.sha256()
    for part in images:
        assert isinstance(part, Tensor)
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
