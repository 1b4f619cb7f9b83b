"""Gradients that the forward pass takes on a CPU: the backward kernel's bits, whatever flows back."""

import pytest
import torch
from conftest import DTYPES, rand, randn, same_bits
from emulation.build import emulated_control, emulated_ops
from kernel_cases import gradients_over, reduced_losses

import aevb

ops = torch.ops.aevb
UPSTREAM = [1.0, 0.3, -1024.0, 0.0]


def loss_call(kind, reduction, dtype):
    """Inputs, the loss of them, and the backward kernel's gradients for an upstream gradient."""
    logits, x = (4 * randn(1, 9, 41)).to(dtype).requires_grad_(), rand(2, 9, 41)
    code = aevb.checks.choices.REDUCTIONS[reduction]
    beta = torch.tensor(0.7)
    criterion = aevb.FusedELBO(beta, reduction)
    options = (beta, 1.0, code, "bernoulli_logits", None)
    if kind == "mu, logvar":
        latents = tuple(randn(seed, 9, 6).to(dtype).requires_grad_() for seed in (3, 4))
        given: dict = {"mu": latents[0], "logvar": latents[1]}
        of_posterior = latents
    else:
        latents = (rand(3, 9).requires_grad_(),)
        given = {"kl": latents[0]}
        of_posterior = (*latents, None)
    inputs = (logits, *latents)

    def loss():
        return criterion(logits, x, **given)

    def kernel(grad):
        found = ops.negative_elbo_backward(logits, x, *of_posterior, *options, grad, 7)
        return found[: len(inputs)]

    return inputs, loss, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mu, logvar", "kl"])
def test_loss_has_the_backward_kernels_bits(kind, reduction, dtype):
    inputs, loss, kernel = loss_call(kind, reduction, dtype)
    for upstream in UPSTREAM:
        found = torch.autograd.grad(loss(), inputs, torch.tensor(upstream))
        assert all(map(same_bits, found, kernel(torch.tensor(upstream))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 1), (9, 41), (4, 2, 1271), (2, 33_000)])
def test_log_prob_has_the_backward_kernels_bits(size, dtype):
    logits, x = (4 * randn(1, *size)).to(dtype).requires_grad_(), rand(2, *size)
    upstream = 3 * randn(3, *size[:-1])
    value = aevb.bernoulli_log_prob(logits, x)
    assert same_bits(value, ops.log_prob_forward(logits, x, None, None, None, "bernoulli_logits", 0.0, None))
    (found,) = torch.autograd.grad(value, logits, upstream)
    assert same_bits(
        found, ops.log_prob_backward(logits, x, None, None, None, "bernoulli_logits", 0.0, None, upstream, 1)[0]
    )


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_a_graph_that_is_kept_gives_its_gradients_again(upstream):
    """Also where somebody has written over those that it gave before."""
    for kind in ("mu, logvar", "kl"):
        inputs, loss, kernel = loss_call(kind, "mean", torch.float32)
        value = loss()
        for keep in (True, True, False):
            found = torch.autograd.grad(value, inputs, torch.tensor(upstream), retain_graph=keep)
            assert all(map(same_bits, found, kernel(torch.tensor(upstream))))
            for gradient in found:
                gradient.fill_(7)
    logits, x = randn(1, 9, 41).requires_grad_(), rand(2, 9, 41)
    value = aevb.bernoulli_log_prob(logits, x)
    first = torch.autograd.grad(value, logits, torch.full((9,), upstream), retain_graph=True)[0]
    expected = first.clone()
    first.fill_(7)
    assert same_bits(torch.autograd.grad(value, logits, torch.full((9,), upstream))[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logvar", [None, "constant", "learned"])
@pytest.mark.parametrize("size", [(9, 41), (4, 2, 1271), (2, 33_000)])
def test_gaussian_has_the_backward_kernels_bits(size, logvar, dtype):
    mean, x = randn(1, *size).to(dtype).requires_grad_(), rand(2, *size)
    v = None if logvar is None else randn(3, *size).to(dtype).requires_grad_(logvar == "learned")
    inputs = (mean, v) if logvar == "learned" else (mean,)
    for sigmoid in (False, True):
        upstream = 3 * randn(4, *size[:-1])
        value = aevb.gaussian_log_prob(mean, x, -0.7 if v is None else v, sigmoid=sigmoid)
        kind = f"gaussian{'_sigmoid' if sigmoid else ''}{'_fixed' if v is None else ''}"
        args = (mean, x, v, None, None, kind, -0.7, None)
        expected = ops.log_prob_backward(*args, upstream, 3 if logvar == "learned" else 1)
        assert same_bits(value, ops.log_prob_forward(*args))
        for keep in (True, True, False):
            found = torch.autograd.grad(value, inputs, upstream, retain_graph=keep)
            assert all(map(same_bits, found, expected))
            for gradient in found:
                gradient.fill_(7)


def test_in_place_writes_the_gradient_over_the_logits_and_refuses_others():
    logits, x = 4 * randn(1, 9, 41), rand(2, 9, 41)
    expected = ops.log_prob_and_grad(logits, x, None, None, None, "bernoulli_logits", 0.0, None, 0.3, 1)
    over = logits.clone()
    value = ops.log_prob_and_grad_(over, x, None, None, "bernoulli_logits", 0.0, None, 0.3)
    assert same_bits(value, expected[0])
    assert same_bits(over, expected[1])
    with pytest.raises(RuntimeError, match="not contiguous"):
        ops.log_prob_and_grad_(randn(1, 41, 9).t(), x, None, None, "bernoulli_logits", 0.0, None, 1.0)


@pytest.mark.parametrize("where", ["cpu", "emulated", "emulated, a small GPU"])
def test_over_the_gradient_for_1_goes_that_of_another(where):
    """As on a GPU, where the kernel reads the upstream gradient."""
    emulated = where != "cpu"
    found = emulated_ops() if emulated else ops
    wrong = []
    with emulated_control().multiprocessors(1 if "small" in where else 132):
        for case in reduced_losses():
            expected = getattr(ops, case.op).default(*case.args)
            if not all(map(same_bits, gradients_over(case, found), expected)):
                wrong.append(str(case))
    assert wrong == []


def test_what_is_written_over_must_be_the_gradient_of_a_reduced_loss():
    case = next(reduced_losses())
    *arguments, grad, _ = case.args
    for wrong in (torch.zeros(3), torch.zeros_like(case.args[0]).double(), torch.zeros(2, 2, 2)):
        with pytest.raises(RuntimeError, match="recon_for_1 has shape"):
            ops.negative_elbo_backward_(*arguments, grad, wrong)


def test_it_is_taken_only_where_somebody_may_ask_for_it():
    """Not without grad mode, and not where the logits need no gradient."""
    logits, x, mu, logvar = randn(1, 5, 7), rand(2, 5, 7), randn(3, 5, 2), randn(4, 5, 2)
    with torch.no_grad():
        assert aevb.FusedELBO()(logits.requires_grad_(), x, mu, logvar).grad_fn is None
    loss = aevb.FusedELBO()(logits.detach(), x, mu.requires_grad_(), logvar)
    assert len(loss.grad_fn.saved_tensors) == 5
    assert len(aevb.FusedELBO()(logits, x, mu, logvar).grad_fn.saved_tensors) == 6
    assert len(aevb.FusedELBO(reduction="none")(logits, x, mu, logvar).grad_fn.saved_tensors) == 5
