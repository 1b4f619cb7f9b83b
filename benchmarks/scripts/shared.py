"""What the scripts beside this share, none of which imports aevb: their options, and MNIST's images."""

import argparse
import gzip
from pathlib import Path

import numpy as np


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help="a folder with MNIST's IDX files")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; JAX takes a GPU where it finds one")
    return parser.parse_args()


def images(folder, part):
    """float32, (N, 784), in [0, 1]; part is "train" or "t10k"."""
    name = f"{part}-images-idx3-ubyte"
    plain = Path(folder, name)
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(Path(folder, f"{name}.gz").read_bytes())
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32) / 255
