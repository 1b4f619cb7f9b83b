"""Training with a learned prior: against plain PyTorch, saved, resumed, and by the command line."""

import dataclasses
import json
import math
import re

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import aevb
from aevb.checks.choices import ESTIMATORS
from aevb.cli import main
from aevb.data import Dataset, load
from aevb.training.step import AutogradStep
from aevb.training.step_direct import DirectStep

SMALL = {"epochs": 2, "hidden_dims": (12,), "latent_dim": 3, "threads": 1, "progress": False}


def digits(count=150):
    whole = load("digits", validation=0.1)
    images = {f"{part}_images": getattr(whole, f"{part}_images")[:count] for part in ("train", "test", "validation")}
    return Dataset(whole.name, whole.image_shape, whole.max_value, **images)


class Mine(nn.Module):
    """A model with encode and log_prob alone, and a prior."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 6), nn.Linear(3, 64)
        self.mean, self.log_variance = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    @property
    def prior_parameters(self):
        return self.mean, self.log_variance

    def encode(self, x):
        return self.encoder(x).chunk(2, -1)

    def log_prob(self, x, z):
        return aevb.bernoulli_log_prob(self.decoder(z), x)


class WithoutPrior(Mine):
    prior_parameters = None


def trainer_of(model=None, move=True, **options):
    """A trainer whose model's prior is not N(0, I)."""
    prior = {} if model is not None else {"prior": "learned"}
    trainer = aevb.Trainer(aevb.TrainConfig(**{**SMALL, **prior, **options}), model=model, dataset=digits())
    if move:
        with torch.no_grad():
            mu, logvar = trainer.model.prior_parameters
            mu.copy_(torch.tensor([0.7, -1.1, 0.2]))
            logvar.copy_(torch.tensor([0.5, -0.8, 0.1]))
    return trainer


def prior(model):
    mu, logvar = model.prior_parameters
    return Normal(mu, (0.5 * logvar).exp())


def posterior(model, x):
    mu, logvar = model.encode(x)
    return Normal(mu, (0.5 * logvar).exp())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["mlp", "conv", "own"])
def test_gradients_are_those_of_the_formula(estimator, kind):
    """The prior's is the total gradient under every estimator: z does not depend on it, and q's part has none."""
    options = {"estimator": estimator, "num_samples": 1 if estimator == "sgvb-b" else 4, "binarize": "threshold"}
    model = Mine() if kind == "own" else None
    trainer = trainer_of(model, architecture="conv" if kind == "conv" else "mlp", channels=(4,), **options)
    model, step = trainer.model, trainer.loop.training_step()
    assert type(step) is AutogradStep
    index, seed = torch.arange(30), torch.tensor(5)
    x = step.batch(index, seed)
    seeds = step.noise_seeds(seed, index)
    outcome = step.gradients(x, seeds)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    x = x.float() if step.x_scale is None else x * step.x_scale
    q, p = posterior(model, x), prior(model)
    z = step.objective.sample(*model.encode(x), seeds)
    if estimator == "sgvb-b":
        bound, kl = model.log_prob(x, z) - kl_divergence(q, p).sum(-1), kl_divergence(q, p).sum(-1)
    else:
        kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
        log_w = model.log_prob(x, z) - kl
        weighted = ESTIMATORS[estimator].importance_weighted
        bound = log_w.logsumexp(0) - math.log(len(log_w)) if weighted else log_w.mean(0)
    loss = -bound.mean()
    loss.backward()
    assert float(outcome.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(outcome.kl) == pytest.approx(kl.mean().item(), rel=1e-4)
    total = ESTIMATORS[estimator].gradient in (None, "total")
    of_prior = [id(t) for t in model.prior_parameters]
    for name, parameter in model.named_parameters():
        if id(parameter) in of_prior:
            assert parameter.grad.abs().max() > 0.01
        if total or not name.startswith("encoder"):
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * float(scale))


@pytest.mark.parametrize("kind", ["mlp", "own"])
def test_the_evaluated_elbo_is_the_formula(kind):
    trainer = trainer_of(Mine() if kind == "own" else None)
    model, held_out = trainer.model, trainer.held_out["test"]
    x, seeds = held_out.x(index := torch.arange(held_out.count)), held_out.seeds(index)
    x = x.float()
    with torch.no_grad():
        kl = kl_divergence(posterior(model, x), prior(model)).sum(-1)
        z = aevb.sample_gaussian(*model.encode(x), seed=seeds)[0]
        log_prob = model.log_prob(x, z)
    found = trainer.evaluate()
    assert found.kl == pytest.approx(float(kl.double().mean()), rel=1e-5)
    assert found.log_likelihood == pytest.approx(float(log_prob.double().mean()), rel=1e-5)
    assert found.elbo == pytest.approx(float((log_prob - kl).double().mean()), rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_prior_that_is_still_standard_gives_the_numbers_of_standard(estimator):
    options = {"estimator": estimator, "num_samples": 1 if estimator == "sgvb-b" else 3}
    learned, standard = trainer_of(move=False, **options), trainer_of(move=False, prior="standard", **options)
    assert type(standard.loop.training_step()) is DirectStep
    index, seed = torch.arange(40), torch.tensor(3)
    found = []
    for trainer in (learned, standard):
        step = trainer.loop.training_step()
        outcome = step.gradients(step.batch(index, seed), step.noise_seeds(seed, index))
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        found.append((outcome.numbers, gradients, trainer.evaluate()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-3, atol=1e-5)
    assert found[0][2].elbo == pytest.approx(found[1][2].elbo, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"free_bits": 0.1},
        {"capacity": 2.0},
        {"estimator": "dreg", "num_samples": 3},
        {"likelihood": "gaussian", "variance": "shared"},
        {"warmup_epochs": 1, "clip_norm": 1.0},
        {"precision": "bf16"},
    ],
)
def test_training_moves_the_prior_and_raises_the_bound(options):
    trainer = trainer_of(move=False, learning_rate=5e-3, **options)
    before = trainer.evaluate().elbo
    for _ in range(4):
        trainer.train_epoch()
    assert trainer.evaluate().elbo > before
    for t in trainer.model.prior_parameters:
        assert t.isfinite().all()
        assert (t != 0).all()


def test_no_direct_step_leaves_the_prior_out():
    """Not even one whose parameters were made buffers, so that they are as many as of a standard prior."""
    trainer = trainer_of()
    for name in ("prior_mu", "prior_logvar"):
        value = getattr(trainer.model, name).detach()
        delattr(trainer.model, name)
        trainer.model.register_buffer(name, value)
    assert type(trainer.loop.training_step()) is AutogradStep

    class Fixed(aevb.VAE):
        prior_parameters = torch.ones(3), torch.zeros(3)

    given = aevb.Trainer(aevb.TrainConfig(**SMALL), model=Fixed(64, 12, 3), dataset=digits())
    assert type(given.loop.training_step()) is AutogradStep


def test_a_broken_prior_is_named():
    trainer = trainer_of()
    with torch.no_grad():
        trainer.model.prior_logvar[1] = -200.0
    sentence = r"KL divergence of latent dimension 1 is inf \(mu .*, logvar .*, prior_mu -1.1, prior_logvar -200\), of"
    assert re.search(sentence, trainer.loop.explain_held_out("test").text)
    with torch.no_grad():
        trainer.model.prior_logvar[1] = math.nan
    assert "prior_logvar[1], of latent dimension 1, is nan" in trainer.loop.explain_held_out("test").text


@pytest.mark.parametrize("options", [{}, {"architecture": "conv", "channels": (4,)}])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, options):
    options = {**SMALL, "prior": "learned", "estimator": "iwae", "num_samples": 2, **options}
    whole = aevb.Trainer(aevb.TrainConfig(**{**options, "epochs": 4}, out=str(tmp_path / "whole")), dataset=digits())
    whole.fit()
    aevb.Trainer(aevb.TrainConfig(**options, out=str(tmp_path / "half")), dataset=digits()).fit()
    half = aevb.Trainer.resume(tmp_path / "half", epochs=4, dataset=digits())
    half.fit()
    assert half.config.prior == "learned"
    for (name, p), q in zip(whole.model.named_parameters(), half.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    model = aevb.load(tmp_path / "whole")
    assert model.prior == "learned"
    assert torch.equal(model.prior_mu, whole.model.prior_mu)
    assert model.prior_logvar.abs().min() > 0
    with pytest.raises(ValueError, match=r"prior is 'standard', but the run in .* began with 'learned'"):
        aevb.Trainer(
            aevb.TrainConfig(**{**options, "prior": "standard"}, out=str(tmp_path / "half"), resume=True),
            dataset=digits(),
        ).fit()


def test_the_config_goes_by_the_model(tmp_path):
    model = aevb.VAE(64, 12, 3, prior="learned")
    config = aevb.TrainConfig(**SMALL, out=str(tmp_path / "run"))
    assert aevb.Trainer(config, model=model, dataset=digits()).config.prior == "learned"
    config = dataclasses.replace(config, prior="learned")
    assert aevb.Trainer(config, model=aevb.VAE(64, 12, 3), dataset=digits()).config.prior == "standard"
    with pytest.raises(ValueError, match="prior is 'learned', but WithoutPrior has the prior"):
        aevb.Trainer(config, model=WithoutPrior(), dataset=digits())
    with pytest.raises(ValueError, match="prior is 'flat'; expected one of 'standard', 'learned'"):
        aevb.TrainConfig(prior="flat")


def test_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    train = ["--data", "digits", "--out", run, "--epochs", "2", "--latent-dim", "2", "--hidden-dims", "12"]
    commands = [
        ["train", *train, "--prior", "learned", "--threads", "1", "--no-progress"],
        ["evaluate", run, "--num-samples", "20", "--images", "50", "--no-progress"],
        ["sample", run, "--num", "4"],
        ["manifold", run, "--num", "3"],
        ["impute", run, "--images", "4", "--steps", "2", "--num-samples", "10"],
        ["report", run],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["prior"] == "learned"
    found = json.loads((run / "evaluation.json").read_text())
    model = aevb.load(run)
    assert model.prior_mu.abs().max() > 0
    x = aevb.Trainer.load(run).test_x[:50]
    assert found["kl_per_dimension"] == pytest.approx(
        kl_divergence(posterior(model, x.float()), prior(model)).mean(0).tolist(), rel=1e-4
    )
    assert (run / "report.html").is_file()
    with pytest.raises(SystemExit):
        main(["train", *map(str, train), "--prior", "flat"])
    assert "invalid choice 'flat' for argument '--prior'" in capsys.readouterr().err
