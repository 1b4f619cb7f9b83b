"""MNIST's IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from .source import Part, Source

_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # uint8 in 3 dimensions, in 1
_SPLITS = ("train", "t10k")


def is_idx_directory(path: Path) -> bool:
    return any(path.glob("*-images-idx3-ubyte*"))


def idx_directory(path: Path, name: str | None = None) -> Source:
    names = [f"{part}-images-idx3-ubyte" for part in _SPLITS]
    files = [_with_or_without_gz(path / name) for name in names]
    missing = [f"{name}[.gz]" for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(f"{str(path)!r} has no {' and no '.join(missing)}; expected MNIST's IDX files there")
    train, test = (_images_and_labels(file) for file in files if file)
    return Source(name or path.resolve().name, {"train": train, "test": test}, max_value=255)


def idx_file(path: Path) -> Source:
    return Source(path.name.split(".")[0], {"train": _images_and_labels(path)}, max_value=255)


def _with_or_without_gz(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((p for p in candidates if p.is_file()), None)


def _images_and_labels(path: Path) -> Part:
    images = _read_idx(path, _IMAGES_MAGIC)
    name = path.name.removesuffix(".gz")
    labels_path = _with_or_without_gz(path.with_name(name.replace("images-idx3", "labels-idx1")))
    labels = None
    if "images-idx3" in name and labels_path is not None:
        labels = _read_idx(labels_path, _LABELS_MAGIC)
        if len(labels) != len(images):
            raise ValueError(f"{labels_path} has {len(labels)} labels; expected {len(images)}, one an image of {path}")
    return Part(images, labels, str(path))


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """The uint8 values of an IDX file: magic number, sizes (big-endian int32), values."""
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
