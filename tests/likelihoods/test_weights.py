"""Masks, weights and offsets of log p(x|z), weights of datapoints, and the terms of the loss, of every likelihood."""

import pytest
import torch
from conftest import DEVICES, rand, randn, same_bits
from likelihood_cases import FAMILIES, as_recon, data, drawn, every

import aevb
from aevb import FusedELBO, reference
from aevb.checks.choices import ESTIMATORS
from aevb.likelihoods import LinearOutput

D = 83  # whole vectors of lanes, and a rest


def mask_of(*shape):
    return rand(21, *shape) < 0.6


WEIGHTS = {
    "bool": lambda *shape: mask_of(*shape),
    "uint8": lambda *shape: torch.where(mask_of(*shape), 3, 0).to(torch.uint8),
    "float32": lambda *shape: torch.where(mask_of(*shape), 2 * rand(22, *shape), 0.0),
    "bfloat16": lambda *shape: torch.where(mask_of(*shape), 2 * rand(22, *shape), 0.0).bfloat16(),
}
weights = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


def with_nan(family, weight, x, params):
    """x and parameters with NaN where an element takes no part."""
    out = weight == 0
    return x.masked_fill(out, torch.nan), [p.masked_fill(out, torch.nan) for p in params]


def oracle(family, params, x, weight, offset=None):
    """log p(x|z) in float64: each element's, weighed, without those that take no part; and its gradients."""
    wide = [p.detach().double().requires_grad_() for p in params]
    shift = None if offset is None else offset.detach().double().requires_grad_()
    first = wide[0] if shift is None else wide[0] + shift.unsqueeze(-1)
    elements = family.element_log_prob((first, *wide[1:]), x.double())
    w = weight.double() if weight.is_floating_point() else (weight != 0).double()
    return (elements * w).sum(-1), wide, shift


@pytest.mark.parametrize("device", DEVICES)
@weights
@every
def test_values_and_gradients(family, weight, device):
    """Of samples: NaN in what takes no part harms neither, and gets a gradient of 0."""
    params, x, w, offset = drawn(family, 3, 5, D), data(family, 5, D), weight(5, D), 0.1 * randn(3, 5)
    offset = None if getattr(family, "from_probs", False) else offset
    expected, wide, shift = oracle(family, params, x, w, offset)
    x, params = with_nan(family, w, x, params)
    leaves = [p.to(device).requires_grad_() for p in params]
    own_offset = None if offset is None else offset.to(device).requires_grad_()
    value = aevb.log_prob(family, as_recon(leaves), x.to(device), weight=w.to(device), offset=own_offset)
    assert value.dtype == torch.float32
    assert ((value.cpu().double() - expected.detach()).abs() <= 2e-6 * (expected.detach().abs() + D)).all()
    upstream = randn(23, 3, 5)
    inputs, wanted = (leaves, wide) if offset is None else ([*leaves, own_offset], [*wide, shift])
    found = torch.autograd.grad(value, inputs, upstream.to(device))
    for f, e in zip(found, torch.autograd.grad(expected, wanted, upstream.double()), strict=True):
        assert ((f.cpu().double() - e).abs() <= 3e-6 * (e.abs() + e.abs().mean())).all()
    for gradient in found[: len(leaves)]:
        assert (gradient.cpu().masked_select(w == 0) == 0).all()


def test_offset_of_each_datapoint():
    """Samples share it, and its gradient is the sum over them."""
    logits, x, offset = randn(1, 3, 5, D).requires_grad_(), rand(2, 5, D), randn(3, 5).requires_grad_()
    found = torch.autograd.grad(aevb.bernoulli_log_prob(logits, x, offset=offset).sum(), (logits, offset))
    plain = torch.autograd.grad(aevb.bernoulli_log_prob(logits + offset.unsqueeze(-1), x).sum(), (logits, offset))
    assert same_bits(found[0], plain[0])
    assert torch.allclose(found[1], plain[1], rtol=1e-5, atol=1e-5)


@every
def test_an_all_true_mask_has_the_bits_of_none(family):
    params, x = [p.requires_grad_() for p in drawn(family, 3, 5, 784)], data(family, 5, 784)
    results = []
    for mask in (None, torch.ones(5, 784, dtype=torch.bool), torch.full((784,), 7, dtype=torch.uint8)):
        value = aevb.log_prob(family, as_recon(params), x, weight=mask)
        results.append((value.detach(), *torch.autograd.grad(value, params, randn(24, 3, 5))))
    for found in results[1:]:
        assert all(map(same_bits, found, results[0]))


@weights
@every
def test_layouts_and_shapes(family, weight):
    """A weight that broadcasts, one for all rows, and one in other strides are the weight written out."""
    params, x = drawn(family, 3, 5, D), data(family, 5, D)

    def found(w):
        return aevb.log_prob(family, as_recon(params), x, weight=w)

    for shape in ((D,), (1, D), (5, 1), ()):
        w = weight(*shape) if shape else weight(1)[0]
        assert same_bits(found(w), found(w.expand(5, D).contiguous()))
    w = weight(5, D)
    assert same_bits(found(w.t().contiguous().t()), found(w))
    assert same_bits(found(torch.stack([w, w], -1)[..., 0]), found(w))
    assert torch.allclose(found(w), family.reference(tuple(params), x, None, w), rtol=1e-5, atol=1e-4)


def test_float64_weights_are_rounded():
    params, x, w = randn(1, 5, D), rand(2, 5, D), WEIGHTS["float32"](5, D)
    assert same_bits(
        aevb.bernoulli_log_prob(params, x, weight=w.double()), aevb.bernoulli_log_prob(params, x, weight=w)
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [(3, 5), (9, 700)])  # one chunk, and several
@weights
def test_linear(rows, weight, reduction):
    H, family = 13, FAMILIES["laplace"]
    h, x, w = 0.3 * randn(1, *rows, H), data(family, rows[1], D), weight(rows[1], D)
    layer, offset = [0.2 * randn(2, 2 * D, H), 0.1 * randn(3, 2 * D)], 0.1 * randn(4, rows[1])
    leaves = [t.requires_grad_() for t in (h, *layer)]
    nan = x.masked_fill(w == 0, torch.nan)
    value = aevb.linear_log_prob("laplace", *leaves, nan, x_weight=w, offset=offset, reduction=reduction)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = torch.nn.functional.linear(*wide).chunk(2, -1)
    expected = family.reference(tuple(out), x.double(), None, w.double() if w.is_floating_point() else w, offset)
    expected = expected if reduction == "none" else expected.mean()
    assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-4)
    upstream = randn(5, *value.shape)
    found = torch.autograd.grad(value, leaves, upstream)
    for f, e in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert float((f.double() - e).norm() / e.norm()) < 3e-6


LAST_LAYER = "a last layer"


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("output", ["bernoulli", "gaussian", "exponential", LAST_LAYER])
@weights
def test_loss_and_terms(weight, output, estimator, reduction):
    """Of all that may be given at once, against the twin in float64; and the terms make up the loss."""
    family = FAMILIES["bernoulli" if output == LAST_LAYER else output]
    L, B, H = 3, 6, 11
    x, w = data(family, B, D), weight(B, D)
    params, offset = drawn(family, L, B, D), 0.1 * randn(31, B)
    w_b = 2 * rand(32, B)
    mu, logvar = randn(33, B, 2), randn(34, B, 2)
    options = {"likelihood": family.name, "estimator": estimator, "num_samples": L, "reduction": reduction}
    criterion, twin = FusedELBO(0.7, **options), reference.FusedELBO(0.7, **options)
    _, kl = criterion.sample(mu, logvar, seed=1)
    layer = [0.3 * randn(35, L, B, H), 0.2 * randn(36, D, H), 0.1 * randn(37, D)]
    leaves = [t.requires_grad_() for t in (layer if output == LAST_LAYER else params)]
    leaves += [kl.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def arguments(inputs, x, weight, dtype):
        *inputs, kl = inputs
        recon = as_recon(inputs)
        if output == LAST_LAYER:
            linear = torch.nn.functional.linear(*inputs) if dtype == torch.float64 else LinearOutput(*inputs)
            recon = linear
        more = {"weight": weight, "offset": offset.to(dtype), "datapoint_weight": w_b.to(dtype)}
        return (recon, x), {"kl": kl, **more}

    args, more = arguments(leaves, x.masked_fill(w == 0, torch.nan), w, torch.float32)
    loss, terms = criterion(*args, **more), criterion.terms(*args, **more)
    args64, more64 = arguments(wide, x.double(), w.double() if w.is_floating_point() else w, torch.float64)
    expected = twin(*args64, **more64)
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-4)
    assert same_bits(terms.loss, loss)
    assert terms.loss.requires_grad
    assert not any(term.requires_grad for term in terms[1:])
    upstream = randn(38, *loss.shape)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for f, e in zip(torch.autograd.grad(loss, leaves, upstream), wanted, strict=True):
        assert float((f.double() - e).norm() / e.norm()) < 2e-5
    if not ESTIMATORS[estimator].importance_weighted:
        assert torch.allclose(0.7 * terms.kl - terms.log_likelihood, terms.loss, rtol=1e-5, atol=1e-4)
    of_none = FusedELBO(0.7, **{**options, "reduction": "none"}).terms(*args, **more)
    for term, rows in zip(terms, of_none, strict=True):
        reduced = rows if reduction == "none" else getattr(rows, reduction)()
        assert torch.allclose(term, reduced, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"free_bits": 0.2}, {"capacity": 1.0}, {"num_samples": 3}])
def test_terms_of_the_fused_loss(options, reduction):
    """Without a weight: the bits of the loss, its gradients, and the terms by themselves."""
    criterion = FusedELBO(0.7, reduction=reduction, **options)
    samples = (3,) if "num_samples" in options else ()
    recon, x = randn(1, *samples, 6, D).requires_grad_(), rand(2, 6, D)
    mu, logvar = randn(3, 6, 4).requires_grad_(), randn(4, 6, 4).requires_grad_()
    _, kl = criterion.sample(mu, logvar, seed=1)
    for posterior, given in (((mu, logvar), {}), ((), {"kl": kl})):
        loss, terms = (f(recon, x, *posterior, **given) for f in (criterion, criterion.terms))
        assert same_bits(loss, terms.loss)
        upstream = randn(5, *loss.shape)
        for keep in (True, True):
            grads = [torch.autograd.grad(t, (recon, mu, logvar), upstream, retain_graph=keep) for t in (loss, terms[0])]
            assert all(map(same_bits, *grads))
        log_prob = aevb.bernoulli_log_prob(recon, x)
        log_prob = log_prob.mean(0) if samples else log_prob
        for term, rows in ((terms.log_likelihood, log_prob), (terms.kl, aevb.gaussian_kl(mu, logvar))):
            expected = rows if reduction == "none" else getattr(rows, reduction)()
            assert torch.allclose(term, expected, rtol=1e-5, atol=1e-5)
            assert not term.requires_grad


def test_terms_have_graphs_and_second_derivatives():
    criterion, x = FusedELBO(), rand(2, 6, D)
    recon, mu, logvar = (
        randn(1, 6, D).requires_grad_(),
        randn(3, 6, 4).requires_grad_(),
        randn(4, 6, 4).requires_grad_(),
    )
    eager = criterion.terms(recon, x, mu, logvar)
    compiled = torch.compile(criterion.terms, backend="aot_eager", fullgraph=True)(recon, x, mu, logvar)
    for a, b in zip(eager, compiled, strict=True):
        assert same_bits(a.detach(), b.detach())
    for a, b in zip(*(torch.autograd.grad(t.loss, (recon, mu, logvar)) for t in (eager, compiled)), strict=True):
        assert same_bits(a, b)
    (first,) = torch.autograd.grad(criterion.terms(recon, x, mu, logvar).loss, mu, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), mu)
    assert torch.allclose(second, torch.full_like(second, 1 / 6))


def test_datapoint_weight_gets_a_gradient():
    """That of each datapoint's loss; and the mean divides by the number of datapoints."""
    recon, x, mu, logvar = randn(1, 6, D), rand(2, 6, D), randn(3, 6, 4), randn(4, 6, 4)
    w = rand(5, 6).requires_grad_()
    each = FusedELBO(reduction="none")(recon, x, mu, logvar)
    loss = FusedELBO()(recon, x, mu, logvar, datapoint_weight=w)
    assert torch.allclose(loss, (w * each).sum() / 6)
    assert torch.allclose(torch.autograd.grad(loss, w)[0], each / 6, rtol=1e-5)
    assert torch.allclose(FusedELBO()(recon, x, mu, logvar, datapoint_weight=torch.tensor(2.0)), 2 * each.mean())


@pytest.mark.parametrize("estimator", ["sgvb-b", "iwae"])
def test_datapoint_weight_of_a_likelihood_of_ones_own(estimator):
    criterion = FusedELBO(0.7, estimator=estimator, num_samples=3)
    recon, x, w = randn(1, 3, 6, D), rand(2, 6, D), rand(5, 6)
    _, kl = criterion.sample(randn(3, 6, 4), randn(4, 6, 4), seed=1)
    found = criterion.of_log_prob(aevb.bernoulli_log_prob(recon, x), kl, datapoint_weight=w)
    assert torch.allclose(found, criterion(recon, x, kl=kl, datapoint_weight=w))


def test_datapoints_of_any_shape():
    """A mask of images goes with a flat output, and one mask with every channel."""
    recon, x, mu, logvar = randn(1, 4, 3 * 5 * 5), rand(2, 4, 3, 5, 5), randn(3, 4, 2), randn(4, 4, 2)
    mask = rand(5, 4, 1, 5, 5) < 0.5
    criterion = FusedELBO(reduction="none")
    whole = mask.expand(4, 3, 5, 5)
    assert same_bits(criterion(recon, x, mu, logvar, weight=mask), criterion(recon, x, mu, logvar, weight=whole))
    flat = criterion(recon, x.flatten(1), mu, logvar, weight=whole.flatten(1))
    assert same_bits(criterion(recon, x, mu, logvar, weight=mask), flat)


@every
def test_graphs_transforms_and_second_derivatives(family):
    params, x, mask = drawn(family, 5, D), data(family, 5, D), mask_of(5, D)
    leaves = [p.requires_grad_() for p in params]
    offset = (0.05 * rand(6, 5)).requires_grad_()

    def f(*inputs):
        *inputs, shift = inputs
        return aevb.log_prob(family, as_recon(inputs), x, weight=mask, offset=shift).sum()

    eager = torch.autograd.grad(f(*leaves, offset), (*leaves, offset))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves, offset), (*leaves, offset)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    by_func = torch.func.grad(f, tuple(range(len(leaves) + 1)))(*(t.detach() for t in (*leaves, offset)))
    for a, b in zip(eager, by_func, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    (first, *_) = torch.autograd.grad(f(*leaves, offset), leaves, create_graph=True)
    nan = torch.where(mask, x, torch.nan)
    (second,) = torch.autograd.grad((first * first).sum(), leaves[0])
    value = aevb.log_prob(family, as_recon(leaves), nan, weight=mask).sum()
    (first,) = torch.autograd.grad(value, leaves[:1], create_graph=True)
    (of_nan,) = torch.autograd.grad((first * first).sum(), leaves[0])
    assert of_nan.isfinite().all()
    assert second.isfinite().all()


def test_opcheck():
    logits, x, offset = randn(1, 3, 5, D).requires_grad_(), rand(2, 5, D), randn(3, 5)
    for weight in (mask_of(5, D), WEIGHTS["float32"](5, D), None):
        args = (logits, x, None, weight, offset, "bernoulli_logits", 0.0, None)
        torch.library.opcheck(torch.ops.aevb.log_prob.default, args)
        torch.library.opcheck(torch.ops.aevb.log_prob_forward.default, (logits.detach(), *args[1:]))


def test_x_has_the_kernels_gradient(monkeypatch):
    """Of the likelihoods of x - mean, as log q(z|x) needs it; no formula in PyTorch is asked."""
    from aevb.ops import autograd

    monkeypatch.setattr(autograd, "reference_gradients", lambda *_: pytest.fail("by the formula"))
    for name, second in (("gaussian", True), ("gaussian", False), ("laplace", True), ("mse", False)):
        family, params, x = FAMILIES[name], drawn(FAMILIES[name], 3, 5, D), data(FAMILIES[name], 5, D)
        params = params if second or len(params) == 1 else [params[0], 0.3]
        wide = tuple(p.double() if isinstance(p, torch.Tensor) else p for p in params)
        leaf, leaf64, w = x.requires_grad_(), x.detach().double().requires_grad_(), WEIGHTS["float32"](5, D)
        for scale in (None, 0.5):
            value = aevb.log_prob(family, as_recon(params), leaf, scale, weight=w)
            expected = family.reference(wide, leaf64, scale, w.double())
            (found,), (wanted,) = (torch.autograd.grad(v.sum(), t) for v, t in ((value, leaf), (expected, leaf64)))
            assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


# ---- what does not fit ----------------------------------------------------------------------------------------------

LOGITS, X = randn(1, 5, D), rand(2, 5, D)
WRONG = {
    "shape": (
        {"weight": torch.ones(4, D, dtype=torch.bool)},
        ValueError,
        r"weight has shape \(4, 83\); expected \(5, 83\), x's shape",
    ),
    "dtype": (
        {"weight": torch.ones(5, D, dtype=torch.int64)},
        RuntimeError,
        "weight has dtype int64; expected bool or uint8, which select",
    ),
    "a gradient": (
        {"weight": torch.ones(5, D, requires_grad=True)},
        ValueError,
        r"weight requires a gradient.*weight.detach\(\)",
    ),
    "an array": ({"weight": X.numpy()}, TypeError, "weight is a numpy.ndarray; expected a torch.Tensor"),
    "sparse": ({"weight": X.to_sparse()}, TypeError, "weight is a tensor of layout sparse"),
    "negative": ({"weight": X - 2, "validate_args": True}, ValueError, r"weight\[0, 0\] is -.*0 or more"),
    "NaN": ({"weight": X * torch.nan, "validate_args": True}, ValueError, r"weight\[0, 0\] is nan.*finite"),
    "offset": ({"offset": torch.ones(4)}, ValueError, r"offset has shape \(4,\); expected \(5,\)"),
    "offset's layout": ({"offset": torch.ones(5).to_sparse()}, TypeError, "offset is a tensor of layout sparse"),
}


@pytest.mark.parametrize(("given", "error", "words"), WRONG.values(), ids=WRONG)
def test_a_sentence(given, error, words):
    with pytest.raises(error, match=words):
        aevb.bernoulli_log_prob(LOGITS, X, **given)
    given = dict(given)
    criterion = FusedELBO(validate_args=given.pop("validate_args", None))
    with pytest.raises(error, match=words):
        criterion(LOGITS, X, kl=torch.zeros(5), **given)


def test_a_datapoint_weight_of_another_shape():
    with pytest.raises(ValueError, match=r"datapoint_weight has shape \(4,\); expected \(5,\), one number"):
        FusedELBO()(LOGITS, X, kl=torch.zeros(5), datapoint_weight=torch.ones(4))


def test_values_that_take_no_part_are_not_looked_at():
    mask = mask_of(5, D)
    wild = torch.where(mask, X, 300.0)
    assert aevb.bernoulli_log_prob(LOGITS, wild, weight=mask, validate_args=True).isfinite().all()
    with pytest.raises(ValueError, match="a Bernoulli target lies in"):
        aevb.bernoulli_log_prob(LOGITS, wild, validate_args=True)
    with pytest.raises(ValueError, match="a Bernoulli target lies in"):
        aevb.bernoulli_log_prob(LOGITS, torch.where(mask, 300.0, X), weight=mask, validate_args=True)
    nan = LOGITS.masked_fill(~mask, torch.nan)
    assert FusedELBO(validate_args=True)(nan, wild, kl=torch.zeros(5), weight=mask).isfinite()
