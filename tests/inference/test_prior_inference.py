"""Questions to a model with a prior of its own: against closed forms, and against the same model with N(0, I)."""

import copy

import pytest
import torch
from conftest import rand
from linear_gaussian import LinearGaussian, LinearGaussianPixels
from torch import nn

import aevb
from aevb import diagnostics
from aevb.inference.imputation import refine
from aevb.inference.methods import InferenceMethods
from aevb.inference.noise_models import GaussianNoise, MaskedObservation
from aevb.inference.standardised import prior_of, standardised


class Known(LinearGaussianPixels, InferenceMethods):
    """The linear Gaussian model with all that a question needs, and the prior N(0, I) or one of its own.

    With the prior N(m, S) x is ``N(b + W m, W S W' + sigma^2 I)``. The encoder is given masks. It has the mean and the
    variances of p(z|x_observed), but for an error that is the same whatever the coordinates of z.
    """

    likelihood = "gaussian"
    mask_input = True
    data_dim, latent_dim = 6, 3

    def __init__(self, prior_mu=None, prior_logvar=None):
        super().__init__()
        self.prior_mu, self.prior_logvar = prior_mu, prior_logvar
        if prior_mu is not None:
            self.prior_mu, self.prior_logvar = nn.Parameter(prior_mu), nn.Parameter(prior_logvar)

    @property
    def prior_parameters(self):
        return None if self.prior_mu is None else (self.prior_mu, self.prior_logvar)

    def float64(self):
        """W, b, and the prior's mean and variances."""
        mu, logvar = self.prior_parameters or (torch.zeros(3), torch.zeros(3))
        return tuple(t.detach().double() for t in (self.W, self.b, mu, logvar.exp()))

    @torch.no_grad()
    def with_standard_prior(self):
        """The same model of x, whose z is in units of the prior."""
        W, b, mean, variance = self.float64()
        model = Known()
        model.W.copy_(W * variance.sqrt())
        model.b.copy_(b + W @ mean)
        return model

    def moments_of_x(self):
        W, b, mean, variance = self.float64()
        return b + W @ mean, (W * variance) @ W.T + self.sigma**2 * torch.eye(len(b)).double()

    def posterior_of(self, x, observed):
        """The mean and the precision of p(z|x_observed)."""
        W, b, mean, variance = self.float64()
        seen = observed.double()
        precision = (1 / variance).diag() + torch.einsum("...i,ij,ik->...jk", seen, W, W) / self.sigma**2
        given = mean / variance + ((x.double() - b) * seen) @ W / self.sigma**2
        return torch.linalg.solve(precision, given), precision

    def encode(self, x, observed=None):
        observed = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        mean, precision = self.posterior_of(x, observed)
        variance = precision.inverse().diagonal(dim1=-2, dim2=-1)
        return (mean + 0.2 * variance.sqrt()).float(), (variance.log() + 0.1).float()

    def log_prob(self, x, z, weight=None):
        log_prob = self.pixel_log_prob(x, z)
        return (log_prob if weight is None else log_prob.where(weight, 0.0)).sum(-1)


@pytest.fixture(scope="module")
def known():
    """A model with a prior of its own, data of it, and masks."""
    model = Known(torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.9, -1.2, 0.2]))
    x = model.with_standard_prior().sample(20, generator=torch.Generator().manual_seed(1))
    observed = rand(2, *x.shape) < 0.6
    observed[0], observed[1] = True, False
    return model, x, observed


def log_marginal(model, x, observed):
    mean, covariance = model.moments_of_x()
    found = torch.zeros(len(x), dtype=torch.float64)
    for i, (row, seen) in enumerate(zip(x.double(), observed, strict=True)):
        if seen.any():
            normal = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen])
            found[i] = normal.log_prob(row[seen])
    return found


@pytest.mark.parametrize("with_holes", [False, True])
def test_log_p_is_the_closed_form(known, with_holes):
    model, x, observed = known
    observed = observed if with_holes else torch.ones_like(observed)
    given = {"observed": observed} if with_holes else {}
    exact = log_marginal(model, x, observed)
    found = aevb.log_marginal_likelihood(model, x, 20_000, **given)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-5).all()
    assert found.mean == pytest.approx(float(exact.mean()), abs=4 * found.mean_standard_error + 1e-5)
    for start in ("prior", "posterior"):
        options = {"num_chains": 64, "num_temperatures": 60, "num_leapfrog": 5, "start": start}
        annealed = diagnostics.annealed_importance_sampling(model, x, **options, **given)
        assert ((annealed.log_prob - exact).abs() < 5 * annealed.standard_error + 1e-4).all()
        assert annealed.standard_error.median() < 0.2


def test_imputation_is_the_closed_form(known):
    """The missing pixels' moments, and z's by the best diagonal q, in the model's own coordinates."""
    model, x, observed = known
    found = model.impute(x.where(observed, torch.nan), observed, num_samples=20_000, steps=2000)
    mean, covariance = model.moments_of_x()
    for i, seen in enumerate(observed):
        gain = covariance[:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
        expected = mean + gain @ (x[i, seen].double() - mean[seen])
        variance = (covariance - gain @ covariance[seen]).diagonal().where(~seen, 0.0)
        error = 5 * (variance / found.effective_sample_size[i]).sqrt()
        assert ((found.mean[i] - expected).abs() <= error + 1e-5).all()
        assert ((found.variance[i] - variance).abs() <= error * (2 * variance).sqrt() + 1e-5).all()
    z_mean, precision = model.posterior_of(x, observed)
    best = 1 / precision.diagonal(dim1=-2, dim2=-1)  # the variances of the q of least KL from p(z|x_observed)
    for error in ((found.mu - z_mean) / best.sqrt(), found.logvar - best.log()):
        assert error.square().mean(0).sqrt().max() < 0.1  # the noise of Adam's last steps


QUESTIONS = {
    "log p(x)": lambda m, x, o: aevb.log_marginal_likelihood(m, x, 50, observed=o),
    "ais": lambda m, x, o: diagnostics.annealed_importance_sampling(
        m, x, num_chains=4, num_temperatures=8, num_leapfrog=2, observed=o
    ),
    "kl": lambda m, x, o: diagnostics.kl_per_dimension(m, x, observed=o),
    "active units": lambda m, x, o: diagnostics.active_units(m, x, observed=o),
    "mutual information": lambda m, x, o: diagnostics.mutual_information(m, x, 3, observed=o),
    "collapse": lambda m, x, o: diagnostics.posterior_collapse(m, x, observed=o),
    "impute": lambda m, x, o: m.impute(x, o, num_samples=40, clean=x),
    "impute by gibbs": lambda m, x, o: m.impute(x, o, num_samples=40, clean=x, method="gibbs"),
    "denoise": lambda m, x, o: m.denoise(x, sigma=0.3, observed=o, num_samples=40, clean=x),
    "reconstruct": lambda m, x, o: m.mean(m.embed(x, observed=o).mu),
    "embed": lambda m, x, o: m.mean(m.embed(x, 3, observed=o).z),
    "traverse": lambda m, x, o: m.traverse(x, steps=4, observed=o),
    "traverse one": lambda m, x, o: m.traverse(x, dims=[1], steps=3, observed=o),
    "interpolate": lambda m, x, o: m.interpolate(x, x.flip(0), 4, observed=(o, o)),
    "spherical": lambda m, x, o: m.interpolate(x, x.flip(0), 4, spherical=True, observed=(o, o)),
}


def numbers(found):
    """All of an answer's tensors and numbers, but for z's."""
    if isinstance(found, torch.Tensor):
        return [found.double().flatten()]
    if isinstance(found, (int, float)):
        return [torch.tensor([found]).double()]
    fields = [] if found is None else [v for name, v in vars(found).items() if name not in ("mu", "logvar")]
    return [t for value in fields for t in numbers(value)]


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_answer_is_that_of_the_same_model_with_a_standard_prior(known, question):
    model, x, observed = known
    same = model.with_standard_prior()
    found, expected = (torch.cat(numbers(QUESTIONS[question](m, x, observed))) for m in (model, same))
    assert found.numel() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_what_is_a_z_is_in_the_models_own_coordinates(known):
    model, x, observed = known
    same = model.with_standard_prior()
    scale = (0.5 * model.prior_logvar.detach()).exp()

    def check(found, expected):
        torch.testing.assert_close(found[0], model.prior_mu.detach() + scale * expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[1], expected[1] + model.prior_logvar.detach(), rtol=1e-3, atol=1e-3)

    for method in ("gradient", "gibbs"):
        found, expected = (m.impute(x, observed, num_samples=40, method=method) for m in (model, same))
        check((found.mu, found.logvar), (expected.mu, expected.logvar))
    seeds = torch.arange(len(x))
    found, expected = (refine(m, MaskedObservation(m, x, observed, 0.5), seeds, 20) for m in (model, same))
    check(found, expected)
    assert not any(t.requires_grad for t in found)
    embedding = model.embed(x, 2)
    for found, mine in zip((embedding.mu, embedding.logvar), model.encode(x), strict=True):
        assert torch.equal(found, mine)
    other = GaussianNoise(model, x, observed, 0.5, 0.3)
    assert standardised(standardised(model)).own_z(torch.zeros(3)).tolist() == model.prior_mu.tolist()
    assert torch.equal(refine(model, other, seeds, 0)[1], refine(model, other, seeds, 0)[1])


def test_the_manifold_goes_through_the_priors_quantiles():
    model = aevb.VAE(10, 8, 2, prior="learned").requires_grad_(False)
    model.prior_mu.copy_(torch.tensor([2.0, -1.0]))
    model.prior_logvar.copy_(torch.tensor([1.0, -2.0]))
    priors = [
        torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(model.prior_mu, model.prior_logvar, strict=True)
    ]
    quantiles = (torch.arange(5) + 0.5) / 5
    z1, z2 = priors[0].icdf(quantiles).expand(5, 5), priors[1].icdf(quantiles.flip(0)).unsqueeze(-1).expand(5, 5)
    torch.testing.assert_close(model.manifold(5), model.mean(torch.stack([z1, z2], -1)))


def test_a_question_leaves_no_gradient_and_is_answered_in_inference_mode(known):
    model, x, observed = known
    model = copy.deepcopy(model)
    with torch.inference_mode():
        first = diagnostics.annealed_importance_sampling(
            model, x, num_chains=2, num_temperatures=4, num_leapfrog=2, observed=observed
        )
    second = QUESTIONS["kl"](model, x, observed)
    assert first.log_prob.isfinite().all()
    assert not second.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_one_is_asked_as_it_is():
    model = LinearGaussian()
    assert standardised(model) is model
    for prior in ("standard", "learned"):
        assert (prior_of(aevb.VAE(10, 8, 2, prior=prior)) is None) == (prior == "standard")


@pytest.mark.parametrize(
    ("prior", "what"),
    [
        (torch.zeros(3), r"torch.float32 \(3,\)"),
        ((torch.zeros(3),), r"torch.float32 \(3,\)"),
        ((torch.zeros(3), torch.zeros(2)), r"torch.float32 \(3,\), torch.float32 \(2,\)"),
        ((torch.zeros(3), 1.0), r"torch.float32 \(3,\), a float"),
        ((torch.zeros(3).int(), torch.zeros(3).int()), r"torch.int32 \(3,\), torch.int32 \(3,\)"),
        ("learned", "a str"),
        (lambda: None, "a function"),
    ],
)
def test_what_is_no_prior_is_a_sentence(prior, what):
    model = LinearGaussian()
    model.prior_parameters = prior
    with pytest.raises(ValueError, match=rf"LinearGaussian.prior_parameters is {what}; expected None for N\(0, I\)"):
        aevb.log_marginal_likelihood(model, torch.zeros(2, 6), 5)


def test_a_prior_of_other_dimensions_is_a_sentence():
    model = LinearGaussian()
    model.prior_parameters = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"prior_parameters have shape \(4,\), and encode gives mu \(2, 3\)"):
        diagnostics.kl_per_dimension(model, torch.zeros(2, 6))


def test_an_error_in_a_models_own_property_is_not_taken_for_a_standard_prior():
    class Broken(LinearGaussian):
        @property
        def prior_parameters(self):
            return self.not_there

    with pytest.raises(AttributeError):
        diagnostics.kl_per_dimension(Broken(), torch.zeros(2, 6))
