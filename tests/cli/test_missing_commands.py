"""Every command on a run whose data have missing values, from training to the completed array."""

import json

import numpy as np
import pytest
import torch
from commands import ask, error_of

import aevb
from aevb.cli import main
from aevb.data import load

FAST = ["--steps", "3", "--num-samples", "20"]


def holes(seed=0):
    """Digits of 0..16 with NaN where a pixel is missing, (120, 8, 8), of which some are complete."""
    images = load("digits").train_images[:120].float().view(120, 8, 8).numpy()
    missing = np.random.default_rng(seed).random(images.shape) < 0.4
    missing[:10] = False
    return np.where(missing, np.nan, images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("missing")
    np.save(folder / "holes.npy", holes())
    options = ["--epochs", "2", "--hidden-dims", "16", "--latent-dim", "3", "--threads", "1", "--no-progress"]
    data = ["--data", folder / "holes.npy", "--missing", "nan", "--validation", "0.1"]
    for name, more in {"run": [], "beside": ["--mask-input", "--likelihood", "gaussian"]}.items():
        assert main([str(a) for a in ["train", *data, *options, *more, "--out", folder / name]]) == 0
    return folder


@pytest.fixture(params=["run", "beside"])
def run(request, folder):
    return folder / request.param


def test_the_runs_own_holes_are_filled(run, folder, tmp_path, capsys):
    """The whole array, in the order and the units of the file; what was observed is as it was."""
    text = ask(capsys, "impute", run, *FAST, "--out", tmp_path)
    assert "missing pixels (37." in text
    given, found = holes().reshape(120, 64), np.load(tmp_path / "impute.npy")
    observed = ~np.isnan(given)
    assert found.shape == (120, 64)
    assert np.array_equal(found[observed], given[observed])
    filled = found[~observed]
    assert np.isfinite(filled).all()
    assert filled.max() > 1.5  # of 0..255, in which the file is read
    assert (tmp_path / "impute.png").stat().st_size > 1000


def test_a_part_and_some_of_the_images(run, tmp_path, capsys):
    data = aevb.Trainer.load(run).dataset
    for part in ("train", "validation", "test"):
        ask(capsys, "impute", run, "--part", part, "--images", "7", *FAST, "--out", tmp_path / "some.npy")
        found = torch.from_numpy(np.load(tmp_path / "some.npy"))
        observed, images = data.observed[part][:7], getattr(data, f"{part}_images")[:7]
        assert torch.equal(found[observed], images.float()[observed])


def test_pixels_hidden_besides(run, tmp_path, capsys):
    """Errors are of what was hidden and is known."""
    text = ask(capsys, "impute", run, "--mask", "lower", "--images", "9", *FAST, "--out", tmp_path)
    rows = [line.split() for line in text.splitlines() if line.startswith(("restored", "the mean"))]
    assert all(0 < float(row[-2]) < 1 for row in rows)
    assert len(rows) == 2


def test_a_file_with_holes(run, folder, tmp_path, capsys):
    text = ask(capsys, "impute", run, "--data", folder / "holes.npy", *FAST, "--out", tmp_path)
    assert "missing pixels (NaN) restored" in text
    assert np.isfinite(np.load(tmp_path / "impute.npy")).all()
    ask(capsys, "embed", run, "--data", folder / "holes.npy", "--out", tmp_path)
    mu = np.load(tmp_path / "latent.npz")["mu"]
    model, given = aevb.load(run), torch.from_numpy(holes().reshape(120, 64)).float()
    x, observed = given.nan_to_num() / 255, ~given.isnan()
    with torch.no_grad():
        expected, _ = model.encode(x, observed=observed)
    np.testing.assert_allclose(mu, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("command", ["reconstruct", "embed", "traverse", "interpolate", "report", "sample"])
def test_every_command_answers(run, tmp_path, capsys, command):
    assert "written" in ask(capsys, command, run, "--out", tmp_path)


def test_evaluation_is_of_what_is_observed(run, capsys):
    text = ask(capsys, "evaluate", run, "--num-samples", "20", "--no-progress")
    numbers = json.loads((run / "evaluation.json").read_text())
    trainer = aevb.Trainer.load(run)
    observed = trainer.dataset.observed["test"]
    assert numbers["observed"] == pytest.approx(float(observed.double().mean()))
    assert f"of the observed pixels, {numbers['observed']:.1%} of all" in text
    expected = aevb.log_marginal_likelihood(trainer.model, trainer.test_x, 20, observed=observed)
    assert numbers["log_marginal_likelihood"] == pytest.approx(expected.mean)


def test_a_mask_beside_the_data(folder, tmp_path, capsys):
    observed = ~np.isnan(holes())
    np.save(tmp_path / "wild.npy", np.where(observed, holes(), 99))
    np.save(tmp_path / "mask.npy", observed.astype(np.uint8))
    options = ["--epochs", "2", "--hidden-dims", "16", "--latent-dim", "3", "--threads", "1", "--no-progress"]
    args = ["--data", tmp_path / "wild.npy", "--mask", tmp_path / "mask.npy", "--validation", "0.1", *options]
    said = f"{1 - observed.mean():.1%} of the values are missing"
    assert said in ask(capsys, "train", *args, "--out", tmp_path / "run")
    weights = [aevb.load(path).state_dict() for path in (tmp_path / "run", folder / "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ask(capsys, "resume", tmp_path / "run", "--epochs", "3", "--no-progress")
    np.save(tmp_path / "mask.npy", observed[::-1])
    assert main(["resume", str(tmp_path / "run"), "--epochs", "4"]) == 1
    assert "the run was of other data" in capsys.readouterr().err


def test_without_holes_nothing_is_to_be_filled(run, folder, tmp_path, capsys):
    assert "expected a part of a run whose data have missing values, without --mask and --data" in error_of(
        capsys, "impute", run, "--part", "test", "--mask", "lower", *FAST
    )
    np.save(tmp_path / "whole.npy", holes())
    assert "--missing nan" in error_of(capsys, "train", "--data", folder / "holes.npy", "--out", tmp_path / "other")
