"""Values and gradients against float64: relative 1e-6 of the sum of the magnitudes of the terms that make a result.

The terms are those that no formula can avoid: the pixels' log-likelihoods and the dimensions' KLs (each of one sign),
mu and sd eps. So a KL is accurate relative to itself however small it is, and the gradient of a hard target to its last
digits.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, HALF_DTYPES, close_by_magnitude, rand, randn, same_bits

import aevb
from aevb import reference

WIDTHS = [1, 20, 33, 512, 784, 4096]
SEED = 20131220


def leaf(t, device="cpu", dtype=torch.float32):
    return t.to(device, dtype).requires_grad_()


def double(t):
    return t.detach().cpu().double().requires_grad_(t.requires_grad)


def upstream(seed, like):
    """An upstream gradient: random, of both signs, never 1."""
    return (3 * randn(seed, *like.shape)).to(like.device, like.dtype)


def gradients(outputs, inputs, grads):
    return torch.autograd.grad(outputs, inputs, grads)


# ---- the Gaussian posterior -----------------------------------------------------------------------------------------


def latents(kind, *size):
    """mu and logvar."""
    if kind == "ordinary":
        return randn(1, *size), randn(2, *size)
    if kind == "wide":
        return 100 * randn(1, *size), 160 * rand(2, *size) - 80
    if kind == "near the prior":
        return 1e-4 * randn(1, *size), 1e-4 * randn(2, *size)
    mu, logvar = CONSTANTS[kind]
    return torch.full(size, mu), torch.full(size, logvar)


CONSTANTS = {"constant": (0.1, 0.7), "narrow": (3.3, -80.0), "broad": (-0.3, 80.0), "constant near": (1e-5, 3e-4)}
LATENT_KINDS = ["ordinary", "wide", "near the prior", *CONSTANTS]


def check_sample(mu, logvar, num_samples, seed=SEED):
    z, kl = aevb.sample_gaussian(mu, logvar, num_samples, seed=seed)
    m, v = double(mu), double(logvar)
    z64, kl64 = reference.sample_gaussian(m, v, num_samples, seed=seed)
    assert z.dtype == mu.dtype
    assert kl.dtype == torch.float32
    sd_eps = (z64 - m).detach().abs()
    close_by_magnitude(z, z64, m.abs() + sd_eps)
    close_by_magnitude(kl, kl64, kl64)

    gz, gkl = upstream(3, z), upstream(4, kl)
    grad_mu, grad_logvar = gradients((z, kl), (mu, logvar), (gz, gkl))
    expected_mu, expected_logvar = gradients((z64, kl64), (m, v), (double(gz), double(gkl)))
    gz, gkl, samples = double(gz).abs(), double(gkl).abs().unsqueeze(-1), (0,) if num_samples else ()
    through_z, through_logvar = gz, 0.5 * gz * sd_eps
    if samples:
        through_z, through_logvar = gz.sum(0), through_logvar.sum(0)
    close_by_magnitude(grad_mu, expected_mu, through_z + gkl * m.abs())
    close_by_magnitude(grad_logvar, expected_logvar, through_logvar + gkl * 0.5 * torch.expm1(v).abs())


@pytest.mark.parametrize("num_samples", [None, 1, 5])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_sample_gaussian(kind, width, num_samples, device):
    mu, logvar = latents(kind, 7, width)
    check_sample(leaf(mu, device), leaf(logvar, device), num_samples)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_samples", [None, 4])
@pytest.mark.parametrize("width", [1, 20, 1000])
def test_sample_gaussian_in_half_precision(dtype, num_samples, width, device):
    check_sample(leaf(randn(1, 9, width), device, dtype), leaf(2 * randn(2, 9, width), device, dtype), num_samples)


@pytest.mark.parametrize("num_samples", [64, 1000, 5000])
def test_gradients_through_many_samples(num_samples, device):
    mu, logvar = leaf(randn(1, 3, 4), device), leaf(randn(2, 3, 4), device)
    check_sample(mu, logvar, num_samples)
    z, _ = aevb.sample_gaussian(mu, logvar, num_samples, seed=SEED)
    (grad_mu,) = gradients(z, mu, torch.full_like(z, 0.1))  # the same sum for a constant: the worst case for rounding
    expected = torch.full_like(grad_mu, torch.tensor(0.1).item(), dtype=torch.float64) * num_samples
    close_by_magnitude(grad_mu, expected, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_gaussian_kl(kind, width, device):
    mu, logvar = (leaf(t, device) for t in latents(kind, 7, width))
    m, v = double(mu), double(logvar)
    kl, kl64 = aevb.gaussian_kl(mu, logvar), reference.gaussian_kl(m, v)
    close_by_magnitude(kl, kl64, kl64)
    g = upstream(5, kl)
    expected = gradients(kl64, (m, v), double(g))
    for actual, e in zip(gradients(kl, (mu, logvar), g), expected, strict=True):
        close_by_magnitude(actual, e, e)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_gaussian_kl_in_half_precision(dtype, device):
    mu, logvar = leaf(randn(1, 9, 300), device, dtype), leaf(2 * randn(2, 9, 300), device, dtype)
    m, v = double(mu), double(logvar)
    kl, kl64 = aevb.gaussian_kl(mu, logvar), reference.gaussian_kl(m, v)
    close_by_magnitude(kl, kl64, kl64)
    g = upstream(5, kl)
    expected = gradients(kl64, (m, v), double(g))
    for actual, e in zip(gradients(kl, (mu, logvar), g), expected, strict=True):
        close_by_magnitude(actual, e, e)


def test_one_dimension_anywhere(device):
    """Nothing to hide behind: rows of one element, mu = 0, logvar through all of [-80, 80]."""
    wide, narrow, tiny = (
        torch.linspace(-80, 80, 200_001),
        torch.linspace(-2, 2, 400_001),
        torch.logspace(-6, 0, 100_001),
    )
    logvar = torch.cat([wide, narrow, tiny])
    logvar = leaf(logvar[logvar.abs() > 1e-6].unsqueeze(-1), device)
    v = double(logvar)
    kl = aevb.gaussian_kl(torch.zeros_like(logvar), logvar)
    kl64 = reference.gaussian_kl(torch.zeros_like(v), v)
    close_by_magnitude(kl, kl64, kl64)
    g = upstream(6, kl)
    (actual,), (expected,) = gradients(kl, logvar, g), gradients(kl64, v, double(g))
    close_by_magnitude(actual, expected, expected)


# ---- the Bernoulli likelihood ---------------------------------------------------------------------------------------


def targets(kind, *size):
    """x and x_scale."""
    u = rand(8, *size)
    return {
        "hard": lambda: ((u < 0.4).float(), None),
        "soft": lambda: (u, None),
        "bool": lambda: (u < 0.4, None),
        "pixels": lambda: ((256 * u).to(torch.uint8), 1 / 255),
        "bits": lambda: ((u < 0.4).to(torch.uint8), 1),
        "scaled": lambda: (16 * u, 1 / 16),
        "bfloat16": lambda: (u.bfloat16(), None),
        "float16": lambda: (u.half(), None),
    }[kind]()


TARGET_KINDS = ["hard", "soft", "bool", "pixels", "bits", "scaled", "bfloat16", "float16"]


def logits_of(kind, *size):
    if kind == "ordinary":
        return 3 * randn(7, *size)
    if kind == "wide":
        return 2e4 * rand(7, *size) - 1e4
    if kind == "every scale":
        return randn(7, *size).sign() * 10 ** (8 * rand(9, *size) - 4)
    return torch.full(size, float(kind))


LOGIT_KINDS = ["ordinary", "wide", "every scale", "0", "0.3", "-0.3", "-5", "17", "-1e4", "1e4"]


def exact(logits, x, x_scale):
    """-log p of each element, and d log p / d logit as a difference of two terms: float64, nothing cancels."""
    x = x.cpu().double() * (1 if x_scale is None else x_scale)
    tail = torch.log1p(torch.exp(-logits.abs()))
    softplus, softplus_minus = logits.clamp_min(0) + tail, (-logits).clamp_min(0) + tail
    return x * softplus_minus + (1 - x) * softplus, x * torch.sigmoid(-logits), (1 - x) * torch.sigmoid(logits), x


def check_log_prob(logits, x, x_scale):
    log_prob = aevb.bernoulli_log_prob(logits, x, x_scale)
    l64 = double(logits)
    losses, up, down, x64 = (t.detach() for t in exact(l64, x, x_scale))
    rounded_x = x_scale not in (None, 1)  # x_scale * x is then a rounded number, and its magnitude counts
    magnitudes = losses + (x64 * l64.abs() if rounded_x else 0)
    assert log_prob.dtype == torch.float32
    close_by_magnitude(log_prob, -losses.sum(-1), magnitudes.sum(-1))
    expected = reference.bernoulli_log_prob(l64, x.cpu(), x_scale)
    torch.testing.assert_close(expected, -losses.sum(-1), rtol=1e-12, atol=1e-9)

    g = upstream(10, log_prob)
    (actual,) = gradients(log_prob, logits, g)
    (e,) = gradients(expected, l64, double(g))
    g = double(g).unsqueeze(-1)
    torch.testing.assert_close(e, g * (up - down), rtol=1e-9, atol=1e-14)
    close_by_magnitude(actual, g * (up - down), g.abs() * (up + down + (x64 if rounded_x else 0)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", TARGET_KINDS)
@pytest.mark.parametrize("logits", LOGIT_KINDS)
def test_bernoulli_log_prob(logits, kind, width, device):
    x, x_scale = targets(kind, 5, width)
    check_log_prob(leaf(logits_of(logits, 5, width), device), x.to(device), x_scale)


@pytest.mark.parametrize("x", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("logit", [-1e4, -80.0, -17.1, -3.3, -0.1, 0.1, 0.7, 2.9, 13.3, 80.0, 1e4])
def test_constant_rows(logit, x, device):
    """All roundings of a sum of equal terms may go the same way."""
    for width in (31, 500, 784, 2047, 4096):
        check_log_prob(leaf(torch.full((2, width), logit), device), torch.full((2, width), x, device=device), None)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_bernoulli_log_prob_in_half_precision(dtype, kind, device):
    for width in (1, 33, 784):
        x, x_scale = targets(kind, 5, width)
        check_log_prob(leaf(4 * randn(7, 5, width), device, dtype), x.to(device), x_scale)


def probabilities(*size):
    p = torch.sigmoid(6 * randn(11, *size))
    at = rand(12, *size)
    p = torch.where(at < 0.05, torch.tensor(0.0), torch.where(at > 0.95, torch.tensor(1.0), p))
    return torch.where((at > 0.4) & (at < 0.45), 10 ** (-44 * rand(13, *size)), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_from_probabilities(kind, width, dtype, device):
    x, x_scale = targets(kind, 5, width)
    probs = leaf(probabilities(5, width), device, dtype)
    p, kl = double(probs), rand(14, 5)
    loss = aevb.FusedELBO(0.7, "none", from_probs=True, x_scale=x_scale)(probs, x.to(device), kl=kl.to(device))
    x64 = x.double() * (1 if x_scale is None else x_scale)
    rounded_x = x_scale not in (None, 1)
    logs = -torch.log(p).clamp_min(-100), -torch.log1p(-p).clamp_min(-100)
    losses = F.binary_cross_entropy(p, x64, reduction="none")
    magnitudes = losses + (x64 * (logs[0] + logs[1]) if rounded_x else 0)
    plain = reference.FusedELBO(0.7, "none", from_probs=True, x_scale=x_scale)
    expected = plain(p, x, kl=kl.double())
    torch.testing.assert_close(expected, losses.sum(-1) + 0.7 * kl.double(), rtol=1e-12, atol=1e-12)
    close_by_magnitude(loss, expected, magnitudes.sum(-1) + 0.7 * kl)
    g = upstream(15, loss)
    (actual,), (e,) = gradients(loss, probs, g), gradients(expected, p, double(g))
    slope = double(g).abs().unsqueeze(-1) / (p * (1 - p)).clamp_min(1e-12)
    close_by_magnitude(actual, e, e.abs() + (slope * x64 if rounded_x else 0))


# ---- the Gaussian likelihood ----------------------------------------------------------------------------------------


def gaussian_decoder(kind, *size):
    """mean, or its logit, and logvar."""
    mean, logvar = 2 * randn(31, *size), 1.5 * randn(32, *size)
    if kind == "wide":
        return mean, 160 * rand(33, *size) - 80
    if kind == "every scale":
        return mean.sign() * 10 ** (6 * rand(34, *size) - 3), logvar
    if kind == "close":  # to targets of half
        return 0.5 + 1e-4 * mean, -18 + logvar
    if kind in GAUSSIAN_CONSTANTS:
        return tuple(torch.full(size, value) for value in GAUSSIAN_CONSTANTS[kind])
    return mean, logvar


GAUSSIAN_CONSTANTS = {"0, 0": (0.0, 0.0), "0.3, 0.7": (0.3, 0.7), "-3.3, -5": (-3.3, -5.1), "17, 30": (17.0, 30.0)}
GAUSSIAN_KINDS = ["ordinary", "wide", "every scale", "close", *GAUSSIAN_CONSTANTS]


def check_gaussian(mean, x, logvar, x_scale, sigmoid):
    """logvar is a tensor or a number."""
    log_prob = aevb.gaussian_log_prob(mean, x, logvar, x_scale, sigmoid=sigmoid)
    learned = isinstance(logvar, torch.Tensor)
    m, v = double(mean), double(logvar) if learned else logvar
    expected = reference.gaussian_log_prob(m, x.cpu(), v, x_scale, sigmoid=sigmoid)

    x64 = x.cpu().double() * (1 if x_scale is None else x_scale)
    rounded = x64.abs() if x_scale not in (None, 1) else torch.zeros_like(x64)
    residual, slope, v64 = x64 - m.detach(), 1.0, torch.as_tensor(v, dtype=torch.float64).detach()
    if sigmoid:  # as a difference of terms that lose nothing
        nearest, tail = (m.detach() > 0).double(), torch.sigmoid(-m.detach().abs())
        residual, slope = (x64 - nearest) + torch.where(m.detach() > 0, tail, -tail), tail * (1 - tail)
        rounded = rounded + (x64 - nearest).abs() + tail
    precision = torch.exp(-v64)
    square = residual**2 * precision
    squares = square + (2 * residual.abs() + 1e-6 * rounded) * rounded * precision
    terms = 0.5 * (squares + v64.abs() + math.log(2 * math.pi))
    exact = -0.5 * (square + v64 + math.log(2 * math.pi))
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(expected, exact.sum(-1), rtol=1e-11, atol=1e-9)
    close_by_magnitude(log_prob, exact.sum(-1), terms.sum(-1))

    g = upstream(35, log_prob)
    found = gradients(log_prob, (mean, logvar) if learned else (mean,), g)
    of_reference = gradients(expected, (m, v) if learned else (m,), double(g))
    g = double(g).unsqueeze(-1)
    of_mean = g * residual * precision * slope
    torch.testing.assert_close(of_reference[0], of_mean, rtol=1e-7, atol=1e-12)
    slope = slope.clamp_min(2.0**-126) if sigmoid else slope  # below it float32 has fewer digits
    close_by_magnitude(found[0], of_mean, g.abs() * (residual.abs() + rounded) * precision * slope)
    if learned:
        close_by_magnitude(found[1], g * 0.5 * (square - 1), g.abs() * 0.5 * (squares + 1))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", TARGET_KINDS)
@pytest.mark.parametrize("kind", GAUSSIAN_KINDS)
def test_gaussian_log_prob(kind, target, width, sigmoid, device):
    x, x_scale = targets(target, 5, width)
    mean, logvar = (leaf(t, device) for t in gaussian_decoder(kind, 3, 5, width))
    check_gaussian(mean, x.to(device), logvar, x_scale, sigmoid)
    check_gaussian(mean, x.to(device), logvar.detach().flatten()[0].item(), x_scale, sigmoid)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("logvar_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_log_prob_in_any_dtypes(dtype, logvar_dtype, sigmoid, device):
    for target in TARGET_KINDS:
        x, x_scale = targets(target, 5, 41)
        mean, logvar = gaussian_decoder("ordinary", 5, 41)
        mean, logvar = leaf(mean, device, dtype), leaf(logvar, device, logvar_dtype)
        check_gaussian(mean, x.to(device), logvar, x_scale, sigmoid)


@pytest.mark.parametrize("x", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("logit", [-80.0, -17.1, -3.3, -0.1, 0.1, 2.9, 13.3, 80.0])
def test_gaussian_constant_rows(logit, x, device):
    for width in (31, 784, 4096):
        target = torch.full((2, width), x, device=device)
        for logvar in (-9.3, 0.0, 0.7):
            for sigmoid in (False, True):
                check_gaussian(leaf(torch.full((2, width), logit), device), target, logvar, None, sigmoid)


def test_gaussian_of_unscaled_targets_far_from_0(device):
    """x and mean of a thousand, a unit apart: nothing is lost in their difference."""
    mean = (1000 + torch.arange(41.0) / 7).expand(3, 41)
    x = (mean + randn(36, 3, 41)).to(device)
    check_gaussian(leaf(mean, device), x, leaf(randn(37, 3, 41), device), None, False)


def test_infinite_logits_of_gaussian_means(device):
    """Means that are exactly 0 and 1: finite, with no slope."""
    inf = float("inf")
    logits = leaf(torch.tensor([[inf, -inf, inf, -inf, 200.0, -200.0]]), device)
    x, logvar = torch.tensor([[1.0, 0.0, 0.3, 0.3, 0.5, 1.0]], device=device), leaf(randn(38, 1, 6), device)
    for v in (logvar, -0.7):
        log_prob = aevb.gaussian_log_prob(logits, x, v, sigmoid=True)
        hard = (logits > 0).float()
        torch.testing.assert_close(log_prob, aevb.gaussian_log_prob(hard, x, v), rtol=0, atol=0)
        (grad,) = torch.autograd.grad(log_prob, logits, torch.full_like(log_prob, 3), retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(grad))
    (grad,) = torch.autograd.grad(aevb.gaussian_log_prob(logits, x, logvar, sigmoid=True).sum(), logvar)
    assert grad.isfinite().all()


def test_gaussian_variances_at_the_ends(device):
    """What is met exactly costs logvar alone, however narrow it is; beyond the range of float32, the reference's
    infinities."""
    logvar = leaf(torch.tensor([[-150.0], [-170.0], [-300.0], [-1e30], [80.0], [1e30], [float("inf")]]), device)
    zero = leaf(torch.zeros_like(logvar), device)
    log_prob = aevb.gaussian_log_prob(zero, torch.zeros_like(logvar), logvar)
    v = double(logvar)
    expected = -0.5 * (v + math.log(2 * math.pi))
    close_by_magnitude(log_prob, expected.squeeze(-1), expected.squeeze(-1))
    grad_mean, grad_logvar = gradients(log_prob, (zero, logvar), torch.full_like(log_prob, 3))
    assert torch.equal(grad_mean, torch.zeros_like(grad_mean))
    assert torch.equal(grad_logvar, torch.full_like(grad_logvar, -1.5))
    off = aevb.gaussian_log_prob(zero, torch.ones_like(logvar), logvar)
    assert torch.equal(off.isinf().cpu(), torch.tensor([True, True, True, True, False, False, True]))


@pytest.mark.parametrize("width", [1, 5, 33, 600])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("which", ["mean", "x", "logvar"])
def test_a_nan_stays_in_its_row_of_the_gaussian_likelihood(which, sigmoid, width, device):
    batch, row = 12, 5
    clean = {"mean": randn(1, batch, width), "x": rand(2, batch, width), "logvar": randn(3, batch, width)}
    dirty = {**clean, which: rows_with(float("nan"), clean[which], row)}
    others = torch.arange(batch) != row
    results = []
    for inputs in (clean, dirty):
        mean, logvar, x = (leaf(inputs[n], device) for n in ("mean", "logvar", "x"))
        log_prob = aevb.gaussian_log_prob(mean, x.detach(), logvar, sigmoid=sigmoid)
        grads = gradients(log_prob, (mean, logvar), upstream(4, log_prob))
        results.append([t.detach().cpu() for t in (log_prob, *grads)])
    for before, after in zip(*results, strict=True):
        assert same_bits(before[others], after[others])
    log_prob, *grads = results[1]
    assert log_prob[row].isnan()
    assert [grad[row].isnan().sum() for grad in grads] == [1, 1]


# ---- the negative ELBO ----------------------------------------------------------------------------------------------


def check_elbo(batch, samples, datapoint, latent, *, with_kl, reduction, from_probs, kind, dtype, beta, device):
    x, x_scale = targets(kind, *batch, *datapoint)
    recon = 3 * randn(7, *samples, *batch, *datapoint)
    recon = leaf(torch.sigmoid(recon) if from_probs else recon, device, dtype)
    mu, logvar = leaf(randn(1, *batch, latent), device, dtype), leaf(randn(2, *batch, latent), device, dtype)
    options = {"beta": beta, "reduction": reduction, "from_probs": from_probs, "x_scale": x_scale}
    fused = aevb.FusedELBO(**options, batch_dims=len(batch)).to(device)
    plain = reference.FusedELBO(**options)
    r, m, v = double(recon), double(mu), double(logvar)
    if with_kl:
        kl = leaf(5 * rand(16, *batch), device)
        k = double(kl)
        loss, expected = fused(recon, x.to(device), kl=kl), plain(r, x, kl=k)
        inputs, inputs64 = (recon, kl), (r, k)
    else:
        k = reference.gaussian_kl(m, v)
        loss, expected = fused(recon, x.to(device), mu, logvar), plain(r, x, m, v)
        inputs, inputs64 = (recon, mu, logvar), (r, m, v)
    x64 = (x.double() * (1 if x_scale is None else x_scale)).reshape(*batch, -1)
    rows = r.detach().reshape(-1, *x64.shape)
    rounded_x = x_scale not in (None, 1)
    if from_probs:
        losses = F.binary_cross_entropy(rows, x64.expand_as(rows), reduction="none")
        of_x = torch.logit(rows).abs()
    else:
        losses, of_x = exact(rows, x64, None)[0], rows.abs()
    losses = losses + (x64 * of_x if rounded_x else 0)
    per_datapoint = float(beta) * k.detach() + losses.sum(-1).mean(0)
    reduce = {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}[reduction]
    assert loss.dtype == torch.float32
    close_by_magnitude(loss, expected.double(), reduce(per_datapoint))

    g = upstream(17, loss)
    actual, expected_grads = gradients(loss, inputs, g), gradients(expected, inputs64, double(g).to(expected.dtype))
    for i, (a, e) in enumerate(zip(actual, expected_grads, strict=True)):
        magnitudes = e.abs()
        if i == 0 and not from_probs:  # x sigma(-l) and (1 - x) sigma(l)
            weight = (double(g).abs() if reduction == "none" else double(g).abs().expand(batch)) / rows.shape[0]
            weight = weight / (max(k.numel(), 1) if reduction == "mean" else 1)
            _, up, down, _ = exact(rows, x64, None)
            magnitudes = (weight.unsqueeze(-1) * (up + down + (x64 if rounded_x else 0))).reshape(e.shape)
        elif i == 0 and rounded_x:
            p = rows.reshape(e.shape)
            scaled = x64.expand_as(rows).reshape(e.shape)
            magnitudes = e.abs() * (1 + scaled / (scaled - p).abs().clamp_min(1e-30))
        close_by_magnitude(a, e, magnitudes)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("from_probs", [False, True])
@pytest.mark.parametrize("kind", TARGET_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_elbo(reduction, with_kl, from_probs, kind, dtype, device):
    options = {"with_kl": with_kl, "reduction": reduction, "from_probs": from_probs, "kind": kind, "dtype": dtype}
    check_elbo((11,), (), (784,), 20, beta=0.37, device=device, **options)
    check_elbo((3, 2), (5,), (1, 6, 7), 3, beta=torch.tensor(1.3), device=device, **options)


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("batch", "samples", "datapoint", "latent"),
    [
        ((), (), (1,), 1),
        ((), (3,), (50,), 2),
        ((1,), (1,), (4096,), 4096),
        ((4,), (2, 3), (33,), 5),
        ((3,), (64,), (17,), 2),
        ((2,), (3000,), (5,), 2),
        ((5000,), (), (3,), 2),
        ((7,), (3,), (2, 5, 2), 1),
    ],
)
def test_fused_elbo_shapes(batch, samples, datapoint, latent, reduction, with_kl, device):
    options = {"with_kl": with_kl, "reduction": reduction, "from_probs": False, "kind": "soft", "dtype": torch.float32}
    check_elbo(batch, samples, datapoint, latent, beta=0.37, device=device, **options)


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_fused_elbo_with_large_logits(x, device):
    recon = leaf(logits_of("wide", 2, 50, 784), device)
    mu, logvar = (leaf(t, device) for t in latents("wide", 50, 40))
    target = torch.full((50, 784), x, device=device)
    loss = aevb.FusedELBO(beta=1e-30)(recon, target, mu, logvar)
    expected = reference.FusedELBO(beta=1e-30)(double(recon), target.cpu().double(), double(mu), double(logvar))
    close_by_magnitude(loss, expected, expected)
    g = upstream(18, loss)
    for grad in gradients(loss, (recon, mu, logvar), g):
        assert grad.isfinite().all()


# ---- beyond the range of float32, and NaN ---------------------------------------------------------------------------


def test_the_same_infinities_as_the_reference(device):
    mu = torch.tensor([[0.0, 1e30], [1.0, 2.0], [0.0, 0.0], [-1e30, 0.0], [0.0, 0.0], [1e38, 1.0]])
    logvar = torch.tensor([[0.0, 0.0], [100.0, 0.0], [200.0, 3.0], [200.0, -200.0], [-1e30, 0.0], [1000.0, -1000.0]])
    mu, logvar = leaf(mu, device), leaf(logvar, device)
    m, v = double(mu), double(logvar)
    for fused, plain in [
        (aevb.gaussian_kl(mu, logvar), reference.gaussian_kl(m, v)),
        (aevb.sample_gaussian(mu, logvar, seed=9)[0], reference.sample_gaussian(m, v, seed=9)[0]),
    ]:
        assert fused.isinf().any()
        close_by_magnitude(fused, plain, plain.abs() + m.abs().sum())
        g = upstream(19, fused)
        for actual, expected in zip(
            torch.autograd.grad(fused, (mu, logvar), g, allow_unused=True),
            torch.autograd.grad(plain, (m, v), double(g), allow_unused=True),
            strict=True,
        ):
            close_by_magnitude(actual, expected, expected)


def test_the_same_infinite_log_probs_as_the_reference(device):
    logits = torch.tensor([[3e38, 3e38, 1.0], [-3e38, -3e38, 2.0], [3e38, -3e38, 0.0], [1e4, 2e38, -1e4]])
    logits = leaf(logits, device)
    for x in (torch.zeros(4, 3), torch.ones(4, 3), torch.full((4, 3), 0.5)):
        log_prob = aevb.bernoulli_log_prob(logits, x.to(device))
        expected = reference.bernoulli_log_prob(double(logits), x)
        close_by_magnitude(log_prob, expected, expected)
        g = upstream(20, log_prob)
        (actual,) = gradients(log_prob, logits, g)
        _, up, down, _ = exact(double(logits).detach(), x, None)
        close_by_magnitude(actual, double(g).unsqueeze(-1) * (up - down), double(g).unsqueeze(-1) * (up + down))


def test_infinite_logits(device):
    """-inf where the reference says so; where its own formula gives NaN, nothing is asked."""
    logits = torch.tensor([float("inf"), -float("inf")]).repeat_interleave(3).unsqueeze(-1)
    x = torch.tensor([0.0, 0.5, 1.0]).repeat(2).unsqueeze(-1)
    expected = reference.bernoulli_log_prob(logits.double(), x)
    actual = aevb.bernoulli_log_prob(logits.to(device), x.to(device)).cpu().double()
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])


def rows_with(bad, clean, row):
    dirty = clean.clone()
    dirty[..., row, clean.shape[-1] // 2] = bad
    return dirty


@pytest.mark.parametrize("width", [1, 5, 20, 33, 600])
@pytest.mark.parametrize("which", ["mu", "logvar"])
def test_a_nan_stays_in_its_row_of_latents(which, width, device):
    batch, row = 40, 17
    clean = {"mu": randn(1, batch, width), "logvar": randn(2, batch, width)}
    dirty = {**clean, which: rows_with(float("nan"), clean[which], row)}
    others = torch.arange(batch) != row
    results = []
    for inputs in (clean, dirty):
        mu, logvar = (leaf(inputs[name], device) for name in ("mu", "logvar"))
        z, kl = aevb.sample_gaussian(mu, logvar, seed=1)
        grads = gradients((z, kl), (mu, logvar), (upstream(3, z), upstream(4, kl)))
        results.append([t.detach().cpu() for t in (z, kl, aevb.gaussian_kl(mu, logvar), *grads)])
    for before, after in zip(*results, strict=True):
        assert same_bits(before[others], after[others])
    z, kl, kl_alone, *grads = results[1]
    assert z[row].isnan().sum() == 1
    assert kl[row].isnan()
    assert kl_alone[row].isnan()
    assert grads[which == "logvar"][row].isnan().sum() == 1


@pytest.mark.parametrize("width", [1, 5, 20, 33, 600])
@pytest.mark.parametrize("from_probs", [False, True])
@pytest.mark.parametrize("which", ["recon", "x"])
def test_a_nan_stays_in_its_row_of_the_likelihood(which, from_probs, width, device):
    batch, row = 12, 5
    clean = {"recon": torch.sigmoid(randn(1, batch, width)), "x": rand(2, batch, width)}
    dirty = {**clean, which: rows_with(float("nan"), clean[which], row)}
    others = torch.arange(batch) != row
    results = []
    for inputs in (clean, dirty):
        recon, kl = leaf(inputs["recon"], device), leaf(rand(3, batch), device)
        losses = aevb.FusedELBO(reduction="none", from_probs=from_probs, validate_args=False)(
            recon, inputs["x"].to(device), kl=kl
        )
        results.append([t.detach().cpu() for t in (losses, *gradients(losses, (recon, kl), upstream(4, losses)))])
    for before, after in zip(*results, strict=True):
        assert same_bits(before[others], after[others])
    losses, grad_recon, grad_kl = results[1]
    assert losses[row].isnan()
    assert grad_recon[row].isnan().sum() == 1
    assert not grad_kl.isnan().any()


@pytest.mark.parametrize("which", ["recon", "mu", "logvar"])
def test_a_nan_in_the_mean_loss_leaves_the_other_gradients_finite(which, device):
    inputs = {"recon": randn(1, 9, 50), "mu": randn(2, 9, 5), "logvar": randn(3, 9, 5)}
    inputs[which] = rows_with(float("nan"), inputs[which], 4)
    leaves = [leaf(t, device) for t in inputs.values()]
    loss = aevb.FusedELBO()(leaves[0], rand(4, 9, 50).to(device), *leaves[1:])
    assert loss.isnan()
    for name, grad in zip(inputs, gradients(loss, leaves, torch.full_like(loss, -2.5)), strict=True):
        bad = grad.isnan()
        assert bad.sum() == (name == which)
        assert bad[4].sum() == bad.sum()
