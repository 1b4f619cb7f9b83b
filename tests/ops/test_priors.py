"""Priors other than N(0, I), and ranges of logvar: values and gradients against float64, PyTorch's own KL and clamp."""

import math

import pytest
import torch
from conftest import DTYPES, HALF_DTYPES, check_every_isa, close_by_magnitude, rand, randn, same_bits
from test_accuracy import double, gradients, leaf, upstream
from torch.distributions import Normal, kl_divergence

import aevb
from aevb import FusedELBO, reference

SEED = 20131220
GRADIENTS = ["total", "path", "doubly_reparameterized"]
KINDS = ["ordinary", "wide", "near the prior", "far"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def tensors(kind, *size, shared=False):
    """mu, logvar, prior_mu and prior_logvar."""
    of_prior = size[-1:] if shared else size
    mu, logvar, prior_mu, prior_logvar = randn(1, *size), randn(2, *size), randn(3, *of_prior), randn(4, *of_prior)
    if kind == "wide":
        return 100 * mu, 80 * rand(2, *size) - 40, 100 * prior_mu, 80 * rand(4, *of_prior) - 40
    if kind == "near the prior":
        return 3 * prior_mu + 1e-4 * mu, 2 * prior_logvar + 1e-4 * logvar, 3 * prior_mu, 2 * prior_logvar
    if kind == "far":
        return mu + 1e3, 12 * logvar - 9, prior_mu, 12 * prior_logvar + 9
    return mu, logvar, prior_mu, prior_logvar


def leaves(kind, device, *size, dtype=torch.float32, shared=False):
    mu, logvar, *prior = tensors(kind, *size, shared=shared)
    return (leaf(mu, device, dtype), leaf(logvar, device, dtype), *(leaf(t, device) for t in prior))


def seen(mu, logvar, prior_mu, prior_logvar):
    """d, u and the prior's standard deviation, of float64 tensors."""
    inverse_sd = torch.exp(-0.5 * prior_logvar)
    return (mu - prior_mu) * inverse_sd, logvar - prior_logvar, inverse_sd


def summed(t, like):
    """t summed over the rows that share what it is the gradient of."""
    return t if t.shape == like.shape else t.sum_to_size(like.shape)


def check_kl(kl, kl64, all_four, all_four64):
    close_by_magnitude(kl, kl64, kl64)
    g = upstream(5, kl)
    actual, expected = gradients(kl, all_four, g), gradients(kl64, all_four64, double(g))
    with torch.no_grad():
        d, u, inverse_sd = seen(*all_four64)
        g = double(g).abs().unsqueeze(-1)
        of_mu, of_logvar = g * (d * inverse_sd).abs(), 0.5 * g * torch.expm1(u).abs()
        magnitudes = of_mu, of_logvar, of_mu, of_logvar + 0.5 * g * d * d
    for a, e, m in zip(actual, expected, magnitudes, strict=True):
        close_by_magnitude(a, e, summed(m, e))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [1, 20, 33, 784, 4100])
@each_kind
def test_kl(kind, width, shared, device):
    mu, logvar, *prior = given = leaves(kind, device, 7, width, shared=shared)
    m, v, *p = given64 = tuple(map(double, given))
    kl64 = reference.gaussian_kl(m, v, prior=tuple(p))
    check_kl(aevb.gaussian_kl(mu, logvar, prior=tuple(prior)), kl64, given, given64)
    sd, prior_sd = (torch.exp(0.5 * t) for t in (v, p[1]))
    if kind == "ordinary":
        torch.testing.assert_close(kl64, kl_divergence(Normal(m, sd), Normal(p[0], prior_sd)).sum(-1))


@each_kind
def test_one_dimension_anywhere(kind, device):
    """Rows of one element: there is nothing to hide behind."""
    given = leaves(kind, device, 100_003, 1)
    given64 = tuple(map(double, given))
    kl, kl64 = (f(t[0], t[1], prior=t[2:]) for f, t in ((aevb.gaussian_kl, given), (reference.gaussian_kl, given64)))
    check_kl(kl, kl64, given, given64)
    if kind == "near the prior":
        assert kl64.max() < 1e-4


def check_sample(given, num_samples, gradient=None, logvar_range=None):
    """z, the KL or the log ratio, and all four gradients; of one sample or several."""
    mu, logvar, *prior = given
    m, v, *p = given64 = tuple(map(double, given))
    options = {"logvar_range": logvar_range, "seed": SEED}
    if gradient is None:
        outputs = aevb.sample_gaussian(mu, logvar, num_samples, prior=tuple(prior), **options)
        expected = reference.sample_gaussian(m, v, num_samples, prior=tuple(p), **options)
    else:
        options["gradient"] = gradient
        outputs = aevb.sample_gaussian_log_ratio(mu, logvar, num_samples, prior=tuple(prior), **options)
        expected = reference.sample_gaussian_log_ratio(m, v, num_samples, prior=tuple(p), **options)
    z, found = outputs
    plain = logvar if logvar_range is None else logvar.clamp(*logvar_range)
    assert same_bits(z, aevb.sample_gaussian(mu, plain, num_samples, seed=SEED)[0])
    assert found.dtype == torch.float32
    eps = reference.normal(SEED, tuple(z.shape))
    with torch.no_grad():
        v = v if logvar_range is None else v.clamp(*logvar_range)
        d, u, inverse_sd = seen(m, v, *p)
        sd, prior_sd, less_1 = torch.exp(0.5 * v), torch.exp(0.5 * u), torch.expm1(0.5 * u)
        difference = d + less_1 * eps
        two_ratio = (difference * (difference + 2 * eps)).abs() + (less_1 * eps * (difference + eps)).abs() + u.abs()
        two_ratio = two_ratio + (d * (difference + eps)).abs()
    close_by_magnitude(found, expected[1], expected[1] if gradient is None else 0.5 * two_ratio.sum(-1))

    gz, g = upstream(6, z), upstream(7, found)
    if gradient == "doubly_reparameterized":
        g = torch.softmax(2 * randn(7, *found.shape), 0).to(found.device) * 3 * upstream(8, found[0])
    actual = gradients(outputs, given, (gz, g))
    wanted = gradients(expected, given64, (double(gz), double(g)))
    with torch.no_grad():
        gz, g = double(gz).abs(), double(g).abs().unsqueeze(-1)
        if gradient is None:
            of_mu, of_logvar = gz, 0.5 * gz * sd * eps.abs()
            of_mu, of_logvar = (t if num_samples is None else t.sum(0) for t in (of_mu, of_logvar))
            kl_mu, kl_logvar = g * (d * inverse_sd).abs(), 0.5 * g * torch.expm1(u).abs()
            magnitudes = of_mu + kl_mu, of_logvar + kl_logvar, kl_mu, kl_logvar + 0.5 * g * d * d
        else:
            weight = g / g.sum(0) if gradient == "doubly_reparameterized" else torch.ones_like(g)
            slope = prior_sd if gradient == "total" else torch.expm1(0.5 * u) - torch.expm1(-0.5 * u)
            of_z = weight * (gz + g * inverse_sd * (d.abs() + (slope * eps).abs()))
            of_v = 0.5 * (sd * eps.abs() * of_z + (g if gradient == "total" else 0))
            far = d.abs() + prior_sd * eps.abs()
            magnitudes = of_z, of_v, g * inverse_sd * far, 0.5 * g * (1 + far * far)
            if num_samples is not None:
                magnitudes = tuple(t.sum(0) for t in magnitudes)
    for a, e, magnitude in zip(actual, wanted, magnitudes, strict=True):
        close_by_magnitude(a, e, summed(magnitude, e))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_samples", [None, 5, 40])
@pytest.mark.parametrize("width", [1, 20, 513])
@each_kind
def test_sample(kind, width, num_samples, shared, device):
    check_sample(leaves(kind, device, 7, width, shared=shared), num_samples)


@each_gradient
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [1, 20, 513])
@each_kind
def test_log_ratio(kind, width, shared, gradient, device):
    for num_samples in (None, 5, 40):
        if num_samples is not None or gradient != "doubly_reparameterized":
            check_sample(leaves(kind, device, 7, width, shared=shared), num_samples, gradient)


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision(dtype, gradient, device):
    """The prior stays in float32."""
    check_sample(leaves("ordinary", device, 9, 33, dtype=dtype, shared=True), 4, gradient)
    check_sample(leaves("ordinary", device, 9, 33, dtype=dtype), 4, gradient)


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
def test_range_with_a_prior(gradient, device):
    check_sample(leaves("ordinary", device, 9, 33), 4, gradient, (-0.5, 0.75))


# ---- extremes -------------------------------------------------------------------------------------------------------


def extremes():
    """Rows of one element whose results are finite in float32, however large or small the prior's variance is."""
    rows = []
    for w in (-1e4, -300.0, -200.0, -177.0, -100.0, 100.0, 170.0, 200.0, 300.0, 1e4):
        rows += [(0.3, w, 0.3, w)]  # the posterior is the prior
        if w > 0:
            rows += [(1.5, 0.2, -7.0, w), (2e18, -3.0, 1e18, w)]
            rows += [(1.5, v, -7.0, w) for v in (-100.0, w - 60, w / 2) if v < 85]
        elif w > -178:
            sd = math.exp(w / 2)
            rows += [(3 * sd, w - 2, sd, w), (3 * sd, w + 9, 0.0, w)]
    rows += [(3e-45, -200.0, 0.0, -200.0)]  # a distance that is no normal number
    return tuple(torch.tensor(column).unsqueeze(-1) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
def test_extremes(gradient, device):
    """Where float64's result is a float32, so is ours."""
    given = tuple(leaf(t, device) for t in extremes())
    given64 = tuple(map(double, given))

    def run(module, t):
        if gradient is None:
            outputs = module.sample_gaussian(t[0], t[1], 2, prior=t[2:], seed=SEED)
        else:
            outputs = module.sample_gaussian_log_ratio(t[0], t[1], 2, prior=t[2:], gradient=gradient, seed=SEED)
        grads = [(1 + torch.arange(o.numel()).view(o.shape) % 3).to(o) for o in outputs]
        return [*outputs, *gradients(outputs, t, grads)]

    wanted = [t.detach() for t in run(reference, given64)]
    if gradient not in (None, "total"):  # autograd subtracts z / sd^2 from eps / sd
        wanted[2:4] = path_gradients(given64, gradient)
    names = ("z", "kl", "mu", "logvar", "prior_mu", "prior_logvar")
    for name, actual, expected in zip(names, run(aevb, given), wanted, strict=True):
        actual, stored = actual.detach().cpu(), expected.float()
        finite = stored.isfinite()
        assert finite.double().mean() > 0.6
        assert actual[finite].isfinite().all(), name
        message = f"{name}: {{}}".format
        torch.testing.assert_close(actual[finite], stored[finite], rtol=3e-5, atol=2e-6, msg=message)


def path_gradients(given, gradient):
    """Of mu and logvar in float64, through two samples, for the upstream gradients of `test_extremes`."""
    mu, logvar, *_ = given = [t.detach() for t in given]
    d, u, inverse_sd = seen(*given)
    eps = reference.normal(SEED, (2, *mu.shape))
    gz, g = (1 + torch.arange(eps.numel()).view(eps.shape) % 3).double(), (1 + torch.arange(2 * len(mu)) % 3).double()
    g = g.view(2, -1, 1)
    weight = g / g.sum(0) if gradient == "doubly_reparameterized" else 1.0
    slope = inverse_sd * (torch.expm1(0.5 * u) - torch.expm1(-0.5 * u))
    slope = torch.where(u < -100, -torch.exp(-0.5 * logvar), slope)
    of_z = weight * (gz + g * (d * inverse_sd + slope * eps))
    return of_z.sum(0), 0.5 * (torch.exp(0.5 * logvar) * eps * of_z).sum(0)


# ---- shapes, strides and dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (1, 1, 5), (3, 1), (3, 5), (1, 3, 5), (2, 1, 1), (2, 3, 5)])
def test_priors_broadcast(shape, device):
    mu, logvar = (leaf(randn(i, 2, 3, 5), device) for i in (1, 2))
    prior = tuple(leaf(randn(i, *shape), device) for i in (3, 4))
    given, given64 = (mu, logvar, *prior), tuple(map(double, (mu, logvar, *prior)))
    kl = aevb.gaussian_kl(mu, logvar, prior=prior, batch_dims=2)
    kl64 = reference.gaussian_kl(*given64[:2], prior=given64[2:], batch_dims=2)
    check_kl(kl, kl64, given, given64)
    whole = tuple(t.expand(2, 3, 5).contiguous() for t in prior)
    assert same_bits(kl, aevb.gaussian_kl(mu, logvar, prior=whole, batch_dims=2))
    for f in (aevb.sample_gaussian, aevb.sample_gaussian_log_ratio):
        found = f(mu, logvar, 4, prior=prior, batch_dims=2, seed=SEED)
        expected = f(mu, logvar, 4, prior=whole, batch_dims=2, seed=SEED)
        assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5), (3, 1, 1), (2, 3, 4, 5), (2, 1, 1, 1), ()])
def test_latent_maps(shape, device):
    """batch_dims=1: everything behind the batch is one datapoint's."""
    mu, logvar = (leaf(randn(i, 2, 3, 4, 5), device) for i in (1, 2))
    prior = tuple(leaf(randn(i, *shape), device) for i in (3, 4))
    z, kl = aevb.sample_gaussian(mu, logvar, prior=prior, batch_dims=1, seed=SEED)
    given64 = tuple(map(double, (mu, logvar, *prior)))
    expected = reference.sample_gaussian(*given64[:2], prior=given64[2:], batch_dims=1, seed=SEED)
    assert z.shape == mu.shape
    assert kl.shape == (2,)
    close_by_magnitude(kl, expected[1], expected[1])
    g = upstream(9, kl)
    for a, e in zip(gradients(kl, prior, g), gradients(expected[1], given64[2:], double(g)), strict=True):
        close_by_magnitude(a, e, e.abs() + e.abs().max())


@pytest.mark.parametrize("groups", [1, 4, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_groups(groups, shared, device):
    given = leaves("ordinary", device, 7, 20, shared=shared)
    given64 = tuple(map(double, given))
    kl, kl64 = (
        f(t[0], t[1], groups, prior=t[2:]) for f, t in ((aevb.gaussian_kl, given), (reference.gaussian_kl, given64))
    )
    close_by_magnitude(kl, kl64, kl64)
    g = upstream(9, kl)
    for a, e in zip(gradients(kl, given, g), gradients(kl64, given64, double(g)), strict=True):
        close_by_magnitude(a, e, e.abs() + e.abs().max())


def test_layouts(device):
    """Halves of one output, transposed, expanded: the bits of contiguous tensors."""
    mu, logvar, *prior = (t.to(device) for t in tensors("ordinary", 7, 20))
    expected = aevb.sample_gaussian(mu, logvar, prior=tuple(prior), seed=SEED)
    for layout in (
        lambda a, b: torch.cat([a, b], -1).chunk(2, -1),
        lambda a, b: (a.mT.contiguous().mT, b.mT.contiguous().mT),
        lambda a, b: (torch.stack([a, a])[1], torch.cat([b.new_zeros(1), b.flatten()])[1:].view(b.shape)),
    ):
        found = aevb.sample_gaussian(*layout(mu, logvar), prior=layout(*prior), seed=SEED)
        assert all(map(same_bits, found, expected))
    row = (prior[0][0], prior[1][0])
    once = aevb.sample_gaussian(mu, logvar, prior=row, seed=SEED)
    assert all(
        map(same_bits, once, aevb.sample_gaussian(mu, logvar, prior=tuple(t.expand(7, 20) for t in row), seed=SEED))
    )


@pytest.mark.parametrize("prior_dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_of_the_prior(dtype, prior_dtype, device):
    mu, logvar, *prior = tensors("ordinary", 7, 20, shared=True)
    mu, logvar = leaf(mu, device, dtype), leaf(logvar, device, dtype)
    prior = tuple(leaf(t, device, prior_dtype) for t in prior)
    kl = aevb.gaussian_kl(mu, logvar, prior=prior)
    assert same_bits(kl, aevb.gaussian_kl(mu, logvar, prior=tuple(t.float() for t in prior)))
    assert all(g.dtype == prior_dtype for g in gradients(kl, prior, upstream(9, kl)))


def test_empty(device):
    for shape in ((0, 5), (3, 0)):
        given = leaves("ordinary", device, *shape, shared=True)
        kl = aevb.gaussian_kl(*given[:2], prior=given[2:])
        z, ratio = aevb.sample_gaussian_log_ratio(*given[:2], 3, prior=given[2:], seed=SEED)
        assert (kl == 0).all()
        for g in (*gradients(kl, given, kl), *gradients((z, ratio), given, (z, ratio))):
            assert (g == 0).all()
    given = leaves("ordinary", device, 7, 20)
    outputs = aevb.sample_gaussian_log_ratio(*given[:2], 0, prior=given[2:], seed=SEED)
    assert all((g == 0).all() for g in gradients(outputs, given, outputs))


def test_bits():
    """Of every instruction set, and any number of threads; a shared prior's gradients too."""

    def results():
        for size, num_samples in [((7, 20), None), ((1000, 41), 3), ((5, 257), 40), ((3, 40_003), 2)]:
            for shared in (False, True):
                given = leaves("ordinary", "cpu", *size, shared=shared)
                for gradient in GRADIENTS if num_samples else GRADIENTS[:2]:
                    options = {"prior": given[2:], "seed": SEED, "logvar_range": (-1.0, 1.5)}
                    out = aevb.sample_gaussian_log_ratio(*given[:2], num_samples, gradient=gradient, **options)
                    yield from (*out, *gradients(out, given, [upstream(i, o) for i, o in enumerate(out)]))
                out = aevb.sample_gaussian(*given[:2], num_samples, prior=given[2:], seed=SEED)
                yield from (*out, *gradients(out, given, [upstream(i, o) for i, o in enumerate(out)]))

    check_every_isa(results)


def test_the_standard_normal_prior(device):
    """Given as such it has the bits of none, but for a log ratio's gradient by logvar, which is summed otherwise."""
    mu, logvar = (leaf(t, device) for t in tensors("ordinary", 7, 20)[:2])
    zero = torch.zeros(20, device=device)
    for gradient in (None, *GRADIENTS):
        f = aevb.sample_gaussian if gradient is None else aevb.sample_gaussian_log_ratio
        options = {"seed": SEED} | ({} if gradient is None else {"gradient": gradient})
        results = []
        for prior in (None, (zero, zero)):
            out = f(mu, logvar, 5, prior=prior, **options)
            results.append([*out, *gradients(out, (mu, logvar), [upstream(i, o) for i, o in enumerate(out)])])
        if gradient is not None:
            torch.testing.assert_close(results[0].pop(), results[1].pop(), rtol=1e-5, atol=1e-5)
        assert all(map(same_bits, *results))


# ---- the range of logvar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [(-30.0, 20.0), (-0.5, 0.75), (-math.inf, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("with_prior", [False, True])
def test_range_is_clamp(with_prior, limits, dtype, device):
    """The bits of torch.clamp and the op behind it, on the boundary and for NaN too."""
    mu, logvar, *prior = tensors("ordinary", 40, 33)
    logvar = 30 * logvar
    for row, value in enumerate(
        (*limits, math.nan, math.inf, -math.inf, *(math.nextafter(b, 99.0) for b in limits if b > -math.inf))
    ):
        logvar[row, ::2] = value
    mu, logvar = leaf(mu, device, dtype), leaf(logvar, device, dtype)
    prior = tuple(leaf(t, device) for t in prior) if with_prior else None
    given = (mu, logvar, *(prior or ()))
    for name, options in (
        ("gaussian_kl", {}),
        ("sample_gaussian", {"num_samples": 3, "seed": SEED}),
        *(("sample_gaussian_log_ratio", {"num_samples": 3, "seed": SEED, "gradient": g}) for g in GRADIENTS),
    ):
        results = []
        for v, more in ((logvar, {"logvar_range": limits}), (logvar.clamp(*limits), {})):
            out = getattr(aevb, name)(mu, v, prior=prior, **options, **more)
            out = (out,) if isinstance(out, torch.Tensor) else out
            results.append([*out, *gradients(out, given, [upstream(i, o) for i, o in enumerate(out)])])
        assert all(map(same_bits, *results)), name


def test_a_diffusers_posterior(device):
    """diffusers' DiagonalGaussianDistribution: moments of an encoder, clamped to (-30, 20)."""
    moments = leaf(9 * randn(1, 2, 8, 4, 4), device)
    mu, logvar = moments.chunk(2, 1)
    z, kl = aevb.sample_gaussian(mu, logvar, batch_dims=1, logvar_range=(-30.0, 20.0), seed=SEED)
    m, v = double(mu), double(logvar).clamp(-30.0, 20.0)
    close_by_magnitude(kl, 0.5 * (m.pow(2) + v.exp() - 1.0 - v).sum([1, 2, 3]), kl.cpu().double())
    eps = reference.normal(SEED, tuple(mu.shape))
    close_by_magnitude(z, m + torch.exp(0.5 * v) * eps, m.abs() + (torch.exp(0.5 * v) * eps).abs())


# ---- what the loss makes of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.1}, {"free_bits": 0.1, "groups": 4}, {"estimator": "stl"}])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss(options, shared, device):
    given = leaves("ordinary", device, 7, 20, shared=shared)
    given64 = tuple(map(double, given))
    logits, x = randn(8, 7, 9).to(device), rand(9, 7, 9).to(device)
    criterion, twin = (c(logvar_range=(-1.0, 1.0), **options) for c in (FusedELBO, reference.FusedELBO))
    _, kl = criterion.sample(*given[:2], prior=given[2:], seed=SEED)
    _, kl64 = twin.sample(*given64[:2], prior=given64[2:], seed=SEED)
    loss, loss64 = criterion(logits, x, kl=kl), twin(double(logits), double(x), kl=kl64)
    torch.testing.assert_close(loss.cpu().double(), loss64, rtol=1e-6, atol=0)
    for a, e in zip(gradients(loss, given, None), gradients(loss64, given64, None), strict=True):
        close_by_magnitude(a, e, e.abs() + e.abs().max())


# ---- sentences ------------------------------------------------------------------------------------------------------

MU, LOGVAR = randn(1, 6, 5), randn(2, 6, 5)


@pytest.mark.parametrize(
    ("prior", "sentence"),
    [
        (MU, r"prior is a tensor of shape \(6, 5\); expected a pair of tensors, \(prior_mu, prior_logvar\)"),
        ((MU, LOGVAR, MU), "expected a pair of tensors"),
        ((MU, MU.int()), "prior_logvar has dtype int32; expected a floating dtype"),
        ((MU[:3], LOGVAR), r"prior_mu has shape \(3, 5\) and mu \(6, 5\); expected a shape that broadcasts to mu's"),
        ((MU, LOGVAR[0, :4]), r"prior_logvar has shape \(4,\) and mu \(6, 5\)"),
        ((MU.expand(3, 6, 5), LOGVAR), r"prior_mu has shape \(3, 6, 5\).*Flatten the samples into the batch"),
    ],
)
def test_priors_that_do_not_fit(prior, sentence):
    for call in (
        lambda: aevb.gaussian_kl(MU, LOGVAR, prior=prior),
        lambda: aevb.sample_gaussian(MU, LOGVAR, 3, prior=prior),
        lambda: aevb.sample_gaussian_log_ratio(MU, LOGVAR, 3, prior=prior),
        lambda: FusedELBO(free_bits=0.1).sample(MU, LOGVAR, prior=prior),
        lambda: reference.gaussian_kl(MU, LOGVAR, prior=prior),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_a_prior_of_something_else():
    with pytest.raises(TypeError, match=r"aevb.gaussian_kl: prior_logvar is a float; expected a torch.Tensor"):
        aevb.gaussian_kl(MU, LOGVAR, prior=(MU, 0.0))


@pytest.mark.parametrize("limits", [(1.0, -1.0), (math.nan, 1.0), (0.0, math.nan), 3.0, (1.0,), (0.0, 1.0, 2.0)])
def test_ranges_that_are_none(limits):
    for call in (
        lambda: aevb.gaussian_kl(MU, LOGVAR, logvar_range=limits),
        lambda: aevb.sample_gaussian(MU, LOGVAR, logvar_range=limits),
        lambda: aevb.sample_gaussian_log_ratio(MU, LOGVAR, logvar_range=limits),
        lambda: FusedELBO(logvar_range=limits),
        lambda: reference.FusedELBO(logvar_range=limits),
        lambda: reference.gaussian_kl(MU, LOGVAR, logvar_range=limits),
    ):
        with pytest.raises(ValueError, match="logvar_range is "):
            call()


def test_ranges_in_other_words():
    kl = aevb.gaussian_kl(MU, LOGVAR, logvar_range=(-1.0, 1.0))
    assert same_bits(kl, aevb.gaussian_kl(MU, LOGVAR, logvar_range=[-1, torch.tensor(1.0)]))


def test_dreg_of_a_prior_that_depends_on_another_latent():
    """Bauer & Mnih 2021: DReG is of a prior with parameters of its own."""
    options = {"gradient": "doubly_reparameterized", "seed": SEED}
    other = randn(5, 6, 5).requires_grad_()
    for f in (aevb.sample_gaussian_log_ratio, reference.sample_gaussian_log_ratio):
        for prior in ((other.sin(), LOGVAR), (MU, other.exp())):
            with pytest.raises(ValueError, match="parameters of its own"):
                f(MU, LOGVAR, 3, prior=prior, **options)
            with pytest.raises(ValueError, match="parameters of its own"):
                FusedELBO(estimator="dreg", num_samples=3).sample(MU, LOGVAR, prior=prior)
            f(MU, LOGVAR, 3, prior=tuple(t.detach() for t in prior), **options)
            f(MU, LOGVAR, 3, prior=prior, gradient="total", seed=SEED)
        f(MU, LOGVAR, 3, prior=(other, LOGVAR), **options)  # parameters of each datapoint's own
        f(MU, LOGVAR, 3, prior=(other[0].sin(), other[:1].exp()), **options)  # and of all
        with torch.no_grad():
            f(MU, LOGVAR, 3, prior=(other.sin(), LOGVAR), **options)
