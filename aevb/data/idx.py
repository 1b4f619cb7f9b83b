"""Reader of MNIST's IDX files."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from .raw import Part, Source, check_labels, name_of

_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # uint8 in 3 dimensions and in 1
FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_NAME = re.compile(r"(idx\d?([-._]?(ubyte|byte|int))?|ubyte)(\.gz)?$", re.IGNORECASE)
_IMAGES = re.compile(r"images([-._]?)idx3", re.IGNORECASE)


def is_idx(path: Path) -> bool:
    """Whether a file is an IDX file, by name or content.

    The start is read where the file has no suffix but .gz.
    """
    if _NAME.search(path.name):
        return True
    if path.suffix not in ("", ".gz"):
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == 4 and struct.unpack(">I", start)[0] in (_IMAGES_MAGIC, _LABELS_MAGIC)


def check_idx(parts: Collection[str], where: Path) -> None:
    """Checks that the parts in a folder are complete for MNIST.

    Raises:
        FileNotFoundError: A part is missing.
    """
    if missing := [f"{name}[.gz]" for part, name in FILES.items() if part not in parts]:
        raise FileNotFoundError(f"{str(where)!r} has no {' and no '.join(missing)}; expected MNIST's IDX files there")


def idx_file(path: Path) -> Source:
    """Returns an IDX file's images, with the labels from beside it."""
    return Source(name_of(path), {"train": idx_part(path, _labels_beside(path))}, max_value=255)


def _labels_beside(path: Path) -> Path | None:
    """Returns the file named "labels-idx1" beside an "images-idx3" file, or None."""
    name = path.name.removesuffix(".gz")
    if (said := _IMAGES.search(name)) is None:
        return None
    for separator in dict.fromkeys((said[1], "-", ".")):
        labels = path.with_name(_IMAGES.sub(f"labels{separator}idx1", name))
        for candidate in (labels, labels.with_name(labels.name + ".gz")):
            if candidate.is_file():
                return candidate
    return None


def idx_part(path: Path, labels_path: Path | None) -> Part:
    """Returns the images of an IDX file, with labels of another.

    Raises:
        ValueError: A damaged file, or labels of another number.
    """
    images = _read_idx(path, _IMAGES_MAGIC)
    labels = None if labels_path is None else idx_labels(labels_path)
    if labels is not None:
        check_labels(labels, labels_path, len(images), path)
    return Part(images, labels, str(path))


def idx_labels(path: Path) -> np.ndarray:
    """Returns the labels of an IDX file, uint8, (N,)."""
    return _read_idx(path, _LABELS_MAGIC)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Returns the uint8 values of an IDX file, gzipped or not.

    The format is a magic number, sizes (big-endian int32), values.
    """
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
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(sizes)
