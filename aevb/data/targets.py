"""Model inputs made of images: bits, or pixels as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import binarize
from .loaded import LoadedImages
from .memmap import MappedImages
from .noise import bernoulli_bits

BINARIZATIONS = ("dynamic", "threshold", "none")

_CHUNK = 4096  # images of a file read at a time by `all`


def above_half(images: Tensor, max_value: int) -> Tensor:
    """Whether each pixel is above half, as bool.

    Pixels are uint8 in 0..max_value, or float32 in [0, 1].
    """
    return images > (max_value // 2 if images.dtype == torch.uint8 else 0.5)


def encoder_input(images: Tensor, max_value: int, how: str) -> Tensor:
    """Returns a trained encoder's input of images, float32 in [0, 1].

    Images are (N, D). Pixels are grey, or bits with "threshold".
    """
    if how == "threshold":
        return above_half(images, max_value).float()
    return images * (1 / max_value) if images.dtype == torch.uint8 else images


class Targets:
    """Model inputs x made of images: bits, or pixels as they are.

    Images in memory are kept on a device, and rows are gathered when used. Images on the disk stay there, and gathered
    rows are brought to the device. The batches of a DataLoader are given by `give`.

    Args:
        images: (N, D), uint8, values 0..max_value, or float32 in [0, 1].
        how: "dynamic": each pixel is set with its grey value as the probability (see `aevb.binarize`). "threshold": a
            pixel is set where it is above half. "none": pixels as they are, float32, or uint8 to be multiplied by
            `x_scale`.
        max_value: Largest value of a pixel, as in `Dataset`.
        device: Device of the results, and of images in memory.
        observed: bool, (N, D): False where a value is missing, and the images hold 0; None where nothing is.

    Attributes:
        x_scale: 1 / max_value for "none" of bytes, else None.
        streamed: Whether the images stay outside of the device, on the disk or in a DataLoader. Then an index may be on
            the CPU or the device, and a step cannot be captured in a CUDA graph.
        images: Images to gather from, on the device; without rows where they are streamed.
        observed: The masks, on the device, or None.
    """

    def __init__(
        self,
        images: Tensor | MappedImages | LoadedImages,
        how: str,
        max_value: int,
        device: torch.device | str = "cpu",
        observed: Tensor | None = None,
    ):
        self.max_value = max_value
        self.how = how
        self.dynamic = how == "dynamic"
        self.x_scale = 1 / max_value if how == "none" and images.dtype == torch.uint8 else None
        self.streamed = not isinstance(images, Tensor)
        self._batch: Tensor | None = None
        self.device = torch.device(device)
        self.observed = None if observed is None else observed.to(self.device)
        if isinstance(images, MappedImages):
            self._file = images
        if not isinstance(images, Tensor):
            self._count = len(images)
            self.images = torch.empty((0, images.shape[1]), dtype=images.dtype, device=device)
        else:
            self.images = (above_half(images, max_value) if how == "threshold" else images).to(device)

    def __len__(self) -> int:
        return self._count if self.streamed else len(self.images)

    def __call__(self, index: Tensor, seed: Tensor) -> Tensor:
        """Returns x of images `index`.

        Args:
            index: (B,), int64, indices of the images.
            seed: 0-d int64 seed. The noise belongs to it and the image's index, or for images on the disk its row in
                the file.

        Returns:
            x, (B, D), bool, uint8 or float32.
        """
        if self._batch is not None:
            return self._of_batch(self._batch, index, seed)
        if self.streamed:
            return self._of_file(index, seed.cpu()).to(self.device)
        if not self.dynamic:
            return self.images.index_select(0, index)
        if self.images.dtype == torch.uint8:
            return binarize(self.images, index, seed=seed, max_value=self.max_value)
        return bernoulli_bits(self.images.index_select(0, index), index, seed)

    def mask(self, index: Tensor) -> Tensor | None:
        """Returns which values of images `index` are observed, bool, (B, D); None where nothing is missing."""
        return None if self.observed is None else self.observed.index_select(0, index)

    def all(self, seed: Tensor) -> Tensor:
        """Returns x of all images, bool, or float32 in [0, 1].

        Each image is as in ``self(index, seed)``.
        """
        if self.streamed:
            found = self._all_of_file(seed)
        elif self.dynamic and self.images.dtype == torch.uint8:
            return binarize(self.images, seed=seed, max_value=self.max_value)
        elif self.dynamic:
            return bernoulli_bits(self.images, torch.arange(len(self.images), device=self.device), seed)
        else:
            found = self.images
        return found if self.x_scale is None else found * self.x_scale

    def give(self, batch: Tensor) -> None:
        """Sets the batch of a DataLoader, (B, D), for the next call."""
        self._batch = batch.to(self.device)

    def _of_batch(self, batch: Tensor, index: Tensor, seed: Tensor) -> Tensor:
        if self.dynamic:
            return bernoulli_bits(batch, index, seed)
        return above_half(batch, self.max_value) if self.how == "threshold" else batch

    def _of_file(self, index: Tensor, seed: Tensor) -> Tensor:
        if self.dynamic:
            return self._file.binarized(index, seed)
        return above_half(self._file[index], self.max_value) if self.how == "threshold" else self._file[index]

    def _all_of_file(self, seed: Tensor) -> Tensor:
        """Returns x of all images on the disk, in file order.

        So the disk is read from one end to the other.
        """
        out = torch.empty(
            self._file.shape, dtype=self.images.dtype if self.how == "none" else torch.bool, device=self.device
        )
        for index in self._file.file_order().split(_CHUNK):
            out[index.to(self.device)] = self(index, seed)
            self._file.release_rows(index)
        return out
