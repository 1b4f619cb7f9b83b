"""The optimizers that a GPU has of its own: torch's numbers. Emulated here, and on a GPU where there is one."""

import math

import pytest
import torch
from conftest import DRY, HAS_CUDA, randn
from emulation.build import emulated_ops

from aevb.training import optimizers
from aevb.training.optimizers import _CapturableAdagrad, _GpuAdam

PLACES = ["emulated", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA and not DRY else [])]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(optimizers, "_adam_step", emulated_ops().adam_.default)
    monkeypatch.setattr(optimizers, "_is_float32_on_gpu", lambda t: t.dtype == torch.float32)
    return "cpu"


# Fewer than a vector, one more and less than a block, an empty one, and more tensors than a launch takes.
SIZES = [(3,), (500, 784), (1,), (2047,), (2048,), (2049,), (0,), (40, 20), *[(5,)] * 30]


def parameters(device, dtype=torch.float32):
    return [torch.nn.Parameter(randn(i, *size).to(device, dtype)) for i, size in enumerate(SIZES)]


def train(optimizer, weights, steps, scales=(1.0,)):
    for step in range(steps):
        for i, w in enumerate(weights):
            w.grad = (scales[i % len(scales)] * randn(1000 * step + i, *w.shape)).to(w)
        optimizer.step()


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("rate", ["a number", "a tensor"])
def test_adam_is_torchs_in_float64(rate, steps, device):
    weights, exact = parameters(device), parameters("cpu", torch.float64)
    lr = 1e-2 if rate == "a number" else torch.tensor(1e-2, device=device)
    scales = (1.0, 1e-4, 1e4, 1e-12, 1e12)
    train(_GpuAdam(weights, lr=lr, fused=True, betas=(0.85, 0.995)), weights, steps, scales)
    train(torch.optim.Adam(exact, lr=1e-2, betas=(0.85, 0.995)), exact, steps, scales)
    for found, expected in zip(weights, exact, strict=True):
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=2e-6, atol=2e-6)


def test_adams_state_is_torchs(device):
    """So that a checkpoint goes from one to the other."""
    weights, twins = parameters(device), parameters("cpu")
    ours, theirs = _GpuAdam(weights, lr=1e-2, fused=True), torch.optim.Adam(twins, lr=1e-2)
    train(ours, weights, 5)
    train(theirs, twins, 5)
    for found, expected in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-6)


def test_many_steps_and_large_and_infinite_gradients(device):
    weights = [torch.nn.Parameter(torch.ones(9, device=device))]
    optimizer = _GpuAdam(weights, lr=1e-3, fused=True)
    gradient = torch.tensor([0.0, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e18, math.inf, math.nan], device=device)
    for t in (1, 2, 5, 10**6):
        weights[0].data.fill_(1.0)
        optimizer.state.clear()
        weights[0].grad = gradient.clone()
        optimizer.step()
        if t > 1:  # as if there had been so many steps with this gradient
            state = optimizer.state[weights[0]]
            state["step"].fill_(t - 1)
            state["exp_avg"].copy_(gradient * (1 - 0.9 ** (t - 1)))
            state["exp_avg_sq"].copy_(gradient**2 * (1 - 0.999 ** (t - 1)))
            weights[0].data.fill_(1.0)
            optimizer.step()
        moved = (1 - weights[0].detach()).cpu().double()
        g = gradient.double().cpu()
        expected = 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(moved[:7], expected[:7], rtol=1e-3, atol=2e-7)
        assert moved[8].isnan()


def test_what_the_kernel_does_not_know_goes_to_torch(device):
    for options in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}):
        weights, twins = parameters(device), parameters("cpu", torch.float64)
        train(_GpuAdam(weights, lr=1e-2, **options), weights, 4)
        train(torch.optim.Adam(twins, lr=1e-2, **options), twins, 4)
        for found, expected in zip(weights, twins, strict=True):
            torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_gets_a_sentence(device):
    adam = optimizers._adam_step
    w = torch.zeros(4, device=device)
    step = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match="expected as many of each"):
        adam([w], [w, w], [w], [w], [step], None, 0.1, 0.9, 0.999, 1e-8)
    for wrong in (w.double(), w[:2], torch.zeros(4, 2, device=device)[:, 0]):
        with pytest.raises(RuntimeError, match="expected contiguous float32"):
            adam([w], [wrong], [w], [w], [step], None, 0.1, 0.9, 0.999, 1e-8)


def test_adagrad_is_torchs(device):
    weights, twins = parameters(device), parameters("cpu", torch.float64)
    train(_CapturableAdagrad(weights, lr=0.1), weights, 20)
    train(torch.optim.Adagrad(twins, lr=0.1), twins, 20)
    for found, expected in zip(weights, twins, strict=True):
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
