"""Every op on tensors that say they are on a GPU but have no memory: shapes, dtypes, devices and strides, and graphs.

No GPU is needed, nor a PyTorch that was built for one. Such a PyTorch has no autograd on CUDA, so the gradients are
asked of the backward ops by name.
"""

import re

import pytest
import torch
from kernel_cases import cases
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import aevb


@pytest.fixture(autouse=True)
def kernels_are_there(monkeypatch):
    """Also where this build has none, the ops are the kernels' own and not the reference."""
    monkeypatch.setattr(aevb.ops.autograd, "_reference_on", {})


@pytest.fixture
def fake():
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def some_cases():
    """Of every op: a call for each shape, dtype and rank of its arguments."""
    found = {}
    for case in cases():
        if case.op != "elementary":  # for the tests of its kernel alone, and without a fake
            found.setdefault((case.op, *(about(a) for a in case.args)), case)
    return list(found.values())


def about(argument):
    if not isinstance(argument, torch.Tensor):
        return str(argument)
    return argument.dtype, tuple(argument.shape), argument.is_contiguous()


def faked(argument, mode):
    """The argument on cuda:0, with its shape and strides and without its numbers."""
    if not isinstance(argument, torch.Tensor):
        return argument
    with mode:
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")


def test_every_op_has_the_results_of_the_cpu():
    """Of the same shapes, dtypes and strides, on cuda:0, forward and backward."""
    mode, chosen = FakeTensorMode(), some_cases()
    wrong = []
    for case in chosen:
        op = getattr(torch.ops.aevb, case.op).default
        with mode:
            found = as_tuple(op(*(faked(a, mode) for a in case.args)))
        for f, e in zip(found, as_tuple(op(*case.args)), strict=True):
            same = (f.shape, f.dtype, f.stride(), f.storage_offset()) == (e.shape, e.dtype, e.stride(), 0)
            if not (isinstance(f, FakeTensor) and f.device == torch.device("cuda", 0) and same):
                wrong.append(str(case))
    assert wrong == []
    assert {case.op for case in chosen} == {case.op for case in cases()} - {"elementary"}


def test_the_public_functions(fake):
    mu, recon = (torch.empty(3, size, dtype=torch.bfloat16, device="cuda") for size in (5, 7))
    seeds = torch.empty(3, dtype=torch.int64, device="cuda")
    for options in ({}, {"seed": seeds}, {"seed": 4}, {"num_samples": 2}):
        z, kl = aevb.sample_gaussian(mu, mu, **options)
        assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
        assert z.shape == ((2, 3, 5) if "num_samples" in options else (3, 5))
        assert {z.device, kl.device} == {mu.device}
        z, log_ratio = aevb.sample_gaussian_log_ratio(mu, mu, gradient="path", **options)
        assert (z.dtype, log_ratio.dtype) == (torch.bfloat16, torch.float32)
        assert log_ratio.shape == z.shape[:-1]
        assert {z.device, log_ratio.device} == {mu.device}
    x = torch.empty(3, 7, dtype=torch.uint8, device="cuda")
    beta = torch.empty((), device="cuda")
    for loss in (
        aevb.FusedELBO(beta, x_scale=1 / 255)(recon, x, mu, mu),
        aevb.FusedELBO(reduction="sum", x_scale=1 / 255)(recon, x, kl=kl),
    ):
        assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, mu.device)
    log_prob = aevb.bernoulli_log_prob(recon.expand(2, 3, 7), x, 1 / 255)
    assert (log_prob.shape, log_prob.device) == ((2, 3), mu.device)
    for logvar in (
        recon,
        torch.empty(7, device="cuda"),
        0.3,
    ):  # of () torch itself makes (7,), for which it has no fake
        log_prob = aevb.gaussian_log_prob(recon.expand(2, 3, 7), x, logvar, 1 / 255)
        assert (log_prob.shape, log_prob.dtype, log_prob.device) == ((2, 3), torch.float32, mu.device)
        output = aevb.GaussianOutput(recon, logvar)
        loss = aevb.FusedELBO(beta, likelihood="gaussian", x_scale=1 / 255)(output, x, kl=kl)
        assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, mu.device)
    mixed = aevb.mix_seed(3, seeds)
    assert (mixed.shape, mixed.dtype, mixed.device) == ((3,), torch.int64, mu.device)


class Model(torch.nn.Module):
    """A VAE and its loss, its weights fake and frozen."""

    def __init__(self, seed):
        super().__init__()
        sizes = {"encoder": (40, 784), "decoder": (784, 20)}
        for name, size in sizes.items():
            weight = torch.empty(size, device="cuda")
            self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        self.seed = seed
        self.criterion = aevb.FusedELBO()

    def forward(self, x):
        z, kl = aevb.sample_gaussian(*torch.nn.functional.linear(x, self.encoder).chunk(2, -1), seed=self.seed)
        return self.criterion(torch.nn.functional.linear(z, self.decoder), x, kl=kl)


def targets_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def assert_all_on_cuda(graph):
    for node in graph.nodes:
        for value in as_tuple(node.meta.get("val")):
            assert not isinstance(value, torch.Tensor) or value.device.type == "cuda", f"{node} is on {value.device}"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", [None, 3], ids=["drawn", "constant"])
def test_export(seed, strict, fake):
    """One node for each op, all of it on the GPU, with any number of datapoints."""
    model, x = Model(seed), torch.empty(16, 784, device="cuda")
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = targets_of(program.graph)
    assert [t for t in targets if "aevb" in t] == ["aevb.sample_gaussian.default", "aevb.negative_elbo.default"]
    assert any("randint" in t for t in targets) == (seed is None)
    assert_all_on_cuda(program.graph)
    (loss,) = (node.meta["val"] for node in program.graph.output_node().all_input_nodes)
    assert (loss.shape, loss.dtype) == ((), torch.float32)


@pytest.mark.parametrize("seed", [None, 3], ids=["drawn", "constant"])
def test_make_fx(seed, fake):
    model, x = Model(seed), torch.empty(16, 784, device="cuda")
    graph = make_fx(lambda x: model(x))(x).graph
    ours = [t for t in targets_of(graph) if "aevb" in t]
    assert ours == ["aevb.sample_gaussian_forward.default", "aevb.negative_elbo_forward.default"]
    assert_all_on_cuda(graph)


def test_any_sizes():
    """Symbolic shapes go through the ops, forward and backward."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad():
        plain = torch.ones(6, 5), torch.ones(6, 5), torch.tensor(3), torch.ones(2, 6, 5), torch.ones(6)
        mu, logvar, seed, gz, gkl = (mode.from_tensor(t) for t in plain)
        assert re.search(r"s\d", str(mu.shape))
        with mode:
            z, kl = torch.ops.aevb.sample_gaussian_forward(mu, logvar, seed, 2)
            grads = torch.ops.aevb.sample_gaussian_backward(mu, logvar, seed, 2, gz, gkl)
            _, log_ratio = torch.ops.aevb.sample_gaussian_log_ratio_forward(mu, logvar, seed, 2, 0)
            more = torch.ops.aevb.sample_gaussian_log_ratio_backward(mu, logvar, seed, 2, 2, gz, log_ratio, log_ratio)
    assert z.shape == (2, *mu.shape)
    assert kl.shape == mu.shape[:-1]
    assert log_ratio.shape == z.shape[:-1]
    assert all(g.shape == mu.shape for g in (*grads, *more))
