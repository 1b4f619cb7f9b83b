"""Posterior of a clean image, given a part or a noisy version.

The model is the trained one, p(z) p(x|z). The observation is y, with a known p(y|x) that is independent for each pixel.
So p(y|z) is a product over pixels, in closed form, and p(z|y) is a posterior like any other. The encoder's q(z|y) is
only a start, since it never saw such images. Two methods improve on it:

* "gradient": for each datapoint, Adam on its own (mu, logvar) maximises the ELBO of y, ``E_q[log p(y|z)] - KL(q || p)``
  (semi-amortised: Kim et al. 2018). Then S samples get weights ``p(y|z) p(z) / r(z)``, normalised to a sum of 1. The
  weights correct the limits of a diagonal Gaussian (Mattei & Frellsen 2019, section 3, for missing pixels). The samples
  are drawn from a mixture, nine tenths of that q and a tenth of the prior, ``r = 0.9 q + 0.1 p``. So no weight is above
  10 p(y|z) (defensive importance sampling: Hesterberg 1995). The prior's share is ``S // 10`` samples, so the numbers
  are exact where S is a multiple of 10. A mode of p(z|y) that q does not reach is found where samples of the prior find
  it: with few latent dimensions. With many it is neither found nor seen in the effective sample size, which knows only
  the samples drawn.
* "gibbs": Metropolis-within-Gibbs (Mattei & Frellsen 2018, section 3), chains whose limit is p(z, x|y). The encoder
  proposes z at the present x, and the proposal is accepted or not; then x is drawn from p(x|y, z). Accepting always
  would be the pseudo-Gibbs of Rezende et al. (2014, appendix F). The chains start at draws of the q that the gradient
  found. They can leave its mode for another, in time.

Either method gives weighted samples of z, and the clean image's mean, ``sum_s w_s E[x|y, z_s]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from ..ops import mix_seed, sample_gaussian, sample_gaussian_log_ratio
from ..ops.gaussian import normals
from .noise_models import Observation, PixelModel
from .protocols import encoded
from .standardised import own_posterior, standardised, standardised_observation

BATCH = 100  # datapoints at a time
ROWS = 2048  # samples that the decoder sees at a time
REFINEMENT_SAMPLES = 2  # of z, for each step's gradient
LEARNING_RATE = 0.2
PRIOR_FRACTION = 10  # one importance sample in so many is from the prior
CHAINS = 10

Method = Literal["gradient", "gibbs"]


@dataclass(frozen=True, eq=False)
class Restoration:
    """Posterior moments and diagnostics of B clean images."""

    mean: Tensor
    """(B, data_dim): E[x|y], for bits the probability of each.

    A pixel that was observed without noise is unchanged.
    """
    variance: Tensor
    """(B, data_dim): Var[x_i|y] of each pixel."""
    log_prob: Tensor | None
    """(B, data_dim), in nats: log p(x_i|y) of the given clean image's pixels.

    It is 0 where a pixel was observed without noise. None without a clean image.
    """
    mu: Tensor
    """(B, latent_dim): mean of q(z) after refinement; with "gibbs" of the chains."""
    logvar: Tensor
    """(B, latent_dim): logarithm of the variance that belongs to mu."""
    effective_sample_size: Tensor | None
    """(B,), of num_samples: (sum w)^2 / sum w^2.

    Near 1, one sample decides. It does not show a mode that no sample reached. None with "gibbs".
    """
    acceptance_rate: Tensor | None
    """(B,): fraction of proposals that the chains accepted after their burn-in.

    None with "gradient".
    """


@takes_plain_values
@torch.no_grad()
def restore(
    model: PixelModel,
    observe: Callable[[slice], Observation],
    index: Tensor,
    *,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 500,
    seed: int = 0,
    clean: Tensor | None = None,
) -> Restoration:
    """Posterior of clean images, given observations of them.

    Args:
        model: the model; in `eval()`, where it has dropout.
        observe: returns the observation of a slice of the datapoints.
        index: (B,), int64: the datapoints' numbers; a datapoint's noise depends on `seed` and its number.
        method: "gradient" or "gibbs": see the module.
        steps: of Adam.
        num_samples: importance samples, or draws kept, from `CHAINS` chains together.
        seed: all noise follows from it.
        clean: (B, data_dim), clean images for `Restoration.log_prob`.

    Raises:
        ValueError: numbers that are too small, an unknown method, or no datapoints.
    """
    if method not in ("gradient", "gibbs"):
        raise ValueError(f"method is {method!r}; expected 'gradient' or 'gibbs'")
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected a number from 0 up")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    if len(index) == 0:
        raise ValueError("there are no datapoints; expected at least one")
    seeds = mix_seed(seed, index)
    model = standardised(model)
    parts = []
    for begin in range(0, len(index), BATCH):
        rows = slice(begin, begin + BATCH)
        infer = _by_gradient if method == "gradient" else _by_gibbs
        observation = standardised_observation(model, observe(rows))
        found = infer(model, observation, seeds[rows], steps, num_samples)
        part = _summary(observation, found, None if clean is None else clean[rows])
        mu, logvar = own_posterior(model, part.mu, part.logvar)
        parts.append(replace(part, mu=mu, logvar=logvar))
    fields = {name: [getattr(part, name) for part in parts] for name in Restoration.__dataclass_fields__}
    return Restoration(**{name: None if t[0] is None else torch.cat(t) for name, t in fields.items()})  # type: ignore


@dataclass(frozen=True, eq=False)
class _Samples:
    """Samples of p(z|y), (S, B, latent_dim), with log weights and diagnostics.

    The log weights are (S, B); the weights sum to 1 over samples.
    """

    z: Tensor
    log_weights: Tensor
    mu: Tensor
    logvar: Tensor
    effective_sample_size: Tensor | None = None
    acceptance_rate: Tensor | None = None


# ---- by gradient and importance weights -----------------------------------------------------------------------------


@takes_plain_values
def refine(
    model: PixelModel, observation: Observation, seeds: Tensor, steps: int, learning_rate: float = LEARNING_RATE
) -> tuple[Tensor, Tensor]:
    """Returns (mu, logvar), each (B, latent_dim), refined by Adam for each datapoint.

    They start at the encoder's. Then `steps` steps of Adam follow the gradient of ``E_q[log p(y|z)] - KL(q || p)``,
    estimated by samples of z. The model's weights get no gradient.
    """
    standard = standardised(model)
    observation = standardised_observation(standard, observation)
    return own_posterior(standard, *_refined(standard, observation, seeds, steps, learning_rate))


def _refined(
    model: PixelModel, observation: Observation, seeds: Tensor, steps: int, learning_rate: float = LEARNING_RATE
) -> tuple[Tensor, Tensor]:
    """`refine`, where the prior is N(0, I)."""
    # The functional Adam: the optimizer's import costs seconds.
    from torch.optim.adam import adam

    q = [t.float().clone() for t in encoded(model, observation.start, observation.observed)]
    first, second = ([torch.zeros_like(t) for t in q] for _ in range(2))
    counts = [torch.zeros(()) for _ in q]
    sample = torch.arange(REFINEMENT_SAMPLES, device=seeds.device).unsqueeze(-1)
    for step in range(steps):
        with torch.enable_grad():
            mu, logvar = (t.requires_grad_() for t in q)
            z, kl = sample_gaussian(mu, logvar, len(sample), seed=mix_seed(mix_seed(seeds, step), sample))
            loss = kl.sum() - observation.log_prob(z).mean(0).sum()
            gradients = torch.autograd.grad(loss, q)
        q = [t.detach() for t in q]
        adam(
            q,
            list(gradients),
            first,
            second,
            [],
            counts,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate * (1 - step / steps),
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
    return q[0], q[1]


def _by_gradient(model: PixelModel, observation: Observation, seeds: Tensor, steps: int, num_samples: int) -> _Samples:
    mu, logvar = _refined(model, observation, mix_seed(seeds, 0), steps)
    seeds = mix_seed(seeds, 1)
    of_prior = num_samples // PRIOR_FRACTION
    # The mixture's two shares: log r/p = log (share of q * q/p + share of p).
    share, prior_share = torch.tensor([num_samples - of_prior, of_prior], device=mu.device).div(num_samples).log()
    samples, log_weights = [], []
    for k in torch.arange(num_samples, device=mu.device).split(_at_a_time(len(mu))):
        z, log_ratio = sample_gaussian_log_ratio(mu, logvar, len(k), seed=mix_seed(seeds, k.unsqueeze(-1)))
        from_prior = k < of_prior
        if from_prior.any():
            noise = normals(mix_seed(seeds, k[from_prior].unsqueeze(-1)), model.latent_dim)
            z[from_prior], log_ratio[from_prior] = noise, _log_ratio(noise, mu, logvar)
        samples.append(z)
        log_weights.append((observation.log_prob(z) - torch.logaddexp(share + log_ratio, prior_share)).double())
    normalised = torch.cat(log_weights).log_softmax(0)
    effective = 1 / normalised.exp().square().sum(0)
    return _Samples(torch.cat(samples), normalised.float(), mu, logvar, effective_sample_size=effective)


# ---- by Gibbs -------------------------------------------------------------------------------------------------------


def _by_gibbs(model: PixelModel, observation: Observation, seeds: Tensor, steps: int, num_samples: int) -> _Samples:
    """Returns samples from chains of (z, x), without each chain's first third."""
    chains = min(CHAINS, num_samples)
    keep = math.ceil(num_samples / chains)
    drop = keep // 2
    q_mu, q_logvar = _refined(model, observation, mix_seed(seeds, 0), steps)
    seeds = mix_seed(mix_seed(seeds, 2), torch.arange(chains, device=seeds.device).unsqueeze(-1))  # (chains, B)
    z = q_mu + (0.5 * q_logvar).exp() * normals(mix_seed(seeds, 0), model.latent_dim)
    x = _draw(model, observation, z, mix_seed(seeds, 1))
    kept, accepted = [], torch.zeros(seeds.shape, device=z.device)
    for t in range(drop + keep):
        z_seeds, x_seeds = mix_seed(seeds, 2 * t + 2), mix_seed(seeds, 2 * t + 3)
        noise = normals(z_seeds, model.latent_dim + 1)
        mu, logvar = model.encode(x)
        proposal = mu + (0.5 * logvar).exp() * noise[..., :-1]
        log_accept = _log_weight(model, x, proposal, mu, logvar) - _log_weight(model, x, z, mu, logvar)
        accept = torch.special.log_ndtr(noise[..., -1]) < log_accept
        z = torch.where(accept.unsqueeze(-1), proposal, z)
        x = _draw(model, observation, z, x_seeds)
        if t >= drop:
            kept.append(z)
            accepted += accept
    z = torch.cat(kept)
    log_weights = torch.full(z.shape[:2], -math.log(len(z)), device=z.device)
    mean = z.mean(0)
    variance = (z - mean).square().mean(0).clamp_min(torch.finfo(z.dtype).tiny)
    return _Samples(z, log_weights, mean, variance.log(), acceptance_rate=accepted.mean(0) / keep)


def _log_weight(model: PixelModel, x: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Returns log p(x|z) p(z) / q(z|x)."""
    return model.log_prob(x, z) - _log_ratio(z, mu, logvar)


def _draw(model: PixelModel, observation: Observation, z: Tensor, seeds: Tensor) -> Tensor:
    """Returns a sample x of p(x|y, z)."""
    return observation.draw(z, normals(seeds, model.data_dim))


# ---- shared by both methods -----------------------------------------------------------------------------------------


def _log_ratio(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Returns log q(z) / p(z)."""
    return 0.5 * (z.square() - (z - mu).square() * (-logvar).exp() - logvar).sum(-1)


def _summary(observation: Observation, samples: _Samples, clean: Tensor | None) -> Restoration:
    rows = _at_a_time(samples.z.shape[1])
    mean = second = torch.zeros((), device=samples.z.device)
    log_prob = torch.full((), -math.inf, device=samples.z.device)
    for z, log_weights in zip(samples.z.split(rows), samples.log_weights.unsqueeze(-1).split(rows), strict=True):
        m, v = observation.clean(z)
        weights = log_weights.exp()
        mean = mean + (weights * m).sum(0)
        second = second + (weights * (v + m.square())).sum(0)
        if clean is not None:
            part = (log_weights + observation.clean_log_prob(clean, z)).logsumexp(0)
            log_prob = torch.logaddexp(log_prob, part)
    return Restoration(
        mean,
        (second - mean.square()).clamp_min(0),
        None if clean is None else log_prob,
        samples.mu,
        samples.logvar,
        samples.effective_sample_size,
        samples.acceptance_rate,
    )


def _at_a_time(datapoints: int) -> int:
    return max(1, ROWS // datapoints)
