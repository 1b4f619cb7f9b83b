"""Dtypes and shapes that kernels do not take, where their meaning is plain: they are computed, and not refused."""

import pytest
import torch
from conftest import rand, randn, same_bits

import aevb
from aevb import FusedELBO, reference
from aevb.ops.random import noise_of

B, D = 5, 33
LOGITS, X, MU, LOGVAR = randn(1, B, D), rand(2, B, D), randn(3, B, 4), randn(4, B, 4)
F64 = torch.float64
NOISE = noise_of(torch.tensor(1), (3, B, 4))  # of any dtype of mu


def gradients(function, *inputs):
    """The values, and the gradients of their sum by the floating inputs, and those gradients' dtypes."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    found = function(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad(sum(t.sum() for t in found), leaves)
    assert all(g.dtype == t.dtype for g, t in zip(grads, leaves, strict=True))
    return [*(t.detach() for t in found), *grads]


CALLS = {
    "gaussian_kl": (aevb.gaussian_kl, reference.gaussian_kl, (MU, LOGVAR)),
    "sample_gaussian": (
        lambda *given: aevb.sample_gaussian(*given, 3, seed=1),
        lambda *given: reference.sample_gaussian(*given, 3, eps=NOISE),
        (MU, LOGVAR),
    ),
    "sample_gaussian_log_ratio": (
        lambda *given: aevb.sample_gaussian_log_ratio(*given, 3, seed=1),
        lambda *given: reference.sample_gaussian_log_ratio(*given, 3, eps=NOISE),
        (MU, LOGVAR),
    ),
    "bernoulli_log_prob": (aevb.bernoulli_log_prob, reference.bernoulli_log_prob, (LOGITS, X)),
    "gaussian_log_prob": (aevb.gaussian_log_prob, reference.gaussian_log_prob, (LOGITS, X, LOGITS - 1)),
    "linear_log_prob": (
        lambda h, weight, x: aevb.linear_log_prob("bernoulli", h, weight, None, x),
        lambda h, weight, x: reference.linear_bernoulli_log_prob(h, weight, None, x),
        (MU, randn(5, D, 4), X),
    ),
    "FusedELBO": (FusedELBO(0.3), reference.FusedELBO(0.3), (LOGITS, X, MU, LOGVAR)),
}


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_computed_in_float64(name):
    call, twin, inputs = CALLS[name]
    wide = [t.double() for t in inputs]
    for found, expected in zip(gradients(call, *wide), gradients(twin, *wide), strict=True):
        assert found.dtype == F64
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_float64_in_graphs():
    call = torch.compile(FusedELBO(), backend="aot_eager", fullgraph=True)
    wide = [t.double() for t in (LOGITS, X, MU, LOGVAR)]
    assert torch.allclose(call(*wide), FusedELBO()(*wide), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, F64])
def test_targets(dtype):
    """Whole numbers are what they say, and a float64 target beside another dtype is rounded."""
    x = (3 * X).floor() if dtype != F64 else X
    for call in (
        lambda x: aevb.log_prob("exponential", LOGITS, x),
        lambda x: aevb.gaussian_log_prob(LOGITS, x, 0.3, 0.5),
        lambda x: aevb.linear_log_prob("exponential", MU, randn(5, D, 4), None, x),
        lambda x: FusedELBO(likelihood="exponential")(LOGITS, x, MU, LOGVAR),
        lambda x: FusedELBO(likelihood="gaussian", estimator="iwae", num_samples=1)(
            LOGITS.unsqueeze(0), x, kl=torch.ones(1, B)
        ),
        lambda x: aevb.VAE(D, 8, 4, likelihood="exponential", generator=torch.Generator().manual_seed(0)).log_prob(
            x, MU
        ),
    ):
        assert same_bits(call(x.to(dtype)).detach(), call(x.float()).detach())


@pytest.mark.parametrize(
    ("one", "other"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("name", ["gaussian_kl", "sample_gaussian", "sample_gaussian_log_ratio"])
def test_posteriors_of_two_dtypes(name, one, other):
    """They are computed in the dtype to which PyTorch promotes the two; each gets a gradient of its own."""
    call, _, _ = CALLS[name]
    found = gradients(call, MU.to(one), LOGVAR.to(other))
    both = torch.promote_types(one, other)
    expected = gradients(call, MU.to(one).to(both), LOGVAR.to(other).to(both))
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b.to(a.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_posterior_of_another_dtype_than_the_output(dtype):
    mu, logvar = MU.to(dtype), LOGVAR.to(dtype)
    loss = FusedELBO(0.3)(LOGITS, X, mu, logvar)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, FusedELBO(0.3)(LOGITS, X, mu.float(), logvar.float()), rtol=1e-6)
    kl = aevb.gaussian_kl(MU, LOGVAR).to(dtype)
    assert torch.allclose(FusedELBO()(LOGITS, X, kl=kl), FusedELBO()(LOGITS, X, kl=kl.float()))
    assert FusedELBO()(LOGITS.double(), X, MU, LOGVAR).dtype == F64


@pytest.mark.parametrize("shape", [(4,), (1, 4), (B, 1), (1,), ()])
@pytest.mark.parametrize("name", ["gaussian_kl", "sample_gaussian", "sample_gaussian_log_ratio"])
def test_posteriors_of_two_shapes(name, shape):
    call, _, _ = CALLS[name]
    logvar = randn(6, *shape)
    found = gradients(call, MU, logvar)
    expected = gradients(call, MU, logvar.expand(B, 4).contiguous())
    assert all(map(same_bits, found[:-1], expected[:-1]))
    assert torch.allclose(found[-1], expected[-1].sum_to_size(shape), rtol=1e-5)
    loss = FusedELBO()(LOGITS, X, MU, logvar)
    assert same_bits(loss, FusedELBO()(LOGITS, X, MU, logvar.expand(B, 4).contiguous()))


def test_a_second_parameter_of_float64():
    logvar = randn(7, B, D).double().requires_grad_()
    value = aevb.gaussian_log_prob(LOGITS, X, logvar)
    assert same_bits(value.detach(), aevb.gaussian_log_prob(LOGITS, X, logvar.detach().float()))
    assert torch.autograd.grad(value.sum(), logvar)[0].dtype == F64
