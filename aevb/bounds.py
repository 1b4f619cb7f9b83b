"""Lower bounds of log p(x), and KL weights and thresholds for training.

The bounds, `free_bits` and `capacity` take log-likelihoods and KL divergences from the ops, in nats, one per sample or
datapoint. The warm-ups give beta, the weight of the KL, for a training step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks.arguments import check_beta


def _check_samples(log_prob: Tensor, kl: Tensor, name: str, *, per_sample: bool) -> None:
    expected = [tuple(log_prob.shape)] if per_sample else [tuple(log_prob.shape[1:]), tuple(log_prob.shape)]
    if log_prob.dim() == 0 or tuple(kl.shape) not in expected:
        raise ValueError(
            f"log_prob has shape {tuple(log_prob.shape)} and {name} {tuple(kl.shape)}; expected log_prob (L, ...) with "
            f"samples in its first dimension, and {name} " + ("of its shape" if per_sample else "(...) or (L, ...)")
        )
    if log_prob.shape[0] == 0:
        raise ValueError("log_prob has no samples; expected at least one in its first dimension")


def elbo(log_prob: Tensor, kl: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Returns the ELBO of each datapoint by SGVB from L samples.

    * SGVB-B, with the KL divergence of each datapoint: ``1/L sum_l log p(x|z_l) - beta KL`` (Kingma & Welling 2013, eq.
      7).
    * SGVB-A, with ``log q(z|x) - log p(z)`` of each sample: ``1/L sum_l (log p(x|z_l) - beta log_ratio_l)`` (eq. 6).

    Args:
        log_prob: (L, ...), log p(x|z) of each sample, in nats.
        kl: (...), the KL divergence from `sample_gaussian`, or (L, ...), the log_ratio from
            `sample_gaussian_log_ratio`.
        beta: Weight of the KL: a number or a tensor.

    Returns:
        The ELBO, (...), in nats.

    Raises:
        ValueError: Shapes that do not fit, no samples, or a number for beta that is negative or not finite.
    """
    if not isinstance(beta, Tensor):
        check_beta(beta)
    _check_samples(log_prob, kl, "kl", per_sample=False)
    per_sample = kl.dim() == log_prob.dim()
    return log_prob.mean(0) - beta * (kl.mean(0) if per_sample else kl)


def importance_weighted_bound(log_prob: Tensor, log_ratio: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Returns the importance-weighted bound of each datapoint.

    The bound is ``log 1/L sum_l exp(log p(x|z_l) - beta log_ratio_l)``. With beta = 1 the summands are the importance
    weights p(x, z) / q(z|x). This is the bound of Burda et al. 2015 (eq. 8), which grows with L from the ELBO towards
    log p(x). Its gradient weighs samples by their normalised weights.

    Args:
        log_prob: (L, ...), log p(x|z) of each sample, in nats.
        log_ratio: (L, ...), log q(z|x) - log p(z) of each sample, from `sample_gaussian_log_ratio`.
        beta: Weight of the log-ratio: a number or a tensor.

    Returns:
        The bound, (...), in nats.

    Raises:
        ValueError: Shapes that do not fit, no samples, or a number for beta that is negative or not finite.
    """
    if not isinstance(beta, Tensor):
        check_beta(beta)
    _check_samples(log_prob, log_ratio, "log_ratio", per_sample=True)
    return torch.logsumexp(log_prob - beta * log_ratio, 0) - math.log(log_prob.shape[0])


def free_bits(kl: Tensor, nats: float) -> Tensor:
    """Returns the KL of each datapoint with `nats` free per latent group.

    Each group counts ``max(nats, mean over the batch of its KL)`` (Kingma et al. 2016, "inverse autoregressive flow",
    eq. 15). A group whose mean KL is below `nats` is not pressed further: its gradient is 0. Every datapoint gets its
    share, so that the mean over the batch is the sum of these maxima over the groups.

    Args:
        kl: (*batch, groups), from ``gaussian_kl(mu, logvar, groups)``, in nats.
        nats: Free KL per group.

    Returns:
        The KL, (*batch,), in nats.

    Raises:
        ValueError: A negative number of nats.
    """
    if not nats >= 0:
        raise ValueError(f"free_bits is {nats}; expected nats from 0 up")
    batch_mean = kl.detach().flatten(0, -2).mean(0) if kl.dim() > 1 else kl.detach()
    return torch.where(batch_mean > nats, kl, nats).sum(-1)


def capacity(kl: Tensor, nats: Tensor | float) -> Tensor:
    """Returns each datapoint's share of the distance |mean KL - capacity|.

    The batch mean of the result is ``|mean KL - nats|`` (Burgess et al. 2018, eq. 8). The share of a datapoint is
    ``sign(mean KL - nats) (KL - nats)``.

    Args:
        kl: (*batch,), in nats.
        nats: The capacity C: a number or a 0-d tensor.

    Returns:
        The shares, (*batch,), in nats.
    """
    return torch.sign(kl.detach().mean() - nats) * (kl - nats)


def linear_warmup(step: int, steps: int, *, start: float = 0.0, end: float = 1.0) -> float:
    """Returns beta of a linear warm-up from `start` to `end`.

    beta grows evenly from `start` at step 0 to `end` at step `steps`, and stays there (Bowman et al. 2016). For
    ``criterion = FusedELBO(beta=torch.tensor(0.0))``, call ``criterion.beta.fill_(linear_warmup(step, 10_000))``.

    Args:
        step: Number of the training step, from 0.
        steps: Number of steps of the warm-up; with 0, beta is always `end`.
        start: beta at step 0.
        end: beta from step `steps` on.

    Raises:
        ValueError: A negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected a number from 0 up")
    step = max(step, 0)
    return end if step >= steps else start + (end - start) * (step / steps)


def cyclical_warmup(
    step: int, steps: int, *, cycles: int = 4, ratio: float = 0.5, start: float = 0.0, end: float = 1.0
) -> float:
    """Returns beta of `cycles` linear warm-ups within `steps` steps.

    In the first part of each cycle, `ratio` of its length, beta grows from `start` to `end`. It stays at `end` for the
    rest of the cycle, and after the last cycle (Fu et al. 2019, eq. 6).

    Args:
        step: Number of the training step, from 0.
        steps: Number of steps of all cycles together; with 0, beta is always `end`.
        cycles: Number of cycles, at least 1.
        ratio: Part of each cycle in which beta grows, in [0, 1].
        start: beta at the start of a cycle.
        end: beta at the end of each warm-up.

    Raises:
        ValueError: Negative `steps`, fewer than 1 cycle, or a ratio outside [0, 1].
    """
    if steps < 0 or cycles < 1 or not 0 <= ratio <= 1:
        raise ValueError(
            f"steps is {steps}, cycles {cycles}, ratio {ratio}; expected steps from 0 up, at least 1 cycle, and a "
            "ratio in [0, 1]"
        )
    step = max(step, 0)
    if step >= steps:
        return end
    position = step * cycles / steps % 1.0
    return end if position >= ratio else start + (end - start) * position / ratio
