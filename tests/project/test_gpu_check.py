"""tools/gpu_check.sh and benchmarks/gpu without a GPU: a dry run, and what happens when things fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = ("machine", "small", "benchmarks", "tests", "memcheck")


@pytest.fixture
def gpu(monkeypatch):
    """Every module of benchmarks.gpu."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import cases
    from benchmarks.gpu import checks, session, table, work

    return SimpleNamespace(cases=cases, checks=checks, session=session, table=table, work=work)


def gpu_check(out, *args, python=sys.executable, **environment):
    environment = {**os.environ, "OUT": str(out), "PYTHON": python, **environment}
    command = [ROOT / "tools/gpu_check.sh", *args]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_dry_run(tmp_path, gpu):
    process = gpu_check(tmp_path, "--dry")
    assert process.returncode == 0, process.stdout[-3000:]
    summary = process.stdout.partition("== Summary")[2]
    for step in STEPS:
        assert any(line.startswith(step) and " ok, " in line for line in summary.splitlines()), summary
    assert (tmp_path / "gpu_check.log").read_text() == process.stdout
    results = json.loads((tmp_path / "results/dry-run.json").read_text())
    assert results["wrong"] == []
    assert results["skipped"] == []
    measured = {(r["op"], r["dtype"], r["targets"]): r["directions"] for r in results["ops"]}
    assert measured.keys() == {*gpu.work.KINDS, *gpu.work.ALONE}
    for kind in gpu.work.KINDS:
        assert measured[kind].keys() >= {"forward", "backward"}
    compared = [r for r in results["ops"] if "peers" in r]
    assert len(compared) == len(gpu.work.KINDS)
    for timing in compared:
        ways = [name.partition(" ")[0] for name in timing["peers"]]
        assert ways[0] == "aevb"
        assert {*ways[1:]} == {"eager", "compile"}
    assert results["steps"][0]["providers"].keys() - {"jax"} == {  # which a machine may have
        *("eager", "compile", "aevb", "aevb, trainer", "aevb, trainer, with autograd", "aevb, trainer, bf16")
    }
    unmeasured = [v["target"] for v in results["targets"] if v["measured"] is None]
    assert len(unmeasured) == 1 + 2 + 3 + 3 < len(results["targets"])
    for what in unmeasured:  # peers that need a GPU, and the larger batches
        assert any(part in what for part in ("triton", "reduce-overhead", "jax", "batch 1000", "batch 4096")), what


def test_failing_steps_do_not_stop_the_others(tmp_path):
    process = gpu_check(tmp_path, "--dry", python="false")
    assert process.returncode == 1
    for step in STEPS:
        assert f"-- {step}: FAILED with exit status 1" in process.stdout
    assert process.stdout.endswith(f"{len(STEPS)} of the steps FAILED\n")


def test_steps_end_in_time(tmp_path):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    process = gpu_check(tmp_path / "out", "--dry", python=str(slow), AEVB_GPU_CHECK_SECONDS="12")  # a step needs 5
    assert process.returncode == 1
    assert "-- machine: FAILED: stopped after " in process.stdout
    assert "-- memcheck: FAILED: no time was left for it" in process.stdout


def test_picked_steps(tmp_path):
    process = gpu_check(tmp_path, "--dry", python="false", STEPS="small tests")
    summary = process.stdout.partition("== Summary")[2].splitlines()[1:-1]
    assert [line.split()[0] for line in summary] == ["small", "tests"]


def test_usage(tmp_path):
    process = gpu_check(tmp_path, "--wet")
    assert process.returncode == 2
    assert "usage: tools/gpu_check.sh [--dry]" in process.stdout


def test_bytes_that_must_move(gpu):
    """Per row of 784 pixels, or of 128 latents, by hand."""
    latents, pixels = 10 * 128, 10 * 784
    assert gpu.work.Work.of("sample_gaussian", "float32", None, latents).bytes("forward") == 10 * (3 * 128 * 4 + 4)
    assert gpu.work.Work.of("sample_gaussian", "bfloat16", None, latents).bytes("backward") == 10 * (5 * 128 * 2 + 4)
    assert gpu.work.Work.of("gaussian_kl", "float32", None, latents).bytes("backward") == 10 * (4 * 128 * 4 + 4)
    work = gpu.work.Work.of("bernoulli_log_prob", "bfloat16", "uint8", pixels)
    assert work.bytes("forward") == 10 * (784 * (2 + 1) + 4)
    assert work.bytes("backward") == 10 * (784 * (2 + 1 + 2) + 4)
    assert work.bytes("forward+backward") == work.bytes("forward") + work.bytes("backward")
    loss = gpu.work.Work.of("FusedELBO", "float32", "float32", pixels)
    assert loss.bytes("backward") == pytest.approx(10 * 4 * (784 * 3 + 20 * 4))
    # The forward pass leaves the gradient of the logits behind, which the backward pass hands on.
    assert loss.bytes("forward+backward") == pytest.approx(10 * 4 * (784 * 3 + 20 * (2 + 4)))


@pytest.mark.parametrize(
    "op",
    [
        *("sample_gaussian", "sample_gaussian_log_ratio", "gaussian_kl", "bernoulli_log_prob"),
        *("gaussian_log_prob, fixed", "gaussian_log_prob, learned", "FusedELBO"),
    ],
)
def test_wrong_providers_are_found_out(op, gpu):
    """Before anything is timed, by their values and by their gradients."""
    torch.manual_seed(1)
    work = gpu.work.Work.of(op, "float32", None if op in gpu.work.LATENT_OPS else "float32", 20 * 784)
    inputs, upstream = work.inputs("cpu"), work.upstream("cpu")
    right = work.aevb()
    gpu.checks.check(work, right, inputs, upstream)

    def wrong_value(*tensors):
        found = right(*tensors)
        return (found[0], found[1] + 0.1) if isinstance(found, tuple) else found * 1.001

    def wrong_gradient(*tensors):
        found = right(*(t.detach() if t is inputs[0] else t for t in tensors))
        factor = 1 + 1e-3 * (inputs[0] - inputs[0].detach()).sum()
        return tuple(f * factor for f in found) if isinstance(found, tuple) else found * factor

    for function in (wrong_value, wrong_gradient):
        with pytest.raises(AssertionError, match="off by"):
            gpu.checks.check(work, function, inputs, upstream)
    for way in work.peers().values():
        gpu.checks.check(work, way, inputs, upstream)


def test_noise_that_is_not_normal_is_found_out(gpu):
    torch.manual_seed(1)
    work = gpu.work.Work.of("sample_gaussian", "float32", None, 100 * 128)
    inputs, upstream = work.inputs("cpu"), work.upstream("cpu")

    def narrow(mu, logvar):
        return mu + 0.9 * torch.exp(0.5 * logvar) * torch.randn_like(mu), 0.5 * gpu.cases.kl_terms(mu, logvar).sum(-1)

    with pytest.raises(AssertionError, match="variance"):
        gpu.checks.check(work, narrow, inputs, upstream)


def test_what_fails_is_noted_and_the_rest_goes_on(gpu, tmp_path, capsys):
    run = gpu.session.Session("cpu", 60, True, tmp_path / "results.json")

    def fails():
        raise ValueError("it is broken\nin two lines")

    run.attempt("a part", fails)
    run.until = 0
    run.attempt("another", lambda: run.need(1))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["wrong"] == ["a part: ValueError: it is broken"]
    assert found["skipped"] == ["another: no time left for what takes about 1 s"]
    assert "WRONG: a part" in gpu.table.table(found)
    assert "not measured" in gpu.table.table(found)
    capsys.readouterr()
