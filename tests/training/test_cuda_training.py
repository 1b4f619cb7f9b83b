"""Training on a GPU: every kind of model and optimizer, captured in a CUDA graph, held to the CPU's runs; and resumed.

In a dry run (see conftest.py) the GPU is the CPU.
"""

import copy
import json
import warnings

import pytest
import torch
from conftest import DRY, GPU, HAS_CUDA
from safetensors.torch import load_file
from test_cuda import assert_returns_while_the_gpu_sleeps

import aevb
from aevb.data import Targets
from aevb.training import pictures
from aevb.training.optimizers import OPTIMIZERS
from aevb.training.step_choice import training_step
from aevb.training.step_cuda_graph import GraphStep

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (HAS_CUDA or DRY), reason="needs an NVIDIA GPU and aevb's CUDA kernels"),
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than all else, and are not the GPU's."""
    monkeypatch.setattr(pictures, "draw", lambda *_: {})


SMALL = {"hidden_dims": (32,), "latent_dim": 4, "channels": (4, 8), "epochs": 2, "progress": False}
KINDS = {
    "mlp": {},
    "two layers": {"hidden_dims": (32, 16)},
    "conv": {"architecture": "conv"},
    "gaussian": {"likelihood": "gaussian"},
    "gaussian, shared": {"likelihood": "gaussian", "variance": "shared"},
    "gaussian, fixed, conv": {"likelihood": "gaussian", "variance": 0.1, "architecture": "conv"},
    "grey": {"binarize": "none"},
    "sgvb-a": {"estimator": "sgvb-a", "num_samples": 3},
    "stl": {"estimator": "stl"},
    "iwae": {"estimator": "iwae", "num_samples": 5},
    "dreg": {"estimator": "dreg", "num_samples": 5},
    "free bits": {"free_bits": 0.1},
    "capacity": {"capacity": 3.0, "beta": 5.0},
    "cosine": {"schedule": "cosine", "learning_rate_warmup": 5},
    "linear": {"schedule": "linear"},
    "beta": {"warmup_epochs": 2, "warmup_cycles": 2, "beta": 2.0},
    "clip": {"clip_norm": 1.0},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.02},
    "adagrad, cosine": {"optimizer": "adagrad", "learning_rate": 0.02, "schedule": "cosine"},
}


def trainer(out, device=GPU, **options):
    return aevb.Trainer(aevb.TrainConfig(out=str(out), device=device, **{**SMALL, **options}))


def is_captured(made: aevb.Trainer) -> bool:
    step = made.loop.step_now
    return DRY > 0 or (isinstance(step, GraphStep) and step.graph is not None)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_run_is_the_cpus(kind, tmp_path):
    """But for the rounding of products, which are a library's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = trainer(tmp_path / "gpu", **KINDS[kind])
        here.fit()
    assert is_captured(here)
    trainer(tmp_path / "cpu", "cpu", **KINDS[kind]).fit()
    for found, expected in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_bf16_learns(tmp_path):
    made = trainer(tmp_path / "run", precision="bf16", epochs=3)
    before = made.evaluate().elbo
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if DRY else "error")  # a CPU may have no instructions for it
        assert made.fit()["test_elbo"] > before + 3
    assert is_captured(made)


@pytest.mark.parametrize("kind", ["mlp", "conv", "gaussian", "iwae", "adagrad", "beta"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(kind, tmp_path):
    options = {**KINDS[kind], "deterministic": True}
    trainer(tmp_path / "whole", **options, epochs=3).fit()
    made = trainer(tmp_path / "stopped", **options, epochs=3)
    counted = made.loop.take

    def stop_in_the_second_epoch(*args):
        counted(*args)
        if made.step == 27:
            raise KeyboardInterrupt

    made.loop.take = stop_in_the_second_epoch
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    aevb.Trainer.resume(tmp_path / "stopped").fit()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    whole, stopped = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def graph_step(kind, **criterion):
    images = torch.randint(0, 256, (200, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    targets = Targets(images, "dynamic", 255, GPU)
    model = aevb.VAE(64, 50, 5, generator=torch.Generator().manual_seed(1)).to(GPU)
    loss = aevb.FusedELBO(**criterion)
    optimizer = OPTIMIZERS[kind](model.parameters(), 1e-2, torch.device(GPU))
    return training_step(model, loss, optimizer, targets, 20, False)


@pytest.mark.skipif(DRY > 0, reason="a dry run: needs CUDA's run-time")
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize(
    "criterion",
    [{}, {"free_bits": 0.5}, {"estimator": "iwae", "num_samples": 7}, {"beta": torch.tensor(0.3)}],
    ids=["direct", "free bits", "iwae", "beta a tensor"],
)
def test_a_replay_has_the_bits_of_the_step_op_by_op(criterion, optimizer):
    """Also as beta changes, and of batches of another size between."""
    tensor = isinstance(criterion.get("beta"), torch.Tensor)
    made = [graph_step(optimizer, **copy.deepcopy(criterion)) for _ in range(2)]
    assert all(isinstance(step, GraphStep) for step in made)
    replayed, plain = made
    plain.warm_up = 10**9
    if tensor:
        for step in made:
            step.step.criterion.to(GPU)
    for i in range(30):
        index = torch.arange(i, i + (20 if i % 7 else 9), device=GPU)
        seeds = torch.tensor(i // 10, device=GPU), torch.tensor(50 + i // 10, device=GPU)
        outcomes = []
        for step in made:
            beta = min(1.0, i / 20)
            if tensor:
                step.step.criterion.beta.fill_(beta)
            else:
                step.step.criterion.beta = beta
            outcomes.append(step(index, *seeds).numbers)
        assert torch.equal(*outcomes)
    assert replayed.graph is not None
    assert plain.graph is None
    for a, b in zip(replayed.step.model.parameters(), plain.step.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DRY > 0, reason="a dry run: needs CUDA's run-time")
def test_a_replay_does_not_wait_for_the_gpu():
    for beta in (0.5, torch.tensor(0.5)):
        step = graph_step("adam", beta=beta)
        step.step.criterion.to(GPU)
        index, seeds = torch.arange(20, device=GPU), (torch.tensor(1, device=GPU), torch.tensor(2, device=GPU))
        for _ in range(5):
            step(index, *seeds)
        assert_returns_while_the_gpu_sleeps(lambda step=step, args=(index, *seeds): [step(*args) for _ in range(3)])


@pytest.mark.skipif(DRY > 0, reason="a dry run: needs CUDA's run-time")
@pytest.mark.parametrize("criterion", [{}, {"free_bits": 0.5}], ids=["direct", "with autograd"])
def test_a_graph_survives_those_of_torch_compile(criterion):
    """Which give back cuBLAS's workspaces, to which a captured product writes; and the end of other graphs."""

    def index(i):
        return torch.arange(i, i + 20, device=GPU)

    first, kept, plain = (graph_step("adam", **criterion) for _ in range(3))
    plain.warm_up = 10**9
    seeds = torch.tensor(1, device=GPU), torch.tensor(2, device=GPU)
    for i in range(5):
        for step in (first, kept, plain):
            step(index(i), *seeds)
    del first, step
    torch._dynamo.reset()
    weight = torch.randn(300, 300, device=GPU, requires_grad=True)
    compiled = torch.compile(lambda w: torch.tanh(w @ w @ w).sum(), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.autograd.grad(compiled(weight), weight)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    poison = [torch.full((2**k,), float("nan"), device=GPU) for k in range(4, 26)]
    third = graph_step("adam", **criterion)
    for i in range(5, 40):
        third(index(i), *seeds)
        assert torch.equal(kept(index(i), *seeds).numbers, plain(index(i), *seeds).numbers)
    assert all(t.isnan().all() for t in poison)
    for a, b in zip(kept.step.model.parameters(), plain.step.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
