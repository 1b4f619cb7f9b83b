"""The estimators: log q(z|x) - log p(z) of samples against float64, bounds and their gradients against what is known of
them in closed form or by numerical integration, and the loss by each of them against a twin in plain PyTorch."""

import copy
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import DTYPES, HALF_DTYPES, check_every_isa, close_by_magnitude, rand, randn, same_bits
from linear_gaussian import LinearGaussian
from test_accuracy import WIDTHS, double, gradients, latents, leaf, upstream

import aevb
from aevb import FusedELBO, LinearLogits, reference

SEED = 20131220
KINDS = ["ordinary", "wide", "near the prior"]
GRADIENTS = ["total", "path", "doubly_reparameterized"]
ESTIMATORS = ["sgvb-b", "sgvb-a", "stl", "iwae", "dreg"]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def weighs(estimator):
    """Whether it weighs samples against each other."""
    return estimator in ("iwae", "dreg")


@functools.cache
def noise(*size):
    """The noise of SEED, float64."""
    return reference.normal(SEED, size)


def close(actual, expected, rtol=2e-5):
    """The worst error against the largest element: for what goes through sums of PyTorch's own."""
    expected = expected.detach()
    assert actual.shape == expected.shape
    error = (actual.detach().cpu().double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= rtol * largest, f"error {error:.3g}, of {largest:.3g}; allowed {rtol:.3g} of it"


# ---- log q(z|x) - log p(z) ------------------------------------------------------------------------------------------


def upstream_of_ratio(gradient, log_ratio):
    """Of either sign, never 1; for the doubly reparameterized gradient weights times a number a datapoint."""
    if gradient != "doubly_reparameterized":
        return upstream(4, log_ratio)
    weights = torch.softmax(2 * randn(4, *log_ratio.shape), 0) * 3 * randn(5, *log_ratio.shape[1:])
    return weights.to(log_ratio.device)


def check_log_ratio(mu, logvar, num_samples, gradient):
    z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=gradient, seed=SEED)
    assert same_bits(z, aevb.sample_gaussian(mu, logvar, num_samples, seed=SEED)[0])
    assert log_ratio.dtype == torch.float32
    m, v = double(mu), double(logvar)
    eps = noise(*z.shape)
    z64, ratio64 = reference.sample_gaussian_log_ratio(m, v, num_samples, gradient=gradient, eps=eps)
    # z - eps = mu + (sd - 1) eps, and z^2 - eps^2 is that times (that + 2 eps): nothing of it is as large as z^2.
    with torch.no_grad():
        sd, less_1 = torch.exp(0.5 * v), torch.expm1(0.5 * v)
        difference = m + less_1 * eps
        two_ratio = (difference * (difference + 2 * eps)).abs() + v.abs()
        slope = sd if gradient == "total" else less_1 - torch.expm1(-0.5 * v)
        of_z = m.abs() + (slope * eps).abs()
    close_by_magnitude(log_ratio, ratio64, 0.5 * two_ratio.sum(-1))

    gz, g = upstream(3, z), upstream_of_ratio(gradient, log_ratio)
    for grad_z in (gz, torch.zeros_like(gz)):
        actual = torch.autograd.grad((z, log_ratio), (mu, logvar), (grad_z, g), retain_graph=True)
        grads64 = double(grad_z), double(g)
        expected = torch.autograd.grad((z64, ratio64), (m, v), grads64, retain_graph=True)
        with torch.no_grad():
            g64, through_z = double(g).unsqueeze(-1), double(grad_z).abs()
            if gradient == "doubly_reparameterized":
                weight = g64 / g64.sum(0)
                g64, through_z = weight * g64, weight * through_z
            through_z = through_z + g64.abs() * of_z
            through_logvar = sd * eps.abs() * through_z + (g64.abs() if gradient == "total" else 0)
            if num_samples is not None:
                through_z, through_logvar = through_z.sum(0), through_logvar.sum(0)
        close_by_magnitude(actual[0], expected[0], through_z)
        close_by_magnitude(actual[1], expected[1], 0.5 * through_logvar)
    return two_ratio, z64


def takes(gradient, num_samples):
    return num_samples is not None or gradient != "doubly_reparameterized"


@each_gradient
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_ratio(kind, width, gradient, device):
    for num_samples in (None, 1, 5, 40):
        if takes(gradient, num_samples):
            mu, logvar = latents(kind, 3 if width > 500 else 7, width)
            two_ratio, z64 = check_log_ratio(leaf(mu, device), leaf(logvar, device), num_samples, gradient)
            if kind == "near the prior":
                assert two_ratio.sum() < 1e-3 * z64.square().sum()


@each_gradient
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_log_ratio_in_half_precision(kind, dtype, gradient, device):
    for width in (1, 33, 784):
        for num_samples in (None, 5):
            if takes(gradient, num_samples):
                mu, logvar = latents(kind, 3, width)
                check_log_ratio(leaf(mu, device, dtype), leaf(logvar, device, dtype), num_samples, gradient)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_log_ratio_is_that_of_z_before_it_is_rounded(dtype, device):
    mu, logvar = (randn(i, 9, 33).to(device, dtype) for i in (1, 2))
    z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, seed=SEED)
    assert torch.equal(log_ratio, aevb.sample_gaussian_log_ratio(mu.float(), logvar.float(), seed=SEED)[1])
    rounded = 0.5 * (double(z).square() - noise(9, 33).square() - double(logvar)).sum(-1)
    assert ((rounded - double(log_ratio)).abs() > 1e-4).any()


@each_gradient
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_samples", [1000, 5000])
def test_gradients_through_many_samples(num_samples, dtype, gradient, device):
    mu, logvar = leaf(randn(1, 3, 4), device, dtype), leaf(randn(2, 3, 4), device, dtype)
    check_log_ratio(mu, logvar, num_samples, gradient)


@pytest.mark.parametrize("kind", ["ordinary", "near the prior"])
def test_the_mean_log_ratio_is_the_kl(kind, device):
    mu, logvar = (t.to(device) for t in latents(kind, 7, 5))
    _, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, 40_000, seed=SEED)
    kl = reference.gaussian_kl(double(mu), double(logvar))
    if kind == "near the prior":  # 1e-8, of ratios of 1e-4
        assert (log_ratio.double().std(0).cpu() > 1e3 * kl).all()
    check_mean(log_ratio, kl, at_least=0.0 if kind == "near the prior" else 20.0)


@each_gradient
def test_no_weight_at_all(gradient, device):
    """Where nothing flows into the ratios of a datapoint, weights are 0 and not NaN."""
    mu, logvar = (leaf(randn(i, 3, 5), device) for i in (1, 2))
    z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, 7, gradient=gradient, seed=SEED)
    g = upstream_of_ratio(gradient, log_ratio)
    g[:, 1] = 0
    actual = gradients((z, log_ratio), (mu, logvar), (torch.zeros_like(z), g))
    for grad in actual:
        assert (grad[1] == 0).all()
        assert (grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_ratio_has_the_same_bits(dtype):
    """From every instruction set and any number of threads, infinities and NaNs too."""

    def results():
        for size, num_samples in [((7, 20), None), ((700, 41), None), ((5, 257), 40), ((2, 4097), 3), ((1, 40_003), 2)]:
            mu, logvar = randn(1, *size), 2 * randn(2, *size)
            if size[0] > 2:  # and rows without
                mu[0, -1], logvar[-1, 0] = math.inf, math.nan
            mu, logvar = leaf(mu, dtype=dtype), leaf(logvar, dtype=dtype)
            for gradient in GRADIENTS:
                if takes(gradient, num_samples):
                    outputs = aevb.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=gradient, seed=SEED)
                    grads = upstream(3, outputs[0]), upstream_of_ratio(gradient, outputs[1])
                    yield from (*outputs, *gradients(outputs, (mu, logvar), grads))

    check_every_isa(results)


# ---- bounds of a model of which all is known ------------------------------------------------------------------------


def check_mean(draws, expected, at_least=20.0):
    """Asserts that the mean over the first dimension is `expected` within 4.5 standard errors, and that, somewhere,
    the expected is `at_least` so many of them: otherwise anything would pass."""
    draws, expected = draws.detach().cpu().double(), expected.detach()
    error = draws.std(0) / math.sqrt(len(draws))
    off = ((draws.mean(0) - expected) / error).abs()
    assert off.max() < 4.5, f"{off.max():.2f} standard errors"
    assert (expected.abs() / error).max() > at_least


def log_prob_and_ratio(model, x, estimator, num_samples, draws, seed=SEED):
    """log p(x|z), (samples, draws, datapoints), and what `FusedELBO.sample` calls kl."""
    mu, logvar = (t.expand(draws, *t.shape) for t in model.encode(x))
    z, kl = FusedELBO(estimator=estimator, num_samples=num_samples).sample(mu, logvar, seed=seed)
    return model.log_prob(x, z), kl


def bound(estimator):
    return aevb.importance_weighted_bound if weighs(estimator) else aevb.elbo


@pytest.fixture(scope="module")
def model():
    """A model whose encoder is off."""
    return LinearGaussian().perturb(0.15)


def data(model, n=4):
    return model.sample(n, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("beta", [1.0, 0.3, torch.tensor(1.7)])
def test_bounds_by_hand(beta, device):
    log_prob, log_ratio, kl = 700 * randn(1, 5, 3, 2), 9 * randn(2, 5, 3, 2), 9 * rand(3, 3, 2)
    log_weight = (log_prob.double() - beta * log_ratio.double()).numpy()
    by_hand = {
        "b": log_prob.double().mean(0) - beta * kl.double(),
        "a": torch.from_numpy(log_weight.mean(0)),
        "weighted": torch.from_numpy(np.logaddexp.reduce(log_weight) - math.log(5)),
    }
    beta = beta.to(device) if isinstance(beta, torch.Tensor) else beta
    log_prob, log_ratio, kl = (t.to(device) for t in (log_prob, log_ratio, kl))
    for found, expected in [
        (aevb.elbo(log_prob, kl, beta), by_hand["b"]),
        (aevb.elbo(log_prob, log_ratio, beta), by_hand["a"]),
        (aevb.importance_weighted_bound(log_prob, log_ratio, beta), by_hand["weighted"]),
    ]:
        assert found.dtype == torch.float32
        close_by_magnitude(found, expected, log_prob.abs().mean(0) + log_ratio.abs().mean(0) + kl.abs())


def closed_form_elbo(model, x):
    """log p(x) - KL(q(z|x) || p(z|x)), and that KL."""
    mean, variance = model.posterior(x)
    mu, logvar = (t.double() for t in model.encode(x))
    two_gap = (logvar.exp() + (mu - mean) ** 2) / variance - 1 - logvar + variance.log()
    return model.log_marginal(x) - 0.5 * two_gap.sum(-1), 0.5 * two_gap.sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize("estimator", ["sgvb-b", "sgvb-a", "stl"])
def test_the_elbo_is_unbiased(estimator, num_samples, model):
    x = data(model)
    expected, gap = closed_form_elbo(model, x)
    draws = aevb.elbo(*log_prob_and_ratio(model, x, estimator, num_samples, 20_000))
    assert draws.shape == (20_000, 4)
    check_mean(draws, expected)
    assert (gap > 10 * draws.double().std(0) / math.sqrt(20_000)).all()  # it is not log p(x)


@torch.no_grad()
def test_the_importance_weighted_bound_grows_towards_log_p(model):
    x, draws = data(model), 3000
    bounds = {k: aevb.importance_weighted_bound(*log_prob_and_ratio(model, x, "iwae", k, draws, k)) for k in (1, 5, 50)}
    check_mean(bounds[1], closed_form_elbo(model, x)[0])
    assert torch.equal(bounds[1], aevb.elbo(*log_prob_and_ratio(model, x, "sgvb-a", 1, draws, 1)))
    means = [b.double().mean(0) for b in bounds.values()] + [model.log_marginal(x)]
    errors = [b.double().std(0) / math.sqrt(draws) for b in bounds.values()] + [torch.tensor(0.0)]
    for i in range(3):
        assert (means[i + 1] - means[i] > 3 * (errors[i] + errors[i + 1])).all()
    assert (means[3] - means[2] < 0.1 * (means[3] - means[0])).all()


@torch.no_grad()
@each_estimator
def test_at_the_true_posterior(estimator):
    """One sample tells log p(x); with the KL in closed form it does so on average."""
    model = LinearGaussian()
    x = data(model)
    log_p = model.log_marginal(x)
    draws = bound(estimator)(*log_prob_and_ratio(model, x, estimator, 5, 3000)).double()
    if estimator == "sgvb-b":
        check_mean(draws, log_p)
        assert (draws.std(0) > 0.1).all()
    else:
        assert (draws - log_p).abs().max() < 3e-6 * log_p.abs().max()


def test_values_do_not_depend_on_the_gradient(model):
    x = data(model)
    a, path, iwae, dreg = (bound(e)(*log_prob_and_ratio(model, x, e, 5, 10)) for e in ("sgvb-a", "stl", "iwae", "dreg"))
    assert torch.equal(a, path)
    assert torch.equal(iwae, dreg)
    assert (iwae > a).all()


# ---- gradients against numerical integration ------------------------------------------------------------------------


def hermite(points):
    """Nodes and weights of an expectation over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def grid(dimensions, points):
    """(points ** dimensions, dimensions) and weights."""
    nodes, weights = hermite(points)
    return (
        torch.cartesian_prod(*[nodes] * dimensions).reshape(-1, dimensions),
        torch.cartesian_prod(*[weights] * dimensions).reshape(-1, dimensions).prod(-1),
    )


class Integrated:
    """One datapoint of 7 pixels, its posterior in `latent_dim` dimensions, and a linear Bernoulli decoder."""

    def __init__(self, latent_dim):
        self.mu, self.logvar = 0.8 + 0.1 * randn(1, latent_dim), 0.3 + 0.1 * randn(2, latent_dim)
        self.weight, self.bias, self.x = 1.5 * randn(3, 7, latent_dim), randn(4, 7), rand(5, 7)

    def gradients(self, num_samples, beta, points):
        """Of the bound's expectation by mu and logvar; with num_samples None, of the ELBO."""
        mu, logvar, weight, bias, x = (double(t) for t in (self.mu, self.logvar, self.weight, self.bias, self.x))
        mu.requires_grad_()
        logvar.requires_grad_()
        D = len(mu)
        eps, probability = grid(D * (num_samples or 1), points)
        eps = eps.unflatten(-1, (num_samples or 1, D)).transpose(0, 1)
        z, log_ratio = reference.sample_gaussian_log_ratio(
            mu.expand(eps.shape[1:]), logvar.expand(eps.shape[1:]), len(eps), eps=eps
        )
        log_prob = reference.linear_bernoulli_log_prob(z, weight, bias, x)
        if num_samples is None:
            expected = (probability * log_prob[0]).sum() - beta * reference.gaussian_kl(mu, logvar)
        else:
            expected = (probability * reference.importance_weighted_bound(log_prob, log_ratio, beta)).sum()
        return torch.autograd.grad(expected, (mu, logvar))

    def estimates(self, criterion, draws, upstream, linear):
        """(draws, latent_dim) each, of the loss's gradients by mu and logvar."""
        mu, logvar = (t.expand(draws, -1).clone().requires_grad_() for t in (self.mu, self.logvar))
        z, kl = criterion.sample(mu, logvar, seed=SEED)
        recon = LinearLogits(z, self.weight, self.bias)
        loss = criterion(recon if linear else recon.materialize(), self.x.expand(draws, -1), kl=kl)
        return gradients(loss, (mu, logvar), torch.tensor(upstream))


def check_expected_gradient(estimator, latent_dim, num_samples, linear=False, beta=0.7):
    case = Integrated(latent_dim)
    of_bound = num_samples if weighs(estimator) else None
    expected = case.gradients(of_bound, beta, 40)
    for e, other in zip(expected, case.gradients(of_bound, beta, 60), strict=True):
        torch.testing.assert_close(e, other, rtol=1e-4, atol=0)
    criterion = FusedELBO(beta, "sum", estimator=estimator, num_samples=num_samples)
    for draws, e in zip(case.estimates(criterion, 60_000, -1.7, linear), expected, strict=True):
        check_mean(draws, 1.7 * e)


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("estimator", ["sgvb-b", "sgvb-a", "stl"])
def test_expected_gradient_of_the_elbo(estimator, latent_dim, num_samples):
    check_expected_gradient(estimator, latent_dim, num_samples)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_expected_gradient_of_the_importance_weighted_bound(estimator, linear):
    check_expected_gradient(estimator, 1, 2, linear, beta=1.0)


def test_the_two_bounds_have_different_gradients():
    """So that the tests above tell them apart."""
    elbo, weighted = (Integrated(1).gradients(num_samples, 1.0, 40) for num_samples in (None, 2))
    for a, b in zip(elbo, weighted, strict=True):
        assert (a - b).abs() > 0.1 * b.abs()


def encoder_gradients(model, x, estimator, num_samples, draws):
    """(draws, datapoints, 2 * latent_dim)."""
    mu, logvar = (t.detach().expand(draws, *t.shape).clone().requires_grad_() for t in model.encode(x))
    z, kl = FusedELBO(estimator=estimator, num_samples=num_samples).sample(mu, logvar, seed=SEED)
    value = bound(estimator)(model.log_prob(x, z), kl)
    return torch.cat(gradients(value, (mu, logvar), torch.full_like(value, -1.7)), -1).double()


@pytest.mark.parametrize("num_samples", [1, 5])
def test_gradients_at_the_true_posterior(num_samples):
    """There the path derivative is zero for every sample, and that of Tucker et al. too; the others are noise."""
    model = LinearGaussian()
    x = data(model)
    for estimator in ESTIMATORS:
        found = encoder_gradients(model, x, estimator, num_samples, 300)
        if estimator in ("stl", "dreg"):
            assert found.abs().max() < 1e-4
        else:
            assert (found.std(0) > 0.1).all()


def signal_to_noise(model, x, estimator, num_samples):
    found = encoder_gradients(model, x, estimator, num_samples, 10_000)[:, 0]
    return (found.mean(0).norm() / found.var(0).sum().sqrt()).item()


def test_signal_to_noise():
    """IWAE's falls as the square root of the samples (Rainforth et al. 2018), DReG's does not (Tucker et al. 2018)."""
    model = LinearGaussian().perturb(0.02)
    x = data(model, 1)
    iwae, dreg = ([signal_to_noise(model, x, e, k) for k in (1, 10, 100)] for e in ("iwae", "dreg"))
    assert iwae[0] > 2 * iwae[1] > 4 * iwae[2]
    assert dreg[0] < dreg[1] < dreg[2] / 1.5
    assert all(d > 10 * i for d, i in zip(dreg, iwae, strict=True))


# ---- the doubly reparameterized gradient, by hand -------------------------------------------------------------------


def doubly_reparameterized(mu, logvar, eps, log_prob_of, beta, g):
    """sum_k w_k^2 d log weight_k / dz dz / d(mu, logvar), for normalised weights w (Tucker et al. 2018, eq. 8)."""
    sd = torch.exp(0.5 * logvar)
    z = (mu + sd * eps).requires_grad_()
    log_q = -0.5 * ((z - mu) / sd).square().sum(-1) - 0.5 * logvar.sum(-1)  # of constants mu and logvar
    log_weight = log_prob_of(z) + beta * (-0.5 * z.square().sum(-1) - log_q)
    (slope,) = torch.autograd.grad(log_weight.sum(), z)
    weight = torch.softmax(log_weight.detach(), 0)
    of_z = (g * weight**2).unsqueeze(-1) * slope
    return of_z.sum(0), (of_z * 0.5 * sd * eps).sum(0)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("num_samples", [1, 6, 50])
def test_dreg_by_hand(num_samples, beta, device):
    B, D = 5, 3
    mu, logvar = leaf(randn(1, B, D), device), leaf(0.5 * randn(2, B, D), device)
    centre, g = randn(3, B, D), 3 * randn(4, B)

    def log_prob_of(z):  # no likelihood of the library's
        return -(z - centre.to(z)).square().sum(-1) + torch.cos(3 * z).sum(-1)

    z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient="doubly_reparameterized", seed=SEED)
    value = aevb.importance_weighted_bound(log_prob_of(z), log_ratio, beta)
    actual = gradients(value, (mu, logvar), g.to(device))
    m, v = double(mu).detach(), double(logvar).detach()
    expected = doubly_reparameterized(m, v, noise(num_samples, B, D), log_prob_of, beta, double(g))
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_dreg_of_the_loss_by_hand(reduction, beta, linear, as_tensor, device):
    """beta = 0, where a warm-up begins, too: there the weights are those of log p(x|z) alone."""
    B, D, num_samples = 5, 3, 9
    mu, logvar = leaf(randn(1, B, D), device), leaf(0.5 * randn(2, B, D), device)
    weight, bias, x = randn(3, 28, D), randn(4, 28), (rand(5, B, 28) < 0.4).float()
    criterion = FusedELBO(
        torch.tensor(beta) if as_tensor else beta, reduction, estimator="dreg", num_samples=num_samples
    ).to(device)
    z, kl = criterion.sample(mu, logvar, seed=SEED)
    logits = LinearLogits(z, weight.to(device), bias.to(device))
    loss = criterion(logits if linear else logits.materialize(), x.to(device), kl=kl)
    g = 3 * randn(6, *loss.shape)
    actual = gradients(loss, (mu, logvar), g.to(device))

    def log_prob_of(z):
        return reference.linear_bernoulli_log_prob(z, weight.double(), bias.double(), x)

    m, v = double(mu).detach(), double(logvar).detach()
    g64 = -double(g).expand(B) / (B if reduction == "mean" else 1)
    expected = doubly_reparameterized(m, v, noise(num_samples, B, D), log_prob_of, beta, g64)
    limit = doubly_reparameterized(m, v, noise(num_samples, B, D), log_prob_of, beta + 1e-12, g64)
    for a, e, other in zip(actual, expected, limit, strict=True):
        close(a, e, 3e-5)
        close(a, other, 3e-5)


# ---- the loss -------------------------------------------------------------------------------------------------------


class Decoder:
    """h = tanh(A z) and a linear layer to 28 pixels, of the leaves A, weight and bias."""

    def __init__(self, latent_dim, device, hidden=9):
        numbers = randn(31, hidden, latent_dim), 2 * randn(32, 28, hidden), randn(33, 28)
        self.leaves = [leaf(t, device) for t in numbers]

    def double(self):
        other = copy.copy(self)
        other.leaves = [double(t) for t in self.leaves]
        return other

    def __call__(self, z):
        A, weight, bias = self.leaves
        return LinearLogits(torch.tanh(z @ A.t()), weight, bias)


def probabilities(logits):
    """None so near 1 that its distance from 1 is lost to float32."""
    return 0.02 + 0.96 * torch.sigmoid(logits)


def targets(kind, *batch):
    """x (*batch, 1, 4, 7) and x_scale."""
    u = rand(34, *batch, 1, 4, 7)
    return {
        "soft": lambda: (u, None),
        "bool": lambda: (u < 0.4, None),
        "uint8": lambda: ((256 * u).to(torch.uint8), 1 / 255),
    }[kind]()


def check_loss(estimator, reduction, recon, kind, *, num_samples, beta, batch, device, latent_dim=3):
    x, x_scale = targets(kind, *batch)
    mu, logvar = leaf(randn(35, *batch, latent_dim), device), leaf(0.5 * randn(36, *batch, latent_dim), device)
    decoder, from_probs = Decoder(latent_dim, device), recon == "probs"
    options = {"num_samples": num_samples, "from_probs": from_probs, "x_scale": x_scale, "estimator": estimator}
    options |= {} if batch else {"batch_dims": 0}
    criterion = FusedELBO(beta, reduction, **options, validate_args=kind == "soft").to(device)
    twin = reference.FusedELBO(float(beta), reduction, **options)

    z, kl = criterion.sample(mu, logvar, seed=SEED)
    logits = decoder(z)
    output = logits if recon == "linear" else logits.materialize()
    loss = criterion(probabilities(output) if from_probs else output, x.to(device), kl=kl)
    m, v, decoder64 = double(mu), double(logvar), decoder.double()
    z64, kl64 = twin.sample(m, v, eps=noise(*z.shape))
    assert kl.shape == kl64.shape
    output64 = decoder64(z64).materialize()
    loss64 = twin(probabilities(output64) if from_probs else output64, x, kl=kl64)
    assert loss.dtype == torch.float32
    close(loss, loss64, 3e-6)

    g = upstream(37, loss)
    actual = gradients(loss, (mu, logvar, *decoder.leaves), g)
    for a, e in zip(actual, gradients(loss64, (m, v, *decoder64.leaves), double(g)), strict=True):
        close(a, e)


@pytest.mark.parametrize("kind", ["soft", "bool", "uint8"])
@pytest.mark.parametrize("recon", ["tensor", "linear", "probs"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_estimator
def test_loss(estimator, reduction, recon, kind, device):
    check_loss(estimator, reduction, recon, kind, num_samples=5, beta=0.37, batch=(7,), device=device)
    check_loss(estimator, reduction, recon, kind, num_samples=1, beta=torch.tensor(1.3), batch=(3, 2), device=device)
    if not weighs(estimator):
        for batch, beta in [((7,), torch.tensor(0.37)), ((3, 2), 1.3), ((), 0.8)]:
            check_loss(estimator, reduction, recon, kind, num_samples=None, beta=beta, batch=batch, device=device)


def test_decoder_gradients_of_dreg_are_those_of_iwae(device):
    x = targets("soft", 7)[0].to(device)
    for linear in (False, True):
        found = []
        for estimator in ("iwae", "dreg"):
            mu, logvar, decoder = leaf(randn(35, 7, 3), device), leaf(randn(36, 7, 3), device), Decoder(3, device)
            criterion = FusedELBO(0.7, estimator=estimator, num_samples=11)
            z, kl = criterion.sample(mu, logvar, seed=SEED)
            z.retain_grad()
            logits = decoder(z)
            (-1.7 * criterion(logits if linear else logits.materialize(), x, kl=kl)).backward()
            found.append([t.grad for t in (*decoder.leaves, z, mu, logvar)])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            if i < 4:  # z's too: it is weighted on its way to mu
                assert same_bits(a, b)
            else:
                assert not torch.allclose(a, b, rtol=0.1)


@pytest.mark.parametrize("linear", [False, True])
@each_estimator
def test_a_learned_beta(estimator, linear, device):
    """The gradient of the loss by beta, against differences."""
    x, decoder = targets("soft", 7)[0].to(device), Decoder(3, device)
    mu, logvar = randn(35, 7, 3).to(device), randn(36, 7, 3).to(device)

    def loss_of(beta):
        criterion = FusedELBO(beta, estimator=estimator, num_samples=4).to(device)
        z, kl = criterion.sample(mu, logvar, seed=SEED)
        logits = decoder(z)
        return criterion(logits if linear else logits.materialize(), x, kl=kl)

    beta, step = leaf(torch.tensor(0.7), device), 2.0**-6
    (actual,) = gradients(loss_of(beta), beta, torch.tensor(-1.7, device=device))
    difference = (loss_of(0.7 + step) - loss_of(0.7 - step)).detach() / (2 * step)
    torch.testing.assert_close(actual, -1.7 * difference, rtol=1e-3, atol=0)


# ---- free bits, capacity, warm-ups ----------------------------------------------------------------------------------


def check_batch_loss(penalty, kl_groups, device, **options):
    """`penalty` is of the KL's mean over the batch, (kl_groups,) or a number, in float64. Returns mu's gradient."""
    scale = torch.tensor([0.1, 1.5, 0.2, 0.05, 1.0, 2.0])  # dimensions of small and of large KL
    result = None
    for batch in ((11,), (3, 2), ()):
        mu, logvar = (leaf(s * randn(i, *batch, 6) * scale, device) for i, s in [(41, 1), (42, 0.5)])
        m, v = double(mu), double(logvar)
        kl64 = reference.gaussian_kl(m, v, kl_groups)
        penalty64 = penalty(kl64.flatten(0, len(batch) - 1).mean(0) if batch else kl64)
        expected_grads = gradients(penalty64, (m, v), torch.tensor(-1.7 * 0.6).double())
        x, h = targets("soft", *batch)[0], randn(43, 5, *batch, 9)
        weight, bias = randn(44, 28, 9), randn(45, 28)
        log_prob = reference.linear_bernoulli_log_prob(h.double(), weight.double(), bias.double(), x.flatten(-3))
        expected = 0.6 * penalty64 - log_prob.mean()
        logits = LinearLogits(h.to(device), weight.to(device), bias.to(device))
        for reduction in ("none", "mean", "sum"):
            criterion = FusedELBO(0.6, reduction, num_samples=5, batch_dims=len(batch), **options)
            _, kl = criterion.sample(mu, logvar, seed=SEED)
            for recon in (logits, logits.materialize()):
                for given in ({"kl": kl}, {"mu": mu, "logvar": logvar}):
                    loss = criterion(recon, x.to(device), **given)
                    assert loss.shape == (batch if reduction == "none" else ())
                    loss = loss.sum() / math.prod(batch) if reduction == "sum" else loss.mean()
                    close(loss, expected, 3e-6)
                    g = torch.tensor(-1.7, device=device)
                    actual = torch.autograd.grad(loss, (mu, logvar), g, retain_graph=True)
                    for a, e in zip(actual, expected_grads, strict=True):
                        close(a, e)
                        assert torch.equal(a.cpu() == 0, e == 0)
        result = actual[0] if result is None else result
    return result


def test_free_bits_of_dimensions(device):
    grad = check_batch_loss(lambda kl: kl.clamp_min(0.3).sum(), 6, device, free_bits=0.3)
    assert (grad == 0).all(0).tolist() == [True, False, True, True, False, False]
    assert not (grad[:, [1, 4, 5]] == 0).any()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_free_bits_of_groups(groups, device):
    nats = {1: 0.4, 2: 1.6, 3: 0.3}[groups]
    grad = check_batch_loss(lambda kl: kl.clamp_min(nats).sum(), groups, device, free_bits=nats, groups=groups)
    free = {1: [False], 2: [True, False], 3: [False, True, False]}[groups]
    assert (grad == 0).unflatten(-1, (groups, -1)).all(-1).all(0).tolist() == free


def test_no_free_bits(device):
    check_batch_loss(lambda kl: kl.sum(), 6, device, free_bits=0.0)
    grad = check_batch_loss(lambda kl: kl.clamp_min(50).sum() + 0 * kl.sum(), 6, device, free_bits=50.0)
    assert (grad == 0).all()


@pytest.mark.parametrize("nats", [0.0, 4.0, 25.0])  # below all datapoints, among them, above
def test_capacity(nats, device):
    check_batch_loss(lambda kl: (kl - nats).abs(), None, device, capacity=nats)
    check_batch_loss(lambda kl: (kl - nats).abs(), None, device, capacity=torch.tensor(nats))
    check_batch_loss(
        lambda kl: (kl.clamp_min(0.3).sum() - nats).abs(), 6, device, free_bits=0.3, capacity=nats, groups=6
    )


def test_capacity_pulls_towards_itself():
    """Steps down the gradient of the loss bring the mean KL to the capacity from either side."""
    for start in (0.1, 3.0):
        mu = leaf(torch.full((5, 2), start))
        criterion = FusedELBO(capacity=1.5)
        for _ in range(400):
            loss = criterion(torch.zeros(5, 3), torch.zeros(5, 3), mu, torch.zeros(5, 2))
            mu.data -= 0.05 * gradients(loss, mu, torch.tensor(0.9))[0]
        assert abs(aevb.gaussian_kl(mu, torch.zeros(5, 2)).mean() - 1.5) < 0.05


def test_linear_warmup():
    steps = [-7, 0, 1, 4, 7, 8, 9, 10**9]
    assert [aevb.linear_warmup(s, 8) for s in steps] == [0, 0, 0.125, 0.5, 0.875, 1, 1, 1]
    assert [aevb.linear_warmup(s, 8, start=3, end=-1) for s in steps] == [3, 3, 2.5, 1, -0.5, -1, -1, -1]
    assert [aevb.linear_warmup(s, 0, end=0.7) for s in (0, 1)] == [0.7, 0.7]
    beta = torch.tensor(0.0)
    criterion = FusedELBO(beta=beta)
    criterion.beta.fill_(aevb.linear_warmup(3, 8))
    assert beta == 0.375


def test_cyclical_warmup():
    ramp = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [aevb.cyclical_warmup(s, 32) for s in range(33)] == ramp * 4 + [1]
    assert [aevb.cyclical_warmup(s, 16, cycles=2) for s in (-5, 0, 15, 16, 10**9)] == [0, 0, 1, 1, 1]
    sawtooth = [s / 8 for s in range(8)]
    assert [aevb.cyclical_warmup(s, 24, cycles=3, ratio=1.0) for s in range(25)] == sawtooth * 3 + [1]
    assert [aevb.cyclical_warmup(s, 24, ratio=0.0) for s in range(25)] == [1] * 25
    scaled = [0.5 - 0.25 * b for b in ramp]
    assert [aevb.cyclical_warmup(s, 16, cycles=2, start=0.5, end=0.25) for s in range(16)] == scaled * 2
    for steps, cycles in [(100, 7), (10_007, 4), (33, 10)]:  # corners between steps
        found = [aevb.cyclical_warmup(s, steps, cycles=cycles) for s in range(steps)]
        assert found[0] == 0
        assert sum(b < a for a, b in itertools.pairwise(found)) == cycles - 1
        assert all(0 <= b <= 1 for b in found)
        assert sum(b == 1 for b in found) == pytest.approx(steps / 2, abs=cycles)


# ---- the contract with PyTorch --------------------------------------------------------------------------------------


def step_of(estimator):
    """A function of mu, logvar and the decoder's leaves to a number: the loss of a Tensor and of a LinearLogits."""
    criterion = FusedELBO(0.7, estimator=estimator, num_samples=3)
    x, seed = targets("soft", 4)[0], torch.tensor(SEED)

    def step(mu, logvar, A, weight, bias):
        z, kl = criterion.sample(mu, logvar, seed=seed)
        logits = LinearLogits(torch.tanh(z @ A.t()), weight, bias)
        return -1.7 * criterion(logits.materialize(), x, kl=kl) + 0.6 * criterion(logits, x, kl=kl)

    inputs = leaf(randn(51, 4, 2)), leaf(0.5 * randn(52, 4, 2)), *Decoder(2, "cpu").leaves
    return step, inputs, torch.autograd.grad(step(*inputs), inputs)


def check_gradients(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@each_estimator
def test_compile(estimator):
    torch._dynamo.reset()
    step, inputs, expected = step_of(estimator)
    backend = "inductor" if estimator == "dreg" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    check_gradients(torch.autograd.grad(compiled(*inputs), inputs), expected)


@each_estimator
def test_func_grad(estimator):
    step, inputs, expected = step_of(estimator)
    check_gradients(torch.func.grad(step, tuple(range(len(inputs))))(*inputs), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "dreg", "num_samples": 5, "beta": torch.tensor(0.3), "reduction": "sum", "x_scale": 0.5},
        {"free_bits": 0.3, "groups": 3, "capacity": torch.tensor(2.5)},
        {"estimator": "stl", "beta": 0.3, "reduction": "none", "validate_args": True},
    ],
)
def test_copies(options, copied):
    criterion = FusedELBO(**options)
    other = copied(criterion)
    assert repr(other) == repr(criterion)
    assert {k: v for k, v in vars(other).items() if k[0] != "_"} == {
        k: v for k, v in vars(criterion).items() if k[0] != "_"
    }
    mu, logvar, x = randn(1, 7, 6), randn(2, 7, 6), targets("soft", 7)[0]
    losses = []
    for c in (criterion, other):
        z, kl = c.sample(mu, logvar, seed=SEED)
        losses.append(c(Decoder(6, "cpu")(z), x, kl=kl))
    assert torch.equal(*losses)
    if isinstance(criterion.beta, torch.Tensor):
        other.beta.fill_(0.9)
        assert criterion.beta == options["beta"]


def test_repr():
    assert repr(FusedELBO()) == "FusedELBO(beta=1.0, reduction='mean')"
    shown = repr(FusedELBO(torch.tensor(0.25), "sum", estimator="iwae", num_samples=5))
    assert shown == "FusedELBO(beta=tensor(0.25), reduction='sum', estimator='iwae', num_samples=5)"
    shown = repr(FusedELBO(0.5, x_scale=1, free_bits=0.0, groups=2, capacity=3.5))
    assert shown == "FusedELBO(beta=0.5, reduction='mean', x_scale=1, free_bits=0.0, groups=2, capacity=3.5)"


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "vimco"}, "'vimco'.*'sgvb-b', 'sgvb-a', 'stl', 'iwae', 'dreg'"),
        ({"estimator": "iwae"}, "'iwae'.*num_samples"),
        ({"estimator": "dreg"}, "'dreg'.*num_samples"),
        ({"num_samples": 0}, "num_samples is 0; expected None or at least 1"),
        ({"estimator": "iwae", "num_samples": 3, "free_bits": 0.1}, "free_bits.*closed form.*'sgvb-b', not 'iwae'"),
        ({"estimator": "sgvb-a", "free_bits": 0.1}, "free_bits.*closed form.*not 'sgvb-a'"),
        ({"estimator": "stl", "capacity": 3.0}, "capacity.*closed form.*not 'stl'"),
        ({"groups": 2}, "groups is 2.*free_bits"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        FusedELBO(**options)


def test_bad_groups():
    mu = randn(1, 7, 6)
    for groups in (4, 0, -1):
        with pytest.raises(ValueError, match=f"groups is {groups}; expected a divisor of the 6 dimensions"):
            aevb.gaussian_kl(mu, mu, groups)
        if groups < 1:
            with pytest.raises(ValueError, match=f"groups is {groups}; expected at least 1"):
                FusedELBO(free_bits=0.1, groups=groups)
            continue
        criterion = FusedELBO(free_bits=0.1, groups=groups)
        with pytest.raises(ValueError, match=f"groups is {groups}; expected a divisor of the 6 dimensions"):
            criterion.sample(mu, mu)
        with pytest.raises(ValueError, match=f"groups is {groups}; expected a divisor of the 6 dimensions"):
            criterion(randn(2, 7, 28), rand(3, 7, 28), mu, mu)


@pytest.mark.parametrize("estimator", ["sgvb-a", "stl", "iwae", "dreg"])
def test_kl_is_missing(estimator):
    mu, x = randn(1, 7, 6), rand(2, 7, 28)
    criterion = FusedELBO(estimator=estimator, num_samples=3)
    with pytest.raises(ValueError, match=f"'{estimator}' needs the kl of its own samples: z, kl = criterion.sample"):
        criterion(randn(3, 3, 7, 28), x, mu, mu)
    with pytest.raises(ValueError, match="needs mu and logvar, or kl="):
        criterion(randn(3, 3, 7, 28), x)
    with pytest.raises(ValueError, match="both kl and"):
        criterion(randn(3, 3, 7, 28), x, mu, mu, kl=randn(4, 3, 7))


@each_estimator
def test_linear_logits_are_no_probabilities(estimator):
    mu, decoder = randn(1, 7, 3), Decoder(3, "cpu")
    criterion = FusedELBO(from_probs=True, estimator=estimator, num_samples=3)
    z, kl = criterion.sample(mu, mu)
    with pytest.raises(ValueError, match=r"from_probs.*LinearLogits"):
        criterion(decoder(z), targets("soft", 7)[0], kl=kl)


@each_estimator
def test_targets_outside_are_found(estimator):
    mu, decoder = randn(1, 7, 3), Decoder(3, "cpu")
    x = targets("soft", 7)[0]
    x[4, 0, 1, 2] = 1.5
    criterion = FusedELBO(validate_args=True, estimator=estimator, num_samples=3)
    z, kl = criterion.sample(mu, mu)
    for recon in (decoder(z), decoder(z).materialize()):
        with pytest.raises(ValueError, match=r"x\[4, 0, 1, 2\] is 1\.5"):
            criterion(recon, x, kl=kl)


@pytest.mark.parametrize(
    ("log_prob", "other", "elbo_takes"),
    [
        ((5, 7), (7,), True),
        ((5, 7), (5, 7), True),
        ((5,), (), True),
        ((5, 7), (5,), False),
        ((5, 7), (5, 1), False),
        ((5, 7), (1, 7), False),
        ((5, 7), (3, 5, 7), False),
        ((5, 7), (), False),
        ((), (), False),
        ((0, 7), (0, 7), False),
    ],
)
def test_shapes_of_bounds(log_prob, other, elbo_takes):
    if log_prob == other == (5, 7):
        assert aevb.importance_weighted_bound(randn(1, *log_prob), randn(2, *other)).shape == (7,)
    else:
        words = "no samples" if log_prob == (0, 7) else r"log_prob has shape \(.*log_ratio \(.*\(L, \.\.\.\)"
        with pytest.raises(ValueError, match=words):
            aevb.importance_weighted_bound(randn(1, *log_prob), randn(2, *other))
    if elbo_takes:
        assert aevb.elbo(randn(1, *log_prob), randn(2, *other)).shape == log_prob[1:]
    else:
        words = "no samples" if log_prob == (0, 7) else r"log_prob has shape \(.*kl \(.*\(L, \.\.\.\)"
        with pytest.raises(ValueError, match=words):
            aevb.elbo(randn(1, *log_prob), randn(2, *other))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_recon_of_another_number_of_samples(estimator, reduction, linear):
    mu, x, decoder = randn(1, 7, 3), targets("soft", 7)[0], Decoder(3, "cpu")
    criterion = FusedELBO(reduction=reduction, estimator=estimator, num_samples=3)
    z, kl = criterion.sample(mu, mu)
    logits = decoder(z[:2])
    with pytest.raises(ValueError, match=r"recon has 2 samples of each datapoint; expected num_samples=3"):
        criterion(logits if linear else logits.materialize(), x, kl=kl)


def test_bad_numbers():
    for nats in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"free_bits is {nats}; expected nats from 0 up"):
            aevb.free_bits(rand(1, 7, 6), nats)
        with pytest.raises(ValueError, match=f"free_bits is {nats}"):
            FusedELBO(free_bits=nats)(randn(1, 7, 28), rand(2, 7, 28), randn(3, 7, 6), randn(4, 7, 6))
    with pytest.raises(ValueError, match="gradient is 'score'; expected one of 'total', 'path', 'doubly_rep"):
        aevb.sample_gaussian_log_ratio(randn(1, 7, 6), randn(2, 7, 6), 3, gradient="score")
    with pytest.raises(ValueError, match="give num_samples"):
        aevb.sample_gaussian_log_ratio(randn(1, 7, 6), randn(2, 7, 6), gradient="doubly_reparameterized")
    with pytest.raises(ValueError, match="steps is -1; expected a number from 0 up"):
        aevb.linear_warmup(0, -1)
    for options, words in [
        ({"steps": -3}, "steps is -3"),
        ({"steps": 3, "cycles": 0}, "cycles 0"),
        ({"steps": 3, "ratio": 1.5}, r"ratio 1\.5"),
        ({"steps": 3, "ratio": math.nan}, "ratio nan"),
    ]:
        with pytest.raises(ValueError, match=words):
            aevb.cyclical_warmup(0, **options)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("estimator", ["sgvb-a", "stl"])
def test_kl_of_another_number_of_samples(estimator, linear):
    mu, x, decoder = randn(1, 4, 3), targets("soft", 4)[0], Decoder(3, "cpu")
    criterion = FusedELBO(estimator=estimator, num_samples=3)
    z, kl = criterion.sample(mu, mu)
    logits = decoder(z)
    with pytest.raises(ValueError, match="recon has 2 samples of each datapoint; expected num_samples=3"):
        criterion(decoder(z[:2]) if linear else decoder(z[:2]).materialize(), x, kl=kl)
    for wrong in (kl[:2], kl.mean(0), kl.mean()):
        with pytest.raises(ValueError, match=r"num_samples=3"):
            criterion(logits if linear else logits.materialize(), x, kl=wrong)


def test_a_kl_of_another_batch():
    mu, x, decoder = randn(1, 4, 3), targets("soft", 4)[0], Decoder(3, "cpu")
    for estimator, kl in (("sgvb-b", randn(2, 3, 4)), ("iwae", randn(2, 3, 5))):
        criterion = FusedELBO(estimator=estimator, num_samples=3)
        with pytest.raises(ValueError, match=r"kl is of a batch|samples of each datapoint"):
            criterion(decoder(criterion.sample(mu, mu)[0]), x, kl=kl)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_datapoints(estimator, linear):
    """The mean of nothing is NaN, its sum 0, and nothing else has no values."""
    mu, x, decoder = randn(1, 0, 3).requires_grad_(), targets("soft", 0)[0], Decoder(3, "cpu")
    for reduction in ("mean", "sum", "none"):
        criterion = FusedELBO(reduction=reduction, estimator=estimator, num_samples=3)
        z, kl = criterion.sample(mu, mu)
        logits = decoder(z)
        loss = criterion(logits if linear else logits.materialize(), x, kl=kl)
        if reduction == "none":
            assert loss.shape == (0,)
        else:
            assert loss.isnan() if reduction == "mean" else loss == 0
        assert torch.autograd.grad(loss.sum(), mu)[0].shape == mu.shape


def test_the_doubly_reparameterized_gradient_has_no_derivative():
    """It says so, where a number would be wrong; by the decoder's parameters it has one."""
    mu, logvar, scale = (t.requires_grad_() for t in (randn(1, 7, 3), randn(2, 7, 3), torch.tensor(1.3)))

    def bound(mu, scale):
        z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, 3, gradient="doubly_reparameterized", seed=1)
        return aevb.importance_weighted_bound(-scale * (z - 1).square().sum(-1), log_ratio).sum()

    (first,) = torch.autograd.grad(bound(mu, scale), mu, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivatives by mu and logvar"):
        first.square().sum().backward()
    with pytest.raises(NotImplementedError, match="no derivatives by mu and logvar"):
        torch.func.jacrev(torch.func.grad(bound))(mu, scale.detach())
    (by_scale,) = torch.autograd.grad(bound(mu, scale), scale, create_graph=True)
    (second,) = torch.autograd.grad(by_scale, scale)
    with torch.no_grad():
        z, log_ratio = aevb.sample_gaussian_log_ratio(mu, logvar, 3, seed=1)
        squares = (z - 1).square().sum(-1)
        weight = torch.softmax(-scale * squares - log_ratio, 0)
        variance = (weight * squares.square()).sum(0) - (weight * squares).sum(0).square()
    torch.testing.assert_close(second, variance.sum(), rtol=1e-4, atol=0)


def test_small_things():
    assert aevb.linear_warmup(-1, 0) == aevb.cyclical_warmup(-1, 0) == 1
    with pytest.raises(ValueError, match=r"free_bits is -0\.1; expected nats from 0 up"):
        FusedELBO(free_bits=-0.1)
    criterion = FusedELBO(capacity=torch.tensor(3.0))
    assert criterion.to("meta").capacity.device.type == "meta"
    assert criterion.state_dict() == {}


@pytest.mark.parametrize("estimator", ["sgvb-a", "stl", "iwae", "dreg"])
def test_as_many_samples_as_datapoints(estimator):
    """The KL of another estimator has one dimension less, and shapes alone would let it pass."""
    mu, x, decoder = randn(1, 5, 3), targets("soft", 5)[0], Decoder(3, "cpu")
    z, kl = aevb.sample_gaussian(mu, mu, 5)
    with pytest.raises(ValueError, match=r"kl has shape \(5,\); expected \(num_samples=5, \*batch\)"):
        FusedELBO(estimator=estimator, num_samples=5)(decoder(z).materialize(), x, kl=kl)


def test_free_bits_need_the_kl_of_groups():
    mu, x, decoder = randn(1, 7, 6), targets("soft", 7)[0], Decoder(6, "cpu")
    z, kl = aevb.sample_gaussian(mu, mu)
    with pytest.raises(ValueError, match=r"kl has shape \(7,\); expected \(\*batch, groups\), for free_bits"):
        FusedELBO(free_bits=0.5)(decoder(z).materialize(), x, kl=kl)
    with pytest.raises(ValueError, match=r"kl has shape \(7, 6\); expected \(\*batch, groups=2\)"):
        FusedELBO(free_bits=0.5, groups=2)(decoder(z).materialize(), x, kl=aevb.gaussian_kl(mu, mu, 6))


def test_samples_and_datapoints_are_not_one_dimension():
    """A flat decoder's output would be taken in one order or the other."""
    mu, x, decoder = randn(1, 7, 3), targets("soft", 7)[0], Decoder(3, "cpu")
    criterion = FusedELBO(estimator="iwae", num_samples=3)
    z, kl = criterion.sample(mu, mu)
    flat = decoder(z.flatten(0, 1)).materialize()
    with pytest.raises(ValueError, match=r"unflatten\(0, z.shape\[:2\]\)"):
        criterion(flat, x, kl=kl)
    expected = criterion(decoder(z).materialize(), x, kl=kl)
    torch.testing.assert_close(criterion(flat.unflatten(0, z.shape[:2]), x, kl=kl), expected)


@each_estimator
def test_a_criterion_cast_with_its_model(estimator):
    """beta is a buffer, which model.bfloat16() casts too."""
    mu, x, decoder = randn(1, 7, 3), targets("soft", 7)[0], Decoder(3, "cpu")
    criterion = FusedELBO(torch.tensor(0.5), estimator=estimator, num_samples=3)
    z, kl = criterion.sample(mu, mu, seed=1)
    for recon in (decoder(z), decoder(z).materialize()):
        expected = criterion.float()(recon, x, kl=kl)
        assert torch.equal(criterion.bfloat16()(recon, x, kl=kl), expected)
