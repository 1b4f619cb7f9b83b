"""Diagnostics against closed forms, brute force and numerical integration."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import rand, randn
from linear_gaussian import LinearGaussian
from torch import Tensor, nn

import aevb
from aevb.diagnostics import (
    active_units,
    annealed_importance_sampling,
    kl_per_dimension,
    mutual_information,
    posterior_collapse,
)
from aevb.inference import ais as annealing
from aevb.inference import latent_space


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small and many: threads would wait for each other, minutes where other programs want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Posteriors:
    """Posteriors from a table: datapoint x[n, 0] has those of row x[n, 0]."""

    def __init__(self, mu: Tensor, logvar: Tensor):
        self.mu, self.logvar = mu, logvar
        self.x = torch.arange(len(mu)).unsqueeze(-1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu[x[:, 0]], self.logvar[x[:, 0]]


class Recorded:
    """A model that keeps every z it is asked about."""

    def __init__(self, model):
        self.model, self.encode, self.z = model, model.encode, []

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        self.z.append(z.detach().clone())
        return self.model.log_prob(x, z)


class Bernoulli(nn.Module):
    """An `aevb.VAE` with its likelihood."""

    def __init__(self, vae: aevb.VAE):
        super().__init__()
        self.vae, self.encode = vae, vae.encode

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return aevb.bernoulli_log_prob(self.vae.decode(z), x)


def data(model: LinearGaussian, n: int, seed: int = 0) -> Tensor:
    return model.sample(n, torch.Generator().manual_seed(seed))


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp(logvar)), summed over the last dimension, float64."""
    z, mu, logvar = z.double(), mu.double(), logvar.double()
    return torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)


def log_standard_normal(z: Tensor) -> Tensor:
    return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))


# ---- dimensions -----------------------------------------------------------------------------------------------------


def test_kl_per_dimension_of_the_exact_posterior_is_the_closed_form():
    model = LinearGaussian()
    x = data(model, 301)
    mean, variance = (t.detach() for t in model.posterior(x))
    found = kl_per_dimension(model, x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 0.5 * (mean**2 + variance - 1 - variance.log()).mean(0), rtol=0, atol=1e-6)
    # Over all x it is the information between z_j and x, 0.5 log(1 + |w_j|^2 / sigma^2).
    information = 0.5 * (1 + model.W.detach().double().square().sum(0) / model.sigma**2).log()
    many = kl_per_dimension(model, data(model, 20_001))
    torch.testing.assert_close(many, information, rtol=0, atol=4 * math.sqrt(0.5 / 20_001))


def test_kl_per_dimension_sums_to_the_kl():
    model = LinearGaussian().perturb(0.3)
    x = data(model, 41)
    expected = aevb.gaussian_kl(*(t.detach() for t in model.encode(x))).double().mean()
    torch.testing.assert_close(kl_per_dimension(model, x).sum(), expected, rtol=1e-6, atol=0)


def test_active_units_are_the_variances_of_the_mean():
    model = LinearGaussian(latent_dim=4)
    with torch.no_grad():
        model.A[2] *= 0.05  # its mean hardly moves
        model.c[2] += 3.0
    x = data(model, 401)
    mean, variance = (t.detach() for t in model.posterior(x))
    expected = mean.var(0, correction=0)
    expected[2] *= 0.05**2
    found = active_units(model, x)
    torch.testing.assert_close(found.variances, expected, rtol=1e-5, atol=0)
    assert (found.count, found.mask.tolist()) == (3, [True, True, False, True])
    assert active_units(model, x, threshold=1e-4).count == 4
    assert active_units(model, x, threshold=float(expected.max())).count <= 1
    # Over all x the variance of the mean is 1 less that of the posterior.
    torch.testing.assert_close(expected[[0, 1, 3]], 1 - variance[0, [0, 1, 3]], rtol=0, atol=0.2)


def test_variances_survive_a_mean_far_from_zero():
    mu = randn(0, 101, 3)
    table = Posteriors(mu.double() + 1e5, torch.zeros(101, 3, dtype=torch.float64))
    found = active_units(table, table.x, batch_size=7)
    torch.testing.assert_close(found.variances, mu.double().var(0, correction=0), rtol=1e-9, atol=0)


# ---- the aggregate posterior ----------------------------------------------------------------------------------------


def brute_force(model, x: Tensor, num_samples: int, seed: int) -> Tensor:
    """log q(z|x_n) - log q(z), (N, S), of every sample, with the whole (N, S, N, D) at once."""
    mu, logvar = (t.detach() for t in model.encode(x))
    zero = torch.zeros(len(x), num_samples, mu.shape[-1])
    eps, _ = aevb.sample_gaussian(zero, zero, seed=aevb.mix_seed(seed, torch.arange(len(x))))
    z = mu.double().unsqueeze(1) + (0.5 * logvar.double()).exp().unsqueeze(1) * eps.double()
    log_density = log_normal(z.unsqueeze(2), mu, logvar)  # (N, S, N)
    return torch.einsum("nsn->ns", log_density) - (log_density.logsumexp(-1) - math.log(len(x)))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_mutual_information_is_that_of_brute_force(num_samples, monkeypatch):
    monkeypatch.setattr(latent_space, "QUADRATIC_BLOCK", 500)  # several blocks, the last one smaller
    model = LinearGaussian().perturb(0.2)
    x = data(model, 81)
    found = mutual_information(model, x, num_samples, seed=5)
    each = brute_force(model, x, num_samples, seed=5)
    kl = aevb.reference.gaussian_kl(*(t.detach().double() for t in model.encode(x))).mean().item()
    assert found.mutual_information == pytest.approx(each.mean().item(), abs=1e-9)
    assert found.mean_kl == pytest.approx(kl, abs=1e-9)
    assert found.aggregate_kl == pytest.approx(kl - each.mean().item(), abs=1e-9)
    spread = each.var() if num_samples == 1 else each.var(1).mean()
    assert found.standard_error == pytest.approx(math.sqrt(spread / each.numel()), rel=1e-6)
    assert found.num_datapoints == 81


def test_samples_are_those_of_sample_gaussian():
    """A user who draws with the documented seeds has the samples that were used."""
    model = LinearGaussian()
    x = data(model, 31)
    mu, logvar = (t.detach() for t in model.encode(x))
    z, _ = aevb.sample_gaussian(mu, logvar.contiguous(), seed=aevb.mix_seed(9, torch.arange(31)))
    log_density = log_normal(z.unsqueeze(1), mu, logvar)
    expected = (log_density.diagonal() - log_density.logsumexp(-1) + math.log(31)).mean().item()
    assert mutual_information(model, x, seed=9).mutual_information == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("logvar", "offset"), [(-8.0, 0.0), (-8.0, 300.0), (-20.0, 0.0), (-40.0, 0.0), (-40.0, 3.0)])
def test_narrow_posteriors_lose_no_accuracy(logvar, offset):
    """Neighbours overlap, others are thousands of standard deviations away."""
    centres = 3 * randn(1, 31, 4).double() + offset
    neighbours = centres + math.exp(logvar / 2) * randn(2, 31, 4).double()
    mu = torch.cat([centres, neighbours])
    table = Posteriors(mu, logvar + 0.3 * randn(3, 62, 4).double())
    found = mutual_information(table, table.x, 2, seed=1)
    expected = brute_force(table, table.x, 2, seed=1).mean().item()
    assert math.log(31) - 0.01 < expected < math.log(62) - 0.05
    assert found.mutual_information == pytest.approx(expected, abs=1e-5)


def test_mutual_information_in_one_dimension_by_integration():
    mu = torch.tensor([[-1.3], [-0.2], [0.1], [0.9], [2.0]])
    logvar = torch.tensor([[-1.0], [-2.5], [0.3], [-1.7], [-0.4]])
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64).view(-1, 1, 1)
    log_q = log_normal(grid, mu, logvar)  # (grid, N)
    log_aggregate = log_q.logsumexp(-1) - math.log(5)
    spacing = 24 / 24_000
    aggregate_kl = (log_aggregate.exp() * (log_aggregate - log_standard_normal(grid)[:, 0])).sum().item() * spacing
    information = (log_q.exp() * (log_q - log_aggregate.unsqueeze(-1))).mean(-1).sum().item() * spacing
    table = Posteriors(mu, logvar)
    found = mutual_information(table, table.x, 20_000)
    assert found.standard_error < 0.003
    assert found.mutual_information == pytest.approx(information, abs=4 * found.standard_error)
    assert found.aggregate_kl == pytest.approx(aggregate_kl, abs=4 * found.standard_error)
    assert found.mean_kl == pytest.approx(information + aggregate_kl, abs=1e-6)


def test_aggregate_of_the_exact_posterior_comes_near_the_prior():
    """Over the model's own data q(z) is the prior, up to what N datapoints leave of it, and I is that of z and x."""
    model = LinearGaussian()
    information = 0.5 * (1 + model.W.detach().double().square().sum(0) / model.sigma**2).log().sum().item()
    found = mutual_information(model, data(model, 3001), 2)
    assert abs(found.aggregate_kl) < 0.01 + 3 * found.standard_error
    assert found.mutual_information == pytest.approx(information, abs=0.06)
    far = mutual_information(LinearGaussian().perturb(0.5), data(model, 3001), 2)
    assert far.aggregate_kl > 0.5


def test_standard_error_is_the_spread_over_seeds():
    table = Posteriors(randn(0, 21, 2), -2 + 0.5 * randn(1, 21, 2))
    runs = [mutual_information(table, table.x, 4, seed=seed) for seed in range(150)]
    spread = torch.tensor([run.mutual_information for run in runs]).std().item()
    assert sum(run.standard_error for run in runs) / 150 == pytest.approx(spread, rel=0.2)
    single = [mutual_information(table, table.x, 1, seed=seed) for seed in range(150)]
    spread = torch.tensor([run.mutual_information for run in single]).std().item()
    assert sum(run.standard_error for run in single) / 150 > 0.9 * spread


def test_mutual_information_at_its_bounds():
    apart = Posteriors(10.0 * torch.arange(41.0).unsqueeze(-1), torch.zeros(41, 1))
    found = mutual_information(apart, apart.x)
    assert found.mutual_information == pytest.approx(math.log(41), abs=1e-4)
    assert found.mutual_information <= math.log(41) + 1e-9
    alike = Posteriors(torch.full((41, 2), 0.7), torch.full((41, 2), -1.0))
    found = mutual_information(alike, alike.x)
    assert found.mutual_information == pytest.approx(0, abs=1e-9)
    assert found.aggregate_kl == pytest.approx(aevb.gaussian_kl(alike.mu, alike.logvar)[0].item(), abs=1e-6)
    one = mutual_information(alike, alike.x[:1])
    assert (one.mutual_information, one.standard_error) == (pytest.approx(0, abs=1e-9), 0)


# ---- what they have in common ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 40, 41, 1000])
def test_batches_change_nothing(batch_size):
    model, x = LinearGaussian().perturb(0.1), data(LinearGaussian(), 41)
    expected = posterior_collapse(model, x, num_samples=2, seed=3)
    found = posterior_collapse(model, x, num_samples=2, seed=3, batch_size=batch_size)
    torch.testing.assert_close(found.kl_per_dimension, expected.kl_per_dimension, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.active_units.variances, expected.active_units.variances, rtol=1e-6, atol=0)
    assert found.information.mutual_information == pytest.approx(expected.information.mutual_information, abs=1e-5)
    torch.testing.assert_close(kl_per_dimension(model, x, batch_size=batch_size), found.kl_per_dimension)
    torch.testing.assert_close(active_units(model, x, batch_size=batch_size).variances, found.active_units.variances)
    assert mutual_information(model, x, 2, seed=3, batch_size=batch_size) == found.information


def test_order_changes_only_whose_noise_is_whose():
    model, x = LinearGaussian().perturb(0.1), data(LinearGaussian(), 401)
    order = torch.randperm(401, generator=torch.Generator().manual_seed(0))
    a, b = (posterior_collapse(model, t, num_samples=4) for t in (x, x[order]))
    torch.testing.assert_close(a.kl_per_dimension, b.kl_per_dimension, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.active_units.variances, b.active_units.variances, rtol=1e-6, atol=0)
    assert a.information.mean_kl == pytest.approx(b.information.mean_kl, rel=1e-6)
    error = math.hypot(a.information.standard_error, b.information.standard_error)
    assert a.information.mutual_information != b.information.mutual_information
    assert a.information.mutual_information == pytest.approx(b.information.mutual_information, abs=4 * error)


def test_seeds_are_the_noise():
    model, x = LinearGaussian().perturb(0.1), data(LinearGaussian(), 21)
    before = torch.random.get_rng_state()
    assert mutual_information(model, x, seed=1) == mutual_information(model, x, seed=1)
    assert mutual_information(model, x, seed=1) != mutual_information(model, x, seed=2)
    for start in ("prior", "posterior"):
        runs = [
            annealed_importance_sampling(model, x, num_chains=2, num_temperatures=5, seed=seed, start=start).log_prob
            for seed in (1, 1, 2)
        ]
        assert torch.equal(runs[0], runs[1])
        assert (runs[0] != runs[2]).all()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_and_float64_models():
    x = data(LinearGaussian(), 11)
    expected = kl_per_dimension(LinearGaussian(), x)
    torch.testing.assert_close(kl_per_dimension(LinearGaussian().double(), x), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl_per_dimension(LinearGaussian().bfloat16(), x), expected, rtol=0.05, atol=0)
    fine, coarse = (
        annealed_importance_sampling(model, x, num_chains=4, num_temperatures=2, start="posterior")
        for model in (LinearGaussian().double(), LinearGaussian().bfloat16())
    )
    assert coarse.log_prob.dtype == torch.float64
    torch.testing.assert_close(coarse.log_prob, fine.log_prob, rtol=0, atol=1.0)


# ---- collapse -------------------------------------------------------------------------------------------------------


def test_a_dimension_without_effect_is_seen_to_collapse():
    model = LinearGaussian()
    with torch.no_grad():
        model.W[:, 1] = 0
    found = posterior_collapse(model.fit_encoder(), data(model, 201))
    assert found.collapsed.tolist() == [False, True, False]
    assert found.num_collapsed == 1
    assert found.active_units.mask.tolist() == [True, False, True]
    assert found.kl_per_dimension[1] == pytest.approx(0, abs=1e-9)
    assert not found.ignores_x
    text = str(found)
    assert "1 of 3 dimensions collapsed to the prior, with a mean KL below 0.01 nats: 1." in text
    assert "2 of 3 are active" in text
    assert "depends on x" in text
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["0", "2"]


def test_a_posterior_that_is_the_prior_ignores_x():
    model = LinearGaussian(latent_dim=5)
    with torch.no_grad():
        model.W.zero_()
    found = posterior_collapse(model.fit_encoder(), data(model, 101))
    assert found.num_collapsed == 5
    assert found.active_units.count == 0
    assert found.ignores_x
    assert found.information.mutual_information == pytest.approx(0, abs=1e-6)
    text = str(found)
    assert "below 0.01 nats: 0-4." in text
    assert "The posterior as a whole ignores x" in text
    assert "variance of the mean\n" not in text  # no empty table


def test_the_same_posterior_for_every_x_ignores_x_without_being_the_prior():
    table = Posteriors(torch.full((41, 2), 0.7), torch.full((41, 2), -1.0))
    found = posterior_collapse(table, table.x)
    assert (found.num_collapsed, found.active_units.count, found.ignores_x) == (0, 0, True)
    assert str(found).count("hardly moves with x") == 2


def test_many_dimensions_below_the_threshold_may_tell_something_together():
    table = Posteriors(0.12 * randn(0, 301, 100), torch.full((301, 100), -0.0144))
    found = posterior_collapse(table, table.x, num_samples=2)
    assert found.num_collapsed == 100
    assert found.information.mutual_information > 0.3
    assert not found.ignores_x
    assert ": 0-99." in str(found)


def test_thresholds_and_long_tables():
    mu = randn(0, 51, 30) * torch.linspace(1, 2, 30)
    table = Posteriors(mu, torch.full((51, 30), -2.0))
    found = posterior_collapse(table, table.x)
    assert "... and 10 more, of smaller KL" in str(found)
    assert "mean KL below 0.01 nats." in str(found)
    kl = found.kl_per_dimension
    high = posterior_collapse(table, table.x, float(kl.median()), active_threshold=2.0)
    assert high.num_collapsed == int((kl < kl.median()).sum()) > 0
    assert high.active_units.count == int((mu.double().var(0, correction=0) > 2).sum())
    assert "above 2." in str(high)
    assert "z tells these datapoints apart" in str(found)  # 51 of them, with posteriors far apart
    info = replace(found.information, mutual_information=1.0)
    few = replace(found, information=info)
    assert "depends on x" in str(few)
    assert "ignores x" in str(replace(few, ignores_x=True))


# ---- annealed importance sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_ais_finds_the_marginal_likelihood(start):
    model = LinearGaussian()
    x = data(model, 31)
    expected = model.log_marginal(x).detach()
    model.perturb(0.1)
    found = annealed_importance_sampling(model, x, num_temperatures=300, num_chains=24, start=start)
    error = found.log_prob - expected
    assert error.abs().max() < 0.35
    assert error.mean().abs() < 0.03
    assert found.standard_error.max() < 0.15
    assert (error.abs() < 4.5 * found.standard_error).all()
    assert 0.5 < (error / found.standard_error).square().mean() < 2
    # 65% is what the step size is adapted to.
    torch.testing.assert_close(found.acceptance_rate, torch.full((31,), 0.65).double(), rtol=0, atol=0.06)
    assert found.effective_sample_size.min() > 12


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_ais_weights_are_unbiased_however_few_temperatures(start):
    """E[w] = p(x): a wrong acceptance, gradient sign or adaptation shows here, where annealing is crude."""
    model = LinearGaussian(4, 2, sigma=0.8)
    x = data(model, 3, seed=4)
    expected = model.log_marginal(x).detach()
    model.perturb(0.25, seed=2)
    found = annealed_importance_sampling(
        model, x, num_temperatures=6, num_chains=100_000, num_leapfrog=3, seed=1, start=start
    )
    assert found.standard_error.max() < 0.01
    assert ((found.log_prob - expected).abs() < 4 * found.standard_error).all()
    # The mean is what is unbiased; the log of a single weight is below.
    assert (found.log_weights.mean(0) < expected - 4 * found.standard_error).all()


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_one_temperature_is_importance_sampling(start):
    model = LinearGaussian().double().perturb(0.2)
    recorded, x = Recorded(model), data(LinearGaussian(), 11).double()
    found = annealed_importance_sampling(recorded, x, num_temperatures=1, num_chains=5, start=start)
    assert len(recorded.z) == 1
    z = recorded.z[0][annealing.PILOT_CHAINS :]
    with torch.no_grad():
        log_start = log_normal(z, *model.encode(x)) if start == "posterior" else log_standard_normal(z)
        expected = model.log_prob(x, z) + log_standard_normal(z) - log_start
    torch.testing.assert_close(found.log_weights, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.log_prob, expected.logsumexp(0) - math.log(5), rtol=0, atol=1e-9)
    assert found.acceptance_rate.isnan().all()


def test_the_exact_posterior_gives_equal_weights():
    model = LinearGaussian()
    x = data(model, 11)
    found = annealed_importance_sampling(model, x, num_temperatures=10, num_chains=3, start="posterior")
    torch.testing.assert_close(found.log_prob, model.log_marginal(x).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.effective_sample_size, torch.full((11,), 3.0).double())
    assert found.standard_error.max() < 1e-5


def test_the_summary_is_that_of_the_weights():
    model = LinearGaussian()
    found = annealed_importance_sampling(model, data(model, 5), num_temperatures=8, num_chains=7)
    assert found.log_weights.shape == (7, 5)
    weights = found.log_weights.exp()
    torch.testing.assert_close(found.log_prob, weights.mean(0).log())
    torch.testing.assert_close(found.standard_error, weights.std(0) / math.sqrt(7) / weights.mean(0))
    torch.testing.assert_close(found.effective_sample_size, weights.sum(0) ** 2 / (weights**2).sum(0))
    single = annealed_importance_sampling(model, data(model, 5), num_temperatures=8, num_chains=1)
    assert single.standard_error.isnan().all()
    torch.testing.assert_close(single.log_prob, single.log_weights[0])


def test_temperatures_are_evenly_spaced_on_a_sigmoid():
    for count in (1, 2, 101):
        found = torch.tensor(annealing._temperatures(count), dtype=torch.float64)
        sigmoid = torch.linspace(-4, 4, count + 1, dtype=torch.float64).sigmoid()
        expected = (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert (found[0], found[-1]) == (0, 1)


def test_the_acceptance_rate_is_of_all_transitions():
    model = LinearGaussian()
    found = annealed_importance_sampling(model, data(model, 11), num_temperatures=4, num_chains=5).acceptance_rate
    accepted = found * 5 * 3
    torch.testing.assert_close(accepted, accepted.round(), rtol=0, atol=1e-9)
    assert len(accepted.round().unique()) > 2
    assert accepted.max() <= 15 + 1e-9


def test_ais_does_not_depend_on_batches_nor_on_how_many_chains():
    """In float64, where rounding turns no acceptance. That chains are the same with others beside them shows that none
    of those that count moves the step size."""
    model = LinearGaussian().double()
    x = data(LinearGaussian(), 7).double()

    def run(x, **options):
        return annealed_importance_sampling(model, x, num_temperatures=30, num_leapfrog=3, **options).log_weights

    whole = run(x, num_chains=6)
    torch.testing.assert_close(run(x, num_chains=6, batch_size=3), whole, rtol=0, atol=1e-8)
    torch.testing.assert_close(run(x[:4], num_chains=6), whole[:, :4], rtol=0, atol=1e-8)
    torch.testing.assert_close(run(x, num_chains=2), whole[:2], rtol=0, atol=1e-8)
    assert len(whole.unique()) == whole.numel()


def test_more_temperatures_are_tighter():
    model = LinearGaussian(sigma=0.2)
    x = data(model, 21)
    bounds = [
        annealed_importance_sampling(model, x, num_temperatures=t, num_chains=8, num_leapfrog=5).log_prob.mean()
        for t in (1, 20, 150)
    ]
    expected = model.log_marginal(x).detach().mean()
    assert bounds[0] < bounds[1] - 1 < bounds[2] - 2 < expected


def test_ais_of_a_vae_by_integration():
    """A decoder that is not linear, in one latent dimension, where p(x) can be integrated."""
    vae = aevb.VAE(21, 16, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(2.5)
    x = rand(0, 9, 21) < 0.5
    grid = torch.linspace(-10, 10, 8001).view(-1, 1, 1)
    with torch.no_grad():
        log_joint = aevb.reference.bernoulli_log_prob(
            vae.decode(grid).double().expand(-1, 9, -1), x
        ) + log_standard_normal(grid)
    expected = log_joint.logsumexp(0) + math.log(20 / 8000)
    for start in ("prior", "posterior"):
        found = annealed_importance_sampling(
            Bernoulli(vae), x, num_temperatures=60, num_chains=600, num_leapfrog=4, start=start
        )
        assert found.standard_error.max() < 0.06
        assert ((found.log_prob - expected).abs() < 4 * found.standard_error).all()


def test_neither_gradients_nor_graphs_are_left():
    model = LinearGaussian()
    x = data(model, 5)
    with torch.enable_grad():
        found = annealed_importance_sampling(model, x, num_temperatures=3, num_chains=2)
        kl = kl_per_dimension(model, x)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(t.requires_grad for t in (found.log_prob, found.standard_error, found.log_weights, kl))


def test_ais_works_where_gradients_are_off():
    model = Bernoulli(aevb.VAE(6, 5, 2, generator=torch.Generator().manual_seed(0)))
    x = rand(0, 5, 6)

    def run(x: Tensor) -> Tensor:
        return annealed_importance_sampling(model, x, num_temperatures=5, num_chains=2).log_prob

    expected = run(x)
    with torch.no_grad():
        assert torch.equal(run(x), expected)
    with torch.inference_mode():
        assert torch.equal(run(x.clone()), expected)


def test_a_step_that_leaves_the_numbers_is_rejected():
    """A likelihood that is NaN, or impossible, beyond |z| = 0.5: chains stay within, and weights stay finite."""

    class Fenced(LinearGaussian):
        outside = math.nan

        def log_prob(self, x, z):
            inside = z.abs().amax(-1) < 0.5
            return torch.where(inside, super().log_prob(x, z), self.outside)

    model = Fenced(4, 2)
    with torch.no_grad():
        model.v.fill_(-6)  # starts within
    x = model.b.detach().repeat(3, 1)  # the posterior's mean is 0
    for model.outside in (math.nan, -math.inf):
        found = annealed_importance_sampling(model, x, num_temperatures=20, num_chains=4, start="posterior")
        assert found.log_weights.isfinite().all()
        assert (found.acceptance_rate > 0).all()


# ---- sentences ------------------------------------------------------------------------------------------------------


def ais(model=None, x=None, **options):
    model = LinearGaussian() if model is None else model
    return annealed_importance_sampling(model, torch.zeros(3, 6) if x is None else x, **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ais(num_chains=0), "num_chains is 0; expected at least 1"),
        (lambda: ais(num_temperatures=0), "num_temperatures is 0; expected at least 1"),
        (lambda: ais(num_leapfrog=-1), "num_leapfrog is -1; expected at least 1"),
        (lambda: ais(batch_size=0), "batch_size is 0; expected at least 1"),
        (lambda: ais(start="q"), "start is 'q'; expected 'prior' or 'posterior'"),
        (lambda: ais(seed=2**63), "seed is 9223372036854775808; expected a 64-bit signed integer"),
        (lambda: ais(x=torch.zeros(0, 6)), "x has shape (0, 6); expected (N, ...), of at least one datapoint"),
        (
            lambda: kl_per_dimension(LinearGaussian(), torch.tensor(1.0)),
            "x has shape (); expected (N, ...), of at least one datapoint",
        ),
        (
            lambda: kl_per_dimension(LinearGaussian(), torch.zeros(3, 6), batch_size=0),
            "batch_size is 0; expected at least 1",
        ),
        (
            lambda: active_units(LinearGaussian(), torch.zeros(3, 6), threshold=-0.1),
            "threshold is -0.1; expected a number from 0 up",
        ),
        (
            lambda: posterior_collapse(LinearGaussian(), torch.zeros(3, 6), math.nan),
            "threshold is nan; expected a number from 0 up",
        ),
        (
            lambda: posterior_collapse(LinearGaussian(), torch.zeros(3, 6), active_threshold=math.inf),
            "active_threshold is inf; expected a number from 0 up",
        ),
        (
            lambda: posterior_collapse(LinearGaussian(), torch.zeros(3, 6), num_samples=0),
            "num_samples is 0; expected at least 1",
        ),
        (
            lambda: mutual_information(LinearGaussian(), torch.zeros(3, 6), 0),
            "num_samples is 0; expected at least 1",
        ),
        (
            lambda: kl_per_dimension(Posteriors(torch.zeros(5, 2), torch.zeros(5, 1)), torch.zeros(3, 1).long()),
            "model.encode(x) gives mu (3, 2) and logvar (3, 1) for x (3, 1); expected (3, latent_dim) of both",
        ),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == sentence


def test_what_is_not_finite_is_named():
    mu, logvar = torch.zeros(9, 2), torch.zeros(9, 2)
    mu[7, 1] = math.nan
    table = Posteriors(mu, logvar)
    with pytest.raises(ValueError, match=r"^mu\[1\] of datapoint 7 is nan; expected finite numbers: has training"):
        kl_per_dimension(table, table.x, batch_size=4)
    logvar[2, 0], mu[7, 1] = math.inf, 0
    with pytest.raises(ValueError, match=r"^logvar\[0\] of datapoint 2 is inf"):
        mutual_information(table, table.x)


def test_a_bad_likelihood_is_named():
    model = LinearGaussian()
    model.log_prob = lambda x, z: z
    with pytest.raises(
        ValueError, match=r"^model\.log_prob\(x, z\) has shape \(6, 3, 3\) for z \(6, 3, 3\); expected "
    ):
        ais(model, num_chains=2)
    model.log_prob = lambda x, z: z.sum(-1) * torch.tensor([0.0, math.nan])[int(bool(x[0, 0]))]
    x = torch.zeros(5, 6)
    x[3] = 1
    with pytest.raises(ValueError, match=r"^model\.log_prob\(x, z\) is NaN for datapoint 3 at a z from the start; "):
        ais(model, x, batch_size=1, num_temperatures=1)
