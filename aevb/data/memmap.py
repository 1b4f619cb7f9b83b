"""Memory-mapped images of a .npy file that may be larger than memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..ops import binarize
from .noise import bernoulli_bits
from .sentences import damaged
from .shapes import image_shape
from .value_ranges import KINDS, check_rows, readings

_MAPPED_AROUND = 1 << 21  # most bytes on each side of a page that are mapped with it: a huge page
_SAMPLE_BYTES = 1 << 24  # bytes at start, middle and end, to tell bits, bytes and [0, 1] apart


class MappedImages:
    """Memory-mapped images, (N, D), of a .npy file, read when gathered.

    ``images[index]``, for an int64 tensor or a slice, is a tensor. It is uint8, or float32 in [0, 1] where the file's
    dtype is neither uint8 nor bool. Gathered values are checked first, so that no NaN and nothing out of range gets
    into training. Only bytes are not checked: they may have any value.

    Attributes:
        path: The file.
        shape: (N, D).
        dtype: Of gathered images.
        max_value: As in `Dataset`.
        rows: (N,), int64, the file's rows of these images, or None for all; parts of a split share one mapping.
        image_shape: (H, W) or (C, H, W).
        kind: Kind of the values, of `KINDS`.

    Args:
        path: A .npy file of numbers in C order: (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C).

    Raises:
        ValueError: A file of another kind or order; or, with the place, a value out of range.
    """

    def __init__(self, path: Path):
        array = open_npy(path)
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{path} is in Fortran order, so that an image lies all over the file; expected C order: "
                "np.save(path, np.ascontiguousarray(images))"
            )
        self.path = path
        self.file_shape = array.shape
        self.image_shape, channels_last, _ = image_shape(array.shape, str(path))
        self.rows: Tensor | None = None
        self._array = array.reshape(len(array), -1)
        self._mapping = cast(mmap.mmap, array.base)
        self._start = array.offset
        self._mapped_from = array.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._channels = array.shape[-1] if channels_last else 1
        self.kind = self._look()
        # Bytes are gathered and binarized in one pass, from the mapping.
        is_bytes = array.dtype in (np.bool_, np.uint8)
        self._bytes = torch.from_numpy(self._array.view(np.uint8)) if is_bytes else None
        self.dtype = torch.uint8 if is_bytes else torch.float32
        self.max_value = KINDS[self.kind].max_value if is_bytes else 1
        self._file_order: Tensor | None = None

    def _look(self) -> str:
        """Returns the kind of the values, judged from samples of the file.

        A file of [0, 1] may have a part that is all 0 and 1.
        """
        array, found = self._array, set(KINDS)
        if array.dtype.kind == "f":
            found -= {"bits", "fractions"}
        count = max(1, _SAMPLE_BYTES // self.row_bytes)
        for first in (0, max(0, len(array) // 2 - count), max(0, len(array) - count)):
            found &= readings(array[first : first + count], str(self.path), first)
            if not found:
                raise ValueError(f"{self.path} has values both in [0, 1] and above; expected 0..255 or [0, 1]")
        return next(kind for kind in KINDS if kind in found)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the images."""
        return len(self), self._array.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of an image in the file."""
        return self._array[0].nbytes

    def __len__(self) -> int:
        return len(self._array) if self.rows is None else len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = self.file_rows(index)
        return self._channels_first(self._gathered(rows))

    def part(self, index: Tensor) -> MappedImages:
        """Returns the images `index`, (M,), as a part of the same mapping."""
        part = object.__new__(MappedImages)
        vars(part).update(vars(self), rows=self.file_rows(index), _file_order=None)
        return part

    def binarized(self, index: Tensor, seed: Tensor | int) -> Tensor:
        """Returns `aevb.binarize` of images `index`, (B,).

        The noise belongs to their rows in the file.
        """
        rows = self.file_rows(index)
        if self._bytes is None:
            return bernoulli_bits(self[index], rows, seed)
        if self.kind == "bits":
            self._gathered(rows)
        return self._channels_first(binarize(self._bytes, rows, seed=seed, max_value=self.max_value))

    def file_rows(self, index: Tensor | slice) -> Tensor:
        """Returns the file's rows of images `index`, on the CPU."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        index = index.cpu()
        return index if self.rows is None else self.rows[index]

    def file_order(self) -> Tensor:
        """Returns the images' indices, (N,), in the order of the file."""
        if self._file_order is None:
            self._file_order = torch.arange(len(self)) if self.rows is None else self.rows.argsort()
        return self._file_order

    def byte_range(self, first_row: int, last_row: int) -> tuple[int, int]:
        """Returns the bytes' start and end of the rows first_row..last_row."""
        return self._start + first_row * self.row_bytes, self._start + (last_row + 1) * self.row_bytes

    def release(self, start: int, end: int) -> None:
        """Gives the memory of the file's bytes start:end back.

        So is the memory that the system mapped around them. The bytes can be read again, and the system may have cached
        them.
        """
        start = max(0, start - self._mapped_from - _MAPPED_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(len(self._mapping), end - self._mapped_from + _MAPPED_AROUND)
        self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def release_rows(self, index: Tensor) -> None:
        """Gives the memory of images that are neighbours in the file back."""
        rows = self.file_rows(index)
        if len(rows):
            self.release(*self.byte_range(int(rows.min()), int(rows.max())))

    def _gathered(self, rows: Tensor) -> Tensor:
        if self._bytes is not None:
            values = self._bytes.index_select(0, rows)  # 8 times faster than [rows]
            if self.kind == "bits":
                check_rows(values.numpy(), rows.numpy(), self.kind, str(self.path))
            return values
        found = self._array[rows.numpy()]
        check_rows(found, rows.numpy(), self.kind, str(self.path))
        values = torch.from_numpy(found.astype(np.float32))
        return values if self.kind == "unit" else values / KINDS[self.kind].max_value

    def _channels_first(self, x: Tensor) -> Tensor:
        if self._channels == 1:
            return x
        return x.view(len(x), -1, self._channels).transpose(1, 2).flatten(1)


def open_npy(path: Path) -> np.memmap:
    """Returns the array of a .npy file, mapped copy-on-write.

    Writes to it do not reach the file. Python objects are never unpickled.

    Raises:
        ValueError: A file that is truncated, damaged, or holds Python objects.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except Exception as error:
        raise damaged(path, error) from error
    size, expected = path.stat().st_size, array.offset + array.nbytes
    if size != expected:
        raise ValueError(f"{path} is damaged: {size} bytes, expected {expected} for an array of shape {array.shape}")
    return array
