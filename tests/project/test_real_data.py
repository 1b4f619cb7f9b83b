"""Every command on real data, from training to the report: MNIST and Frey's faces, where ../shared/data has them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aevb.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data"
SETS = {
    "mnist": (DATA / "mnist", ["--hidden-dims", "64"], (10_000, 784)),
    "freyfaces": (DATA / "frey" / "frey_rawface.mat", ["--likelihood", "gaussian", "--hidden-dims", "64"], (197, 560)),
}
RESTORED = ["--images", "20", "--num-samples", "50", "--save-array"]


def says(capsys, *args):
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def errors(table):
    """What `impute` and `denoise` print: the squared error of each way."""
    rows = (re.fullmatch(r"(.+?) {2,}(\d+\.\d+) +-?\d+\.\d+", line) for line in table.splitlines())
    return {row[1]: float(row[2]) for row in rows if row}


@pytest.mark.parametrize("name", SETS)
def test_from_training_to_the_report(tmp_path, capsys, name):
    data, options, shape = SETS[name]
    if not data.exists():
        pytest.skip(f"there is no {data}")
    run = tmp_path / "run"
    epochs = "1" if name == "mnist" else "40"
    train = ["train", "--data", data, "--epochs", epochs, "--latent-dim", "2", "--no-progress", "--threads", "1"]
    out = says(capsys, *train, *options, "--out", run)
    assert f"{shape[0]:,} test images" in out
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["test_elbo"] > (-200 if name == "mnist" else 300)

    out = says(capsys, "evaluate", run, "--images", "50", "--num-samples", "100", "--no-progress")
    assert "log p(x)" in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["log_marginal_likelihood"] > found["elbo"]
    pictures = {"reconstruct": "reconstructions", "sample": "samples"}
    for command in ("reconstruct", "sample", "manifold", "traverse", "interpolate"):
        assert f"{pictures.get(command, command)}.png" in says(capsys, command, run)
    says(capsys, "embed", run)
    posterior = np.load(run / "latent.npz")
    assert posterior["mu"].shape == posterior["logvar"].shape == (shape[0], 2)
    assert ("labels" in posterior) == (name == "mnist")

    noise = ["--flip", "0.2"] if name == "mnist" else ["--sigma", "0.2"]
    for command, how in (("impute", ["--mask", "lower"]), ("denoise", noise)):
        found = errors(says(capsys, command, run, *how, *RESTORED))
        assert found["restored"] < found["the mean training image"], (command, found)
        assert np.load(run / f"{command}.npy").shape == (20, shape[1])
    for path in run.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path.name

    says(capsys, "report", run)
    page = (run / "report.html").read_text()
    assert f"{metrics['test_elbo']:.2f}" in page
    assert page.count("data:image/png;base64,") >= 6
