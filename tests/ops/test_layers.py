"""`linear`: a layer's values and gradients, for floats, bits and pixels, by every route."""

import pytest
import torch
from conftest import close_by_magnitude, rand, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import aevb
from aevb import reference
from aevb.ops import linear as layers
from aevb.ops import matmul as products

# B, D, H: odd ones; blocks and tiles of the sparse kernels, and one more; several sums of 512 rows; several ranges.
SIZES = [(1, 1, 1), (5, 7, 3), (41, 33, 20), (130, 129, 65), (100, 784, 500), (1100, 40, 9), (3, 1271, 130), (0, 4, 3)]
KINDS = ["float", "bool", "uint8", "sparse bool", "sparse uint8"]
ACTIVATIONS = ["none", "tanh", "relu"]


def pixels(kind, *size):
    """x and its x_scale."""
    u = rand(1, *size)
    if kind == "float":
        return u, None
    share = 0.1 if "sparse" in kind else 0.8
    if "bool" in kind:
        return u < share, None
    return torch.where(u < share, 1 + 254 * u / share, 0.0).to(torch.uint8), 1 / 255


def tensors(B, D, H, dtype=torch.float32):
    return (randn(2, H, D) / D**0.5).to(dtype).requires_grad_(), randn(3, H).to(dtype).requires_grad_()


def oracle(x, x_scale, weight, bias, activation, grad):
    """Values and gradients of x (scaled, in float64), weight and bias."""
    x = (x.double() if x_scale is None else x.double() * x_scale).requires_grad_()
    weight, bias = (t.detach().double().requires_grad_() for t in (weight, bias))
    out = reference.linear(x, weight, bias, activation)
    return out, *torch.autograd.grad(out, (x, weight, bias), grad.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, kind, activation):
    B, D, H = size
    x, x_scale = pixels(kind, B, D)
    x.requires_grad_(kind == "float")
    weight, bias = tensors(B, D, H)
    grad = 3 * randn(4, B, H)
    out = aevb.linear(x, weight, bias, activation, x_scale)
    wanted = (x, weight, bias) if kind == "float" else (weight, bias)
    found = [out, *torch.autograd.grad(out, wanted, grad)]
    expected_out, expected_x, *expected = oracle(x.detach(), x_scale, weight, bias, activation, grad)
    if kind == "float":
        expected = [expected_x, *expected]
    # The magnitudes of the terms: those of a sum before the activation, and of products with the gradient.
    scaled = x.detach().double().abs() * (x_scale or 1)
    w, b, g = (t.detach().double().abs() for t in (weight, bias, grad))
    before = scaled @ w.T + b
    steep = g * (1 + 2 * before) if activation == "tanh" else g  # its derivative is off by what its argument is
    magnitudes = [before + 1, *([steep @ w] if kind == "float" else []), steep.T @ scaled, steep.sum(0)]
    if activation == "relu":  # a rounding may put an argument near 0 on its other side
        near = (
            reference.linear(x.detach().double() * (x_scale or 1), weight.double(), bias.double()).abs() < 1e-4
        ).any()
        assert not near or B * H > 1000
        if near:
            return
    for a, e, m in zip(found, [expected_out, *expected], magnitudes, strict=True):
        close_by_magnitude(a, e, m, rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_strides_and_no_bias(kind):
    x, x_scale = pixels(kind, 6, 5, 40)
    weight, bias = tensors(30, 40, 7)
    whole = aevb.linear(x.view(30, 40), weight, bias, "tanh", x_scale)
    torch.testing.assert_close(aevb.linear(x, weight, bias, "tanh", x_scale), whole.view(6, 5, 7))
    wide = torch.cat([x, x], -1)[..., :40]
    torch.testing.assert_close(aevb.linear(wide, weight, bias, "tanh", x_scale), whole.view(6, 5, 7))
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(aevb.linear(turned, weight, bias, "tanh", x_scale), whole.view(6, 5, 7))
    expected = reference.linear(x, weight, None, "tanh", x_scale)
    torch.testing.assert_close(aevb.linear(x, weight, None, "tanh", x_scale), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aevb.linear(x[0, 0], weight, bias, "tanh", x_scale), whole[0], rtol=1e-5, atol=1e-6)
    column_major = weight.detach().t().contiguous().t().requires_grad_()
    grads = [
        torch.autograd.grad(aevb.linear(x, w, bias, "tanh", x_scale).square().sum(), (w, bias))
        for w in (weight, column_major)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    x, x_scale = pixels(kind, 4, 6)
    x = x.double() if kind == "float" else x
    weight, bias = tensors(4, 6, 3)

    def penalty(function):
        out = function(x.float() if kind == "float" else x, weight, bias, "tanh", x_scale)
        (slope,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (weight, bias))

    for a, e in zip(penalty(aevb.linear), penalty(reference.linear), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["float", "sparse bool", "sparse uint8"])
def test_compile_functorch_and_autocast(kind):
    x, x_scale = pixels(kind, 9, 12)
    weight, bias = tensors(9, 12, 5)

    def loss(weight, bias):
        return aevb.linear(x, weight, bias, "tanh", x_scale).square().sum()

    expected = torch.autograd.grad(loss(weight, bias), (weight, bias))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight, bias), (weight, bias))
    functional = torch.func.grad(loss, argnums=(0, 1))(weight, bias)
    for found in (compiled, functional):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e.detach(), rtol=1e-4, atol=1e-5)
    rows = torch.func.vmap(lambda row: aevb.linear(row, weight, bias, "tanh", x_scale))(x)
    torch.testing.assert_close(rows, aevb.linear(x, weight, bias, "tanh", x_scale), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = aevb.linear(x, weight, bias, "tanh", x_scale)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), rows, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["float", "sparse bool"])
def test_batched_gradients_fake_tensors_and_tracing(kind):
    B, D, H = 6, 9, 4
    x, x_scale = pixels(kind, B, D)
    weight, bias = tensors(B, D, H)
    grads = randn(5, 3, B, H)
    results = []
    for f in (aevb.linear, reference.linear):
        out = f(x, weight, bias, "tanh", x_scale)
        results.append(torch.autograd.grad(out, (weight, bias), grads, is_grads_batched=True))
    torch.testing.assert_close(*results)
    with FakeTensorMode() as mode:
        found = aevb.linear(*map(mode.from_tensor, (x, weight, bias)), "tanh", x_scale)
    assert found.shape == (B, H)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, w, b: aevb.linear(x, w, b, "relu", x_scale))
    found = traced(x, weight.detach(), bias.detach())(x, 2 * weight.detach(), bias.detach())
    torch.testing.assert_close(found, reference.linear(x, 2 * weight, bias, "relu", x_scale).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bias_that_is_a_view(activation, kind):
    B, D, H = 6, 9, 4
    x, x_scale = pixels(kind, B, D)
    weight, bias = tensors(B, D, 2 * H)
    found = aevb.linear(x, weight[::2], bias[::2], activation, x_scale)
    torch.testing.assert_close(found, reference.linear(x, weight[::2], bias[::2], activation, x_scale))


def test_an_infinite_gradient_stops_where_relu_is_0():
    out, grad = torch.tensor([[0.0, 2.0, float("nan")]]), torch.tensor([[float("inf"), float("-inf"), 3.0]])
    found, total = torch.ops.aevb.activation_backward(out, grad, 2)
    assert torch.equal(found, torch.ops.aten.threshold_backward(grad, out, 0))
    assert torch.equal(total, found[0])


def test_what_no_gradient_needs_may_be_written_over():
    weight, bias = tensors(6, 9, 4)
    for size in ((6, 9), (2, 3, 9)):
        found = aevb.linear(rand(1, *size), weight, bias).sigmoid_()
        (grad,) = torch.autograd.grad(found.sum(), weight)
        (expected,) = torch.autograd.grad(reference.linear(rand(1, *size), weight, bias).sigmoid().sum(), weight)
        torch.testing.assert_close(grad, expected)


def test_no_op_returns_its_argument():
    out, grad = randn(1, 4, 3), randn(2, 4, 3)
    found, total = torch.ops.aevb.activation_backward(out, grad, 0)
    assert found.shape == (0,)
    torch.testing.assert_close(total, grad.sum(0))


def test_forward_mode_says_what_to_use():
    x, weight = rand(0, 3, 4), randn(1, 2, 4)
    with (
        pytest.raises(NotImplementedError, match=r"aevb\.linear does not support forward-mode"),
        torch.autograd.forward_ad.dual_level(),
    ):
        aevb.linear(torch.autograd.forward_ad.make_dual(x, x).requires_grad_(), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_the_plain_way(dtype):
    x, (weight, bias) = rand(0, 5, 6).to(dtype), tensors(5, 6, 3, dtype)
    assert torch.equal(aevb.linear(x, weight, bias, "tanh"), reference.linear(x, weight, bias, "tanh"))
    bits = x > 0.8
    assert torch.equal(aevb.linear(bits, weight, bias, "relu"), reference.linear(bits, weight, bias, "relu"))


def test_few_bits_are_summed_and_many_multiplied(monkeypatch):
    seen = []
    real = layers.sparse_linear
    monkeypatch.setattr(layers, "sparse_linear", lambda *args: seen.append("sparse") or real(*args))
    weight, bias = tensors(200, 64, 8)
    for share, sparse in ((0.05, True), (0.3, True), (0.5, False), (1.0, False)):
        seen.clear()
        aevb.linear(rand(1, 200, 64) < share, weight, bias)
        assert bool(seen) == sparse
    aevb.linear(rand(1, 200, 64), weight, bias)
    assert not seen


def test_what_is_frozen_gets_no_gradient():
    x, weight, bias = rand(0, 5, 6), *tensors(5, 6, 3)
    aevb.linear(x.requires_grad_(), weight.detach(), bias, "tanh").sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert bias.grad is not None
    with torch.no_grad():
        assert not aevb.linear(x, weight, bias).requires_grad
    assert not aevb.linear(x.detach(), weight.detach(), bias.detach()).requires_grad


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; expected one of 'none', 'tanh', 'relu'"),
        ({"x": torch.zeros(5, 4, dtype=torch.uint8)}, "x is uint8 and x_scale is not given"),
        ({"x": torch.zeros(5, 3)}, r"x has shape \(5, 3\) and weight \(2, 4\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"bias": torch.zeros(3)}, "bias|size"),
        ({"bias": torch.zeros(3), "x": torch.zeros(5, 4, dtype=torch.bool)}, r"bias has shape \(3,\)"),
    ],
    ids=str,
)
def test_errors(change, match):
    args = {"x": torch.zeros(5, 4), "weight": torch.zeros(2, 4), "bias": torch.zeros(2), "activation": "tanh"}
    with pytest.raises((ValueError, RuntimeError), match=match):
        aevb.linear(**{**args, **change})


# ---- the routes of products -----------------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "onednn"])
def by(request, monkeypatch):
    monkeypatch.setenv("AEVB_PRODUCTS", request.param)
    products._onednn.cache_clear()
    yield request.param
    products._onednn.cache_clear()


def test_every_route_gives_the_same_numbers(by):
    assert products.route() == ("oneDNN" if by == "onednn" else "torch")
    x, (weight, bias), grad = rand(0, 300, 40), tensors(300, 40, 150), randn(5, 300, 150)
    x.requires_grad_()
    out = aevb.linear(x, weight, bias, "tanh")
    found = (out, *torch.autograd.grad(out, (x, weight, bias), grad))
    for a, e in zip(found, oracle(x.detach(), None, weight, bias, "tanh", grad), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
    total = torch.ones(40, 150)
    expected = 1 + x.detach().T @ grad
    torch.testing.assert_close(products.rows_product(x.detach(), grad, total), expected, rtol=1e-4, atol=1e-4)
    into = torch.empty(300, 40)
    found = products.product(grad, products.packed(weight.detach().t()), out=into)
    torch.testing.assert_close(found, grad @ weight.detach(), rtol=1e-4, atol=1e-4)
    assert (found.data_ptr() == into.data_ptr()) == (by == "torch")


def test_a_route_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("AEVB_PRODUCTS", "blas")
    products._onednn.cache_clear()
    with pytest.raises(ValueError, match="AEVB_PRODUCTS is 'blas'; expected 'torch' or 'onednn'"):
        products.route()
    products._onednn.cache_clear()


@pytest.mark.parametrize(
    ("amd", "capability", "onednn"), [(True, "AVX512", True), (True, "AVX2", False), (False, "AVX512", False)]
)
def test_the_rule(monkeypatch, amd, capability, onednn):
    monkeypatch.delenv("AEVB_PRODUCTS", raising=False)
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._prefers_onednn() == onednn
