"""FusedELBO with a Gaussian decoder: the reference's values and gradients, for every estimator and kind of output."""

import copy
import math
import pickle

import pytest
import torch
from conftest import close_by_magnitude, rand, randn, same_bits

import aevb
from aevb import reference

ESTIMATORS = [("sgvb-b", None), ("sgvb-b", 3), ("sgvb-a", None), ("sgvb-a", 3), ("stl", 3), ("iwae", 3), ("dreg", 3)]
BATCH, LATENT, DATAPOINT = (2, 3), 4, (1, 5, 8)
D = math.prod(DATAPOINT)


def decoder_output(kind, samples):
    """What the decoder gives: the means, and what is learned of the variance."""
    mean = randn(1, *samples, *BATCH, D)
    logvar = {
        "means": None,
        "number": -0.3,
        "each": 0.5 * randn(2, *samples, *BATCH, D),
        "each pixel": 0.5 * randn(2, D),
        "one": torch.tensor(0.3),
        "bfloat16": (0.5 * randn(2, D)).bfloat16(),
    }
    return mean, logvar[kind]


KINDS = ["means", "number", "each", "each pixel", "one", "bfloat16"]


def loss_of(criterion, mean, logvar, x, kl):
    return criterion(mean if logvar is None else aevb.GaussianOutput(mean, logvar), x, kl=kl)


def leaves_of(*tensors, dtype=None):
    return [t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("sigmoid_means", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("estimator", "num_samples"), ESTIMATORS)
def test_value_and_gradients(estimator, num_samples, kind, sigmoid_means, reduction):
    """In float64, relative to the magnitudes of the terms: of the samples' log-likelihoods, KLs and weights."""
    options = {"estimator": estimator, "num_samples": num_samples, "sigmoid_means": sigmoid_means}
    options |= {"variance": 0.3 if kind == "means" else 1.0, "likelihood": "gaussian"}
    fused = aevb.FusedELBO(0.7, reduction, **options)
    plain = reference.FusedELBO(0.7, reduction, **options)
    samples = () if num_samples is None else (num_samples,)
    mean, logvar = decoder_output(kind, samples)
    x, kl = rand(3, *BATCH, *DATAPOINT), 3 * rand(4, *(() if estimator == "sgvb-b" else samples), *BATCH)

    inputs, inputs64 = leaves_of(mean, logvar, kl), leaves_of(mean, logvar, kl, dtype=torch.float64)
    of = lambda found: (found[0], found[1] if len(found) == 3 else logvar)  # noqa: E731
    loss = loss_of(fused, *of(inputs), x, inputs[-1])
    expected = loss_of(plain, *of(inputs64), x, inputs64[-1])

    m, v = (t.detach() if isinstance(t, torch.Tensor) else t for t in of(inputs64))
    v = torch.as_tensor(math.log(0.3) if v is None else v, dtype=torch.float64)
    m = m.sigmoid() if sigmoid_means else m
    residual = (x.double().view(*BATCH, D) - m).abs()
    squares = (residual**2 + (2 * residual if sigmoid_means else 0)) * torch.exp(-v)  # the sigmoid is rounded
    terms = (0.5 * (squares + v.abs() + math.log(2 * math.pi))).sum(-1)
    log_weights = terms + 0.7 * inputs64[-1].detach()
    if samples:
        log_weights = log_weights.amax(0)
    scale = {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}[reduction](log_weights)
    assert loss.dtype == torch.float32
    close_by_magnitude(loss, expected, scale)

    g = 3 * randn(5, *loss.shape)
    found = torch.autograd.grad(loss, inputs, g)
    wanted = torch.autograd.grad(expected, inputs64, g.double())
    # A weight of a sample is an exponential: it has the absolute error of its logarithm.
    of_weights = 1 + (log_weights.max() if estimator in ("iwae", "dreg") else 0)
    magnitudes = [e.abs() + e.abs().amax(-1, keepdim=True) for e in wanted[:-1]] + [wanted[-1].abs()]
    if kind in ("each pixel", "one", "bfloat16"):  # a sum of gradients of both signs
        each = v.expand(mean.shape).clone().requires_grad_()
        of_each = loss_of(plain, inputs64[0].detach(), each, x, inputs64[-1].detach())
        terms = torch.autograd.grad(of_each, each, g.double())[0].abs()
        magnitudes[1] = (terms + terms.amax(-1, keepdim=True)).sum_to_size(logvar.shape)
    for actual, e, magnitude in zip(found, wanted, magnitudes, strict=True):
        close_by_magnitude(actual, e, of_weights * magnitude)


@pytest.mark.parametrize("options", [{"free_bits": 0.3}, {"free_bits": 0.3, "groups": 2}, {"capacity": 2.0}, {}])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_free_bits_capacity_and_a_learned_beta(options, num_samples):
    options = {**options, "likelihood": "gaussian", "num_samples": num_samples, "sigmoid_means": True}
    mu, logvar, x = randn(1, 6, LATENT), 0.3 * randn(2, 6, LATENT), rand(3, 6, D)
    mean = randn(4, *(() if num_samples is None else (num_samples,)), 6, D)
    results = []
    for module, dtype in ((aevb, torch.float32), (reference, torch.float64)):
        inputs = leaves_of(mean, mu, logvar, torch.tensor(0.7), dtype=dtype)
        criterion = module.FusedELBO(inputs[3], **options)
        of_latents = criterion(inputs[0], x, inputs[1], inputs[2])
        _, kl = criterion.sample(inputs[1], inputs[2], seed=torch.tensor(9))
        of_kl = criterion(inputs[0], x, kl=kl)
        assert of_latents.dtype == dtype
        results.append([of_latents, of_kl, *torch.autograd.grad(-2.5 * of_latents + of_kl, inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_layouts_of_a_datapoint():
    """mean (B, 40) goes with x (B, 1, 5, 8), and the other way round; logvar is laid out as mean, or flat."""
    criterion = aevb.FusedELBO(likelihood="gaussian", reduction="none")
    mean, logvar, x, kl = randn(1, 3, 6, D), randn(2, 3, 6, D), rand(3, 6, D), rand(4, 6)
    for v in (logvar, logvar[0, 0], torch.tensor(0.3), -0.3):
        expected = criterion(aevb.GaussianOutput(mean, v), x, kl=kl)
        assert expected.shape == (6,)
        for recon, target in [((D,), (1, 5, 8)), ((1, 5, 8), (D,)), ((5, 8), (2, 4, 5)), ((D, 1), (D,))]:
            shaped = v.view(3, 6, *recon) if v is logvar else v
            output = aevb.GaussianOutput(mean.view(3, 6, *recon), shaped)
            assert same_bits(criterion(output, x.view(6, *target), kl=kl), expected)
    pixels = logvar[0, 0].view(5, 8)  # as it broadcasts to mean
    for v in (pixels, pixels[:, :1], pixels.expand(6, 5, 8)):
        output = aevb.GaussianOutput(mean.view(3, 6, 5, 8), v)
        expected = criterion(aevb.GaussianOutput(mean, v.expand(3, 6, 5, 8).reshape(3, 6, D)), x, kl=kl)
        assert same_bits(criterion(output, x, kl=kl), expected)
    alone = aevb.FusedELBO(likelihood="gaussian", reduction="none", batch_dims=0)
    one = alone(aevb.GaussianOutput(mean[0, 0], logvar[0, 0]), x[0], kl=kl[0])
    assert one.shape == ()
    first = criterion(aevb.GaussianOutput(mean[:1, :1], logvar[:1, :1]), x[:1], kl=kl[:1])
    assert same_bits(one, first[0])


def test_channels_of_one_output():
    """A convolutional decoder of two channels, the mean's and logvar's."""
    h, x = randn(1, 6, 2, 5, 8).requires_grad_(), rand(2, 6, 1, 5, 8)
    criterion = aevb.FusedELBO(likelihood="gaussian", sigmoid_means=True)
    loss = criterion(aevb.GaussianOutput(*h.chunk(2, 1)), x, kl=torch.zeros(6))
    expected = reference.FusedELBO(likelihood="gaussian", sigmoid_means=True)(
        h.double().chunk(2, 1), x, kl=torch.zeros(6)
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, h)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("x_scale", [1 / 255, None])
def test_half_precision_and_pixels(x_scale):
    u = rand(1, 6, D)
    x = (256 * u).to(torch.uint8) if x_scale else u
    for dtype in (torch.bfloat16, torch.float16):
        mean, logvar = randn(2, 6, D).to(dtype), randn(3, 6, D).to(dtype)
        results = []
        for module, kind in ((aevb, dtype), (reference, torch.float64)):
            inputs = leaves_of(mean, logvar, dtype=kind)
            loss = module.FusedELBO(likelihood="gaussian", x_scale=x_scale)(
                aevb.GaussianOutput(*inputs), x, kl=torch.ones(6, dtype=torch.float32 if module is aevb else kind)
            )
            results.append([loss, *torch.autograd.grad(1024 * loss, inputs)])
        torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-6, atol=0)
        for actual, expected in zip(results[0][1:], results[1][1:], strict=True):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("estimator", ["sgvb-b", "iwae"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(estimator, reduction):
    torch._dynamo.reset()
    criterion = aevb.FusedELBO(0.7, reduction, likelihood="gaussian", estimator=estimator, num_samples=3)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    kl = rand(4, *((6,) if estimator == "sgvb-b" else (3, 6)))
    results = []
    for call in (compiled, criterion):
        inputs = leaves_of(randn(1, 3, 6, D), randn(2, D), kl)
        loss = call(aevb.GaussianOutput(inputs[0], inputs[1]), rand(3, 6, D), kl=inputs[2])
        results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_the_loss():
    results = []
    for module in (aevb, reference):
        inputs = leaves_of(randn(1, 6, D), randn(2, D), rand(3, 6))
        criterion = module.FusedELBO(0.7, likelihood="gaussian", sigmoid_means=True)
        loss = criterion(aevb.GaussianOutput(inputs[0], inputs[1]), rand(4, 6, D), kl=inputs[2])
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(sum((g * g).sum() for g in first[:2]), inputs[:2]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_empty():
    for batch, width in ((0, D), (4, 0), (0, 0)):
        mean, x = torch.zeros(batch, width, requires_grad=True), torch.zeros(batch, width)
        for reduction in ("none", "mean", "sum"):
            expected = {"none": torch.ones(batch), "mean": torch.ones(batch).mean(), "sum": torch.ones(batch).sum()}
            loss = aevb.FusedELBO(reduction=reduction, likelihood="gaussian")(mean, x, kl=torch.ones(batch))
            assert same_bits(loss.detach(), expected[reduction])
            torch.autograd.grad(loss, mean, torch.full_like(loss, 3))


def test_copy_pickle_and_repr():
    criterion = aevb.FusedELBO(0.5, likelihood="gaussian", variance=0.3, sigmoid_means=True)
    mean, x, kl = randn(1, 6, D), rand(2, 6, D), rand(3, 6)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert same_bits(twin(mean, x, kl=kl), criterion(mean, x, kl=kl))
    assert "likelihood='gaussian', variance=0.3, sigmoid_means=True" in repr(criterion)
    assert "variance" not in repr(aevb.FusedELBO())


def test_mean_squared_error():
    """A fixed variance is a squared error, scaled and shifted: what people write."""
    mean, x = randn(1, 6, D).requires_grad_(), rand(2, 6, D)
    loss = aevb.FusedELBO(reduction="sum", likelihood="gaussian", variance=0.5)(mean, x, kl=torch.zeros(6))
    squared = torch.nn.functional.mse_loss(mean, x, reduction="sum")
    torch.testing.assert_close(loss, squared + 6 * D * 0.5 * math.log(math.pi))
    torch.testing.assert_close(torch.autograd.grad(loss, mean), torch.autograd.grad(squared, mean))


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_sample_is_not_taken_for_a_datapoint_of_one_pixel(estimator, batch):
    criterion = aevb.FusedELBO(likelihood="gaussian", reduction="none", estimator=estimator, num_samples=batch)
    twin = reference.FusedELBO(likelihood="gaussian", reduction="none", estimator=estimator, num_samples=batch)
    mu, logvar, x = randn(1, batch, 2), randn(2, batch, 2), rand(3, batch, 1)
    z, kl = criterion.sample(mu, logvar, seed=3)
    mean = z.sum(-1, keepdim=True)
    torch.testing.assert_close(criterion(mean, x, kl=kl), twin(mean, x, kl=kl))
