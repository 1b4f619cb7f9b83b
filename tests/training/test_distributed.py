"""Several processes, started by torchrun: what one process computes, and what happens when one of them dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aevb.training.distributed import ProcessGroup, SingleProcess, is_launched

HERE = Path(__file__).parents[1]


def launch(processes, *args):
    """torchrun, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*torchrun, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return torch.tensor([[line[name] for name in ("train_elbo", "train_kl", "test_elbo")] for line in metrics(run)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, without torchrun."""
    out = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run([sys.executable, HERE / "distributed_run.py", out, "{}"], check=True)
    return out


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_same_losses_by_any_number_of_processes(tmp_path, alone, processes):
    done = launch(processes, HERE / "distributed_run.py", tmp_path / "run", "{}")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 6
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-5, atol=0)
    if processes == 1:
        assert torch.equal(losses(tmp_path / "run"), losses(alone))


@pytest.mark.parametrize(
    "options",
    [
        '{"free_bits": 0.2}',
        '{"capacity": 3.0, "clip_norm": 5.0}',
        '{"holes": true, "mask_input": true}',
        '{"prior": "learned", "free_bits": 0.2}',
    ],
)
def test_what_goes_by_the_whole_batch_does(tmp_path, options):
    """Free bits and a capacity look at the batch's mean KL, not at a process's; masks belong to the image."""
    for processes in (1, 2):
        done = launch(processes, HERE / "distributed_run.py", tmp_path / str(processes), options)
        assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5, atol=0)


def test_a_process_that_dies_ends_the_job_and_another_number_goes_on(tmp_path, alone):
    out = tmp_path / "run"
    done = launch(2, HERE / "distributed_run.py", out, "{}", 1, 9)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert len(metrics(out)) < 6
    assert list((out / "checkpoints").iterdir())
    done = launch(3, HERE / "distributed_run.py", out, "{}")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(out)] == [4 * epoch for epoch in range(1, 7)]
    torch.testing.assert_close(losses(out), losses(alone), rtol=1e-5, atol=0)


def test_the_command_line_under_torchrun(tmp_path):
    """As the README has it: one process writes and speaks."""
    out = tmp_path / "run"
    sizes = ["--hidden-dims", "8", "--latent-dim", "2", "--epochs", "1"]
    done = launch(2, "-m", "aevb", "train", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test ELBO") == 1
    assert (out / "samples.png").exists()
    assert "epoch 1/1, ELBO" in done.stderr
    done = launch(2, "-m", "aevb", "train", *sizes, "--out", out)
    assert done.returncode == 1
    assert f"aevb: {out} already holds a run" in done.stderr


def test_a_process_alone():
    assert not is_launched()
    alone, index = SingleProcess(torch.device("cpu")), torch.arange(5)
    assert alone.is_first
    assert alone.part(index) is index
    assert alone.share("x") == "x"
    assert alone.gather(3) == [3]


def test_every_image_is_some_processes():
    parts = []
    for rank in range(4):
        several = object.__new__(ProcessGroup)
        several.rank, several.size = rank, 4
        parts.append([several.part(torch.arange(n)).tolist() for n in (1, 4, 10)])
    for i, n in enumerate((1, 4, 10)):
        assert [x for part in parts for x in part[i]] == list(range(n))
