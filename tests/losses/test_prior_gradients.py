"""Gradients of the estimators for a prior that is not N(0, I): their expectations, of the prior's own tensors too."""

import pytest
import torch
from conftest import rand, randn, same_bits
from linear_gaussian import LinearGaussian
from test_accuracy import double, gradients
from test_estimators import check_mean, grid, weighs

import aevb
from aevb import FusedELBO, reference

SEED = 20131220
DRAWS = 60_000


class OneDatapoint:
    """7 pixels under a linear Bernoulli decoder, a posterior and a prior, in `latent_dim` dimensions."""

    def __init__(self, latent_dim):
        self.mu, self.logvar = 0.8 + 0.1 * randn(1, latent_dim), 0.3 + 0.1 * randn(2, latent_dim)
        self.prior = 0.3 + 0.1 * randn(6, latent_dim), 0.9 + 0.1 * randn(7, latent_dim)
        self.weight, self.bias, self.x = 1.5 * randn(3, 7, latent_dim), randn(4, 7), rand(5, 7)

    def expected(self, num_samples, beta, points):
        """The gradients of the bound's expectation by mu, logvar and the prior; with num_samples None, of the ELBO."""
        weight, bias, x = (double(t) for t in (self.weight, self.bias, self.x))
        mu, logvar, *prior = given = [t.double().requires_grad_() for t in (self.mu, self.logvar, *self.prior)]
        D = len(mu)
        eps, probability = grid(D * (num_samples or 1), points)
        eps = eps.unflatten(-1, (num_samples or 1, D)).transpose(0, 1)
        mus, logvars = (t.expand(eps.shape[1:]) for t in (mu, logvar))
        z, log_ratio = reference.sample_gaussian_log_ratio(mus, logvars, len(eps), prior=tuple(prior), eps=eps)
        log_prob = reference.linear_bernoulli_log_prob(z, weight, bias, x)
        if num_samples is None:
            value = (probability * log_prob[0]).sum() - beta * reference.gaussian_kl(mu, logvar, prior=tuple(prior))
        else:
            value = (probability * reference.importance_weighted_bound(log_prob, log_ratio, beta)).sum()
        return torch.autograd.grad(value, given)

    def estimates(self, criterion, upstream):
        """(draws, latent_dim) each."""
        given = [t.expand(DRAWS, -1).clone().requires_grad_() for t in (self.mu, self.logvar, *self.prior)]
        z, kl = criterion.sample(*given[:2], prior=tuple(given[2:]), seed=SEED)
        loss = criterion(z @ self.weight.T + self.bias, self.x.expand(DRAWS, -1), kl=kl)
        return gradients(loss, given, torch.tensor(upstream))


def check_expected_gradient(estimator, latent_dim, num_samples, beta):
    case = OneDatapoint(latent_dim)
    of_bound = num_samples if weighs(estimator) else None
    expected = case.expected(of_bound, beta, 40)
    for e, other in zip(expected, case.expected(of_bound, beta, 60), strict=True):
        torch.testing.assert_close(e, other, rtol=1e-4, atol=0)
    criterion = FusedELBO(beta, "sum", estimator=estimator, num_samples=num_samples)
    for draws, e in zip(case.estimates(criterion, -1.7), expected, strict=True):
        if draws.std(0).max() > 1e-6:
            check_mean(draws, 1.7 * e, at_least=7.0)
        else:  # sgvb-b's gradient of the prior is the same for every sample
            torch.testing.assert_close(draws.double().mean(0), 1.7 * e, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("estimator", ["sgvb-b", "sgvb-a", "stl"])
def test_expected_gradient_of_the_elbo(estimator, latent_dim, num_samples):
    check_expected_gradient(estimator, latent_dim, num_samples, 0.7)


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_expected_gradient_of_the_importance_weighted_bound(estimator):
    check_expected_gradient(estimator, 1, 2, 1.0)


def test_the_prior_has_one_gradient():
    """Of the same samples, whatever gradient mu and logvar get: that of -log p(z), weighted once by the bound."""
    case, by_estimator = OneDatapoint(3), {}
    for estimator in ("sgvb-a", "stl", "iwae", "dreg"):
        criterion = FusedELBO(reduction="sum", estimator=estimator, num_samples=5)
        by_estimator[estimator] = case.estimates(criterion, 0.3)
    for total, other in (("sgvb-a", "stl"), ("iwae", "dreg")):
        for a, b in zip(by_estimator[total][2:], by_estimator[other][2:], strict=True):
            assert same_bits(a, b)
        assert not torch.equal(by_estimator[total][0], by_estimator[other][0])


@pytest.mark.parametrize("estimator", ["sgvb-b", "sgvb-a", "stl"])
def test_a_linear_gaussian_model(estimator):
    """Value and gradients of an ELBO that is known in closed form."""
    model = LinearGaussian().perturb(0.15)
    x = model.sample(4, torch.Generator().manual_seed(3))
    prior = 0.4 * randn(6, 3), 0.5 * randn(7, 3)
    mu, logvar = (t.detach() for t in model.encode(x))
    given64 = m, v, *p = [t.double().requires_grad_() for t in (mu, logvar, *prior)]
    spread = v.exp() @ model.W.detach().double().square().sum(0) / model.sigma**2
    mean = model.double().log_prob(x.double(), m) - 0.5 * spread
    elbo = mean - reference.gaussian_kl(m, v, prior=tuple(p))
    expected = torch.autograd.grad(elbo.sum(), given64)
    model.float()

    draws = 20_000
    given = [t.expand(draws, *t.shape).clone().requires_grad_() for t in (mu, logvar)]
    given += [t.expand(draws, 4, 3).clone().requires_grad_() for t in prior]
    criterion = FusedELBO(estimator=estimator, batch_dims=2)
    z, kl = criterion.sample(*given[:2], prior=tuple(given[2:]), seed=SEED)
    value = aevb.elbo(model.log_prob(x, z).unsqueeze(0), kl)
    check_mean(value, elbo)
    found = list(gradients(value.sum(), given, None))
    found[2:] = [t.sum(1) for t in found[2:]]
    for draw, e in zip(found, expected, strict=True):
        if draw.std(0).max() > 1e-5:
            check_mean(draw, e)
        else:
            torch.testing.assert_close(draw.double().mean(0), e, rtol=1e-5, atol=1e-6)


def test_at_the_true_posterior():
    """There the path derivative is zero for every sample, whatever the prior is."""
    model, mean, logvar = LinearGaussian(), 0.4 * randn(6, 3), 0.5 * randn(7, 3)
    x = model.sample(4, torch.Generator().manual_seed(3))
    W, b = model.W.detach().double(), model.b.detach().double()
    precision = torch.exp(-logvar.double()) + W.square().sum(0) / model.sigma**2
    mu = ((x.double() - b) @ W / model.sigma**2 + torch.exp(-logvar.double()) * mean.double()) / precision
    for estimator in ("sgvb-a", "stl", "iwae", "dreg"):
        given = [mu.float().requires_grad_(), (-precision.log()).expand(4, 3).float().requires_grad_()]
        z, kl = FusedELBO(estimator=estimator, num_samples=50).sample(*given, prior=(mean, logvar), seed=SEED)
        bound = aevb.importance_weighted_bound if weighs(estimator) else aevb.elbo
        value = bound(model.log_prob(x, z), kl)
        largest = max(g.abs().max() for g in gradients(value.sum(), given, None))
        assert largest < 1e-4 if estimator in ("stl", "dreg") else largest > 1e-2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"logvar_range": (-0.5, 0.6)}, {"free_bits": 0.3}, {"free_bits": 0.3, "groups": 2}, {"capacity": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("latent", [(4,), (2, 2)])
def test_the_loss_of_mu_and_logvar(latent, shared, options, reduction):
    """Given to the criterion with their prior: the twin's values and gradients in float64, and the KL in the terms."""
    options = {**options, "reduction": reduction, "batch_dims": 1}
    batch = () if shared else (6,)
    recon, x = randn(11, 6, 9), rand(12, 6, 9)
    posterior = randn(13, 6, *latent), randn(14, 6, *latent)
    prior = randn(15, *batch, *latent), 0.5 * randn(16, *batch, *latent)
    for given_prior in (None, prior):
        leaves = [t.clone().requires_grad_() for t in (recon, *posterior, *(given_prior or ()))]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        values = []
        for criterion, (r, *rest), targets in (
            (FusedELBO(0.7, **options), leaves, x),
            (reference.FusedELBO(0.7, **options), wide, x.double()),
        ):
            values.append(criterion(r, targets, *rest[:2], prior=tuple(rest[2:]) or None))
        assert torch.allclose(values[0].double(), values[1], rtol=1e-5)
        upstream = randn(17, *values[0].shape)
        found = torch.autograd.grad(values[0], leaves, upstream)
        for f, e in zip(found, torch.autograd.grad(values[1], wide, upstream.double()), strict=True):
            assert torch.allclose(f.double(), e, rtol=1e-4, atol=1e-6)
        logvar_range = options.get("logvar_range")
        kl = aevb.gaussian_kl(*posterior, prior=given_prior, logvar_range=logvar_range, batch_dims=1)
        terms = FusedELBO(0.7, **options).terms(recon, x, *posterior, prior=given_prior)
        assert torch.allclose(terms.kl, kl if reduction == "none" else kl.mean(), rtol=1e-5)
        assert same_bits(terms.loss, values[0].detach())
