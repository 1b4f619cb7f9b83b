"""MNIST's images from its IDX files, as the scripts beside this read them."""

import gzip
from pathlib import Path

import numpy as np


def images(folder, part):
    """float32, (N, 784), in [0, 1]; part is "train" or "t10k"."""
    name = f"{part}-images-idx3-ubyte"
    plain = Path(folder, name)
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(Path(folder, f"{name}.gz").read_bytes())
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32) / 255
