"""Arguments that are no dense tensors, and memory that is not there: which, and how many bytes, in one sentence."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import rand, randn, same_bits

import aevb
from aevb import reference
from aevb.ops import linear as layers

B, D = 4, 6
RECON, X, MU, KL = randn(1, B, D), rand(2, B, D).round(), randn(3, B, 2), rand(4, B)
LINEAR = aevb.LinearLogits(randn(1, B, 3), randn(2, D, 3))
MODEL = aevb.VAE(D, 3, 2)

BAD = {
    "numpy": (lambda t: t.numpy(), r"is a numpy\.ndarray; expected a torch\.Tensor: torch\.from_numpy"),
    "list": (lambda t: t.tolist(), r"is a list; expected a torch\.Tensor"),
    "sparse": (lambda t: t.to_sparse(), r"is a tensor of layout sparse_coo; expected a dense one: \.to_dense\(\)"),
    "csr": (
        lambda t: t.reshape(1, -1).to_sparse_csr() if t.dim() == 1 else t.to_sparse_csr(),
        "is a tensor of layout sparse_csr",
    ),
    "mkldnn": (lambda t: t.to_mkldnn(), "is a tensor of layout mkldnn; expected a dense one"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        r"is a quantized tensor; expected a dense one: \.dequantize\(\)",
    ),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "is a nested tensor; expected a padded one"),
}
CALLS = {
    "FusedELBO, x": (X, lambda t: aevb.FusedELBO()(RECON, t, MU, MU)),
    "FusedELBO, recon": (RECON, lambda t: aevb.FusedELBO()(t, X, MU, MU)),
    "FusedELBO, mu": (MU, lambda t: aevb.FusedELBO()(RECON, X, t, MU)),
    "FusedELBO, logvar": (MU, lambda t: aevb.FusedELBO()(RECON, X, MU, t)),
    "FusedELBO, kl": (KL, lambda t: aevb.FusedELBO()(RECON, X, kl=t)),
    "FusedELBO, mean": (RECON, lambda t: aevb.FusedELBO(likelihood="gaussian")(t, X, kl=KL)),
    "FusedELBO, mean of an output": (
        RECON,
        lambda t: aevb.FusedELBO(likelihood="gaussian")(aevb.GaussianOutput(t, 0.3), X, kl=KL),
    ),
    "FusedELBO, linear, x": (X, lambda t: aevb.FusedELBO()(LINEAR, t, kl=KL)),
    "FusedELBO, sample": (MU, lambda t: aevb.FusedELBO().sample(t, MU)),
    "sample_gaussian": (MU, lambda t: aevb.sample_gaussian(t, MU)),
    "sample_gaussian, logvar": (MU, lambda t: aevb.sample_gaussian(MU, t)),
    "sample_gaussian_log_ratio": (MU, lambda t: aevb.sample_gaussian_log_ratio(MU, t, 3)),
    "gaussian_kl": (MU, lambda t: aevb.gaussian_kl(t, MU)),
    "bernoulli_log_prob": (RECON, lambda t: aevb.bernoulli_log_prob(t, X)),
    "bernoulli_log_prob, x": (X, lambda t: aevb.bernoulli_log_prob(RECON, t)),
    "gaussian_log_prob": (RECON, lambda t: aevb.gaussian_log_prob(t, X)),
    "gaussian_log_prob, x": (X, lambda t: aevb.gaussian_log_prob(RECON, t)),
    "linear_bernoulli_log_prob": (X, lambda t: aevb.linear_bernoulli_log_prob(randn(1, B, 3), randn(2, D, 3), None, t)),
    "linear_bernoulli_log_prob, h": (
        randn(5, B, 3),
        lambda t: aevb.linear_bernoulli_log_prob(t, randn(2, D, 3), None, X),
    ),
    "linear": (X, lambda t: aevb.linear(t, randn(1, 3, D))),
    "VAE": (X, lambda t: MODEL(t)),
    "encode": (X, lambda t: MODEL.encode(t)),
    "decode": (MU, lambda t: MODEL.decode(t)),
    "reconstruct": (X, lambda t: MODEL.reconstruct(t)),
    "embed": (X, lambda t: MODEL.embed(t)),
    "impute": (X, lambda t: MODEL.impute(t, torch.ones(D, dtype=torch.bool))),
    "denoise": (X, lambda t: MODEL.denoise(t, flip=0.1)),
    "kl_per_dimension": (X, lambda t: aevb.diagnostics.kl_per_dimension(MODEL, t)),
    "log_marginal_likelihood": (X, lambda t: aevb.log_marginal_likelihood(MODEL, t, 3)),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_dense_tensor(call, kind):
    right, ask = CALLS[call]
    make, sentence = BAD[kind]
    with pytest.raises(TypeError, match=rf"aevb\.\w+: \w+ {sentence}"):
        ask(make(right))
    ask(right)


def test_logvar_that_is_no_number():
    for bad in (None, "0", [0.0]):
        with pytest.raises(ValueError, match=r"logvar is .*; expected a finite number, the logarithm of the variance"):
            aevb.gaussian_log_prob(RECON, X, bad)
    expected = aevb.gaussian_log_prob(RECON, X, 0.5)
    for number in (np.float32(0.5), np.float64(0.5)):
        assert same_bits(aevb.gaussian_log_prob(RECON, X, number), expected)


def test_memory_that_is_not_there():
    mu = torch.zeros(1).expand(10**13, 20)
    x = torch.zeros(1).expand(10**13, 1)
    for call, count, what in [
        (lambda: aevb.sample_gaussian(*torch.zeros(2, 10**5, 100), 10**8), 4 * (10**15 + 10**5), "(100000000, 100000,"),
        (lambda: aevb.gaussian_kl(mu, mu), 4 * 41 * 10**13, "a copy of mu, float32 (10000000000000, 20)"),
        (lambda: aevb.bernoulli_log_prob(x, x), 12 * 10**13, "a result, float32 (10000000000000,)"),
    ]:
        with pytest.raises(torch.OutOfMemoryError, match=re.escape(what)) as said:
            call()
        assert f"{count:,} bytes are needed for" in str(said.value)
        assert "cpu has not so many left" in str(said.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_memory_that_is_not_there_for_a_layer_or_for_bits(dtype):
    x = torch.zeros(1, 1, dtype=dtype).expand(10**12, 20)
    weight = torch.zeros(500, 20)
    scale = 1 / 255 if dtype == torch.uint8 else None
    for w in (weight, weight.clone().requires_grad_()):
        with pytest.raises(torch.OutOfMemoryError, match=r"a result, float32 \(1000000000000, 500\)"):
            layers.linear(x, w, None, "tanh", scale)
    if dtype == torch.uint8:
        with pytest.raises(torch.OutOfMemoryError, match=r"binarize: 40,000,000,000,000 bytes .*a result, bool"):
            aevb.data.targets.binarize(x, seed=1)


BACKWARD_WITHOUT_MEMORY = """
import resource, torch, aevb
mu, logvar = torch.zeros(2, 1, 30_000_000).requires_grad_().unbind()
loss = aevb.gaussian_kl(mu, logvar).sum()
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, resource.RLIM_INFINITY))
try:
    loss.backward()
except torch.OutOfMemoryError as error:
    print(error)
"""


def test_memory_that_is_not_there_for_a_gradient():
    said = subprocess.run([sys.executable, "-c", BACKWARD_WITHOUT_MEMORY], capture_output=True, text=True).stdout
    assert "aevb.gaussian_kl, backward: 240,000,000 bytes are needed for a result, float32 (1, 30000000), a r" in said


# ---- a generator for each datapoint ---------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("sample", [aevb.sample_gaussian, reference.sample_gaussian, aevb.FusedELBO().sample])
def test_a_list_of_generators(sample, num_samples):
    """The noise of a datapoint is its generator's, whatever batch it is in."""
    options = {} if getattr(sample, "__name__", "") == "sample" else {"num_samples": num_samples}
    mu = torch.zeros(4, 5, 3)
    z, _ = sample(mu.flatten(1), mu.flatten(1), generator=generators(3, 4, 5, 3), **options)
    rows = z.unbind(-2)
    assert same_bits(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1])
    other, _ = sample(mu[:2].flatten(1), mu[:2].flatten(1), generator=generators(9, 5), **options)
    assert same_bits(other.unbind(-2)[1], rows[2])


def test_generators_of_spatial_latents():
    mu = torch.zeros(2, 3, 4, 4)
    z, kl = aevb.sample_gaussian(mu, mu, batch_dims=1, generator=generators(1, 1))
    assert kl.shape == (2,)
    assert same_bits(z[0], z[1])
    assert not torch.equal(z[0, 0], z[0, 1])
    for wrong in (generators(1), generators(1, 2, 3)):
        with pytest.raises(ValueError, match=r"there are \d generators for mu of shape .*; expected one for each"):
            aevb.sample_gaussian(mu, mu, batch_dims=1, generator=wrong)
    with pytest.raises(ValueError, match="seed and generator are both given"):
        aevb.sample_gaussian(mu, mu, batch_dims=1, generator=generators(1, 2), seed=3)
