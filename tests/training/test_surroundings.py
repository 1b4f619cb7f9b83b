"""What a run inherits from the world around it stops it for no reason."""

import errno
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

import aevb
from aevb.cli import main
from aevb.training import pictures
from aevb.training import trainer as train

TRAIN = ["train", "--epochs", "1", "--hidden-dims", "8", "--latent-dim", "2", "--no-progress"]
PICTURES = ("reconstructions.png", "samples.png", "latent.png")


def aevb_in(folder, *args, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-m", "aevb", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def whole(folder, done=None):
    assert done is None or done.returncode == 0, done.stderr.decode()
    (run,) = (folder / "runs").iterdir()
    for name in ("config.json", "metrics.jsonl", "model.safetensors", *PICTURES):
        assert (run / name).stat().st_size > 0, name
    return run


@pytest.mark.parametrize(
    "environment",
    [
        {
            **{"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C", "PYTHONUTF8": "0"},
            **{"PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "", "LINES": "", "NO_COLOR": ""},
        },
        {
            **{"MPLBACKEND": "TkAgg", "DISPLAY": None, "HOME": None, "XDG_CACHE_HOME": None, "USER": None},
            **{"OMP_NUM_THREADS": "", "WORLD_SIZE": "1", "RANK": "0"},
        },
        {
            **{"MPLBACKEND": "", "MATPLOTLIBRC": "rc", "AEVB_ISA": "", "AEVB_PRODUCTS": ""},
            **{"AEVB_DATA_DIR": "", "AEVB_DATA_MIRROR": "", "AEVB_CACHE_MB": ""},
        },
        {"HOME": "/nowhere", "MPLCONFIGDIR": "/nowhere/else", "PYTHONWARNINGS": "error"},
    ],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items())[:40],
)
def test_environments(tmp_path, environment):
    (tmp_path / "rc").write_text("text.usetex: True\nfont.family: Nothing\nfigure.dpi: 7\n")
    whole(tmp_path, aevb_in(tmp_path, *TRAIN, **environment))


@pytest.mark.parametrize(
    "name",
    ["cost_$5_{", "a b", "-x", "ä", "100%", "a\nb", "x" * 200, ".hidden", ".", os.fsdecode(b"latin-\xe9")],
)
def test_names_of_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    np.save(f"{name}.npy", np.random.default_rng(0).integers(0, 256, (40, 16)).astype("uint8"))
    assert main([*TRAIN, f"--data=./{name}.npy"]) == 0
    whole(tmp_path)


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_closed_stream(tmp_path, closed):
    number = ["stdin", "stdout", "stderr"].index(closed)
    code = (
        f"import os, sys; os.close({number}); os.execv(sys.executable, [sys.executable, '-m', 'aevb', *sys.argv[1:]])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *TRAIN], cwd=tmp_path, env=environment, capture_output=True)
    whole(tmp_path, done)


def test_pictures_never_fail_a_run(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(pictures, "draw", broken)
    config = aevb.TrainConfig(epochs=1, hidden_dims=(8,), latent_dim=2, progress=False, out=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="run has no pictures, or some are of before: RuntimeError: no font"):
        metrics = train.Trainer(config).fit()
    assert metrics["epoch"] == 1
    assert aevb.load(tmp_path / "run").latent_dim == 2


def test_many_labels():
    """A legend of 400 is higher than the picture."""
    mu, labels = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 400
    figure = pictures.latent("400 labels", mu, labels)
    assert figure.axes[0].get_legend() is None
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()][::8] == ["0", "399"]
    assert figure.axes[1].get_ylabel() == "label, of 400"
    assert pictures.latent("10 labels", mu, labels % 10).axes[0].get_legend() is not None


def test_a_users_style_is_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"axes.facecolor": "red", "text.usetex": True}):
        figure = pictures.latent("$5_{", torch.randn(20, 2), None)
        assert pictures.png(figure).startswith(b"\x89PNG")
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    assert figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("what", ["folders", "all"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF])
def test_a_file_system_that_refuses_fsync(tmp_path, monkeypatch, code, what):
    """As SMB, FUSE and shared folders do: a run begins, ends, and is begun anew in its folder."""
    fsync, refused = os.fsync, []

    def refusing(descriptor):
        if what == "all" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    options = {"epochs": 1, "hidden_dims": (8,), "latent_dim": 2, "progress": False, "out": str(tmp_path / "run")}
    for overwrite in (False, True):
        aevb.Trainer(aevb.TrainConfig(**options, overwrite=overwrite)).fit()
    assert refused
    assert aevb.Trainer.load(tmp_path / "run").epoch == 1


def test_a_disk_that_is_broken_is_said(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    options = {"epochs": 1, "hidden_dims": (8,), "latent_dim": 2, "progress": False, "out": str(tmp_path / "run")}
    with pytest.raises(OSError, match="Input/output error"):
        aevb.Trainer(aevb.TrainConfig(**options)).fit()
