"""The CUDA kernels on a GPU: the CPU's bits, and what PyTorch expects of CUDA ops. `pytest -m cuda` runs it.

The CPU's results are proven elsewhere, so that here bits suffice. In a dry run (see conftest.py) those that need CUDA's
run-time are left out. With AEVB_NEED_CUDA=1 tests fail where they would be skipped for want of a GPU.
"""

import functools
import gc
import itertools
import os
import re

import cuda_small_case
import pytest
import test_contract
import test_elementary
import test_shapes
import torch
import torch.nn.functional as F
from conftest import DRY, DTYPES, HALF_DTYPES, HAS_CUDA, rand, randn, same_bits
from conftest import GPU as DEVICE
from kernel_cases import cases, gradients_over, reduced_losses
from torch import nn

import aevb
from aevb import reference

NEEDED = os.environ.get("AEVB_NEED_CUDA", "0") not in ("", "0")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (HAS_CUDA or DRY or NEEDED), reason="needs an NVIDIA GPU and aevb's CUDA kernels"),
]
runtime = pytest.mark.skipif(DRY, reason="a dry run: needs CUDA's run-time")

# What is differentiated, by name: functions of tensors; `test_shapes.arguments` makes the tensors.
OPS = {
    **test_shapes.OPS,
    "sample_seeds": lambda mu, logvar: aevb.sample_gaussian(mu, logvar, seed=seeds_on(mu.device)[: len(mu)]),
    # A KL that has the same bits everywhere.
    "elbo_of_kl": lambda recon, x, mu, _: aevb.FusedELBO(reduction="sum")(recon, x, kl=mu[..., 0].float().abs()),
}
NEEDS = {**test_shapes.NEEDS, "sample_seeds": (True, True), "elbo_of_kl": (True, False, True, False)}


@functools.cache
def seeds_on(device):
    return (torch.arange(100) << 31).to(device)


@pytest.fixture(autouse=True)
def errors_belong_to_their_test():
    """What a kernel did wrong is reported by a later call: by this one at the latest."""
    yield
    if not DRY:
        torch.cuda.synchronize()


def arguments(op, *size, dtype=torch.float32, device=DEVICE):
    like = {"sample_seeds": "sample", "elbo_of_kl": "elbo"}.get(op, op)
    return test_shapes.arguments(like, *size, dtype=dtype, device=device)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def leaves_of(op, tensors):
    return [t.detach().requires_grad_() if need else t.detach() for t, need in zip(tensors, NEEDS[op], strict=True)]


def upstream_of(op, tensors):
    return [(2.5 * randn(40 + i, *o.shape)).to(o.dtype).to(o.device) for i, o in enumerate(as_tuple(OPS[op](*tensors)))]


def run(op, tensors, upstream=None):
    """The results of an op, and its gradients."""
    upstream = upstream_of(op, tensors) if upstream is None else upstream
    leaves = leaves_of(op, tensors)
    outputs = as_tuple(OPS[op](*leaves))
    return *(o.detach() for o in outputs), *torch.autograd.grad(
        outputs, [t for t in leaves if t.requires_grad], upstream
    )


def on_cpu(tensors):
    return [t.cpu() for t in tensors]


def assert_same(actual, expected):
    """The same bits, wherever they are."""
    pairs = list(zip(on_cpu(actual), on_cpu(expected), strict=True))
    assert [same_bits(a, e) for a, e in pairs] == [True] * len(pairs)


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(on_cpu(actual), on_cpu(expected), rtol=rtol, atol=atol)


def assert_cpu_bits(op, tensors):
    """That `op` gives the CPU's bits for these CPU tensors."""
    upstream = upstream_of(op, tensors)
    expected = run(op, tensors, upstream)
    assert_same(run(op, [t.to(DEVICE) for t in tensors], [g.to(DEVICE) for g in upstream]), expected)


def poison():
    """Fills free memory with NaN, so that a result that was not written all over is seen."""
    if DRY:
        return
    kept = [torch.full((2**k,), float("nan"), device=DEVICE) for k in range(4, 25)]
    del kept


each_op = pytest.mark.parametrize("op", OPS)


# ---- the CPU's bits -------------------------------------------------------------------------------------------------


PARTS = 16  # of the cases, for several processes


@pytest.mark.parametrize("part", range(PARTS))
def test_same_bits_as_the_cpu(part):
    """Of every op by name, forward and backward: dtypes, shapes, seeds, samples, targets, layouts, edge values."""
    wrong = []
    for case in itertools.islice(cases(), part, None, PARTS * (20 if DRY else 1)):
        poison()
        if cuda_small_case.differs(case, DEVICE):
            wrong.append(str(case))
    assert wrong == []


def test_the_cases_are_of_every_op():
    called = {case.op.removesuffix("_forward").removesuffix("_backward") for case in cases()}
    schemas = {s.name.removeprefix("aevb::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aevb::")}
    # One gives memory with anything in it, one is made of matrix products, and one is another op over its argument.
    without_bits = {"empty", "linear_log_prob", "log_prob_and_grad_"}
    without_bits |= {"negative_elbo_backward_"}  # below
    # A layer's, of a CPU or with tests of their own.
    without_bits |= {"bias_activation_", "activation", "activation_backward_", "sparse_linear"}
    without_bits |= {"sparse_linear_weight_grad", "density", "split_bfloat16", "add_pieces", "elbo_terms", "adam_"}
    assert called == {name.removesuffix("_forward").removesuffix("_backward") for name in schemas} - without_bits


def test_over_the_gradient_for_1_goes_that_of_another():
    wrong = []
    for case in reduced_losses():
        expected = getattr(torch.ops.aevb, case.op).default(*case.args)
        if not all(map(same_bits, on_cpu(gradients_over(case.on(DEVICE))), expected)):
            wrong.append(str(case))
    assert wrong == []


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_again_of_a_graph_that_is_kept(op, dtype):
    """Whatever flows back, and whatever somebody did to those given before."""
    leaves = leaves_of(op, arguments(op, 33, 784, dtype=dtype))
    outputs, wanted = as_tuple(OPS[op](*leaves)), [t for t in leaves if t.requires_grad]
    for factor, keep in ((1.0, True), (-0.3, True), (1.0, True), (0.7, False)):
        upstream = [factor * torch.ones_like(o) for o in outputs]
        found = torch.autograd.grad(outputs, wanted, upstream, retain_graph=keep)
        assert_same(found, run(op, arguments(op, 33, 784, dtype=dtype), upstream)[len(outputs) :])
        for gradient in found:
            gradient.fill_(7)


def test_the_small_case():
    """What tools/gpu_check.sh runs under compute-sanitizer: every op, and right without it too."""
    assert cuda_small_case.main(DEVICE, 40) == 0
    for every in (11, 40):
        assert {case.op for case in cuda_small_case.some(every)} == {case.op for case in cases()}


WIDTHS = (1, 2, 3, 4, 5, 31, 32, 33, 511, 512, 513, 784, 1271, 32_767, 32_768, 32_769, 65_537, 1_000_003)[
    :: 5 if DRY else 1
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["sample", "log_ratio", "kl", "log_prob_uint8", "elbo"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_length(op, width, dtype):
    for rows in sorted({1, 2, min(1000, 200_000 // width) or 1}):
        poison()
        assert_cpu_bits(op, arguments(op, rows, width, dtype=dtype, device="cpu"))


@pytest.mark.parametrize(
    ("op", "rows", "width"),
    [("kl", 2_000_003, 1), ("sample", 300_007, 3), ("log_ratio", 300_007, 3), ("log_prob", 300_007, 5)],
)
def test_many_rows(op, rows, width):
    assert_cpu_bits(op, arguments(op, rows, width, device="cpu"))


def test_a_row_of_millions():
    for op in ("sample", "log_ratio", "log_prob"):
        assert_cpu_bits(op, arguments(op, 1, 5_000_011, device="cpu"))


@pytest.mark.parametrize("op", [aevb.sample_gaussian, aevb.sample_gaussian_log_ratio])
@pytest.mark.parametrize("size", [(1, 20), (100, 50)])
def test_thousands_of_samples(size, op):
    """Shared between blocks, and of few datapoints between the threads of a block."""
    found = []
    for device in (DEVICE, "cpu"):
        mu, logvar = (t.to(device).requires_grad_() for t in (randn(1, *size), randn(2, *size)))
        poison()
        outputs = op(mu, logvar, 3000, seed=5)
        upstream = [randn(3 + i, *o.shape).to(device) for i, o in enumerate(outputs)]
        found.append([*(o.detach() for o in outputs), *torch.autograd.grad(outputs, (mu, logvar), upstream)])
    assert_same(*found)


@each_op
@pytest.mark.parametrize("size", [(0, 5), (4, 0), (0, 0)])
def test_nothing(op, size):
    assert_cpu_bits(op, arguments(op, *size, device="cpu"))


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_at_any_offset(op, dtype):
    for width in (1, 5, 41, 401, 784):
        expected = run(op, arguments(op, 3, width, dtype=dtype, device="cpu"))
        upstream = upstream_of(op, arguments(op, 3, width, dtype=dtype))
        for offset in range(17):
            at = lambda t, i, first=offset: test_shapes.view_at(t, (first + 7 * i) % 17)  # noqa: E731
            views, buffers = zip(*(at(t, i) for i, t in enumerate(arguments(op, 3, width, dtype=dtype))), strict=True)
            before = [b.clone() for b in buffers]
            grads = [at(g, i + 5)[0] for i, g in enumerate(upstream)]
            assert_same(run(op, views, grads), expected)
            assert_same(buffers, before)  # nothing is written to a caller's memory


@pytest.mark.parametrize("op", test_shapes.OPS)
@pytest.mark.parametrize("stride", test_shapes.STRIDES)
def test_strides(stride, op):
    for dtype in DTYPES:
        tensors = arguments(op, 4, 3, 40, dtype=dtype, device="cpu")
        expected = run(op, [test_shapes.STRIDES[stride](t) for t in tensors])
        assert_same(run(op, [test_shapes.STRIDES[stride](t.to(DEVICE)) for t in tensors]), expected)


@pytest.mark.parametrize("op", [aevb.sample_gaussian, aevb.sample_gaussian_log_ratio])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_seeds_of_every_prefix(num_samples, op):
    """z is (3, 4, 5, 7): blocks of seeds that begin anywhere in a group of four normals."""
    size = (4, 5, 7) if num_samples else (3, 4, 5, 7)
    mu, logvar, gz = randn(1, *size), randn(2, *size), randn(3, 3, 4, 5, 7)

    def found(seed, device):
        m, v = (t.to(device).requires_grad_() for t in (mu, logvar))
        outputs = op(m, v, num_samples, seed=seed)
        grads = torch.autograd.grad(outputs, (m, v), (gz.to(device), randn(4, *outputs[1].shape).to(device)))
        return [o.detach() for o in (*outputs, *grads)]

    all_seeds = aevb.mix_seed(9, torch.arange(60)).view(3, 4, 5)
    seeds = [all_seeds[0, 0, 0], all_seeds[:, 0, 0], all_seeds[..., 0], all_seeds, all_seeds[:1].expand(3, 4, 5)]
    for seed in seeds:
        assert_same(found(seed.to(DEVICE), DEVICE), found(seed, "cpu"))
    transposed = all_seeds.permute(2, 1, 0).contiguous().to(DEVICE).permute(2, 1, 0)
    assert_same(found(transposed, DEVICE), found(all_seeds, "cpu"))
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert_same(found(seed, DEVICE), found(seed, "cpu"))


@pytest.mark.parametrize("from_probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_of_every_dtype(dtype, from_probs):
    soft = rand(1, 6, 41)
    targets = [(soft.to(t), scale) for t in DTYPES for scale in (None, 0.5)]
    targets += [(soft < 0.3, None), ((soft < 0.3).byte(), 1.0), ((256 * soft).byte(), 1 / 255)]
    output = (rand(2, 3, 6, 41) if from_probs else 3 * randn(2, 3, 6, 41)).to(dtype)
    for x, x_scale in targets:
        for reduction in ("none", "mean", "sum"):
            criterion, found = aevb.FusedELBO(0.7, reduction, from_probs, x_scale), []
            for device in (DEVICE, "cpu"):
                leaves = [t.to(device).requires_grad_() for t in (output, rand(3, 6))]
                loss = criterion(leaves[0], x.to(device), kl=leaves[1])
                found.append([loss.detach(), *torch.autograd.grad(loss, leaves, randn(4, *loss.shape).to(device))])
            assert_same(*found)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_number_of_half_precision(dtype):
    """All 65,536 of them, in rows of one: infinities, NaNs and subnormals."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(-1)
    other, soft = randn(1, 2**16, 1).to(dtype), rand(2, 2**16, 1).to(dtype)
    for op, *tensors in (
        ("sample", every, other),
        ("sample", other, every),
        ("log_ratio", every, other),
        ("log_ratio", other, every),
        ("log_prob", every, soft),
        ("log_prob", other, every),
    ):
        assert_cpu_bits(op, tensors)


def test_the_same_bits_again_and_again():
    """A result that moves is a race."""
    for op in OPS:
        tensors = arguments(op, 100, 1271)
        upstream = upstream_of(op, tensors)
        first = run(op, tensors, upstream)
        for _ in range(30):
            assert_same(run(op, tensors, upstream), first)


# ---- elementary functions -------------------------------------------------------------------------------------------


def bits(x):
    return x.view(torch.int32)


@pytest.mark.parametrize("name", ["rcp", "sqrt"])
def test_correctly_rounded_everywhere_in_range(name):
    """Every float from 2^-60 to 2^60. Rounding the float64 result once more changes nothing: 53 > 2 * 24 + 1 bits."""
    exact = {"rcp": torch.reciprocal, "sqrt": torch.sqrt}[name]
    first, last = (bits(torch.tensor(2.0**e)).item() for e in (-60, 60))
    step = 2**26
    chunks = range(first, last + 1, step)
    for start in chunks[:1] if DRY else chunks:
        x = torch.arange(start, min(start + step, last + 1), dtype=torch.int32, device=DEVICE).view(torch.float32)
        assert torch.equal(bits(torch.ops.aevb.elementary(name, x)), bits(exact(x.double()).float()))


@pytest.mark.parametrize("name", [*test_elementary.FUNCTIONS, "bfloat16", "float16"])
def test_elementary_functions(name):
    defined = test_elementary.FUNCTIONS.get(name, (None, test_elementary.everywhere))[1]
    stride = torch.arange(-(2**31), 2**31, 10_007 if DRY else 101).to(torch.int32).view(torch.float32)
    x = torch.cat([stride, torch.from_numpy(test_elementary.EDGES)])
    x = x[torch.from_numpy(defined(x.numpy()))]
    assert len(x) > 1000
    assert_same([torch.ops.aevb.elementary(name, x.to(DEVICE))], [torch.ops.aevb.elementary(name, x)])


# ---- more than 2^31 elements ----------------------------------------------------------------------------------------


def large(gib):
    """Marks a test that takes so much memory on the GPU, and on the host."""

    def mark(test):
        here = HAS_CUDA and not DRY
        enough = here and min(torch.cuda.mem_get_info()[0] / 2**30, test_shapes.available_gib()) >= gib
        test = pytest.mark.skipif(not enough, reason=f"needs {gib} GiB of free memory on the GPU and on the host")(test)
        return test_shapes.slow(runtime(test))

    return mark


def assert_same_in_pieces(actual, expected, piece=2**28):
    """Bits of large tensors, compared on the GPU."""
    actual, expected = actual.flatten(), expected.flatten()
    assert actual.numel() == expected.numel()
    for first in range(0, actual.numel(), piece):
        assert same_bits(actual[first : first + piece], expected[first : first + piece].to(DEVICE))


@large(14)
def test_more_than_2_31_normals():
    n = 2**31 + 130
    seed = torch.tensor(11)
    assert_same_in_pieces(torch.ops.aevb.normal(seed.to(DEVICE), [n]), torch.ops.aevb.normal(seed, [n]))


@large(24)
@pytest.mark.parametrize("size", [(1, 2**31 + 129), (2_200_007, 977)])
def test_more_than_2_31_logits(size):
    logits = torch.randn(size, dtype=torch.bfloat16, device=DEVICE)
    x = torch.rand(size, dtype=torch.bfloat16, device=DEVICE) < 0.3
    upstream = randn(1, size[0])
    options = None, None, None, "bernoulli_logits", 0.0, None
    arguments = logits, x, *options
    ops, on_host = torch.ops.aevb, (logits.cpu(), x.cpu(), *options)
    assert_same([ops.log_prob_forward(*arguments)], [ops.log_prob_forward(*on_host)])
    grad, _ = ops.log_prob_backward(*arguments, upstream.to(DEVICE), 1)
    assert_same_in_pieces(grad, ops.log_prob_backward(*on_host, upstream, 1)[0])


@large(34)
@pytest.mark.parametrize(
    ("op", "options", "grads"), [("sample_gaussian", (None,), ()), ("sample_gaussian_log_ratio", (None, 2), (None,))]
)
def test_more_than_2_31_latents(op, options, grads):
    size = 2_200_007, 977
    mu, logvar, gz = (torch.randn(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    seeds, g = aevb.mix_seed(3, torch.arange(size[0])), randn(1, size[0])
    on_host = [t.cpu() for t in (mu, logvar, gz)]
    forward, backward = (getattr(torch.ops.aevb, f"{op}_{direction}").default for direction in ("forward", "backward"))
    z, row = forward(mu, logvar, seeds.to(DEVICE), *options)
    host_z, host_row = forward(*on_host[:2], seeds, *options)
    assert_same([row], [host_row])
    assert_same_in_pieces(z, host_z)
    del z, host_z
    grads_here = backward(mu, logvar, seeds.to(DEVICE), *options, gz, g.to(DEVICE), *grads)
    host_grads = backward(*on_host[:2], seeds, *options, on_host[2], g, *grads)
    for grad, host_grad in zip(grads_here, host_grads, strict=True):
        assert_same_in_pieces(grad, host_grad)


# ---- streams and devices --------------------------------------------------------------------------------------------

A_LONG_SLEEP = 400_000_000  # cycles of the GPU: a fifth of a second or more


def assert_returns_while_the_gpu_sleeps(work):
    """On a busy machine the host may be slow: once of three times is enough, where waiting would show each time."""
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(A_LONG_SLEEP)
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not torch.cuda.current_stream().query():
            torch.cuda.synchronize()
            return
    raise AssertionError("the calls waited for the GPU")


@pytest.fixture
def no_synchronisation():
    """PyTorch raises an error where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@runtime
def test_the_fixture_sees_a_synchronisation(no_synchronisation):
    one = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@runtime
@each_op
def test_no_host_synchronisation(op):
    """Neither by PyTorch, which would raise, nor by the kernels' launchers: the calls return while the GPU sleeps."""
    tensors = arguments(op, 33, 784)
    upstream = upstream_of(op, tensors)
    run(op, tensors, upstream)  # loads the kernels and fills PyTorch's cache of memory
    assert_returns_while_the_gpu_sleeps(lambda: run(op, tensors, upstream))


@runtime
def test_no_host_synchronisation_with_seeds_and_beta(no_synchronisation):
    """A seed drawn inside, seeds on the device, a generator, and a beta that is a tensor."""
    mu, logvar = (torch.zeros(8, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    recon, x = torch.zeros(8, 7, device=DEVICE, requires_grad=True), torch.zeros(8, 7, device=DEVICE)
    beta = torch.full((), 0.5, device=DEVICE)
    criterion = aevb.FusedELBO(beta=beta)
    seeds = aevb.mix_seed(1, torch.arange(8, device=DEVICE))
    for options in ({}, {"seed": seeds}, {"seed": 5}, {"generator": torch.Generator(DEVICE)}):
        z, kl = aevb.sample_gaussian(mu, logvar, **options)
        beta.mul_(0.5)
        loss = criterion(recon, x, kl=kl) + z.sum() + criterion(recon, x, mu, logvar)
        loss.backward()


@runtime
@each_op
def test_the_current_stream(op):
    """The inputs come late, on a side stream: right results were computed on that stream."""
    tensors = arguments(op, 64, 784)
    upstream = upstream_of(op, tensors)
    expected = run(op, tensors, upstream)
    late = [torch.full_like(t, float("nan") if t.is_floating_point() else 1) for t in (*tensors, *upstream)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_LONG_SLEEP)
        for to, t in zip(late, (*tensors, *upstream), strict=True):
            to.copy_(t)
        found = run(op, late[: len(tensors)], late[len(tensors) :])
    torch.cuda.synchronize()
    assert_same(found, expected)


@runtime
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_op
def test_the_current_device(op):
    """Tensors on the second GPU, while the first is the current one."""
    found = run(op, arguments(op, 33, 784, device="cuda:1"))
    assert {t.device for t in found} == {torch.device("cuda", 1)}
    assert torch.cuda.current_device() == 0
    assert_same(found, run(op, arguments(op, 33, 784, device="cpu")))


@runtime
@pytest.mark.parametrize("op", test_shapes.OPS)
def test_mixed_devices_get_a_sentence(op):
    tensors = arguments(op, 3, 5)
    for on_host in list(itertools.product([False, True], repeat=len(tensors)))[1:-1]:
        mixed = [t.cpu() if host else t for t, host in zip(tensors, on_host, strict=True)]
        with pytest.raises(RuntimeError, match="move them to the same device") as info:
            OPS[op](*mixed)
        assert re.search(r"is on cpu\b.* is on cuda:0|is on cuda:0.* is on cpu\b", str(info.value))


@runtime
def test_seeds_beta_and_generators_of_another_device_get_a_sentence():
    mu, recon = torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 7, device=DEVICE)
    with pytest.raises(RuntimeError, match="seed is on cpu"):
        aevb.sample_gaussian(mu, mu, seed=torch.tensor(1))
    with pytest.raises(RuntimeError, match="beta is on cpu"):
        aevb.FusedELBO(beta=torch.tensor(1.0))(recon, recon, mu, mu)
    with pytest.raises(RuntimeError, match="kl is on cpu"):
        aevb.FusedELBO()(recon, recon, kl=torch.zeros(3))
    with pytest.raises(ValueError, match="generator is on cpu but the tensors are on cuda:0"):
        aevb.sample_gaussian(mu, mu, generator=torch.Generator())
    moved = aevb.FusedELBO(beta=torch.tensor(1.0)).to(DEVICE)
    assert moved(recon, recon, mu, mu).isfinite()


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_manual_seed_and_generator():
    mu = torch.zeros(100, 20, device=DEVICE)
    torch.manual_seed(5)
    first, second = (aevb.sample_gaussian(mu, mu)[0] for _ in range(2))
    torch.manual_seed(5)
    again = aevb.sample_gaussian(mu, mu)[0]
    generated = aevb.sample_gaussian(mu, mu, generator=torch.Generator(DEVICE).manual_seed(5))[0]
    assert same_bits(again, first)
    assert same_bits(generated, first)
    assert not same_bits(first, second)


def test_checkpoint_replays_the_noise():
    mu, logvar = (t.requires_grad_() for t in arguments("sample", 6, 5))
    z, _ = torch.utils.checkpoint.checkpoint(lambda m, v: aevb.sample_gaussian(m, v), mu, logvar, use_reentrant=False)
    assert_close([torch.autograd.grad((4 * z).sum(), logvar)[0]], [2 * (z - mu).detach()])


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------

WARM_UP = 3


def captured(work, *, generators=()):
    """A CUDA graph of `work`, and its results, after WARM_UP runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


class Step:
    """A training step of a 784-500-20 VAE, whole: forward, backward, Adam. Its noise has a seed for each step, or is
    drawn."""

    def __init__(self, *, draw_seeds):
        self.model = aevb.VAE(784, 500, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True, capturable=not DRY)
        self.criterion = aevb.FusedELBO()
        self.x = (rand(2, 100, 784) < 0.1).float().to(DEVICE)
        self.seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.draw_seeds = draw_seeds

    def __call__(self):
        self.optimizer.zero_grad()
        mu, logvar = self.model.encode(self.x)
        z, kl = aevb.sample_gaussian(mu, logvar, seed=None if self.draw_seeds else self.seed)
        loss = self.criterion(self.model.decode(z), self.x, kl=kl)
        loss.backward()
        self.optimizer.step()
        self.seed += 1  # after the backward pass, which draws the noise again
        return loss.detach(), z.detach()


def test_a_training_step_learns():
    """The step of the tests below, without a graph."""
    step = Step(draw_seeds=True)
    losses = [step()[0].item() for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


@runtime
def test_a_captured_training_step_is_an_eager_one():
    eager, step = Step(draw_seeds=False), Step(draw_seeds=False)
    graph, (loss, _) = captured(step)
    expected = [eager()[0].item() for _ in range(WARM_UP + 20)][WARM_UP:]
    found = []
    for _ in range(20):
        graph.replay()
        found.append(loss.item())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert step.seed.item() == eager.seed.item() == WARM_UP + 20
    for a, b in zip(step.model.parameters(), eager.model.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_a_run_from_the_command_to_its_pictures(tmp_path):
    config = aevb.TrainConfig(out=str(tmp_path / "run"), epochs=2, device=DEVICE, progress=False, hidden_dims=(50,))
    trainer = aevb.Trainer(config)
    before = trainer.evaluate().elbo
    assert trainer.fit()["test_elbo"] > before + 5
    assert (tmp_path / "run" / "latent.png").stat().st_size > 0
    loaded = aevb.Trainer.load(tmp_path / "run", device="cpu")
    assert loaded.evaluate().elbo == pytest.approx(trainer.evaluate().elbo, rel=1e-4)
    trainer.optimizer.param_groups[0]["lr"] = 0.0  # a captured step has it in it
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_epoch()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))


@runtime
def test_replays_of_a_training_step_draw_fresh_noise():
    step = Step(draw_seeds=True)
    graph, (loss, z) = captured(step)
    losses, samples = [], []
    for _ in range(50):
        graph.replay()
        losses.append(loss.item())
        samples.append(z.clone())
    for i in range(10):
        for j in range(i):
            assert not torch.equal(samples[i], samples[j])
    assert losses[-1] < 0.9 * losses[0]
    assert all(sample.isfinite().all() for sample in samples)


@runtime
def test_manual_seed_governs_the_noise_of_replays():
    """Replays draw what eager calls draw from the same seed."""
    mu, logvar = arguments("sample", 100, 20)
    graph, z = captured(lambda: aevb.sample_gaussian(mu, logvar)[0])
    torch.manual_seed(5)
    replayed = []
    for _ in range(4):
        graph.replay()
        replayed.append(z.clone())
    torch.manual_seed(5)
    assert_same(replayed, [aevb.sample_gaussian(mu, logvar)[0] for _ in range(4)])
    assert not torch.equal(replayed[0], replayed[1])


@runtime
def test_a_generator_registered_with_a_graph():
    mu, logvar = arguments("sample", 100, 20)
    generator = torch.Generator(DEVICE)
    graph, z = captured(lambda: aevb.sample_gaussian(mu, logvar, generator=generator)[0], generators=[generator])
    generator.manual_seed(5)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)
    generator.manual_seed(5)
    graph.replay()
    assert torch.equal(first, z)


@runtime
@each_op
def test_every_op_can_be_captured(op):
    tensors = arguments(op, 33, 784)
    upstream = upstream_of(op, tensors)
    expected = run(op, tensors, upstream)
    static = [t.clone() for t in tensors]
    graph, found = captured(lambda: run(op, static, upstream))
    for t in (*static, *found):
        t.zero_()
    for to, t in zip(static, tensors, strict=True):
        to.copy_(t)
    graph.replay()
    assert_same(found, expected)


@runtime
def test_beta_may_change_between_replays():
    recon, x, mu, logvar = arguments("elbo", 6, 41)
    beta = torch.zeros((), device=DEVICE)
    criterion = aevb.FusedELBO(beta=beta)
    graph, loss = captured(lambda: criterion(recon, x, mu, logvar))
    for value in (0.25, 1.0):
        beta.fill_(value)
        graph.replay()
        assert same_bits(loss, aevb.FusedELBO(beta=value)(recon, x, mu, logvar))


# ---- torch.compile and torch.library --------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function, mode):
    """`function` as torch.compile makes it, and without holding what the next call of a CUDA graph will overwrite."""
    options = {"backend": "aot_eager"} if DRY else {"mode": mode}
    inner = torch.compile(function, fullgraph=True, **options)

    def call(*args):
        if not DRY:
            torch.compiler.cudagraph_mark_step_begin()
        return inner(*args)

    return call


modes = pytest.mark.parametrize("mode", ["default", "reduce-overhead"])


@modes
def test_compiled_training_is_eager_training(mode, fresh_dynamo):
    eager, twin = test_contract.Model().to(DEVICE), test_contract.Model().to(DEVICE)
    step = compiled(twin, mode)
    x = rand(2, 16, 8).to(DEVICE)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (eager, twin)]
    for i in range(8):
        seed = torch.full((), i, dtype=torch.int64, device=DEVICE)
        losses = []
        for model, optimizer in zip((eager, step), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x, seed)
            (0.5 * loss).backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        assert_close(losses[:1], losses[1:], rtol=1e-4)
    for a, b in zip(eager.parameters(), twin.parameters(), strict=True):
        assert_close([b], [a], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@modes
def test_compiled_noise_is_fresh_and_follows_manual_seed(mode, fresh_dynamo):
    mu, logvar = arguments("sample", 100, 20)
    step = compiled(lambda m, v: aevb.sample_gaussian(m, v)[0], mode)

    def draw():
        return step(mu, logvar).clone()

    for _ in range(3):  # compiles, warms up and records
        draw()
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    normals = (first - mu) * torch.exp(-0.5 * logvar)
    assert abs(normals.mean().item()) < 0.2
    assert abs(normals.std().item() - 1) < 0.2


@modes
@pytest.mark.parametrize("op", ["sample", "log_ratios", "kl", "log_prob_uint8", "elbo_probs"])
def test_compiled_ops(op, mode, fresh_dynamo):
    """With constant seeds, too: nothing in the graph is on the CPU."""
    tensors = arguments(op, 33, 784)
    elbo = aevb.FusedELBO(0.3, "none", from_probs=True)
    step = compiled(elbo if op == "elbo_probs" else OPS[op], mode)
    leaves, upstream = leaves_of(op, tensors), upstream_of(op, tensors)
    for _ in range(3):
        outputs = as_tuple(step(*leaves))
        grads = torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], upstream)
        assert_same([o.detach() for o in outputs] + list(grads), run(op, tensors, upstream))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


FLOAT_ARGUMENTS = {
    "sample_gaussian": (0, 1),
    "sample_gaussian_log_ratio": (0, 1),
    "gaussian_kl": (0, 1),
    "log_prob": (0, 2),
    "negative_elbo": (0, 2, 3),
}


@pytest.mark.parametrize(
    ("name", "args", "grads"), test_contract.OPCHECKS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_opcheck(name, args, grads):
    ops = torch.ops.aevb
    args, grads = ([a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in group] for group in (args, grads))
    torch.library.opcheck(getattr(ops, f"{name}_forward").default, tuple(args))
    torch.library.opcheck(getattr(ops, f"{name}_backward").default, (*args, *grads))
    for position in FLOAT_ARGUMENTS[name]:
        if args[position] is not None:
            args[position] = args[position].clone().requires_grad_()
    torch.library.opcheck(getattr(ops, name).default, tuple(args))


def test_opcheck_of_noise_and_seeds():
    seeds = torch.arange(3, device=DEVICE)
    torch.library.opcheck(torch.ops.aevb.normal.default, (seeds, [3, 5]))
    torch.library.opcheck(torch.ops.aevb.mix_seed.default, (seeds, seeds))


# ---- the rest of the contract ---------------------------------------------------------------------------------------


def scalar(op):
    def total(*tensors):
        return sum(
            (o.float() * (1.5 + torch.arange(o.numel(), device=o.device)).cos().view(o.shape)).sum()
            for o in as_tuple(OPS[op](*tensors))
        )

    return total


@each_op
def test_double_backward(op):
    found = []
    for device in (DEVICE, "cpu"):
        leaves = leaves_of(op, arguments(op, 6, 5, device=device))
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(scalar(op)(*leaves), wanted, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in grads), wanted, allow_unused=True)
        found.append([g for g in second if g is not None])
    assert_close(*found, rtol=1e-4, atol=1e-5)


@each_op
def test_func_grad_and_vmap(op):
    found = []
    for device in (DEVICE, "cpu"):
        tensors = arguments(op, 6, 5, device=device)
        positions = tuple(i for i, need in enumerate(NEEDS[op]) if need)
        mapped = torch.func.vmap(OPS[op])(*(t.reshape(3, 2, t.shape[-1]) for t in tensors))
        found.append([*torch.func.grad(scalar(op), positions)(*tensors), *as_tuple(mapped)])
    assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_autocast(dtype):
    model, x = test_contract.Model().to(DEVICE), rand(1, 32, 8).to(DEVICE)
    seed = torch.full((), 3, dtype=torch.int64, device=DEVICE)
    expected = model(x, seed)
    with torch.autocast(DEVICE, dtype=dtype):
        mu, logvar = model.encoder(x).chunk(2, -1)
        z, kl = aevb.sample_gaussian(mu, logvar, seed=seed)
        assert (z.dtype, kl.dtype) == (dtype, torch.float32)
        loss = model(x, seed)
    assert loss.dtype == torch.float32
    assert_close([loss], [expected], rtol=0.02, atol=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def peak_memory(work):
    """Bytes allocated at the most during `work`, beyond those before."""
    work()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@runtime
def test_the_loss_takes_no_memory_but_its_gradients():
    inputs = [t.to(DEVICE).requires_grad_() for t in (randn(1, 8192, 784), randn(2, 8192, 20), randn(3, 8192, 20))]
    x = rand(4, 8192, 784).to(DEVICE)

    def eager(logits, mu, logvar):
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)

    criterion = aevb.FusedELBO()
    functions = (lambda logits, mu, logvar: criterion(logits, x, mu, logvar), eager)
    losses = [f(*inputs) for f in functions]
    assert_close(losses[:1], losses[1:], rtol=1e-4)
    del losses
    ours, theirs = (peak_memory(lambda f=f: torch.autograd.grad(f(*inputs), inputs)) for f in functions)
    gradients = sum(t.numel() * t.element_size() for t in inputs)
    assert ours <= gradients + 2**20
    assert ours < theirs


@runtime
def test_a_sample_takes_no_memory_for_noise():
    mu, logvar = (t.requires_grad_() for t in arguments("sample", 16384, 128))
    upstream = [torch.ones_like(mu), torch.ones(16384, device=DEVICE)]

    def work(sample):
        return torch.autograd.grad(sample(mu, logvar), (mu, logvar), upstream)

    ours, theirs = peak_memory(lambda: work(aevb.sample_gaussian)), peak_memory(lambda: work(reference.sample_gaussian))
    assert ours <= 3 * mu.numel() * 4 + 2**20  # z and two gradients
    assert ours < theirs


def test_a_module_of_linear_layers_trains():
    """mu and logvar as halves of one tensor, L samples, bf16 weights."""
    torch.manual_seed(1)
    encoder, decoder = (nn.Linear(*size, device=DEVICE, dtype=torch.bfloat16) for size in ((30, 10), (5, 30)))
    x = (rand(2, 64, 30) < 0.2).to(DEVICE)
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], 0.02)
    losses = []
    for _ in range(20):
        z, kl = aevb.sample_gaussian(*encoder(x.bfloat16()).chunk(2, -1), 3)
        loss = aevb.FusedELBO()(decoder(z), x, kl=kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
