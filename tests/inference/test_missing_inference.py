"""log p(x) of what is observed, against its closed form, and the questions to a model whose encoder is given masks."""

import math

import pytest
import torch
from linear_gaussian import LinearGaussian

import aevb
from aevb import diagnostics
from aevb.data import Dataset, load


class WithHoles(LinearGaussian):
    """The linear Gaussian, whose posterior of what is observed is in closed form, though not diagonal."""

    mask_input = True

    def encode(self, x, observed):
        """The mean and the variances of p(z|x_observed)."""
        precision = self._precision(observed)
        seen = ((x - self.b).double() * observed) @ self.W.double() / self.sigma**2
        mean = torch.linalg.solve(precision, seen)
        return mean.float(), precision.inverse().diagonal(dim1=-2, dim2=-1).log().float()

    def _precision(self, observed):
        W = self.W.double()
        return torch.eye(W.shape[1]).double() + torch.einsum("bi,ij,ik->bjk", observed.double(), W, W) / self.sigma**2

    def log_prob(self, x, z, weight=None):
        variance = torch.full((), self.sigma**2).log()
        return aevb.log_prob("gaussian", aevb.GaussianOutput(self.decode(z), variance), x, weight=weight)

    def log_marginal_observed(self, x, observed):
        W, b = self.W.double(), self.b.double()
        covariance = W @ W.T + self.sigma**2 * torch.eye(len(b)).double()
        found = []
        for row, mask in zip(x.double(), observed, strict=True):
            if not mask.any():
                found.append(torch.zeros(()).double())
                continue
            normal = torch.distributions.MultivariateNormal(b[mask], covariance[mask][:, mask])
            found.append(normal.log_prob(row[mask]))
        return torch.stack(found)


@pytest.fixture
def known():
    """A model, data of it, masks, and the exact log p(x_observed)."""
    model = WithHoles().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    x = model.sample(60, generator)
    observed = torch.rand(x.shape, generator=generator) < 0.6
    observed[0] = False
    observed[1] = True
    return model, x.where(observed, torch.nan), observed, model.log_marginal_observed(x, observed)


def test_log_p_of_what_is_observed_is_the_closed_form(known):
    model, x, observed, exact = known
    found = aevb.log_marginal_likelihood(model, x, 5_000, observed=observed)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-5).all()
    assert found.mean == pytest.approx(float(exact.mean()), abs=4 * found.mean_standard_error + 1e-5)
    assert found.log_prob[0] == pytest.approx(0, abs=5 * float(found.standard_error[0]) + 1e-6)


def test_annealed_importance_sampling_too(known):
    model, x, observed, exact = known
    found = diagnostics.annealed_importance_sampling(
        model, x, observed=observed, num_chains=64, num_temperatures=20, num_leapfrog=5
    )
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-4).all()


def test_the_bound_of_miwae_tightens(known):
    """In the mean over data it grows with K, and is below log p(x_observed)."""
    model, x, observed, exact = known
    means, errors = [], []
    for k in (1, 5, 25):
        runs = torch.stack(
            [aevb.log_marginal_likelihood(model, x, k, seed=s, observed=observed).log_prob for s in range(40)]
        ).mean(1)
        means.append(float(runs.mean()))
        errors.append(float(runs.std()) / math.sqrt(len(runs)))
    steps = zip(means, errors, [*means[1:], float(exact.mean())], [*errors[1:], 0.0], strict=True)
    assert all(after > before - 3 * math.hypot(a, b) for before, a, after, b in steps)
    assert means[1] > means[0] + 3 * errors[0]


def test_the_bound_of_a_trained_miwae_tightens():
    whole = load("digits")
    generator = torch.Generator().manual_seed(0)
    observed = {
        p: torch.rand(getattr(whole, f"{p}_images").shape, generator=generator) < 0.5 for p in ("train", "test")
    }
    observed["test"] = observed["test"][:100]
    data = Dataset("digits", (8, 8), 16, whole.train_images, whole.test_images[:100], observed=observed)
    config = aevb.TrainConfig(
        estimator="iwae",
        num_samples=5,
        mask_input=True,
        hidden_dims=(50,),
        latent_dim=8,
        binarize="threshold",
        threads=1,
    )
    trainer = aevb.Trainer(config, dataset=data)
    for _ in range(5):
        trainer.train_epoch()
    means, errors = [], []
    for k in (1, 10, 100):
        found = torch.stack(
            [
                aevb.log_marginal_likelihood(
                    trainer.model, trainer.test_x, k, seed=s, observed=observed["test"]
                ).log_prob
                for s in range(3)
            ]
        ).mean(1)
        means.append(float(found.mean()))
        errors.append(float(found.std()) / math.sqrt(len(found)))
    for (before, a), (after, b) in zip(
        zip(means, errors, strict=True), list(zip(means, errors, strict=True))[1:], strict=False
    ):
        assert after > before - 3 * math.hypot(a, b)
    assert means[-1] > means[0] + 0.5
    assert trainer.evaluate().elbo == pytest.approx(means[0], abs=0.5)


MODELS = {
    "mlp": lambda **options: aevb.VAE(24, 16, 3, **options),
    "conv": lambda **options: aevb.ConvVAE((4, 6), (4,), 3, **options),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mask_input", [False, True])
def test_no_question_uses_what_is_missing(kind, mask_input):
    torch.manual_seed(0)
    model = MODELS[kind](mask_input=mask_input).eval()
    x, observed = torch.rand(9, 24), torch.rand(9, 24) < 0.5
    nan, zero = x.where(observed, torch.nan), x * observed
    a, b = slice(4), slice(4, 8)
    questions = {
        "encode": lambda x: model.encode(x, observed=observed)[0],
        "forward": lambda x: model(x, seed=0, observed=observed)[0],
        "reconstruct": lambda x: model.reconstruct(x, observed),
        "embed": lambda x: model.embed(x, observed=observed).logvar,
        "traverse": lambda x: model.traverse(x, observed=observed),
        "interpolate": lambda x: model.interpolate(x[a], x[b], observed=(observed[a], observed[b])),
        "impute": lambda x: model.impute(x, observed, steps=3, num_samples=20, fill=0.0).mean,
        "gibbs": lambda x: model.impute(x, observed, steps=3, num_samples=20, method="gibbs").mean,
        "kl": lambda x: diagnostics.kl_per_dimension(model, x, observed=observed),
        "units": lambda x: diagnostics.active_units(model, x, observed=observed).variances,
        "information": lambda x: torch.tensor(diagnostics.mutual_information(model, x, observed=observed).mean_kl),
        "collapse": lambda x: diagnostics.posterior_collapse(model, x, observed=observed).kl_per_dimension,
        "log p": lambda x: aevb.log_marginal_likelihood(model, x, 10, observed=observed).log_prob,
    }
    for name, question in questions.items():
        found = question(nan)
        assert found.isfinite().all(), name
        assert torch.equal(found, question(zero)), name


def test_an_encoder_that_is_given_the_mask_starts_an_imputation_with_it():
    torch.manual_seed(0)
    model = aevb.VAE(24, 16, 3, mask_input=True)
    x, observed = torch.rand(5, 24), torch.rand(5, 24) < 0.5
    found = model.impute(x, observed, steps=0, num_samples=10, fill=0.9)  # where `fill` is not used
    for q, expected in zip((found.mu, found.logvar), model.encode(x, observed=observed), strict=True):
        torch.testing.assert_close(q, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_bits_bytes_and_floats_beside_their_mask(dtype):
    torch.manual_seed(0)
    model = aevb.VAE(24, 16, 3, mask_input=True)
    x = (torch.rand(9, 24) < 0.3).to(dtype)
    observed = torch.rand(9, 24) < 0.5
    scale = 1.0 if dtype == torch.uint8 else None
    expected = model.encoder(torch.cat([x.float() * observed, observed.float()], -1))
    torch.testing.assert_close(torch.cat(model.encode(x, scale, observed=observed), -1), expected)
    whole = model.encoder(torch.cat([x.float(), torch.ones(9, 24)], -1))
    torch.testing.assert_close(torch.cat(model.encode(x, scale), -1), whole)


def test_masks_that_do_not_fit_are_sentences():
    model, x = aevb.VAE(24, 16, 3), torch.rand(9, 24)
    for observed in (torch.ones(9, 23, dtype=torch.bool), torch.ones(9, 24)):
        for question in (
            model.embed,
            model.reconstruct,
            model.encode,
            lambda x, observed: aevb.log_marginal_likelihood(model, x, 2, observed=observed),
        ):
            with pytest.raises(ValueError, match=r"observed is torch.* \(9, 2[34]\); expected torch.bool \(9, 24\) or"):
                question(x, observed=observed)


def test_a_model_whose_log_prob_takes_no_weight_says_so():
    with pytest.raises(ValueError, match=r"LinearGaussian.log_prob takes no weight, and values are missing; expected"):
        aevb.log_marginal_likelihood(LinearGaussian(), torch.rand(4, 6), 3, observed=torch.rand(4, 6) < 0.5)
