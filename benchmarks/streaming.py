"""`python -m benchmarks.streaming`: how fast an epoch of a .npy file on the disk is read.

Makes a file of random images in a folder, and reads it with nothing of it in the system's cache: from one end to the
other (what `dd` does), as `aevb.data.batches` has an epoch, and in a random order of images. No training: what is
measured is reading and gathering, or binarizing, batches.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aevb.data import MappedImages, Targets, batches, epoch_order

PIXELS = 784
_PIECE = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the file, 10^9 bytes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="that gather, beside the one that reads")
    parser.add_argument("--seconds", type=float, default=20, help="the longest that the random order is read")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "images.npy"
        write(path, int(args.gb * 1e9 / PIXELS))
        for name, run in (
            ("from one end to the other", lambda: sequential(path)),
            ("batches, gathered", lambda: gathered(path, args.batch_size, "none")),
            ("batches, binarized", lambda: gathered(path, args.batch_size, "dynamic")),
            ("from one end to the other", lambda: sequential(path)),
            ("a random order, gathered", lambda: at_random(path, args.batch_size, args.seconds, False)),
            ("the same, no read-ahead", lambda: at_random(path, args.batch_size, args.seconds, True)),
        ):
            drop(path)
            before, start = resident(), time.perf_counter()
            count, most = run()
            seconds = time.perf_counter() - start
            print(
                f"{name:28} {count / seconds:12,.0f} images/s {count * PIXELS / seconds / 1e6:8,.0f} MB/s   "
                f"resident: {(most - before) / 1e6:6,.0f} MB more",
                flush=True,
            )


def write(path: Path, count: int) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, PIXELS))
    rows = _PIECE // PIXELS
    noise = np.random.RandomState(0).randint(0, 256, (rows, PIXELS)).astype(np.uint8)
    for start in range(0, count, rows):
        array[start : start + rows] = noise[: count - start]
        array[start : start + rows, 0] = start // rows % 256
    array.flush()


def drop(path: Path) -> None:
    """Takes a file out of the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def sequential(path: Path) -> tuple[int, int]:
    buffer = memoryview(bytearray(_PIECE))
    size = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    return size // PIXELS, resident()


def gathered(path: Path, batch_size: int, how: str) -> tuple[int, int]:
    images = MappedImages(path)
    return _use(images, how, batches(images, epoch_order(images, 1), batch_size), float("inf"))


def at_random(path: Path, batch_size: int, seconds: float, single: bool) -> tuple[int, int]:
    """With the system's read-ahead, which has all of a file that fits in memory there soon; or without, as where the
    file is much larger, and what was read ahead is gone before its turn comes."""
    images = MappedImages(path)
    if single:
        images._mapping.madvise(mmap.MADV_RANDOM)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return _use(images, "none", iter(order.split(batch_size)), seconds)


def _use(images: MappedImages, how: str, indices: Iterator[Tensor], seconds: float) -> tuple[int, int]:
    """Images gathered, and the most memory that was resident, looked at each few batches."""
    targets, seed, count, most, start = (
        Targets(images, how, images.max_value),
        torch.tensor(1),
        0,
        0,
        time.perf_counter(),
    )
    for i, index in enumerate(indices):
        targets(index, seed)
        count += len(index)
        if i % 20 == 0 or seconds < float("inf"):
            most = max(most, resident())
            if time.perf_counter() - start > seconds:
                break
    return count, most


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
