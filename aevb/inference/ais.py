"""log p(x) by annealed importance sampling."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from ..likelihoods.values import check_pixels
from ..ops import mix_seed
from ..ops.gaussian import normals
from .protocols import (
    LatentVariableModel,
    check_counts,
    check_takes_weight,
    encoded_batch,
    in_batches,
    log_prob_observed,
    observed_part,
)
from .standardised import standardised

PILOT_CHAINS = 4  # chains that only adapt the step size
TARGET_ACCEPTANCE = 0.65
ADAPTATION = 0.2  # how far log(step size) moves for an acceptance that is off by 1
JITTER = 0.2  # a trajectory's step size is within this fraction of the adapted one


@dataclass(frozen=True, eq=False)
class AnnealedImportanceSampling:
    """Estimates of log p(x), one for each datapoint."""

    log_prob: Tensor
    """(B,), float64, in nats: log of the mean weight of the chains."""
    standard_error: Tensor
    """(B,), in nats: standard error of log_prob; NaN for one chain.

    It comes from the spread of the weights (the delta method). Where the effective sample size is near 1, do not
    trust it: the chains hardly saw the region that carries most weight.
    """
    effective_sample_size: Tensor
    """(B,), 1 to num_chains: (sum w)^2 / sum w^2."""
    acceptance_rate: Tensor
    """(B,), mean over chains and temperatures.

    NaN for one temperature, which has no transition.
    """
    log_weights: Tensor
    """(num_chains, B), float64, in nats."""


@takes_plain_values
def annealed_importance_sampling(
    model: LatentVariableModel,
    x: Tensor,
    *,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog: int = 10,
    seed: int = 0,
    start: Literal["prior", "posterior"] = "prior",
    batch_size: int = 100,
    observed: Tensor | None = None,
) -> AnnealedImportanceSampling:
    """Estimate of log p(x) by annealed importance sampling with Hamiltonian transitions.

    Sources: Neal 2001; Wu et al. 2017.

    A chain starts at z ~ f_0 = p(z), or q(z|x). It goes through ``f_t = f_0^(1 - b_t) (p(z) p(x|z))^b_t`` with
    ``0 = b_0 < ... < b_T = 1``, T = num_temperatures, the b evenly spaced on a sigmoid from -4 to 4. At each t its
    weight gains ``log w += log f_t(z) - log f_{t-1}(z)``. Then z makes one trajectory of num_leapfrog steps that leaves
    f_t in place, which is accepted or not. E[w] = p(x), so ``log_prob = log mean w`` over the chains is below log p(x)
    in expectation. The gap shrinks with more chains and temperatures. T = 1 is importance sampling from f_0.

    The step size is adapted towards an acceptance of 65%, as in the paper, but for each datapoint, and by 4 further
    chains. The weights of the pilots are not used, and the chains that count never touch the step size. Given the
    pilots, the step size is fixed for each t, so that E[w] = p(x) holds exactly. Adapting to the chains themselves
    would spoil that. The step size of each single trajectory is jittered by up to a fifth, against closed orbits (Neal
    2011).

    From the posterior, space is scaled by its standard deviations, and the chains have less far to go. From the prior,
    the chains find regions that q(z|x) hardly covers more readily.

    The cost is num_temperatures * num_leapfrog gradients of log p(x|z) with respect to z. Each is of batch_size *
    (num_chains + 4) decoded z. No gradient of a parameter is computed.

    Args:
        model: an object with `encode` and `log_prob`, the latter differentiable in z; its prior as for
            `aevb.log_marginal_likelihood`.
        x: (B, ...), the datapoints.
        num_chains: at least 1.
        num_temperatures: at least 1; the paper took thousands.
        num_leapfrog: at least 1.
        seed: all of the noise follows from it and the datapoint's index in x. The batches matter only where rounding
            turns an acceptance.
        start: "prior" or "posterior".
        batch_size: datapoints at a time.
        observed: bool, of x's shape or of a datapoint's: False where a value is missing. The estimate is then of log
            p(x_observed).

    Returns:
        The estimates of log p(x), their standard errors and the chains' weights.

    Raises:
        ValueError: an argument out of range; no datapoints; an encoder or log_prob with other shapes; an encoder with
            non-finite results; or a log_prob that is NaN at the start.
    """
    check_counts(
        num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog, batch_size=batch_size
    )
    if start not in ("prior", "posterior"):
        raise ValueError(f"start is {start!r}; expected 'prior' or 'posterior'")
    x, observed = observed_part(x, observed)
    if observed is not None:
        check_takes_weight(model)
    check_pixels(model, {"x": x})
    temperatures = _temperatures(num_temperatures)
    log_weights, acceptances = [], []
    # A caller's inference mode would leave nothing to differentiate.
    with torch.inference_mode(False), torch.no_grad():
        model = standardised(model)
        for first, batch in in_batches(x, batch_size):
            mask = None if observed is None else observed[first : first + len(batch)]
            path = _Path(model, batch.clone() if batch.is_inference() else batch, first, start, mask)
            keys = mix_seed(seed, torch.arange(first, first + len(batch), device=path.mean.device))
            weights, acceptance = _anneal(path, temperatures, num_chains, num_leapfrog, keys)
            log_weights.append(weights)
            acceptances.append(acceptance)
    return _summary(torch.cat(log_weights, 1), torch.cat(acceptances))


def _summary(log_weights: Tensor, acceptance: Tensor) -> AnnealedImportanceSampling:
    num_chains = len(log_weights)
    weights = (log_weights - log_weights.amax(0)).exp()
    mean = weights.mean(0)
    spread = weights.std(0) if num_chains > 1 else torch.full_like(mean, math.nan)
    return AnnealedImportanceSampling(
        log_prob=log_weights.logsumexp(0) - math.log(num_chains),
        standard_error=spread / (mean * math.sqrt(num_chains)),
        effective_sample_size=weights.sum(0).square() / weights.square().sum(0),
        acceptance_rate=acceptance,
        log_weights=log_weights,
    )


def _temperatures(count: int) -> list[float]:
    """Returns the temperatures b_0 = 0 to b_count = 1.

    They are evenly spaced on a sigmoid from -4 to 4.
    """
    sigmoid = [1 / (1 + math.exp(4 - 8 * t / count)) for t in range(count + 1)]
    first, last = sigmoid[0], sigmoid[-1]
    return [(s - first) / (last - first) for s in sigmoid]


class _Path:
    """Densities between f_0 and p(z) p(x|z) of a batch.

    The coordinates are u, in which f_0 is N(0, I).
    """

    def __init__(self, model: LatentVariableModel, x: Tensor, first: int, start: str, observed: Tensor | None):
        self.model, self.x, self.first, self.observed = model, x, first, observed
        mu, logvar = encoded_batch(model, x, first, observed)
        self.dtype = mu.dtype  # z's dtype for the model; the densities here are float32 at least
        mu, logvar = (t if t.dtype == torch.float64 else t.float() for t in (mu, logvar))
        prior = start == "prior"
        self.mean = torch.zeros_like(mu) if prior else mu
        self.scale = torch.ones_like(mu) if prior else (0.5 * logvar).exp()
        self.log_scale = 0 if prior else 0.5 * logvar.sum(-1)

    def log_ratio(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p(z) p(x|z) / f_0(z) and its gradient by u.

        The first is (S, B). z is z(u), for u (S, B, D).
        """
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            z = self.mean + self.scale * u
            log_prob = log_prob_observed(self.model, self.x, z.to(self.dtype), self.observed)
            if log_prob.shape != u.shape[:-1]:
                raise ValueError(
                    f"model.log_prob(x, z) has shape {tuple(log_prob.shape)} for z {tuple(z.shape)}; "
                    f"expected {tuple(u.shape[:-1])}: one log p(x|z) for each z"
                )
            ratio = log_prob.to(u.dtype) + 0.5 * (u.square() - z.square()).sum(-1) + self.log_scale
            (gradient,) = torch.autograd.grad(ratio.sum(), u)
        return ratio.detach(), gradient


def _anneal(
    path: _Path, temperatures: list[float], num_chains: int, num_leapfrog: int, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns log weights (num_chains, B) and acceptance rates (B,).

    The first chains are the pilots. They affect the others only by the step size.
    """
    batch, latent_dim = path.mean.shape
    chains = PILOT_CHAINS + num_chains

    def noise(step: int) -> Tensor:
        """Returns (chains, B, D + 2) standard normals."""
        return normals(mix_seed(keys, step), chains, latent_dim + 2).transpose(0, 1).to(path.mean.dtype)

    u = noise(0)[..., :latent_dim]
    ratio, gradient = path.log_ratio(u)
    _check_start(ratio, path.first)
    log_weights = torch.zeros(num_chains, batch, dtype=torch.float64, device=u.device)
    accepted = torch.zeros(batch, dtype=torch.float64, device=u.device)
    log_step = torch.full((batch,), math.log(0.5), dtype=u.dtype, device=u.device)
    for t, (before, now) in enumerate(itertools.pairwise(temperatures), start=1):
        log_weights += (now - before) * ratio[PILOT_CHAINS:].double()
        if t == len(temperatures) - 1:
            break  # a transition at temperature 1 would change no weight
        eps = noise(t)
        momentum, choice, jitter = eps[..., :latent_dim], eps[..., -2], eps[..., -1]
        step = (log_step.exp() * (1 + JITTER * (2 * torch.special.ndtr(jitter) - 1))).unsqueeze(-1)

        proposal, velocity = u, momentum + 0.5 * step * (now * gradient - u)
        for leap in range(num_leapfrog):
            proposal = proposal + step * velocity
            new_ratio, new_gradient = path.log_ratio(proposal)
            half = 0.5 if leap == num_leapfrog - 1 else 1.0
            velocity = velocity + half * step * (now * new_gradient - proposal)

        old_energy = 0.5 * (u.square() + momentum.square()).sum(-1) - now * ratio
        new_energy = 0.5 * (proposal.square() + velocity.square()).sum(-1) - now * new_ratio
        log_accept = (old_energy - new_energy).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        accept = torch.special.log_ndtr(choice) < log_accept
        u = torch.where(accept.unsqueeze(-1), proposal, u)
        ratio = torch.where(accept, new_ratio, ratio)
        gradient = torch.where(accept.unsqueeze(-1), new_gradient, gradient)

        accepted += accept[PILOT_CHAINS:].double().mean(0)
        log_step = log_step + ADAPTATION * (log_accept[:PILOT_CHAINS].clamp_max(0).exp().mean(0) - TARGET_ACCEPTANCE)
    transitions = len(temperatures) - 2
    return log_weights, accepted / transitions if transitions else torch.full_like(accepted, math.nan)


def _check_start(ratio: Tensor, first: int) -> None:
    wrong = ratio.isnan()
    if wrong.any():
        row = int(wrong.nonzero()[0, 1])
        raise ValueError(
            f"model.log_prob(x, z) is NaN for datapoint {first + row} at a z from the start; expected log p(x|z)"
        )
