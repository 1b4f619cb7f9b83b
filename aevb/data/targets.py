"""What a model is given of images: bits, or the pixels as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import binarize
from .memmap import MappedImages
from .noise import bernoulli_bits

BINARIZATIONS = ("dynamic", "threshold", "none")

_CHUNK = 4096  # images of a file that are read at a time where all are wanted


def above_half(images: Tensor, max_value: int) -> Tensor:
    """Which pixels are above half, bool: of uint8 in 0..max_value, or of float32 in [0, 1]."""
    return images > (max_value // 2 if images.dtype == torch.uint8 else 0.5)


def encoder_input(images: Tensor, max_value: int, how: str) -> Tensor:
    """Images, (N, D), as a trained encoder is given them, float32 in [0, 1]: grey, or of "threshold" the bits."""
    if how == "threshold":
        return above_half(images, max_value).float()
    return images * (1 / max_value) if images.dtype == torch.uint8 else images


class Targets:
    """What a model is given of images, bits or the pixels as they are: kept on a device, gathered when used; or left
    on the disk, and what was gathered brought to the device.

    Args:
        images: (N, D), uint8, values 0..max_value, or float32 in [0, 1].
        how: "dynamic": each pixel is set with its grey value as the probability (see `aevb.binarize`); "threshold":
            where it is above half; "none": pixels as they are, uint8, to be multiplied by `x_scale`, or float32.
        device: where they are kept.

    Attributes: x_scale, None but for "none" of bytes; streamed, whether the images stay on the disk: then an index may
    be on either side, and a step cannot be captured in a CUDA graph; images, what is gathered from, on the device
    (where they are streamed, no rows of it).
    """

    def __init__(self, images: Tensor | MappedImages, how: str, max_value: int, device: torch.device | str = "cpu"):
        self.max_value = max_value
        self.how = how
        self.dynamic = how == "dynamic"
        self.x_scale = 1 / max_value if how == "none" and images.dtype == torch.uint8 else None
        self.streamed = isinstance(images, MappedImages)
        self.device = torch.device(device)
        if isinstance(images, MappedImages):
            self._file = images
            self.images = torch.empty((0, images.shape[1]), dtype=images.dtype, device=device)
        else:
            self.images = (above_half(images, max_value) if how == "threshold" else images).to(device)

    def __len__(self) -> int:
        return len(self._file) if self.streamed else len(self.images)

    def __call__(self, index: Tensor, seed: Tensor) -> Tensor:
        """x of images `index`, (B,): (B, D), bool, uint8 or float32. The noise is that of the seed, 0-d, and the image:
        its number, or for streamed images its row in the file."""
        if self.streamed:
            return self._of_file(index, seed.cpu()).to(self.device)
        if not self.dynamic:
            return self.images.index_select(0, index)
        if self.images.dtype == torch.uint8:
            return binarize(self.images, index, seed=seed, max_value=self.max_value)
        return bernoulli_bits(self.images.index_select(0, index), index, seed)

    def all(self, seed: Tensor) -> Tensor:
        """x of all images, bool, or float32 in [0, 1]; what each of them is by `self(index, seed)`."""
        if self.streamed:
            found = self._all_of_file(seed)
        elif self.dynamic and self.images.dtype == torch.uint8:
            return binarize(self.images, seed=seed, max_value=self.max_value)
        elif self.dynamic:
            return bernoulli_bits(self.images, torch.arange(len(self.images), device=self.device), seed)
        else:
            found = self.images
        return found if self.x_scale is None else found * self.x_scale

    def _of_file(self, index: Tensor, seed: Tensor) -> Tensor:
        if self.dynamic:
            return self._file.binarized(index, seed)
        return above_half(self._file[index], self.max_value) if self.how == "threshold" else self._file[index]

    def _all_of_file(self, seed: Tensor) -> Tensor:
        """In the file's order, so that the disk is read from one end to the other."""
        out = torch.empty(
            self._file.shape, dtype=self.images.dtype if self.how == "none" else torch.bool, device=self.device
        )
        for index in self._file.file_order().split(_CHUNK):
            out[index.to(self.device)] = self(index, seed)
            self._file.release_rows(index)
        return out
