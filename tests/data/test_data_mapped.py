"""Images that stay on the disk: the same as in memory, checked as they are read, in an order that reads long pieces."""

import os
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import aevb
from aevb.data import Dataset, MappedImages, Targets, batches, epoch_order, load
from aevb.data.order import _Reader

SEED = torch.tensor(11)


@pytest.fixture
def mapped(monkeypatch):
    """All files are mapped; blocks are of 400 bytes, and windows of 4."""
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 0)
    monkeypatch.setattr("aevb.data.order.BLOCK_BYTES", 400)
    monkeypatch.setattr("aevb.data.order.WINDOW_BLOCKS", 4)


def numbers(*size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, size)


KINDS = {
    "bytes": numbers(103, 20).astype(np.uint8),
    "colour": numbers(103, 4, 5, 3).astype(np.uint8),
    "bits": (numbers(103, 20) < 50).astype(np.uint8),
    "bool": numbers(103, 20) < 50,
    "unit": np.random.RandomState(0).rand(103, 20).astype(np.float32),
    "doubles": np.random.RandomState(0).rand(103, 20),
    "float bytes": numbers(103, 20).astype(np.float32),
    "int64": numbers(103, 20),
    "big-endian": numbers(103, 4, 5, 3).astype(">i2"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["none", "threshold", "dynamic"])
def test_batches_are_those_of_memory(tmp_path, monkeypatch, mapped, kind, how):
    images = KINDS[kind]
    np.save(tmp_path / "some.npy", images)
    on_disk = load(tmp_path / "some.npy", validation=0.2, split_seed=3)
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 1 << 30)
    in_memory = load(tmp_path / "some.npy", validation=0.2, split_seed=3)
    assert on_disk.image_shape == in_memory.image_shape
    assert "some.npy as they are used" in on_disk.description
    for part in ("train", "test", "validation"):
        theirs, ours = getattr(in_memory, f"{part}_images"), getattr(on_disk, f"{part}_images")
        assert isinstance(ours, MappedImages)
        assert isinstance(theirs, torch.Tensor)
        assert ours.shape == theirs.shape
        expected, found = Targets(theirs, how, in_memory.max_value), Targets(ours, how, on_disk.max_value)
        assert len(found) == len(expected) == len(ours)
        every = found.all(SEED)
        for index in epoch_order(ours, 5).split(17):
            x = found(index, SEED)
            assert torch.equal(x if found.x_scale is None else x * found.x_scale, every[index])
            if how != "dynamic":
                scale = on_disk.x_scale / in_memory.x_scale
                assert x.dtype == (torch.bool if how == "threshold" else ours.dtype)
                torch.testing.assert_close(
                    x.float() * (scale if how == "none" else 1), expected(index, SEED).float(), rtol=1e-6, atol=1e-6
                )


def test_the_noise_of_bytes_is_that_of_their_rows_in_the_file(tmp_path, mapped):
    whole = torch.from_numpy(KINDS["bytes"])
    np.save(tmp_path / "some.npy", KINDS["bytes"])
    train = load(tmp_path / "some.npy").train_images
    rows = torch.from_numpy(np.random.RandomState(0).permutation(103))[11:]
    index = torch.tensor([5, 80, 5, 0])
    assert torch.equal(Targets(train, "dynamic", 255)(index, SEED), aevb.binarize(whole, rows[index], seed=SEED))
    assert torch.equal(train[index], whole[rows[index]])
    assert torch.equal(train[3:9], whole[rows[3:9]])
    everything = Targets(MappedImages(tmp_path / "some.npy"), "dynamic", 255)
    assert torch.equal(everything.all(SEED), Targets(whole, "dynamic", 255).all(SEED))


def test_what_a_trainer_looks_at(tmp_path, mapped):
    np.save(tmp_path / "some.npy", KINDS["bits"])
    data = load(tmp_path / "some.npy")
    targets = Targets(data.train_images, "none", 1)
    assert (targets.streamed, targets.x_scale, targets.images.shape) == (True, 1.0, (0, 20))
    assert not Targets(torch.zeros(3, 4, dtype=torch.uint8), "none", 255).streamed
    assert Dataset("mine", data.image_shape, 1, data.train_images, data.test_images).values == "bits"
    with pytest.raises(ValueError, match=r"max_value is 255; expected 1, that of .*some.npy"):
        Dataset("mine", data.image_shape, 255, data.train_images, data.test_images)


def test_only_large_files_are_mapped(tmp_path, monkeypatch):
    np.save(tmp_path / "some.npy", KINDS["bytes"])
    assert isinstance(load(tmp_path / "some.npy").train_images, torch.Tensor)
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 103 * 20 - 1)
    assert isinstance(load(tmp_path / "some.npy").train_images, MappedImages)


# ---- what is wrong in a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("unit", np.nan, "is nan; expected a value in \\[0, 1\\]"),
        ("unit", 1.5, "is 1.5; expected a value in"),
        ("doubles", -0.5, "is -0.5; expected a value in"),
        ("float bytes", np.nan, "is nan; expected a whole number in 0..255"),
        ("float bytes", 7.5, "is 7.5; expected a whole number"),
        ("int64", 256, "is 256; expected a whole number"),
        ("bits", 2, "is 2; expected 0 or 1"),
    ],
)
@pytest.mark.parametrize("how", ["dynamic", "threshold", "none"])
def test_no_bad_value_gets_into_a_batch(tmp_path, monkeypatch, mapped, kind, value, sentence, how):
    """Where the look at the file did not see it: whoever gathers it is told."""
    monkeypatch.setattr("aevb.data.memmap._SAMPLE_BYTES", 1)
    images = KINDS[kind].copy()
    images[30, 7] = value
    np.save(tmp_path / "some.npy", images)
    targets = Targets(MappedImages(tmp_path / "some.npy"), how, 1)
    good = torch.tensor([29, 31])
    assert len(targets(good, SEED)) == 2
    with pytest.raises(ValueError, match=f"some.npy: datapoint 30, pixel 7 {sentence}"):
        targets(torch.tensor([29, 30]), SEED)
    with pytest.raises(ValueError, match="datapoint 30, pixel 7"):
        targets.all(SEED)


def test_a_nan_ends_training_with_a_sentence(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr("aevb.data.memmap._SAMPLE_BYTES", 1)
    images = KINDS["unit"].copy()
    row = int(np.random.RandomState(0).permutation(103)[50])  # of the training part
    images[row, 7] = np.nan
    np.save(tmp_path / "some.npy", images)
    config = aevb.TrainConfig(data=str(tmp_path / "some.npy"), out=str(tmp_path / "run"), epochs=1, progress=False)
    with pytest.raises(ValueError, match=f"datapoint {row}, pixel 7 is nan"):
        aevb.Trainer(config).fit()


def test_what_is_seen_when_it_is_opened(tmp_path, mapped):
    images = KINDS["unit"].copy()
    images[51, 3] = np.nan
    np.save(tmp_path / "some.npy", images)
    with pytest.raises(ValueError, match="datapoint 51, pixel 3 is nan"):
        load(tmp_path / "some.npy")
    np.save(tmp_path / "some.npy", np.asfortranarray(KINDS["unit"]))
    with pytest.raises(ValueError, match=r"is in Fortran order, .*; expected C order"):
        load(tmp_path / "some.npy")


def test_the_start_the_middle_and_the_end_agree(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr("aevb.data.memmap._SAMPLE_BYTES", 20)
    images = KINDS["unit"].copy()
    images[-1] = 200
    np.save(tmp_path / "some.npy", images)
    with pytest.raises(ValueError, match=r"has values both in \[0, 1\] and above"):
        load(tmp_path / "some.npy")


def test_a_large_header(tmp_path, mapped):
    """The array may start anywhere in a page, or pages into the file."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (103, 20), }".ljust(9999) + b"\n"
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + KINDS["bytes"].tobytes()
    (tmp_path / "some.npy").write_bytes(content)
    images = MappedImages(tmp_path / "some.npy")
    order = epoch_order(images, 1)
    found = torch.cat([images[index] for index in batches(images, order, 10)])
    assert torch.equal(found, torch.from_numpy(KINDS["bytes"])[order])


# ---- orders and reading ---------------------------------------------------------------------------------------------


def test_the_order_in_memory_is_randperm():
    images = torch.zeros(1500, 4, dtype=torch.uint8)
    expected = torch.randperm(1500, generator=torch.Generator().manual_seed(-7))
    assert torch.equal(epoch_order(images, -7), expected)
    assert torch.equal(torch.cat(list(batches(images, expected, 64))), expected)


def test_the_order_of_a_file(tmp_path, mapped):
    np.save(tmp_path / "some.npy", numbers(1000, 20).astype(np.uint8))  # 50 blocks of 20 images, 13 windows
    images = load(tmp_path / "some.npy").train_images
    order = epoch_order(images, 5)
    assert torch.equal(order.sort().values, torch.arange(900))
    assert torch.equal(order, epoch_order(load(tmp_path / "some.npy").train_images, 5))
    assert not torch.equal(order, epoch_order(images, 6))
    assert order[:6].tolist() == [60, 672, 291, 251, 274, 786]  # for ever: a run can be resumed
    place = torch.empty(900, dtype=torch.int64)
    place[images.file_order()] = torch.arange(900)
    for window in place[order].split(4 * 20):
        blocks, counts = (window // 20).unique(return_counts=True)
        assert len(blocks) <= 4
        assert counts.tolist() == [20] * len(blocks)
        assert (window.diff() == 1).double().mean() < 0.2  # mixed within


def test_each_byte_is_read_once_and_ahead(tmp_path, mapped, monkeypatch):
    np.save(tmp_path / "some.npy", numbers(1000, 20).astype(np.uint8))
    images = load(tmp_path / "some.npy").train_images
    read, preadv = [], os.preadv
    monkeypatch.setattr("aevb.data.order._GAP_BYTES", 0)

    def recorded(descriptor, buffers, start):
        count = preadv(descriptor, buffers, start)
        read.append((start, count, threading.current_thread().name))
        return count

    monkeypatch.setattr(os, "preadv", recorded)
    order = epoch_order(images, 5)
    for i, index in enumerate(batches(images, order, 30)):
        if i == 0:
            time.sleep(0.2)
            assert sum(count for _, count, _ in read) == 2 * 4 * 20 * 20  # this window and the next, and no more
        needed = {images.byte_range(int(r), int(r)) for r in images.file_rows(index)}
        there = [(start, start + count) for start, count, _ in read]
        assert all(any(a <= start and end <= b for a, b in there) for start, end in needed), i
    assert {name for *_, name in read} == {"aevb-reader"}
    assert sum(count for _, count, _ in read) == 900 * 20
    assert not any(thread.name == "aevb-reader" for thread in threading.enumerate())


def test_a_part_of_an_order(tmp_path, mapped):
    """A process's share, or what is left of an epoch."""
    np.save(tmp_path / "some.npy", numbers(1000, 20).astype(np.uint8))
    images = MappedImages(tmp_path / "some.npy")
    whole = epoch_order(images, 5)
    assert torch.equal(torch.cat(list(batches(images, whole, 300))), whole)  # of several windows
    for order in (epoch_order(images, 5)[1::3], epoch_order(images, 5)[777:], torch.arange(0)):
        assert torch.equal(torch.cat([torch.arange(0), *batches(images, order, 64)]), order)


def test_a_reader_that_is_left_stops(tmp_path, mapped):
    np.save(tmp_path / "some.npy", numbers(1000, 20).astype(np.uint8))
    images = MappedImages(tmp_path / "some.npy")
    stream = batches(images, epoch_order(images, 5), 64)
    next(stream)
    stream.close()
    assert not any(thread.name == "aevb-reader" for thread in threading.enumerate())


def test_a_file_that_was_shortened(tmp_path, mapped):
    path = tmp_path / "some.npy"
    np.save(path, numbers(1000, 20).astype(np.uint8))
    images = MappedImages(path)
    os.truncate(path, 10_000)
    with pytest.raises(OSError, match=r"some.npy has \d+ bytes, and had \d+ or more when it was opened"):
        list(batches(images, epoch_order(images, 5), 64))


def test_memory_is_given_back(tmp_path, monkeypatch):
    """An epoch of 96 MB in windows of 8 MB holds less than 24 MB of the file, on the mean; without `batches`, all. (On
    a busy machine the system may map more around what is read, for a moment.)"""
    monkeypatch.setattr("aevb.data.order.BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr("aevb.data.order.WINDOW_BLOCKS", 8)
    np.save(tmp_path / "some.npy", np.zeros((96_000, 1000), np.uint8))
    images = MappedImages(tmp_path / "some.npy")
    order = epoch_order(images, 1)
    images.release(*images.byte_range(0, len(images) - 1))

    def of_file():
        lines = Path("/proc/self/smaps").read_text().split(str(tmp_path / "some.npy"))[1].splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss")) * 1024

    held = []
    for index in batches(images, order, 1000):
        images[index]
        held.append(of_file())
    assert 4e6 < sum(held) / len(held) < 24e6
    assert max(held) < 64e6
    assert of_file() < 1e6
    for index in order.split(1000):
        images[index]
    assert of_file() > 90e6


def test_training_from_the_disk(tmp_path, mapped):
    np.save(tmp_path / "some.npy", KINDS["bytes"])

    def run(out):
        config = aevb.TrainConfig(
            data=str(tmp_path / "some.npy"),
            out=str(tmp_path / out),
            epochs=2,
            hidden_dims=(8,),
            latent_dim=2,
            progress=False,
        )
        return aevb.Trainer(config).fit()  # in one batch, of several windows

    first, second = run("a"), run("b")
    assert first["test_elbo"] == second["test_elbo"]
    models = [aevb.VAE.load(tmp_path / out / "model.safetensors").state_dict() for out in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


def test_the_reader_says_what_went_wrong(tmp_path, mapped, monkeypatch):
    np.save(tmp_path / "some.npy", numbers(1000, 20).astype(np.uint8))
    images = MappedImages(tmp_path / "some.npy")
    monkeypatch.setattr(_Reader, "_ranges", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches(images, epoch_order(images, 5), 64))
