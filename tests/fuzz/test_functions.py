"""The public functions on whatever hypothesis thinks of: the float64 reference's values and gradients, or an error that
is a sentence of ours. AEVB_FUZZ is how many cases of each to try."""

import math
import os

import pytest
import torch
from conftest import close_by_magnitude
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aevb
from aevb import reference

CASES = int(os.environ.get("AEVB_FUZZ", "60"))
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
FLOATS = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [torch.int64, torch.bool, torch.uint8, torch.complex64]
OURS = (ValueError, RuntimeError, TypeError)
FOREIGN = (
    "INTERNAL ASSERT",
    "API call failed",
    "Could not run",
    "aten::",
    "Expected a value of type",
    "unsupported operand",
)

sizes = st.sampled_from([0, 1, 1, 2, 3, 5, 7, 8, 16, 33, 65])
batches = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)
seeds = st.integers(0, 10**6)


@st.composite
def layouts(draw):
    """What makes another layout of a tensor, with the same values."""
    kind = draw(st.sampled_from(["as it is", "transposed", "every second", "expanded", "a part", "backwards"]))

    def lay(t):
        if t.dim() == 0 or kind == "as it is":
            return t
        if kind == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "every second":
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        if kind == "expanded" and t.shape[0] > 0:
            return t[:1].expand_as(t)
        if kind == "a part":
            return torch.nn.functional.pad(t, (3, 2))[..., 3 : t.shape[-1] + 3]
        if kind == "backwards":
            return t.flip(0).contiguous().flip(0)
        return t

    return lay


@st.composite
def tensors(draw, shape, scale=1.0, dtypes=None):
    t = scale * torch.randn(shape, generator=torch.Generator().manual_seed(draw(seeds)))
    dtype = draw(st.sampled_from(dtypes or FLOATS))
    return draw(layouts())(t.to(dtype) if dtype != torch.bool else t > 0)


def result(call):
    """What the call gives, or None where it is refused in a sentence of ours."""
    try:
        return call()
    except OURS as error:
        text = str(error)
    assert text
    assert not any(words in text for words in FOREIGN), text
    return None


def double(t):
    return t.detach().double()


def gradients_are_right(outputs, inputs, outputs64, inputs64, rtol=2e-5):
    """Those of a sum that weighs each element otherwise, against float64's."""
    for output in outputs:
        if not output.requires_grad:
            return
    total = sum((o.double() * weights(o)).sum() for o in outputs)
    total64 = sum((o * weights(o)).sum() for o in outputs64)
    if not total64.requires_grad:
        return
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    expected = torch.autograd.grad(total64, inputs64, allow_unused=True)
    for a, e, given_input in zip(found, expected, inputs, strict=True):
        if e is None:
            continue
        scale = e.abs().max().item() if e.numel() else 0.0
        slack = {torch.float64: rtol, torch.float32: rtol, torch.bfloat16: 2e-2, torch.float16: 4e-3}[given_input.dtype]
        torch.testing.assert_close(a.double(), e, rtol=slack, atol=slack * max(scale, 1e-3))


def weights(t):
    return torch.linspace(-1, 1, max(t.numel(), 1), dtype=torch.float64)[: t.numel()].reshape(t.shape)


def leaves(*given_tensors):
    return [t.detach().requires_grad_() for t in given_tensors]


@given(st.data())
@fuzz
def test_the_posterior(data):
    batch, D = data.draw(batches), data.draw(sizes)
    num_samples = data.draw(st.sampled_from([None, None, 0, 1, 3]))
    dtype = [data.draw(st.sampled_from([*FLOATS, *FLOATS, *OTHERS]))]
    mu, logvar = (data.draw(tensors((*batch, D), scale, dtype)) for scale in (2.0, 1.0))
    batch_dims = data.draw(st.sampled_from([None, len(batch), 0, 1, 5]))
    seed, log_ratio = data.draw(seeds), data.draw(st.booleans())
    sample = aevb.sample_gaussian_log_ratio if log_ratio else aevb.sample_gaussian
    twin = reference.sample_gaussian_log_ratio if log_ratio else reference.sample_gaussian
    floating = dtype[0] in FLOATS
    inputs = leaves(mu, logvar) if floating else [mu, logvar]
    found = result(lambda: sample(*inputs, num_samples, batch_dims=batch_dims, seed=seed))
    if not floating:
        assert found is None
        return
    if found is None:
        assert (not batch and D == 0) or (batch_dims or 0) > len(batch)
        return
    inputs64 = leaves(double(mu), double(logvar))
    expected = twin(*inputs64, num_samples, batch_dims=batch_dims, seed=seed)
    z, number = found
    close_by_magnitude(z, expected[0], 1 + double(mu).abs() + (0.5 * double(logvar)).exp() * 6, 2e-6)
    terms = 1 + double(mu).square() + double(logvar).abs() + double(logvar).exp() * 40
    count = terms.dim() if batch_dims == 0 else terms.dim() - (batch_dims if batch_dims is not None else len(batch))
    magnitude = terms.flatten(-count).sum(-1) if terms.dim() else terms
    close_by_magnitude(number, expected[1], magnitude, 2e-6)
    gradients_are_right(found, inputs, expected, inputs64)


@given(st.data())
@fuzz
def test_the_kl(data):
    batch, D = data.draw(batches), data.draw(sizes)
    dtype = [data.draw(st.sampled_from(FLOATS))]
    mu, logvar = (data.draw(tensors((*batch, D), scale, dtype)) for scale in (3.0, 2.0))
    groups = data.draw(st.sampled_from([None, 1, 2, D, 0, -1, 7]))
    inputs, inputs64 = leaves(mu, logvar), leaves(double(mu), double(logvar))
    found = result(lambda: aevb.gaussian_kl(*inputs, groups))
    if found is None:
        assert groups is not None
        assert groups < 1 or D % groups
        return
    expected = reference.gaussian_kl(*inputs64, groups)
    m, v = inputs64
    terms = 0.5 * (m.square() + v.exp() + v.abs() + 1)
    magnitude = terms.sum(-1) if groups is None else terms.unflatten(-1, (groups, D // groups)).sum(-1)
    close_by_magnitude(found, expected, magnitude, 2e-6)
    gradients_are_right([found], inputs, [expected], inputs64)


def targets(draw, shape):
    """x, x_scale."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(draw(seeds)))
    kind = draw(st.sampled_from(["soft", "bits", "bool", "bytes", "half", "float64"]))
    x, x_scale = {
        "soft": (u, None),
        "bits": (u.round(), None),
        "bool": (u < 0.4, None),
        "bytes": ((255 * u).byte(), 1 / 255),
        "half": (u.half(), None),
        "float64": (u.double(), None),
    }[kind]
    return draw(layouts())(x), x_scale


@given(st.data())
@fuzz
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_log_likelihoods(data):
    samples = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    batch, D, gaussian = data.draw(batches), data.draw(sizes), data.draw(st.booleans())
    dtype = [data.draw(st.sampled_from(FLOATS))]
    output = data.draw(tensors((*samples, *batch, D), 3.0, dtype))
    x, x_scale = targets(data.draw, (*batch, D))
    (leaf,), (leaf64,) = leaves(output), leaves(double(output))
    x64 = double(x) * (1 if x_scale is None else x_scale)
    if gaussian:
        logvar, sigmoid = data.draw(st.floats(-3, 3)), data.draw(st.booleans())
        found = result(lambda: aevb.gaussian_log_prob(leaf, x, logvar, x_scale, sigmoid=sigmoid))
        expected = reference.gaussian_log_prob(leaf64, x64, logvar, sigmoid=sigmoid)
        terms = 0.5 * (math.log(2 * math.pi) + abs(logvar) + (x64.abs() + leaf64.abs() + 1).square() / math.exp(logvar))
    else:
        found = result(lambda: aevb.bernoulli_log_prob(leaf, x, x_scale))
        expected = reference.bernoulli_log_prob(leaf64, x64)
        terms = leaf64.abs() * (x64 + 1) + 1
    assert found is not None
    close_by_magnitude(found, expected, terms.sum(-1), 2e-6)
    gradients_are_right([found], [leaf], [expected], [leaf64])


def weighed(draw, batch, pixels):
    """Weights of elements and datapoints, as they are given and for the twin in float64."""
    more = {}
    shape = draw(st.sampled_from([(*batch, *pixels), pixels, (*batch, *(1 for _ in pixels))]))
    u = torch.rand(shape, generator=torch.Generator().manual_seed(draw(seeds)))
    kind = draw(st.sampled_from([None, "mask", "bytes", "weights", "half"]))
    if kind is not None:
        kinds = {"mask": u < 0.5, "bytes": (3 * u).byte(), "weights": torch.where(u < 0.3, 0, u), "half": u.half()}
        more["weight"] = draw(layouts())(kinds[kind])
    if draw(st.booleans()):
        more["datapoint_weight"] = torch.rand(batch, generator=torch.Generator().manual_seed(draw(seeds)))
    return more, {name: t.double() if t.is_floating_point() else t for name, t in more.items()}


@given(st.data())
@fuzz
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss(data):
    estimator = data.draw(st.sampled_from(["sgvb-b", "sgvb-b", "sgvb-a", "stl", "iwae", "dreg"]))
    num_samples = data.draw(st.sampled_from([1, 2, 4]))
    batch = data.draw(st.sampled_from([(1,), (3,), (5,), (2, 3)]))
    latent, pixels = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([(1,), (7,), (3, 5), (1, 4, 6)]))
    options = {"reduction": data.draw(st.sampled_from(["none", "mean", "sum"])), "estimator": estimator}
    options |= {"num_samples": num_samples, "beta": data.draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))}
    if estimator == "dreg" and options["beta"] == 0:
        options["beta"] = 1e-3  # 0 is next to it there, and in the reference it is nothing
    options |= {"likelihood": data.draw(st.sampled_from(["bernoulli", "gaussian"]))}
    if options["likelihood"] == "bernoulli":
        options["from_probs"] = data.draw(st.booleans())
    x, x_scale = targets(data.draw, (*batch, *pixels))
    mu, logvar = (data.draw(tensors((*batch, latent), 1.0, [torch.float32])) for _ in range(2))
    weight = torch.randn(latent, math.prod(pixels), generator=torch.Generator().manual_seed(data.draw(seeds)))
    lay = data.draw(layouts())

    def decoded(z):
        output = (z @ weight.to(z.dtype)).unflatten(-1, pixels)
        return 0.02 + 0.96 * output.sigmoid() if options.get("from_probs") else output

    criterion, twin = aevb.FusedELBO(**options, x_scale=x_scale), reference.FusedELBO(**options)
    inputs, inputs64 = leaves(mu, logvar), leaves(double(mu), double(logvar))
    more, more64 = weighed(data.draw, batch, pixels)
    z, kl = criterion.sample(*inputs, seed=3)
    loss = criterion(lay(decoded(z)), x, kl=kl, **more)
    z64, kl64 = twin.sample(*inputs64, seed=3)
    x64 = double(x) * (1 if x_scale is None else x_scale)
    laid = lay(decoded(z64))
    loss64 = twin(laid, x64, kl=kl64, **more64)
    magnitude = 100 + 20 * (x64.abs().sum() + laid.detach().abs().sum()) + 40 * kl64.detach().abs().sum()
    close_by_magnitude(loss, loss64, magnitude, 3e-6)
    gradients_are_right([loss], inputs, [loss64], inputs64, rtol=2e-4)
