"""What a model answers, against models of which the answer is known: a linear Gaussian one, and quadrature over z."""

import copy
import math

import pytest
import torch
from conftest import rand, randn
from linear_gaussian import LinearGaussianPixels
from torch import nn

import aevb
from aevb.inference.imputation import refine
from aevb.inference.methods import InferenceMethods
from aevb.inference.noise_models import GaussianNoise, MaskedObservation, add_gaussian, flip_bits, random_mask

METHODS = ["gradient", "gibbs"]


@pytest.fixture
def many_chains(monkeypatch):
    """Many short chains take less time than a few long ones."""
    monkeypatch.setattr("aevb.inference.imputation.CHAINS", 400)


class Known(LinearGaussianPixels, InferenceMethods):
    """The linear Gaussian model, with all that a question needs."""

    likelihood = "gaussian"

    @property
    def data_dim(self):
        return self.W.shape[0]

    @property
    def latent_dim(self):
        return self.W.shape[1]


def conditional(model, y, observed, noise):
    """The mean and the variance of each clean pixel given y = x + N(0, noise) where observed: float64."""
    W, b = model.W.detach().double(), model.b.detach().double()
    covariance = W @ W.T + model.sigma**2 * torch.eye(len(b), dtype=torch.float64)
    means, variances = [], []
    for row, seen in zip(y.double(), observed, strict=True):
        inner = covariance[seen][:, seen] + noise * torch.eye(int(seen.sum()), dtype=torch.float64)
        gain = covariance[:, seen] @ torch.linalg.inv(inner)
        means.append(b + gain @ (row[seen] - b[seen]))
        variances.append((covariance - gain @ covariance[seen]).diagonal())
    return torch.stack(means), torch.stack(variances)


def data(method, count=7):
    """A model whose encoder is off, more so for the method that does without it, images, and which pixels are seen."""
    model = Known().perturb(0.2 if method == "gradient" else 0.05)
    x = model.sample(count, generator=torch.Generator().manual_seed(1))
    observed = rand(2, count, model.data_dim) < 0.6
    observed[:, 0], observed[:, 1] = True, False
    return model, x, observed


def check_against_the_conditional(found, x, mean, variance):
    """Errors in units of the conditional's spread and of the Monte Carlo error, that of 500 samples for the chains."""
    samples = torch.tensor(500.0) if found.effective_sample_size is None else found.effective_sample_size.unsqueeze(-1)
    spread, unsure = variance.clamp_min(1e-12).sqrt(), variance > 1e-6
    error = 1 / samples.sqrt().expand_as(spread)
    assert ((found.mean - mean).abs() < 4 * error * spread)[unsure].all()
    assert ((found.variance - variance).abs() < 4 * math.sqrt(2) * error * variance)[unsure].all()
    exact = torch.distributions.Normal(mean, spread).log_prob(x.double())
    surprise = ((x - mean) / spread).abs()
    assert ((found.log_prob - exact).abs() < 4 * error * (1 + surprise.square()))[unsure].all()
    assert (found.log_prob[~unsure] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_missing_pixels_have_the_exact_conditional_mean(method, many_chains):
    model, x, observed = data(method)
    found = model.impute(x, observed, method=method, num_samples=10_000, seed=3, clean=x)
    mean, variance = conditional(model, x, observed, 0.0)
    check_against_the_conditional(found, x, mean, variance.where(~observed, 0.0))
    assert torch.equal(found.mean[observed], x[observed])
    one_pass = model.mean(model.encode(x.where(observed, 0.5))[0])
    assert ((one_pass - mean).abs() / variance.sqrt())[~observed].max() > 0.5  # what the refinement is for
    if method == "gradient":
        assert found.acceptance_rate is None
        assert (found.effective_sample_size > 500).all()
    else:
        assert found.effective_sample_size is None
        assert ((found.acceptance_rate > 0.2) & (found.acceptance_rate < 1)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("all_seen", [True, False])
def test_noisy_pixels_have_the_exact_conditional_mean(method, all_seen, many_chains):
    model, x, observed = data(method)
    observed = torch.ones_like(observed) if all_seen else observed
    y = add_gaussian(x, 0.8, seed=5)
    found = model.denoise(y, sigma=0.8, observed=observed, method=method, num_samples=10_000, seed=3, clean=x)
    mean, variance = conditional(model, y, observed, 0.64)
    check_against_the_conditional(found, x, mean, variance)


def small_vae():
    """One latent dimension, whose posterior is far from a Gaussian, so that quadrature is exact."""
    model = aevb.VAE(9, 12, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3.0)
        model.decoder[-1].bias.copy_(randn(4, 9))
    return model


def by_quadrature(model, log_prob, clean):
    """E[clean | y], float64, by quadrature: of means (grid, 1, D) one gives log p(y|z), the other the pixels."""
    z = torch.linspace(-7, 7, 4001, dtype=torch.float64).unsqueeze(-1)
    means = copy.deepcopy(model).double().mean(z).detach().unsqueeze(1)
    log_posterior = log_prob(means) - 0.5 * z.square()
    weights = log_posterior.softmax(0).unsqueeze(-1)
    return (weights * clean(means)).sum(0)


def noise_likelihood(kind, y):
    """p(y_i | bit = 1) and p(y_i | bit = 0), written without logarithms."""
    y = y.double()
    if "flip" in kind:
        p = kind["flip"]
        return (torch.where(y == bit, 1 - p, p) for bit in (1, 0))
    s = kind["sigma"]
    return (torch.exp(-0.5 * ((y - bit) / s) ** 2) / (s * math.sqrt(2 * math.pi)) for bit in (1, 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "masked"),
    [({}, True), ({"flip": 0.15}, False), ({"flip": 0.7}, True), ({"sigma": 0.6}, True)],
)
def test_bits_have_the_exact_posterior_mean(method, kind, masked, many_chains):
    model, x = small_vae(), (rand(5, 4, 9) < 0.5).float()
    y = x
    if kind:
        y = flip_bits(x, kind["flip"], seed=6) if "flip" in kind else add_gaussian(x, kind["sigma"], seed=6)
    observed = rand(7, 4, 9) < 0.6 if masked else torch.ones(4, 9, dtype=torch.bool)
    one, zero = noise_likelihood(kind or {"flip": 0.0}, y)
    one, zero = one.where(observed, 1.0), zero.where(observed, 1.0)
    expected = by_quadrature(
        model,
        lambda m: (m * one + (1 - m) * zero).log().sum(-1),
        lambda m: m * one / (m * one + (1 - m) * zero),
    )
    options = dict(method=method, num_samples=16_000, seed=1, clean=x)
    found = model.denoise(y, observed=observed, **kind, **options) if kind else model.impute(y, observed, **options)
    unsure = ~observed if not kind else torch.ones_like(observed)
    tolerance = 0.02 if method == "gradient" else 0.05  # chains go slowly between the two modes of such a posterior
    torch.testing.assert_close(found.mean.double(), expected, rtol=0, atol=tolerance)
    one_pass = model.mean(model.encode(y.clamp(0, 1).where(observed, 0.5))[0])
    assert (one_pass - expected)[unsure].abs().max() > 0.2
    exact = torch.where(x == 1, expected, 1 - expected).log()
    assert (found.log_prob.exp() - exact.exp())[unsure].abs().max() < tolerance
    variance = (expected * (1 - expected)).where(unsure, 0.0)
    torch.testing.assert_close(found.variance.double(), variance, rtol=0, atol=tolerance)


class Squared(InferenceMethods, nn.Module):
    """x = (z^2, z) plus noise: given the first, z has one of two signs; the encoder knows one of them."""

    data_dim, latent_dim, likelihood, sigma = 2, 1, "gaussian", 0.5

    def encode(self, x):
        return torch.full((len(x), 1), 1.5), torch.full((len(x), 1), -2.0)

    def mean(self, z):
        return torch.cat([z.square(), z], -1)

    def moments(self, z):
        mean = self.mean(z)
        return mean, torch.full_like(mean, self.sigma**2)

    def pixel_log_prob(self, x, z):
        return torch.distributions.Normal(self.mean(z), self.sigma).log_prob(x)


def test_a_mode_that_q_does_not_reach_is_found_by_samples_of_the_prior():
    found = Squared().impute(torch.tensor([[2.25, 0.0]]), torch.tensor([True, False]), num_samples=20_000, steps=20)
    assert (found.mu - 1.5).abs() < 0.2  # q has one of them
    assert found.mean[0, 1].abs() < 0.2
    z = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    weights = (-0.5 * ((z.square() - 2.25) / 0.5).square() - 0.5 * z.square()).softmax(0)
    assert float(found.variance[0, 1]) == pytest.approx(float((weights * z.square()).sum()) + 0.25, rel=0.05)
    assert found.effective_sample_size < 10_000  # and it shows


def test_what_is_missing_is_not_used():
    model, x, few = small_vae(), (rand(5, 4, 9) < 0.5).float(), dict(steps=5, num_samples=20)
    observed = torch.arange(9) < 5
    imputed = model.impute(x, observed, **few).mean
    denoised = model.denoise(x, flip=0.1, observed=observed, **few).mean
    for other in (math.nan, 7.0):
        y = x.where(observed, other)
        assert torch.equal(model.impute(y, observed, **few).mean, imputed)
        assert torch.equal(model.denoise(y, flip=0.1, observed=observed, **few).mean, denoised)
    assert not torch.equal(model.impute(x, observed, seed=1, **few).mean, imputed)


@pytest.mark.parametrize("method", METHODS)
def test_a_datapoint_does_not_depend_on_its_neighbours(method, monkeypatch):
    model, x, observed = data(method, count=5)
    expected = model.impute(x, observed, method=method, num_samples=50)
    monkeypatch.setattr("aevb.inference.imputation.BATCH", 2)
    monkeypatch.setattr("aevb.inference.imputation.ROWS", 7)
    found = model.impute(x[:3], observed[:3], method=method, num_samples=50)
    torch.testing.assert_close(found.mean, expected.mean[:3], rtol=1e-3, atol=1e-4)


def test_refinement_raises_the_bound_and_leaves_the_model_alone():
    model, x = small_vae(), (rand(5, 4, 9) < 0.5).float()
    observation = MaskedObservation(model, x, torch.arange(9).expand(4, 9) < 5, 0.5)
    before = copy.deepcopy(model.state_dict())
    seeds = torch.arange(4)

    def bound(mu, logvar):
        z, kl = aevb.sample_gaussian(mu, logvar, 2000, seed=9)
        return observation.log_prob(z).mean(0) - kl

    encoded = refine(model, observation, seeds, 0)
    for mine, theirs in zip(encoded, model.encode(observation.start), strict=True):
        assert torch.equal(mine, theirs)
    refined = refine(model, observation, seeds, 50)
    assert (bound(*refined) > bound(*encoded) - 0.02).all()
    assert (bound(*refined) - bound(*encoded)).max() > 0.1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(t.requires_grad for t in refined)


def test_noise_is_a_function_of_the_seed_and_the_pixel():
    x = (rand(1, 200, 41) < 0.3).float()
    flipped = flip_bits(x, 0.2, seed=4)
    assert torch.equal(flipped, flip_bits(x, 0.2, seed=4))
    assert torch.equal(flipped[:3], flip_bits(x[:3], 0.2, seed=4))
    assert not torch.equal(flipped, flip_bits(x, 0.2, seed=5))
    assert float((flipped != x).float().mean()) == pytest.approx(0.2, abs=0.02)
    noise = add_gaussian(x, 0.5, seed=4) - x
    assert float(noise.std()) == pytest.approx(0.5, rel=0.03)
    assert float(random_mask(x, 0.7, seed=4).float().mean()) == pytest.approx(0.3, abs=0.02)


def vae(latent_dim=3):
    return aevb.VAE(9, 12, latent_dim, generator=torch.Generator().manual_seed(3))


def test_embed():
    model, x = vae(), rand(1, 41, 9)
    found = model.embed(x)
    assert found.z is None
    for mine, theirs in zip((found.mu, found.logvar), model.encode(x), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    drawn = model.embed(x, 5000, seed=2)
    assert drawn.z.shape == (5000, 41, 3)
    standard = (drawn.z - found.mu) / (0.5 * found.logvar).exp()
    assert standard.mean(0).abs().max() < 5 / math.sqrt(5000)
    assert (standard.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 5000)
    assert torch.equal(drawn.z, model.embed(x, 5000, seed=2).z)
    torch.testing.assert_close(model.embed(x[:4], 2, seed=2).z, drawn.z[:2, :4])
    with pytest.raises(ValueError, match="num_samples is 0; expected at least 1"):
        model.embed(x, 0)


def test_manifold_goes_through_the_quantiles_of_the_prior():
    model = vae(2)
    found = model.manifold(4)
    assert found.shape == (4, 4, 9)
    normal = torch.distributions.Normal(0.0, 1.0)
    z = torch.stack([normal.icdf(torch.tensor(0.875)), normal.icdf(torch.tensor(0.625))])
    torch.testing.assert_close(found[1, 3], model.mean(z))  # right is large z_1, up is large z_2
    with pytest.raises(ValueError, match="latent_dim is 3; the manifold is a picture of 2 dimensions: traverse"):
        vae(3).manifold()
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        model.manifold(0)


def test_traverse_moves_one_dimension_and_begins_with_the_most_informative():
    model, x = vae(), rand(1, 41, 9)
    with torch.no_grad():
        model.encoder[-1].weight[1].mul_(5)  # mu_1
    kl = aevb.diagnostics.kl_per_dimension(model, x)
    found = model.traverse(x, steps=5)
    assert found.shape == (41, 3, 5, 9)
    assert torch.equal(found, model.traverse(x, kl.argsort(descending=True).tolist(), 5))
    assert int(kl.argmax()) == 1
    z = model.encode(x)[0].clone()
    z[:, 1] = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.3))
    torch.testing.assert_close(found[:, 0, 1], model.mean(z))
    with pytest.raises(ValueError, match="dims has 3; expected dimensions from 0 to 2"):
        model.traverse(x, [0, 3])


class Identity(InferenceMethods, nn.Module):
    """z = x, so that what is decoded is the way."""

    data_dim = latent_dim = 4

    def encode(self, x):
        return x, torch.zeros_like(x)

    def mean(self, z):
        return z


def test_interpolate():
    model, a, b = Identity(), randn(1, 5, 4), randn(2, 5, 4)
    line = model.interpolate(a, b, 5)
    assert line.shape == (5, 5, 4)
    torch.testing.assert_close(line[:, 1], 0.75 * a + 0.25 * b)
    for way in (line, model.interpolate(a, b, 5, spherical=True)):
        torch.testing.assert_close(way[:, 0], a)
        torch.testing.assert_close(way[:, -1], b)
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    circle = model.interpolate(a, b, 5, spherical=True)
    torch.testing.assert_close(circle.norm(dim=-1), torch.ones(5, 5))
    angles = (circle[:, 1:] * circle[:, :-1]).sum(-1).clamp(-1, 1).acos()
    torch.testing.assert_close(angles, angles[:, :1].expand_as(angles), rtol=1e-3, atol=1e-3)
    same = model.interpolate(a, a, 3, spherical=True)
    torch.testing.assert_close(same, a.unsqueeze(1).expand_as(same))
    with pytest.raises(ValueError, match="steps is 1; expected at least 2"):
        model.interpolate(a, b, 1)
    with pytest.raises(ValueError, match=r"a has shape \(5, 4\) and b \(2, 4\)"):
        model.interpolate(a, b[:2])


BITS = torch.zeros(2, 9)
SEEN = torch.ones(9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda m: m.impute(BITS[0], SEEN), r"x has shape \(9,\); expected \(N, 9\)"),
        (lambda m: m.impute(BITS[:0], SEEN), r"x has shape \(0, 9\); expected \(N, 9\), at least one"),
        (lambda m: m.impute(BITS, SEEN[:5]), r"observed is torch.bool \(5,\); expected torch.bool \(9,\) or \(2, 9\)"),
        (lambda m: m.impute(BITS, SEEN.float()), r"observed is torch.float32 \(9,\)"),
        (lambda m: m.impute(BITS * math.nan, SEEN), "x holds NaN or infinities where it is observed"),
        (lambda m: m.impute(BITS, SEEN, method="magic"), "method is 'magic'; expected 'gradient' or 'gibbs'"),
        (lambda m: m.impute(BITS, SEEN, steps=-1), "steps is -1; expected a number from 0 up"),
        (lambda m: m.impute(BITS, SEEN, num_samples=0), "num_samples is 0; expected at least 1"),
        (lambda m: m.denoise(BITS), "flip is None and sigma None; expected one of them"),
        (lambda m: m.denoise(BITS, flip=0.1, sigma=0.1), "flip is 0.1 and sigma 0.1; expected one of them"),
        (lambda m: m.denoise(BITS, flip=1.0), "flip is 1.0; expected a probability between 0 and 1"),
        (lambda m: m.denoise(BITS, sigma=0.0), "sigma is 0.0; expected a positive number"),
        (lambda m: m.denoise(BITS + 0.5, flip=0.1), "x holds values other than 0 and 1; expected bits"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(vae())


def test_a_gaussian_model_has_no_bits_to_flip():
    model, x, _ = data("gradient")
    with pytest.raises(ValueError, match="the model's pixels are gaussian, no bits; expected sigma"):
        model.denoise(x, flip=0.1)


def test_clean_images_of_a_bernoulli_model_are_bits():
    with pytest.raises(ValueError, match=r"clean holds values other than 0 and 1.*; expected bits, or a model with"):
        vae().denoise(BITS, sigma=0.1, clean=BITS + 0.5)


@pytest.mark.parametrize("sigma", [1e-4, 1e-8])
def test_little_noise_leaves_little_variance(sigma):
    """Of the pixel's own variance v: v sigma^2 / (v + sigma^2), which is not v - v."""
    model = Known()
    y = model.sample(4, generator=torch.Generator().manual_seed(1))
    z = randn(1, 3, 4, model.latent_dim)
    observed = torch.ones_like(y, dtype=torch.bool)
    noisy = GaussianNoise(model, y, observed, 0.5, sigma)
    mean, variance = noisy.clean(z)
    v, noise = model.sigma**2, sigma**2
    torch.testing.assert_close(variance, torch.full_like(variance, v * noise / (v + noise)), rtol=1e-6, atol=0)
    exact = (v * y.double() + noise * model.mean(z).double()) / (v + noise)
    torch.testing.assert_close(mean.double(), exact, rtol=0, atol=2e-6)
    assert noisy.clean_log_prob(y, z).isfinite().all()
