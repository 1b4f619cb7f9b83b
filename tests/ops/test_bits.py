"""The same bits from every instruction set and any number of threads; any NaN equals any NaN.

Run as a program, this file prints a digest of every result for each number of threads, on the instruction set that
AEVB_ISA names; as a test, it runs itself once for each and compares.
"""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import aevb
from aevb import _C

ISAS = _C.build_info()["isas"].split(", ")
THREADS = (1, 2, 3)
# Rows of a tile and odd ones, several tiles, groups and chunks, enough work for three threads, few and many rows.
LATENT_SHAPES = [(1, 1), (7, 20), (1000, 3), (400, 50), (3, 5, 41), (5, 257), (33, 784), (2, 4097), (1, 100_003)]
PIXEL_SHAPES = [(1, 1), (9, 7), (100, 33), (64, 784), (3, 1271), (2, 5, 513), (5, 32_769), (1, 200_003)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def digest(*tensors):
    found = hashlib.sha256()
    for t in tensors:
        t = t.detach().contiguous()
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
            t = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)
        found.update(str((t.dtype, tuple(t.shape))).encode() + t.numpy().tobytes())
    return found.hexdigest()


def randn(seed, *size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def with_edges(t, seed):
    """t with some infinities, NaNs, zeros and numbers that over- and underflow in it."""
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e4, -1e4, 88.8, -103.5, 1e38, 1e-40])
    at = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(at < 0.02, edges[(at * 1e6).long() % len(edges)], t)


def differentiated(outputs, inputs, seed):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [(3 * randn(seed + i, *o.shape)).to(o.dtype) for i, o in enumerate(outputs)]
    return *outputs, *torch.autograd.grad(outputs, inputs, grads)


def results():  # noqa: C901  a list of calls
    """Name and tensors of everything that the kernels compute."""
    x = torch.from_numpy(np.arange(0, 2**32, 99_991).astype(np.uint32).view(np.float32))
    for name in ("exp", "expm1", "expm1_minus_x", "tanh", "log", "log_one_minus", "bfloat16", "float16"):
        yield f"elementary {name}", (torch.ops.aevb.elementary(name, x),)
    for n in (1, 31, 512, 1000, 40_000, 3_000_000):
        yield f"row sum {n}", (torch.tensor(_C.row_sum(randn(1, n).numpy())),)
    for seed in (0, -1, 2**40 + 3):
        yield f"noise {seed}", (torch.ops.aevb.normal(torch.tensor(seed), [1_000_003]),)
    seeds = aevb.mix_seed(3, torch.arange(100_000))
    yield "mix_seed", (seeds,)
    yield "noise of seeds", (torch.ops.aevb.normal(seeds, [100_000, 5]),)
    yield from layers()
    for dtype in DTYPES:
        for size in LATENT_SHAPES:
            for edges in (False, True):
                mu, logvar = randn(1, *size), 2 * randn(2, *size)
                if edges:
                    mu, logvar = with_edges(mu, 3), with_edges(logvar, 4)
                mu, logvar = (t.to(dtype).requires_grad_() for t in (mu, logvar))
                name = f"{dtype} {size} {'edges' if edges else 'ordinary'}"
                yield f"sample {name}", differentiated(aevb.sample_gaussian(mu, logvar, seed=5), (mu, logvar), 6)
                yield f"kl {name}", differentiated(aevb.gaussian_kl(mu, logvar), (mu, logvar), 7)
                ratios = aevb.sample_gaussian_log_ratio(mu, logvar, seed=5)
                yield f"log_ratio {name}", differentiated(ratios, (mu, logvar), 6)
                if mu.numel() < 50_000:
                    seeds = aevb.mix_seed(1, torch.arange(4 * size[0])).view(4, size[0])
                    samples = aevb.sample_gaussian(mu, logvar, 4, seed=seeds)
                    yield f"samples {name}", differentiated(samples, (mu, logvar), 8)
                    ratios = aevb.sample_gaussian_log_ratio(mu, logvar, 20, gradient="path", seed=6)
                    yield f"log_ratios {name}", differentiated(ratios, (mu, logvar), 8)
        for size in PIXEL_SHAPES:
            for kind in ("soft", "bool", "uint8", "edges"):
                u = torch.rand(size, generator=torch.Generator().manual_seed(9))
                x = {"bool": u < 0.4, "uint8": (256 * u).to(torch.uint8)}.get(kind, u)
                x_scale = 1 / 255 if kind == "uint8" else None
                logits = 4 * randn(10, *size)
                logits = (with_edges(logits, 11) if kind == "edges" else logits).to(dtype).requires_grad_()
                name = f"{dtype} {size} {kind}"
                yield f"log_prob {name}", differentiated(aevb.bernoulli_log_prob(logits, x, x_scale), (logits,), 12)
                yield from gaussians(name, logits, x, x_scale)
                mu, logvar = (randn(s, *size[:-1], 6).to(dtype).requires_grad_() for s in (13, 14))
                for reduction in ("none", "mean", "sum"):
                    loss = aevb.FusedELBO(0.3, reduction, x_scale=x_scale)(logits, x, mu, logvar)
                    yield f"elbo {reduction} {name}", differentiated(loss, (logits, mu, logvar), 15)
                probs = torch.rand(size, generator=torch.Generator().manual_seed(20 + len(kind)))
                probs = torch.where(u < 0.05, (u < 0.03).float(), probs).to(dtype).requires_grad_()
                kl = aevb.gaussian_kl(mu, logvar).detach().requires_grad_()
                loss = aevb.FusedELBO(0.3, "none", from_probs=True, x_scale=x_scale)(probs, x, kl=kl)
                yield f"elbo of probs {name}", differentiated(loss, (probs, kl), 16)
    recon, x = randn(17, 300, 7, 50).requires_grad_(), torch.rand(7, 50, generator=torch.Generator().manual_seed(18))
    kl = torch.ones(7).requires_grad_()
    yield "elbo of samples", differentiated(aevb.FusedELBO(0.3)(recon, x, kl=kl), (recon, kl), 19)


def gaussians(name, mean, x, x_scale):
    """log p(x|z) of Gaussian decoders of these means: a logvar each, of either dtype, shared ones, and a number."""
    D = mean.shape[-1]
    every = (with_edges(2 * randn(21, *mean.shape), 22) if "edges" in name else randn(21, *mean.shape)).to(mean.dtype)
    logvars = {"each": every, "bfloat16": every.bfloat16(), "shared": randn(23, D), "one": torch.tensor(0.3)}
    for sigmoid in (False, True):
        for kind, logvar in logvars.items():
            v = logvar.detach().requires_grad_()
            log_prob = aevb.gaussian_log_prob(mean, x, v, x_scale, sigmoid=sigmoid)
            # What is shared has a gradient that torch sums, as the threads fall out.
            inputs = (mean, v) if v.shape == mean.shape else (mean,)
            yield f"gaussian {kind} {sigmoid} {name}", differentiated(log_prob, inputs, 24)
        log_prob = aevb.gaussian_log_prob(mean, x, -0.7, x_scale, sigmoid=sigmoid)
        yield f"gaussian of a number {sigmoid} {name}", differentiated(log_prob, (mean,), 25)


def layers():
    """Bits and pixels, and what follows a layer's product."""
    ops = torch.ops.aevb
    for B, D, H in ((1, 1, 1), (7, 33, 20), (130, 784, 65), (1100, 129, 7), (3, 1271, 500)):
        u = torch.rand(B, D, generator=torch.Generator().manual_seed(30))
        grey = torch.where(u < 0.3, 850 * u, 0.0).to(torch.uint8)
        weight, bias, grad = randn(31, H, D), randn(32, H), randn(33, B, H)
        name = f"{B}x{D}x{H}"
        bits = ops.binarize(grey, None, torch.tensor(5), 255)
        yield f"binarize {name}", (bits,)
        for kind, x, x_scale in (("bits", bits, None), ("pixels", grey, 1 / 255)):
            for activation in range(3):
                yield f"sparse {kind} {activation} {name}", (ops.sparse_linear(x, x_scale, weight, bias, activation),)
            yield f"sparse gradient {kind} {name}", (ops.sparse_linear_weight_grad(x, x_scale, grad),)
        for activation in range(3):
            out = with_edges(grad, 34)
            ops.bias_activation_(out, bias, activation)
            found = ops.activation_backward(out, randn(35, B, H), activation)
            yield f"activation {activation} {name}", (out, *found)


def run_with(isa):
    environment = {**os.environ, "AEVB_ISA": isa}
    return subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def digests():
    """{(isa, threads): {name: digest}}"""
    found = {}
    for isa in ISAS:
        process = run_with(isa)
        assert process.returncode == 0, process.stderr
        report = json.loads(process.stdout)
        assert report["isa"] == isa
        found |= {(isa, int(threads)): digests for threads, digests in report["threads"].items()}
    return found


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits(isa, threads, digests):
    expected, actual = digests[ISAS[0], THREADS[0]], digests[isa, threads]
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []


def test_digests_tell_results_apart(digests):
    """Different results have different digests, so that the test above can fail."""
    expected = digests[ISAS[0], THREADS[0]]
    assert len(expected) > 500
    assert len(set(expected.values())) > 0.9 * len(expected)


def test_set_cpu_isa():
    before = _C.cpu_isa()
    try:
        for isa in ISAS:
            _C.set_cpu_isa(isa)
            assert _C.cpu_isa() == _C.build_info()["isa"] == isa
        with pytest.raises(RuntimeError, match=r'"sse9".*have plain'):
            _C.set_cpu_isa("sse9")
    finally:
        _C.set_cpu_isa(before)


def test_an_unknown_isa_gets_a_sentence():
    process = run_with("sse9")
    assert process.returncode != 0
    assert 'AEVB_ISA is "sse9"; this build and machine have ' + ", ".join(ISAS) in process.stderr


if __name__ == "__main__":
    report = {"isa": _C.cpu_isa(), "threads": {}}
    for threads in THREADS:
        torch.set_num_threads(threads)
        report["threads"][threads] = {name: digest(*tensors) for name, tensors in results()}
    print(json.dumps(report))
