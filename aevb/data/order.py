"""Order of an epoch and its batches, with background reading from disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from .memmap import MappedImages

BLOCK_BYTES = 1 << 22  # consecutive images, shuffled as one block
WINDOW_BLOCKS = 32  # blocks shuffled with each other
_READ_BYTES = 1 << 22
_ANNOUNCED_BYTES = 1 << 20
_GAP_BYTES = 1 << 16  # a gap below this is read, not skipped


@takes_plain_values
def epoch_order(images: Tensor | MappedImages, seed: int) -> Tensor:
    """Returns the images' indices in the order of an epoch.

    For images in memory it is ``torch.randperm``. For images on the disk, blocks of 4 MiB of consecutive images are put
    in random order. Every 32 of them, a window of 128 MiB, are then shuffled with each other. So reads are long, and
    each window is read once.

    Args:
        images: (N, D).
        seed: Seed of the permutation, which depends on it and N alone.

    Returns:
        A permutation, (N,), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(images, MappedImages):
        return torch.randperm(len(images), generator=generator)
    blocks = images.file_order().split(_rows_of_block(images))
    shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()]
    windows = [torch.cat(shuffled[i : i + WINDOW_BLOCKS]) for i in range(0, len(shuffled), WINDOW_BLOCKS)]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


@takes_plain_values
def batches(images: Tensor | MappedImages, order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields the batches of `order`, or of any part of it.

    Of images on the disk, rows of the next batches are read in the background, and the memory of earlier batches is
    given back. Some 3 windows of 128 MiB are held at any time. Each image takes 16 bytes more, its place in the order
    and in the file.

    Args:
        images: (N, D).
        order: Indices of the images, int64.
        batch_size: Size of a batch; the last may be smaller.

    Yields:
        Indices, (batch_size,), int64.

    Raises:
        OSError: In a batch's turn, where the file cannot be read, or has become shorter.
    """
    if len(order) == 0:
        return
    if not isinstance(images, MappedImages):
        yield from order.split(batch_size)
        return
    with _Reader(images, order) as reader:
        for i, index in enumerate(order.split(batch_size)):
            reader.wait_for(i * batch_size, i * batch_size + len(index))
            yield index


def _rows_of_block(images: MappedImages) -> int:
    return max(1, BLOCK_BYTES // images.row_bytes)


class _Reader:
    """Background reader of an epoch's rows into the system's cache.

    It is a window or two ahead of the use of the rows.
    """

    def __init__(self, images: MappedImages, order: Tensor):
        self.images = images
        self.windows = order.cpu().split(_rows_of_block(images) * WINDOW_BLOCKS)
        self.size = len(self.windows[0])
        self.state = threading.Condition()
        self.ready = self.wanted = self.released = 0
        self.error: Exception | None = None
        self.stopped = False
        self.ranges: dict[int, list[tuple[int, int]]] = {}
        self.thread = threading.Thread(target=self._run, name="aevb-reader", daemon=True)

    def __enter__(self) -> _Reader:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self.state:
            self.stopped = True
            self.state.notify_all()
        self.thread.join()
        self._release(len(self.windows))

    def wait_for(self, start: int, end: int) -> None:
        """Waits until the rows of order[start:end] are read, and releases earlier ones."""
        with self.state:
            self.wanted = (end - 1) // self.size
            self.state.notify_all()
            self.state.wait_for(lambda: self.error or self.ready * self.size >= end or self.ready == len(self.windows))
            if self.error:
                raise self.error
        self._release(start // self.size)

    def _release(self, before: int) -> None:
        for window in range(self.released, before):
            for start, end in self.ranges.pop(window, []):
                self.images.release(start, end)
        self.released = before

    def _run(self) -> None:
        try:
            with open(self.images.path, "rb", buffering=0) as file:
                buffer = memoryview(bytearray(_READ_BYTES))
                for number, window in enumerate(self.windows):
                    with self.state:
                        while not self.stopped and number > self.wanted + 1:
                            self.state.wait()
                    ranges = self._ranges(window)
                    for start, end in ranges:
                        self._announce(file.fileno(), start, end)
                    for start, end in ranges:
                        self._read(file.fileno(), start, end, buffer)
                        if self.stopped:
                            return
                    self.ranges[number] = ranges
                    with self.state:
                        self.ready = number + 1
                        self.state.notify_all()
        except Exception as error:  # raised by `wait_for`
            with self.state:
                self.error = error
                self.state.notify_all()

    @staticmethod
    def _announce(descriptor: int, start: int, end: int) -> None:
        """Tells the system to read these bytes soon.

        The pieces are of a size that the system takes whole, so that the disk has more than one piece to do.
        """
        for piece in range(start, end, _ANNOUNCED_BYTES):
            os.posix_fadvise(descriptor, piece, min(_ANNOUNCED_BYTES, end - piece), os.POSIX_FADV_WILLNEED)

    def _read(self, descriptor: int, start: int, end: int, buffer: memoryview) -> None:
        """Reads the bytes into the page cache, where the mapping finds them."""
        while start < end:
            count = os.preadv(descriptor, [buffer[: end - start]], start)
            if count == 0:
                raise OSError(f"{self.images.path} has {start} bytes, and had {end} or more when it was opened")
            start += count

    def _ranges(self, window: Tensor) -> list[tuple[int, int]]:
        """Returns a window's byte ranges of the file, sorted, near ones joined."""
        rows = np.sort(self.images.file_rows(window).numpy())
        apart = np.flatnonzero(np.diff(rows) * self.images.row_bytes > _GAP_BYTES + self.images.row_bytes)
        firsts, lasts = rows[np.r_[0, apart + 1]], rows[np.r_[apart, len(rows) - 1]]
        return [self.images.byte_range(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]
