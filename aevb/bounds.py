"""Lower bounds of log p(x) from samples, and what is done to their KL while training.

Everything here is a short function of numbers that the ops return, one a sample or a datapoint, in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .likelihoods.values import check_beta


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
    """The evidence lower bound of each datapoint, as SGVB estimates it from L samples.

    * with the KL divergence of each datapoint, SGVB-B: ``1/L sum_l log p(x|z_l) - beta KL`` (Kingma & Welling 2013,
      eq. 7);
    * with ``log q(z|x) - log p(z)`` of each sample, SGVB-A: ``1/L sum_l (log p(x|z_l) - beta log_ratio_l)`` (eq. 6).

    Args:
        log_prob: (L, ...), log p(x|z) of each sample, in nats.
        kl: (...), as `sample_gaussian` returns it, or (L, ...), the log_ratio of `sample_gaussian_log_ratio`.
        beta: weight of the KL: a number or a tensor.

    Returns (...), in nats. Raises ValueError for shapes that do not fit, or a negative number for beta.
    """
    if not isinstance(beta, Tensor):
        check_beta(beta)
    _check_samples(log_prob, kl, "kl", per_sample=False)
    per_sample = kl.dim() == log_prob.dim()
    return log_prob.mean(0) - beta * (kl.mean(0) if per_sample else kl)


def importance_weighted_bound(log_prob: Tensor, log_ratio: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """The importance-weighted bound of each datapoint: ``log 1/L sum_l exp(log p(x|z_l) - beta log_ratio_l)``.

    With beta = 1 the summands are importance weights p(x, z) / q(z|x): the bound of Burda et al. 2015 (eq. 8), which
    grows with L from the ELBO towards log p(x). Its gradient weighs samples by their normalised weights.

    Args:
        log_prob: (L, ...), log p(x|z) of each sample, in nats.
        log_ratio: (L, ...), log q(z|x) - log p(z) of each, from `sample_gaussian_log_ratio`.
        beta: weight of the ratio.

    Returns (...), in nats. Raises ValueError for shapes that do not fit, or a negative number for beta.
    """
    if not isinstance(beta, Tensor):
        check_beta(beta)
    _check_samples(log_prob, log_ratio, "log_ratio", per_sample=True)
    return torch.logsumexp(log_prob - beta * log_ratio, 0) - math.log(log_prob.shape[0])


def free_bits(kl: Tensor, nats: float) -> Tensor:
    """The KL of each datapoint with at least `nats` of it free in each group of latent dimensions.

    A group counts ``max(nats, mean over the batch of its KL)`` (Kingma et al. 2016, "inverse autoregressive flow", eq.
    15): one whose KL is below is not pressed further, and has no gradient. Every datapoint of the batch gets its share,
    so that the mean over the batch is that sum over groups.

    Args:
        kl: (*batch, groups), from ``gaussian_kl(mu, logvar, groups)``.
        nats: what is free in a group.

    Returns (*batch,), in nats. Raises ValueError for a negative number.
    """
    if not nats >= 0:
        raise ValueError(f"free_bits is {nats}; expected nats from 0 up")
    batch_mean = kl.detach().flatten(0, -2).mean(0) if kl.dim() > 1 else kl.detach()
    return torch.where(batch_mean > nats, kl, nats).sum(-1)


def capacity(kl: Tensor, nats: Tensor | float) -> Tensor:
    """The distance of the batch's mean KL from a capacity: ``|mean KL - nats|`` (Burgess et al. 2018, eq. 8).

    Every datapoint of the batch gets its share, ``sign(mean KL - nats) (KL - nats)``: their mean is that.

    Args:
        kl: (*batch,), in nats.
        nats: the capacity C: a number or a 0-d tensor.

    Returns (*batch,), in nats.
    """
    return torch.sign(kl.detach().mean() - nats) * (kl - nats)


def linear_warmup(step: int, steps: int, *, start: float = 0.0, end: float = 1.0) -> float:
    """beta that grows evenly from `start` at step 0 to `end` at step `steps`, and stays there (Bowman et al. 2016).

    With ``criterion = FusedELBO(beta=torch.tensor(0.0))``: ``criterion.beta.fill_(linear_warmup(step, 10_000))``.
    Raises ValueError for a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected a number from 0 up")
    step = max(step, 0)
    return end if step >= steps else start + (end - start) * (step / steps)


def cyclical_warmup(
    step: int, steps: int, *, cycles: int = 4, ratio: float = 0.5, start: float = 0.0, end: float = 1.0
) -> float:
    """beta through `cycles` linear warm-ups in `steps` steps; then it stays at `end` (Fu et al. 2019, eq. 6).

    Of each cycle the first part, `ratio`, grows from `start` to `end`, and the rest stays at `end`.
    Raises ValueError for numbers out of range.
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
