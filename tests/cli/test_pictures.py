"""What pictures show: images as they are, or inverted; grey ones beside what a model is given of them."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import aevb
from aevb.cli import main
from aevb.cli.images import grey_pixels
from aevb.cli.options import DenoiseOptions, ImputeOptions
from aevb.cli.restore import denoised, imputed
from aevb.training import pictures

FAST = {"images": 6, "steps": 3, "num_samples": 4}
FLAGS = ["--images", "6", "--steps", "3", "--num-samples", "4"]


def pixels_of(figure):
    return np.asarray(Image.open(io.BytesIO(pictures.png(figure))).convert("RGB")).astype(int)


def count(image, colour):
    return int((abs(image - np.array(colour)) < 1.5).all(-1).sum())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's folder by what it makes of grey pixels."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"epochs": 1, "hidden_dims": (8,), "latent_dim": 2, "progress": False, "threads": 1}
    for binarize in ("dynamic", "threshold", "none"):
        aevb.Trainer(aevb.TrainConfig(out=str(folder / binarize), binarize=binarize, **options)).fit()
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: title, rows by name, look, and all pixels' least and largest values on the screen."""
    found = []

    def wrapped(name):
        original = getattr(pictures, name)

        def draw(title, images, look, *args, **options):
            figure = original(title, images, look, *args, **options)
            found.append((pictures.caption(figure) if look.bare else figure.get_suptitle(), images, look))
            return figure

        return draw

    for name in ("mosaic", "grid", "manifold"):
        monkeypatch.setattr(pictures, name, wrapped(name))
    return found


# ---- as they are, or inverted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "value", "shown", "inverted"),
    [
        ((4, 5), (0,), (0, 0, 0), (255, 255, 255)),
        ((4, 5), (1,), (255, 255, 255), (0, 0, 0)),
        ((1, 4, 5), (0,), (0, 0, 0), (255, 255, 255)),
        ((3, 4, 5), (1, 0, 0), (255, 0, 0), (0, 255, 255)),
        ((4, 4, 5), (0, 0, 0, 1), (0, 0, 0), (255, 255, 255)),
    ],
)
def test_images_are_shown_as_they_are_or_inverted(shape, value, shown, inverted):
    images = torch.tensor(value).float().view(-1, 1, 1).expand(len(value), 4, 5).flatten().expand(2, -1)
    missing = {"": (torch.arange(images.shape[1]) % 20 < 5).expand(2, -1)}
    for invert, colour in ((False, shown), (True, inverted)):
        look = pictures.ImageStyle(shape, invert)
        image = pixels_of(pictures.mosaic("a title", {"": images}, look, missing=missing))
        assert count(image, colour) > 1000
        assert count(image, np.multiply(255, pictures.MISSING)) > 300, "missing pixels have their colour in both"
        for figure in (
            pictures.grid("a title", images.view(2, 1, -1), look),
            pictures.manifold("a title", images.repeat(2, 1).view(2, 2, -1), look),
        ):
            assert count(pixels_of(figure), colour) > 1000
            assert ("inverted" in figure.get_suptitle()) == invert


@pytest.mark.parametrize(
    "command",
    [
        ["reconstruct"],
        ["sample", "--num", "9"],
        ["impute", *FLAGS],
        ["denoise", "--flip", "0.2", *FLAGS],
        ["manifold", "--num", "3"],
        ["traverse"],
        ["interpolate"],
        ["report"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_shows_images_as_they_are_unless_told_to_invert(command, runs, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr("aevb.cli.report.RESTORED", 4)
    name, *options = command
    for invert in (False, True):
        drawn.clear()
        flag = ["--invert"] if invert else []
        out = tmp_path / f"{invert}.{'html' if name == 'report' else 'png'}"
        assert main([name, str(runs / "dynamic"), *options, *flag, "--out", str(out)]) == 0
        assert len(drawn) == (6 if name == "report" else 1)
        assert {look.invert for _, _, look in drawn} == {invert}
        assert all(("(inverted)" in title) == invert for title, _, _ in drawn)


def count_dark(path):
    return int((np.asarray(Image.open(path).convert("L")) < 30).sum())


def test_training_shows_images_as_they_are_unless_told_to_invert(runs, tmp_path):
    options = {"epochs": 1, "hidden_dims": (8,), "latent_dim": 2, "progress": False, "threads": 1}
    run = tmp_path / "run"
    aevb.Trainer(aevb.TrainConfig(out=str(run), invert=True, **options)).fit()
    assert count_dark(runs / "dynamic" / "reconstructions.png") > 1.5 * count_dark(run / "reconstructions.png")
    assert (runs / "dynamic" / "samples.png").read_bytes() != (inverted := (run / "samples.png").read_bytes())
    assert main(["resume", str(run), "--epochs", "1", "--no-progress"]) == 0
    assert (run / "samples.png").read_bytes() == inverted
    assert json.loads((run / "config.json").read_text())["invert"]
    assert main(["resume", str(runs / "none"), "--invert", "--epochs", "2", "--no-progress"]) == 0
    dark = [count_dark(runs / name / "reconstructions.png") for name in ("dynamic", "none")]
    assert dark[0] > 1.5 * dark[1]


# ---- grey images, and what a model is given of them ------------------------------------------------------------------

AGAINST = {
    "dynamic": "both against the binarized images, whose bits are drawn with the grey values as probabilities",
    "threshold": "both against the binarized images, whose bits are set where the grey value is above half",
    "none": "both against the clean images",
}


@pytest.mark.parametrize("binarize", AGAINST)
@pytest.mark.parametrize("answer", [imputed, denoised])
def test_clean_images_are_the_grey_ones_and_errors_say_of_which(answer, binarize, runs, drawn):
    trainer = aevb.Trainer.load(runs / binarize)
    if answer is denoised and binarize == "none":
        pytest.skip("grey values under a Bernoulli likelihood have no noise that is known")
    options = DenoiseOptions(**FAST, flip=0.2) if answer is denoised else ImputeOptions(**FAST)
    found = answer(trainer, options)
    found.figure()
    (_, rows, _), text = drawn[0], str(found)
    index = pictures.examples(trainer.dataset, 6)
    grey = grey_pixels(trainer, trainer.dataset.test_images[index])
    given = "masked" if answer is imputed else "noisy"
    bits = [] if binarize == "none" else ["binarized"]
    assert list(rows) == ["clean", *bits, given, "one pass", "restored"]
    assert torch.equal(rows["clean"], grey)
    assert AGAINST[binarize] in text
    target = rows[bits[0]] if bits else rows["clean"]
    if bits:
        assert set(target.unique().tolist()) == {0, 1}
        assert torch.equal(target, trainer.held_out["test"].x(index).float())
    wanted = torch.ones(6, 64, dtype=torch.bool) if answer is denoised else ~found.observed
    error = float((found.found.mean - target).square()[wanted].mean())
    assert f"restored{'':18}{error:14.4f}" in text


def test_images_that_are_bits_are_shown_once(tmp_path, drawn):
    bits = torch.randint(0, 2, (40, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = aevb.data.Dataset("bits", (4, 4), 1, bits, bits[:9])
    trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(8,), latent_dim=2), dataset=data)
    found = imputed(trainer, ImputeOptions(**FAST))
    found.figure()
    assert list(drawn[0][1]) == ["clean", "masked", "one pass", "restored"]
    assert "both against the clean images" in str(found)


@pytest.mark.parametrize("binarize", AGAINST)
def test_images_of_a_file_are_shown_grey_and_binarized_where_the_model_is_given_bits(binarize, runs, tmp_path, drawn):
    grey = aevb.data.load("digits").test_images[:5] / 16
    np.save(tmp_path / "mine.npy", grey.numpy())
    run = str(runs / binarize)
    assert main(["impute", run, "--data", str(tmp_path / "mine.npy"), *FLAGS, "--out", str(tmp_path / "i.png")]) == 0
    assert main(["reconstruct", run, "--data", str(tmp_path / "mine.npy"), "--out", str(tmp_path / "r.png")]) == 0
    (_, restored, _), (_, reconstructed, _) = drawn
    bits = ["binarized"] if binarize == "threshold" else []
    assert list(restored) == ["masked", *bits, "restored"]
    assert list(reconstructed) == ["image", *bits, "reconstruction"]
    assert torch.equal(reconstructed["image"], grey)
    assert torch.equal(restored["masked"][:, :32], grey[:, :32])
    if bits:
        assert torch.equal(reconstructed["binarized"], (grey > 0.5).float())


def test_reports_show_grey_images_too(runs, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr("aevb.cli.report.RESTORED", 4)
    for binarize in ("dynamic", "threshold"):
        drawn.clear()
        assert main(["report", str(runs / binarize), "--out", str(tmp_path / "page.html")]) == 0
        text = (tmp_path / "page.html").read_text()
        assert AGAINST[binarize].removeprefix("both ") in text
        assert "of the binarized image, where grey images are binarized for the model" in text
        images = [rows for _, rows, _ in drawn if isinstance(rows, dict)]
        shown = [rows["image"] for rows in images if "image" in rows] + [r["clean"] for r in images if "clean" in r]
        assert len(shown) == 3
        assert all(len(x.unique()) > 2 for x in shown)
        assert sum("binarized" in rows for rows in images) == (3 if binarize == "threshold" else 2)


def test_the_ends_of_an_interpolation_are_grey(runs, tmp_path, drawn):
    for binarize in AGAINST:
        assert main(["interpolate", str(runs / binarize), "--pairs", "3", "--out", str(tmp_path / "i.png")]) == 0
    ends = [images[:, [0, -1]] for _, images, _ in drawn]
    assert len(ends[0].unique()) > 2
    assert all(torch.equal(x, ends[0]) for x in ends)
