"""Files that are damaged: they load, or one sentence names the file. AEVB_FUZZ is how many of each kind to try."""

import gzip
import io
import os
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import aevb
from aevb.data import load
from aevb.training.checkpoint import Checkpoints, unpack

CASES = int(os.environ.get("AEVB_FUZZ", "60"))
GREY = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
LABELS = np.arange(12) % 3


def npy(array=GREY):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(compressed):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, x_train=GREY, y_train=LABELS, x_test=GREY[:3])
    return file.getvalue()


def mat(compressed):
    scipy_io = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    scipy_io.savemat(file, {"x": GREY.reshape(12, 64), "y": LABELS}, do_compression=compressed)
    return file.getvalue()


def idx():
    return struct.pack(">IIII", 0x803, *GREY.shape) + GREY.tobytes()


def amat():
    lines = (" ".join(str(float(v > 127)) for v in image.reshape(-1)) for image in GREY)
    return "\n".join(lines).encode()


def picture(form, mode="L", **options):
    file = io.BytesIO()
    Image.fromarray(GREY[0]).convert(mode).save(file, form, **options)
    return file.getvalue()


FILES = {
    "a.npy": npy,
    "floats.npy": lambda: npy(GREY.astype(np.float32) / 255),
    "stored.npz": lambda: npz(False),
    "deflated.npz": lambda: npz(True),
    "stored.mat": lambda: mat(False),
    "deflated.mat": lambda: mat(True),
    "a-images-idx3-ubyte": idx,
    "a-images-idx3-ubyte.gz": lambda: gzip.compress(idx(), mtime=0),
    "a.amat": amat,
    "a.amat.gz": lambda: gzip.compress(amat(), mtime=0),
}
PICTURES = {
    "a.png": lambda: picture("PNG"),
    "palette.png": lambda: picture("PNG", "P"),
    "a.jpg": lambda: picture("JPEG"),
    "a.ppm": lambda: picture("PPM", "RGB"),
    "a.gif": lambda: picture("GIF"),
    "a.bmp": lambda: picture("BMP"),
    "a.tif": lambda: picture("TIFF"),
    "deflated.tif": lambda: picture("TIFF", compression="tiff_deflate"),
    "a.webp": lambda: picture("WEBP"),
}


def mutated(data, chance):
    """Bytes that are others, fewer, more, or again."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        place = chance.randrange(len(data)) if data else 0
        # Headers are at the start or the end, and are short.
        place = chance.choice([place, min(place, 200), max(0, len(data) - 1 - place % 200)])
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[place] = chance.randrange(256)
        elif kind == 1 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + chance.choice([1, 4, 100])]
        elif kind == 4:
            data[place:place] = chance.choice([b"\0", b"\xff" * 4, data[:50], b"9" * 10])
        elif data:
            words = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"-1.5", b"nan "]
            data[place : place + 4] = chance.choice(words)
    return bytes(data)


def each_case(kind):
    return (random.Random(f"{kind} {number}") for number in range(CASES))


def loads_or_names(call, path, errors=(ValueError, OSError)):
    """The call gives something, or one sentence with the file's name in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except errors as error:
            text = str(error)
    assert path.name in text
    assert "\n" not in text.strip()
    return None


@pytest.mark.parametrize("name", FILES)
def test_data_files(tmp_path, name):
    path, data = tmp_path / name, FILES[name]()
    path.write_bytes(data)
    load(path)
    for chance in each_case(name):
        path.write_bytes(mutated(data, chance))
        found = loads_or_names(lambda: load(path), path)
        if found is not None:
            assert len(found.train_images) > 0


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("ignore")
def test_images(tmp_path, name):
    data = PICTURES[name]()
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}_{name}").write_bytes(data)
    load(folder)
    path = folder / f"1_{name}"
    for chance in each_case(name):
        path.write_bytes(mutated(data, chance))
        loads_or_names(lambda: load(folder), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "run"
    options = {"epochs": 1, "hidden_dims": (4,), "latent_dim": 2, "progress": False, "threads": 1}
    aevb.Trainer(aevb.TrainConfig(out=str(out), **options)).fit()
    return out


def assert_same(checkpoint, other):
    assert checkpoint.numbers == other.numbers
    assert checkpoint.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(t, other.tensors[name]) for name, t in checkpoint.tensors.items())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoint"])
def test_a_runs_files(run, name):
    path = max((run / "checkpoints").glob("step-*")) if name == "checkpoint" else run / name
    data = path.read_bytes()
    x = torch.rand(2, 64)
    try:
        for chance in each_case(name):
            path.write_bytes(mutated(data, chance))
            if name == "model.safetensors":
                model = loads_or_names(lambda: aevb.load(path), path)
                if model is not None and model.data_dim == 64:
                    model.reconstruct(x)
            elif name == "config.json":
                loads_or_names(lambda: aevb.Trainer.load(run), path)
            else:
                found, wrong = Checkpoints(run).read()  # the one before, where this one is damaged
                assert found is not None
                if wrong:
                    assert path.name in wrong[0]
                else:
                    assert_same(unpack(found, path), unpack(data, path))
    finally:
        path.write_bytes(data)
