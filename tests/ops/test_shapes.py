"""Any leading dimensions, any strides, views at any offset, nothing at all, and very much."""

import math
import os

import pytest
import torch
from conftest import DTYPES, close_by_magnitude, rand, randn, same_bits

import aevb
from aevb import _C, reference

SEED = 11


def run(op, *tensors):
    """The results of `op` and its gradients for the floating tensors among its first arguments, upstream random."""
    leaves = [t.detach().requires_grad_() if wanted else t for t, wanted in zip(tensors, NEEDS[op], strict=True)]
    outputs = OPS[op](*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [(2.5 * randn(40 + i, *o.shape)).to(o.device, o.dtype) for i, o in enumerate(outputs)]
    inputs = [t for t, wanted in zip(leaves, NEEDS[op], strict=True) if wanted]
    found = torch.autograd.grad(outputs, inputs, grads)
    return [t.detach() for t in (*outputs, *found)]


OF_LATENTS = ("sample", "samples", "log_ratio", "log_ratios", "kl")
OPS = {
    "sample": lambda mu, logvar: aevb.sample_gaussian(mu, logvar, seed=SEED),
    "samples": lambda mu, logvar: aevb.sample_gaussian(mu, logvar, 3, seed=SEED),
    "log_ratio": lambda mu, logvar: aevb.sample_gaussian_log_ratio(mu, logvar, seed=SEED),
    "log_ratios": lambda mu, logvar: aevb.sample_gaussian_log_ratio(mu, logvar, 3, gradient="path", seed=SEED),
    "kl": aevb.gaussian_kl,
    "log_prob": aevb.bernoulli_log_prob,
    "log_prob_uint8": lambda logits, x: aevb.bernoulli_log_prob(logits, x, 1 / 255),
    "gaussian": lambda mean, x, logvar: aevb.gaussian_log_prob(mean, x, logvar),
    "gaussian_fixed": lambda mean, x: aevb.gaussian_log_prob(mean, x, -0.7, sigmoid=True),
    "gaussian_uint8": lambda mean, x, logvar: aevb.gaussian_log_prob(mean, x, logvar, 1 / 255, sigmoid=True),
    "elbo": lambda recon, x, mu, logvar: aevb.FusedELBO(0.3)(recon, x, mu, logvar),
    "elbo_probs": lambda recon, x, mu, logvar: aevb.FusedELBO(0.3, "none", from_probs=True)(recon, x, mu, logvar),
}
NEEDS = {
    **dict.fromkeys(OF_LATENTS, (True, True)),
    **dict.fromkeys(("log_prob", "log_prob_uint8", "gaussian_fixed"), (True, False)),
    **dict.fromkeys(("gaussian", "gaussian_uint8"), (True, False, True)),
    **dict.fromkeys(("elbo", "elbo_probs"), (True, False, True, True)),
}


def arguments(op, *size, dtype=torch.float32, device="cpu"):
    if op in OF_LATENTS:
        tensors = randn(1, *size).to(dtype), randn(2, *size).to(dtype)
    elif op in ("log_prob_uint8", "gaussian_uint8"):
        tensors = randn(1, *size).to(dtype), (256 * rand(3, *size)).to(torch.uint8)
    else:
        recon = rand(1, *size) if op == "elbo_probs" else 3 * randn(1, *size)
        tensors = recon.to(dtype), (rand(3, *size) < 0.5 if op == "elbo" else rand(3, *size).to(dtype))
        if op.startswith("elbo"):
            tensors += randn(4, *size[:-1], 6).to(dtype), randn(5, *size[:-1], 6).to(dtype)
    if op in ("gaussian", "gaussian_uint8"):
        tensors += (randn(6, *size).to(dtype),)
    return [t.to(device) for t in tensors]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert same_bits(a, e)


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op", ["sample", "kl", "log_prob", "log_prob_uint8", "gaussian", "gaussian_fixed", "elbo_probs"]
)
@pytest.mark.parametrize("leading", [(), (1,), (24,), (2, 12), (2, 3, 4), (4, 1, 3, 2)])
@pytest.mark.parametrize("width", [1, 7, 300])
def test_leading_dimensions_are_rows(op, leading, width, device):
    rows = math.prod(leading)
    flat = run(op, *arguments(op, rows, width, device=device))
    shaped = run(op, *(t.reshape(*leading, t.shape[-1]) for t in arguments(op, rows, width, device=device)))
    assert shaped[0].shape[: len(leading)] == leading
    assert_same([t.reshape(f.shape) for t, f in zip(shaped, flat, strict=True)], flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (4, 0), (0, 0)])
def test_empty(rows, width, dtype, device):
    empty = torch.zeros(rows, width, dtype=dtype, device=device, requires_grad=True)
    for num_samples in (None, 0, 2):
        z, kl = aevb.sample_gaussian(empty, empty, num_samples)
        assert z.shape == ((rows, width) if num_samples is None else (num_samples, rows, width))
        assert torch.equal(kl, torch.zeros(rows, device=device))
        grads = torch.autograd.grad((z, kl), empty, (torch.full_like(z, 3), torch.full_like(kl, 3)))
        assert grads[0].shape == empty.shape
    for logits in (empty, empty.expand(3, rows, width), empty.expand(0, rows, width)):
        log_prob = aevb.bernoulli_log_prob(logits, empty)
        assert torch.equal(log_prob, torch.zeros(logits.shape[:-1], device=device))
        torch.autograd.grad(log_prob, empty, torch.full_like(log_prob, 3))
        for logvar in (0.3, logits, empty[:1].detach() if rows else empty, torch.tensor(0.3, device=device)):
            log_prob = aevb.gaussian_log_prob(logits, empty.detach(), logvar)
            expected = torch.zeros(logits.shape[:-1], device=device)
            assert torch.equal(log_prob, expected)
            torch.autograd.grad(log_prob, empty, torch.full_like(log_prob, 3))
    for reduction in ("none", "mean", "sum"):
        expected = {"none": torch.zeros(rows), "mean": torch.zeros(rows).mean(), "sum": torch.zeros(())}[reduction]
        for x in (empty.detach(), empty):  # the second asks for a gradient for x
            loss = aevb.FusedELBO(reduction=reduction)(empty, x, empty, empty)
            assert same_bits(loss.detach().cpu(), expected)
            torch.autograd.grad(loss, empty, torch.full_like(loss, 3))
            assert same_bits(reference.FusedELBO(reduction=reduction)(empty, x, empty, empty).detach().cpu(), expected)


def test_no_samples_but_a_kl(device):
    mu, logvar = (t.requires_grad_() for t in arguments("kl", 6, 9, device=device))
    z, kl = aevb.sample_gaussian(mu, logvar, 0, seed=1)
    g = randn(6, 6).to(device)
    assert_same([kl], [aevb.gaussian_kl(mu, logvar)])
    expected = torch.autograd.grad(aevb.gaussian_kl(mu, logvar), (mu, logvar), g)
    assert_same(torch.autograd.grad((z, kl), (mu, logvar), (torch.zeros_like(z), g)), expected)
    logits, x = torch.zeros(0, 4, 5, device=device), torch.zeros(4, 5, device=device)
    assert aevb.bernoulli_log_prob(logits, x).shape == (0, 4)


@pytest.mark.parametrize("kind", ["float", "bool", "uint8"])
@pytest.mark.parametrize("samples", [(5,), (2, 3), (1, 1, 4)])
def test_x_is_used_for_every_sample(kind, samples, device):
    u = rand(1, 4, 50).to(device)
    x = {"float": u, "bool": u < 0.3, "uint8": (256 * u).to(torch.uint8)}[kind]
    x_scale = 1 / 255 if kind == "uint8" else None
    logits = randn(2, *samples, 4, 50).to(device).requires_grad_()
    log_prob = aevb.bernoulli_log_prob(logits, x, x_scale)
    expected = aevb.bernoulli_log_prob(logits, x.expand_as(logits).contiguous(), x_scale)
    g = randn(3, *samples, 4).to(device)
    assert_same([log_prob], [expected])
    assert_same(torch.autograd.grad(log_prob, logits, g), torch.autograd.grad(expected, logits, g))


@pytest.mark.parametrize("kind", ["float", "bool", "uint8"])
@pytest.mark.parametrize("samples", [(5,), (2, 3)])
def test_x_is_used_for_every_sample_of_a_gaussian(kind, samples, device):
    u = rand(1, 4, 50).to(device)
    x = {"float": u, "bool": u < 0.3, "uint8": (256 * u).to(torch.uint8)}[kind]
    x_scale = 1 / 255 if kind == "uint8" else None
    mean, logvar = (randn(s, *samples, 4, 50).to(device).requires_grad_() for s in (2, 3))
    for v in (logvar, 0.3):
        inputs = (mean, logvar) if v is logvar else (mean,)
        log_prob = aevb.gaussian_log_prob(mean, x, v, x_scale)
        expected = aevb.gaussian_log_prob(mean, x.expand_as(mean).contiguous(), v, x_scale)
        g = randn(4, *samples, 4).to(device)
        assert_same([log_prob], [expected])
        assert_same(torch.autograd.grad(log_prob, inputs, g), torch.autograd.grad(expected, inputs, g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_shared_logvar_has_the_bits_of_one_for_each_element(sigmoid, dtype, device):
    mean, x = (3 * randn(1, 7, 4, 50)).to(device, dtype).requires_grad_(), rand(2, 4, 50).to(device)
    for logvar in (
        randn(3, 50),
        randn(3, 1, 50),
        randn(3, 4, 50),
        randn(3, 4, 1),
        randn(3, 7, 1, 1),
        torch.tensor(0.3),
    ):
        shared = logvar.to(device).requires_grad_()
        each = logvar.to(device).expand(mean.shape).contiguous().requires_grad_()
        results = []
        for v in (shared, each):
            log_prob = aevb.gaussian_log_prob(mean, x, v, sigmoid=sigmoid)
            results.append([log_prob, *torch.autograd.grad(log_prob, (mean, v), randn(4, 7, 4).to(device))])
        assert_same(results[0][:2], results[1][:2])
        assert results[0][2].shape == logvar.shape
        torch.testing.assert_close(results[0][2], results[1][2].sum_to_size(logvar.shape), rtol=1e-5, atol=1e-4)
    of_number = aevb.gaussian_log_prob(mean, x, float(torch.tensor(0.3)), sigmoid=sigmoid)
    of_tensor = aevb.gaussian_log_prob(mean, x, torch.tensor(0.3, device=device), sigmoid=sigmoid)
    assert_same([of_number], [of_tensor])
    g = randn(4, 7, 4).to(device)
    assert_same(torch.autograd.grad(of_number, mean, g), torch.autograd.grad(of_tensor, mean, g))


def test_layouts_of_a_datapoint(device):
    """recon (B, 784) goes with x (B, 1, 28, 28), and the other way round."""
    recon, x = randn(1, 3, 5, 784).to(device), rand(2, 5, 784).to(device)
    mu, logvar = randn(3, 5, 8).to(device), randn(4, 5, 8).to(device)
    criterion = aevb.FusedELBO()
    loss = criterion(recon, x, mu, logvar)
    for r, t in [((784,), (1, 28, 28)), ((1, 28, 28), (784,)), ((28, 28), (2, 14, 28)), ((784, 1), (784,))]:
        assert_same([criterion(recon.view(3, 5, *r), x.view(5, *t), mu, logvar)], [loss])


# ---- strides --------------------------------------------------------------------------------------------------------


def stretched(t, step):
    """t's numbers every `step` elements of a last dimension that holds others between them."""
    wide = torch.stack([t, *(torch.ones_like(t) for _ in range(step - 1))], -1).flatten(-2)
    return wide[..., ::step]


STRIDES = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "all reversed": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every second element": lambda t: stretched(t, 2),
    "columns of a wider matrix": lambda t: torch.cat([t, torch.ones_like(t)], -1)[..., : t.shape[-1]],
    "last chunk": lambda t: torch.cat([torch.ones_like(t), t], -1).chunk(2, -1)[1],
    "every second row": lambda t: torch.stack([t, torch.ones_like(t)], 1).flatten(0, 1)[::2],
    "inner rows": lambda t: torch.cat([t, torch.ones_like(t)], 1)[:, : t.shape[1]],
    "expanded first": lambda t: t[:1].expand_as(t),
    "expanded middle": lambda t: t[:, :1].expand_as(t),
    "expanded last": lambda t: t[..., :1].expand_as(t),
    "expanded all": lambda t: t[:1, :1, :1].expand_as(t),
    "overlapping rows": lambda t: t.flatten()[: sum(t.shape)].as_strided(t.shape, (1, 1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stride", STRIDES)
def test_strides(stride, op, dtype, device):
    for width in (7, 40, 600):
        views = [STRIDES[stride](t) for t in arguments(op, 4, 3, width, dtype=dtype, device=device)]
        copies = [t.clone(memory_format=torch.contiguous_format) for t in views]
        assert not views[0].is_contiguous() or stride == "overlapping rows"
        assert_same(run(op, *views), run(op, *copies))
        assert_same(run(op, views[0], *copies[1:]), run(op, *copies))
        assert_same(run(op, copies[0], *views[1:]), run(op, *copies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layers_two_halves(dtype, device):
    """mu, logvar = h.chunk(2, -1): read in place, and the gradient goes back to h."""
    for width in (1, 20, 41, 512, 1000):
        h = randn(1, 9, 2 * width).to(device, dtype).requires_grad_()
        g, gkl = randn(2, 9, width).to(device, dtype), randn(3, 9).to(device)
        results = []
        for halves in (h.chunk(2, -1), [t.contiguous() for t in h.chunk(2, -1)]):
            z, kl = aevb.sample_gaussian(*halves, seed=SEED)
            results.append([z, kl, *torch.autograd.grad((z, kl), h, (g, gkl))])
        assert_same(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gaussian_decoders_two_halves(dtype, device):
    """mean, logvar = h.chunk(2, -1): as with separate tensors, and nothing is copied."""
    for width in (1, 20, 41, 512, 1000):
        h, x = randn(1, 9, 2 * width).to(device, dtype).requires_grad_(), rand(2, 9, width).to(device)
        g = randn(3, 9).to(device)
        results = []
        for halves in (h.chunk(2, -1), [t.contiguous() for t in h.chunk(2, -1)]):
            log_prob = aevb.gaussian_log_prob(halves[0], x, halves[1])
            results.append([log_prob, *torch.autograd.grad(log_prob, h, g)])
        assert_same(*results)


def peak_mib():
    """The most memory that this process has held, since 5 was last written to clear_refs."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads how much memory is in use")
def test_halves_and_shared_logvars_are_read_where_they_are():
    """A copy of one of them would be 1 GiB."""
    rows, width = 2**10, 2**18
    mean, logvar = torch.zeros(2 * width).expand(rows, 1, 2 * width).chunk(2, -1)
    x, copies = torch.zeros(1, width), []
    for v in (logvar, logvar[0, 0], torch.tensor(0.3), 0.3):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = peak_mib()
        log_prob = aevb.gaussian_log_prob(mean, x, v)
        copies.append(peak_mib() - before)
        assert (log_prob == log_prob[0]).all()
    assert max(copies) < 256
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = peak_mib()
    mean.contiguous()
    assert peak_mib() - before > 256  # it can tell


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_upstream_gradients(dtype, device):
    mu, logvar = (t.requires_grad_() for t in arguments("samples", 6, 45, dtype=dtype, device=device))
    z, kl = aevb.sample_gaussian(mu, logvar, 3, seed=SEED)
    logits = randn(5, 6, 45).to(device, dtype).requires_grad_()
    log_prob = aevb.bernoulli_log_prob(logits, rand(6, 6, 45).to(device))
    losses = aevb.FusedELBO(reduction="none")(logits, rand(6, 6, 45).to(device), kl=kl)
    columns_first = lambda t: t.mT.contiguous().mT if t.dim() > 1 else t  # noqa: E731
    for stretch in (lambda t: stretched(t, 3), lambda t: t[..., :1].expand_as(t), columns_first):
        for outputs, inputs in [((z, kl), (mu, logvar)), ((log_prob,), (logits,)), ((losses,), (logits, mu))]:
            views = [stretch((3 * randn(7, *o.shape)).to(device, o.dtype)) for o in outputs]
            found = torch.autograd.grad(outputs, inputs, views, retain_graph=True)
            copies = [v.clone(memory_format=torch.contiguous_format) for v in views]
            assert_same(found, torch.autograd.grad(outputs, inputs, copies, retain_graph=True))


# ---- views at every offset ------------------------------------------------------------------------------------------


def view_at(t, offset):
    """A view of t's numbers at `offset` of a buffer that is NaN (255 in bytes) around them; and the buffer."""
    sentinel = float("nan") if t.is_floating_point() else 255 if t.dtype == torch.uint8 else True
    buffer = torch.full((offset + t.numel() + 64,), sentinel, dtype=t.dtype, device=t.device)
    view = buffer[offset : offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 401, 1271])
@pytest.mark.parametrize("op", OPS)
def test_views_at_every_offset(op, width, dtype, device):
    tensors = arguments(op, 3, width, dtype=dtype, device=device)
    expected = run(op, *tensors)
    assert all(t.isfinite().all() for t in expected)
    for offset in range(41):
        views, buffers = zip(*(view_at(t, (offset + 7 * i) % 41) for i, t in enumerate(tensors)), strict=True)
        before = [b.clone() for b in buffers]
        assert_same(run(op, *views), expected)
        assert_same(buffers, before)  # nothing is written to a caller's memory


@pytest.mark.parametrize("width", [1, 41, 401, 1271])
def test_upstream_gradients_at_every_offset(width, device):
    mu, logvar = (t.requires_grad_() for t in arguments("sample", 3, width, device=device))
    z, kl = aevb.sample_gaussian(mu, logvar, seed=SEED)
    g, gkl = randn(8, 3, width).to(device), randn(9, 3).to(device)
    expected = torch.autograd.grad((z, kl), (mu, logvar), (g, gkl), retain_graph=True)
    for offset in range(41):
        views = view_at(g, offset)[0], view_at(gkl, 40 - offset)[0]
        assert_same(torch.autograd.grad((z, kl), (mu, logvar), views, retain_graph=True), expected)


# ---- large ----------------------------------------------------------------------------------------------------------

LONG = 3_000_001  # many chunks of one row


@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_row_of_latents(rows, device):
    mu, logvar = (t.requires_grad_() for t in arguments("kl", rows, LONG, device=device))
    m, v = (t.detach().cpu().double().requires_grad_() for t in (mu, logvar))
    z, kl = aevb.sample_gaussian(mu, logvar, seed=SEED)
    z64, kl64 = reference.sample_gaussian(m, v, seed=SEED)
    close_by_magnitude(kl, kl64, kl64)
    assert_same([kl], [aevb.gaussian_kl(mu, logvar)])
    sd_eps = (z64 - m).detach().abs()
    close_by_magnitude(z, z64, m.abs() + sd_eps)
    g, gkl = randn(8, rows, LONG).to(device), randn(9, rows).to(device)
    grad_mu, grad_logvar = torch.autograd.grad((z, kl), (mu, logvar), (g, gkl))
    e_mu, e_logvar = torch.autograd.grad((z64, kl64), (m, v), (g.cpu().double(), gkl.cpu().double()))
    g, gkl = g.cpu().double().abs(), gkl.cpu().double().abs().unsqueeze(-1)
    close_by_magnitude(grad_mu, e_mu, g + gkl * m.abs())
    close_by_magnitude(grad_logvar, e_logvar, 0.5 * (g * sd_eps + gkl * torch.expm1(v).abs()))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_row_of_pixels(rows, device):
    logits, x = (t.detach() for t in arguments("elbo", rows, LONG, device=device)[:2])
    logits.requires_grad_()
    l64 = logits.detach().cpu().double().requires_grad_()
    log_prob, expected = aevb.bernoulli_log_prob(logits, x), reference.bernoulli_log_prob(l64, x.cpu())
    close_by_magnitude(log_prob, expected, expected)
    g = 3 * randn(9, rows).to(device)
    (actual,), (e,) = torch.autograd.grad(log_prob, logits, g), torch.autograd.grad(expected, l64, g.cpu().double())
    close_by_magnitude(actual, e, e)


def available_gib():
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) / 2**20


def slow(test):
    enabled = bool(os.environ.get("AEVB_SLOW_TESTS"))
    test = pytest.mark.skipif(not enabled, reason="takes long and much memory; AEVB_SLOW_TESTS=1 runs it")(test)
    enough = not enabled or (os.path.exists("/proc/meminfo") and available_gib() >= 16)
    return pytest.mark.skipif(not enough, reason="needs 16 GiB of free memory")(test)


def test_more_than_2_31_elements_in_an_expanded_tensor():
    """Rows that all lie in one place: much work, little memory."""
    width = 2**20
    rows = 2**31 // width + 3
    logits = randn(1, width).expand(rows, width)
    x = (rand(2, width) < 0.5).expand(rows, width)
    log_prob = aevb.bernoulli_log_prob(logits, x)
    assert (log_prob == aevb.bernoulli_log_prob(logits[0], x[0])).all()
    kl = aevb.gaussian_kl(logits[: rows // 2 + 2].expand(2, -1, -1), logits[: rows // 2 + 2].expand(2, -1, -1))
    assert kl.numel() * width > 2**31
    assert (kl == aevb.gaussian_kl(logits[0], logits[0])).all()


@slow
def test_more_than_2_31_targets():
    width = 1000
    rows = 2**31 // width + 5
    x = torch.zeros(rows, width, dtype=torch.uint8)
    x[-1] = 1
    x[-2, 7] = 1
    logits = torch.full((width,), 0.25)
    log_prob = aevb.bernoulli_log_prob(logits.expand(rows, width), x, 1.0)
    assert (log_prob[:-2] == aevb.bernoulli_log_prob(logits, x[0], 1.0)).all()
    assert log_prob[-1] == aevb.bernoulli_log_prob(logits, x[-1], 1.0)
    assert log_prob[-2] == aevb.bernoulli_log_prob(logits, x[-2], 1.0)


@slow
def test_more_than_2_31_logits_in_one_row():
    n = 2**31 + 129
    logits = torch.zeros(1, n, dtype=torch.bfloat16)
    x = torch.zeros(1, n, dtype=torch.bool)
    logits[0, -1], x[0, -2] = 1e10, True
    logits.requires_grad_()
    log_prob = aevb.bernoulli_log_prob(logits, x)
    exact = -(n - 1) * math.log(2) - logits[0, -1].item()
    assert abs(log_prob.item() - exact) <= 1e-6 * abs(exact)
    (grad,) = torch.autograd.grad(log_prob, logits, torch.full((1,), 4.0))
    assert grad[0, -4:].tolist() == [-2.0, -2.0, 2.0, -4.0]
    assert grad[0, 2**31 - 2 : 2**31 + 2].tolist() == [-2.0] * 4


@slow
def test_more_than_2_31_normals():
    n = 2**31 + 130
    zero = torch.zeros((), dtype=torch.bfloat16).expand(n // 1_000_000 + 1, 1_000_000)
    z, kl = aevb.sample_gaussian(zero, zero, seed=SEED)
    z = z.view(-1)
    assert not kl.any()
    for first in (2**31 - 8, z.numel() - 8):
        index = torch.arange(first // 4, first // 4 + 2)
        words = reference.philox([index, *[torch.zeros_like(index)] * 3], [torch.tensor(SEED), torch.tensor(0)])
        radius = torch.sqrt(-2 * torch.log((torch.stack(words[::2], -1).double() + 0.5) / 2**32))
        angle = 2 * math.pi * torch.stack(words[1::2], -1).double() / 2**32
        eps = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()
        close_by_magnitude(z[first : first + 8], eps, eps)
    assert 5.9 < max(z.max().item(), -z.min().item()) < 6.8  # as far out as 2^31 draws should reach


def test_cached_result_memory_is_given_back():
    for rows in (3000, 5000):
        z, _ = aevb.sample_gaussian(torch.zeros(rows, 64), torch.zeros(rows, 64))
        del z
    assert _C.release_memory() > 0
    assert _C.release_memory() == 0


def test_gaussian_gradients_too_large_for_the_caches():
    mean, x, logvar = randn(1, 1100, 8191).requires_grad_(), rand(2, 1100, 8191), randn(4, 1100, 8191).requires_grad_()
    upstream = randn(3, 1100)
    whole = torch.autograd.grad(aevb.gaussian_log_prob(mean, x, logvar), (mean, logvar), upstream)
    for rows in (slice(0, 600), slice(600, 1100)):
        parts = mean[rows].detach().requires_grad_(), logvar[rows].detach().requires_grad_()
        grads = torch.autograd.grad(aevb.gaussian_log_prob(parts[0], x[rows], parts[1]), parts, upstream[rows])
        for grad, all_of_it in zip(grads, whole, strict=True):
            assert torch.equal(grad, all_of_it[rows])


def test_gradients_too_large_for_the_caches():
    """Written past the caches, with the same bits as parts that are not, at a width that aligns with nothing."""
    logits, x = randn(1, 1100, 8191).requires_grad_(), rand(2, 1100, 8191)
    upstream = randn(3, 1100)
    (whole,) = torch.autograd.grad(aevb.bernoulli_log_prob(logits, x), logits, upstream)
    for rows in (slice(0, 600), slice(600, 1100)):
        part = logits[rows].detach().requires_grad_()
        (grad,) = torch.autograd.grad(aevb.bernoulli_log_prob(part, x[rows]), part, upstream[rows])
        assert torch.equal(grad, whole[rows])
