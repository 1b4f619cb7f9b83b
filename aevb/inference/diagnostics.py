"""What a trained posterior is worth: which dimensions it uses, how much it says of x, and how good log p(x) really is.

A model is anything with `encode(x) -> (mu, logvar)` and `log_prob(x, z) -> log p(x|z)`, whose prior is N(0, I); x has
one datapoint for each index of its first dimension. Every function goes through x in batches, without gradients, and
sums in float64. Noise belongs to a datapoint, not to a batch, so that no result depends on the batches beyond rounding.
A model with dropout or batch normalisation belongs in `eval()` first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import reference
from ..checks.arguments import takes_plain_values
from ..checks.errors import check_dense
from ..likelihoods.values import check_pixels
from ..ops import mix_seed, sample_gaussian

QUADRATIC_BLOCK = 1 << 20  # entries of the (samples, datapoints) matrix at a time: 8 MB of float64
TABLE_ROWS = 20
PILOT_CHAINS = 4  # AIS: chains that only find the step size
TARGET_ACCEPTANCE = 0.65
ADAPTATION = 0.2  # how far log(step size) moves for an acceptance that is off by 1
NEAR_LOG_N = 0.5  # nats: a mutual information so near to its limit says little
JITTER = 0.2  # a trajectory's step size is within this fraction of the adapted one


class Encoder(Protocol):
    """A posterior q(z|x) = N(mu, exp(logvar)), diagonal."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D), of x (B, ...)."""
        ...


class LatentVariableModel(Encoder, Protocol):
    """p(z) = N(0, I), p(x|z), and a posterior."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), (S, B), in nats, of x (B, ...) and z (S, B, D)."""
        ...


# ---- dimensions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """Which dimensions of the posterior mean move with x."""

    count: int
    """How many."""
    variances: Tensor
    """(D,), float64: the variance of each dimension's posterior mean over the datapoints."""
    mask: Tensor
    """(D,), bool: the variance is above the threshold."""


@takes_plain_values
@torch.no_grad()
def kl_per_dimension(model: Encoder, x: Tensor, *, batch_size: int = 1000) -> Tensor:
    """The mean over datapoints of KL(q(z_j|x) || p(z_j)), for each dimension j.

    ``mean_n 0.5 (mu_nj^2 + exp(logvar_nj) - 1 - logvar_nj)`` (Kingma & Welling 2013, appendix B). A dimension near 0
    has collapsed: its posterior is the prior.

    Args:
        model: what has `encode`.
        x: (N, ...), the datapoints.
        batch_size: datapoints encoded at a time.

    Returns:
        (D,), float64, in nats. Their sum is the mean KL of the posterior.

    Raises:
        ValueError: no datapoints, a batch_size below 1, or an encoder that gives other shapes or what is not finite.
    """
    return _kl_per_dimension(*_encode(model, x, batch_size))


@takes_plain_values
@torch.no_grad()
def active_units(model: Encoder, x: Tensor, threshold: float = 0.01, *, batch_size: int = 1000) -> ActiveUnits:
    """The dimensions whose posterior mean varies with x.

    Unit j is active where ``A_j = Var_x(E_q(z_j|x)[z_j]) = Var_n(mu_nj) > threshold`` (Burda et al. 2015, section 5.2);
    the variance is that of the N datapoints, divided by N.

    Args:
        model, x, batch_size: as for `kl_per_dimension`.
        threshold: 0.01 in the paper, where the variances lay in two groups far apart.

    Raises:
        ValueError: as `kl_per_dimension`; a threshold below 0.
    """
    _check_threshold("threshold", threshold)
    return _active_units(_encode(model, x, batch_size)[0], threshold)


def _kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    return reference.gaussian_kl(mu.unsqueeze(-1), logvar.unsqueeze(-1)).mean(0)


def _active_units(mu: Tensor, threshold: float) -> ActiveUnits:
    variances = mu.var(0, correction=0)
    mask = variances > threshold
    return ActiveUnits(int(mask.sum()), variances, mask)


# ---- the aggregate posterior ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MutualInformation:
    """The mean KL in two parts, in nats: mean_kl = mutual_information + aggregate_kl."""

    mutual_information: float
    """I_q(n; z): what z tells of which of the N datapoints it came from; at most log N."""
    aggregate_kl: float
    """KL(q(z) || p(z)) of the aggregate posterior q(z) = 1/N sum_n q(z|x_n)."""
    mean_kl: float
    """The mean over datapoints of KL(q(z|x) || p(z)); exact."""
    standard_error: float
    """Of mutual_information and of aggregate_kl alike, since their sum is exact: the noise of the samples of z, the N
    datapoints being given. With one sample of each it cannot be told from what varies between datapoints, and is too
    large rather than too small."""
    num_datapoints: int
    """N."""


@takes_plain_values
@torch.no_grad()
def mutual_information(
    model: Encoder, x: Tensor, num_samples: int = 1, *, seed: int = 0, batch_size: int = 1000
) -> MutualInformation:
    """How much z tells of the datapoint, and how far the aggregate posterior is from the prior.

    ``mean_n KL(q(z|x_n) || p(z)) = I_q(n; z) + KL(q(z) || p(z))`` with ``q(z) = 1/N sum_n q(z|x_n)`` over the N given
    datapoints (Hoffman & Johnson 2016, "ELBO surgery"). ``I_q(n; z) = mean_n E_q(z|x_n)[log q(z|x_n) -
    log q(z)]`` is estimated, without bias, with `num_samples` samples of each posterior; log q(z) is exact. The left
    side is exact too, so the other term follows.

    I_q(n; z) is at most log N: where it comes near, it says that N datapoints are told apart, and no more. The cost is
    O(num_samples N^2 D), in matrix products; the memory O(num_samples N D), and a block of tens of megabytes.

    Args:
        model, x, batch_size: as for `kl_per_dimension`.
        num_samples: samples of z for each datapoint.
        seed: the samples of datapoint n are `aevb.sample_gaussian`'s of the seed ``aevb.mix_seed(seed, n)``.

    Raises:
        ValueError: as `kl_per_dimension`; num_samples below 1.
    """
    _check_counts(num_samples=num_samples)
    return _mutual_information(*_encode(model, x, batch_size), num_samples, seed)


def _mutual_information(mu: Tensor, logvar: Tensor, num_samples: int, seed: int) -> MutualInformation:
    n, latent_dim = mu.shape
    eps = normals(mix_seed(seed, torch.arange(n, device=mu.device)), num_samples, latent_dim).double()
    z = mu.unsqueeze(1) + (0.5 * logvar).exp().unsqueeze(1) * eps
    log_posterior = -0.5 * (eps.square() + logvar.unsqueeze(1) + math.log(2 * math.pi)).sum(-1)
    blocks = z.flatten(0, 1).split(max(1, QUADRATIC_BLOCK // n))
    log_aggregate = torch.cat([_log_aggregate(block, mu, logvar) for block in blocks])
    information = log_posterior - log_aggregate.view(n, num_samples)
    # Within a datapoint where that can be seen: its samples are the noise, the datapoints are not.
    spread = information.var(1).mean() if num_samples > 1 else information.var() if n > 1 else information.new_zeros(())
    mean, mean_kl = float(information.mean()), float(reference.gaussian_kl(mu, logvar).mean())
    error = math.sqrt(float(spread) / (n * num_samples))
    return MutualInformation(mean, mean_kl - mean, mean_kl, error, n)


def _log_aggregate(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log 1/N sum_n N(z; mu_n, exp(logvar_n)), (M,), of z (M, D); float64.

    The squares are opened for a matrix product: (z - mu)^2 / v = z^2 / v - 2 z mu / v + mu^2 / v. Cancellation costs
    2^-52 of the largest term; where that might be seen, in posteriors 20,000 times narrower than they are apart, the
    differences are taken first, which is slower.
    """
    n, latent_dim = mu.shape
    centre = mu.mean(0)
    z, mu = z - centre, mu - centre
    precision = (-logvar).exp()
    constant = logvar.sum(-1) + latent_dim * math.log(2 * math.pi)
    largest = torch.maximum(z.abs().amax(0), mu.abs().amax(0)).square() * precision.amax(0)
    if float(largest.sum()) * 2.0**-52 < 1e-7:
        weights = torch.cat([precision, -2 * mu * precision], -1)
        constant = constant + (mu * mu * precision).sum(-1)
        log_density = torch.addmm(constant, torch.cat([z * z, z], -1), weights.T, beta=-0.5, alpha=-0.5)
    else:
        log_density = constant.expand(len(z), n) * -0.5
        for j in range(latent_dim):
            log_density -= 0.5 * (z[:, j, None] - mu[:, j]).square() * precision[:, j]
    return log_density.logsumexp(-1) - math.log(n)


# ---- collapse -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PosteriorCollapse:
    """What a posterior uses of its dimensions. `str` says it in a table and sentences."""

    kl_per_dimension: Tensor
    """(D,), float64, in nats."""
    active_units: ActiveUnits
    """The dimensions whose mean moves with x."""
    collapsed: Tensor
    """(D,), bool: the mean KL is below the threshold, so that the dimension is the prior whatever x is."""
    num_collapsed: int
    """How many."""
    information: MutualInformation
    """Mutual information and the aggregate posterior's KL."""
    ignores_x: bool
    """The mutual information is below the threshold: the posterior as a whole tells nothing of x."""
    threshold: float
    """In nats."""
    active_threshold: float = field(repr=False)

    def __str__(self) -> str:
        kl, units, info = self.kl_per_dimension, self.active_units, self.information
        order = [j for j in kl.argsort(descending=True, stable=True).tolist() if not self.collapsed[j]]
        lines = ["dimension   mean KL (nats)   variance of the mean"] if order else []
        for j in order[:TABLE_ROWS]:
            note = "" if units.mask[j] else "   hardly moves with x"
            lines.append(f"{j:9}   {kl[j]:14.4f}   {units.variances[j]:20.4f}{note}")
        if len(order) > TABLE_ROWS:
            lines.append(f"... and {len(order) - TABLE_ROWS} more, of smaller KL")
        which = _ranges(self.collapsed.nonzero().flatten().tolist())
        lines += [
            f"{self.num_collapsed} of {len(kl)} dimensions collapsed to the prior, with a mean KL below "
            f"{self.threshold:g} nats{': ' if which else ''}{which}.",
            f"{units.count} of {len(kl)} are active: the variance of the mean is above {self.active_threshold:g}.",
            f"Mean KL {info.mean_kl:.4f} nats = mutual information {info.mutual_information:.4f} "
            f"(at most log N = {math.log(info.num_datapoints):.4f})",
            f"    + KL of the aggregate posterior from the prior {info.aggregate_kl:.4f}, "
            f"each +- {info.standard_error:.4f}.",
            f"The posterior as a whole ignores x: its mutual information is below {self.threshold:g} nats."
            if self.ignores_x and info.num_datapoints > 1
            else "The posterior as a whole depends on x.",
        ]
        if info.mutual_information > math.log(info.num_datapoints) - NEAR_LOG_N:
            lines[-1] = (
                "z tells these datapoints apart, which is as much as so few can show: with more of them, more of the "
                "mean KL would be mutual information."
            )
        return "\n".join(lines)


@takes_plain_values
@torch.no_grad()
def posterior_collapse(
    model: Encoder,
    x: Tensor,
    threshold: float = 0.01,
    *,
    active_threshold: float = 0.01,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 1000,
) -> PosteriorCollapse:
    """Which dimensions are the prior whatever x is, and whether all of the posterior is: a summary to print.

    A dimension has collapsed where its mean KL is below `threshold`; the posterior ignores x where its mutual
    information is. The two differ: a posterior may be the same for every x without being the prior, and many dimensions
    of small KL may together tell something.

    Args:
        model, x, batch_size: as for `kl_per_dimension`; x is encoded once.
        threshold: in nats.
        active_threshold: that of `active_units`.
        num_samples, seed: those of `mutual_information`, which see for the cost, O(num_samples N^2 D).

    Raises:
        ValueError: as the functions above.
    """
    _check_threshold("threshold", threshold)
    _check_threshold("active_threshold", active_threshold)
    _check_counts(num_samples=num_samples)
    mu, logvar = _encode(model, x, batch_size)
    kl = _kl_per_dimension(mu, logvar)
    collapsed = kl < threshold
    information = _mutual_information(mu, logvar, num_samples, seed)
    return PosteriorCollapse(
        kl_per_dimension=kl,
        active_units=_active_units(mu, active_threshold),
        collapsed=collapsed,
        num_collapsed=int(collapsed.sum()),
        information=information,
        ignores_x=information.mutual_information < threshold,
        threshold=threshold,
        active_threshold=active_threshold,
    )


def _ranges(numbers: list[int]) -> str:
    """ "0, 3-5" of [0, 3, 4, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


# ---- annealed importance sampling -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AnnealedImportanceSampling:
    """Estimates of log p(x), one for each datapoint."""

    log_prob: Tensor
    """(B,), float64, in nats: log of the mean weight of the chains."""
    standard_error: Tensor
    """(B,), in nats, of log_prob, from the spread of the weights (the delta method); NaN for one chain. Where the
    effective sample size is near 1 it is not to be trusted: what carries most weight was then hardly seen."""
    effective_sample_size: Tensor
    """(B,), 1 to num_chains: (sum w)^2 / sum w^2."""
    acceptance_rate: Tensor
    """(B,), the mean over chains and temperatures; NaN for one temperature, which has no transition."""
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
) -> AnnealedImportanceSampling:
    """log p(x) by annealed importance sampling with Hamiltonian transitions (Neal 2001; Wu et al. 2017).

    A chain starts at z ~ f_0 = p(z), or q(z|x), and goes through ``f_t = f_0^(1 - b_t) (p(z) p(x|z))^b_t`` with
    ``0 = b_0 < ... < b_T = 1``, T = num_temperatures, the b evenly spaced on a sigmoid from -4 to 4. At each t its
    weight gains ``log w += log f_t(z) - log f_{t-1}(z)``, and z makes one trajectory of num_leapfrog steps that leaves
    f_t in place, which is accepted or not. E[w] = p(x), so ``log_prob = log mean w`` over the chains is below log p(x)
    in expectation, the less so the more chains and temperatures. T = 1 is importance sampling from f_0.

    The step size is adapted towards an acceptance of 65%, as in the paper, but for each datapoint, and by 4 further
    chains whose weights are not used. The chains that count never touch it: given the pilots, it is fixed for each t,
    so that E[w] = p(x) holds exactly, which adapting to the chains themselves would spoil. The step size of each single
    trajectory is jittered by up to a fifth, against closed orbits (Neal 2011). From the posterior, space
    is scaled by its standard deviations, and the chains have less far to go; what q(z|x) hardly covers is found more
    readily from the prior.

    The cost is num_temperatures * num_leapfrog gradients of log p(x|z) with respect to z, each of batch_size *
    (num_chains + 4) decoded z. No gradient of a parameter is computed.

    Args:
        model: what has `encode` and `log_prob`, the latter differentiable in z.
        x: (B, ...), the datapoints.
        num_chains, num_temperatures, num_leapfrog: at least 1 each; the paper took thousands of temperatures.
        seed: all of the noise follows from it and the datapoint's number in x. The batches matter only where rounding
            turns an acceptance.
        start: "prior" or "posterior".
        batch_size: datapoints at a time.

    Raises:
        ValueError: an argument out of range; no datapoints; an encoder or log_prob that gives other shapes, an encoder
            that gives what is not finite, or a log_prob that is NaN at the start.
    """
    _check_counts(
        num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog, batch_size=batch_size
    )
    if start not in ("prior", "posterior"):
        raise ValueError(f"start is {start!r}; expected 'prior' or 'posterior'")
    check_pixels(model, {"x": x})
    temperatures = _temperatures(num_temperatures)
    log_weights, acceptances = [], []
    # A caller's inference mode would leave nothing to differentiate.
    with torch.inference_mode(False), torch.no_grad():
        for first, batch in _batches(x, batch_size):
            path = _Path(model, batch.clone() if batch.is_inference() else batch, first, start)
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
    """b_0 = 0 to b_count = 1, evenly spaced on a sigmoid from -4 to 4."""
    sigmoid = [1 / (1 + math.exp(4 - 8 * t / count)) for t in range(count + 1)]
    first, last = sigmoid[0], sigmoid[-1]
    return [(s - first) / (last - first) for s in sigmoid]


class _Path:
    """The densities between f_0 and p(z) p(x|z) of a batch, in coordinates u in which f_0 is N(0, I)."""

    def __init__(self, model: LatentVariableModel, x: Tensor, first: int, start: str):
        self.model, self.x, self.first = model, x, first
        mu, logvar = _encoded(model, x, first)
        self.dtype = mu.dtype  # z's, as the model knows it; what is computed here is float32 at least
        mu, logvar = (t if t.dtype == torch.float64 else t.float() for t in (mu, logvar))
        prior = start == "prior"
        self.mean = torch.zeros_like(mu) if prior else mu
        self.scale = torch.ones_like(mu) if prior else (0.5 * logvar).exp()
        self.log_scale = 0 if prior else 0.5 * logvar.sum(-1)

    def log_ratio(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z) p(x|z) / f_0(z), (S, B), at z(u), u (S, B, D); and its gradient with respect to u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            z = self.mean + self.scale * u
            log_prob = self.model.log_prob(self.x, z.to(self.dtype))
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
    """Log weights (num_chains, B) and acceptance rates (B,). The pilots are the first chains, and leave no other trace
    than the step size."""
    batch, latent_dim = path.mean.shape
    chains = PILOT_CHAINS + num_chains

    def noise(step: int) -> Tensor:
        """(chains, B, D + 2) standard normals."""
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


# ---- what they share ------------------------------------------------------------------------------------------------


def normals(seeds: Tensor, *size: int) -> Tensor:
    """Standard normals (*seeds.shape, *size), float32, of seeds: a sample of the prior."""
    zero = torch.zeros((), device=seeds.device).expand(*seeds.shape, *size)
    return sample_gaussian(zero, zero, batch_dims=zero.dim() - 1, seed=seeds)[0]


def _batches(x: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches of x, each with the number of its first datapoint."""
    _check_counts(batch_size=batch_size)
    check_dense("diagnostics", x=x)
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, ...), of at least one datapoint")
    for first in range(0, len(x), batch_size):
        yield first, x[first : first + batch_size]


def _encode(model: Encoder, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """mu and logvar, (N, D), float64, of all datapoints."""
    check_pixels(model, {"x": x})
    encoded = [_encoded(model, batch, first) for first, batch in _batches(x, batch_size)]
    mu, logvar = (torch.cat([t.double() for t in parts]) for parts in zip(*encoded, strict=True))
    return mu, logvar


def _encoded(model: Encoder, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """mu and logvar of one batch, checked; `first` is the number of its first datapoint."""
    mu, logvar = model.encode(x)
    if mu.dim() != 2 or len(mu) != len(x) or mu.shape != logvar.shape:
        raise ValueError(
            f"model.encode(x) gives mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} for x {tuple(x.shape)}; "
            f"expected ({len(x)}, latent_dim) of both"
        )
    for name, t in (("mu", mu), ("logvar", logvar)):
        wrong = ~t.isfinite()
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}[{column}] of datapoint {first + row} is {t[row, column].item()}; expected finite numbers: "
                "has training diverged, or is x not finite?"
            )
    return mu, logvar


def _check_start(ratio: Tensor, first: int) -> None:
    wrong = ratio.isnan()
    if wrong.any():
        row = int(wrong.nonzero()[0, 1])
        raise ValueError(
            f"model.log_prob(x, z) is NaN for datapoint {first + row} at a z from the start; expected log p(x|z)"
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def _check_threshold(name: str, threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{name} is {threshold}; expected a number from 0 up")
