"""Missing values of data: NaN, masks in files and in Python, and how splits and kinds of values go with them."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from aevb.data import Dataset, from_torch, load
from aevb.data.fingerprint import check_same_data, fingerprint


def images(kind="bytes", shape=(40, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    found = {
        "bits": lambda: rng.integers(0, 2, shape).astype(np.float32),
        "bytes": lambda: rng.integers(0, 256, shape).astype(np.float32),
        "unit": lambda: rng.random(shape, dtype=np.float32),
        "fractions": lambda: (rng.integers(0, 256, shape) / 255).astype(np.float32),
    }
    return found[kind]()


def mask_for(x, share=0.7, seed=1):
    return np.random.default_rng(seed).random(x.shape) < share


def part(data, name):
    return getattr(data, f"{name}_images"), data.observed[name]


def masks_in_order(data):
    """The masks of all parts, in the order of the source."""
    names = [name for name in ("train", "validation", "test") if name in data.rows]
    return torch.cat([data.observed[name] for name in names])[torch.cat([data.rows[name] for name in names]).argsort()]


@pytest.mark.parametrize("kind", ["bits", "bytes", "unit", "fractions"])
def test_holes_survive_the_split_and_the_kind_is_that_of_what_is_observed(tmp_path, kind):
    x = images(kind)
    observed = mask_for(x)
    np.save(tmp_path / "whole.npy", x)
    np.save(tmp_path / "holes.npy", np.where(observed, x, np.nan))
    np.save(tmp_path / "mask.npy", observed)
    whole = load(tmp_path / "whole.npy", validation=0.2)
    wild = np.where(observed, x, -17.3)  # which is of no kind
    np.save(tmp_path / "wild.npy", wild)
    for data in (
        load(tmp_path / "holes.npy", validation=0.2, missing="nan"),
        load(tmp_path / "wild.npy", validation=0.2, mask=tmp_path / "mask.npy"),
        load(tmp_path / "wild.npy", validation=0.2, mask=observed),
        load(tmp_path / "wild.npy", validation=0.2, mask=torch.from_numpy(observed.reshape(40, 15).astype(np.uint8))),
    ):
        assert (data.max_value, data.train_images.dtype) == (whole.max_value, whole.train_images.dtype)
        for name in ("train", "test", "validation"):
            found, masks = part(data, name)
            assert torch.equal(found, getattr(whole, f"{name}_images").masked_fill(~masks, 0))
        assert torch.equal(masks_in_order(data), torch.from_numpy(observed).flatten(1))
        assert f"{1 - observed.mean():.1%} of the values are missing" in data.description


@pytest.mark.parametrize("form", [".npz", ".mat", "folder", "amat"])
def test_every_file_of_numbers(tmp_path, form):
    x = np.where(mask_for(images()), images(), np.nan).reshape(40, 15)
    test = x[::-1][:7]
    if form == ".npz":
        np.savez(path := tmp_path / "some.npz", x_train=x, x_test=test)
    elif form == ".mat":
        pytest.importorskip("scipy.io").savemat(path := tmp_path / "some.mat", {"x_train": x, "x_test": test})
    elif form == "folder":
        path = tmp_path
        np.save(path / "train.npy", x)
        np.save(path / "test.npy", test)
    else:
        path = tmp_path / "some.amat"
        path.write_text("\n".join(" ".join(map(str, row)) for row in x) + "\n")
        found = load(path, missing="nan")
        assert torch.equal(masks_in_order(found), torch.from_numpy(~np.isnan(x)))
        return
    data = load(path, missing="nan")
    for name, rows in (("train", x), ("test", test)):
        found, observed = part(data, name)
        assert torch.equal(observed, torch.from_numpy(~np.isnan(rows)))
        assert torch.equal(found, torch.from_numpy(np.nan_to_num(rows)).byte())
    assert data.rows is None


def test_channels_and_masks_go_together(tmp_path):
    x = images(shape=(20, 5, 6, 3))
    observed = mask_for(x)
    np.save(tmp_path / "some.npy", np.where(observed, x, np.nan))
    data = load(tmp_path / "some.npy", missing="nan")
    expected = torch.from_numpy(observed).movedim(-1, 1).flatten(1)
    assert torch.equal(masks_in_order(data), expected)
    np.save(tmp_path / "some.npy", x)
    for mask in (observed, np.moveaxis(observed, -1, 1), expected):  # either layout, or flat
        data = load(tmp_path / "some.npy", mask=mask)
        assert torch.equal(masks_in_order(data), expected)
    one = load(tmp_path / "some.npy", mask=observed[0, :, :, 0])  # of one channel, for all images
    assert torch.equal(one.observed["test"], torch.from_numpy(observed[0, :, :, 0]).flatten().repeat(3).expand(2, -1))


def test_masks_by_parts(tmp_path):
    x, test = images(), images(seed=5)[:7]
    np.savez(tmp_path / "some.npz", x_train=x, x_test=test)
    masks = {"train": mask_for(x), "test": mask_for(test, seed=2)}
    np.savez(tmp_path / "masks.npz", **masks)
    for mask in (tmp_path / "masks.npz", masks):
        data = load(tmp_path / "some.npz", mask=mask)
        for name in ("train", "test"):
            assert torch.equal(data.observed[name], torch.from_numpy(masks[name]).flatten(1))
    assert set(load(tmp_path / "some.npz", mask={"test": masks["test"]}).observed) == {"test"}


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.ones((39, 3, 5)), r"the mask of .* has 39 masks; expected 1, or 40, one an image"),
        (np.ones((40, 3, 4)), r"the mask has shape \(40, 3, 4\); expected \(N, 3, 5\) or \(N, 15\)"),
        (np.full((3, 5), 0.5), "the mask holds values other than 0 and 1; expected 1 or True where"),
        (np.full((3, 5), np.nan), "values other than 0 and 1"),
        (np.full((3, 5), "yes"), "the mask holds <U3; expected bool or 0 and 1"),
        (np.zeros((3, 5)), "is False everywhere; expected some values to be observed"),
        ({"val": np.ones((3, 5))}, "the mask has 'val', and some the parts train; expected masks of these"),
        ({"a": np.ones((3, 5)), "b": np.ones((3, 5))}, "has 'a'; expected one mask for a part, by names such as train"),
        ("mask.txt", "mask is 'mask.txt'; expected a .npy file, or a .npz file with a mask for each part"),
    ],
)
def test_masks_that_do_not_fit_are_sentences(tmp_path, mask, sentence):
    np.save(tmp_path / "some.npy", images())
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "some.npy", mask=mask)


def test_many_masks_want_parts(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=images(), x_test=images()[:7])
    with pytest.raises(ValueError, match="the mask has 40 masks, and some the parts train, test; expected one mask"):
        load(tmp_path / "some.npz", mask=mask_for(images()))


def test_a_nan_is_an_error_unless_it_is_said_to_be_missing(tmp_path):
    x = images()
    x[7, 1, 2] = np.nan
    np.save(tmp_path / "some.npy", x)
    with pytest.raises(ValueError, match=r"datapoint 7, pixel 7 is nan, .*for a missing value, --missing nan"):
        load(tmp_path / "some.npy")
    data = load(tmp_path / "some.npy", missing="nan")
    assert sum(int((~mask).sum()) for mask in data.observed.values()) == 1
    hidden = np.ones_like(x, dtype=bool)
    hidden[7, 1, 2] = False
    assert load(tmp_path / "some.npy", mask=hidden).max_value == 255
    x[3, 0, 0] = np.inf  # which is missing in no sense
    np.save(tmp_path / "some.npy", x)
    with pytest.raises(ValueError, match="datapoint 3, pixel 0 is inf"):
        load(tmp_path / "some.npy", missing="nan")


def test_what_stays_on_the_disk_or_in_a_loader_says_so(tmp_path, monkeypatch):
    np.save(tmp_path / "some.npy", images())
    loader = {"train": DataLoader(TensorDataset(torch.rand(8, 15))), "test": TensorDataset(torch.rand(4, 15))}
    with pytest.raises(ValueError, match="are a DataLoader, whose images are not known beforehand"):
        from_torch(loader, missing="nan")
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 0)
    with pytest.raises(ValueError, match="too large to be read into memory, and values of a file that stays on"):
        load(tmp_path / "some.npy", missing="nan")
    data = load(tmp_path / "some.npy")
    with pytest.raises(ValueError, match="observed has 'train', whose images are MappedImages; expected images in"):
        dataclasses.replace(data, observed={"train": torch.ones(15, dtype=torch.bool)})


def test_data_of_torch():
    x = torch.from_numpy(images("unit", (40, 15)))
    observed = torch.from_numpy(mask_for(x.numpy()))
    data = from_torch(TensorDataset(x.where(observed, torch.nan)), missing="nan")
    assert torch.equal(masks_in_order(data), observed)


def test_named_data_take_a_mask():
    observed = torch.rand(1797, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    data, whole = load("digits", mask=observed), load("digits")
    assert torch.equal(data.observed["test"], observed[data.rows["test"]])
    assert torch.equal(data.test_images, whole.test_images * data.observed["test"])


def test_a_data_set_holds_0_where_values_are_missing():
    x = torch.rand(20, 6)
    observed = torch.rand(20, 6) < 0.5
    given = x.where(observed, torch.nan)
    data = Dataset("mine", (2, 3), 1, given, x, observed={"train": observed, "test": torch.ones(6, dtype=torch.bool)})
    assert torch.equal(data.train_images, x * observed)
    assert given.isnan().any()  # what was given is as it was
    assert set(data.observed) == {"train"}  # in a part without holes nothing is missing
    with pytest.raises(ValueError, match=r"test_images holds nan; expected values in 0\.\.1, and an observed= that"):
        dataclasses.replace(data, test_images=given)


@pytest.mark.parametrize(
    ("observed", "sentence"),
    [
        (
            {"train": torch.ones(20, 6)},
            r"observed\['train'\] is torch.float32 \(20, 6\); expected torch.bool \(20, 6\)",
        ),
        ({"train": torch.ones(19, 6, dtype=torch.bool)}, r"is torch.bool \(19, 6\); expected"),
        ({"train": np.ones((20, 6), bool)}, r"is a ndarray; expected torch.bool"),
        (
            {"validation": torch.ones(6, dtype=torch.bool)},
            "observed has 'validation'; expected parts of the data: train",
        ),
        ({"train": torch.zeros(6, dtype=torch.bool)}, "is False everywhere"),
        (torch.ones(20, 6, dtype=torch.bool), "observed is a Tensor; expected masks by the names of their parts"),
    ],
)
def test_masks_of_a_data_set_are_checked(observed, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dataset("mine", (2, 3), 1, torch.rand(20, 6), torch.rand(5, 6), observed=observed)


def test_empty_images_and_pixels_are_said():
    observed = torch.ones(20, 6, dtype=torch.bool)
    observed[3] = False
    observed[:, 2] = False
    text = Dataset("mine", (2, 3), 1, torch.rand(20, 6), torch.rand(5, 6), observed={"train": observed}).description
    assert "images without any observed value: 1" in text
    assert "pixels missing in all training images, of which nothing is learned: 1" in text


def test_the_fingerprint_has_the_masks():
    x, test = torch.rand(20, 6), torch.rand(5, 6)
    masks = [torch.rand(20, 6, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (0, 1)]
    datas = [Dataset("mine", (2, 3), 1, x * 0, test, observed={"train": mask}) for mask in masks]
    assert fingerprint(datas[0]) == fingerprint(datas[0])
    for noted, other in (datas, reversed(datas), (datas[0], Dataset("mine", (2, 3), 1, x * 0, test))):
        with pytest.raises(ValueError, match="the run was of other data"):
            check_same_data(fingerprint(noted), other)
