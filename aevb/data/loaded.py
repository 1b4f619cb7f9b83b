"""Training images from a DataLoader, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .shapes import image_shape


class LoadedImages:
    """Training images that a DataLoader loads anew each epoch.

    Their order and transforms are the loader's own.

    Args:
        loader: DataLoader of x, or of (x, label, ...).
        image_shape: (H, W) or (C, H, W).
        max_value: Largest value of a pixel in the loader's batches.

    Attributes:
        shape: (N, D), for N images in an epoch.
        dtype: float32, values in [0, 1].
        count: Number of batches of an epoch.
    """

    dtype = torch.float32

    def __init__(self, loader: DataLoader, image_shape: tuple[int, ...], max_value: int):
        self.loader, self.image_shape, self.max_value = loader, image_shape, max_value
        if isinstance(loader.dataset, IterableDataset):
            sizes = [len(x) for x, _ in batches_of(loader)]
            images, self.count = sum(sizes), len(sizes)
        else:
            self.count = len(loader)
            drops = loader.drop_last and loader.batch_size is not None
            images = self.count * loader.batch_size if drops else len(loader.dataset)  # type: ignore[operator,arg-type]
        self.shape = (images, math.prod(image_shape))

    def __len__(self) -> int:
        return self.shape[0]

    def epoch(self) -> Iterator[Tensor]:
        """Yields the batches of an epoch, (B, D), float32 in [0, 1].

        Raises:
            ValueError: A batch of another shape, or with values out of range.
        """
        for number, (x, _) in enumerate(batches_of(self.loader)):
            if len(x) == 0:
                continue
            where = f"batch {number} of the DataLoader"
            shape, channels_last, _ = image_shape(tuple(x.shape), where)
            x = x.movedim(-1, 1) if channels_last else x
            if shape != self.image_shape and tuple(x.shape[1:]) != (self.shape[1],):
                raise ValueError(f"{where} has images of {shape}; expected {self.image_shape}, as the test images")
            low, high = (float(end) for end in x.aminmax())
            if not (low >= 0 and high <= self.max_value):
                wrong = high if low >= 0 else low
                raise ValueError(
                    f"{where} holds {wrong:g}; expected values in 0..{self.max_value}, as in the test images"
                )
            if number == 0 and self.max_value > 1 and x.is_floating_point() and high <= 1:
                raise ValueError(
                    f"{where} lies in {low:g}..{high:g}, and the test images in 0..{self.max_value}; expected one range"
                )
            yield x.flatten(1).float() / self.max_value


def batches_of(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields x and the integer labels, or None, of each batch.

    A batch is x, or a tuple or list of x and more.
    """
    for batch in batches:
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        label = label_of(rest[0]) if rest else None
        is_label = label is not None and label.dim() == 1 and not label.is_floating_point()
        yield as_tensor(x), label if is_label else None


def label_of(y: Any) -> Tensor | None:
    """Returns a label or labels as a tensor; None for a text, a dict, or anything else that is no number."""
    try:
        return torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_tensor(x: Any) -> Tensor:
    """Returns x, an image or array, as a tensor.

    Raises:
        ValueError: A dict.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, dict):
        raise ValueError(f"an item is a dict with {', '.join(map(str, x))}; expected x, or (x, label)")
    return torch.from_numpy(np.array(x))
