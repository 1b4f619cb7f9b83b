"""Parts by their usual names, in folders, arrays and files; and photographs that a camera says are turned."""

import dataclasses
import gzip
import re

import numpy as np
import pytest
import torch
from PIL import Image

from aevb.cli import main
from aevb.data import load
from aevb.data.parts import PARTS, read
from aevb.training import pictures as drawings

COUNTS = {"train": 8, "test": 5, "validation": 3}


def images(part, size=(4, 4)):
    return np.random.RandomState(list(PARTS).index(part)).randint(0, 256, (COUNTS[part], *size)).astype(np.uint8)


def labels(part):
    return np.arange(COUNTS[part]) % 3


def write(file, content):
    """A file of arrays, by its suffix; none is an IDX file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, content)
    elif file.suffix == ".npz":
        np.savez(file, **content)
    else:
        kind = {3: b"\0\0\x08\x03", 1: b"\0\0\x08\x01"}[content.ndim]
        data = kind + np.array(content.shape, ">i4").tobytes() + content.astype(np.uint8).tobytes()
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def pictures(folder, part=None, count=4, value=0, name="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images(part) if part else np.full((count, 4, 4), value, np.uint8)):
        Image.fromarray(image).save(folder / name.format(i))


def are_parts(data, *parts, labelled=()):
    """That the parts which a source has are those, and nothing of one is in another."""
    for part in parts:
        found = getattr(data, f"{part}_images")
        if part != "train" or "test" in parts:
            assert found.tolist() == images(part).reshape(COUNTS[part], -1).tolist()
        if part in labelled:
            assert getattr(data, f"{part}_labels").tolist() == labels(part).tolist()
    if "test" not in parts:
        assert len(data.train_images) + len(data.test_images) == COUNTS["train"]
    assert (data.validation_images is not None) == ("validation" in parts)


def refused(path, sentence, error=ValueError):
    with pytest.raises(error, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "word"), [(part, word) for part, words in PARTS.items() for word in words])
def test_every_word_in_every_spelling(part, word):
    spelled = [word, word.upper(), word.capitalize()]
    spelled += [f"x_{word}", f"X_{word.capitalize()}", f"{word}X", f"{word}-images", f"images.{word}", f"{word}set"]
    spelled += [f"{word}_32x32", f"{word}2017", f"1_{word}", f"data/{word}", f"{word.capitalize()} Images"]
    for name in spelled:
        assert read(name).parts == (part,), name
        assert not read(name).qualifiers, name
    assert read(f"mnist_{word}").qualifiers == ("mnist",)


@pytest.mark.parametrize("name", ["trainer", "contest", "latest", "valley", "developers", "tr", "restrain", "Tested"])
def test_words_that_are_no_parts(name):
    assert not read(name).parts


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        "x_train y_train x_test y_test",
        "X_train Y_train X_test Y_test",
        "trX trY teX teY",
        "Xtr ytr Xte yte",
        "X_tr y_tr X_te y_te",
        "trainX trainY testX testY",
        "Xtrain ytrain Xtest ytest",
        "train_images train_labels test_images test_labels",
        "training_images training_labels testing_images testing_labels",
        "train_dataset train_labels test_dataset test_labels",
        "train_set_x train_set_y test_set_x test_set_y",
        "train_img train_lbl test_img test_lbl",
        "train.images train.labels test.images test.labels",
        "fea_train gnd_train fea_test gnd_test",
        "train train_labels test test_labels",
        "mnist_train mnist_train_labels mnist_test mnist_test_labels",
        "data target testdata testtarget",
        "x y x_test y_test",
    ],
)
def test_arrays(tmp_path, names):
    train, train_labels, test, test_labels = names.split()
    arrays = {train: images("train"), train_labels: labels("train")}
    np.savez(tmp_path / "a.npz", **arrays, **{test: images("test"), test_labels: labels("test")[:, None]})
    data = load(tmp_path / "a.npz")
    are_parts(data, "train", "test", labelled=("train", "test"))
    assert ("is the training part" in data.note) == ("train" not in names and "tr" not in names.lower())


@pytest.mark.parametrize("word", PARTS["validation"])
@pytest.mark.parametrize("name", ["x_{}", "{}_images", "{}", "X{}"])
def test_validation_in_arrays(tmp_path, word, name):
    arrays = {name.format(w): images(p) for w, p in (("train", "train"), (word, "validation"), ("test", "test"))}
    np.savez(tmp_path / "a.npz", **arrays)
    are_parts(load(tmp_path / "a.npz"), "train", "test", "validation")
    del arrays[name.format("test")]
    np.savez(tmp_path / "a.npz", **arrays)
    are_parts(load(tmp_path / "a.npz"), "train", "validation")


def test_burdas_omniglot(tmp_path):
    """A column an image, one-hot labels, and characters that nothing here reads."""
    scipy_io = pytest.importorskip("scipy.io")
    images = {part: np.random.RandomState(count).rand(784, count) for part, count in (("", 50), ("test", 20))}
    arrays = {f"{part}data": x for part, x in images.items()}
    arrays |= {f"{part}target": np.eye(10)[:, np.arange(x.shape[1]) % 10] for part, x in images.items()}
    arrays |= {f"{part}targetchar": np.arange(x.shape[1])[None] for part, x in images.items()}
    scipy_io.savemat(tmp_path / "chardata.mat", arrays)
    data = load(tmp_path / "chardata.mat")
    assert data.image_shape == (28, 28)
    torch.testing.assert_close(data.train_images, torch.from_numpy(images[""].T).float())
    torch.testing.assert_close(data.test_images, torch.from_numpy(images["test"].T).float())
    assert data.train_labels.tolist() == [i % 10 for i in range(50)]
    assert data.note == (
        "data is the training part; the last dimension of the array counts the images; not read: targetchar, "
        "testtargetchar"
    )


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            "x_train x_val x_validation",
            "has x_val and x_validation, which both name the validation part; expected one of",
        ),
        ("x_train X_train", "has x_train and X_train, which both name the training part"),
        ("x_train images_train x_test", "has x_train and images_train, which both name the training part"),
        (
            "mnist_train fashion_train mnist_test",
            "has mnist_train and fashion_train, which both name the training part",
        ),
        ("x_train x", "has x_train, which names the training part, and x, which names none; expected a part in each"),
        ("x_test", r"has x_test \(the test part\), and no training part; expected it too, with 'train' in its name"),
        ("x_valid x_test", "has .*, and no training part"),
        ("x_train_test", "has x_train_test, which names the training and the test part; expected one part in a name"),
        ("x_train y_test", "has y_test, labels of the test part, and no images of it; expected both"),
    ],
)
def test_arrays_that_are_unclear(tmp_path, names, sentence):
    np.savez(tmp_path / "a.npz", **{name: images("train") for name in names.split()})
    refused(tmp_path / "a.npz", f"^{tmp_path / 'a.npz'} {sentence}")


def test_arrays_that_are_not_read_are_named(tmp_path):
    some = images("train")
    np.savez(tmp_path / "a.npz", x_train=some, x_pool=some, ids_train=some, a=some, b=some)
    assert load(tmp_path / "a.npz").note == "not read: x_pool, ids_train, a and 1 more"
    np.savez(tmp_path / "a.npz", x=some, names_test=np.array(["a"]))
    assert load(tmp_path / "a.npz").note == "not read: names_test"


# ---- files -----------------------------------------------------------------------------------------------------------

IDX = ("train-images{}idx3-ubyte", "train-labels{}idx1-ubyte", "t10k-images{}idx3-ubyte", "t10k-labels{}idx1-ubyte")


def write_idx(folder, name, separator="-"):
    """MNIST's four files; `name` makes paths of their names."""
    for i, file in enumerate(file.format(separator) for file in IDX):
        part = "train" if i < 2 else "test"
        write(folder / name(file), labels(part) if i % 2 else images(part))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize(
    "name",
    [
        lambda file: file,
        lambda file: f"MNIST/raw/{file}",
        lambda file: f"{file}.d/{file}",
        lambda file: file.replace("t10k", "test"),
        lambda file: file.replace("train", "Train"),
        lambda file: f"emnist-letters-{file.replace('t10k', 'test')}",
        lambda file: f"{'train' if 'train' in file else 'test'}/{file}",
    ],
)
def test_idx_files(tmp_path, name, separator, suffix):
    write_idx(tmp_path, lambda file: name(file) + suffix, separator)
    data = load(tmp_path)
    are_parts(data, "train", "test", labelled=("train", "test"))
    assert data.max_value == 255


def test_idx_files_that_are_there_twice_are_taken_once(tmp_path):
    """As one archive has them: in folders of their names, and as files whose names have a dot; and packed as well."""
    write_idx(tmp_path, lambda file: file, ".")
    write_idx(tmp_path, lambda file: f"{file}/{file}")
    write_idx(tmp_path, lambda file: f"{file}.gz")
    are_parts(load(tmp_path), "train", "test", labelled=("train", "test"))
    write_idx(tmp_path, lambda file: f"other/{file}")
    are_parts(load(tmp_path), "train", "test", labelled=("train", "test"))


def test_a_single_idx_file_has_the_labels_beside_it(tmp_path):
    for separator in "-.":
        write(tmp_path / f"train-images{separator}idx3-ubyte", images("train"))
        write(tmp_path / f"train-labels{separator}idx1-ubyte.gz", labels("train"))
        data = load(tmp_path / f"train-images{separator}idx3-ubyte")
        assert sorted(torch.cat([data.train_labels, data.test_labels]).tolist()) == sorted(labels("train").tolist())


def test_two_data_sets_in_one_folder(tmp_path):
    for name in ("letters", "digits"):
        write_idx(tmp_path, lambda file, name=name: f"emnist-{name}-{file}")
    refused(
        tmp_path, "emnist-digits-train-images-idx3-ubyte and emnist-letters-train-.*, which both name the training part"
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.npy", "test.npy"),
        ("train/images.npy", "test/images.npy"),
        ("data/X_train.npy", "data/X_test.npy"),
        ("mnist_train.npy", "mnist_test.npy"),
        ("training_set.npy", "test_set.npy"),
    ],
)
def test_files_of_arrays(tmp_path, train, test):
    write(tmp_path / train, images("train"))
    write(tmp_path / test, images("test"))
    are_parts(load(tmp_path), "train", "test")
    for part, file in (("train", train), ("test", test)):
        of_labels = file.replace("images", "labels").replace("X_", "y_")
        write(tmp_path / (of_labels if of_labels != file else file.replace(".", "_labels.")), labels(part))
    are_parts(load(tmp_path), "train", "test", labelled=("train", "test"))


def test_files_with_labels_in_them(tmp_path):
    for part in COUNTS:
        write(tmp_path / f"{part}.npz", {"x": images(part), "y": labels(part)})
    are_parts(load(tmp_path), *COUNTS, labelled=COUNTS)
    write(tmp_path / "extra.npy", images("train"))
    assert load(tmp_path).note == "not read: extra.npy"
    write(tmp_path / "val.npz", {"x": images("validation")})
    refused(tmp_path, "has val.npz and validation.npz, which both name the validation part")


@pytest.mark.parametrize(
    ("files", "sentence", "error"),
    [
        (["train.npy", "train.npz"], "has train.npy and train.npz, which both name the training part", ValueError),
        (["test.npy"], r"has test.npy \(the test part\), and no training part", ValueError),
        (["a.npy", "b.npy"], "has a.npy, b.npy, and no names that say parts; expected some such as", FileNotFoundError),
        (["train-images-idx3-ubyte"], r"has no t10k-images-idx3-ubyte\[.gz\]; expected MNIST's", FileNotFoundError),
    ],
)
def test_files_that_are_unclear(tmp_path, files, sentence, error):
    for file in files:
        write(tmp_path / file, {"x": images("train")} if file.endswith(".npz") else images("train"))
    refused(tmp_path, f"^'?{tmp_path}'? {sentence}", error)


def test_a_folder_of_one_file_is_that_file(tmp_path):
    write(tmp_path / "inner" / "mnist.npz", {"x_train": images("train"), "x_test": images("test")})
    (tmp_path / "README.md").write_text("no data")
    are_parts(load(tmp_path), "train", "test")


def test_binarized_mnists_files_of_one_data_set(tmp_path):
    for name in ("a_train", "a_valid", "a_test", "b_train"):
        (tmp_path / f"{name}.amat").write_bytes(b"0 1 0 1 \n" * 4)
    refused(tmp_path, "has a_train.amat and b_train.amat, which both name the training part")


# ---- folders of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "validation"),
    [
        ("train", "test", "validation"),
        ("Train", "Test", "Val"),
        ("TRAIN", "TEST", "DEV"),
        ("training", "testing", "validation"),
        ("training_set", "test_set", "valid_set"),
        ("trainset", "testset", "valset"),
        ("train_images", "test_images", "val_images"),
        ("images/train", "images/test", "images/val"),
        ("train/images", "test/images", "valid/images"),
        ("train2017", "test2017", "val2017"),
        ("train_32x32", "test_32x32", "valid_32x32"),
        ("Training Images", "Test Images", "Validation Images"),
        ("data/raw/train", "data/raw/test", "data/raw/dev"),
        ("seg_train/seg_train", "seg_test/seg_test", "seg_val/seg_val"),
        ("mine_train", "mine_test", "mine_valid"),
    ],
)
def test_folders(tmp_path, train, test, validation):
    for part, folder in zip(PARTS, (train, test, validation), strict=True):
        pictures(tmp_path / folder, part)
        (tmp_path / folder / "notes.txt").write_text("no image")
    data = load(tmp_path)
    are_parts(data, *PARTS)
    assert data.train_labels is None
    for file in (tmp_path / test).iterdir():
        file.unlink()
    (tmp_path / test).rmdir()
    if (tmp_path / test).parent == tmp_path:
        are_parts(load(tmp_path), "train", "validation")


@pytest.mark.parametrize(
    "folder",
    ["{part}/{label}", "{label}/{part}", "{part}/{part}/{label}", "{part}/{label}/images", "x_{part}/a/{label}"],
)
def test_labels_in_parts_and_around_them(tmp_path, folder):
    for i, label in enumerate(("cat", "dog")):
        for part, count in COUNTS.items():
            pictures(tmp_path / folder.format(part=part, label=label), count=count, value=i)
    data = load(tmp_path)
    for part, count in COUNTS.items():
        found, of_part = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        assert of_part.tolist() == [0] * count + [1] * count
        assert torch.equal(found[:, 0].long(), of_part)


def test_a_part_without_labels(tmp_path):
    """As Tiny ImageNet's validation part, whose labels are in a text."""
    for i, label in enumerate(("n01", "n02")):
        pictures(tmp_path / "train" / label / "images", count=5, value=i)
    pictures(tmp_path / "val" / "images", count=3)
    pictures(tmp_path / "test" / "images", count=2)
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0] * 5 + [1] * 5
    assert data.validation_labels is data.test_labels is None
    assert data.note == "the test part has no labels; the validation part has no labels"


def test_parts_in_the_names_of_images(tmp_path):
    for part in PARTS:
        pictures(tmp_path, part, name=part + "_{}.png")
    are_parts(load(tmp_path), *PARTS)
    pictures(tmp_path, count=1, name="more.png")
    refused(
        tmp_path, "names the .* part, others name others, and .*more.png none; expected a part in the name of every"
    )


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (
            "train test extra",
            "has test/, which names the test part, and extra/, which names none; expected parts alone",
        ),
        (
            "plane train boat",
            "has train/, which names the training part, and boat/, which names none; .*rename train/ if",
        ),
        ("train val valid", "has val/ and valid/, which both name the validation part; expected one of them"),
        (
            "mine_train other_test",
            "has mine_train/ and other_test/, which differ in more than the part; expected names that",
        ),
        ("mine_train test", "has test/ and mine_train/, which differ in more than the part"),
        ("train Train", "has Train/ and train/, which both name the training part"),
        ("trainval test", "has trainval/, which names the training and the validation part"),
        ("test", r"has test/0.png \(the test part\), and no training part"),
        ("val test", "and no training part"),
        (
            "images masks",
            "has images/ beside masks/; expected images in subfolders that are their labels, or in images/",
        ),
        ("train/images train/masks", "train has images/ beside masks/"),
        ("train/a train/b test/c", "the parts have other subfolders .*test/c: c.*; expected the same labels in each"),
    ],
)
def test_folders_that_are_unclear(tmp_path, folders, sentence):
    for folder in folders.split():
        pictures(tmp_path / folder)
    refused(tmp_path, sentence)


def test_images_beside_parts(tmp_path):
    pictures(tmp_path / "train")
    pictures(tmp_path / "test")
    pictures(tmp_path, count=1, name="cover.png")
    refused(tmp_path, "has test/, which names the test part, and cover.png, which names none")
    (tmp_path / "cover.png").unlink()
    (tmp_path / "val").mkdir()
    refused(tmp_path, f"^{tmp_path / 'val'} has no images; expected files such as .png")
    (tmp_path / "val").rmdir()
    write(tmp_path / "train.npy", images("train"))
    refused(tmp_path, "has train.npy, and images in test/, and both name parts; expected one of them")


# ---- a camera's orientation ------------------------------------------------------------------------------------------


TURNS = (None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_upright(tmp_path, suffix, mode, orientation):
    if (suffix, mode) == ("jpg", "P"):
        pytest.skip("JPEG has no palettes")
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.random.RandomState(0).randint(0, 256, (8, 16, 3)).astype(np.uint8)
    image, options = Image.fromarray(pixels).convert(mode), {"lossless": True} if suffix == "webp" else {}
    for name in "ab":
        image.save(tmp_path / f"{name}.{suffix}", exif=exif, **options)
    image.save(tmp_path / f"plain.{suffix}", **options)
    with Image.open(tmp_path / f"plain.{suffix}") as plain:
        plain = plain.convert("L" if plain.mode == "L" else "RGB")
        turn = TURNS[orientation - 1]
        upright = np.asarray(plain if turn is None else plain.transpose(Image.Transpose[turn]))
    (tmp_path / f"plain.{suffix}").unlink()
    data = load(tmp_path)
    expected = upright if upright.ndim == 2 else np.moveaxis(upright, -1, 0)
    assert data.image_shape == expected.shape
    assert data.image_shape[-2:] == ((8, 16) if orientation < 5 else (16, 8))
    assert np.array_equal(data.train_images[0].view(expected.shape).numpy(), expected)


def test_images_that_turning_makes_of_two_sizes(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(np.zeros((8, 16), np.uint8))
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", exif=exif)
    refused(
        tmp_path, "b.jpg is 16x8 grey, .*a.jpg 8x16 grey; expected images of one size.*; turned upright, as their EXIF"
    )


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_left_alone(tmp_path, value):
    exif = Image.Exif()
    exif[0x112] = value
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", exif=exif)
    assert load(tmp_path).train_images[0].tolist() == pixels.flatten().tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_left_alone(tmp_path):
    for name in "ab":
        Image.fromarray(np.zeros((4, 8), np.uint8)).save(
            tmp_path / f"{name}.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garb"
        )
    data = load(tmp_path)
    assert data.image_shape == (4, 8)
    assert not re.search("EXIF", data.note)


def test_labels_keep_their_names(tmp_path, monkeypatch):
    """In the legend of the map, and in the file of the posteriors."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("zebra", "ant", "cost_$5_{"):
            folder = tmp_path / "animals" / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    data = load("animals")
    assert data.label_names == ("ant", "cost_$5_{", "zebra")
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    figure = drawings.latent("animals", torch.randn(18, 2), data.test_labels, data.label_names)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ant", "cost_$5_{", "zebra"]
    assert main(["train", "--data", "animals", "--epochs", "1", "--hidden-dims", "4", "--no-progress"]) == 0
    assert main(["embed", "runs/animals"]) == 0
    with np.load("runs/animals/latent.npz", allow_pickle=False) as arrays:
        assert arrays["label_names"][arrays["labels"]].tolist() == ["ant"] * 6 + ["cost_$5_{"] * 6 + ["zebra"] * 6
    with pytest.raises(ValueError, match=r"train_labels lie in 0..2, and there are 2 label_names; expected a name"):
        dataclasses.replace(data, label_names=("a", "b"))
    many = drawings.latent("many", torch.randn(60, 2), torch.arange(60) % 30, [f"class {i}" for i in range(30)])
    assert many.axes[1].get_yticklabels()[0].get_text() == "class 0"
