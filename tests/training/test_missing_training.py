"""Training on data with missing values: by the likelihood of what is observed, and by nothing of what is not."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import aevb
from aevb import reference
from aevb.checks.choices import ESTIMATORS
from aevb.data import Dataset, load
from aevb.likelihoods import REGISTRY
from aevb.ops.linear import floating
from aevb.training.objectives import Objective, Terms
from aevb.training.step import AutogradStep
from aevb.training.step_direct import DirectStep

SMALL = {"epochs": 2, "hidden_dims": (12,), "latent_dim": 3, "threads": 1, "progress": False}


def digits(under=0, share=0.7, count=150):
    """Digits with pixels missing at random, in whose place is `under`."""
    whole = load("digits", validation=0.1)
    generator = torch.Generator().manual_seed(0)
    images, observed = {}, {}
    for part in ("train", "test", "validation"):
        x = getattr(whole, f"{part}_images")[:count]
        observed[part] = torch.rand(x.shape, generator=generator) < share
        images[f"{part}_images"] = x.where(observed[part], torch.tensor(under, dtype=torch.uint8))
    return Dataset(whole.name, whole.image_shape, whole.max_value, **images, observed=observed)


def unit(data):
    """The same as floats in [0, 1]."""
    images = {f"{part}_images": getattr(data, f"{part}_images") / data.max_value for part in data.observed}
    return Dataset(data.name, data.image_shape, 1, **images, observed=data.observed)


def trained(data, **options):
    trainer = aevb.Trainer(aevb.TrainConfig(**{**SMALL, **options}), dataset=data)
    found = [trainer.train_epoch(), trainer.evaluate(), trainer.evaluate(part="validation")]
    return trainer, found, [p.detach().clone() for p in trainer.model.parameters()]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(p, q) for p, q in zip(a[2], b[2], strict=True))


@pytest.mark.parametrize("likelihood", REGISTRY)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mask_input", [False, True])
def test_what_lies_under_a_mask_changes_nothing(likelihood, estimator, mask_input):
    options = {"likelihood": likelihood, "estimator": estimator, "mask_input": mask_input}
    options |= {"num_samples": 1 if estimator == "sgvb-b" else 3}
    first, second = (trained(digits(under), **options) for under in (0, 9))
    assert same(first, second)
    assert all(math.isfinite(found.elbo) for found in first[1])
    holes = unit(digits())
    nans = {f"{p}_images": getattr(holes, f"{p}_images").where(m, torch.nan) for p, m in holes.observed.items()}
    third, fourth = trained(holes, **options), trained(dataclasses.replace(holes, **nans), **options)
    assert same(third, fourth)


@pytest.mark.parametrize("options", [{"binarize": "threshold"}, {"free_bits": 0.1}, {"capacity": 2.0}, {"beta": 0.5}])
def test_with_other_options(options):
    assert same(trained(digits(0), **options), trained(digits(9), **options))


@pytest.mark.parametrize("mask_input", [False, True])
def test_convolutional(mask_input):
    options = {"architecture": "conv", "channels": (4,), "mask_input": mask_input}
    first = trained(digits(0), **options)
    assert same(first, trained(digits(9), **options))
    assert first[0].model.encoder[1].in_channels == 1 + mask_input


@pytest.mark.parametrize("options", [{}, {"estimator": "iwae", "num_samples": 3}, {"architecture": "conv"}])
def test_masks_that_hide_nothing_are_no_masks(options):
    data = digits(share=2.0)
    assert data.observed == {}
    plain = dataclasses.replace(data, observed={})
    first, second = trained(data, **options), trained(plain, **options)
    assert same(first, second)


@pytest.mark.parametrize("likelihood", REGISTRY)
@pytest.mark.parametrize("mask_input", [False, True])
def test_the_loss_is_of_what_is_observed(likelihood, mask_input):
    """Against the ELBO from the pixels one by one, in the same noise."""
    data = digits()
    trainer, _, _ = trained(data, likelihood=likelihood, mask_input=mask_input, binarize="none")
    step = trainer.loop.training_step()
    assert type(step) is DirectStep
    index, seeds = torch.arange(17), torch.tensor(5)
    x, observed = step.batch(index, seeds), step.observed(index)
    found = step.terms(x, step.noise_seeds(seeds, index), observed)
    model, values = trainer.model, floating(x, step.x_scale, torch.empty(0))
    mu, logvar = model.encode(values, observed=observed)
    z, kl = aevb.sample_gaussian(mu, logvar, seed=step.noise_seeds(seeds, index))
    family = model.family
    pixels = family.element_log_prob(family.parameters(model.decode(z)), values)
    expected = (kl - pixels.where(observed, 0).sum(-1)).mean()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(kl, reference.gaussian_kl(mu, logvar))


def test_reports_are_of_normalised_densities():
    """`mse` trains without its constant, of which each observed value has one."""
    data = unit(digits())
    trainer, found, _ = trained(data, likelihood="mse", learning_rate=1e-12, batch_size=150)
    constant = -0.5 * math.log(2 * math.pi) * float(data.observed["train"].float().sum(1).mean())
    step = AutogradStep(
        *(getattr(trainer, name) for name in ("model", "criterion", "optimizer")), trainer.loop.inputs, None
    )
    seeds = step.noise_seeds(trainer.noise_seeds(0)[1], torch.arange(len(data.train_images)))
    with torch.no_grad():
        terms = step.terms(data.train_images, seeds, data.observed["train"])
    assert found[0].elbo == pytest.approx(float(-terms.loss) + constant, rel=1e-5)


@pytest.mark.parametrize("mask_input", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"binarize": "none", "likelihood": "gaussian", "variance": "shared"}, {"hidden_dims": (12, 9)}]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_without_autograd_have_the_bits_of_autograds(estimator, options, mask_input):
    options = {**options, "estimator": estimator, "num_samples": 3, "mask_input": mask_input}
    trainer = aevb.Trainer(aevb.TrainConfig(**{**SMALL, **options}), dataset=digits())
    direct = trainer.loop.training_step()
    assert type(direct) is DirectStep
    found, index = [], torch.arange(0, 150, 2)
    for cls in (DirectStep, AutogradStep):
        step = cls(*(getattr(direct, name) for name in ("model", "criterion", "optimizer", "batch", "x_scale")))
        x, seeds = step.batch(index, torch.tensor(5)), step.noise_seeds(torch.tensor(6), index)
        outcome = step.gradients(x, seeds, step.observed(index))
        found.append([outcome.numbers, *(p.grad.clone() for p in trainer.model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_nothing_observed_of_an_image():
    data = digits()
    observed = dict(data.observed)
    observed["train"] = observed["train"].clone()
    observed["train"][:3] = False
    observed["train"][:, 7] = False
    trainer, found, _ = trained(dataclasses.replace(data, observed=observed), mask_input=True)
    assert all(math.isfinite(average.elbo) for average in found)
    filled = trainer.model.impute(torch.full((2, 64), torch.nan), torch.zeros(64, dtype=torch.bool), num_samples=20)
    assert filled.mean.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"architecture": "conv", "channels": (4,)}])
def test_a_mask_beside_the_values_is_an_option_of_the_model(tmp_path, options):
    config = aevb.TrainConfig(**{**SMALL, **options}, mask_input=True, out=str(tmp_path / "run"))
    trainer = aevb.Trainer(config, dataset=digits())
    trainer.fit()
    model = aevb.load(tmp_path / "run")
    assert model.mask_input
    x, observed = digits().test_images / 16, digits().observed["test"]
    for found, expected in zip(
        model.encode(x, observed=observed), trainer.model.encode(x, observed=observed), strict=True
    ):
        assert torch.equal(found, expected)
    assert not torch.equal(model.encode(x)[0], model.encode(x, observed=observed)[0])
    assert aevb.Trainer(config, model=model, dataset=digits()).config.mask_input


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    np.save(tmp_path / "some.npy", (digits().train_images / 16).where(digits().observed["train"], torch.nan).numpy())
    options = {**SMALL, "data": str(tmp_path / "some.npy"), "missing": "nan", "mask_input": True, "validation": 0.2}
    whole = aevb.Trainer(aevb.TrainConfig(**{**options, "epochs": 4}, out=str(tmp_path / "whole")))
    whole.fit()
    aevb.Trainer(aevb.TrainConfig(**options, out=str(tmp_path / "half"))).fit()
    half = aevb.Trainer.resume(tmp_path / "half", epochs=4)
    half.fit()
    for p, q in zip(whole.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(p, q)
    np.save(tmp_path / "mask.npy", digits().observed["train"].numpy())
    other = {**options, "missing": None, "mask": str(tmp_path / "mask.npy")}
    with pytest.raises(ValueError, match=r"missing is None, but the run in .* began with 'nan'"):
        aevb.Trainer(aevb.TrainConfig(**other, out=str(tmp_path / "half"), resume=True)).fit()


def test_a_run_goes_on_with_the_masks_that_it_began_with(tmp_path):
    config = aevb.TrainConfig(**SMALL, out=str(tmp_path / "run"))
    aevb.Trainer(config, dataset=digits()).fit()
    other = dict(digits().observed)
    other["train"] = other["train"].roll(1, 0)
    data = dataclasses.replace(digits(), observed=other)
    with pytest.raises(ValueError, match="the run was of other data"):
        aevb.Trainer.resume(tmp_path / "run", dataset=data, epochs=3).fit()
    aevb.Trainer.resume(tmp_path / "run", dataset=digits(), epochs=3).fit()


class Mine(nn.Module):
    """A model with encode and log_prob alone."""

    def __init__(self, inputs=64):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(inputs, 8), nn.Linear(4, 64)

    def encode(self, x):
        return self.encoder(x).chunk(2, -1)

    def log_prob(self, x, z):
        return aevb.bernoulli_log_prob(self.decoder(z), x)


class Weighed(Mine):
    def log_prob(self, x, z, weight=None):
        return aevb.bernoulli_log_prob(self.decoder(z), x, weight=weight)


class Masked(Weighed):
    mask_input = True

    def __init__(self):
        super().__init__(128)

    def encode(self, x, observed):
        return super().encode(torch.cat([x, observed.to(x.dtype)], -1))


def test_models_of_ones_own():
    config = aevb.TrainConfig(**SMALL)
    with pytest.raises(
        ValueError, match=r"Mine.log_prob takes no weight, and values are missing; expected log_prob\(x, z"
    ):
        aevb.Trainer(config, model=Mine(), dataset=digits())
    for kind in (Weighed, Masked):
        torch.manual_seed(0)
        model = kind()
        again = kind()
        again.load_state_dict(model.state_dict())
        found = []
        for made, under in ((model, 0), (again, 9)):
            with pytest.warns(UserWarning, match="has encode and log_prob alone"):
                trainer = aevb.Trainer(config, model=made, dataset=digits(under))
            found.append((trainer.train_epoch(), trainer.evaluate()))
        assert found[0] == found[1]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_an_objective_that_knows_no_masks_says_so():
    class Other(Objective):
        def terms_given(self, model, x, x_scale, mu, logvar, seeds, of_whole_batch=None):
            return Terms(mu.mean(), torch.zeros(()), torch.zeros(()))

    trainer = aevb.Trainer(aevb.TrainConfig(**SMALL), dataset=digits())
    trainer.state.objective = Other()
    with pytest.raises(ValueError, match="values are missing, and the objective, a Other, has a terms_given without"):
        trainer.train_epoch()


def test_options_of_a_data_set_that_is_there_already():
    for options in ({"missing": "nan"}, {"mask": "mask.npy"}):
        with pytest.raises(ValueError, match=r"the data set given is a Dataset already; expected Dataset\(\.\.\., obs"):
            aevb.Trainer(aevb.TrainConfig(**SMALL, **options), dataset=digits())


def test_what_is_not_finite_is_found_where_values_are_missing():
    data = digits()
    trainer, _, _ = trained(data)
    with torch.no_grad():
        trainer.model.decoder[0].weight.fill_(torch.inf)
    assert "weight" in trainer.loop.explain_held_out("test").text
