"""`log_marginal_likelihood`: K samples are K samples, and noise belongs to the datapoint and the sample."""

import math

import pytest
import torch
from conftest import rand
from linear_gaussian import LinearGaussian

import aevb
from aevb.inference import marginal_likelihood as marginal
from aevb.inference.marginal_likelihood import MarginalLikelihood, log_marginal_likelihood


def gaussian(amount=0.02, count=41):
    model = LinearGaussian().perturb(amount, seed=1)
    return model, model.sample(count, torch.Generator().manual_seed(2))


def by_hand(model, x, num_samples, seed):
    """The estimate as its docstring says, all samples at once, in float64."""
    mu, logvar = model.encode(x)
    seeds = aevb.mix_seed(seed, torch.arange(len(x)))
    each = [
        aevb.sample_gaussian_log_ratio(mu, logvar, seed=aevb.mix_seed(seeds, torch.full((len(x),), k)))
        for k in range(num_samples)
    ]
    weights = torch.stack([model.log_prob(x, z) - ratio for z, ratio in each]).detach().double()
    return weights.logsumexp(0) - math.log(num_samples), weights


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100])
def test_k_samples_are_k_samples(num_samples):
    model, x = gaussian()
    found = log_marginal_likelihood(model, x, num_samples, seed=5)
    expected, log_weights = by_hand(model, x, num_samples, 5)
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)
    assert found.num_samples == num_samples
    assert found.mean == pytest.approx(float(expected.mean()), abs=1e-5)
    weights = (log_weights - log_weights.amax(0)).exp()
    torch.testing.assert_close(
        found.effective_sample_size, weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-4, atol=0
    )
    if num_samples == 1:
        assert found.standard_error.isnan().all()
    else:
        error = weights.std(0) / weights.mean(0) / num_samples**0.5
        torch.testing.assert_close(found.standard_error, error, rtol=1e-3, atol=1e-6)


def test_one_sample_is_the_elbos():
    """On average over the noise, the ELBO; and it is not a bound of more samples."""
    model, x = gaussian(0.1)
    one = torch.stack([log_marginal_likelihood(model, x, 1, seed=s).log_prob for s in range(200)])
    mu, logvar = model.encode(x)
    z, kl = aevb.sample_gaussian(mu, logvar, 2000, seed=9)
    elbo = (model.log_prob(x, z).mean(0) - kl).detach()
    assert ((one.mean(0) - elbo).abs() < 5 * one.std(0) / 200**0.5 + 0.05).all()


@pytest.mark.parametrize("rows", [1, 10, 100, 1000, 100_000])
def test_how_the_work_is_cut_changes_nothing(rows):
    model, x = gaussian()
    whole = log_marginal_likelihood(model, x, 50, seed=5)
    cut = log_marginal_likelihood(model, x, 50, seed=5, rows=rows)
    for name in ("log_prob", "standard_error", "effective_sample_size"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_the_datapoint():
    """In another order, in another company, alone: the same value."""
    model, x = gaussian()
    whole = log_marginal_likelihood(model, x, 50, seed=5).log_prob
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    mixed = log_marginal_likelihood(model, x[order], 50, seed=5, index=order).log_prob
    torch.testing.assert_close(mixed, whole[order], rtol=0, atol=1e-5)
    alone = log_marginal_likelihood(model, x[7:8], 50, seed=5, index=torch.tensor([7])).log_prob
    torch.testing.assert_close(alone, whole[7:8], rtol=0, atol=1e-5)
    assert (log_marginal_likelihood(model, x, 50, seed=6).log_prob - whole).abs().min() > 1e-6


def test_agrees_with_the_closed_form():
    model, x = gaussian()
    found = log_marginal_likelihood(model, x, 5000)
    error = (found.log_prob - model.log_marginal(x)) / found.standard_error
    assert error.abs().max() < 4.5
    assert 0.3 < error.square().mean() < 2.5
    total = found.mean - float(model.log_marginal(x).detach().mean())
    assert abs(total) < 4 * found.mean_standard_error


def test_exact_where_the_posterior_is():
    model, x = gaussian(0)
    found = log_marginal_likelihood(model, x, 3)
    torch.testing.assert_close(found.log_prob, model.log_marginal(x), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        found.effective_sample_size, torch.full((41,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_standard_error_is_that_of_other_noise():
    model, x = gaussian()
    runs = [log_marginal_likelihood(model, x, 100, seed=s) for s in range(40)]
    spread = torch.stack([r.log_prob for r in runs]).std(0)
    stated = torch.stack([r.standard_error for r in runs]).mean(0)
    assert 0.75 < float((spread / stated).mean()) < 1.25


def test_weights_that_differ_by_thousands_of_nats():
    """The running sum never over- or underflows, whatever comes first; no weight at all is -inf, a NaN stays one."""
    for values in (
        [[-5000.0], [3000.0], [-7000.0]],
        [[3000.0], [-5000.0], [2999.0]],
        [[-math.inf], [-3.0], [-math.inf]],
    ):
        mean = marginal._LogMeanExp(1, torch.device("cpu"))
        for value in values:
            mean.add(torch.tensor([value]))
        log_mean, error, effective = mean.result()
        every = torch.tensor(values, dtype=torch.float64).flatten()
        assert float(log_mean) == pytest.approx(float(every.logsumexp(0)) - math.log(3))
        assert 0.99 < float(effective) <= 2
        assert error.isfinite().all()
    mean = marginal._LogMeanExp(2, torch.device("cpu"))
    mean.add(torch.tensor([[-math.inf, math.nan], [-math.inf, 0.0]]))
    log_mean, *_ = mean.result()
    assert log_mean[0] == -math.inf
    assert log_mean[1].isnan()


def test_of_a_vae():
    """The fused decoder gives what the logits give; memory does not grow with num_samples; nothing needs a gradient."""
    model = aevb.VAE(33, (20, 9), 4, generator=torch.Generator().manual_seed(1))
    x = rand(3, 7, 33) < 0.4

    class Plain:
        encode = model.encode

        @staticmethod
        def log_prob(x, z):
            return aevb.bernoulli_log_prob(model.decode(z), x)

    found, expected = (log_marginal_likelihood(m, x, 60, seed=3) for m in (model, Plain))
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-5)
    assert not found.log_prob.requires_grad
    assert found.log_prob.dtype == torch.float64

    seen = []
    original = model.log_prob
    model.log_prob = lambda x, z: seen.append(z.shape[:-1].numel()) or original(x, z)
    log_marginal_likelihood(model, x, 1000, rows=50)
    assert max(seen) <= 50
    assert sum(seen) == 7 * 1000


def test_nothing_to_evaluate():
    model, x = gaussian()
    assert log_marginal_likelihood(model, x[:0], 5).log_prob.shape == (0,)


def test_progress(capsys):
    model, x = gaussian()
    log_marginal_likelihood(model, x, 5, progress=True)
    assert "205/205" in capsys.readouterr().err
    log_marginal_likelihood(model, x, 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"rows": -1}, "rows is -1; expected at least 1"),
        ({"index": torch.arange(5)}, r"index has shape \(5,\); expected \(41,\)"),
        ({"x": torch.tensor(1.0)}, "x has no dimensions"),
    ],
    ids=str,
)
def test_errors(change, match):
    model, x = gaussian()
    with pytest.raises(ValueError, match=match):
        log_marginal_likelihood(model, **{"x": x, **change})


def test_the_mean_and_its_error():
    numbers = MarginalLikelihood(torch.tensor([-3.0, -5.0]), torch.tensor([0.3, 0.4]), torch.ones(2), 9)
    assert numbers.mean == -4
    assert numbers.mean_standard_error == pytest.approx(0.25)


@pytest.mark.parametrize(
    "reduce", [torch.mean, lambda t: t.mean(0), lambda t: t.sum(1)], ids=["all", "samples", "batch"]
)
def test_a_log_prob_of_another_shape_gets_a_sentence(reduce):
    """The mean over everything would pass for log p(x)."""
    model, x = gaussian()

    class Wrong:
        encode = model.encode

        @staticmethod
        def log_prob(x, z):
            return reduce(model.log_prob(x, z))

    with pytest.raises(
        ValueError, match=r"model.log_prob\(x, z\) has shape .* expected \(\d+, \d+\): one log p\(x|z\)"
    ):
        log_marginal_likelihood(Wrong, x, 20)
