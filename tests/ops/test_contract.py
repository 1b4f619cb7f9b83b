"""The contract with PyTorch: autograd, torch.compile, torch.export, torch.func, autocast, for every op alike."""

import copy
import io
import pickle
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import aevb
from aevb import reference
from aevb.ops import autograd, gaussian

SEED = torch.tensor(123)


def normal(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """One op as a function of the tensors it is differentiated by, and its reference on the same noise."""

    name: str
    inputs: tuple[Tensor, ...]
    fused: Callable
    plain: Callable

    def leaves(self):
        return tuple(t.clone().requires_grad_() for t in self.inputs)


def plain_sample(mu, logvar, num_samples=None):
    size = mu.shape if num_samples is None else (num_samples, *mu.shape)
    return reference.sample_gaussian(mu, logvar, num_samples, eps=torch.ops.aevb.normal(SEED, size))


def plain_log_ratio(mu, logvar, num_samples, gradient):
    size = mu.shape if num_samples is None else (num_samples, *mu.shape)
    eps = torch.ops.aevb.normal(SEED, size)
    return reference.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=gradient, eps=eps)


H, WEIGHT, BIAS = normal(6, 2, 6, 4), normal(7, 7, 4), normal(8, 7)
MU, LOGVAR, LOGITS, X = normal(1, 6, 5), 0.7 * normal(2, 6, 5), 3 * normal(3, 2, 6, 7), torch.rand(6, 7)
KL = normal(4, 6).square()
CASES = [
    Case("sample", (MU, LOGVAR), lambda m, v: aevb.sample_gaussian(m, v, seed=SEED), plain_sample),
    Case(
        "samples",
        (MU, LOGVAR),
        lambda m, v: aevb.sample_gaussian(m, v, 3, seed=SEED),
        lambda m, v: plain_sample(m, v, 3),
    ),
    *(
        Case(
            f"log_ratio_{gradient}",
            (MU, LOGVAR),
            lambda m, v, n=n, g=gradient: aevb.sample_gaussian_log_ratio(m, v, n, gradient=g, seed=SEED),
            lambda m, v, n=n, g=gradient: plain_log_ratio(m, v, n, g),
        )
        for gradient, n in (("total", None), ("path", 3), ("doubly_reparameterized", 3))
    ),
    Case(
        "kl_groups", (MU, LOGVAR), lambda m, v: aevb.gaussian_kl(m, v, 5), lambda m, v: reference.gaussian_kl(m, v, 5)
    ),
    Case(
        "linear",
        (H, WEIGHT, BIAS),
        lambda h, w, b: aevb.linear_bernoulli_log_prob(h, w, b, X),
        lambda h, w, b: reference.linear_bernoulli_log_prob(h, w, b, X),
    ),
    Case("kl", (MU, LOGVAR), aevb.gaussian_kl, reference.gaussian_kl),
    Case("log_prob", (LOGITS,), lambda a: aevb.bernoulli_log_prob(a, X), lambda a: reference.bernoulli_log_prob(a, X)),
    Case("log_prob_and_x", (LOGITS, X), aevb.bernoulli_log_prob, reference.bernoulli_log_prob),
    Case(
        "elbo",
        (LOGITS, MU, LOGVAR),
        lambda a, m, v: aevb.FusedELBO(beta=0.7)(a, X, m, v),
        lambda a, m, v: reference.FusedELBO(beta=0.7)(a, X, m, v),
    ),
    Case(
        "elbo_none_probs",
        (LOGITS.sigmoid(), MU, LOGVAR),
        lambda p, m, v: aevb.FusedELBO(reduction="none", from_probs=True)(p, X, m, v),
        lambda p, m, v: reference.FusedELBO(reduction="none", from_probs=True)(p, X, m, v),
    ),
    Case(
        "elbo_of_kl",
        (LOGITS, KL),
        lambda a, kl: aevb.FusedELBO(reduction="sum")(a, X, kl=kl),
        lambda a, kl: reference.FusedELBO(reduction="sum")(a, X, kl=kl),
    ),
    Case(
        "elbo_x_and_beta",
        (LOGITS, X, MU, LOGVAR, torch.tensor(0.3)),
        lambda a, x, m, v, b: aevb.FusedELBO(beta=b)(a, x, m, v),
        lambda a, x, m, v, b: reference.FusedELBO(beta=b)(a, x, m, v),
    ),
]
MEANS, LOGVARS = normal(9, 2, 6, 7), 0.7 * normal(10, 2, 6, 7)
CASES += [
    Case(
        "gaussian",
        (MEANS, LOGVARS),
        lambda m, v: aevb.gaussian_log_prob(m, X, v),
        lambda m, v: reference.gaussian_log_prob(m, X, v),
    ),
    Case(
        "gaussian_fixed",
        (MEANS,),
        lambda m: aevb.gaussian_log_prob(m, X, -0.7, sigmoid=True),
        lambda m: reference.gaussian_log_prob(m, X, -0.7, sigmoid=True),
    ),
    Case("gaussian_and_x", (MEANS, X, LOGVARS), aevb.gaussian_log_prob, reference.gaussian_log_prob),
    Case(
        "gaussian_shared",
        (MEANS, LOGVARS[0, 0]),
        lambda m, v: aevb.gaussian_log_prob(m, X, v, sigmoid=True),
        lambda m, v: reference.gaussian_log_prob(m, X, v, sigmoid=True),
    ),
    Case(
        "gaussian_one_logvar",
        (MEANS, torch.tensor(0.3)),
        lambda m, v: aevb.gaussian_log_prob(m, X, v),
        lambda m, v: reference.gaussian_log_prob(m, X, v),
    ),
    Case(
        "gaussian_elbo",
        (MEANS, MU, LOGVAR),
        lambda a, m, v: aevb.FusedELBO(likelihood="gaussian", variance=0.3)(a, X, m, v),
        lambda a, m, v: reference.FusedELBO(likelihood="gaussian", variance=0.3)(a, X, m, v),
    ),
    Case(
        "gaussian_elbo_of_kl",
        (MEANS, LOGVARS, KL),
        lambda m, v, kl: aevb.FusedELBO(0.7, "sum", likelihood="gaussian")(aevb.GaussianOutput(m, v), X, kl=kl),
        lambda m, v, kl: reference.FusedELBO(0.7, "sum", likelihood="gaussian")((m, v), X, kl=kl),
    ),
]
PRIOR, SHARED = (normal(11, 6, 5), 0.7 * normal(12, 6, 5)), (normal(13, 5), 0.7 * normal(14, 5))
WITH_PRIORS = {
    "prior": (PRIOR, {}),
    "prior_shared": (SHARED, {}),
    "prior_and_range": (SHARED, {"logvar_range": (-0.5, 0.6)}),
    "range": ((), {"logvar_range": (-0.5, 0.6)}),
}


def with_prior(function, **options):
    """A function of mu, logvar and the prior's tensors."""
    return lambda m, v, *prior: function(m, v, prior=prior or None, **options)


for name, (prior, limits) in WITH_PRIORS.items():
    given = (MU, LOGVAR, *prior)
    CASES.append(
        Case(f"kl_{name}", given, with_prior(aevb.gaussian_kl, **limits), with_prior(reference.gaussian_kl, **limits))
    )
    for n in (None, 3):
        noise = torch.ops.aevb.normal(SEED, (6, 5) if n is None else (n, 6, 5))
        options = {"num_samples": n, **limits}
        CASES.append(
            Case(
                f"sample_{name}_{n}",
                given,
                with_prior(aevb.sample_gaussian, seed=SEED, **options),
                with_prior(reference.sample_gaussian, eps=noise, **options),
            )
        )
    for gradient in ("total", "path", "doubly_reparameterized"):
        options = {"num_samples": 3, "gradient": gradient, **limits}
        CASES.append(
            Case(
                f"log_ratio_{name}_{gradient}",
                given,
                with_prior(aevb.sample_gaussian_log_ratio, seed=SEED, **options),
                with_prior(reference.sample_gaussian_log_ratio, eps=noise, **options),
            )
        )
COMPOSED = {"kl_groups", "gaussian_shared", "gaussian_one_logvar", "gaussian_elbo", "gaussian_elbo_of_kl"}  # of nodes
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
# Those that a person would put into a compiled or transformed graph.
graph_cases = pytest.mark.parametrize("case", [c for c in CASES if c.name != "elbo_x_and_beta"], ids=lambda c: c.name)


def scalar(function):
    """A scalar of the results with an upstream gradient that is nowhere 1 and differs from place to place."""

    def total(*inputs):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((o.float() * (1.5 + torch.arange(o.numel()).reshape(o.shape)).cos()).sum() for o in outputs)

    return total


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


# ---- eager autograd -------------------------------------------------------------------------------------------------


@each_case
def test_value_and_gradient(case):
    assert_close(case.fused(*case.inputs), case.plain(*case.inputs))
    a, b = case.leaves(), case.leaves()
    assert_close(torch.autograd.grad(scalar(case.fused)(*a), a), torch.autograd.grad(scalar(case.plain)(*b), b))


@each_case
def test_two_backward_passes(case):
    leaves = case.leaves()
    outputs = case.fused(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = case.plain(*leaves)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for scale in (0.5, -3.0):
        grads = [scale * normal(5, *o.shape) if o.dim() else torch.tensor(scale) for o in outputs]
        actual = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        assert_close(actual, torch.autograd.grad(expected, leaves, grads, retain_graph=True))


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in COMPOSED], ids=lambda c: c.name)
def test_one_node(case):
    """Nothing but the op stands between its inputs and its results, and no input was changed."""
    leaves = case.leaves()
    before = [t.detach().clone() for t in leaves]
    total = scalar(case.fused)(*leaves)
    first = case.fused(*leaves)
    node = (first[0] if isinstance(first, tuple) else first).grad_fn
    assert {type(n).__name__ for n, _ in node.next_functions if n is not None} == {"AccumulateGrad"}
    total.backward()
    assert all(torch.equal(t, b) for t, b in zip(leaves, before, strict=True))


def test_unused_result_costs_no_gradient():
    mu, logvar = MU.clone().requires_grad_(), LOGVAR.clone().requires_grad_()
    z, kl = aevb.sample_gaussian(mu, logvar, seed=SEED)
    (grad,) = torch.autograd.grad((2 * z).sum(), mu, retain_graph=True)
    assert torch.equal(grad, torch.full_like(mu, 2))
    (grad,) = torch.autograd.grad((3 * kl).sum(), mu)
    assert_close(grad, 3 * MU)


def test_inputs_that_need_no_gradient():
    logvar = LOGVAR.clone().requires_grad_()
    (grad,) = torch.autograd.grad((2 * aevb.gaussian_kl(MU, logvar)).sum(), logvar)
    assert_close(grad, LOGVAR.exp() - 1)
    assert not aevb.gaussian_kl(MU, LOGVAR).requires_grad
    with torch.no_grad():
        assert not aevb.gaussian_kl(MU, logvar).requires_grad


def test_one_input_computed_from_another():
    """Here logvar depends on mu, so that mu's own gradient must not be counted twice."""
    for order in (1, 2):
        grads = []
        for f in (lambda m, v: aevb.sample_gaussian(m, v, seed=SEED), plain_sample):
            mu = MU.clone().requires_grad_()
            total = scalar(f)(mu, mu.sin())
            for _ in range(order):
                (total,) = torch.autograd.grad(total, mu, create_graph=True)
                total = (total * total).sum()
            grads.append(total.detach())
        assert_close(grads[0], grads[1])


@each_case
def test_double_backward(case):
    results = []
    for f in (case.fused, case.plain):
        leaves = case.leaves()
        grads = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum((g * g).sum() for g in grads), leaves, allow_unused=True))
    assert_close([g for g in results[0] if g is not None], [g for g in results[1] if g is not None])


def test_gradcheck_of_the_gradient_in_double():
    mu, logvar = (t.double().requires_grad_() for t in (MU, LOGVAR))
    assert torch.autograd.gradgradcheck(reference.gaussian_kl, (mu, logvar))


@each_case
def test_batched_gradients(case):
    results = []
    for f in (case.fused, case.plain):
        leaves = case.leaves()
        outputs = f(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [normal(20 + i, 3, *o.shape) for i, o in enumerate(outputs)]
        results.append(torch.autograd.grad(outputs, leaves, grads, is_grads_batched=True))
    assert_close(*results)


def test_checkpoint_replays_the_noise():
    mu, logvar = MU.clone().requires_grad_(), LOGVAR.clone().requires_grad_()
    torch.manual_seed(7)
    z, _ = torch.utils.checkpoint.checkpoint(lambda m, v: aevb.sample_gaussian(m, v), mu, logvar, use_reentrant=False)
    noise = (z - mu).detach()
    assert_close(torch.autograd.grad((4 * z).sum(), logvar)[0], 2 * noise)


def test_forward_mode_says_that_it_is_not_supported():
    with torch.autograd.forward_ad.dual_level():
        mu = torch.autograd.forward_ad.make_dual(MU, torch.ones_like(MU))
        with pytest.raises(NotImplementedError, match=r"aevb.sample_gaussian does not support forward-mode"):
            aevb.sample_gaussian(mu, LOGVAR, seed=SEED)


# ---- torch.library --------------------------------------------------------------------------------------------------

OPCHECKS = [
    ("sample_gaussian", (MU, LOGVAR, SEED, None), (MU, KL)),
    ("sample_gaussian", (MU, LOGVAR, torch.arange(3), 3), (normal(6, 3, 6, 5), KL)),
    ("gaussian_kl", (MU, LOGVAR), (KL,)),
    ("gaussian_kl_with_prior", (MU, LOGVAR, *PRIOR, None, None), (KL, 15)),
    ("gaussian_kl_with_prior", (MU, LOGVAR, *SHARED, -0.5, 0.6), (KL, 9)),
    ("sample_gaussian_with_prior", (MU, LOGVAR, *SHARED, SEED, None, None, None), (MU, KL, 15)),
    ("sample_gaussian_with_prior", (MU, LOGVAR, None, None, SEED, 3, -0.5, 0.6), (normal(6, 3, 6, 5), None, 3)),
    (
        "sample_gaussian_log_ratio_with_prior",
        (MU, LOGVAR, *PRIOR, SEED, 3, 1, -0.5, 0.6),
        (normal(6, 3, 6, 5), normal(7, 3, 6), None, normal(8, 3, 6), 15),
    ),
    ("log_prob", (LOGITS, X, None, None, None, "bernoulli_logits", 0.0, None), (normal(7, 2, 6), 1)),
    ("log_prob", (LOGITS, (X > 0.5).byte(), None, None, None, "bernoulli_logits", 0.0, 1.0), (normal(7, 2, 6), 1)),
    ("log_prob", (MEANS, X, LOGVARS, None, None, "gaussian", 0.0, None), (normal(7, 2, 6), 3)),
    (
        "log_prob",
        (MEANS, X, LOGVARS[0, 0].expand(2, 6, 7), None, None, "gaussian_sigmoid", 0.0, None),
        (normal(7, 2, 6), 2),
    ),
    (
        "log_prob",
        (MEANS, (X > 0.5).byte(), None, None, None, "gaussian_sigmoid_fixed", -0.7, 1.0),
        (normal(7, 2, 6), 1),
    ),
    (
        "negative_elbo",
        (LOGITS, X, MU, LOGVAR, torch.tensor(0.5), 2.0, 1, "bernoulli_logits", None),
        (torch.tensor(0.3), 7),
    ),
    ("negative_elbo", (LOGITS, X, MU, LOGVAR, None, 2.0, 0, "bernoulli_logits", None), (KL, 6)),
    ("negative_elbo", (LOGITS, X, KL, None, None, 2.0, 2, "bernoulli_logits", None), (torch.tensor(0.3), 3)),
]


@pytest.mark.parametrize(("name", "args", "grads"), OPCHECKS, ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name, args, grads):
    ops = torch.ops.aevb
    torch.library.opcheck(getattr(ops, f"{name}_forward").default, args)
    torch.library.opcheck(getattr(ops, f"{name}_backward").default, (*args, *grads))
    if name == "negative_elbo":
        torch.library.opcheck(ops.negative_elbo_and_grad.default, args)
    if name == "log_prob":
        torch.library.opcheck(ops.log_prob_and_grad.default, (*args, 0.7, grads[1]))
    torch.library.opcheck(getattr(ops, name).default, args)
    trainable = tuple(
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and a.dim() and a is not X else a
        for a in args
    )
    torch.library.opcheck(getattr(ops, name).default, trainable)


def test_opcheck_of_noise_and_seeds():
    torch.library.opcheck(torch.ops.aevb.normal.default, (torch.arange(3), [3, 5]))
    torch.library.opcheck(torch.ops.aevb.mix_seed.default, (torch.arange(3), torch.arange(3)))


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


@graph_cases
def test_compile(case):
    leaves = case.leaves()
    compiled = torch.compile(scalar(case.fused), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*leaves), leaves)
    assert_close(grads, torch.autograd.grad(scalar(case.plain)(*leaves), leaves))


class Model(nn.Module):
    """A whole VAE and its loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = nn.Linear(8, 10), nn.Linear(5, 8)
        self.criterion = aevb.FusedELBO()

    def forward(self, x, seed=None):
        mu, logvar = self.encoder(x).chunk(2, -1)
        z, kl = aevb.sample_gaussian(mu, logvar, seed=seed)
        return self.criterion(self.decoder(z), x, kl=kl) + self.criterion(self.decoder(mu), x, mu, logvar)


def test_compile_model_backward_and_optimizer():
    eager, compiled = Model(), Model()
    step = torch.compile(compiled, fullgraph=True)
    x = torch.rand(16, 8, generator=torch.Generator().manual_seed(2))
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (eager, compiled)]
    for i in range(5):
        for model, optimizer in zip((eager, step), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x, torch.tensor(i))
            (0.5 * loss).backward()
            optimizer.step()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert_close(b, a)


def test_compile_draws_fresh_noise_and_follows_manual_seed():
    step = torch.compile(lambda m, v: aevb.sample_gaussian(m, v)[0], fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = step(MU, LOGVAR), step(MU, LOGVAR)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(first, step(MU, LOGVAR))
    torch.manual_seed(3)
    assert torch.equal(first, aevb.sample_gaussian(MU, LOGVAR)[0])


def test_compile_with_other_batch_sizes():
    step = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
    eager = Model()
    for batch in (4, 9, 33):
        x = torch.rand(batch, 8)
        assert_close(step(x, SEED), eager(x, SEED))


def test_warm_up_never_recompiles():
    beta = torch.tensor(0.0)
    criterion = aevb.FusedELBO(beta=beta)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.0, 0.25, 1.0):
            beta.fill_(value)
            assert_close(compiled(LOGITS, X, MU, LOGVAR), reference.FusedELBO(beta=value)(LOGITS, X, MU, LOGVAR))


def test_compile_of_transforms():
    case = CASES[0]
    compiled = torch.compile(torch.func.grad(scalar(case.fused), (0, 1)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*case.inputs), torch.func.grad(scalar(case.plain), (0, 1))(*case.inputs))
    mapped = torch.func.vmap(lambda m, v: aevb.sample_gaussian(m, v, seed=SEED))
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    assert_close(compiled(MU.view(3, 2, 5), LOGVAR.view(3, 2, 5)), mapped(MU.view(3, 2, 5), LOGVAR.view(3, 2, 5)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_train_what_was_exported(strict):
    model = Model()
    x = torch.rand(4, 8)
    program = torch.export.export(
        model, (x, SEED), dynamic_shapes=({0: torch.export.Dim("batch")}, None), strict=strict
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    x = torch.rand(7, 8)
    assert_close(exported(x, SEED), model(x, SEED))
    (0.5 * exported(x, SEED)).backward()
    (0.5 * model(x, SEED)).backward()
    assert_close(exported.encoder.weight.grad, model.encoder.weight.grad)
    before = exported(x, SEED).item()
    optimizer = torch.optim.SGD(exported.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        exported(x, SEED).backward()
        optimizer.step()
    assert exported(x, SEED).item() < before


# ---- torch.func -----------------------------------------------------------------------------------------------------


@graph_cases
def test_func_grad(case):
    positions = tuple(range(len(case.inputs)))
    grads = torch.func.grad(scalar(case.fused), positions)(*case.inputs)
    assert_close(grads, torch.func.grad(scalar(case.plain), positions)(*case.inputs))


def test_func_hessian():
    f, g = (scalar(lambda v, h=h: h(MU[0], v)) for h in (aevb.gaussian_kl, reference.gaussian_kl))
    assert_close(torch.func.hessian(f)(LOGVAR[0]), torch.func.hessian(g)(LOGVAR[0]))


def test_vmap_gives_each_slice_what_a_lone_call_gives():
    mus, logvars = MU.view(3, 2, 5), LOGVAR.view(3, 2, 5)
    seeds = torch.arange(3)
    z, kl = torch.func.vmap(lambda m, v, s: aevb.sample_gaussian(m, v, seed=s))(mus, logvars, seeds)
    for i in range(3):
        assert_close((z[i], kl[i]), aevb.sample_gaussian(mus[i], logvars[i], seed=seeds[i]))
    nested = torch.func.vmap(torch.func.vmap(lambda m, v: aevb.sample_gaussian(m, v, seed=SEED)))(mus, logvars)
    assert_close(nested[0][2, 1], aevb.sample_gaussian(mus[2, 1], logvars[2, 1], seed=SEED)[0])
    log_prob = torch.func.vmap(aevb.bernoulli_log_prob, in_dims=(1, 0))(LOGITS, X)
    assert_close(log_prob, aevb.bernoulli_log_prob(LOGITS, X).T)
    for v, dim in ((LOGVARS, 1), (LOGVARS[0], 0), (LOGVARS[0, 0], None)):
        log_prob = torch.func.vmap(aevb.gaussian_log_prob, in_dims=(1, 0, dim))(MEANS, X, v)
        assert_close(log_prob, aevb.gaussian_log_prob(MEANS, X, v).T)
    mixed = torch.func.vmap(aevb.mix_seed, in_dims=(None, 0))(SEED, seeds)
    assert torch.equal(mixed, aevb.mix_seed(SEED, seeds))


def test_vmap_randomness():
    zeros = torch.zeros(3, 2, 5)
    different, _ = torch.func.vmap(aevb.sample_gaussian, randomness="different")(zeros, zeros)
    assert not torch.equal(different[0], different[1])
    same, _ = torch.func.vmap(aevb.sample_gaussian, randomness="same")(zeros, zeros)
    assert torch.equal(same[0], same[1])


def test_per_sample_gradients():
    model = nn.Linear(4, 10)
    parameters = dict(model.named_parameters())
    x, target = normal(8, 6, 4), torch.rand(6, 5)

    def loss(sample, elbo, p, xi, ti):
        mu, logvar = torch.func.functional_call(model, p, xi).chunk(2, -1)
        z, kl = sample(mu, logvar)
        return elbo(z, ti, kl=kl)

    results = [
        torch.func.vmap(torch.func.grad(lambda p, a, b, f=f: loss(*f, p, a, b)), in_dims=(None, 0, 0))(
            parameters, x, target
        )
        for f in ((CASES[0].fused, aevb.FusedELBO()), (CASES[0].plain, reference.FusedELBO()))
    ]
    assert results[0]["weight"].shape == (6, 10, 4)
    assert_close(*results)


# ---- autocast, seeds, modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = Model(), torch.rand(32, 8)
    expected = model(x, SEED)
    with torch.autocast("cpu", dtype=dtype):
        mu, logvar = model.encoder(x).chunk(2, -1)
        assert mu.dtype == dtype
        z, kl = aevb.sample_gaussian(mu, logvar, seed=SEED)
        assert (z.dtype, kl.dtype) == (dtype, torch.float32)
        loss = model(x, SEED)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    (0.5 * loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_manual_seed_and_generator():
    torch.manual_seed(5)
    a = aevb.sample_gaussian(MU, LOGVAR)[0]
    b = aevb.sample_gaussian(MU, LOGVAR)[0]
    torch.manual_seed(5)
    assert torch.equal(a, aevb.sample_gaussian(MU, LOGVAR)[0])
    assert not torch.equal(a, b)
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(a, aevb.sample_gaussian(MU, LOGVAR, generator=generator)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_seed_may_be_an_int_or_a_tensor():
    a = aevb.sample_gaussian(MU, LOGVAR, seed=-7)[0]
    assert torch.equal(a, aevb.sample_gaussian(MU, LOGVAR, seed=torch.tensor(-7))[0])
    rows = torch.stack([aevb.sample_gaussian(MU[i], LOGVAR[i], seed=i)[0] for i in range(6)])
    assert torch.equal(rows, aevb.sample_gaussian(MU, LOGVAR, seed=torch.arange(6))[0])


@pytest.mark.parametrize("beta", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_copy_and_pickle(beta):
    criterion = aevb.FusedELBO(beta, "none", from_probs=False, x_scale=0.5)
    expected = criterion(LOGITS, X, MU, LOGVAR)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(LOGITS, X, MU, LOGVAR), expected)
        twin.beta = 3.0
        assert torch.equal(criterion(LOGITS, X, MU, LOGVAR), expected)
    assert not criterion.state_dict()
    assert "beta=" in repr(criterion)


def test_beta_may_change():
    criterion = aevb.FusedELBO()
    for beta in (0.25, torch.tensor(4.0), 2):
        criterion.beta = beta
        assert_close(criterion(LOGITS, X, MU, LOGVAR), reference.FusedELBO(beta=beta)(LOGITS, X, MU, LOGVAR))


def test_no_warnings_in_training():
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(4, 8)).backward()


def test_results_outlive_and_reuse_cached_memory():
    """Large results come from a cache of buffers: two that are alive never share one."""
    mu, logvar = torch.zeros(64, 4096), torch.zeros(64, 4096)
    a, _ = aevb.sample_gaussian(mu, logvar, seed=1)
    kept = a.clone()
    b, _ = aevb.sample_gaussian(mu, logvar, seed=2)
    assert a.data_ptr() != b.data_ptr()
    assert torch.equal(a, kept)
    del b
    for seed in range(3, 6):
        aevb.sample_gaussian(mu, logvar, seed=seed)
    assert torch.equal(a, kept)
    view = aevb.sample_gaussian(mu, logvar, seed=1)[0][1:3]
    aevb.sample_gaussian(mu, logvar, seed=9)
    assert torch.equal(view, kept[1:3])
    assert aevb._C.release_memory() >= 0


def test_cpu_without_vector_instructions_runs_the_reference(monkeypatch):
    ops = autograd
    monkeypatch.delenv("AEVB_ISA", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(ops._C, "cpu_isa", lambda: "plain")
    assert "lacks AVX2" in ops._without_kernels()["cpu"]
    monkeypatch.setenv("AEVB_ISA", "plain")
    assert "cpu" not in ops._without_kernels()
    monkeypatch.setattr(ops, "_reference_on", {"cpu": "this CPU is slow"})
    ops._say_why.cache_clear()
    with pytest.warns(UserWarning, match="this CPU is slow, so aevb computes with aevb.reference"):
        aevb.gaussian_kl(MU, LOGVAR)
    for case in CASES:
        assert_close(case.fused(*case.inputs), case.plain(*case.inputs))
    assert "gaussian_kl" not in aevb.gaussian_kl(MU.clone().requires_grad_(), LOGVAR).grad_fn.name()


def test_cuda_tensors_without_cuda_kernels_run_the_reference(monkeypatch):
    """Found out from the build; the ops then ask for no kernel."""
    ops = autograd
    monkeypatch.setattr(ops._C, "build_info", lambda: {"cuda": "not built (no nvcc found)"})
    assert ops._without_kernels()["cuda"] == "this installation's CUDA kernels are not built (no nvcc found)"
    monkeypatch.setattr(ops._C, "build_info", lambda: {"cuda": "built for sm_90 by nvcc 13.0"})
    assert "cuda" not in ops._without_kernels()
    monkeypatch.setattr(ops, "_reference_on", {"cuda": "there are no kernels"})
    ops._say_why.cache_clear()
    with FakeTensorMode():
        mu = torch.empty(3, 4, device="cuda")
        with pytest.warns(UserWarning, match="there are no kernels.* on cuda tensors"):
            kl = aevb.gaussian_kl(mu, mu)
    assert (kl.device.type, kl.shape) == ("cuda", (3,))
    asked = []
    for name in ("normal", "mix_seed"):
        monkeypatch.setattr(reference, name, lambda *args, name=name: asked.append(name) or torch.zeros(3, 4))
    there = types.SimpleNamespace(is_cuda=True)
    gaussian._sample_formula(MU[:3, :4], LOGVAR[:3, :4], there, None)
    monkeypatch.setattr(torch, "broadcast_tensors", lambda *_: (there, there))
    aevb.mix_seed(torch.tensor(1), torch.tensor(2))
    assert asked == ["normal", "mix_seed"]
