"""A run whose data were replaced says so, whatever it is asked."""

import dataclasses
import json

import numpy as np
import pytest

import aevb
from aevb.cli import main
from aevb.data import MappedImages, load
from aevb.data.fingerprint import check_same_data, fingerprint
from aevb.files import safetensors
from aevb.training.checkpoint import Checkpoints

OPTIONS = {"epochs": 1, "hidden_dims": (8,), "latent_dim": 2, "validation": 0.1, "threads": 1, "progress": False}
COMMANDS = (
    *("evaluate", "reconstruct", "sample", "embed", "impute", "manifold", "traverse", "interpolate", "report"),
    "resume",
)
FEW = {"evaluate": ["--num-samples", "5", "--no-progress"], "impute": ["--images", "4", "--steps", "2"]}


def images(seed=0, shape=(60, 4, 4)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", images())
    aevb.Trainer(aevb.TrainConfig(**OPTIONS, data="images.npy", out="run")).fit()
    return tmp_path / "run"


def one_pixel(array, row):
    array = array.copy()
    array[row, 1, 1] ^= 255
    return array


def rows_of(part):
    """The rows of the file that are a part of the data set, by an image that says its row."""
    numbered = np.arange(60, dtype=np.uint8).repeat(16).reshape(60, 4, 4)
    np.save("numbered.npy", numbered)
    return getattr(load("numbered.npy", validation=0.1), f"{part}_images")[:, 0].tolist()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(run, capsys, command):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    np.save("images.npy", images(seed=1))
    assert main([command, "run", *FEW.get(command, [])]) == 1
    err = capsys.readouterr().err
    assert "the run was of other data: {'sha256_of_some': " in err
    assert "expected the same images as images had when it began" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("part", ["train", "test", "validation"])
def test_one_pixel_of_any_part(run, part, best):
    for row in (rows_of(part)[0], rows_of(part)[-1]):
        np.save("images.npy", one_pixel(images(), row))
        with pytest.raises(ValueError, match=r"the run was of other data: .*'sha256': "):
            aevb.Trainer.load("run", best=best)
        np.save("images.npy", images())
        aevb.Trainer.load("run", best=best)


@pytest.mark.parametrize(
    "other", [images(shape=(61, 4, 4)), images().reshape(60, 2, 8), (images() > 128), images() / 255.0 * 0.99], ids=str
)
def test_other_numbers_shapes_and_values(run, other):
    np.save("images.npy", other)
    with pytest.raises(ValueError, match="the run was of other data"):
        aevb.Trainer.load("run")


def test_the_same_images_in_another_file_are_the_same(run):
    np.save("images.npy", images().astype(np.int64))
    elbo = aevb.Trainer.load("run").evaluate().elbo
    assert json.loads((run / "metrics.jsonl").read_text())["test_elbo"] == elbo


def test_a_run_of_before_that_noted_it_is_held_to_its_checkpoint(run):
    """And one without checkpoints is believed."""
    path = run / "model.safetensors"
    model = aevb.BaseVAE.load(path)
    path.write_bytes(safetensors(model.state_dict(), {**model.metadata(), "epoch": "1", "step": "1"}))
    aevb.Trainer.load("run")
    np.save("images.npy", images(seed=1))
    with pytest.raises(ValueError, match="the run was of other data"):
        aevb.Trainer.load("run")
    Checkpoints(run).remove()
    aevb.Trainer.load("run")


def test_what_only_one_of_two_notes_is_no_difference(monkeypatch, tmp_path):
    np.save(tmp_path / "images.npy", images())
    in_memory = load(tmp_path / "images.npy")
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 0)
    on_disk = load(tmp_path / "images.npy")
    assert isinstance(on_disk.train_images, MappedImages)
    for noted in (fingerprint(in_memory), {"images": 54, "data_dim": 16}, {}, None):
        check_same_data(noted, on_disk)
    with pytest.raises(ValueError, match=r"of other data: {'images': 55}, now {'images': 54}; expected"):
        check_same_data({"images": 55, "data_dim": 16}, on_disk)


def test_a_data_set_of_ones_own_is_given_again(tmp_path):
    digits = load("digits")
    few = dataclasses.replace(digits, train_images=digits.train_images[:100], train_labels=None)
    options = {**OPTIONS, "validation": 0.0, "out": str(tmp_path / "run")}
    metrics = aevb.Trainer(aevb.TrainConfig(**options), dataset=few).fit()
    assert aevb.Trainer.load(tmp_path / "run", dataset=few).evaluate().elbo == metrics["test_elbo"]
    with pytest.raises(ValueError, match=r"the run was of other data: {'images': 100, .* as digits had when it began"):
        aevb.Trainer.load(tmp_path / "run")
