"""Models whose prior is learned: its parameters, what a file says of it, and samples."""

import copy
import json
import pickle

import pytest
import torch
from conftest import rand
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

import aevb

MODELS = {
    "VAE": lambda **options: aevb.VAE(20, 8, 3, **options),
    "ConvVAE": lambda **options: aevb.ConvVAE((4, 5), (4,), 3, **options),
}


def moved(model):
    with torch.no_grad():
        model.prior_mu.copy_(torch.tensor([1.0, -2.0, 0.3]))
        model.prior_logvar.copy_(torch.tensor([0.9, -1.2, 0.2]))
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_new_prior_is_standard_and_learned(kind):
    model = MODELS[kind](prior="learned")
    assert model.prior_parameters == (model.prior_mu, model.prior_logvar)
    for t in model.prior_parameters:
        assert isinstance(t, torch.nn.Parameter)
        assert torch.equal(t, torch.zeros(3))
    standard = MODELS[kind]()
    assert standard.prior_parameters is None
    assert "prior" not in standard.options()
    assert set(model.state_dict()) - set(standard.state_dict()) == {"prior_mu", "prior_logvar"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_samples", [None, 4])
def test_forward_has_the_kl_from_the_prior(kind, num_samples):
    model, x = moved(MODELS[kind](prior="learned")), rand(0, 7, 20)
    recon, kl = model(x, num_samples, seed=3)
    mu, logvar = model.encode(x)
    prior = Normal(model.prior_mu, (0.5 * model.prior_logvar).exp())
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), prior).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(recon, model.decode(aevb.sample_gaussian(mu, logvar, num_samples, seed=3)[0]))
    found = torch.autograd.grad(kl.sum(), model.prior_parameters)
    for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), model.prior_parameters), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_samples_are_at_z_from_the_prior():
    model = moved(MODELS["VAE"](prior="learned"))
    normals = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    z = model.prior_mu + (0.5 * model.prior_logvar).exp() * normals
    found = model.sample(5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, model.mean(z).detach())
    assert not found.requires_grad
    assert model.bfloat16().sample(5).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_says_that_the_prior_is_learned(kind, tmp_path):
    path, x = tmp_path / "model.safetensors", rand(0, 7, 20)
    for model in (moved(MODELS[kind](prior="learned")), MODELS[kind]()):
        save_file(model.state_dict(), path, model.metadata())
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["model"])
        assert said.get("prior") == ("learned" if model.prior == "learned" else None)
        again = aevb.load(path)
        assert again.prior == model.prior
        for copied in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x, seed=1)[1], model(x, seed=1)[1])


def test_a_model_pickled_before_there_was_a_prior_has_the_standard_one():
    model = MODELS["VAE"]()
    state = model.__dict__.copy()
    del state["prior"]
    old = aevb.VAE.__new__(aevb.VAE)
    old.__setstate__(state)
    assert old.prior_parameters is None
    assert old.options() == model.options()


@pytest.mark.parametrize("kind", MODELS)
def test_another_prior_is_a_sentence(kind):
    with pytest.raises(ValueError, match="prior is 'flat'; expected one of 'standard', 'learned'"):
        MODELS[kind](prior="flat")
