"""What is none of the choices there are is never taken for one of them."""

import pytest
import torch
from conftest import rand, randn

import aevb
from aevb import reference
from aevb.ops import matmul as products
from aevb.training import optimizers

B, D = 4, 6
X, LOGITS, KL = rand(1, B, D).round(), randn(2, B, D), rand(3, B)
MU, LOGVAR = randn(4, B, 2), randn(5, B, 2)


def with_attribute(made, name, value):
    setattr(made, name, value)
    return made


def unknown_model(likelihood="cauchy"):
    return with_attribute(aevb.VAE(D, 5, 2), "likelihood", likelihood)


PYTHON = {
    "FusedELBO": lambda: aevb.FusedELBO(likelihood="cauchy"),
    "FusedELBO, later": lambda: with_attribute(aevb.FusedELBO(), "likelihood", "cauchy")(LOGITS, X, kl=KL),
    "FusedELBO, unlooked": lambda: with_attribute(aevb.FusedELBO(validate_args=False), "likelihood", "cauchy")(
        LOGITS, X, kl=KL
    ),
    "reference.FusedELBO": lambda: reference.FusedELBO(likelihood="cauchy"),
    "reference.FusedELBO, later": lambda: with_attribute(reference.FusedELBO(), "likelihood", "cauchy")(
        LOGITS, X, kl=KL
    ),
    "reference.negative_elbo": lambda: reference.negative_elbo(LOGITS, X, kl=KL, likelihood="cauchy"),
    "VAE": lambda: aevb.VAE(D, 5, 2, likelihood="cauchy"),
    "ConvVAE": lambda: aevb.ConvVAE((8, 8), likelihood="cauchy"),
    "decode": lambda: unknown_model().decode(MU),
    "mean": lambda: unknown_model().mean(MU),
    "log_prob": lambda: unknown_model().log_prob(X, MU),
    "reconstruct": lambda: unknown_model().reconstruct(X),
    "denoise": lambda: unknown_model().denoise(X, sigma=0.3, steps=1, num_samples=2),
    "impute": lambda: unknown_model().impute(X, X < 0.5, steps=1, num_samples=2),
    "TrainConfig": lambda: aevb.TrainConfig(likelihood="cauchy"),
}
OTHERS = {
    "reduction": [
        lambda: aevb.FusedELBO(reduction="average"),
        lambda: with_attribute(aevb.FusedELBO(), "reduction", "average")(LOGITS, X, kl=KL),
        lambda: with_attribute(aevb.FusedELBO(likelihood="gaussian"), "reduction", "average")(LOGITS, X, kl=KL),
        lambda: reference.FusedELBO(reduction="average"),
        lambda: reference.negative_elbo(LOGITS, X, kl=KL, reduction="average"),
        lambda: aevb.linear_bernoulli_log_prob(randn(1, B, 3), randn(2, D, 3), None, X, reduction="average"),
    ],
    "gradient": [
        lambda: aevb.sample_gaussian_log_ratio(MU, LOGVAR, 3, gradient="whole"),
        lambda: reference.sample_gaussian_log_ratio(MU, LOGVAR, 3, gradient="whole"),
    ],
    "estimator": [lambda: aevb.FusedELBO(estimator="sgvb"), lambda: reference.FusedELBO(estimator="sgvb")],
    "activation": [
        lambda: aevb.linear(LOGITS, randn(1, 3, D), None, "gelu"),
        lambda: reference.linear(LOGITS, randn(1, 3, D), None, "gelu"),
        lambda: products.activate_(LOGITS.double(), None, "gelu"),
        lambda: products.activation_grads(LOGITS.double(), LOGITS.double(), "gelu"),
    ],
    "schedule": [lambda: optimizers.schedule_factor("exponential", 3, 10, 0)],
}


@pytest.mark.parametrize("where", PYTHON)
def test_an_unknown_likelihood(where):
    with pytest.raises(ValueError, match="likelihood is 'cauchy'; expected one of 'bernoulli', 'exponential'"):
        PYTHON[where]()


@pytest.mark.parametrize("name", OTHERS)
def test_other_options(name):
    for call in OTHERS[name]:
        with pytest.raises(ValueError, match=rf"{name} is '\w+'; expected one of '"):
            call()


def test_the_codes_of_the_kernels():
    ops, seed = torch.ops.aevb, torch.tensor(3)
    for code in (-1, 3):
        with pytest.raises(RuntimeError, match=f"reduction is {code}; expected 0"):
            ops.negative_elbo(LOGITS, X, KL, None, None, 1.0, code, "bernoulli_logits", None)
        for op in (ops.sample_gaussian_log_ratio, ops.sample_gaussian_log_ratio_forward):
            with pytest.raises(RuntimeError, match=f"gradient is {code}; expected 0"):
                op(MU, LOGVAR, seed, 3, code)
        with pytest.raises(RuntimeError, match=f"gradient is {code}; expected 0"):
            ops.sample_gaussian_log_ratio_backward(MU, LOGVAR, seed, 3, code, None, None, None)
        with pytest.raises(RuntimeError, match=f"activation is {code}; expected 0"):
            ops.bias_activation_(LOGITS.clone(), None, code)


def test_whole_numbers_are_not_made_of_others():
    """3.2 and 3.7 are no seed, and not the seed 3."""
    for seed in (3.2, 3.7):
        for call in (
            lambda seed: aevb.sample_gaussian(MU, LOGVAR, seed=seed),
            lambda seed: aevb.sample_gaussian_log_ratio(MU, LOGVAR, seed=seed),
            lambda seed: aevb.FusedELBO().sample(MU, LOGVAR, seed=seed),
            lambda seed: aevb.mix_seed(seed, 1),
            lambda seed: aevb.mix_seed(1, seed),
            lambda seed: aevb.binarize((255 * X).byte(), seed=seed),
            lambda seed: aevb.VAE(D, 5, 2)(X, seed=seed),
            lambda seed: reference.sample_gaussian(MU, LOGVAR, seed=seed),
            lambda seed: reference.normal(seed, (3,)),
            lambda seed: reference.mix_seed(seed, 1),
            lambda seed: reference.binarize((255 * X).byte(), seed=seed),
            lambda seed: aevb.log_marginal_likelihood(aevb.VAE(D, 5, 2), X, 3, seed=seed),
            lambda seed: aevb.VAE(D, 5, 2).embed(X, 3, seed=seed),
            lambda seed: torch.func.vmap(lambda m, v: aevb.sample_gaussian(m, v, seed=seed))(MU, LOGVAR),
        ):
            with pytest.raises(ValueError, match=r"(seed|index) is .*; expected a whole number"):
                call(seed)
        for call in (aevb.sample_gaussian, reference.sample_gaussian):
            with pytest.raises(RuntimeError, match="seed has dtype float32; expected an int or an int64 tensor"):
                call(MU, LOGVAR, seed=torch.tensor(seed))
    import numpy as np

    for number in (np.int32(3), np.uint8(3), np.int64(3), 3.0, "3"):
        assert torch.equal(
            aevb.sample_gaussian(MU, LOGVAR, seed=number)[0], aevb.sample_gaussian(MU, LOGVAR, seed=3)[0]
        )
