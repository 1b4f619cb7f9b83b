"""The steps of training: without autograd and with it, the same bits; and a CUDA graph that cannot be."""

import math

import pytest
import torch
from conftest import rand, randn
from emulation.build import emulated_ops

import aevb
from aevb.checks.choices import GRADIENTS
from aevb.data import Targets
from aevb.likelihoods import REGISTRY
from aevb.ops import matmul_cuda as cuda_products
from aevb.ops.linear import floating
from aevb.training import step_direct
from aevb.training.distributed import SingleProcess
from aevb.training.metrics import EpochMetrics
from aevb.training.objectives import Objective, Terms
from aevb.training.progress import terms as shown_terms
from aevb.training.step import AutogradStep
from aevb.training.step_choice import step_key, training_step
from aevb.training.step_cuda_graph import GraphStep
from aevb.training.step_direct import DirectStep

SEEDS = torch.tensor(3), torch.tensor(4)


def images(n=60, dim=64):
    u = rand(0, n, dim)
    return torch.where(u < 0.3, 255 * u / 0.3, 0.0).to(torch.uint8)


def step(cls, how="dynamic", hidden_dims=(50,), bf16=False, data=None, **criterion):
    targets = Targets(images() if data is None else data, how, 255)
    model = aevb.VAE(64, hidden_dims, 5, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss = aevb.FusedELBO(**{"x_scale": targets.x_scale, **criterion})
    return cls(model, loss, optimizer, targets, targets.x_scale, bf16)


def after(made, steps=3):
    """What the steps gave, and the weights after them."""
    outcomes = [made(torch.arange(i, 60, 2), *SEEDS) for i in range(steps)]
    return [outcome.numbers for outcome in outcomes] + [p.detach() for p in made.model.parameters()]


@pytest.mark.parametrize("how", ["dynamic", "none"])
@pytest.mark.parametrize("hidden_dims", [(50,), (40, 30)])
@pytest.mark.parametrize(
    ("estimator", "num_samples"),
    [(e, n) for e in ("sgvb-b", "sgvb-a", "stl") for n in (None, 3)] + [("iwae", 3), ("dreg", 3)],
)
def test_without_autograd_are_the_same_bits(estimator, num_samples, hidden_dims, how):
    options = {"how": how, "hidden_dims": hidden_dims, "estimator": estimator, "num_samples": num_samples, "beta": 0.7}
    direct, autograd = step(DirectStep, **options), step(AutogradStep, **options)
    assert DirectStep.fits(direct.model, direct.criterion, direct.batch.images, False)
    for a, b in zip(after(direct), after(autograd), strict=True):
        assert torch.equal(a, b)
    assert not direct(torch.arange(4), *SEEDS).numbers.requires_grad


@pytest.mark.parametrize("estimator", ["sgvb-b", "iwae"])
@pytest.mark.parametrize("variance", ["learned", "shared", 0.1])
@pytest.mark.parametrize("likelihood", REGISTRY)
def test_of_any_likelihood(likelihood, variance, estimator):
    """Against a step whose decoder's output is in memory."""
    num_samples = 3 if estimator == "iwae" else None

    def gradients(cls):
        targets = Targets(images(), "none", 255)
        model = aevb.VAE(
            64, 50, 5, likelihood=likelihood, variance=variance, generator=torch.Generator().manual_seed(1)
        )
        sigmoid = getattr(model.family, "sigmoid_means", False)
        options = {"x_scale": 1 / 255, "estimator": estimator, "num_samples": num_samples, "sigmoid_means": sigmoid}
        criterion = aevb.FusedELBO(0.7, likelihood=likelihood, **options)
        optimizer = torch.optim.Adam(model.parameters())
        if cls is None:
            model.recon, cls = model.decode, AutogradStep
        else:
            assert DirectStep.fits(model, criterion, targets.images, False)
        made = cls(model, criterion, optimizer, targets, targets.x_scale, False)
        index = torch.arange(60)
        outcome = made.gradients(made.batch(index, SEEDS[0]), made.noise_seeds(SEEDS[1], index))
        return [outcome.numbers, *(p.grad for p in model.parameters())]

    plain, linear, direct = (gradients(cls) for cls in (None, AutogradStep, DirectStep))
    for a, b, c in zip(plain, linear, direct, strict=True):
        assert relative(b, a.double()) < 3e-6
        assert torch.equal(b, c)


def on_an_emulated_gpu(monkeypatch):
    """Direct steps of tensors on a CPU go as on a GPU, by its kernels."""
    emulated, mm = emulated_ops(), torch.mm

    def with_out_dtype(a, b, out_dtype=None, **options):
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), **options)

    names = {"_split": "split_bfloat16", "_add_pieces": "add_pieces", "bias_activation": "bias_activation_"}
    names |= {"activation_backward": "activation_backward", "elbo_terms": "elbo_terms"}
    for name, op in names.items():
        monkeypatch.setattr(cuda_products, name, getattr(emulated, op).default)
    monkeypatch.setattr(cuda_products, "_is_faster_in_pieces", lambda device: True)
    monkeypatch.setattr(torch, "mm", with_out_dtype)
    monkeypatch.setattr(step_direct, "_on_gpu", lambda t: True)


@pytest.mark.parametrize("fewest", [(1, 1, 1), (1, 60, 60), (10**6,) * 3])
@pytest.mark.parametrize("how", ["dynamic", "none"])
@pytest.mark.parametrize("hidden_dims", [(500,), (100, 93)])
@pytest.mark.parametrize(("estimator", "num_samples"), [("sgvb-b", None), ("sgvb-b", 3), ("stl", 3), ("iwae", 3)])
def test_as_on_a_gpu_are_the_same_but_for_rounding(estimator, num_samples, hidden_dims, how, fewest, monkeypatch):
    """With all, some and no products in pieces."""
    options = {"how": how, "hidden_dims": hidden_dims, "estimator": estimator, "num_samples": num_samples}

    def gradients(cls, beta):
        made = step(cls, beta=beta, **options)
        index = torch.arange(60)
        outcome = made.gradients(made.batch(index, SEEDS[0]), made.noise_seeds(SEEDS[1], index))
        return [outcome.numbers, *(p.grad for p in made.model.parameters())]

    for beta in (0.7, torch.tensor(0.7)):  # a tensor where a graph holds the step
        plain = gradients(AutogradStep, beta)
        with monkeypatch.context() as patched:
            on_an_emulated_gpu(patched)
            patched.setattr(cuda_products, "FEWEST", fewest)
            found = gradients(DirectStep, beta)
        for a, b in zip(found, plain, strict=True):
            assert a.shape == b.shape
            assert relative(a, b.double()) < 3e-6


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def test_products_in_slices_and_in_pieces_are_as_exact_as_float32s(monkeypatch):
    on_an_emulated_gpu(monkeypatch)
    p = cuda_products
    for rows, columns, terms in ((100, 500, 784), (100, 40, 500), (100, 20, 500), (7, 9, 11), (1024, 500, 784)):
        a, b, bias = randn(1, rows, terms), randn(2, columns, terms), randn(3, columns)
        expected, plain = a.double() @ b.double().t(), relative(a @ b.t(), a.double() @ b.double().t())
        bound = max(2 * plain, 2e-7)
        assert relative(p.linear(a, b), expected) < bound
        assert relative(p.linear(a, b, bias, "tanh"), torch.tanh(expected + bias)) < 1e-5
        assert relative(p.rows_product(a.t().contiguous(), b.t().contiguous()), expected) < bound
        left, right = p.pieces(a, p.LEFT), p.pieces(b, p.RIGHT)
        assert relative(p.product_of_pieces(left, right), expected) < bound
        assert relative(p.product_with_weight(p.pieces(a, p.RIGHT), b.t().contiguous(), p.LEFT), expected) < bound
        down, along = p.pieces(a.t().contiguous(), p.RIGHT), p.pieces(b.t().contiguous(), p.LEFT)
        assert relative(p.rows_product_of_pieces(down, along, (rows, columns)), expected) < bound
        x = (256 * rand(4, rows, terms)).to(torch.uint8)
        found = p.product_of_pieces(p.pieces(x, p.BYTES), p.pieces(b, p.BESIDE_BYTES))
        assert relative(found, x.double() @ b.double().t()) < bound
        found = p.activate(found, 1 / 255, bias, "tanh")
        assert relative(found, torch.tanh(x.double() @ b.double().t() / 255 + bias)) < 1e-5


def test_which_products_are_cut_how(monkeypatch):
    assert cuda_products.slices(100, 500, 784) == 7
    assert cuda_products.slices(4096, 500, 784) == 1
    assert cuda_products.slices(1, 1, 47) == 1
    monkeypatch.setattr(cuda_products, "_is_faster_in_pieces", lambda device: True)
    weight = torch.empty(784, 500)
    assert cuda_products.in_pieces(1000, weight)
    assert not cuda_products.in_pieces(100, weight)
    assert not cuda_products.in_pieces(1000, weight[:40])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not cuda_products.in_pieces(1000, weight)


def test_dense_images_too():
    """Of which no product is a sum of a few rows."""
    data = (255 * rand(5, 60, 64)).to(torch.uint8)
    for a, b in zip(
        after(step(DirectStep, "none", data=data)), after(step(AutogradStep, "none", data=data)), strict=True
    ):
        assert torch.equal(a, b)


def test_no_more_than_this_is_taken_for_a_plain_vae():
    class Other(aevb.VAE):
        pass

    def fits(model, bf16=False, **options):
        return DirectStep.fits(model, aevb.FusedELBO(**options), images(), bf16)

    vae = aevb.VAE(64, 50, 5)
    assert fits(vae)
    assert not fits(vae, bf16=True)
    assert not fits(vae, free_bits=1.0)
    assert not fits(vae, capacity=1.0)
    assert not fits(vae, beta=torch.tensor(1.0))
    assert not fits(Other(64, 50, 5))
    assert not fits(vae.double())
    hooked = aevb.VAE(64, 50, 5)
    hooked.decoder[0].weight.register_hook(lambda grad: grad)
    assert not fits(hooked)
    frozen = aevb.VAE(64, 50, 5)
    frozen.decoder[0].bias.requires_grad_(False)
    assert not fits(frozen)
    assert not fits(aevb.VAE(64, 50, 5), reduction="sum")
    for change in (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.decoder[0]),
        lambda m: setattr(m.encoder[2], "weight", m.encoder[4].weight),
        lambda m: m.encoder.__setitem__(1, torch.nn.ReLU()),
        lambda m: m.decoder[2].register_forward_hook(lambda *_: None),
        lambda m: setattr(m.decoder[0], "bias", None),
    ):
        other = aevb.VAE(64, (10, 10), 5)
        assert fits(other)
        change(other)
        assert not fits(other)


def test_grey_floats_are_scaled_too():
    data = images().float()
    made = [step(cls, x_scale=1 / 255) for cls in (DirectStep, AutogradStep)]
    for each in made:
        each.x_scale = 1 / 255
    x = data[:30]
    outcomes = [m.gradients(x, m.noise_seeds(SEEDS[1], torch.arange(30))) for m in made]
    assert torch.equal(outcomes[0].loss, outcomes[1].loss)
    for a, b in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    made = step(AutogradStep, estimator="iwae", num_samples=4)
    whole = made.noise_seeds(SEEDS[1], torch.arange(60))
    assert whole.shape == (4, 60)
    assert torch.equal(made.noise_seeds(SEEDS[1], torch.tensor([7, 40])), whole[:, [7, 40]])
    assert len(set(whole.flatten().tolist())) == 240
    assert step(AutogradStep).noise_seeds(SEEDS[1], torch.arange(60)).shape == (60,)


def test_bf16_trains():
    made = step(AutogradStep, bf16=True)
    losses = [float(made(torch.arange(60), *SEEDS).loss) for _ in range(30)]
    assert losses[-1] < losses[0] - 5
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in made.model.parameters())
    exact = step(AutogradStep)
    assert losses[0] == pytest.approx(float(exact(torch.arange(60), *SEEDS).loss), rel=0.01)


def test_a_step_that_no_graph_can_hold_runs_as_it_is(monkeypatch):
    """Here: on a machine without a GPU, or with one on the CPU's tensors."""
    if torch.cuda.is_available():
        pytest.skip("what there is to see here needs a machine without a GPU")
    made = GraphStep(step(AutogradStep), batch_size=30, warm_up=0)
    with pytest.warns(UserWarning, match="could not be captured in a CUDA graph .*; the same numbers|it runs op by op"):
        made(torch.arange(0, 60, 2), *SEEDS)
    assert made.given_up
    made(torch.arange(1, 60, 2), *SEEDS)
    plain = step(AutogradStep)
    for i in range(2):
        plain(torch.arange(i, 60, 2), *SEEDS)
    for a, b in zip(made.step.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert made.step.objective.beta == 1.0


def test_the_fastest_step_is_chosen():
    def chosen(**options):
        made = step(AutogradStep, **options)
        return type(training_step(made.model, made.objective, made.optimizer, made.batch, 30, made.bf16))

    assert chosen() is DirectStep
    assert chosen(free_bits=0.5) is AutogradStep
    assert chosen(bf16=True) is AutogradStep
    assert GRADIENTS[0] == "total"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("estimator", ["sgvb-b", "iwae", "dreg"])
def test_a_graph_has_the_bits_of_its_ops(estimator):
    def trained(graph):
        targets = Targets(images(), "dynamic", 255, "cuda")
        model = aevb.VAE(64, 50, 5, generator=torch.Generator().manual_seed(1)).cuda()
        optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=True)
        criterion = aevb.FusedELBO(estimator=estimator, num_samples=None if estimator == "sgvb-b" else 5)
        made = AutogradStep(model, criterion, optimizer, targets, None)
        made = GraphStep(made, 20) if graph else made
        seeds = torch.tensor(3, device="cuda"), torch.tensor(4, device="cuda")
        losses = []
        for i in range(12):
            criterion.beta = min(1.0, i / 6)
            index = torch.arange(i, i + (20 if i != 9 else 7), device="cuda")
            losses.append(made(index, *seeds).loss)
        assert not graph or made.graph is not None
        return [*losses, *(p.detach() for p in model.parameters())]

    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Reconstruction(Objective):
    """-log p(x|z) at z = mu, with no KL."""

    reports = "log_likelihood"

    def terms_given(self, model, x, x_scale, mu, logvar, seeds, of_whole_batch=None):
        loss = -model.log_prob(floating(x, x_scale, mu), mu).mean()
        return Terms(loss, torch.zeros(()), torch.zeros(()))


def test_a_step_takes_any_objective():
    """By autograd, with its gradients and its report."""
    made = step(AutogradStep)
    objective = Reconstruction()
    other = training_step(made.model, objective, made.optimizer, made.batch, 30, False)
    assert type(other) is AutogradStep
    index = torch.arange(30)
    x = made.batch(index, SEEDS[0])
    found = other.gradients(x, other.noise_seeds(SEEDS[1], index))
    gradients = [None if p.grad is None else p.grad.clone() for p in made.model.parameters()]
    made.optimizer.zero_grad(set_to_none=True)
    mu, _ = made.model.encode(x, made.x_scale)
    expected = -made.model.log_prob(floating(x, made.x_scale, mu), mu)
    expected.mean().backward()
    assert torch.allclose(found.loss, expected.mean())
    for p, gradient in zip(made.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    metrics = EpochMetrics(SingleProcess(torch.device("cpu")), objective.reports)
    metrics.add(1, 30, found.numbers)
    ((count, averages),) = metrics.read(wait=True)
    assert (count, averages.log_likelihood) == (30, pytest.approx(-float(found.loss)))
    assert math.isnan(averages.elbo)
    assert shown_terms(averages) == f"log-likelihood {averages.log_likelihood:.2f}"
    assert step_key(made.model, objective, made.optimizer) == step_key(made.model, objective, made.optimizer)
    assert step_key(made.model, objective, made.optimizer) != step_key(made.model, Reconstruction(), made.optimizer)


def test_a_trainer_takes_any_objective(tmp_path):
    config = aevb.TrainConfig(epochs=1, hidden_dims=(8,), latent_dim=2, out=str(tmp_path), threads=1, progress=False)
    trainer = aevb.Trainer(config)
    trainer.state.objective = Reconstruction()
    first, second = trainer.train_epoch(), trainer.train_epoch()
    assert second.log_likelihood > first.log_likelihood
    assert math.isnan(second.elbo)
    trainer.criterion = trainer.criterion  # and SGVB again
    assert math.isfinite(trainer.train_epoch().elbo)
