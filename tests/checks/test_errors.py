"""Bad input to the ops gets a sentence that says what was given and what was expected."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import aevb
from aevb import _C


def ones(*size, dtype=torch.float32):
    return torch.ones(size, dtype=dtype)


def raises(call, *words, error=RuntimeError):
    """Asserts that `call` raises `error` with all of `words` in its message."""
    with pytest.raises(error) as info:
        call()
    for word in words:
        assert re.search(word, str(info.value)), f"{word!r} is not in: {info.value}"
    return str(info.value)


TWO_LATENTS = {
    "sample_gaussian": lambda mu, logvar: aevb.sample_gaussian(mu, logvar),
    "sample_gaussian_log_ratio": lambda mu, logvar: aevb.sample_gaussian_log_ratio(mu, logvar),
    "gaussian_kl": lambda mu, logvar: aevb.gaussian_kl(mu, logvar),
    "FusedELBO": lambda mu, logvar: aevb.FusedELBO()(ones(3, 5), ones(3, 5), mu, logvar),
}


@pytest.mark.parametrize("name", TWO_LATENTS)
def test_latents(name):
    call = TWO_LATENTS[name]
    raises(lambda: call(ones(3, 4), ones(3, 5)), name, r"mu has shape \(3, 4\)", r"logvar has shape \(3, 5\)")
    raises(lambda: call(ones(3, 4), ones(3)), r"\(3, 4\)", r"\(3,\)", "equal")
    raises(lambda: call(ones(), ones()), r"mu has shape \(\)", "latent dimensions last")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        raises(partial(call, ones(3, 4), ones(3, 4, dtype=dtype)), "float32", str(dtype)[6:], "same dtype")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        message = raises(partial(call, ones(3, 4, dtype=dtype), ones(3, 4, dtype=dtype)), str(dtype)[6:])
        assert "expected float32, bfloat16 or float16" in message
        assert "aevb.reference" not in message


def likelihood(logits, x, x_scale=None):
    return aevb.bernoulli_log_prob(logits, x, x_scale)


def elbo(recon, x, x_scale=None):
    return aevb.FusedELBO(x_scale=x_scale)(recon, x, ones(3, 2), ones(3, 2))


def elbo_with_kl(recon, x, x_scale=None):
    return aevb.FusedELBO(x_scale=x_scale)(recon, x, kl=ones(3))


def gaussian_elbo(recon, x, x_scale=None):
    return aevb.FusedELBO(likelihood="gaussian", x_scale=x_scale)(recon, x, kl=ones(3))


def gaussian_of(mean, x, x_scale=None):
    return aevb.gaussian_log_prob(mean, x, 0.3, x_scale)


@pytest.mark.parametrize("call", [likelihood, elbo, elbo_with_kl, gaussian_of, gaussian_elbo])
def test_target_dtypes(call):
    raises(lambda: call(ones(3, 5), ones(3, 5, dtype=torch.uint8)), "uint8", "x_scale is not given", "1/255")
    words = "x has dtype complex64", "bool, or uint8 with x_scale"
    raises(partial(call, ones(3, 5), ones(3, 5, dtype=torch.complex64), 0.5), *words)
    raises(lambda: call(ones(3, 5, dtype=torch.int32), ones(3, 5)), "int32", "expected float32, bfloat16 or float16")


@pytest.mark.parametrize(
    ("logits", "x"), [((3, 5), (3, 4)), ((3, 5), (2, 5)), ((5,), (3, 5)), ((2, 3, 5), (2, 5)), ((3, 5), ()), ((), ())]
)
def test_likelihood_shapes(logits, x):
    words = re.escape(str(logits)), re.escape(str(x)), "extra leading dimensions of samples"
    raises(lambda: likelihood(ones(*logits), ones(*x)), r"aevb\.bernoulli_log_prob: logits", *words)


def gaussian(mean, x, x_scale=None, logvar=0.0):
    return aevb.gaussian_log_prob(mean, x, logvar, x_scale)


@pytest.mark.parametrize(
    ("mean", "x"), [((3, 5), (3, 4)), ((3, 5), (2, 5)), ((5,), (3, 5)), ((2, 3, 5), (2, 5)), ((3, 5), ()), ((), ())]
)
def test_gaussian_shapes(mean, x):
    words = f"mean has shape {re.escape(str(mean))}", re.escape(str(x)), "extra leading dimensions of samples"
    raises(lambda: gaussian(ones(*mean), ones(*x)), r"aevb\.gaussian_log_prob: ", *words)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (3, 4), (1, 3, 5), (2, 3, 5), (5, 1)])
def test_gaussian_logvar_shapes(shape):
    words = r"mean has shape \(3, 5\)", f"logvar has shape {re.escape(str(shape))}", "same shape", r"\(D,\) and \(\)"
    raises(lambda: gaussian(ones(3, 5), ones(3, 5), logvar=ones(*shape)), r"aevb\.gaussian_log_prob: ", *words)


def test_gaussian_logvar():
    for dtype in (torch.int64, torch.bool):
        words = f"logvar has dtype {str(dtype)[6:]}", "expected float32, bfloat16 or float16"
        raises(partial(gaussian, ones(3, 5), ones(3, 5), logvar=ones(3, 5, dtype=dtype)), *words)
    for bad in (float("nan"), float("inf"), -float("inf")):
        raises(partial(gaussian, ones(3, 5), ones(3, 5), logvar=bad), f"logvar is {bad}", "finite", error=ValueError)
    op = torch.ops.aevb.log_prob_backward
    args = ones(3, 5), ones(3, 5), None, None, None, "gaussian_fixed", 0.0, None
    raises(lambda: op(*args, ones(4), 1), r"grad has shape \(4,\)", r"\(3,\)")


def test_likelihoods_by_name():
    log_prob = torch.ops.aevb.log_prob
    x = ones(3, 5)
    raises(
        lambda: log_prob(x, x, None, None, None, "poisson", 0.0, None),
        "likelihood is 'poisson'; expected one of bernoulli_log",
    )
    raises(
        lambda: log_prob(x, x, None, None, None, "gaussian", 0.0, None), "gaussian has 2 parameters, and 1 are given"
    )
    raises(
        lambda: log_prob(x, x, x, None, None, "bernoulli_probs", 0.0, None),
        "bernoulli_probs has 1 parameters, and 2 are given",
    )
    assert set(aevb.ops.likelihood.FORMULAS) == set(_C.likelihoods()), "each has its twin in plain PyTorch"
    raises(
        lambda: aevb.bernoulli_log_prob(x.to_sparse(), x),
        "bernoulli_log_prob: logits is a tensor of layout",
        error=TypeError,
    )
    raises(
        lambda: aevb.gaussian_log_prob(x, x, x.to_sparse()), "gaussian_log_prob: logvar is a tensor", error=TypeError
    )
    loss = torch.ops.aevb.negative_elbo
    for name, has in (("gaussian", "2 parameters"), ("gaussian_fixed", "1 parameter and a number of its own")):
        raises(
            partial(loss, x, x, ones(3), None, None, 1.0, 1, name, None),
            f"likelihood {name} has {has}; expected one of",
        )
    raises(lambda: aevb.binarize(x.byte(), torch.tensor(1), seed=1), r"index has shape \(\)", r"expected int64 \(B,\)")


@pytest.mark.parametrize("call", [elbo, elbo_with_kl])
def test_elbo_shapes(call):
    source = "mu" if call is elbo else "kl"
    raises(lambda: call(ones(4, 5), ones(4, 5)), r"x has shape \(4, 5\)", f"{source} makes the batch", r"\(3,\)")
    raises(lambda: call(ones(3, 5), ones(5)), r"x has shape \(5,\)", "batch")
    for recon in [(3, 4), (5,), (4, 5), (3, 5, 2), (3, 2, 5), ()]:
        words = re.escape(f"recon has shape {tuple(recon)}"), "samples", "5 elements in a datapoint"
        raises(partial(call, ones(*recon), ones(3, 5)), "FusedELBO", *words)


def test_elbo_arguments():
    r = ones(3, 5)
    mu = ones(3, 2)
    criterion = aevb.FusedELBO()
    raises(lambda: criterion(r, r), "mu and logvar, or kl=", error=ValueError)
    raises(lambda: criterion(r, r, mu), "mu and logvar, or kl=", error=ValueError)
    raises(lambda: criterion(r, r, mu, mu, kl=ones(3)), "both", error=ValueError)
    words = "both kl and a prior", r"criterion.sample\(mu, logvar, prior=prior\)"
    raises(lambda: criterion(r, r, kl=ones(3), prior=(mu, mu)), *words, error=ValueError)


@pytest.mark.parametrize("reduction", ["average", "", None, "MEAN", 1])
def test_unknown_reduction(reduction):
    words = re.escape(repr(reduction)), "'none', 'mean', 'sum'"
    raises(lambda: aevb.FusedELBO(reduction=reduction), *words, error=ValueError)


def test_beta():
    raises(lambda: aevb.FusedELBO(beta=ones(2)), r"beta has shape \(2,\)", "0-d", error=ValueError)
    # The loss makes it float32, for it may have been cast with a model; the op does not.
    double = torch.tensor(0.3, dtype=torch.float64)
    losses = [aevb.FusedELBO(beta=beta)(ones(3, 5), ones(3, 5), kl=ones(3)) for beta in (double, 0.3)]
    assert losses[0] == losses[1]
    op = torch.ops.aevb.negative_elbo_forward
    args = ones(3, 5), ones(3, 5), ones(3), None, double, 1.0, 1, "bernoulli_logits", None
    raises(lambda: op(*args), "beta", "float64", "0-d float32")


# ---- the Gaussian loss ----------------------------------------------------------------------------------------------


def test_likelihood_options():
    make = partial(partial, aevb.FusedELBO)
    raises(make(likelihood="poisson"), "likelihood is 'poisson'", "'bernoulli', ", "'gaussian'", error=ValueError)
    raises(make(likelihood="gaussian", from_probs=True), "from_probs", "likelihood='bernoulli'", error=ValueError)
    raises(make(sigmoid_means=True), "sigmoid_means is True", "likelihood='gaussian'", error=ValueError)
    raises(make(variance=0.5), "variance is 0.5", "likelihood='gaussian'", error=ValueError)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        raises(make(likelihood="gaussian", variance=bad), f"variance is {bad}", "above 0", error=ValueError)


def test_recon_goes_with_the_likelihood():
    x, kl, output = ones(3, 5), ones(3), aevb.GaussianOutput(ones(3, 5), 0.0)
    of_bernoulli, of_gaussian = aevb.FusedELBO(), aevb.FusedELBO(likelihood="gaussian")
    words = "recon is a GaussianOutput", "likelihood='gaussian'"
    raises(lambda: of_bernoulli(output, x, kl=kl), *words, error=ValueError)
    linear = aevb.LinearLogits(ones(3, 2), ones(5, 2))
    words = "recon is a LinearLogits", "a tensor of means or a GaussianOutput"
    raises(lambda: of_gaussian(linear, x, kl=kl), *words, error=ValueError)
    fixed = aevb.FusedELBO(likelihood="gaussian", variance=0.5)
    raises(lambda: fixed(output, x, kl=kl), "variance is 0.5", "has its own", error=ValueError)


@pytest.mark.parametrize("recon", [(3, 4), (5,), (4, 5), (3, 5, 2), (3, 2, 5), ()])
def test_gaussian_elbo_shapes(recon):
    criterion = aevb.FusedELBO(likelihood="gaussian")
    words = re.escape(f"mean has shape {recon}"), "samples", "5 elements in a datapoint"
    raises(lambda: criterion(ones(*recon), ones(3, 5), kl=ones(3)), *words, error=ValueError)
    raises(lambda: criterion(ones(3, 5), ones(4, 5), kl=ones(3)), r"x has shape \(4, 5\)", r"\(3,\)", error=ValueError)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 5), (5, 1)])
def test_gaussian_elbo_logvar_shapes(shape):
    output = aevb.GaussianOutput(ones(3, 5), ones(*shape))
    words = re.escape(f"logvar has shape {shape}"), r"mean \(3, 5\)", r"\(5,\)"
    raises(lambda: aevb.FusedELBO(likelihood="gaussian")(output, ones(3, 5), kl=ones(3)), *words, error=ValueError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_targets_that_are_not_finite(bad):
    x = 300 * ones(3, 5)
    criterion = aevb.FusedELBO(likelihood="gaussian", validate_args=True)
    assert criterion(ones(3, 5), x, kl=ones(3)).isfinite()  # any finite number will do
    x[2, 1] = bad
    words = rf"x\[2, 1\] is {bad}", "a Gaussian target is finite"
    raises(lambda: criterion(ones(3, 5), x, kl=ones(3)), *words, error=ValueError)
    raises(lambda: aevb.gaussian_log_prob(ones(3, 5), x, validate_args=True), *words, error=ValueError)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [-1, -(2**40)])
def test_negative_num_samples(num_samples):
    words = f"num_samples is {num_samples}", "0 or more"
    raises(lambda: aevb.sample_gaussian(ones(3, 4), ones(3, 4), num_samples), *words)


@pytest.mark.parametrize(
    ("seed", "num_samples"),
    [((4,), None), ((3, 4), None), ((3,), 2), ((2, 4), 2), ((2, 3, 4), 2), ((1,), None), ((1, 3), 2)],
)
def test_seed_shape(seed, num_samples):
    z = "(2, 3, 4)" if num_samples else "(3, 4)"
    words = re.escape(f"seed has shape {seed}"), "first dimensions of z", re.escape(z)
    wrong = torch.zeros(seed, dtype=torch.int64)
    raises(lambda: aevb.sample_gaussian(ones(3, 4), ones(3, 4), num_samples, seed=wrong), *words)


def test_seed_dtype_and_range():
    sample = lambda seed: aevb.sample_gaussian(ones(3, 4), ones(3, 4), seed=seed)  # noqa: E731
    raises(lambda: sample(torch.tensor(1, dtype=torch.int32)), "seed has dtype int32", "int64")
    raises(lambda: sample(torch.tensor(1.5)), "seed has dtype float32", "int64")
    for seed in (2**63, -(2**63) - 1):
        raises(partial(sample, seed), f"seed is {seed}", "64-bit", error=ValueError)
        raises(partial(aevb.mix_seed, 1, seed), f"index is {seed}", "64-bit", error=ValueError)
    raises(lambda: aevb.mix_seed(torch.ones(3), 1), "seed has dtype float32", "int64")
    raises(lambda: aevb.mix_seed(torch.arange(3), torch.arange(4)), "3", "4")


def test_seed_and_generator():
    words = "seed and generator are both given", "one of them"
    both = {"seed": 1, "generator": torch.Generator()}
    raises(lambda: aevb.sample_gaussian(ones(3, 4), ones(3, 4), **both), *words, error=ValueError)
    both["seed"] = torch.tensor(1)
    raises(lambda: aevb.sample_gaussian(ones(3, 4), ones(3, 4), **both), *words, error=ValueError)


def test_generator_on_another_device():
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0))
    words = "generator is on cuda:0", "tensors are on cpu", r"torch.Generator\(device='cpu'\)"
    raises(lambda: aevb.sample_gaussian(ones(3, 4), ones(3, 4), generator=elsewhere), *words, error=ValueError)
    mu = torch.ones(3, 4, device="meta")
    words = "generator is on cpu", "tensors are on meta"
    raises(lambda: aevb.sample_gaussian(mu, mu, generator=torch.Generator()), *words, error=ValueError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_tensors_on_different_devices():
    here, there = ones(3, 4), ones(3, 4).cuda()
    for call in (lambda a, b: aevb.sample_gaussian(a, b, seed=1), aevb.gaussian_kl, aevb.bernoulli_log_prob):
        for pair in ((here, there), (there, here)):
            raises(partial(call, *pair), "cpu", "cuda:0", "same device")
    raises(lambda: aevb.sample_gaussian(here, here, seed=torch.tensor(1).cuda()), "seed is on cuda:0")


# ---- targets outside [0, 1], when asked -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf"), 255.0])
def test_targets_outside_the_unit_interval(bad):
    x = ones(3, 5) / 3
    x[2, 1] = bad
    words = rf"x\[2, 1\] is {'-' if bad < 0 else ''}", r"lies in \[0, 1\]"
    raises(lambda: aevb.bernoulli_log_prob(ones(2, 3, 5), x, validate_args=True), *words, error=ValueError)
    raises(lambda: aevb.FusedELBO(validate_args=True)(ones(3, 5), x, kl=ones(3)), *words, error=ValueError)
    raises(lambda: aevb.FusedELBO()(ones(3, 5), x, kl=ones(3)), *words, error=ValueError)
    aevb.bernoulli_log_prob(ones(2, 3, 5), x, validate_args=False)
    aevb.FusedELBO(validate_args=False)(ones(3, 5), x, kl=ones(3))


def test_validated_targets_are_scaled_first():
    x = torch.tensor([[0, 128, 255]], dtype=torch.uint8)
    assert aevb.bernoulli_log_prob(ones(1, 3), x, 1 / 255, validate_args=True).isfinite().all()
    words = r"x\[0, 1\] is 128", "x_scale=1"
    raises(lambda: aevb.bernoulli_log_prob(ones(1, 3), x, 1, validate_args=True), *words, error=ValueError)
    for good in (ones(1, 3), torch.zeros(1, 3), torch.tensor([[True, False, True]]), torch.rand(1, 3).half()):
        assert aevb.bernoulli_log_prob(ones(1, 3), good, validate_args=True).isfinite().all()
    raises(lambda: aevb.bernoulli_log_prob(ones(1, 3), x, validate_args=True), "uint8")
