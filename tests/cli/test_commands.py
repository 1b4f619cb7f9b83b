"""The commands that ask a run, from the command line to their files."""

import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ask, error_of
from conftest import rand
from PIL import Image

import aevb
from aevb.cli import main
from aevb.cli.images import asked_images, mask_of, pixels, training_moments
from aevb.cli.latent import interpolated
from aevb.cli.options import InterpolateOptions
from aevb.data import MappedImages
from aevb.training import pictures
from aevb.training.run_dir import RunFolder, RunFolderError, write_answer
from aevb.training.run_files import OWN, PICTURES, TRAINED

LEFT = {*TRAINED, "checkpoints"} - {"best.safetensors"}  # there are no validation images

FAST = ["--images", "6", "--steps", "3", "--num-samples", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 2 and of 3 latent dimensions."""
    folder = tmp_path_factory.mktemp("runs")
    for latent_dim in (2, 3):
        options = dict(epochs=1, hidden_dims=(16,), latent_dim=latent_dim, progress=False, threads=1)
        aevb.Trainer(aevb.TrainConfig(out=str(folder / str(latent_dim)), **options)).fit()
    return folder


@pytest.fixture
def run(runs):
    """A run, which must be as it was when a test ends."""
    path = runs / "3"
    before = {name: (path / name).read_bytes() for name in LEFT - {"checkpoints"}}
    yield path
    after = {name: (path / name).read_bytes() for name in before}
    assert {name: after[name] for name in OWN if name in after} == {
        name: before[name] for name in OWN if name in before
    }
    for name in PICTURES:  # which may have been drawn anew
        (path / name).write_bytes(before[name])
    for file in path.iterdir():
        if file.name not in LEFT:
            file.unlink()


def picture(path):
    """The pixels of a PNG that shows something."""
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.std() > 5
    return image


def model_and_images(run):
    trainer = aevb.Trainer.load(run)
    return trainer.model, pixels(trainer, trainer.dataset.test_images)


@pytest.mark.parametrize(
    ("command", "shape"),
    [
        (["reconstruct"], (297, 64)),
        (["sample", "--num", "7"], (7, 64)),
        (["traverse", "--num-dims", "2", "--steps", "5"], (2, 5, 64)),
        (["interpolate", "--pairs", "3", "--steps", "4"], (3, 4, 64)),
        (["denoise", "--flip", "0.2", *FAST], (6, 64)),
        (["impute", *FAST], (6, 64)),
    ],
)
def test_a_picture_and_an_array_in_the_run_folder_or_elsewhere(command, shape, run, tmp_path, capsys):
    name, *options = command
    stem = {"reconstruct": "reconstructions", "sample": "samples"}.get(name, name)
    out = ask(capsys, name, run, *options)
    assert {path.name for path in run.iterdir()} == LEFT | {f"{stem}.png"}
    assert f"written  {run / stem}.png" in out
    picture(run / f"{stem}.png")

    ask(capsys, name, run, *options, "--save-array", "--out", tmp_path / "new" / "folder")
    array = np.load(tmp_path / "new" / "folder" / f"{stem}.npy")
    assert array.shape == shape
    assert array.dtype == np.float32
    assert ((array >= 0) & (array <= 1)).all()
    same = (tmp_path / "new" / "folder" / f"{stem}.png").read_bytes()
    assert same == (run / f"{stem}.png").read_bytes()

    ask(capsys, name, run, *options, "--out", tmp_path / "alone.npy")
    assert np.array_equal(np.load(tmp_path / "alone.npy"), array)
    assert not (tmp_path / "alone.png").exists()
    assert "out is 'x.txt'; expected a name that ends in .png or .npy" in error_of(
        capsys, name, run, *options, "--out", "x.txt"
    )


def test_reconstruct_and_embed_are_the_models_own(run, tmp_path, capsys):
    model, x = model_and_images(run)
    ask(capsys, "reconstruct", run, "--out", tmp_path / "r.npy")
    np.testing.assert_allclose(np.load(tmp_path / "r.npy"), model.reconstruct(x), rtol=1e-5, atol=1e-6)

    out = ask(capsys, "embed", run)
    assert "297 images, 3 dimensions: mu, logvar, labels" in out
    found, (mu, logvar) = np.load(run / "latent.npz"), model.encode(x)
    assert set(found) == {"mu", "logvar", "labels"}
    np.testing.assert_allclose(found["mu"], mu.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["logvar"], logvar.detach(), rtol=1e-5, atol=1e-6)
    assert found["labels"][:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    picture(run / "latent.png")

    ask(capsys, "embed", run, "--part", "train", "--num-samples", "2", "--out", tmp_path / "t.npz")
    found = np.load(tmp_path / "t.npz")
    assert found["mu"].shape == (1500, 3)
    assert found["z"].shape == (2, 1500, 3)

    images = (16 * x[:5]).to(torch.uint8).view(5, 8, 8).numpy()
    for array in (images, images / np.float32(16), images.reshape(5, 64)):
        np.save(tmp_path / "mine.npy", array)
        ask(capsys, "embed", run, "--data", tmp_path / "mine.npy", "--out", tmp_path / "mu.npy")
        np.testing.assert_allclose(np.load(tmp_path / "mu.npy"), mu[:5].detach(), rtol=1e-4, atol=1e-5)


def test_restoring_test_images_says_how_good_it_is(run, capsys):
    few = ["--images", "40", "--steps", "20", "--num-samples", "40"]
    out = ask(capsys, "impute", run, "--mask", "random", "--missing", "0.6", *few)
    rows = {
        m[1]: (float(m[2]), float(m[3])) for m in re.finditer(r"^(\w[\w -]+?)\s+(\d\.\d+)\s+(-\d\.\d+)$", out, re.M)
    }
    assert set(rows) == {"restored", "one encode-decode pass", "the mean training image"}
    assert all(0.01 < error < 0.5 for error, _ in rows.values())

    noisy = ask(capsys, "denoise", run, "--sigma", "0.4", *few)
    error, log_prob = re.search(r"the noisy image as it is\s+(\S+)\s+(\S+)", noisy).groups()
    assert float(error) == pytest.approx(0.16, rel=0.1)
    restored = re.search(r"restored\s+(\S+)\s+(\S+)", noisy)
    assert float(restored[1]) < float(error)
    assert float(restored[2]) > float(log_prob)
    assert "effective samples, median: " in noisy
    assert "proposals accepted: " in ask(capsys, "denoise", run, "--flip", "0.2", "--method", "gibbs", *FAST)
    assert noisy == ask(capsys, "denoise", run, "--sigma", "0.4", *few)


def test_restoring_images_of_a_file(run, tmp_path, capsys):
    _, x = model_and_images(run)
    x, observed = (x[:4] > 0.5).float(), torch.arange(64).view(8, 8) % 3 > 0
    np.save(tmp_path / "mask.npy", observed.numpy())
    holes = x.view(4, 8, 8).where(observed, torch.nan).numpy()
    np.save(tmp_path / "holes.npy", holes)
    options = ["--data", tmp_path / "holes.npy", "--mask", tmp_path / "mask.npy", *FAST]
    ask(capsys, "impute", run, *options)
    restored = np.load(run / "impute.npy")
    assert np.array_equal(restored[:, observed.flatten()], x.numpy()[:, observed.flatten()])
    assert np.isfinite(restored).all()
    picture(run / "impute.png")

    out = ask(capsys, "denoise", run, "--flip", "0.1", *options)
    assert "squared error" not in out
    assert np.load(run / "denoise.npy").shape == (4, 64)
    assert "x holds NaN" in error_of(capsys, "denoise", run, "--flip", "0.1", "--data", tmp_path / "holes.npy")
    np.save(tmp_path / "mask.npy", np.ones((2, 64)))
    assert "has 2 masks; expected 1, or 4" in error_of(capsys, "impute", run, *options)
    np.save(tmp_path / "mask.npy", np.full(64, 0.5))
    assert "holds values other than 0 and 1" in error_of(capsys, "impute", run, *options)


def test_an_answer_does_not_replace_what_was_asked_about(run, tmp_path, monkeypatch, capsys):
    _, x = model_and_images(run)
    data, mask = tmp_path / "masked.npy", tmp_path / "mask.npy"
    np.save(data, x[:3].numpy())
    np.save(mask, np.arange(64) % 3 > 0)
    before = data.read_bytes(), mask.read_bytes()
    options = ["--data", data, "--mask", mask, *FAST]
    ask(capsys, "impute", run, *options, "--out", tmp_path / "masked.png")
    assert (data.read_bytes(), mask.read_bytes()) == before
    picture(tmp_path / "masked.png")
    with monkeypatch.context() as patch:
        patch.setattr("aevb.models.BaseVAE.impute", None)  # nothing is computed
        for target in (data, mask):
            sentence = f"{target} would be replaced by the answer, and it is what was asked about; choose another out"
            assert sentence in error_of(capsys, "impute", run, *options, "--out", target)
    (tmp_path / "impute.npy").write_bytes(before[0])
    for command, stem in (("impute", "impute"), ("reconstruct", "reconstructions"), ("embed", "latent")):
        data = tmp_path / f"{stem}.npy"
        data.write_bytes(before[0])
        place = data if command == "embed" else tmp_path
        more = [] if command != "reconstruct" else ["--save-array"]
        assert "would be replaced" in error_of(capsys, command, run, "--data", data, "--out", place, *more)
        assert data.read_bytes() == before[0]


def test_masks(run):
    trainer = aevb.Trainer.load(run)
    for name, (rows, columns) in {"lower": (slice(4), slice(8)), "left": (slice(8), slice(4, 8))}.items():
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[rows, columns] = True
        assert torch.equal(mask_of(trainer, name, 3, 0.5, 0), expected.flatten().expand(3, 64))
    assert mask_of(trainer, "random", 3, 0.5, 0).shape == (3, 64)


def test_manifold(runs, run, capsys):
    ask(capsys, "manifold", runs / "2", "--num", "4", "--save-array")
    assert np.load(runs / "2" / "manifold.npy").shape == (4, 4, 64)
    picture(runs / "2" / "manifold.png")
    assert "latent_dim is 3; the manifold is a picture of 2 dimensions: see `aevb traverse`" in error_of(
        capsys, "manifold", run
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["embed", "--part", "validation"], "digits has no validation part"),
        (["embed", "--data", "none.npy"], "none.npy: No such file"),
        (["impute", "--mask", "middle"], "mask is 'middle'; expected 'lower', 'upper', 'left', 'right', 'random'"),
        (["impute", "--mask", "random", "--missing", "1"], "missing is 1.0; expected a fraction between 0 and 1"),
        (["impute", "--images", "0"], "images is 0; expected at least 1"),
        (["denoise"], "flip is None and sigma None; expected one of them"),
        (["sample", "--num", "0"], "num is 0; expected at least 1"),
        (["traverse", "--image", "297"], "image is 297; expected the number of a test image, 0 to 296"),
        (["traverse", "--dims", "5"], "dims has 5; expected dimensions from 0 to 2"),
        (["interpolate", "--pairs", "500"], "pairs is 500; expected at most 148"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(args, sentence, run, capsys):
    assert sentence in error_of(capsys, args[0], run, *args[1:])
    assert {path.name for path in run.iterdir()} == LEFT


def test_what_training_left_is_kept(run, tmp_path, capsys):
    trainer = aevb.Trainer.load(run)
    for name in ("metrics.jsonl", "model.safetensors", "config.json"):
        with pytest.raises(RunFolderError, match=f"{name} is a training run's own file, which is kept"):
            write_answer(run / name, b"")
    assert aevb.Trainer.load(run).evaluate() == trainer.evaluate()
    assert "holds no run" in error_of(capsys, "sample", tmp_path)
    for name, array in {"text": np.array(["a"]), "shape": np.zeros((2, 7)), "large": np.full((1, 64), 1.5)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert f"{name}.npy" in error_of(capsys, "embed", run, "--data", tmp_path / f"{name}.npy")
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    assert "damaged.npy is no .npy file" in error_of(capsys, "embed", run, "--data", tmp_path / "damaged.npy")


def test_training_anew_takes_old_answers_away(tmp_path, capsys):
    config = aevb.TrainConfig(epochs=1, hidden_dims=(8,), latent_dim=2, progress=False, out=str(tmp_path / "run"))
    aevb.Trainer(config).fit()
    ask(capsys, "sample", tmp_path / "run", "--num", "4")
    (tmp_path / "run" / "mine.txt").write_text("kept")
    aevb.Trainer(dataclasses.replace(config, overwrite=True)).fit()
    assert {path.name for path in (tmp_path / "run").iterdir()} == LEFT | {"mine.txt"}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ends = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_endtag(self, tag):
        self.ends.append(tag)


def test_report_is_one_page_that_needs_nothing_else(runs, run, monkeypatch, capsys):
    monkeypatch.setattr("aevb.cli.report.RESTORED", 4)
    ask(capsys, "evaluate", run, "--num-samples", "10", "--images", "20", "--no-progress")
    evaluated = json.loads((run / "evaluation.json").read_text())["log_marginal_likelihood"]
    for path, texts in (
        (run, ["each dimension of z", f"{evaluated:,.3f}"]),
        (runs / "2", ["manifold", "`aevb evaluate` adds log p(x)"]),
    ):
        ask(capsys, "report", path)
        text = (path / "report.html").read_text()
        links = Links()
        links.feed(text)
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.links)
        assert "url(http" not in text
        assert "@import" not in text
        assert "script" not in links.tags
        assert "link" not in links.tags
        assert links.tags.count("svg") == links.ends.count("svg") == 5
        assert links.tags.count("img") == 6
        assert links.tags.count("figcaption") == 11
        assert links.tags.count("pre") == 0, "numbers stand in tables"
        assert links.tags.count("table") == 4
        assert all(t in text for t in texts)
        last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
        assert f"Test ELBO {last['test_elbo']:.2f} nats" in text
        assert "prefers-color-scheme: dark" in text
        assert "#010203" not in text


def trained(folder, data=None, **options):
    """A small run's folder."""
    options = dict(epochs=1, hidden_dims=(8,), latent_dim=2, progress=False, threads=1) | options
    aevb.Trainer(aevb.TrainConfig(out=str(folder), **options), dataset=data).fit()
    return folder


def test_noise_of_values_is_for_gaussian_runs_and_flips_are_for_bits(tmp_path, monkeypatch, capsys):
    grey = trained(tmp_path / "grey", binarize="none")
    assert (
        "grey values under a Bernoulli likelihood, which says nothing of a value's noise; expected a run"
        in error_of(capsys, "denoise", grey, "--sigma", "0.3", *FAST)
    )
    assert "values other than 0 and 1; expected bits" in error_of(capsys, "denoise", grey, "--flip", "0.2", *FAST)
    ask(capsys, "impute", grey, *FAST)
    monkeypatch.setattr("aevb.cli.report.RESTORED", 4)
    ask(capsys, "report", grey)
    text = (grey / "report.html").read_text()
    assert "missing pixels (lower) restored" in text
    assert "Gaussian noise" not in text
    assert "bits flipped" not in text
    gaussian = trained(tmp_path / "gaussian", likelihood="gaussian")
    assert "6 test images, Gaussian noise of sigma 0.3" in ask(capsys, "denoise", gaussian, "--sigma", "0.3", *FAST)


def unit_digits():
    """The digits as float32 in [0, 1]."""
    digits = aevb.data.load("digits")
    parts = {f"{part}_images": getattr(digits, f"{part}_images") / 16 for part in ("train", "test")}
    return dataclasses.replace(digits, max_value=1, **parts)


def test_a_thresholded_run_is_given_bits_of_any_images(tmp_path, capsys):
    """Above half, of bytes, floats and files."""
    for name, data in (("bytes", aevb.data.load("digits")), ("floats", unit_digits())):
        trainer = aevb.Trainer(aevb.TrainConfig(binarize="threshold", hidden_dims=(8,)), dataset=data)
        grey = aevb.data.load("digits").test_images
        expected = (grey > 8).float()
        assert torch.equal(pixels(trainer, data.test_images), expected)
        for array in (grey, grey.float() / 16) if name == "bytes" else (grey.float() / 16,):
            np.save(tmp_path / "some.npy", array.numpy())
            asked = asked_images(trainer, None, str(tmp_path / "some.npy"))
            assert torch.equal(asked[torch.arange(len(asked))], expected)


def test_images_of_a_file_are_in_range_where_they_are_observed(run, tmp_path, capsys):
    _, x = model_and_images(run)
    x, path, expected = (x[:3] > 0.5).numpy(), tmp_path / "some.npy", None
    for missing, kind in ((0, np.float32), (np.nan, np.float32), (-1, np.float64), (-1, np.int16), (255, np.uint8)):
        array = x.astype(kind)
        array[:, 32:] = missing
        np.save(path, array)
        ask(capsys, "impute", run, "--data", path, *FAST, "--out", tmp_path / "restored.npy")
        restored = np.load(tmp_path / "restored.npy")
        expected = restored if expected is None else expected
        assert np.array_equal(restored, expected)
        assert np.array_equal(restored[:, :32], x[:, :32])
        if missing != 0 and kind != np.uint8:
            for command in ("reconstruct", "embed"):
                assert f"datapoint 0, pixel 32 is {missing}; expected numbers in [0, 1]" in error_of(
                    capsys, command, run, "--data", path
                )
    array = x.astype(np.float32)
    array[1, 5] = np.nan
    np.save(path, array)
    assert "datapoint 1, pixel 5 is nan" in error_of(capsys, "impute", run, "--data", path, *FAST)


def test_what_is_shown_is_named(run, tmp_path, monkeypatch, capsys):
    titles = []
    for name in ("mosaic", "latent"):
        drawn = getattr(pictures, name)
        monkeypatch.setattr(
            f"aevb.training.pictures.{name}",
            lambda title, *args, drawn=drawn, **kw: (titles.append(title), drawn(title, *args, **kw))[1],
        )
    _, x = model_and_images(run)
    np.save(tmp_path / "mine.npy", x[:3].numpy())
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(12):
        Image.fromarray((255 * x[i].view(8, 8)).to(torch.uint8).numpy()).save(folder / f"{i}.png")
    for options, name in (
        ([], "digits: {}test images"),
        (["--part", "train"], "digits: {}training images"),
        (["--data", tmp_path / "mine.npy"], "mine.npy: {}images"),
        (["--data", folder, "--part", "train"], "mine: {}training images"),
    ):
        for command in ("reconstruct", "embed"):
            ask(capsys, command, run, *options)
            what = "" if command == "reconstruct" else "posterior means of {} "
            assert re.match(name.format(what.format("[0-9]+")), titles[-1])
    ask(capsys, "impute", run, "--data", tmp_path / "mine.npy", *FAST)
    assert titles[-1].startswith("mine.npy: images, missing")
    assert "part is 'train' and data" in error_of(
        capsys, "embed", run, "--part", "train", "--data", tmp_path / "mine.npy"
    )


def test_the_best_epochs_model_can_be_asked(tmp_path, monkeypatch, capsys):
    folder = trained(tmp_path / "run", epochs=2, validation=0.2)
    best = aevb.VAE(64, 8, 2, generator=torch.Generator().manual_seed(9))
    RunFolder.open(folder).write_model("best.safetensors", best, epoch=1, step=12)
    x = aevb.data.load("digits").test_images / 16
    ask(capsys, "reconstruct", folder, "--best", "--out", tmp_path / "r.npy")
    np.testing.assert_allclose(np.load(tmp_path / "r.npy"), best.reconstruct(x), rtol=1e-5, atol=1e-6)
    few = {"denoise": ["--flip", "0.1", *FAST], "impute": FAST, "evaluate": ["--num-samples", "2", "--images", "9"]}
    for command in ("sample", "embed", "denoise", "impute", "manifold", "traverse", "interpolate", "evaluate"):
        files = [tmp_path / f"{i}.{'json' if command == 'evaluate' else 'npy'}" for i in range(2)]
        for file, option in zip(files, ([], ["--best"]), strict=True):
            options = [*few.get(command, []), *option]
            if command == "evaluate":
                ask(capsys, command, folder, *options, "--no-progress")
                file.write_bytes((folder / "evaluation.json").read_bytes())
            else:
                ask(capsys, command, folder, *options, "--out", file)
        assert files[0].read_bytes() != files[1].read_bytes(), command
    numbers = json.loads(files[1].read_text())
    assert (numbers["epoch"], numbers["step"]) == (1, 12)
    monkeypatch.setattr("aevb.cli.report.RESTORED", 2)
    ask(capsys, "report", folder, "--best")
    text = (folder / "report.html").read_text()
    assert "after 1 epochs" in text
    assert f"{numbers['log_marginal_likelihood']:,.3f}" in text
    (folder / "best.safetensors").unlink()
    assert "has no best.safetensors: no validation images said which epoch is the best; expected a run" in error_of(
        capsys, "sample", folder, "--best"
    )


def test_a_report_shows_no_evaluation_of_other_weights(tmp_path, monkeypatch, capsys):
    folder = trained(tmp_path / "run")
    ask(capsys, "evaluate", folder, "--num-samples", "3", "--images", "9", "--no-progress")
    numbers = json.loads((folder / "evaluation.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text())
    assert (numbers["epoch"], numbers["step"]) == (last["epoch"], last["step"])
    monkeypatch.setattr("aevb.cli.report.RESTORED", 2)
    for stale in (False, True):
        ask(capsys, "report", folder)
        text = (folder / "report.html").read_text()
        assert (f"{numbers['log_marginal_likelihood']:,.3f}" in text) != stale
        assert ("`aevb evaluate` adds log p(x)" in text) == stale
        ask(capsys, "resume", folder, "--epochs", "2", "--no-progress")


def test_as_many_pairs_as_there_are():
    digits = aevb.data.load("digits")
    for count, pairs in ((5, 2), (1, 0)):
        few = dataclasses.replace(digits, test_images=digits.test_images[:count], test_labels=None)
        trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,)), dataset=few)
        if pairs:
            assert len(interpolated(trainer, InterpolateOptions())[0]) == pairs
            with pytest.raises(ValueError, match="pairs is 3; expected at most 2"):
                interpolated(trainer, InterpolateOptions(pairs=3))
        else:
            with pytest.raises(ValueError, match="digits has one test image; expected at least 2, a pair"):
                interpolated(trainer, InterpolateOptions())


def colours(count, *size):
    images = torch.randint(0, 256, (count, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return aevb.data.Dataset("colours", size, 255, images.flatten(1), images[:5].flatten(1))


def test_colour_images(tmp_path):
    """A mask hides all of a pixel; and the channels may be last, as in training."""
    data = colours(20, 3, 5, 6)
    trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,), binarize="none", likelihood="gaussian"), dataset=data)
    observed = mask_of(trainer, "random", 5, 0.5, 0).view(5, 3, 30)
    assert torch.equal(observed[:, 0], observed[:, 1])
    assert torch.equal(observed[:, 0], observed[:, 2])
    assert not torch.equal(observed[0], observed[1])
    assert 0.3 < float(observed.float().mean()) < 0.7
    last = data.test_images.view(5, 3, 5, 6).permute(0, 2, 3, 1)
    for array, count in ((last, 5), (last[0], 1), (data.test_images, 5), (data.test_images.view(5, 3, 5, 6), 5)):
        np.save(tmp_path / "some.npy", array.numpy())
        asked = asked_images(trainer, None, str(tmp_path / "some.npy"))
        assert torch.equal(asked[torch.arange(len(asked))], data.test_images[:count] * (1 / 255))


def test_masks_of_rows_and_masks_that_hide_nothing_or_everything(run, tmp_path, capsys):
    row = aevb.data.Dataset("rows", (1, 7), 1, *(torch.ones(3, 7, dtype=torch.uint8),) * 2)
    trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,)), dataset=row)
    for names, expected in ((("upper", "left"), [0] * 3 + [1] * 4), (("lower", "right"), [1] * 3 + [0] * 4)):
        for name in names:
            assert mask_of(trainer, name, 2, 0.5, 0).int().tolist() == [expected] * 2
    column = aevb.data.Dataset("columns", (7, 1), 1, *(torch.ones(3, 7, dtype=torch.uint8),) * 2)
    trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,)), dataset=column)
    with pytest.raises(ValueError, match="mask is 'left', which hides nothing of 2 images of 7x1; expected some"):
        mask_of(trainer, "left", 2, 0.5, 0)
    for value, what in ((0, "everything"), (1, "nothing")):
        np.save(tmp_path / "mask.npy", np.full((8, 8), value))
        sentence = error_of(capsys, "impute", run, "--mask", tmp_path / "mask.npy", *FAST)
        assert f"which hides {what} of 6 images of 8x8; expected some pixels to be observed" in sentence


def test_moments_of_the_training_images(tmp_path):
    data = aevb.data.load("digits")
    np.save(tmp_path / "some.npy", data.train_images.numpy())
    mapped = MappedImages(tmp_path / "some.npy").part(torch.randperm(1500))
    for images in (data.train_images, mapped):
        dataset = dataclasses.replace(data, train_images=images, max_value=255, test_images=mapped, test_labels=None)
        mean, variance = training_moments(aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,)), dataset=dataset))
        x = data.train_images.double() / 255
        torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(variance.double(), x.var(0, correction=0), rtol=1e-5, atol=1e-7)
    asked = asked_images(aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,)), dataset=dataset), "train", None)
    assert torch.equal(asked.each(lambda x, observed: x), mapped[:] * (1 / 255))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 64), (2, 300), (8, 8), (300, 2)])
def test_names_of_rows_do_not_overlap(shape):
    look, x = pictures.ImageStyle(shape), rand(1, 4, math.prod(shape))
    rows = {"image": x, "reconstruction": x}
    names = [f"z{j}: 0.12 nats" for j in range(4)]
    figures = [
        pictures.mosaic("a title", {"": x[:1]}, look),
        pictures.mosaic("a title", rows, look, columns=2),
        pictures.grid("a title\nof two lines", x.view(4, 1, -1).expand(4, 9, -1), look, names),
        pictures.manifold("a title", x.view(2, 2, -1), look),
    ]
    for figure in figures:
        pictures.png(figure)
        (axes,) = figure.axes
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        for above, below in itertools.pairwise(boxes if figure in figures[1:3] else []):
            assert below.y1 < above.y0 + 1


def test_float_images_in_whole_numbers_are_taken_as_in_training(tmp_path, monkeypatch):
    """Those of 0..16 here, as the digits are; a model of MNIST's takes floats of 0..255."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--epochs", "1", "--hidden-dims", "8", "--latent-dim", "2", "--no-progress"]) == 0
    whole = np.random.default_rng(0).integers(0, 17, (5, 64))
    np.save("floats.npy", whole.astype(np.float32))
    np.save("bytes.npy", whole.astype(np.uint8))
    np.save("beyond.npy", 15.0 * whole.astype(np.float32))
    for name in ("floats", "bytes"):
        assert main(["embed", "runs/digits", "--data", f"{name}.npy", "--out", f"of_{name}.npz"]) == 0
        assert main(["reconstruct", "runs/digits", "--data", f"{name}.npy", "--out", f"of_{name}.npy"]) == 0
    assert Path("of_floats.npz").read_bytes() == Path("of_bytes.npz").read_bytes()
    assert Path("of_floats.npy").read_bytes() == Path("of_bytes.npy").read_bytes()
    assert main(["embed", "runs/digits", "--data", "beyond.npy", "--out", "beyond.npz"]) == 1
