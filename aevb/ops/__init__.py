"""The fused ops: the one door to `torch.ops.aevb`, and the one place where they meet autograd.

No single way of giving a custom op a gradient keeps all of PyTorch's promises, so each op is arranged four ways, by
`differentiable`, the same for all:

* eager: an `autograd.Function` around the bare kernel, the cheapest boundary there is;
* `torch.compile`, `torch.export`: the op itself, which has `register_autograd`: a graph holds one trainable node;
* `torch.func`: the formulas of `aevb.reference` on the same noise, which every transform understands;
* a gradient of a gradient, or of an input that rarely asks for one (x, beta): those formulas again.
"""

from __future__ import annotations

import functools
import operator
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, reference  # importing _C registers the ops
from ..checks.arguments import converted
from ..checks.batch_dims import latents, shaped
from ..checks.choices import GRADIENTS, REDUCTIONS, unknown
from ..checks.errors import READERS, check_dense, explain, explain_memory
from ..checks.seeds import Generators, check_generators, check_seed, int64
from ..likelihoods import REGISTRY, Gaussian, Likelihood, named
from ..likelihoods.base import Formula, Parameter, computed
from ..likelihoods.values import check_bernoulli, check_gaussian, check_likelihood, is_wanted, look_once

_ops = torch.ops.aevb
_GAUSSIAN, _SIGMOID = Gaussian(), Gaussian(sigmoid_means=True)
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _without_kernels() -> dict[str, str]:
    """The types of devices on which aevb.reference computes, and why: their kernels are slower, or not there."""
    found = {}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and _C.cpu_isa() == "plain" and not os.environ.get("AEVB_ISA"):
        found["cpu"] = "this CPU lacks AVX2 and FMA"
    cuda = _C.build_info()["cuda"]
    if not cuda.startswith("built"):
        found["cuda"] = f"this installation's CUDA kernels are {cuda}"
    return found


_reference_on = _without_kernels()


@functools.cache
def _say_why(device_type: str) -> None:
    warnings.warn(
        f"{_reference_on[device_type]}, so aevb computes with aevb.reference (plain PyTorch) on {device_type} tensors",
        stacklevel=4,
    )


def reference_gradients(
    formula: Callable, tensors: Sequence, options: Sequence, needs: Sequence[bool], grads: Sequence
):
    """The gradients by autograd on `formula`, themselves differentiable."""
    with torch.enable_grad():
        # A view stands for each input: the gradient must stop there, even where one input was computed from another.
        inputs = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=False)]
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
        outputs = formula(*inputs, *options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
    return tuple(next(found) if need else None for need in needs)


def differentiable(
    name: str,
    num_tensors: int,
    fused: tuple[int, ...],
    formula: Callable,
    fake: Callable,
    for_kernel: Callable | None = None,
    only_needed: bool = False,
    ahead: Ahead | None = None,
) -> Callable:
    """Arranges the op `name`, whose arguments are `num_tensors` tensors (or None) and then plain options.

    `fused` are the positions whose gradients `name_backward` returns; `formula` is the op in plain PyTorch; `fake`
    gives its results' shapes. `name_backward` takes the op's arguments and the gradients of its results, or what
    `for_kernel(options, gradients)` makes of them; with `only_needed` also which of the fused gradients are needed, and
    then gives anything for the others. With `ahead`, eager mode takes a gradient in the forward pass.
    """
    op = getattr(_ops, name).default
    kernel = getattr(_ops, f"{name}_forward").default
    backward_kernel = getattr(_ops, f"{name}_backward").default
    rare = tuple(i for i in range(num_tensors) if i not in fused)
    argument_names = [argument.name for argument in kernel._schema.arguments]
    num_arguments = len(argument_names)
    # Gradients by position, None where there are none: of the tuple of fused gradients with a None behind them.
    by_position = operator.itemgetter(*(fused.index(i) if i in fused else len(fused) for i in range(num_arguments)))

    def gradients(ctx, *grads):
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or _functorch_active() or any([needs[i] for i in rare]):
            found = reference_gradients(formula, ctx.saved_tensors, ctx.options, needs[:num_tensors], grads)
            return *found, *(None,) * len(ctx.options)
        if for_kernel is not None:
            grads = for_kernel(ctx.options, grads)
        if only_needed:
            wanted = [needs[i] for i in fused]
            found = run_backward(*ctx.saved_tensors, *ctx.options, *grads, as_bits(wanted))
            found = tuple([f if want else None for f, want in zip(found, wanted, strict=True)])
        else:
            found = run_backward(*ctx.saved_tensors, *ctx.options, *grads)
        return by_position((*found, None) if len(fused) > 1 else (found, None))

    def run_backward(*args):
        try:
            return backward_kernel(*args)
        except (RuntimeError, MemoryError) as error:
            tensors = {key: t for key, t in zip(names, args, strict=False) if isinstance(t, Tensor)}
            reader = f"{READERS.get(name, name)}, backward"
            explain_memory(error, reader, tensors, lambda: fake_backward(*map(to_meta, args)))
            raise

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args[:num_tensors])
            ctx.options = args[num_tensors:]
            ctx.set_materialize_grads(False)
            return kernel(*args)

        backward = staticmethod(gradients)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                f"aevb.{name} does not support forward-mode automatic differentiation; aevb.reference has the same "
                "function in plain PyTorch, which does"
            )

    Eager.__name__ = Eager.__qualname__ = name  # what grad_fn shows

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]
        ctx.set_materialize_grads(False)

    def meta_results(*args):
        return fake(*map(to_meta, args))

    names = [argument.name for argument in backward_kernel._schema.arguments]

    def fake_backward(*args):
        wanted = from_bits(args[-1], len(fused)) if only_needed else [True] * len(fused)
        found = tuple(_fake_gradient(args[i], args[0], want) for i, want in zip(fused, wanted, strict=True))
        return found if len(found) > 1 else found[0]

    torch.library.register_autograd(f"aevb::{name}", gradients, setup_context=setup_context)
    torch.library.register_fake(f"aevb::{name}", fake)
    torch.library.register_fake(f"aevb::{name}_forward", fake)
    torch.library.register_fake(f"aevb::{name}_backward", fake_backward)

    class EagerAhead(Eager):
        @staticmethod
        def forward(ctx, *args):
            assert ahead is not None
            result, *taken = ahead.forward(*args)
            ctx.save_for_backward(*args[:num_tensors], *taken)
            ctx.options = args[num_tensors:]
            ctx.set_materialize_grads(False)
            return result

        @staticmethod
        def backward(ctx, *grads):
            assert ahead is not None
            tensors, taken = ctx.saved_tensors[:num_tensors], ctx.saved_tensors[num_tensors:]
            needs = ctx.needs_input_grad
            if not (torch.is_grad_enabled() or any([needs[i] for i in rare]) or is_batched(*grads)):
                found = ahead.backward(tensors, ctx.options, *taken, *grads)
                if found is not None:
                    return by_position((*found, None))
            return gradients(_Saved(tensors, ctx.options, needs), *grads)

    EagerAhead.__name__ = EagerAhead.__qualname__ = name

    # The outer apply is for torch.func, which never comes here; without it a call is 2 us cheaper.
    apply = super(torch.autograd.Function, Eager).apply
    apply_ahead = super(torch.autograd.Function, EagerAhead).apply

    def call(*args):
        if on_reference(args[0]):
            return formula(*args)
        if _is_compiling():
            return op(*args)
        try:
            if ahead is not None and args[0].requires_grad and _grad_enabled() and ahead.takes(*args):
                return apply_ahead(*args)
            return apply(*args)
        except (RuntimeError, MemoryError) as error:
            explain(error, name, dict(zip(argument_names, args, strict=True)), meta_results)
            raise

    return call


def as_bits(needs: Sequence[bool]) -> int:
    """Which gradients are needed, as an op takes it: bit i for the i-th."""
    return sum([1 << i for i, need in enumerate(needs) if need])


def from_bits(needs: int, count: int) -> list[bool]:
    return [bool(needs >> i & 1) for i in range(count)]


def to_meta(argument):
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def _fake_gradient(of: Tensor | None, other: Tensor, wanted: bool) -> Tensor:
    """Empty where it is not wanted, or there is nothing that it could be of."""
    if of is None or not wanted:
        return (other if of is None else of).new_empty(0)
    return torch.empty_like(of, memory_format=torch.contiguous_format)


class _Saved(NamedTuple):
    """What `gradients` reads of a ctx."""

    saved_tensors: Sequence
    options: Sequence
    needs_input_grad: Sequence[bool]


# ---- gradients taken in the forward pass ----------------------------------------------------------------------------


class Ahead(NamedTuple):
    """The forward kernel has in registers most of what the gradient of the op's first argument needs: taking it there
    saves a pass over memory and much of the arithmetic. What is kept is as large as the gradient, which the backward
    pass would allocate as its first act.

    takes(*args): whether it is to be. forward(*args): (result, *gradients), for an upstream gradient of 1, or of 1 a
    row. backward(tensors, options, *gradients, *grads): the fused gradients, bit for bit those of the backward kernel;
    None where these cannot be had from `gradients`.
    """

    takes: Callable
    forward: Callable
    backward: Callable


def is_batched(*grads: Tensor | None) -> bool:
    """Whether some of these stand for many gradients, of `vmap` or `torch.autograd.grad(..., is_grads_batched=True)`.
    They cannot be read, nor multiplied into a tensor that stands for one."""
    return _functorch_active() or any([g is not None and _is_legacy_batched(g) for g in grads])


def kept_graph() -> bool:
    """Whether the backward pass that runs now keeps its graph, so that somebody may ask for its gradients again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# ---- noise and seeds ------------------------------------------------------------------------------------------------


@torch.library.register_fake("aevb::normal")
def _(seed, size):
    return seed.new_empty(size, dtype=torch.float32)


@torch.library.register_vmap("aevb::normal")
def _(info, in_dims, seed, size):
    if in_dims[0] is None:
        return _ops.normal(seed, size), None
    return _ops.normal(seed.movedim(in_dims[0], 0), [info.batch_size, *size]), 0


@torch.library.register_fake("aevb::mix_seed")
def _(seed, index):
    return torch.empty_like(seed, memory_format=torch.contiguous_format)


@torch.library.register_vmap("aevb::mix_seed")
def _(info, in_dims, seed, index):
    seed, index = (
        t.unsqueeze(0).expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((seed, index), in_dims, strict=True)
    )
    return _ops.mix_seed(seed, index), 0


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed from PyTorch's generator: a 0-d int64 tensor on `device`."""
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device} but the tensors are on {device}; "
            f"make it with torch.Generator(device={device.type!r})"
        )
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def mix_seed(seed: Tensor | int, index: Tensor | int) -> Tensor:
    """Independent seeds for datapoints, steps or ranks.

    Each (seed, index) gives the first 64 bits of Philox4x32-10 at counter (index, 1, 0) under the key `seed`: a stream
    that the noise itself never uses. `seed` and `index` are ints or int64 tensors, broadcast against each other.

    Returns an int64 tensor of their common shape, to be passed as `seed=`.

    Example::

        seeds = aevb.mix_seed(run_seed, datapoint_index)           # (B,)
        z, kl = aevb.sample_gaussian(mu, logvar, seed=seeds)       # noise that belongs to the datapoint
    """
    device = next((t.device for t in (index, seed) if isinstance(t, Tensor)), None)
    seeds, indices = torch.broadcast_tensors(int64(seed, "seed", device), int64(index, "index", device))
    if seeds.is_cuda and "cuda" in _reference_on:
        return reference.mix_seed(seeds, indices)
    return _ops.mix_seed.default(seeds, indices)


@torch.library.register_fake("aevb::binarize")
def _(images, index, seed, max_value):
    rows = images.shape[0] if index is None else index.shape[0]
    return images.new_empty((rows, images.shape[1]), dtype=torch.bool)


def binarize(images: Tensor, index: Tensor | None = None, *, seed: Tensor | int, max_value: int = 255) -> Tensor:
    """Grey images to bits, each set with its grey value as the probability: dynamic binarization, gathered.

    ``x[b, d] = u < images[index[b], d] / max_value`` with u uniform. The noise belongs to the image: it is that of the
    seed ``mix_seed(seed, index[b])``, so that a batch, an epoch and a rank see the same bits of an image for the same
    seed. One pass, from bytes to bytes.

    Args:
        images: (N, D), uint8. 0 is never set, and max_value and what is above it always; probabilities between are
            exact to 6e-8.
        index: (B,), int64, which of them; by default all. On a GPU an index out of range ends in a device-side assert.
        seed: an int or a 0-d int64 tensor: one for each epoch, say.
        max_value: 1 to 255.

    Returns (B, D), bool: targets for `bernoulli_log_prob`, and an input for `linear`, as they are.

    Raises RuntimeError for shapes, dtypes or devices that do not fit, and on a CPU an index out of range.
    """
    check_dense("binarize", images=images, **({} if index is None else {"index": index}))
    seed = int64(seed, "seed", images.device)
    if images.is_cuda and "cuda" in _reference_on:
        return reference.binarize(images, index, seed, max_value)
    try:
        return _ops.binarize.default(images, index, seed, max_value)
    except (RuntimeError, MemoryError) as error:
        wanted = images if index is None else index

        def bits() -> Tensor:
            return torch.empty((len(wanted), *images.shape[1:]), dtype=torch.bool, device="meta")

        explain_memory(error, "binarize", {"images": images}, bits)
        raise


# ---- the Gaussian posterior -----------------------------------------------------------------------------------------


def _sample_size(mu: Tensor, num_samples: int | None) -> tuple[int, ...]:
    return tuple(mu.shape) if num_samples is None else (num_samples, *mu.shape)


def _noise(seed: Tensor, size: tuple[int, ...]) -> Tensor:
    no_kernel = seed.is_cuda and "cuda" in _reference_on
    return reference.normal(seed, size, torch.float32) if no_kernel else _ops.normal.default(seed, size)


def _sample_formula(mu, logvar, seed, num_samples):
    return reference.sample_gaussian(mu, logvar, num_samples, eps=_noise(seed, _sample_size(mu, num_samples)))


def _sample_fake(mu, logvar, seed, num_samples):
    return mu.new_empty(_sample_size(mu, num_samples)), mu.new_empty(mu.shape[:-1], dtype=torch.float32)


_sample_gaussian = differentiable("sample_gaussian", 3, (0, 1), _sample_formula, _sample_fake)


def _log_ratio_formula(mu, logvar, seed, num_samples, gradient):
    size = _sample_size(mu, num_samples)
    eps = _noise(seed, size)
    return reference.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=GRADIENTS[gradient], eps=eps)


def _log_ratio_fake(mu, logvar, seed, num_samples, gradient):
    size = _sample_size(mu, num_samples)
    return mu.new_empty(size), mu.new_empty(size[:-1], dtype=torch.float32)


def weigh_samples(options, grads):
    """(grad_z, grad_log_ratio, sample_weight) for the backward kernel of `sample_gaussian_log_ratio`."""
    _, gradient = options
    grad_z, grad_log_ratio = grads
    if GRADIENTS[gradient] != "doubly_reparameterized" or grad_log_ratio is None:
        return grad_z, grad_log_ratio, None
    weight = reference.sample_weights(grad_log_ratio)
    return grad_z, weight * grad_log_ratio, weight


_sample_gaussian_log_ratio = differentiable(
    "sample_gaussian_log_ratio", 3, (0, 1), _log_ratio_formula, _log_ratio_fake, weigh_samples
)
_gaussian_kl = differentiable(
    "gaussian_kl",
    2,
    (0, 1),
    reference.gaussian_kl,
    lambda mu, logvar: mu.new_empty(mu.shape[:-1], dtype=torch.float32),
)


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """A reparameterised sample of N(mu, exp(logvar)), and its KL divergence from N(0, I), in one pass.

    ``z = mu + exp(logvar / 2) * eps`` with eps standard normal, and
    ``KL = 0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, eq. 4 and appendix B).

    eps is not stored: it is a function of the seed and the element's position (Philox4x32-10 and Box-Muller), computed
    again in the backward pass. The same seed gives the same bits on every instruction set and any number of threads.

    Args:
        mu, logvar: (..., D), float32, bfloat16 or float16, of one dtype; the arithmetic is float32. Any strides.
        num_samples: None, or the number L of samples for each posterior.
        batch_dims: how many leading dimensions are the batch; all that follow are latent ones, over which the KL is
            summed: 1 for mu (B, C, H, W). By default all but the last; of more than two, a warning says so once.
        seed: an int, or an int64 tensor of shape () or of the first dimensions of z: then each seed numbers its own
            part of z from 0, so that noise can belong to a datapoint (see `mix_seed`). Without it one is drawn from
            `generator`, or from PyTorch's default generator, which `torch.manual_seed` governs.
        generator: where to draw the seed from; on the device of mu. Or a list of one for each datapoint, whose noise
            is then its own.

    Returns:
        z: (..., D), or (L, ..., D) with num_samples=L, in mu's dtype; kl: (...,), or (*batch,), float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a generator on another device, or together with a seed; batch_dims that leave no latent dimension.
    """
    return sampled(mu, logvar, num_samples, None, batch_dims, seed, generator, "sample_gaussian")


def sampled(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    gradient: str | None,
    batch_dims: int | None,
    seed: Tensor | int | None,
    generator: Generators | None,
    reader: str,
) -> tuple[Tensor, Tensor]:
    """`sample_gaussian`, or `sample_gaussian_log_ratio` with that gradient, for `reader`."""
    if not (type(mu) is Tensor is type(logvar)):
        check_dense(reader, mu=mu, logvar=logvar)
    if num_samples is not None and not isinstance(num_samples, int):
        num_samples = converted("num_samples", num_samples, int)
    flat_mu, flat_logvar = mu, logvar
    if batch_dims is not None or mu.dim() > 2:
        flat_mu, flat_logvar = latents(mu, logvar, batch_dims, reader)
        check_seed(seed, batch_dims, num_samples)
    seed = _seed(flat_mu, seed, generator, num_samples)
    if gradient is None:
        z, found = _sample_gaussian(flat_mu, flat_logvar, seed, num_samples)
    else:
        code = GRADIENTS.index(gradient)
        z, found = _sample_gaussian_log_ratio(flat_mu, flat_logvar, seed, num_samples, code)
    return z if batch_dims is None else shaped(z, mu, flat_mu), found


def _seed(mu: Tensor, seed: Tensor | int | None, generator: Generators | None, num_samples: int | None) -> Tensor:
    if seed is None and isinstance(generator, Sequence):
        check_generators(generator, mu)
        seeds = torch.stack([draw_seed(mu.device, g) for g in generator])
        if num_samples is None:
            return seeds
        return mix_seed(seeds, torch.arange(num_samples, device=mu.device).unsqueeze(-1))
    if seed is None:
        return draw_seed(mu.device, generator)  # type: ignore[arg-type]
    if generator is not None:
        raise ValueError("seed and generator are both given; the seed is all the noise depends on, so pass one of them")
    return seed if isinstance(seed, Tensor) else int64(seed, "seed", mu.device)


def sample_gaussian_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    gradient: str = "total",
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """A reparameterised sample z of q = N(mu, exp(logvar)), and log q(z) - log p(z) for p = N(0, I), in one pass.

    ``z = mu + exp(logvar / 2) * eps``, the z of `sample_gaussian` for the same seed, and
    ``log_ratio = 0.5 * sum_j (z_j^2 - eps_j^2 - logvar_j)``, computed so that nothing cancels where the posterior is
    close to the prior. Its expectation is the KL divergence: the Monte Carlo KL of SGVB-A (Kingma & Welling 2013,
    eq. 6), and with log p(x|z) the logarithm of an importance weight, ``log p(x|z) - log_ratio`` (Burda et al. 2015).

    Args:
        mu, logvar, num_samples, batch_dims, seed, generator: as for `sample_gaussian`.
        gradient: what flows back to mu and logvar.

            * "total": all of it.
            * "path": only what comes by way of z; as parameters of log q(z), mu and logvar count as constants, which
              leaves out a term of expectation zero ("sticking the landing", Roeder et al. 2017, eq. 7).
            * "doubly_reparameterized": the path's, and each sample's part times its normalised importance weight: with
              `importance_weighted_bound` the gradient of Tucker et al. 2018 (DReG, eq. 8). The weights are read from
              the gradient that flows into log_ratio, which must be the weights times a number for each datapoint, as
              that of the bound is; where it is 0 for all samples of a datapoint, nothing flows back.

    Returns:
        z: (..., D), or (L, ..., D) with num_samples=L, in mu's dtype; log_ratio: z's shape without the latent
        dimensions, float32, in nats. It belongs to the z of float32 arithmetic, before a half-precision z is rounded.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another gradient, "doubly_reparameterized" without num_samples, or what `sample_gaussian` raises.
    """
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if gradient == "doubly_reparameterized" and num_samples is None:
        raise ValueError("the doubly reparameterized gradient weighs samples against each other; give num_samples")
    return sampled(mu, logvar, num_samples, gradient, batch_dims, seed, generator, "sample_gaussian_log_ratio")


def gaussian_kl(mu: Tensor, logvar: Tensor, groups: int | None = None, *, batch_dims: int | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)), summed over the latent dimensions, or over groups of them.

    ``0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, appendix B), computed so that
    nothing cancels where the posterior is close to the prior.

    Args:
        mu, logvar: (..., D), float32, bfloat16 or float16, of one dtype.
        groups: None, or into how many groups of neighbouring dimensions D is divided; D for the KL of each dimension.
        batch_dims: how many leading dimensions are the batch; all that follow are latent ones, flattened: 1 for mu
            (B, C, H, W). By default all but the last; of more than two, a warning says so once.

    Returns:
        (...,), or (..., groups), float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: groups that do not divide D; batch_dims
        that leave no latent dimension.
    """
    if not (type(mu) is Tensor is type(logvar)):
        check_dense("gaussian_kl", mu=mu, logvar=logvar)
    if batch_dims is not None or mu.dim() > 2:
        mu, logvar = latents(mu, logvar, batch_dims, "gaussian_kl")
    return latent_kl(mu, logvar, groups)


def latent_kl(mu: Tensor, logvar: Tensor, groups: int | None = None) -> Tensor:
    """`gaussian_kl` of the last dimension, whatever the others are."""
    if groups is not None:
        groups = groups if isinstance(groups, int) else converted("groups", groups, int)
        D = mu.shape[-1] if mu.dim() else 0
        if groups < 1 or D % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of the {D} dimensions of mu")
        mu, logvar = (t.unflatten(-1, (groups, D // groups)) for t in (mu, logvar))
    return _gaussian_kl(mu, logvar)


# ---- the likelihood -------------------------------------------------------------------------------------------------


def _in_float32_on_cpu(t: Tensor) -> bool:
    """Whether a gradient for each row's upstream gradient is to be taken ahead and multiplied afterwards. In half
    precision it would be rounded twice; on a GPU that pass over memory costs what the other saved."""
    return t.dtype == torch.float32 and t.is_cpu


def likelihood_formula(p0, x, p1, likelihood, scalar, x_scale):
    """The op `log_prob` in plain PyTorch."""
    return FORMULAS[likelihood](p0, x, scalar if p1 is None else p1, x_scale)


# By the names of csrc/formulas/likelihood_list.h: log p(x|z) of (p0, x, p1 or the likelihood's number, x_scale).
FORMULAS: dict[str, Formula] = {name: f for cls in REGISTRY.values() for name, f in cls.formulas().items()}


def _needs_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


log_prob_and_grad = _ops.log_prob_and_grad.default


def _log_prob_with_grad(p0, x, p1, *options):
    return log_prob_and_grad(p0, x, p1, *options, 1.0, 3 if _needs_gradient(p1) else 1)


def _times_rows(gradient: Tensor, grad: Tensor) -> Tensor:
    """`gradient`, taken for an upstream gradient of 1 a row, for that of `grad`."""
    grad = grad.unsqueeze(-1)
    return gradient * grad if kept_graph() else gradient.mul_(grad)


def _log_prob_grad(tensors, options, grad0, grad1, grad):
    return _times_rows(grad0, grad), _times_rows(grad1, grad) if _needs_gradient(tensors[2]) else None


def _all_in_float32(p0, x, p1, *_):
    return _in_float32_on_cpu(p0) and (p1 is None or p1.dtype == torch.float32)


def goes_ahead(p0: Tensor, x: Tensor, p1: Tensor | None) -> bool:
    """Whether the gradients of a sum of log p(x|z) are to be taken in its forward pass: as of an op with `Ahead`."""
    if on_reference(p0) or _is_compiling():
        return False
    needed = (p0.requires_grad or _needs_gradient(p1)) and _grad_enabled()
    return needed and _all_in_float32(p0, x, p1)


log_prob_op = differentiable(
    "log_prob",
    3,
    (0, 2),
    likelihood_formula,
    lambda p0, *_: p0.new_empty(p0.shape[:-1], dtype=torch.float32),
    only_needed=True,
    ahead=Ahead(_all_in_float32, _log_prob_with_grad, _log_prob_grad),
)


@torch.library.register_fake("aevb::log_prob_and_grad")
def _(p0, x, p1, likelihood, scalar, x_scale, grad_scale, needs):
    grads = [_fake_gradient(t, p0, need) for t, need in zip((p0, p1), from_bits(needs, 2), strict=True)]
    return p0.new_empty(p0.shape[:-1], dtype=torch.float32), *grads


@torch.library.register_fake("aevb::log_prob_and_grad_")
def _(p0, x, likelihood, scalar, x_scale, grad_scale):
    return p0.new_empty(p0.shape[:-1], dtype=torch.float32)


def on_reference(t: Tensor) -> bool:
    """Whether what is computed from t is, outside of graphs, computed by the reference; the first time says why."""
    if _functorch_active():
        return True
    if not _reference_on or (t.is_cpu and "cpu" not in _reference_on):  # a device's name takes half a microsecond
        return False
    if t.device.type not in _reference_on:
        return False
    if not _is_compiling():
        _say_why(t.device.type)
    return True


def bernoulli_log_prob(
    logits: Tensor, x: Tensor, x_scale: float | None = None, *, validate_args: bool | None = None
) -> Tensor:
    """log p(x|z) of a Bernoulli decoder, from its logits, summed over the last dimension.

    ``sum_i (x_i l_i - log(1 + exp(l_i)))`` (Kingma & Welling 2013, appendix C.1), finite for any finite logit.

    Args:
        logits: (..., D), float32, bfloat16 or float16; the arithmetic is float32. It may have extra leading dimensions
            of samples: x is used again for each, never expanded.
        x: (..., D): targets in [0, 1], soft ones too; bool or floating, or uint8 with x_scale.
        x_scale: multiplies x: 1/255 for pixels in 0..255, 1 for uint8 in {0, 1}.
        validate_args: look at the values, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), logits' leading dimensions, float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: targets outside [0, 1], when validated.
    """
    if not (type(logits) is Tensor is type(x)):
        check_dense("bernoulli_log_prob", logits=logits, x=x)
    if validate_args is not False and is_wanted("bernoulli_log_prob", validate_args, x):
        look_once("bernoulli_log_prob", validate_args, check_bernoulli, logits, x, x_scale, False)
    return log_prob_op(logits, x, None, "bernoulli_logits", 0.0, x_scale)


def gaussian_log_prob(
    mean: Tensor,
    x: Tensor,
    logvar: Tensor | float = 0.0,
    x_scale: float | None = None,
    *,
    sigmoid: bool = False,
    validate_args: bool | None = None,
) -> Tensor:
    """log p(x|z) of a Gaussian decoder, log N(x; m, exp(logvar)), summed over the last dimension.

    ``-1/2 sum_i ((x_i - m_i)^2 exp(-logvar_i) + logvar_i + log(2 pi))`` (Kingma & Welling 2013, appendix C.2), with m
    the mean, or its sigmoid, which keeps it within (0, 1) (section 5).

    Args:
        mean: (..., D), float32, bfloat16 or float16; the arithmetic is float32. It may have extra leading dimensions of
            samples: x is used again for each, never expanded. Any strides: mean and logvar may be the two halves of
            one (..., 2 D) output, which are read where they are.
        x: (..., D), floating, or bool, or uint8 with x_scale.
        logvar: the logarithm of the variance: a tensor of mean's shape, of a decoder that learns it for each element; a
            shared one that broadcasts to it, as (D,) and () do; or a number, a fixed variance. float32, bfloat16 or
            float16, whatever mean is. Below -176 the residual is divided by a standard deviation of e^-88.
        x_scale: multiplies x: 1/255 for pixels in 0..255, 1 for uint8 in {0, 1}.
        sigmoid: mean holds the logits of m.
        validate_args: look at the values, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), mean's leading dimensions, float32, in nats: the logarithm of a density, which may be above 0.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: a number for logvar that is not finite; an
        x that is not, when validated.
    """
    if not (type(mean) is Tensor is type(x)):
        check_dense("gaussian_log_prob", mean=mean, x=x)
    if validate_args is not False and is_wanted("gaussian_log_prob", validate_args, x):
        look_once("gaussian_log_prob", validate_args, check_gaussian, mean, x, x_scale, sigmoid)
    return likelihood_log_prob(_SIGMOID if sigmoid else _GAUSSIAN, (mean, logvar), x, x_scale)


def log_prob(
    likelihood: Likelihood | str,
    params: Tensor | tuple[Parameter, ...],
    x: Tensor,
    x_scale: float | None = None,
    *,
    validate_args: bool | None = None,
) -> Tensor:
    """log p(x|z) of any likelihood, summed over the last dimension.

    Args:
        likelihood: an object of `aevb.likelihoods`, or the name of one with its options as they are by default.
        params: its parameters, each (..., D): a tensor, or a tuple in the order of its `params`. The first is float32,
            bfloat16 or float16, of any strides, and may have extra leading dimensions of samples. A second one has its
            shape, or is shared: (D,), (), or a number.
        x: (..., D): floating, bool, or uint8 with x_scale; used again for each sample, never expanded.
        x_scale: multiplies x: 1/255 for pixels in 0..255.
        validate_args: look at the values, as `FusedELBO` does; None: at the first call in a process.

    Returns:
        (...,), the first parameter's leading dimensions, float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: an unknown likelihood, parameters of
            another one, or x outside its support, when validated.
    """
    family = named(likelihood) if isinstance(likelihood, str) else likelihood
    params = family.parameters(params)
    first = params[0]
    if not (type(first) is Tensor is type(x)):
        check_dense("log_prob", **{family.params[0]: first, "x": x})
    if validate_args is not False and is_wanted(key := f"log_prob, {family.name}", validate_args, x):
        look_once(key, validate_args, functools.partial(check_likelihood, family), first, x, x_scale)
    return likelihood_log_prob(family, params, x, x_scale)


def sample_likelihood(
    likelihood: Likelihood | str, params: Tensor | tuple[Parameter, ...], *, seed: Tensor | int
) -> Tensor:
    """Samples x of p(x|z), of the first parameter's shape.

    A function of the seed: element i is made of the i-th standard normal of `seed`, by the inverse of the likelihood's
    distribution function where it has no shorter way.

    Args:
        likelihood, params: those of `log_prob`.
        seed: an int, or an int64 tensor whose shape is a prefix of the parameters', one for each block.

    Returns:
        x, in the first parameter's shape and dtype, float32 where that is a half; without a gradient.

    Raises:
        ValueError: an unknown likelihood, or parameters of another one.
    """
    family = named(likelihood) if isinstance(likelihood, str) else likelihood
    with torch.no_grad():
        params = tuple(computed(p) if isinstance(p, Tensor) else p for p in family.parameters(params))
        first = params[0]
        assert isinstance(first, Tensor)
        noise = _noise(int64(seed, "seed").to(first.device), tuple(first.shape)).to(first.dtype)
        return family.sample(params, noise)


def likelihood_log_prob(family: Likelihood, params: tuple[Parameter, ...], x: Tensor, x_scale: float | None) -> Tensor:
    """log p(x|z) of a likelihood, summed over the last dimension, from its parameters; no value is looked at."""
    p0, p1, *options = family.kernel_arguments(params)
    return log_prob_op(p0, x, p1, *options, x_scale)


# ---- the negative ELBO ----------------------------------------------------------------------------------------------

_REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}


def _scaled_beta(beta, beta_scale):
    return beta_scale if beta is None else beta * beta_scale


def _elbo_formula(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, likelihood, x_scale):
    kl = mu_or_kl if logvar is None else reference.gaussian_kl(mu_or_kl, logvar)
    log_prob = reference.log_prob_of_samples(FORMULAS[likelihood], recon, x, kl.dim(), x_scale)
    return reference.reduced(_scaled_beta(beta, beta_scale) * kl - log_prob.mean(0), _REDUCTION_NAMES[reduction])


def _elbo_fake(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, *_):
    batch = mu_or_kl.shape if logvar is None else mu_or_kl.shape[:-1]
    return recon.new_empty(batch if reduction == REDUCTIONS["none"] else (), dtype=torch.float32)


@torch.library.register_fake("aevb::negative_elbo_and_grad")
def _(recon, *args):
    return _elbo_fake(recon, *args), _fake_gradient(recon, recon, True)


@torch.library.register_fake("aevb::negative_elbo_backward_")
def _(recon, x, mu_or_kl, logvar, *_):
    return _fake_gradient(mu_or_kl, recon, True), _fake_gradient(logvar, recon, True)


def _elbo_grad(tensors, options, grad_recon, grad):
    """Recon's gradient for an upstream gradient of 1, with which `loss.backward()` begins. Any other multiplies it, or
    in half precision, which would be rounded twice, takes the backward kernel. On a GPU, whose numbers the host would
    have to wait for, the kernel itself looks whether there is something left to do."""
    if grad.is_cpu:
        is_1 = float(grad) == 1
        if not is_1 and grad_recon.dtype != torch.float32:
            return None
        _, grad_mu_or_kl, grad_logvar = _elbo_backward(*tensors, *options, grad, 6)
        if kept_graph():
            grad_recon = grad_recon * grad
        elif not is_1:
            grad_recon.mul_(grad)
    elif kept_graph():
        grad_recon, grad_mu_or_kl, grad_logvar = _elbo_backward(*tensors, *options, grad, 7)
    else:
        grad_mu_or_kl, grad_logvar = _elbo_backward_unless_1(*tensors, *options, grad, grad_recon)
    return grad_recon, grad_mu_or_kl, None if tensors[3] is None else grad_logvar


_elbo_backward = _ops.negative_elbo_backward.default
_elbo_backward_unless_1 = _ops.negative_elbo_backward_.default
_negative_elbo = differentiable(
    "negative_elbo",
    5,
    (0, 2, 3),
    _elbo_formula,
    _elbo_fake,
    only_needed=True,
    ahead=Ahead(lambda *args: args[6] != REDUCTIONS["none"], _ops.negative_elbo_and_grad.default, _elbo_grad),
)


def negative_elbo(recon, x, mu, logvar, kl, beta, reduction: int, likelihood: str, x_scale: float | None) -> Tensor:
    """The loss of `FusedELBO`, one autograd node from its arguments; `reduction` is a value of REDUCTIONS."""
    beta, beta_scale = (beta, 1.0) if isinstance(beta, Tensor) else (None, float(beta))
    of_posterior = (mu, logvar) if kl is None else (kl, None)
    return _negative_elbo(recon, x, *of_posterior, beta, beta_scale, reduction, likelihood, x_scale)


def reconstruction_log_prob(
    family: Likelihood, recon: Tensor, x: Tensor, rows: tuple[int, ...], x_scale: float | None
) -> Tensor:
    """log p(x|z), (L, *batch), of recon (L, *batch, *datapoint) and x (*batch, *datapoint); `rows` is (L, *batch). The
    datapoint may be laid out differently in the two."""
    fits = tuple(x.shape[: len(rows) - 1]) == rows[1:] and tuple(recon.shape[: len(rows)]) == rows
    if not fits or recon[:1].numel() != x.numel():
        raise ValueError(
            f"recon has shape {tuple(recon.shape)}, x {tuple(x.shape)} and kl {rows}; expected recon (L, *batch, "
            "*datapoint), x (*batch, *datapoint) and kl (L, *batch). With a decoder that takes one batch dimension: "
            "decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])"
        )
    pixels = x.shape[len(rows) - 1 :].numel()
    flat_recon, flat_x = recon.reshape(*rows, pixels), x.reshape(*rows[1:], pixels)
    return likelihood_log_prob(family, (flat_recon,), flat_x, x_scale)
