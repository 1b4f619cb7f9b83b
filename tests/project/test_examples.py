"""The examples run as they stand, and do what they say."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text):
    return [float(number) for number in re.findall(r"(-?\d+\.\d+) nats", text)]


def test_one_line_changes_and_no_number():
    before, after = (EXAMPLES / f"vae_{which}.py" for which in ("before", "after"))
    lines = list(difflib.ndiff(before.read_text().splitlines(), after.read_text().splitlines()))
    docstring = '"""'
    added = [line[2:] for line in lines if line.startswith("+ ") and docstring not in line and line.strip() != "+"]
    assert added == ["from aevb import FusedELBO", 'loss_function = FusedELBO(reduction="sum", from_probs=True)']
    losses = [numbers(run(path)) for path in (before, after)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 5


def test_a_lightning_module():
    pytest.importorskip("lightning")
    *_, last = run(EXAMPLES / "lightning_vae.py").splitlines()
    found = dict(re.findall(r"'(\w+)': (-?\d+\.\d+)", last))
    assert set(found) == {"train_elbo", "val_elbo"}
    assert -32 < float(found["val_elbo"]) < -20


def test_two_processes():
    torchrun = ("-m", "torch.distributed.run", "--standalone")
    found = [numbers(run(*torchrun, f"--nproc-per-node={n}", EXAMPLES / "two_processes.py")) for n in (1, 2)]
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] > found[0][0] + 5
