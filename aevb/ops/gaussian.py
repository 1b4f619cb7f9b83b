"""Gaussian posterior q(z|x): reparameterised samples, KL divergences and log-density ratios."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..checks.arguments import converted
from ..checks.batch_dims import latents, shaped
from ..checks.choices import GRADIENTS, unknown
from ..checks.errors import check_dense
from ..checks.seeds import Generators, check_generators, check_seed, int64
from .autograd import DifferentiableOp
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
    _, gradient = options
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


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """Reparameterised sample of N(mu, exp(logvar)) and its KL divergence from N(0, I).

    Both come from one pass. ``z = mu + exp(logvar / 2) * eps`` with eps standard normal, and
    ``KL = 0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, eq. 4 and appendix B).

    eps is not stored: it is a function of the seed and the element's position (Philox4x32-10 and Box-Muller). The
    backward pass computes it again. The same seed gives the same bits on every instruction set and any number of
    threads.

    Args:
        mu: (..., D), float32, bfloat16 or float16; the arithmetic is float32. Any strides.
        logvar: as mu, of its dtype.
        num_samples: None, or the number L of samples for each posterior.
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
    """`sample_gaussian`, or `sample_gaussian_log_ratio` if `gradient` is not None.

    `reader` is the function's name in error messages.
    """
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
    """Reparameterised sample z of q and log q(z) - log p(z).

    Both come from one pass, for q = N(mu, exp(logvar)) and p = N(0, I). ``z = mu + exp(logvar / 2) * eps``, the z of
    `sample_gaussian` for the same seed, and ``log_ratio = 0.5 * sum_j (z_j^2 - eps_j^2 - logvar_j)``. The formula is
    computed so that nothing cancels where the posterior is close to the prior.

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
        batch_dims: as for `sample_gaussian`.
        seed: as for `sample_gaussian`.
        generator: as for `sample_gaussian`.

    Returns:
        z: (..., D), or (L, ..., D) with num_samples=L, in mu's dtype; log_ratio: z's shape without the latent
        dimensions, float32, in nats. It belongs to the z of float32 arithmetic, before a half-precision z is rounded.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another gradient; "doubly_reparameterized" without num_samples; or the reasons of `sample_gaussian`.
    """
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if gradient == "doubly_reparameterized" and num_samples is None:
        raise ValueError("the doubly reparameterized gradient weighs samples against each other; give num_samples")
    return sampled(mu, logvar, num_samples, gradient, batch_dims, seed, generator, "sample_gaussian_log_ratio")


def gaussian_kl(mu: Tensor, logvar: Tensor, groups: int | None = None, *, batch_dims: int | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)), summed over latent dimensions or groups.

    ``0.5 * sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)`` (Kingma & Welling 2013, appendix B), computed so that
    nothing cancels where the posterior is close to the prior.

    Args:
        mu: (..., D), float32, bfloat16 or float16.
        logvar: (..., D), of mu's dtype.
        groups: None, or into how many groups of neighbouring dimensions D is divided; D for the KL of each dimension.
        batch_dims: how many leading dimensions are the batch: 1 for mu (B, C, H, W). All later dimensions are latent
            and flattened. By default all but the last are the batch; for mu of more than two dimensions, a warning says
            so once.

    Returns:
        (...,), or (..., groups), float32, in nats.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: groups that do not divide D; batch_dims that leave no latent dimension.
    """
    if not (type(mu) is Tensor is type(logvar)):
        check_dense("gaussian_kl", mu=mu, logvar=logvar)
    if batch_dims is not None or mu.dim() > 2:
        mu, logvar = latents(mu, logvar, batch_dims, "gaussian_kl")
    return latent_kl(mu, logvar, groups)


def latent_kl(mu: Tensor, logvar: Tensor, groups: int | None = None) -> Tensor:
    """`gaussian_kl` over the last dimension, whatever the other dimensions are."""
    if groups is not None:
        groups = groups if isinstance(groups, int) else converted("groups", groups, int)
        D = mu.shape[-1] if mu.dim() else 0
        if groups < 1 or D % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of the {D} dimensions of mu")
        mu, logvar = (t.unflatten(-1, (groups, D // groups)) for t in (mu, logvar))
    return _gaussian_kl(mu, logvar)


def normals(seeds: Tensor, *size: int) -> Tensor:
    """Returns standard normals (*seeds.shape, *size), float32: prior samples by seed."""
    zero = torch.zeros((), device=seeds.device).expand(*seeds.shape, *size)
    return sample_gaussian(zero, zero, batch_dims=zero.dim() - 1, seed=seeds)[0]
