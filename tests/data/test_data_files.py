"""Every format that `load` reads, what it recognises in it, and the sentences for files that are not right."""

import gzip
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aevb
from aevb.data import Targets, load

SHARED = Path(__file__).parents[3] / "shared" / "data"


def numbers(*size, high=256, seed=0):
    return np.random.RandomState(seed).randint(0, high, size)


def together(data):
    """Images and labels of both parts, in one order that does not depend on the split."""
    images = torch.cat([data.train_images, data.test_images])
    return sorted(map(tuple, images.tolist()))


def as_sorted(images):
    return sorted(map(tuple, np.asarray(images).reshape(len(images), -1).tolist()))


def refused(path, sentence, error=ValueError):
    with pytest.raises(error, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value)


# ---- arrays: shapes and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shape", "said"),
    [
        ((20, 49), (7, 7), "images of 7x7"),
        ((20, 48), (1, 48), "48 values are no square, so an image is one row"),
        ((20, 5, 6), (5, 6), "images of 5x6"),
        ((20, 3, 5, 6), (3, 5, 6), "images of 3x5x6"),
        ((20, 1, 5, 6), (5, 6), "images of 5x6"),
        ((20, 5, 6, 1), (5, 6), "images of 5x6"),
        ((20, 4, 5, 3), (4, 5, 3), "images of 4x5x3"),  # both may be channels: those in front are
    ],
)
def test_shapes(tmp_path, size, shape, said):
    images = numbers(*size)
    np.save(tmp_path / "some.npy", images.astype(np.uint8))
    data = load(tmp_path / "some.npy")
    assert (data.name, data.image_shape) == ("some", shape)
    assert (len(data.train_images), len(data.test_images)) == (18, 2)
    assert together(data) == as_sorted(images)
    assert said in data.description


def test_channels_last_come_first(tmp_path):
    images = numbers(20, 5, 6, 3).astype(np.uint8)
    np.save(tmp_path / "some.npy", images)
    data = load(tmp_path / "some.npy")
    assert data.image_shape == (3, 5, 6)
    assert together(data) == as_sorted(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("images", "max_value", "dtype", "said"),
    [
        (numbers(20, 9), 255, torch.uint8, "values 0..255"),
        (numbers(20, 9).astype(">f8"), 255, torch.uint8, "values 0..255"),
        (numbers(20, 9, high=17), 255, torch.uint8, "the largest value is 16, and 255 would be white"),
        (numbers(20, 9, high=2), 1, torch.uint8, "bits"),
        (numbers(20, 9, high=2).astype(bool), 1, torch.uint8, "bits"),
        (numbers(20, 9, high=2).astype(np.float32), 1, torch.uint8, "bits"),
        (numbers(20, 9) / 255, 255, torch.uint8, r"given as multiples of 1/255 in \[0, 1\]"),
        (numbers(20, 9).astype(np.float32) / np.float32(255), 255, torch.uint8, "given as multiples of 1/255"),
        (np.random.RandomState(0).rand(20, 9), 1, torch.float32, r"values in \[0, 1\]"),
        (np.random.RandomState(0).rand(20, 9).astype(np.float16), 1, torch.float32, r"values in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_values_are_recognised(tmp_path, images, max_value, dtype, said, suffix):
    (np.save if suffix == "npy" else np.savez)(tmp_path / f"some.{suffix}", images)
    data = load(tmp_path / f"some.{suffix}")
    assert (data.max_value, data.train_images.dtype) == (max_value, dtype)
    assert re.search(said, data.description), data.description
    scale = 255 if images.max() > 1 else 1
    found = torch.cat([data.test_images, data.train_images]) * data.x_scale
    order = np.random.RandomState(0).permutation(20)
    torch.testing.assert_close(found.double(), torch.from_numpy(images[order] / scale).double(), rtol=0, atol=1e-6)


def changed(index, value, dtype=np.float64, high=256):
    images = numbers(40, 9, high=high).astype(dtype)
    images[index] = value
    return images


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            changed((7, 3), np.nan),
            r"datapoint 7, pixel 3 is nan, of values from \d to 25\d; expected 0\.\.255 or \[0, 1\]",
        ),
        (changed((7, 3), np.inf), "datapoint 7, pixel 3 is inf"),
        (changed((7, 3), -1), "datapoint 7, pixel 3 is -1, of values from -1 to 25"),
        (changed((7, 3), 256, np.int64), "datapoint 7, pixel 3 is 256"),
        (changed((7, 3), 0.5), "datapoint 7, pixel 3 is 0.5, and the largest is 25[0-9]; expected whole numbers"),
        (changed((7, 3), -0.01, high=2), "datapoint 7, pixel 3 is -0.01"),
        (np.full((4, 9), np.nan), "datapoint 0, pixel 0 is nan; expected"),
        (np.zeros((4, 9), complex), "holds complex128; expected numbers"),
        (np.full((4, 9), "a"), "holds <U1; expected numbers"),
        (np.zeros((0, 9)), r"is empty: its shape is \(0, 9\)"),
        (np.zeros((4, 0, 3)), r"is empty: its shape is \(4, 0, 3\)"),
        (np.zeros(9), r"has shape \(9,\); expected images: \(N, D\)"),
        (np.zeros((4, 2, 3, 5)), r"has shape \(4, 2, 3, 5\); expected images"),
        (np.zeros((4, 2, 3, 5, 1)), "has shape"),
        (np.zeros((1, 9)), "holds one image; expected at least 2"),
        (np.array([[1, None]], dtype=object), "holds Python objects, which are not loaded"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_bad_arrays_are_named(tmp_path, images, sentence, suffix):
    path = tmp_path / f"some.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, images, allow_pickle=True)
    refused(path, f"^{path}.*{sentence}")


def test_the_place_is_right_in_a_later_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("aevb.data.value_ranges.CHUNK_BYTES", 9 * 8 * 5)
    np.save(tmp_path / "some.npy", changed((33, 2), np.nan))
    refused(tmp_path / "some.npy", "datapoint 33, pixel 2 is nan")
    mixed = np.random.RandomState(0).rand(40, 9)
    mixed[30:] = 200
    np.save(tmp_path / "some.npy", mixed)
    refused(tmp_path / "some.npy", r"neither all whole nor all in \[0, 1\] \(the largest is at datapoint 30, pixel 0\)")


def test_damaged_npy(tmp_path):
    path = tmp_path / "some.npy"
    np.save(path, numbers(20, 9))
    good = path.read_bytes()
    for content, sentence in (
        (good[:-1], "is truncated or damaged"),
        (good[:40], "is truncated or damaged"),
        (good + b"x", f"is damaged: {len(good) + 1} bytes, expected {len(good)}"),
        (b"", "is empty; expected a .npy file"),
        (b"PK garbage", "starts with b'PK gar'; expected a .npy file"),
    ):
        path.write_bytes(content)
        refused(path, f"^{path} {sentence}")


def test_a_pickle_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    (tmp_path / "some.npy").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "some.npy", "expected a .npy file")
    np.save(tmp_path / "some.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    refused(tmp_path / "some.npy", "holds Python objects")
    assert not (tmp_path / "run").exists()


# ---- .npz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "label_key"), [("x", "y"), ("images", "labels"), ("data", "y"), ("X", "Y"), ("mine", None)]
)
def test_npz_keys(tmp_path, key, label_key):
    images, labels = numbers(20, 9), numbers(20, high=10)
    np.savez_compressed(tmp_path / "some.npz", **{key: images, **({label_key: labels[:, None]} if label_key else {})})
    data = load(tmp_path / "some.npz")
    assert together(data) == as_sorted(images)
    if label_key is None:
        assert data.train_labels is data.test_labels is None
    else:
        order = np.random.RandomState(0).permutation(20)
        assert torch.cat([data.test_labels, data.train_labels]).tolist() == labels[order].tolist()


def test_npz_with_the_parts_of_keras(tmp_path):
    train, val, test = numbers(20, 9), numbers(6, 9, seed=1), numbers(5, 9, seed=2)
    np.savez(tmp_path / "a.npz", x_train=train, y_train=np.arange(20), x_test=test, x_val=val, y_val=np.arange(6.0))
    data = load(tmp_path / "a.npz", validation=0.5)
    assert data.train_images.tolist() == train.tolist()
    assert data.test_images.tolist() == test.tolist()
    assert data.validation_images.tolist() == val.tolist()
    assert data.train_labels.tolist() == list(range(20))
    assert data.test_labels is None
    assert data.validation_labels.tolist() == list(range(6))
    assert data.description == "a: 20 training, 5 test, 6 validation images of 3x3, values 0..255"


def test_the_parts_have_one_kind_of_values(tmp_path):
    path = tmp_path / "a.npz"
    grey = np.random.RandomState(0).rand(20, 9)
    np.savez(path, x_train=grey, x_test=np.zeros((3, 9)))
    assert load(path).test_images.dtype == torch.float32
    np.savez(path, x_train=grey, x_test=numbers(3, 9))
    refused(path, r"\[x_train\], .*\[x_test\] have values of several ranges, 0\.\.255 and \[0, 1\]")
    np.savez(path, x_train=grey, x_test=grey[:, :4])
    refused(path, r"\[x_test\] has images of \(2, 2\), .*\[x_train\] of \(3, 3\); expected one shape")


def test_bad_npz(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, a=numbers(20, 9), b=numbers(20, 9))
    refused(path, "has 'a', 'b'; expected images as one of x, images, data, arr_0")
    np.savez(path, x=numbers(20, 9), y=numbers(19))
    refused(path, r"\[x\] has labels of shape \(19,\); expected \(20,\), one an image")
    np.savez(path, x=numbers(20, 9), y=numbers(20) + 0.5)
    refused(path, "has 172.5 as the label of image 0; expected whole numbers")
    good = path.read_bytes()
    path.write_bytes(good[:-30])
    refused(path, f"^{path} is truncated or damaged")
    path.write_bytes(good[:900] + b"garbage" + good[907:])
    refused(path, f"^{path} is truncated or damaged")


# ---- .mat ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs Frey's faces in ../shared/data/frey")
def test_frey():
    from scipy.io import loadmat

    data = load(SHARED / "frey" / "frey_rawface.mat")
    assert data.description == "frey_rawface: 1,768 training, 197 test images of 28x20, values 0..255"
    first = int(np.flatnonzero(np.random.RandomState(0).permutation(1965) == 0)[0])
    frames = torch.cat([data.test_images, data.train_images])
    assert frames[first].tolist() == loadmat(SHARED / "frey" / "frey_rawface.mat")["ff"][:, 0].tolist()
    smooth = frames.view(-1, 28, 20).float().diff(dim=1).abs().mean()
    assert smooth < 0.7 * frames.view(-1, 20, 28).float().diff(dim=1).abs().mean()  # so 28 are the rows


@pytest.mark.parametrize(
    ("size", "first", "shape"),
    [
        ((25, 30), (1, 0), (5, 5)),
        ((30, 25), (0, 1), (5, 5)),
        ((8, 6, 3, 40), (3, 0, 1, 2), (3, 8, 6)),
        ((40, 8, 6), (0, 1, 2), (8, 6)),
    ],
)
def test_mat_finds_the_datapoints(tmp_path, size, first, shape):
    scipy_io = pytest.importorskip("scipy.io")
    images = numbers(*size).astype(np.uint8)
    expected = images.transpose(first)
    scipy_io.savemat(tmp_path / "some.mat", {"X": images, "y": numbers(len(expected), 1, high=10)})
    data = load(tmp_path / "some.mat")
    assert data.image_shape == shape
    assert together(data) == as_sorted(expected.transpose(0, 3, 1, 2) if expected.ndim == 4 else expected)
    assert len(data.train_labels) + len(data.test_labels) == len(expected)
    assert ("the last dimension of the array counts the images" in data.description) == (first[0] != 0)


@pytest.mark.parametrize("last", [False, True])
def test_mat_with_parts(tmp_path, last):
    scipy_io = pytest.importorskip("scipy.io")
    arrays = {f"x_{part}": numbers(n, 5, 6, seed=n) for part, n in (("train", 20), ("test", 9), ("val", 3))}
    kept = {name: np.moveaxis(x, 0, -1) if last else x for name, x in arrays.items()}
    labels = {"y_train": np.arange(20), "y_test": np.arange(9)}
    scipy_io.savemat(tmp_path / "some.mat", {**{name: x.astype(np.uint8) for name, x in kept.items()}, **labels})
    data = load(tmp_path / "some.mat")
    for images, name in (
        (data.train_images, "x_train"),
        (data.test_images, "x_test"),
        (data.validation_images, "x_val"),
    ):
        assert images.tolist() == arrays[name].reshape(len(arrays[name]), -1).tolist()
    assert data.test_labels.tolist() == list(range(9))


def test_bad_mat(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "some.mat"
    scipy_io.savemat(path, {"x": "text"})
    refused(path, r"\[x\] is no array of numbers")
    scipy_io.savemat(path, {"a": numbers(20, 9), "b": numbers(20, 9)})
    refused(path, "has 'a', 'b'; expected images as one of")
    path.write_bytes(path.read_bytes()[:300])
    refused(path, f"^{path} is truncated or damaged")
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600))
    refused(path, f"^{path} is of MATLAB 7.3; expected MATLAB 5 to 7.2")


@pytest.mark.parametrize(
    ("compressed", "place", "value", "sentence"),
    [
        (False, 176, 0, "an element of type 0 at byte 176"),
        (False, 177, 127, r"an element of type \d{5} at byte 176"),
        (False, 145, 8, "a matrix that ends at byte"),
        (True, 200, 255, "Error -"),
        (True, -3, 255, "Error -"),
    ],
    ids=["no type", "unknown type", "complex, and has no imaginary part", "stream", "checksum"],
)
def test_mat_of_which_the_reader_would_die(tmp_path, compressed, place, value, sentence):
    path = tmp_path / "some.mat"
    pytest.importorskip("scipy.io").savemat(path, {"x": numbers(20, 9)}, do_compression=compressed)
    load(path)
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)
    refused(path, f"^{path} is truncated or damaged: .*{sentence}")


def test_mat_of_every_kind_of_variable_is_read(tmp_path):
    scipy_io, sparse = pytest.importorskip("scipy.io"), pytest.importorskip("scipy.sparse")
    others = {"a": np.ones(3) * 1j, "b": "text", "c": np.array([1, "a"], dtype=object), "e": np.zeros((0, 0))}
    others |= {
        "d": {"x": 1, "y": {"z": "s"}},
        "f": sparse.csr_matrix(np.eye(4)),
        "g": sparse.csr_matrix(np.eye(4) * 1j),
    }
    for compressed in (False, True):
        scipy_io.savemat(tmp_path / "some.mat", {"x": numbers(20, 9), **others}, do_compression=compressed)
        assert len(load(tmp_path / "some.mat").train_images)


@pytest.mark.parametrize(
    ("module", "package", "name"), [("scipy.io", "scipy", "some.mat"), ("PIL.Image", "pillow", "some")]
)
def test_a_missing_package_is_asked_for(tmp_path, monkeypatch, module, package, name):
    if name == "some.mat":
        (tmp_path / name).write_bytes(b"MATLAB 5.0 MAT-file")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    refused(tmp_path / name, f"needs {package}, which is not installed: pip install 'aevb", ImportError)


def test_optional_packages_are_imported_when_needed():
    code = (
        "import sys, aevb; aevb.data.load('digits'); print([m for m in ('pooch', 'scipy', 'PIL') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# ---- .amat -----------------------------------------------------------------------------------------------------------


def amat(images):
    return "".join("".join(f"{value:g} " for value in row) + "\n" for row in images).encode()


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ".amat"), (gzip.compress, ".amat.gz")])
def test_amat_directory(tmp_path, pack, suffix):
    parts = {part: numbers(n, 9, high=2, seed=n) for part, n in (("train", 20), ("valid", 4), ("test", 5))}
    for part, images in parts.items():
        (tmp_path / f"bits_{part}{suffix}").write_bytes(pack(amat(images)))
    data = load(tmp_path)
    assert data.train_images.tolist() == parts["train"].tolist()
    assert data.validation_images.tolist() == parts["valid"].tolist()
    assert data.test_images.tolist() == parts["test"].tolist()
    assert data.description == f"{tmp_path.name}: 20 training, 5 test, 4 validation images of 3x3, bits"
    (tmp_path / f"bits_valid{suffix}").unlink()
    refused(tmp_path, "ending in _train.amat, _valid.amat and _test.amat.*; missing: valid", FileNotFoundError)


def test_amat_in_other_spellings(tmp_path):
    path = tmp_path / "some.amat"
    grey = np.random.RandomState(0).rand(20, 9).round(3)
    path.write_bytes(amat(grey))
    assert load(path).train_images.dtype == torch.float32
    bits = numbers(20, 9, high=2)
    for text in (
        amat(bits),
        amat(bits).replace(b" \n", b"\n"),
        amat(bits).replace(b"\n", b"\r\n") + b"\n",
        amat(bits)[:-2],
    ):
        path.write_bytes(text)
        assert together(load(path)) == as_sorted(bits)


def test_bad_amat(tmp_path):
    path = tmp_path / "some.amat"
    for text, sentence in (
        (b"0 1 0\n0 1\n", ", line 2 has 2 values; expected 3, as in line 1"),
        (b"0 1 0\n0 1 x\n", ", line 2: could not convert .*; expected numbers"),
        (b"0 1 0\n0 1 nan\n", ": datapoint 1, pixel 2 is nan"),
        (b"\n", " is empty; expected an image a line"),
        (b"", " is empty"),
    ):
        path.write_bytes(text)
        refused(path, f"^{path}{sentence}")
    gz = tmp_path / "some.amat.gz"
    gz.write_bytes(gzip.compress(amat(numbers(20, 9, high=2)))[:-9])
    refused(gz, f"^{gz} is truncated or damaged: its gzip data ends with")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs binarized MNIST in ../shared/data/binarized_mnist")
def test_binarized_mnist():
    data = load(SHARED / "binarized_mnist")
    assert data.description == (
        "binarized_mnist: 50,000 training, 10,000 test, 10,000 validation images of 28x28, bits"
    )
    assert data.train_labels is None
    assert 0.12 < float(data.validation_images.double().mean()) < 0.14


# ---- folders of images -----------------------------------------------------------------------------------------------


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.mark.parametrize("size", [(5, 6), (5, 6, 3)])
def test_folder_of_images(tmp_path, size):
    images = numbers(12, *size).astype(np.uint8)
    for i, image in enumerate(images):
        save(tmp_path / f"{i:02}.{'PNG' if i % 2 else 'bmp'}", image)
    (tmp_path / "notes.txt").write_text("these are images")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    data = load(tmp_path)
    expected = images if len(size) == 2 else images.transpose(0, 3, 1, 2)
    assert data.image_shape == expected.shape[1:]
    assert together(data) == as_sorted(expected)
    assert data.train_labels is None
    assert data.max_value == 255


def test_subfolders_are_labels(tmp_path):
    for label, name in enumerate(("cat", "dog", "emu")):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", np.full((4, 4), 10 * label + i, np.uint8))
    data = load(tmp_path)
    pairs = [(data.train_images, data.train_labels), (data.test_images, data.test_labels)]
    for images, labels in pairs:
        assert torch.equal(images[:, 0] // 10, labels)


def test_folders_of_parts(tmp_path):
    for part, count in (("train", 5), ("test", 2), ("valid", 3)):
        for name in ("a", "b"):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", np.full((4, 4), i, np.uint8))
    data = load(tmp_path)
    assert [len(x) for x in (data.train_images, data.test_images, data.validation_images)] == [10, 4, 6]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    refused(tmp_path, "the parts have other subfolders .*test: a, c.*; expected the same labels in each")
    for file in (tmp_path / "test").glob("*/*"):
        file.unlink()
    refused(tmp_path, "test has no images")


@pytest.mark.parametrize("name", ["val", "valid"])
def test_a_folder_with_validation_but_no_test_part(tmp_path, name):
    for part, count in (("train", 10), (name, 3)):
        for i in range(count):
            save(tmp_path / part / f"{i}.png", np.full((4, 4), i, np.uint8))
    data = load(tmp_path)
    assert [len(x) for x in (data.train_images, data.test_images, data.validation_images)] == [9, 1, 3]
    assert data.train_labels is None
    assert together(data) == as_sorted(np.repeat(np.arange(10), 16).reshape(10, 16))


def test_image_modes(tmp_path):
    grey = numbers(5, 6).astype(np.uint8)
    colour = numbers(5, 6, 4).astype(np.uint8)
    for name, image in (
        ("bits", Image.fromarray(grey > 128)),
        ("grey_and_alpha", Image.fromarray(grey).convert("LA")),
        ("palette", Image.fromarray(colour[..., :3]).quantize(8)),
        ("alpha", Image.fromarray(colour)),
    ):
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i}.png")
    assert load(tmp_path / "bits").train_images[0].tolist() == (255 * (grey > 128)).flatten().tolist()
    assert load(tmp_path / "grey_and_alpha").train_images[0].tolist() == grey.flatten().tolist()
    assert load(tmp_path / "palette").image_shape == (3, 5, 6)
    alpha, opacity = load(tmp_path / "alpha").train_images[0], colour[..., 3:] / 255.0
    seen = (opacity * colour[..., :3] + (1 - opacity) * 255).transpose(2, 0, 1).flatten()
    assert np.abs(alpha.numpy() - seen).max() <= 1, "transparent pixels are white"
    clear = Image.fromarray(grey).convert("LA")
    clear.putalpha(Image.fromarray(np.where(grey > 99, 255, 0).astype(np.uint8)))
    for i in range(2):
        clear.save(tmp_path / "grey_and_alpha" / f"{i}.png")
    assert (
        load(tmp_path / "grey_and_alpha").train_images[0].tolist() == np.where(grey > 99, grey, 255).flatten().tolist()
    )


def test_bad_images(tmp_path):
    save(tmp_path / "a.png", numbers(5, 6).astype(np.uint8))
    save(tmp_path / "b.png", numbers(6, 5).astype(np.uint8))
    refused(tmp_path, f"^{tmp_path / 'b.png'} is 6x5 grey, {tmp_path / 'a.png'} 5x6 grey; expected images of one size")
    save(tmp_path / "b.png", numbers(5, 6, 3).astype(np.uint8))
    refused(tmp_path, "b.png is 5x6 in colour, .*a.png 5x6 grey")
    save(tmp_path / "b.png", numbers(5, 6).astype(np.uint16))
    refused(tmp_path, "b.png has pixels of mode 'I;16', more than 8 bits each")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    refused(tmp_path, "b.png is truncated, damaged or no image")
    (tmp_path / "b.png").write_bytes(b"no image")
    refused(tmp_path, "b.png is truncated, damaged or no image")
    (tmp_path / "b.png").unlink()
    refused(tmp_path, "holds one image")
    save(tmp_path / "sub" / "c.png", numbers(5, 6).astype(np.uint8))
    refused(tmp_path, "has images of its own, such as a.png, and others in sub/; expected all of them in subfolders")


def test_empty_folder(tmp_path):
    refused(tmp_path, "has no data; expected MNIST's IDX files, .amat files", FileNotFoundError)


def test_targets_of_floats():
    x = torch.linspace(0, 1, 11).repeat(20_000, 1)
    targets = Targets(x, "dynamic", 1)
    seed = torch.tensor(5)
    bits = targets.all(seed)
    mean = bits.double().mean(0)
    assert bits.dtype == torch.bool
    assert mean[0] == 0
    assert mean[-1] == 1
    assert ((mean - x[0]).abs() <= 5 * (x[0] * (1 - x[0]) / len(x)).sqrt()).all()
    index = torch.tensor([7, 3, 19_999, 3])
    assert torch.equal(targets(index, seed), bits[index])
    assert not torch.equal(targets(index, torch.tensor(6)), bits[index])
    # Neighbouring pixels and images are independent, and so are the samples of z whose seeds are mix_seed(seed, index).
    half = Targets(torch.full((4000, 64), 0.5), "dynamic", 1).all(seed).double() - 0.5
    z = torch.ops.aevb.normal(aevb.mix_seed(seed, torch.arange(4000)), [4000, 64]).double()
    for a, b in ((half[:, 1:], half[:, :-1]), (half[1:], half[:-1]), (half, z)):
        assert abs(float((a * b).mean())) < 5 * float(a.std() * b.std()) / a.numel() ** 0.5
    assert torch.equal(Targets(x, "threshold", 1).all(seed), x > 0.5)
    none = Targets(x, "none", 1)
    assert none.x_scale is None
    assert torch.equal(none(index, seed), x[index])


@pytest.mark.parametrize("how", ["dynamic", "threshold", "none"])
@pytest.mark.parametrize("size", [(5, 6), (3, 5, 6), (4, 5, 6)])
def test_training_on_floats_and_colour(tmp_path, how, size):
    """From a file to the pictures, whose colour is that of the images."""
    images = np.random.RandomState(0).rand(200, *size).astype(np.float32) * 0.2
    if len(size) == 3:
        images[:, 0] = 1 - images[:, 0]  # red
    np.savez(tmp_path / "some.npz", x=images)
    config = aevb.TrainConfig(
        data=str(tmp_path / "some.npz"),
        out=str(tmp_path / "run"),
        epochs=2,
        hidden_dims=(20,),
        binarize=how,
        progress=False,
    )
    trainer = aevb.Trainer(config)
    assert trainer.dataset.train_images.dtype == torch.float32
    before = trainer.evaluate().elbo
    assert trainer.fit()["test_elbo"] > before
    with Image.open(tmp_path / "run" / "reconstructions.png") as picture:
        red, green, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0))
    is_red = (red > green + 100) & (red > blue + 100)
    assert is_red.mean() > 0.2 if len(size) == 3 else (red == green).all()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.csv", r"a.csv is a .csv file; expected .npy, .* or a folder of images: .*numpy.genfromtxt\('a.csv'"),
        ("a.TSV", r"a.TSV is a .tsv file; expected .npy"),
        ("a.pt", r"is a .pt file; .*torch.load\('a.pt'\)"),
        ("a.h5", r"is a .h5 file; .*h5py.File\('a.h5'\)"),
        ("a.parquet", r"is a .parquet file; .*pandas"),
        ("a.pkl", r"is a .pkl file; .*pickle.load"),
        ("a.zip", r"is a .zip file; .*unpack it, and give the folder"),
        ("a.tar.gz", r"is a .tar file; .*unpack it, and give the folder"),
        ("a.png", r"a.png is one image; expected a folder of images, all of one size"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, sentence):
    (tmp_path / name).write_bytes(b"label,pixel\n1,2\n")
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.float32(255.00002), r"pixel 7 is 255\.00002.*After a resize: images\.clip\(0, 255\)\.round\(\)"),
        (np.float32(-0.00001), r"pixel 7 is -1e-05"),
        (np.float32(254.00002), r"pixel 7 is 254\.00002, and the largest is 255; expected whole numbers"),
    ],
)
def test_a_number_is_said_as_it_is(tmp_path, value, sentence):
    images = np.random.default_rng(0).integers(0, 256, (20, 16)).astype("float32")
    images[0, 0] = 255
    images[3, 7] = value
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "a.npy")


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan, 0.5])
def test_labels_that_are_no_classes(tmp_path, wrong):
    labels = np.arange(20.0)
    labels[3] = wrong
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 16), np.uint8) + np.arange(16, dtype=np.uint8), y=labels)
    with pytest.raises(ValueError, match=rf"has {wrong} as the label of image 3; expected whole numbers"):
        load(tmp_path / "a.npz")
