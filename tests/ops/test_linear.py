"""`linear_bernoulli_log_prob`: the numbers of the unfused op, for any upstream gradient, and no logits in memory."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import close_by_magnitude, rand, randn
from torch.utils._python_dispatch import TorchDispatchMode

import aevb
from aevb import reference
from aevb.ops import chunking as chunks
from aevb.ops import fused_linear as linear_likelihood
from aevb.ops.fused_linear import LinearLogits
from aevb.ops.matmul import product

SIZES = [  # L (0: no samples), B, H, D
    (0, 1, 1, 1),
    (0, 41, 7, 33),
    (3, 41, 20, 401),
    (41, 3, 5, 33),
    (2, 401, 3, 41),
    (1, 41, 7, 784),
]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    """Chunks as they are, and so small that every size above has several: parts of a sample, and some samples."""
    if request.param == "many chunks":
        monkeypatch.setattr(chunks, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(chunks, "FEWEST_ROWS", {"cpu": 10, "cuda": 10})


def inputs(L, B, H, D, device="cpu", dtype=torch.float32):
    leading = (L, B) if L else (B,)
    tensors = randn(1, *leading, H), randn(2, D, H) / H**0.5, randn(3, D)
    return tuple(t.to(device, dtype).requires_grad_() for t in tensors), rand(4, B, D).to(device)


def double(tensors):
    return tuple(t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors)


def magnitudes(tensors, x, grad):
    """Of the terms of log p and of the three gradients: sums of absolute values, the logits' own terms included."""
    h, weight, bias = (t.detach().abs() for t in tensors)
    logits = F.linear(h, weight, bias)
    grad = grad.abs().unsqueeze(-1)
    slope = grad * (
        1 + logits
    )  # a logit is off by its own terms' rounding, and its sigmoid by at most a quarter of that
    flat = slope.flatten(0, -2)
    return (
        (F.softplus(logits) + logits).sum(-1),
        slope @ weight,
        flat.T @ h.flatten(0, -2),
        flat.sum(0),
    )


def check(actual, tensors, x, grad, reduction="none", rtol=1e-6):
    """`actual` is the value and the three gradients."""
    exact = double(tensors)
    value = reference.linear_bernoulli_log_prob(*exact, x.cpu().double())
    reduced = value if reduction == "none" else getattr(value, reduction)()
    rows = grad if reduction == "none" else grad / (value.numel() if reduction == "mean" else 1)
    terms = magnitudes(exact, x.cpu().double(), rows.cpu().double().expand(value.shape))
    if reduction != "none":
        terms = getattr(terms[0], reduction)(), *terms[1:]
    expected = reduced, *torch.autograd.grad(reduced, exact, grad.cpu().double())
    for a, e, m in zip(actual, expected, terms, strict=True):
        close_by_magnitude(a, e, m, rtol)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients(size, reduction, device, chunked):
    tensors, x = inputs(*size, device)
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    grad = 3 * randn(5, *value.shape).to(device)
    check((value, *torch.autograd.grad(value, tensors, grad)), tensors, x, grad, reduction)


@pytest.mark.parametrize("kind", ["soft", "bool", "uint8"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_targets(kind, reduction, device, chunked):
    tensors, u = inputs(3, 41, 20, 33, device)
    x = {"soft": u, "bool": u < 0.4, "uint8": (255 * u).to(torch.uint8)}[kind]
    x_scale = 1 / 255 if kind == "uint8" else None
    value = aevb.linear_bernoulli_log_prob(*tensors, x, x_scale, reduction=reduction)
    unfused = aevb.bernoulli_log_prob(F.linear(*tensors), x, x_scale)
    unfused = unfused if reduction == "none" else unfused.mean()
    grad = 3 * randn(5, *value.shape).to(device)
    for a, b in zip(
        (value, *torch.autograd.grad(value, tensors, grad)),
        (unfused, *torch.autograd.grad(unfused, tensors, grad)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_half_precision(dtype, reduction, device, chunked):
    """Products are of the dtype, the likelihood and the sums over chunks float32: as exact as the unfused op."""
    tensors, x = inputs(3, 41, 20, 33, device, dtype)
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    assert value.dtype == torch.float32
    exact = double(tensors)
    expected = reference.linear_bernoulli_log_prob(*exact, x.cpu().double())
    unfused = aevb.bernoulli_log_prob(F.linear(*tensors), x)
    if reduction == "sum":
        expected, unfused = expected.sum(), unfused.sum()
    grad = 3 * randn(5, *value.shape).to(device)
    found, plain = ([v, *torch.autograd.grad(v, tensors, grad)] for v in (value, unfused))
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.cpu().double())]
    for a, b, e in zip(found, plain, wanted, strict=True):
        assert a.dtype == b.dtype
        error, unfused_error = ((t.cpu().double() - e).norm() for t in (a, b))
        assert error <= 2 * unfused_error + 1e-3 * e.norm()


def test_a_loss_scale_comes_in_time(device):
    """float16 gradients of a mean over many rows are far below its smallest number, and are scaled before rounding."""
    tensors, x = inputs(3, 4001, 20, 33, device, torch.float16)
    grads = torch.autograd.grad(65536 * aevb.linear_bernoulli_log_prob(*tensors, x, reduction="mean"), tensors)
    exact = double(tensors)
    value = reference.linear_bernoulli_log_prob(*exact, x.cpu().double()).mean()
    for a, e in zip(grads, torch.autograd.grad(65536 * value, exact), strict=True):
        assert (a.cpu().double() - e).norm() < 5e-3 * e.norm()


def test_no_bias(device):
    (h, weight, _), x = inputs(3, 41, 20, 33, device)
    value = aevb.linear_bernoulli_log_prob(h, weight, None, x)
    torch.testing.assert_close(value, aevb.bernoulli_log_prob(F.linear(h, weight), x), rtol=1e-5, atol=1e-5)
    assert all(g is not None for g in torch.autograd.grad(value.sum(), (h, weight)))


@pytest.mark.parametrize("size", [(0, 0, 5, 7), (3, 0, 5, 7), (0, 4, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_nothing(size, reduction, device):
    tensors, x = inputs(*size, device)
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    assert value.sum() == 0
    for g, t in zip(torch.autograd.grad(value.sum(), tensors), tensors, strict=True):
        assert g.shape == t.shape
        assert not g.any()


def test_any_layout(device, chunked):
    """Leading dimensions of any number, h and weight of any strides."""
    (h, weight, bias), x = inputs(6, 10, 20, 33, device)
    expected = aevb.linear_bernoulli_log_prob(h, weight, bias, x)
    deep = aevb.linear_bernoulli_log_prob(h.view(2, 3, 2, 5, 20), weight, bias, x.view(2, 5, 33))
    strided = aevb.linear_bernoulli_log_prob(
        h.detach().transpose(0, 2).contiguous().transpose(0, 2), weight.T.contiguous().T, bias, x.T.contiguous().T
    )
    torch.testing.assert_close(deep, expected.view(2, 3, 2, 5), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(strided, expected, rtol=1e-6, atol=1e-5)


# ---- gradients, and who asks for them -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2), (0, 2)], ids=str)
def test_what_is_frozen_costs_nothing(reduction, frozen, monkeypatch, chunked):
    tensors, x = inputs(3, 41, 20, 33)
    for i in frozen:
        tensors[i].requires_grad_(False)
    products = []  # "logits" are those with a bias

    def counted(name, function):
        def call(*args, **options):
            products.append("logits" if name == "product" and len(args) == 3 else "gradient")
            return function(*args, **options)

        return call

    for module, name in (
        (linear_likelihood, "product"),
        *((chunks, n) for n in ("product", "rows_product")),
    ):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    rows = chunks.rows_of_chunk(tensors[1])
    number, forward_number = (len(list(chunks.chunks_of(3, 41, r))) for r in (rows, 2 * rows))
    if reduction == "mean":
        forward_number = number
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    assert products.count("logits") == forward_number
    if len(frozen) == 3:
        assert not value.requires_grad
        assert len(products) == forward_number
        return
    value.sum().backward()
    # The backward pass computes the logits of several chunks again.
    assert products.count("logits") == forward_number + (number if reduction == "none" and number > 1 else 0)
    assert products.count("gradient") == number * ((0 not in frozen) + (1 not in frozen))
    for i, t in enumerate(tensors):
        assert (t.grad is None) == (i in frozen)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_graph_may_be_used_again(reduction, chunked):
    tensors, x = inputs(3, 41, 20, 33)
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    grad = randn(6, *value.shape)
    first = torch.autograd.grad(value, tensors, 2.5 * grad, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # a caller's own tensors by now
    again = torch.autograd.grad(value, tensors, 2.5 * grad, retain_graph=True)
    other = torch.autograd.grad(value, tensors, -grad)
    assert all(map(torch.equal, again, kept))
    torch.testing.assert_close(other, tuple(-g / 2.5 for g in kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, tensors, grad)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_add_up(reduction):
    """One h in two losses, and backward() twice into the same .grad."""
    tensors, x = inputs(3, 41, 20, 33)

    def loss():
        first = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction).sum()
        return first + 2 * aevb.linear_bernoulli_log_prob(*tensors, 1 - x, reduction=reduction).sum()

    once = torch.autograd.grad(loss(), tensors)
    loss().backward()
    loss().backward()
    for t, g in zip(tensors, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * g)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives(reduction):
    tensors, x = inputs(3, 5, 4, 7)

    def penalty(f, tensors, x):
        value = f(*tensors, x)
        value = (
            getattr(value, reduction)() if f is reference.linear_bernoulli_log_prob and reduction != "none" else value
        )
        first = torch.autograd.grad(value.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    found = penalty(lambda *a: aevb.linear_bernoulli_log_prob(*a, reduction=reduction), tensors, x)
    expected = penalty(reference.linear_bernoulli_log_prob, double(tensors), x.double())
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_of_soft_targets(reduction):
    tensors, x = inputs(3, 5, 4, 7)
    x.requires_grad_()
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
    expected = reference.linear_bernoulli_log_prob(*tensors, x)
    grads = (torch.autograd.grad(v.mean(), (x, *tensors)) for v in (value, expected))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(reduction, device):
    tensors, x = inputs(3, 41, 20, 33, device)
    with torch.autocast(device, torch.bfloat16):
        value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
        unfused = aevb.bernoulli_log_prob(F.linear(*tensors), x)
    unfused = unfused if reduction == "none" else unfused.mean()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, unfused, rtol=1e-3, atol=0)
    grads = (torch.autograd.grad(v.mean(), tensors) for v in (value, unfused))
    for a, e in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * float(e.abs().max()))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile_and_func(reduction):
    tensors, x = inputs(3, 41, 20, 33)

    def loss(h, weight, bias):
        return aevb.linear_bernoulli_log_prob(h, weight, bias, x, reduction=reduction).square().mean()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    functional = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    per_datapoint = torch.func.vmap(
        lambda h, x: aevb.linear_bernoulli_log_prob(h, *tensors[1:], x, reduction=reduction), in_dims=(1, 0)
    )(tensors[0], x)
    for found in (compiled, functional):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))
    whole = aevb.linear_bernoulli_log_prob(*tensors, x)
    torch.testing.assert_close(per_datapoint, whole.T if reduction == "none" else whole.mean(0), rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    tensors, x = inputs(2, 5, 4, 7, device)
    torch.library.opcheck(
        torch.ops.aevb.linear_log_prob.default, (*tensors, x, None, None, None, "bernoulli_logits", 0.0, None, None)
    )


# ---- memory, bits, errors -------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple) else (found,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return found


@pytest.mark.parametrize("way", ["none", "mean", "iwae"])
def test_the_logits_are_never_in_memory(way):
    """Nothing is larger than h, its gradient, and a chunk."""
    tensors, x = inputs(20, 600, 50, 784)
    h = tensors[0]
    log_ratio = randn(7, 20, 600).requires_grad_()
    criterion = aevb.FusedELBO(estimator="iwae", num_samples=20)
    with Largest() as largest:
        if way == "iwae":
            value = criterion(LinearLogits(*tensors), x, kl=log_ratio)
        else:
            value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=way)
        value.backward(randn(8, *value.shape))
    logits = 20 * 600 * 784
    chunk = max(chunks.CHUNK_BYTES["cpu"] // 4, chunks.FEWEST_ROWS["cpu"] * 784)
    assert h.numel() <= largest.elements <= 2 * max(h.numel(), chunk) < logits / 3


def test_gradients_of_a_graph_that_is_kept_no_longer_are_not_copied():
    tensors, x = inputs(3, 41, 20, 33)
    value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction="mean")
    (saved,) = (t for t in value.grad_fn.saved_tensors[5:] if t is not None and t.shape == tensors[0].shape)
    where = saved.data_ptr()
    del saved
    gc.collect()
    grad_h, *_ = torch.autograd.grad(value, tensors, torch.tensor(2.5))
    assert grad_h.data_ptr() == where


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_same_bits_every_time(reduction, chunked):
    def run():
        tensors, x = inputs(5, 41, 20, 33)
        value = aevb.linear_bernoulli_log_prob(*tensors, x, reduction=reduction)
        return value, *torch.autograd.grad(value.sum(), tensors)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"h": torch.zeros(3, 5, 6)}, r"h has shape \(3, 5, 6\), weight \(7, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias \(4,\)"),
        ({"x": torch.zeros(5, 6)}, r"x \(5, 6\); expected x \(\*batch, D\)"),
        ({"x": torch.zeros(3, 7)}, r"x \(3, 7\); expected"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; expected one of 'none'"),
        ({"x": torch.full((5, 7), 1.5), "validate_args": True}, r"x\[0, 0\] is 1.5"),
        ({"x": torch.zeros(5, 7, dtype=torch.uint8)}, "x_scale"),
    ],
    ids=str,
)
def test_errors(change, match):
    args = {"h": torch.zeros(3, 5, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7), "x": torch.zeros(5, 7)}
    with pytest.raises((ValueError, RuntimeError), match=match):
        aevb.linear_bernoulli_log_prob(**{**args, **change})


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "tanh", "relu"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (41, 7, 33), (401, 64, 3), (0, 3, 4), (3, 0, 4)], ids=str)
def test_products(activation, transposed, size):
    n, m, k = size
    a, b, bias = randn(1, n, k), randn(2, m, k), randn(3, m)
    if transposed:
        a, b = (t.T.contiguous().T for t in (a, b))
    act = {"none": lambda t: t, "tanh": torch.tanh, "relu": torch.relu}[activation]
    expected = act(F.linear(a.double(), b.double(), bias.double())).float()
    torch.testing.assert_close(product(a, b, bias, activation), expected, rtol=1e-5, atol=1e-5)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(product(a, b, bias, activation), expected, rtol=1e-5, atol=1e-5)


def test_linear_logits_materialize():
    (h, weight, bias), _ = inputs(3, 41, 20, 33)
    logits = LinearLogits(h, weight, bias)
    torch.testing.assert_close(logits.materialize(), F.linear(h, weight, bias))
    assert copy.deepcopy(LinearLogits(*(t.detach() for t in (h, weight, bias)))).h.shape == h.shape
