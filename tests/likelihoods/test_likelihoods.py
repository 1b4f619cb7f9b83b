"""Every likelihood of the registry: its kernels against its distribution, and that it is the one that is used."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICES, DTYPES, rand, randn
from likelihood_cases import FAMILIES, as_recon, data, drawn, every
from torch.library import opcheck

import aevb
from aevb import _C, likelihoods
from aevb.cli.options import DenoiseOptions
from aevb.cli.restore import denoised
from aevb.likelihoods import REGISTRY
from aevb.ops import chunking as chunks
from aevb.ops import likelihood
from aevb.training import pictures

D = 33


def test_every_kernel_has_its_formula():
    assert set(likelihood.FORMULAS) == set(_C.likelihoods())
    assert {cls.name for cls in REGISTRY.values()} == set(REGISTRY)


def test_nobody_asks_which_likelihood_it_is():
    """But the classes: the registry is read instead."""
    package = Path(aevb.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name != "likelihoods":
            assert not re.search(r"likelihood == [\"']|isinstance\([^)]*GaussianOutput", path.read_text()), path


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_values_and_gradients(family, dtype, device):
    """Of samples, against the distribution in float64."""
    params, x = [p.to(dtype) for p in drawn(family, 3, 5, D)], data(family, 5, D)
    leaves = [p.to(device).requires_grad_() for p in params]
    log_prob = aevb.log_prob(family, as_recon(leaves), x.to(device))
    wide = [p.double().requires_grad_() for p in params]
    if family.support == (0, 1) or family.density != family:  # torch's own clamps probabilities elsewhere
        expected = family.reference(tuple(wide), x.double())
    else:
        expected = family.distribution(*wide).log_prob(x.double()).sum(-1)
    scale = expected.detach().abs() + D
    assert log_prob.shape == (3, 5)
    assert log_prob.dtype == torch.float32
    assert ((log_prob.cpu().double() - expected.detach()).abs() <= 2e-6 * scale).all()
    upstream = randn(9, 3, 5)
    found = torch.autograd.grad(log_prob, leaves, upstream.to(device))
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == dtype
        assert ((f.cpu().double() - w).abs() <= rounding * (w.abs() + w.abs().mean())).all()


@every
def test_reference_is_the_distribution(family):
    params, x = [p.double() for p in drawn(family, 4, D)], data(family, 4, D).double().round()
    found = family.density.reference(family.density.parameters(as_recon(params)), x)
    assert torch.allclose(found, family.distribution(*params).log_prob(x).sum(-1), rtol=1e-10)
    constant = found - family.reference(tuple(params), x)
    assert torch.allclose(constant, torch.full_like(constant, family.constant(D)), rtol=1e-10, atol=1e-10)
    assert (family.constant(D) != 0) == (family.density != family)
    elements = family.element_log_prob(tuple(params), x)
    assert torch.allclose(elements.sum(-1), family.reference(tuple(params), x), rtol=1e-10) or family.constant(D)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("estimator", ["sgvb-b", "iwae"])
@pytest.mark.parametrize("name", REGISTRY)
def test_the_loss_is_of_the_likelihood_asked_for(name, estimator, reduction):
    family = FAMILIES[name]
    params, x = drawn(family, 3, 5, D), data(family, 5, D)
    mu, logvar = randn(11, 5, 2), randn(12, 5, 2)
    options = {"likelihood": name, "reduction": reduction, "estimator": estimator, "num_samples": 3}
    criterion = aevb.FusedELBO(0.7, **options)
    _, kl = criterion.sample(mu, logvar, seed=1)
    leaves = [p.requires_grad_() for p in params]
    loss = criterion(as_recon(leaves), x, kl=kl)
    log_prob = family.density.reference(family.density.parameters(as_recon(leaves)), x)
    expected = 0.7 * kl - family.reference(tuple(leaves), x).mean(0) if estimator == "sgvb-b" else None
    if expected is None:
        expected = -(torch.logsumexp(log_prob - 0.7 * kl, 0) - torch.log(torch.tensor(3.0)))
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    assert torch.allclose(loss, expected, rtol=1e-5)
    twin = aevb.reference.FusedELBO(0.7, **options)(as_recon(leaves), x, kl=kl)
    assert torch.allclose(loss, twin, rtol=1e-5)
    grads = [torch.autograd.grad(t.sum(), leaves, retain_graph=True) for t in (loss, expected)]
    for f, w in zip(*grads, strict=True):
        assert torch.allclose(f, w, rtol=1e-4, atol=1e-6)
    others = [
        FAMILIES[other].reference(tuple(drawn(FAMILIES[other], 3, 5, D)), x) for other in REGISTRY if other != name
    ]
    assert all(not torch.allclose(log_prob, other, rtol=1e-3) for other in others)


@every
def test_opcheck(family):
    params, x = drawn(family, 4, D), data(family, 4, D)
    p0, p1, *options = family.kernel_arguments(tuple(p.requires_grad_() for p in params))
    opcheck(torch.ops.aevb.log_prob.default, (p0, x, p1, None, None, *options, None))


@every
def test_transforms(family):
    """`torch.compile`, `torch.export`, `vmap`, `torch.func` and the gradient of a gradient."""
    params, x = drawn(family, 4, D), data(family, 4, D)

    def log_prob(*params):
        return aevb.log_prob(family, as_recon(params), x, validate_args=False)

    eager = log_prob(*params)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(log_prob, fullgraph=True)(*params), eager)

    class Module(torch.nn.Module):
        def forward(self, *params):
            return log_prob(*params)

    assert torch.equal(torch.export.export(Module(), tuple(params)).module()(*params), eager)
    rows = torch.func.vmap(lambda x, *p: aevb.log_prob(family, as_recon(p), x))(x, *params)
    assert torch.allclose(rows, eager, rtol=1e-5)
    leaves = [p.clone().requires_grad_() for p in params]
    first = torch.autograd.grad(log_prob(*leaves).sum(), leaves, create_graph=True)
    functional = torch.func.grad(lambda *p: log_prob(*p).sum(), argnums=tuple(range(len(params))))(*params)
    for a, b in zip(first, functional, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    wide = [p.double().requires_grad_() for p in params]
    first64 = torch.autograd.grad(family.reference(tuple(wide), x.double()).sum(), wide, create_graph=True)
    weights = [randn(20 + i, 4, D) for i in range(len(params))]
    found, wanted = (
        torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), inputs, allow_unused=True)
        for grads, inputs in ((first, leaves), (first64, wide))
        if any(g.requires_grad for g in grads)
    )
    for f, w in zip(found, wanted, strict=True):
        if w is not None:
            assert torch.allclose(f.double(), w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if len(f.params) == 2], ids=str)
def test_a_shared_parameter(family):
    """A number, one for all, one for each element: the same values; its gradient is a sum."""
    first, x = drawn(family, 3, 5, D)[0], data(family, 5, D)
    for shared in (randn(30, D), torch.tensor(0.3)):
        shared = shared.clone().requires_grad_()
        found = aevb.log_prob(family, (first, shared), x)
        whole = shared.detach().expand(first.shape).contiguous().requires_grad_()
        each = aevb.log_prob(family, (first, whole), x)
        assert torch.equal(found, each)
        (grad,) = torch.autograd.grad(found.sum(), shared)
        (grad_each,) = torch.autograd.grad(each.sum(), whole)
        assert torch.allclose(grad, grad_each.sum((0, 1) if shared.dim() else (0, 1, 2)), rtol=1e-4)
    number = aevb.log_prob(family, (first, 0.3), x)
    assert torch.allclose(number, aevb.log_prob(family, (first, torch.tensor(0.3)), x), rtol=1e-6)


LAST_LAYERS = ["outputs", "floor", "shared", "one number"]


def last_layer(family, how, dtype=torch.float32):
    """h (3, 5, 7), weight, bias, and what is beside the layer."""
    outputs = 2 if len(family.params) == 2 and how in ("outputs", "floor") else 1
    layer = [0.3 * randn(40, 3, 5, 7), 0.3 * randn(41, outputs * D, 7), 0.3 * randn(42, outputs * D)]
    shared = {"shared": 0.3 * randn(43, D), "one number": 0.3}.get(how)
    return [t.to(dtype) for t in layer], shared, -1.0 if how == "floor" else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [2, 10**6], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name, cls in REGISTRY.items() for how in LAST_LAYERS[: None if len(cls.params) == 2 else 1]],
)
def test_the_fused_last_layer(name, how, rows, reduction, dtype, device, monkeypatch):
    """Values and gradients, also of a parameter that rows share, against float64."""
    family = FAMILIES[name]
    monkeypatch.setitem(chunks.FEWEST_ROWS, device, rows)
    monkeypatch.setitem(chunks.CHUNK_BYTES, device, 1 if rows == 2 else 4 << 20)
    layer, shared, floor = last_layer(family, how, dtype)
    x, upstream = data(family, 5, D), randn(44, 3, 5)

    def of(call, to):
        leaves = [t.detach().to(**to).requires_grad_() for t in layer]
        beside = shared
        if isinstance(shared, torch.Tensor):
            beside = shared.to(**to).detach().requires_grad_()
        value = call(leaves, beside)
        grad = upstream.to(value) if value.dim() else torch.tensor(0.7).to(value)
        inputs = leaves + ([beside] if isinstance(beside, torch.Tensor) else [])
        return [value.detach(), *torch.autograd.grad(value, inputs, grad)]

    def oracle(leaves, beside):
        out = torch.nn.functional.linear(*leaves)
        params = [out] if beside is not None or out.shape[-1] == D else list(out.chunk(2, -1))
        if floor is not None:
            params[1] = floor + torch.nn.functional.softplus(params[1] - floor)
        params += [] if beside is None else [beside]
        value = family.reference(tuple(params), x.double())
        return value if reduction == "none" else value.mean()

    def fused(leaves, beside):
        return aevb.linear_log_prob(family, *leaves, x.to(device), shared=beside, floor=floor, reduction=reduction)

    found, expected = of(fused, {"device": device}), of(oracle, {"dtype": torch.float64})
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    for f, e in zip(found, expected, strict=True):
        assert float((f.cpu().double() - e).norm() / e.norm()) < tolerance
    recon = likelihoods.LinearOutput(*(t.to(device) for t in layer), shared=shared, floor=floor)
    kl = torch.zeros(5, device=device)
    loss = aevb.FusedELBO(reduction="none", likelihood=name)(recon, x.to(device), kl=kl)
    if reduction == "none":
        assert torch.allclose(-loss, found[0].mean(0), rtol=1e-5)


def test_a_last_layer_that_does_not_fit():
    h, weight, bias, x = randn(1, 5, 7), randn(2, 2 * D, 7), randn(3, 2 * D), rand(4, 5, D)
    with pytest.raises(ValueError, match=r"gives 2 numbers .* and one is shared; expected 2 in all, mean, log_scale"):
        aevb.linear_log_prob("laplace", h, weight, bias, x, shared=0.3)
    with pytest.raises(ValueError, match=r"expected x \(\*batch, D\) and h .* for a weight \(D, H\)"):
        aevb.linear_log_prob("exponential", h, weight, bias, x)
    with pytest.raises(ValueError, match=r"shared has shape \(3,\); expected \(33,\)"):
        aevb.linear_log_prob("gaussian", h, weight[:D], bias[:D], x, shared=torch.zeros(3))


@pytest.mark.parametrize("fused", [True, False])
def test_a_shared_gradient_does_not_depend_on_threads(fused):
    layer, x = [randn(1, 4, 300, 50), randn(2, 784, 50), randn(3, 784)], rand(4, 300, 784)

    def gradient(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            shared = torch.zeros(784, requires_grad=True)
            if fused:
                value = aevb.linear_log_prob("gaussian", *layer, x, shared=shared, reduction="mean")
            else:
                value = aevb.log_prob("gaussian", (out, shared), x).mean()
            return torch.autograd.grad(value, shared)[0]
        finally:
            torch.set_num_threads(before)

    out = torch.nn.functional.linear(*layer)
    assert torch.equal(gradient(1), gradient(2))


@every
def test_samples(family):
    """Are of the distribution, and of the seed alone."""
    params = [p[:, :3].contiguous() for p in drawn(family, 1, D)]
    many = as_recon([p.expand(100_000, 3).contiguous() for p in params])
    x = aevb.sample_likelihood(family, many, seed=4)
    low, high = family.support
    assert x.min() >= low
    assert x.max() <= high
    mean, variance = family.mean(tuple(params)), family.variance_of(tuple(params))
    assert ((x.mean(0) - mean).abs() < 5 * (variance / 1e5).sqrt()).all()
    assert torch.allclose(x.var(0), variance.expand(3, 3)[0], rtol=0.1)
    assert torch.equal(x, aevb.sample_likelihood(family, many, seed=4))
    far = family.sample(tuple(p[:, :2] for p in params), torch.tensor([[6.76, -6.76]]))  # the farthest that there are
    assert far.isfinite().all()
    assert not torch.equal(x, aevb.sample_likelihood(family, many, seed=5))


@pytest.mark.parametrize("name", REGISTRY)
def test_targets_outside_the_support(name):
    family = FAMILIES[name]
    params, x = drawn(family, 4, D), data(family, 4, D)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"x\[1, 2\] is nan"):
        aevb.log_prob(family, as_recon(params), x, validate_args=True)
    if family.support[0] == 0:
        x[1, 2] = -0.5
        with pytest.raises(ValueError, match=r"x\[1, 2\] is -0.5"):
            aevb.log_prob(family, as_recon(params), x, validate_args=True)


@every
def test_parameters_of_another_likelihood(family):
    wrong = (torch.zeros(4, D),) * 3
    with pytest.raises(ValueError, match="expected"):
        aevb.log_prob(family, wrong, torch.zeros(4, D))


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("name", REGISTRY)
def test_a_model_is_trained_and_asked(name, architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})  # other tests look at them
    options = {"hidden_dims": (32,), "channels": (4,), "latent_dim": 3, "progress": False, "epochs": 2}
    trainer = aevb.Trainer(
        aevb.TrainConfig(out=str(tmp_path), likelihood=name, architecture=architecture, threads=1, **options)
    )
    trainer.fit()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["test_elbo"] > metrics[0]["test_elbo"]
    if REGISTRY[name]().density != REGISTRY[name]():  # both are of the density
        assert metrics[-1]["train_elbo"] == pytest.approx(metrics[-1]["test_elbo"], abs=4)
    model = aevb.load(tmp_path)
    x = trainer.dataset.test_images[:4].float() / trainer.dataset.max_value
    x = x.flatten(1).round() if model.family.of_bits else x.flatten(1)
    z = model.encode(x)[0]
    assert torch.allclose(model.pixel_log_prob(x, z).sum(-1), model.log_prob(x, z), rtol=1e-4, atol=1e-3)
    mean, variance = model.moments(z)
    assert mean.shape == variance.shape == x.shape
    assert (variance > 0).all()
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[:, : x.shape[1] // 2] = False
    for method in ("gradient", "gibbs"):
        found = model.impute(x, observed, method=method, steps=3, num_samples=20, clean=x)
        assert found.mean.isfinite().all()
        assert torch.equal(found.mean[observed], x[observed])
    if "sigma" not in model.family.noise:
        for denoise in (
            lambda: model.denoise(x, sigma=0.1),
            lambda: denoised(trainer, DenoiseOptions(sigma=0.1, images=2)),
        ):
            with pytest.raises(ValueError, match=f"likelihood='{name}' .* no closed form"):
                denoise()


# ---- what was wrong once --------------------------------------------------------------------------------------------


def test_a_second_parameter_in_float32_beside_outputs_in_bfloat16(monkeypatch):
    """As under autocast on a GPU, where softplus is computed in float32."""
    above_floor = chunks.above_floor
    monkeypatch.setattr(chunks, "above_floor", lambda floor, t: above_floor(floor, t.float()))
    (h, weight, bias), _, floor = last_layer(FAMILIES["laplace"], "floor", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    for reduction in ("none", "mean"):
        value = aevb.linear_log_prob("laplace", *leaves, rand(1, 5, D), floor=floor, reduction=reduction)
        grads = torch.autograd.grad(value.sum(), leaves)
        assert {g.dtype for g in grads} == {torch.bfloat16}


def test_what_was_pickled_before_there_was_a_family():
    model, criterion = aevb.VAE(D, 5, 2, likelihood="gaussian"), aevb.FusedELBO(likelihood="gaussian", variance=0.5)
    for made, names in (
        (model, ["likelihood"]),
        (criterion, ["likelihood", "from_probs", "variance", "sigmoid_means"]),
    ):
        state = {**made.__dict__, **{name: getattr(made, name) for name in names}}
        del state["family"]
        again = type(made).__new__(type(made))
        again.__setstate__(state)
        assert again.family == made.family
        assert not set(names) & set(vars(again))


def test_a_likelihood_set_later():
    criterion = aevb.FusedELBO(likelihood="gaussian", sigmoid_means=True)
    criterion.likelihood = "bernoulli"
    assert criterion.family == likelihoods.Bernoulli()
    criterion.from_probs = True
    assert criterion.family == likelihoods.Bernoulli(from_probs=True)
    with pytest.raises(ValueError, match=r"variance is 2\.0, of the Gaussian likelihood"):
        criterion.variance = 2.0


def test_recon_of_another_likelihood():
    x, kl, p = rand(1, 5, D), torch.zeros(5), randn(2, 5, D)
    for recon in (aevb.GaussianOutput(p, p), aevb.LinearLogits(randn(3, 5, 2), randn(4, D, 2))):
        for name in ("laplace", "mse", "exponential"):
            with pytest.raises(ValueError, match=f"recon is a {type(recon).__name__}; expected a t"):
                aevb.FusedELBO(likelihood=name)(recon, x, kl=kl)
    linear = aevb.LinearOutput(randn(3, 5, 2), randn(4, 2 * D, 2))
    with pytest.raises(ValueError, match=r"variance is 2\.0, but recon is a LinearOutput"):
        aevb.FusedELBO(likelihood="gaussian", variance=2.0)(linear, x, kl=kl)


def test_a_number_as_second_parameter():
    x, mean = rand(1, 5, D), randn(2, 5, D)
    expected = aevb.log_prob("laplace", (mean, torch.zeros(())), x)
    assert torch.equal(aevb.log_prob("laplace", (mean, 0), x), expected)
    h, weight = randn(3, 5, 2), randn(4, D, 2)
    found = aevb.linear_log_prob("laplace", h, weight, None, x, shared=0)
    assert torch.allclose(found, aevb.log_prob("laplace", (h @ weight.t(), 0.0), x), rtol=1e-5)
    for bad in (float("nan"), None, "0"):
        with pytest.raises(ValueError, match=r"log_scale is .*; expected a finite number"):
            aevb.log_prob("laplace", (mean, bad), x)
    with pytest.raises(ValueError, match="logvar is nan; expected a finite number"):
        aevb.linear_log_prob("gaussian", h, weight, None, x, shared=float("nan"))


@pytest.mark.parametrize(("name", "second"), [("exponential", -110.0), ("exponential", 100.0), ("laplace", -110.0)])
def test_formulas_at_extremes_are_the_kernels(name, second):
    params = [torch.full((2, D), second)] if name == "exponential" else [torch.zeros(2, D), torch.full((2, D), second)]
    x = torch.zeros(2, D)
    found = FAMILIES[name].reference(tuple(params), x)
    assert torch.allclose(found, aevb.log_prob(name, as_recon(params), x, validate_args=False), rtol=1e-5)


def test_a_model_of_the_exponential_has_no_negative_pixels():
    model = aevb.VAE(D, 5, 2, likelihood="exponential")
    with pytest.raises(ValueError, match=r"x\[0, 3\] is -1.0; the model's pixels are 0 or more"):
        model.impute(torch.zeros(2, D).index_fill(1, torch.tensor(3), -1.0), torch.ones(D, dtype=torch.bool))
