"""Data sets of images: the shipped digits, and MNIST's IDX files."""

from __future__ import annotations

import gzip
import importlib.resources
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .ops import binarize

DIGITS_TEST = 297
FILE_TEST_FRACTION = 10  # of a single file, one image in so many is held out for the test

_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # uint8 in 3 dimensions, in 1
_SPLITS = ("train", "t10k")


@dataclass(frozen=True)
class Dataset:
    """Grey images, split into a training and a test part.

    Images are uint8, (N, H * W), their values 0..max_value, so that value * x_scale is in [0, 1]. Labels are int64,
    (N,), or None.

    Raises:
        ValueError: images or labels of another type, shape or range; an empty part.
    """

    name: str
    image_shape: tuple[int, int]  # H, W
    max_value: int
    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            shape = tuple(images.shape)
            if images.dtype != torch.uint8 or len(shape) != 2 or shape[1] != self.data_dim:
                raise ValueError(f"{part}_images is {images.dtype} {shape}; expected torch.uint8 (N, {self.data_dim})")
            if shape[0] == 0:
                raise ValueError(f"{part}_images is empty; expected at least one image")
            if (largest := int(images.max())) > self.max_value:
                raise ValueError(f"{part}_images holds {largest}; expected values in 0..{self.max_value}")
            if labels is not None and tuple(labels.shape) != shape[:1]:
                raise ValueError(f"{part}_labels has shape {tuple(labels.shape)}; expected ({shape[0]},), one an image")

    @property
    def data_dim(self) -> int:
        return math.prod(self.image_shape)

    @property
    def x_scale(self) -> float:
        return 1 / self.max_value


def load(source: str | os.PathLike[str]) -> Dataset:
    """A data set by name or path.

    * "digits": UCI's optical digits, shipped with the package: 1,797 images of 8x8, values 0..16. Split into 1,500 and
      297 at random, by a permutation that never changes.
    * a directory with MNIST's four IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k- ones,
      each gzipped (.gz) or not. The labels may be missing.
    * one IDX file of images: a tenth of them, by a permutation that never changes, is the test part. Labels are taken
      from the file beside it, where "images-idx3" in its name gives way to "labels-idx1".

    Raises:
        FileNotFoundError: nothing there. ValueError: a file that is truncated, damaged or of another kind.
    """
    if source == "digits":
        return _digits()
    path = Path(source).expanduser()
    if path.is_dir():
        return _idx_directory(path)
    if path.is_file():
        return _idx_file(path)
    raise FileNotFoundError(
        f"there is no data at {str(path)!r}; expected 'digits', a directory with MNIST's IDX files, or one such file"
    )


BINARIZATIONS = ("dynamic", "threshold", "none")


class Targets:
    """What a model is given of grey images, bits or the pixels as they are: bytes on a device, gathered when used.

    Args:
        images: (N, D), uint8, values 0..max_value.
        how: "dynamic": each pixel is set with its grey value as the probability (see `aevb.binarize`); "threshold":
            where it is above half; "none": pixels as they are, uint8, to be multiplied by `x_scale`.
        device: where they are kept.

    Attributes: x_scale, None but for "none".
    """

    def __init__(self, images: Tensor, how: str, max_value: int, device: torch.device | str = "cpu"):
        self.max_value = max_value
        self.dynamic = how == "dynamic"
        self.x_scale = 1 / max_value if how == "none" else None
        self.images = (images > max_value // 2 if how == "threshold" else images).to(device)

    def __call__(self, index: Tensor, seed: Tensor) -> Tensor:
        """x of images `index`, (B,): (B, D), bool or uint8. The noise is that of the seed, 0-d, and the image."""
        if self.dynamic:
            return binarize(self.images, index, seed=seed, max_value=self.max_value)
        return self.images[index]

    def all(self, seed: Tensor) -> Tensor:
        """x of all images, bool, or float32 in [0, 1]."""
        if self.dynamic:
            return binarize(self.images, seed=seed, max_value=self.max_value)
        return self.images if self.x_scale is None else self.images * self.x_scale


def _split(name: str, shape: tuple[int, int], max_value: int, images: Tensor, labels: Tensor | None, num_test: int):
    # RandomState's stream is frozen by numpy's compatibility policy: the split is the same for everyone, for ever.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    test, train = order[:num_test], order[num_test:]
    return Dataset(
        name=name,
        image_shape=shape,
        max_value=max_value,
        train_images=images[train],
        test_images=images[test],
        train_labels=None if labels is None else labels[train],
        test_labels=None if labels is None else labels[test],
    )


def _digits() -> Dataset:
    file = importlib.resources.files("aevb") / "datasets" / "digits.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    rows = torch.tensor([[int(value) for value in line.split(",")] for line in text.splitlines()])
    return _split("digits", (8, 8), 16, rows[:, :-1].to(torch.uint8), rows[:, -1], DIGITS_TEST)


def _idx_directory(path: Path) -> Dataset:
    names = [f"{part}-images-idx3-ubyte" for part in _SPLITS]
    files = [_with_or_without_gz(path / name) for name in names]
    missing = [f"{name}[.gz]" for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(f"{str(path)!r} has no {' and no '.join(missing)}; expected MNIST's IDX files there")
    (train, train_shape, train_labels), (test, test_shape, test_labels) = (_images_and_labels(f) for f in files if f)
    if train_shape != test_shape:
        raise ValueError(f"{files[1]} has images of {test_shape}, {files[0]} of {train_shape}; expected one shape")
    return Dataset(path.resolve().name, train_shape, 255, train, test, train_labels, test_labels)


def _idx_file(path: Path) -> Dataset:
    images, shape, labels = _images_and_labels(path)
    if len(images) < 2:
        raise ValueError(f"{path} holds one image; expected at least 2, one of them for the test")
    return _split(path.name.split(".")[0], shape, 255, images, labels, math.ceil(len(images) / FILE_TEST_FRACTION))


def _with_or_without_gz(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((p for p in candidates if p.is_file()), None)


def _images_and_labels(path: Path) -> tuple[Tensor, tuple[int, int], Tensor | None]:
    (count, height, width), pixels = _read_idx(path, _IMAGES_MAGIC)
    name = path.name.removesuffix(".gz")
    labels_path = _with_or_without_gz(path.with_name(name.replace("images-idx3", "labels-idx1")))
    labels = None
    if "images-idx3" in name and labels_path is not None:
        (num_labels,), labels = _read_idx(labels_path, _LABELS_MAGIC)
        if num_labels != count:
            raise ValueError(f"{labels_path} has {num_labels} labels; expected {count}, one an image of {path}")
    return pixels.view(count, height * width), (height, width), None if labels is None else labels.long()


def _read_idx(path: Path, magic: int) -> tuple[tuple[int, ...], Tensor]:
    """The sizes and the uint8 values, flat, of an IDX file: magic number, sizes (big-endian int32), values."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or damaged: its gzip data ends with {str(error)!r}") from error
    dims = magic & 0xFF
    kind = "images (magic number 0x803)" if magic == _IMAGES_MAGIC else "labels (magic number 0x801)"
    if len(data) < 4 or (found := struct.unpack_from(">I", data)[0]) != magic:
        start = f"starts with {found:#x}" if len(data) >= 4 else f"has {len(data)} bytes"
        raise ValueError(f"{path} {start}; expected an IDX file of {kind}")
    header = 4 + 4 * dims
    if len(data) < header:
        raise ValueError(f"{path} is truncated within its header: {len(data)} bytes, expected at least {header}")
    sizes = struct.unpack_from(f">{dims}I", data, 4)
    expected = header + math.prod(sizes)
    if len(data) != expected:
        how = "is truncated" if len(data) < expected else "is damaged"
        raise ValueError(f"{path} {how}: {len(data)} bytes, expected {expected} for {'x'.join(map(str, sizes))} values")
    if expected == header:
        raise ValueError(f"{path} is empty: {'x'.join(map(str, sizes))} values; expected at least one")
    return sizes, torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header)
