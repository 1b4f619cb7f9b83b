"""The kernels around a layer's products on a GPU: emulated here, and on a GPU where there is one."""

import functools

import pytest
import torch
from conftest import DRY, HAS_CUDA, rand, randn, same_bits
from emulation.build import emulated_ops

ops = torch.ops.aevb
PLACES = ["emulated", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA and not DRY else [])]


@pytest.fixture(params=PLACES)
def here(request):
    """The ops of a GPU, and what brings a tensor to it."""
    if request.param == "cuda":
        return ops, lambda t: t.cuda()
    return emulated_ops(), lambda t: t


def assert_same(found, expected):
    found, expected = (t if isinstance(t, tuple) else (t,) for t in (found, expected))
    assert [same_bits(f.cpu(), e) for f, e in zip(found, expected, strict=True)] == [True] * len(expected)


SIZES = [(1, 1), (7, 33), (64, 32), (65, 31), (100, 500), (513, 40), (700, 9), (1024, 100), (0, 5), (3, 0)]


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_bias_and_activation_have_the_cpus_bits(size, activation, here):
    device_ops, to = here
    t, grad, bias = 3 * randn(1, *size), randn(2, *size), randn(3, size[1])
    for b in (bias, None):
        out, found = t.clone(), to(t.clone())
        ops.bias_activation_(out, b, activation)
        device_ops.bias_activation_(found, None if b is None else to(b), activation)
        assert_same(found, out)
    expected = ops.activation_backward(out, grad, activation)
    assert_same(device_ops.activation_backward(to(out), to(grad), activation), expected)
    over, here_over = grad.clone(), to(grad.clone())
    expected = ops.activation_backward_(out, over, activation)
    assert_same(device_ops.activation_backward_(to(out), here_over, activation), expected)
    assert_same(here_over, over)


def test_a_gradient_whose_rows_lie_apart(here):
    device_ops, to = here
    out, wide = randn(1, 70, 33), randn(2, 70, 40)
    for activation in range(3):
        expected = ops.activation_backward(out, wide[:, :33].contiguous(), activation)
        assert_same(ops.activation_backward(out, wide[:, :33], activation), expected)
        assert_same(device_ops.activation_backward(to(out), to(wide)[:, :33], activation), expected)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (40, 500), (33, 784), (0, 3)])
def test_three_pieces_are_the_number(size, by_rows, here):
    device_ops, to = here
    x = randn(1, *size) * torch.exp(20 * randn(2, *size))
    if x.numel() > 20:
        x.view(-1)[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38])
    wide = torch.cat([to(x), to(x)], 1)[:, : size[1]]
    pieces = device_ops.split_bfloat16(to(x), "lmh", by_rows).cpu()
    assert_same(device_ops.split_bfloat16(wide, "lmh", by_rows), pieces)
    height, width = (-(-n // 8) * 8 for n in size)
    assert pieces.shape == ((3, height, width) if by_rows else (size[0], 3, width))
    assert pieces.dtype == torch.bfloat16
    pieces = pieces if by_rows else pieces.transpose(0, 1)
    assert not pieces[..., size[1] :].any()
    assert not pieces[:, size[0] :].any()
    pieces = pieces[:, : size[0], : size[1]]
    total = pieces.double().sum(0)
    finite = x.abs() < 3.38e38
    exact = finite & ((x == 0) | (x.abs() > 2.0**-109))  # below, the last piece is smaller than any bfloat16
    assert torch.equal(total[exact], x.double()[exact])
    assert ((total - x.double())[finite].abs() <= 2.0**-134).all()
    assert torch.equal(total[~finite & ~x.isnan()].float().isinf(), x[~finite & ~x.isnan()].abs() > 3.38e38)
    assert total[x.isnan()].isnan().all()
    low, middle, high = pieces
    again = device_ops.split_bfloat16(to(x), "hmhl", by_rows).cpu()
    again = (again if by_rows else again.transpose(0, 1))[:, : size[0], : size[1]]
    assert all(map(same_bits, again, (high, middle, high, low)))


def test_bytes_are_their_pieces(here):
    device_ops, to = here
    pixels = (256 * rand(1, 9, 33)).to(torch.uint8)
    for x in (pixels, pixels > 100):
        found = device_ops.split_bfloat16(to(x), "hhh", False).cpu()
        assert found.shape == (9, 3, 40)
        assert torch.equal(found[..., :33].double(), x.double().unsqueeze(1).expand(9, 3, 33))
        assert not found[..., 33:].any()


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(("count", "rows", "D"), [(1, 3, 5), (3, 100, 500), (7, 20, 33), (8, 64, 784), (2, 0, 4)])
def test_sums_of_pieces(count, rows, D, activation, here):
    device_ops, to = here
    bias = randn(2, D)
    layouts = randn(1, count, rows, D), randn(1, rows, count, D).transpose(0, 1), randn(1, count, rows, D + 3)[..., :D]
    for pieces in layouts:
        found = device_ops.add_pieces(to(pieces), 0.3, to(bias), activation).cpu().double()
        expected = 0.3 * pieces.double().sum(0) + bias
        expected = expected.tanh() if activation else expected
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    last_first = functools.reduce(torch.add, pieces.flip(0))
    assert_same(device_ops.add_pieces(to(pieces), 1.0, None, 0), last_first.contiguous())


@pytest.mark.parametrize(("R", "B"), [(1, 1), (100, 100), (5000, 1000), (4097, 4097)])
def test_the_terms_of_a_loss(R, B, here):
    device_ops, to = here
    log_prob, kl = -100 * rand(1, R), 20 * rand(2, B)
    for beta, weight in ((None, 0.7), (torch.tensor(0.4), 0.28)):
        found = device_ops.elbo_terms(to(log_prob), to(kl), None if beta is None else to(beta), 0.7)
        mean, mean_kl = log_prob.double().mean(), kl.double().mean()
        expected = torch.stack([weight * mean_kl - mean, mean_kl, (weight - 1) * mean_kl])
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_gets_a_sentence(here):
    device_ops, to = here
    x = to(randn(1, 4, 6))
    for call in (
        lambda: device_ops.split_bfloat16(x.double(), "hml", False),
        lambda: device_ops.split_bfloat16(x[0], "hml", False),
        lambda: device_ops.split_bfloat16(x, "hmx", False),
        lambda: device_ops.add_pieces(x, 1.0, None, 0),
        lambda: device_ops.add_pieces(x[None].transpose(1, 2), 1.0, None, 0),
        lambda: device_ops.add_pieces(x[None], 1.0, to(randn(1, 5)), 0),
        lambda: device_ops.add_pieces(x[None], 1.0, None, 7),
        lambda: device_ops.elbo_terms(x[0].double(), x[0], None, 1.0),
        lambda: device_ops.bias_activation_(x, None, 3),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_a_gradient_of_the_kl_that_is_one_number_is_read_where_it_is():
    """Whatever it is expanded from."""
    mu, logvar, grad_z = randn(1, 9, 6), randn(2, 9, 6), randn(3, 9, 6)
    for found_ops in (ops, emulated_ops()):
        grads = torch.tensor(0.3).expand(9)
        found = found_ops.sample_gaussian_backward(mu, logvar, torch.tensor(5), None, grad_z, grads)
        assert_same(found, ops.sample_gaussian_backward(mu, logvar, torch.tensor(5), None, grad_z, grads.contiguous()))
