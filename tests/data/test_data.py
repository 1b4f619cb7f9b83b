"""The shipped digits, IDX files, and the sentences for files that are not right."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from aevb.data import Dataset, load

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def idx(values, shape, magic):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(values)


def write_part(folder, part, count, side=3, pack=bytes, suffix=""):
    pixels = [(7 * i) % 256 for i in range(count * side * side)]
    labels = [i % 10 for i in range(count)]
    images = idx(pixels, (count, side, side), 0x803)
    (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
    (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels, (count,), 0x801)))
    return pixels, labels


def test_digits():
    data = load("digits")
    assert (data.name, data.image_shape, data.max_value) == ("digits", (8, 8), 16)
    assert data.train_images.shape == (1500, 64)
    assert data.test_images.shape == (297, 64)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.max() * data.x_scale == 1
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's own counts
    assert data.test_labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]  # the split never changes
    assert torch.equal(data.test_images, load("digits").test_images)


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_directory(tmp_path, pack, suffix):
    pixels, labels = write_part(tmp_path, "train", 20, pack=pack, suffix=suffix)
    write_part(tmp_path, "t10k", 4, pack=pack, suffix=suffix)
    data = load(tmp_path)
    assert (data.name, data.image_shape, data.max_value) == (tmp_path.name, (3, 3), 255)
    assert data.train_images.flatten().tolist() == pixels
    assert data.train_labels.tolist() == labels
    assert len(data.test_images) == len(data.test_labels) == 4


def test_labels_may_be_missing(tmp_path):
    write_part(tmp_path, "train", 20)
    write_part(tmp_path, "t10k", 4)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert load(tmp_path).train_labels is None


def test_one_file_keeps_a_tenth_for_the_test(tmp_path):
    pixels, _ = write_part(tmp_path, "train", 25)
    data = load(tmp_path / "train-images-idx3-ubyte")
    assert (len(data.train_images), len(data.test_images)) == (22, 3)
    together = torch.cat([data.train_images, data.test_images])
    assert sorted(together.tolist()) == sorted(torch.tensor(pixels).view(25, 9).tolist())
    assert data.test_labels.shape == (3,)


def test_splits_never_change(tmp_path):
    """Which rows are in which part, by their first pixels: for ever, so that runs of any version can be compared."""
    np.savez(tmp_path / "some.npz", x=np.stack([np.arange(2500) // 256, np.arange(2500) % 256], 1), y=np.arange(2500))
    data = load(tmp_path / "some.npz", validation=0.1)
    assert [len(data.train_labels), len(data.test_labels), len(data.validation_labels)] == [2025, 250, 225]
    parts = torch.cat([data.train_labels, data.test_labels, data.validation_labels])
    assert torch.equal(parts.sort().values, torch.arange(2500))  # disjoint, and all
    for part in ("train", "test", "validation"):
        assert torch.equal(
            getattr(data, f"{part}_images").long() @ torch.tensor([256, 1]), getattr(data, f"{part}_labels")
        )
    whole = load(tmp_path / "some.npz")
    assert whole.validation_images is whole.validation_labels is None
    assert torch.equal(whole.test_labels, data.test_labels)  # whatever is held out for validation
    other = load(tmp_path / "some.npz", validation=0.1, split_seed=1)
    assert [x[:4].tolist() for x in (data.train_labels, data.test_labels, data.validation_labels)] == [
        [1939, 1855, 407, 153],
        [53, 2391, 2310, 728],
        [1237, 315, 559, 878],
    ]
    assert [x[:4].tolist() for x in (other.train_labels, other.test_labels, other.validation_labels)] == [
        [1335, 170, 174, 199],
        [1406, 297, 1276, 2368],
        [2058, 226, 2351, 2487],
    ]


def test_the_digits_have_a_validation_part_on_request():
    data, whole = load("digits", validation=0.2), load("digits")
    assert [len(data.train_images), len(data.test_images), len(data.validation_images)] == [1200, 297, 300]
    assert torch.equal(data.test_images, whole.test_images)
    assert data.description == "digits: 1,200 training, 297 test, 300 validation images of 8x8, values 0..16"
    assert sorted(data.train_images.tolist() + data.validation_images.tolist()) == sorted(whole.train_images.tolist())


def test_a_part_of_its_own_is_kept(tmp_path):
    write_part(tmp_path, "train", 20)
    write_part(tmp_path, "t10k", 4)
    data = load(tmp_path, validation=0.33)
    assert [len(data.train_images), len(data.test_images), len(data.validation_images)] == [13, 4, 7]
    assert torch.equal(data.test_images, load(tmp_path, split_seed=9).test_images)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"validation": 1.0}, "validation is 1.0; expected the fraction to hold out, from 0 up and below 1"),
        ({"validation": -0.1}, "validation is -0.1; expected"),
        ({"validation": float("nan")}, "validation is nan; expected"),
        ({"validation": 0.9999}, "validation is 0.9999 of 1500 training images; expected to leave one for training"),
        ({"split_seed": -1}, "split_seed is -1; expected 0 to 4294967295"),
        ({"split_seed": 2**32}, "split_seed is 4294967296; expected"),
    ],
)
def test_splits_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load("digits", **options)


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no data at '.*nowhere'; expected 'digits', 'mnist', .*a directory"
    ):
        load(tmp_path / "nowhere")
    write_part(tmp_path, "train", 20)
    with pytest.raises(FileNotFoundError, match=r"has no t10k-images-idx3-ubyte\[.gz\]; expected MNIST's IDX files"):
        load(tmp_path)


GOOD = idx(range(18), (2, 3, 3), 0x803)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (GOOD[:-1], "is truncated: 33 bytes, expected 34 for 2x3x3 values"),
        (GOOD + b"x", "is damaged: 35 bytes, expected 34"),
        (GOOD[:9], "is truncated within its header: 9 bytes, expected at least 16"),
        (b"", "has 0 bytes; expected an IDX file of images"),
        (b"\x89PNG....", r"starts with 0x89504e47; expected an IDX file of images \(magic number 0x803\)"),
        (idx(range(9), (9,), 0x801), "starts with 0x801; expected an IDX file of images"),
        (idx([], (0, 3, 3), 0x803), "is empty: 0x3x3 values"),
        (idx(range(9), (1, 3, 3), 0x803), "holds one image; expected at least 2"),
        (gzip.compress(GOOD, mtime=0)[:-9], "is truncated or damaged: its gzip data ends with"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"garbage", "is truncated or damaged"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "some-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} {sentence}"):
        load(path)


def test_parts_that_do_not_fit(tmp_path):
    write_part(tmp_path, "train", 20)
    write_part(tmp_path, "t10k", 4, side=2)
    with pytest.raises(ValueError, match=r"images of \(2, 2\), .* of \(3, 3\); expected one shape"):
        load(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx([1, 2], (2,), 0x801))
    with pytest.raises(ValueError, match="has 2 labels; expected 20, one an image"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_images": torch.rand(4, 6)}, "train_images is torch.float32"),
        ({"test_images": torch.zeros(4, 5, dtype=torch.uint8)}, r"test_images is torch.uint8 \(4, 5\); expected .*6"),
        ({"test_images": torch.zeros(0, 6, dtype=torch.uint8)}, "test_images is empty"),
        ({"train_images": torch.full((4, 6), 17, dtype=torch.uint8)}, r"holds 17; expected values in 0\.\.16"),
        (
            {"train_images": torch.full((4, 6), -1.0), "max_value": 1},
            r"train_images holds -1; expected values in 0\.\.1",
        ),
        ({"train_images": torch.full((4, 6), 1.5), "max_value": 1}, "train_images holds 1.5; expected"),
        ({"test_images": torch.full((4, 6), float("nan")), "max_value": 1}, "test_images holds nan; expected"),
        ({"test_images": torch.zeros(4, 6), "max_value": 1}, "the parts have images of .*; expected one dtype"),
        ({"validation_images": torch.zeros(4, 5, dtype=torch.uint8)}, r"validation_images is torch.uint8 \(4, 5\)"),
        ({"validation_labels": torch.zeros(4)}, "there are validation_labels but no validation_images"),
        ({"train_labels": torch.zeros(3)}, r"train_labels has shape \(3,\); expected \(4,\)"),
    ],
)
def test_dataset_checks_its_parts(changes, sentence):
    images = torch.ones(4, 6, dtype=torch.uint8)
    parts = {"train_images": images, "test_images": images, **changes}
    with pytest.raises(ValueError, match=sentence):
        Dataset(**{"name": "mine", "image_shape": (2, 3), "max_value": 16, **parts})


def test_a_dataset_of_floats():
    data = Dataset("mine", (3, 2, 1), 1, torch.rand(4, 6), torch.rand(2, 6), note="from elsewhere")
    assert (data.x_scale, data.data_dim) == (1.0, 6)
    assert data.description == "mine: 4 training, 2 test images of 3x2x1, values in [0, 1]; from elsewhere"


@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST in ../shared/data/mnist")
def test_mnist():
    data = load(MNIST)
    assert data.train_images.shape == (60000, 784)
    assert data.test_images.shape == (10000, 784)
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
