"""Gaussian posterior q(z|x): reparameterised samples, KL divergences and log-density ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks.arguments import converted
from ..checks.batch_dims import latents, matched, shaped
from ..checks.choices import GRADIENTS, unknown
from ..checks.errors import check_dense
from ..checks.priors import Prior, Range, check_own_parameters, checked_prior, checked_range, rows_of
from ..checks.seeds import Generators, check_generators, check_seed, int64
from .autograd import DifferentiableOp, Function, is_batched, on_reference
from .random import draw_seed, mix_seed, noise_of


def _sample_size(mu: Tensor, num_samples: int | None) -> tuple[int, ...]:
    return tuple(mu.shape) if num_samples is None else (num_samples, *mu.shape)


def _sample_formula(mu, logvar, seed, num_samples):
    return reference.sample_gaussian(mu, logvar, num_samples, eps=noise_of(seed, _sample_size(mu, num_samples)))


def _sample_fake(mu, logvar, seed, num_samples):
    return mu.new_empty(_sample_size(mu, num_samples)), mu.new_empty(mu.shape[:-1], dtype=torch.float32)


_sample_gaussian = DifferentiableOp("sample_gaussian", 3, (0, 1), _sample_formula, _sample_fake)


def _log_ratio_formula(mu, logvar, seed, num_samples, gradient):
    size = _sample_size(mu, num_samples)
    eps = noise_of(seed, size)
    return reference.sample_gaussian_log_ratio(mu, logvar, num_samples, gradient=GRADIENTS[gradient], eps=eps)


def _log_ratio_fake(mu, logvar, seed, num_samples, gradient):
    size = _sample_size(mu, num_samples)
    return mu.new_empty(size), mu.new_empty(size[:-1], dtype=torch.float32)


def weigh_samples(options, grads):
    """Returns (grad_z, grad_log_ratio, sample_weight) for the backward kernel of `sample_gaussian_log_ratio`."""
    gradient = options[1]
    grad_z, grad_log_ratio = grads
    if GRADIENTS[gradient] != "doubly_reparameterized" or grad_log_ratio is None:
        return grad_z, grad_log_ratio, None
    weight = reference.sample_weights(grad_log_ratio)
    return grad_z, weight * grad_log_ratio, weight


_sample_gaussian_log_ratio = DifferentiableOp(
    "sample_gaussian_log_ratio", 3, (0, 1), _log_ratio_formula, _log_ratio_fake, weigh_samples
)
_gaussian_kl = DifferentiableOp(
    "gaussian_kl",
    2,
    (0, 1),
    reference.gaussian_kl,
    lambda mu, logvar: mu.new_empty(mu.shape[:-1], dtype=torch.float32),
)


# ---- with a prior, or a range of logvar ------------------------------------------------------------------------------


def _prior_of(prior_mu, prior_logvar, low, high) -> dict[str, Any]:
    return {
        "prior": None if prior_mu is None else (prior_mu, prior_logvar),
        "logvar_range": None if low is None else (low, high),
    }


def _sample_with_prior_formula(mu, logvar, prior_mu, prior_logvar, seed, num_samples, low, high):
    eps = noise_of(seed, _sample_size(mu, num_samples))
    return reference.sample_gaussian(mu, logvar, num_samples, eps=eps, **_prior_of(prior_mu, prior_logvar, low, high))


def _log_ratio_with_prior_formula(mu, logvar, prior_mu, prior_logvar, seed, num_samples, gradient, low, high):
    eps = noise_of(seed, _sample_size(mu, num_samples))
    return reference.log_ratio_of(mu, logvar, eps, GRADIENTS[gradient], **_prior_of(prior_mu, prior_logvar, low, high))


_ALL = (0, 1, 2, 3)
_sample_with_prior = DifferentiableOp(
    "sample_gaussian_with_prior",
    5,
    _ALL,
    _sample_with_prior_formula,
    lambda mu, logvar, prior_mu, prior_logvar, seed, num_samples, *_: _sample_fake(mu, logvar, seed, num_samples),
    only_needed=True,
)
_log_ratio_with_prior = DifferentiableOp(
    "sample_gaussian_log_ratio_with_prior",
    5,
    _ALL,
    _log_ratio_with_prior_formula,
    lambda mu, logvar, prior_mu, prior_logvar, seed, n, gradient, *_: _log_ratio_fake(mu, logvar, seed, n, gradient),
    lambda options, grads: (*weigh_samples(options, grads), grads[1]),
    only_needed=True,
)
_kl_with_prior = DifferentiableOp(
    "gaussian_kl_with_prior",
    4,
    _ALL,
    lambda mu, logvar, *of_prior: reference.gaussian_kl(mu, logvar, **_prior_of(*of_prior)),
    lambda mu, *_: mu.new_empty(mu.shape[:-1], dtype=torch.float32),
    only_needed=True,
)


class _Expanded(Function):
    """`Tensor.expand` whose gradient is summed in the order of a bias's gradient, the same on every device."""

    public = "sample_gaussian"

    @staticmethod
    def forward(ctx, t, shape):
        ctx.given = t.shape
        return t.expand(shape)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or is_batched(grad):
            return grad.sum_to_size(ctx.given), None
        given = (1,) * (grad.dim() - len(ctx.given)) + tuple(ctx.given)
        summed = [d for d, size in enumerate(given) if size != grad.shape[d]]
        kept = [d for d in range(grad.dim()) if d not in summed]
        rows = grad.permute(*summed, *kept).reshape(-1, math.prod(grad.shape[d] for d in kept)).contiguous()
        return _sum_of_rows(rows, rows, 0)[1].reshape(ctx.given), None


_sum_of_rows = torch.ops.aevb.activation_backward.default


def _expanded(t: Tensor, shape: Sequence[int]) -> Tensor:
    if t.shape == torch.Size(shape) or not t.requires_grad or torch.compiler.is_compiling() or on_reference(t):
        return t.expand(shape)
    return _Expanded.apply(t, shape)


def _prior_rows(
    prior: Prior | None, mu: Tensor, batch_dims: int | None, reader: str, own_parameters: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Returns prior_mu and prior_logvar in float32, each (D,) for all rows or (*batch, D), or None twice."""
    if prior is None:
        return None, None
    prior = checked_prior(prior, reader)
    if own_parameters:
        check_own_parameters(prior, 1 if batch_dims is None else mu.dim() - batch_dims)
    prior_mu, prior_logvar = (
        rows_of(
            name, t if t.dtype == torch.float32 or mu.dtype == torch.float64 else t.float(), mu, batch_dims, _expanded
        )
        for name, t in zip(("prior_mu", "prior_logvar"), prior, strict=True)
    )
    return prior_mu, prior_logvar


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """Reparameterised sample of N(mu, exp(logvar)) and its KL divergence from the prior.

    Both come from one pass. ``z = mu + exp(logvar / 2) * eps`` with eps standard normal, and
    ``KL = 0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, eq. 4 and appendix B), of
    N(0, I). For another prior see `gaussian_kl`.

    eps is not stored: it is a function of the seed and the element's position (Philox4x32-10 and Box-Muller). The
    backward pass computes it again. The same seed gives the same bits on every instruction set and any number of
    threads.

    Args:
        mu: (..., D), float32, bfloat16 or float16; the arithmetic is float32. Any strides.
        logvar: as mu, of its dtype.
        num_samples: None, or the number L of samples for each posterior.
        prior: as for `gaussian_kl`. It has no dimension of samples: one that differs between them needs them in the
            batch.
        logvar_range: as for `gaussian_kl`; z has the clamped logvar too.
        batch_dims: how many leading dimensions are the batch: 1 for mu (B, C, H, W). All later dimensions are latent,
            and the KL is summed over them. By default all but the last are the batch; for mu of more than two
            dimensions, a warning says so once.
        seed: an int, or an int64 tensor of shape () or of the first dimensions of z. Each seed of a tensor numbers its
            own part of z from 0, so that noise can belong to a datapoint (see `mix_seed`). By default one is drawn from
            `generator`, or from PyTorch's default generator, which `torch.manual_seed` governs.
        generator: where to draw the seed from; on the device of mu. Or a list of one for each datapoint, whose noise
            is then its own.

    Returns:
        z: (..., D), or (L, ..., D) with num_samples=L, in mu's dtype; kl: (...,), or (*batch,), float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a generator on another device, or together with a seed; batch_dims that leave no latent dimension;
            a prior that does not broadcast to mu; a logvar_range that is none.
    """
    return sampled(mu, logvar, num_samples, None, batch_dims, seed, generator, "sample_gaussian", prior, logvar_range)


def sampled(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    gradient: str | None,
    batch_dims: int | None,
    seed: Tensor | int | None,
    generator: Generators | None,
    reader: str,
    prior: Prior | None = None,
    logvar_range: Range | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_gaussian`, or `sample_gaussian_log_ratio` if `gradient` is not None.

    `reader` is the function's name in error messages.
    """
    if not (type(mu) is Tensor is type(logvar)):
        check_dense(reader, mu=mu, logvar=logvar)
    if num_samples is not None and not isinstance(num_samples, int):
        num_samples = converted("num_samples", num_samples, int)
    mu, logvar = flat_mu, flat_logvar = matched(mu, logvar)
    if batch_dims is not None or mu.dim() > 2:
        flat_mu, flat_logvar = latents(mu, logvar, batch_dims, reader)
        check_seed(seed, batch_dims, num_samples)
    seed = _seed(flat_mu, seed, generator, num_samples)
    if prior is not None or logvar_range is not None:
        of_prior = _prior_rows(prior, mu, batch_dims, reader, gradient == "doubly_reparameterized")
        low, high = (None, None) if logvar_range is None else checked_range(logvar_range)
        if gradient is None:
            z, found = _sample_with_prior(flat_mu, flat_logvar, *of_prior, seed, num_samples, low, high)
        else:
            code = GRADIENTS.index(gradient)
            z, found = _log_ratio_with_prior(flat_mu, flat_logvar, *of_prior, seed, num_samples, code, low, high)
    elif gradient is None:
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
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """Reparameterised sample z of q and log q(z) - log p(z).

    Both come from one pass, for q = N(mu, exp(logvar)) and p = N(0, I), or another prior. ``z = mu + exp(logvar / 2) *
    eps``, the z of `sample_gaussian` for the same seed, and ``log_ratio = 0.5 * sum_j (z_j^2 - eps_j^2 - logvar_j)``.
    The formula is computed so that nothing cancels where the posterior is close to the prior.

    The expectation of log_ratio is the KL divergence: it is the Monte Carlo KL of SGVB-A (Kingma & Welling 2013, eq.
    6). ``log p(x|z) - log_ratio`` is the logarithm of an importance weight (Burda et al. 2015).

    Args:
        mu: (..., D), as for `sample_gaussian`.
        logvar: (..., D), as for `sample_gaussian`.
        num_samples: as for `sample_gaussian`.
        gradient: which gradient mu and logvar receive.

            * "total": the full gradient.
            * "path": only the part by way of z; as parameters of log q(z), mu and logvar count as constants. The term
              left out has expectation zero ("sticking the landing", Roeder et al. 2017, eq. 7).
            * "doubly_reparameterized": the path gradient, with each sample's part times its normalised importance
              weight. With `importance_weighted_bound` it is the gradient of Tucker et al. 2018 (DReG, eq. 8). The
              weights are read from the upstream gradient of log_ratio. That must be the weights times one number for
              each datapoint, as the bound's is. If it is 0 for all samples of a datapoint, mu and logvar get no
              gradient from them.

            The prior's own tensors receive the full gradient of -log p(z) with z at its place, whatever this is. So
            the doubly reparameterized gradient needs a prior with parameters of its own (Bauer & Mnih 2021): one of
            mu's batch, which was computed for each datapoint, must not have a gradient.
        prior: as for `sample_gaussian`: ``log_ratio`` is that of mu and logvar as `gaussian_kl` has them.
        logvar_range: as for `sample_gaussian`.
        batch_dims: as for `sample_gaussian`.
        seed: as for `sample_gaussian`.
        generator: as for `sample_gaussian`.

    Returns:
        z: (..., D), or (L, ..., D) with num_samples=L, in mu's dtype; log_ratio: z's shape without the latent
        dimensions, float32, in nats. It belongs to the z of float32 arithmetic, before a half-precision z is rounded.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another gradient; "doubly_reparameterized" without num_samples, or for a prior that depends on what
            else was computed; or the reasons of `sample_gaussian`.
    """
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if gradient == "doubly_reparameterized" and num_samples is None:
        raise ValueError("the doubly reparameterized gradient weighs samples against each other; give num_samples")
    return sampled(
        *(mu, logvar, num_samples, gradient, batch_dims, seed, generator),
        *("sample_gaussian_log_ratio", prior, logvar_range),
    )


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    groups: int | None = None,
    *,
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || prior), summed over latent dimensions or groups.

    ``0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, appendix B) for the prior N(0, I),
    computed so that nothing cancels where the posterior is close to the prior.

    For the prior N(prior_mu, exp(prior_logvar)) it is this formula with ``(mu - prior_mu) exp(-prior_logvar / 2)`` in
    place of mu and ``logvar - prior_logvar`` in place of logvar.

    Args:
        mu: (..., D), float32, bfloat16 or float16.
        logvar: (..., D), of mu's dtype.
        groups: None, or into how many groups of neighbouring dimensions D is divided; D for the KL of each dimension.
        prior: None for N(0, I), or (prior_mu, prior_logvar), each of mu's shape or of one that broadcasts to it. One
            that all datapoints share, (D,), is not expanded, and its gradient is summed in an order of its own, the
            same on every device. Any floating dtype; the arithmetic, and the gradient's sum, are float32.
        logvar_range: None, or (least, greatest): logvar is clamped as by `torch.clamp`, without a pass of its own. Its
            gradient is 0 beyond the range. prior_logvar is not clamped.
        batch_dims: how many leading dimensions are the batch: 1 for mu (B, C, H, W). All later dimensions are latent
            and flattened. By default all but the last are the batch; for mu of more than two dimensions, a warning says
            so once.

    Returns:
        (...,), or (..., groups), float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: groups that do not divide D; batch_dims that leave no latent dimension; a prior that does not
            broadcast to mu; a logvar_range that is none.
    """
    if not (type(mu) is Tensor is type(logvar)):
        check_dense("gaussian_kl", mu=mu, logvar=logvar)
    return kl_of("gaussian_kl", mu, logvar, groups, prior, logvar_range, batch_dims)


def kl_of(
    reader: str,
    mu: Tensor,
    logvar: Tensor,
    groups: int | None,
    prior: Prior | None,
    logvar_range: Range | None,
    batch_dims: int | None,
) -> Tensor:
    """`gaussian_kl`; `reader` is the function's name in error messages."""
    mu, logvar = flat, flat_logvar = matched(mu, logvar)
    if batch_dims is not None or mu.dim() > 2:
        flat, flat_logvar = latents(mu, logvar, batch_dims, reader)
    if prior is None and logvar_range is None:
        return latent_kl(flat, flat_logvar, groups)
    of_prior = _prior_rows(prior, mu, batch_dims, reader)
    return latent_kl(flat, flat_logvar, groups, of_prior, logvar_range)


def latent_kl(
    mu: Tensor,
    logvar: Tensor,
    groups: int | None = None,
    prior: tuple[Tensor | None, Tensor | None] = (None, None),
    logvar_range: Range | None = None,
) -> Tensor:
    """`gaussian_kl` over the last dimension, whatever the other dimensions are.

    The prior's tensors are float32, (D,) or of mu's shape.
    """
    if groups is not None:
        groups = groups if isinstance(groups, int) else converted("groups", groups, int)
        D = mu.shape[-1] if mu.dim() else 0
        if groups < 1 or D % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of the {D} dimensions of mu")
        shape, divided = mu.shape, (groups, D // groups)
        mu, logvar = (t.unflatten(-1, divided) for t in (mu, logvar))
        rows = [None if t is None else _expanded(t, shape).unflatten(-1, divided) for t in prior]
        prior = rows[0], rows[1]
    if prior[0] is None and logvar_range is None:
        return _gaussian_kl(mu, logvar)
    low, high = (None, None) if logvar_range is None else checked_range(logvar_range)
    return _kl_with_prior(mu, logvar, *prior, low, high)


def normals(seeds: Tensor, *size: int) -> Tensor:
    """Returns standard normals (*seeds.shape, *size), float32: prior samples by seed."""
    zero = torch.zeros((), device=seeds.device).expand(*seeds.shape, *size)
    return sample_gaussian(zero, zero, batch_dims=zero.dim() - 1, seed=seeds)[0]
