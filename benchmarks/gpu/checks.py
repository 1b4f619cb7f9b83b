"""Holding a provider to the float64 reference, before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from .work import SAMPLING, Function, M, Work, differentiated, outputs_of

BLOCK = 4 * M  # elements compared at once, so that float64 takes little memory


def check(work: Work, function: Function, inputs: list[Tensor], upstream: list[Tensor]) -> None:
    """Raises AssertionError unless a provider's values and gradients are the reference's, in float64, on its noise."""
    outputs = outputs_of(function, inputs)
    grads = torch.autograd.grad(outputs, differentiated(inputs), upstream)
    compare(work, inputs, upstream, [o.detach() for o in outputs], list(grads))


def compare(
    work: Work, inputs: list[Tensor], upstream: list[Tensor], outputs: list[Tensor], grads: list[Tensor]
) -> None:
    whole = work.op == "FusedELBO"  # one number for all rows
    step = max(1, BLOCK // work.width)
    tolerance = 1e-5 if work.dtype == "float32" else 0.05  # peers compute in bfloat16
    total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for first in range(0, work.rows, step):
        part = slice(first, first + step)
        ins = [t.detach()[part].double() if t.is_floating_point() else t[part] for t in inputs]
        ins = [t.requires_grad_(i.requires_grad) for t, i in zip(ins, inputs, strict=True)]
        eps = recovered_noise(ins, outputs[0][part], tolerance) if work.op in SAMPLING else None
        expected = work.reference(ins, eps)
        ups = [g.double() if whole else g[part].double() for g in upstream]
        expected_grads = torch.autograd.grad(expected, differentiated(ins), ups)
        for found, wanted in zip(grads, expected_grads, strict=True):
            assert_close(found[part], wanted, tolerance)
        if whole:
            total += expected[0].detach()
        else:
            for found, wanted in zip(outputs, expected, strict=True):
                assert_close(found[part], wanted.detach(), tolerance)
    if whole:
        assert_close(outputs[0], total, tolerance)


def check_bare(work: Work, inputs: list[Tensor], seed: Tensor, upstream: list[Tensor]) -> None:
    """The bare ops."""
    with torch.no_grad():
        found = {direction: call() for direction, call in work.bare(inputs, seed, upstream).items()}
        if work.op == "normal":
            return check_normal(found["forward"][: 16 * M].double())
    outputs, grads = ([*t] if isinstance(t, tuple) else [t] for t in (found["forward"], found["backward"]))
    grads = [g for g in grads if g.numel()]  # those that were not asked for are empty
    compare(work, inputs, upstream, outputs, grads)
    if "forward with gradient" in found:
        loss, grad = found["forward with gradient"]
        compare(work, inputs, upstream, [loss], [grad, *grads[1:]])


def recovered_noise(inputs: list[Tensor], z: Tensor, tolerance: float) -> Tensor:
    """The noise that a sample was made with; it must be standard normal."""
    mu, logvar = (t.detach() for t in inputs)
    eps = (z.double() - mu) * torch.exp(-0.5 * logvar)
    check_normal(eps, tolerance)
    return eps


def check_normal(eps: Tensor, tolerance: float = 0.0) -> None:
    n = eps.numel()
    assert abs(eps.mean().item()) < 6 / n**0.5 + 0.1 * tolerance, "the noise does not have mean 0"
    assert abs(eps.var().item() - 1) < 6 * (2 / n) ** 0.5 + tolerance, "the noise does not have variance 1"


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    scale = wanted.abs().max() if wanted.numel() else wanted.new_zeros(())
    allowed = tolerance * (wanted.abs() + 0.3 * scale)
    excess = (found.double() - wanted).abs() - allowed
    assert not bool((~(excess <= 0)).any()), f"off by {(found.double() - wanted).abs().max().item():.3g} of {scale:.3g}"
