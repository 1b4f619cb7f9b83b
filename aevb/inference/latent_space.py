"""Use of latent dimensions: KL, active units, mutual information and posterior collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import reference
from ..checks.arguments import takes_plain_values
from ..ops import mix_seed
from ..ops.gaussian import normals
from .protocols import (
    Encoder,
    check_counts,
    check_threshold,
    encode_all,
)

QUADRATIC_BLOCK = 1 << 20  # entries of the (samples, datapoints) matrix at a time: 8 MB of float64
TABLE_ROWS = 20
NEAR_LOG_N = 0.5  # nats: a mutual information this near its limit says little


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """Latent dimensions whose posterior mean varies with x."""

    count: int
    """Number of active dimensions."""
    variances: Tensor
    """(D,), float64: variance of each dimension's posterior mean over the datapoints, divided by the prior's."""
    mask: Tensor
    """(D,), bool: whether the variance is above the threshold."""


@takes_plain_values
@torch.no_grad()
def kl_per_dimension(model: Encoder, x: Tensor, *, batch_size: int = 1000, observed: Tensor | None = None) -> Tensor:
    """Mean over datapoints of KL(q(z_j|x) || p(z_j)), for each dimension j.

    ``mean_n 0.5 (mu_nj^2 + exp(logvar_nj) - 1 - logvar_nj)`` (Kingma & Welling 2013, appendix B). A dimension near 0
    has collapsed: its posterior is the prior.

    Args:
        model: an object with `encode`. Its prior is N(0, I), or that of its `prior_parameters`, (prior_mu,
            prior_logvar), as in `aevb.gaussian_kl`.
        x: (N, ...), the datapoints.
        batch_size: datapoints encoded at a time.
        observed: bool, of x's shape or of a datapoint's: False where a value is missing. The encoder is given 0 there,
            and with `mask_input` the mask too.

    Returns:
        (D,), float64, in nats. Their sum is the mean KL of the posterior.

    Raises:
        ValueError: no datapoints, a batch_size below 1, or an encoder with other shapes or non-finite results.
    """
    return _kl_per_dimension(*encode_all(model, x, batch_size, observed))


@takes_plain_values
@torch.no_grad()
def active_units(
    model: Encoder,
    x: Tensor,
    threshold: float = 0.01,
    *,
    batch_size: int = 1000,
    observed: Tensor | None = None,
) -> ActiveUnits:
    """Latent dimensions whose posterior mean varies with x.

    Unit j is active where ``A_j = Var_x(E_q(z_j|x)[z_j]) = Var_n(mu_nj) > threshold`` (Burda et al. 2015, section 5.2).
    The variance is over the N datapoints, divided by N. mu is in the coordinates in which the prior is N(0, I): for a
    prior N(prior_mu, exp(prior_logvar)) the variance is divided by exp(prior_logvar), so that a scale of z changes
    nothing.

    Args:
        model: as for `kl_per_dimension`.
        x: as for `kl_per_dimension`.
        threshold: 0.01 in the paper, where the variances lay in two groups far apart.
        batch_size: as for `kl_per_dimension`.
        observed: as for `kl_per_dimension`.

    Raises:
        ValueError: as `kl_per_dimension`; a threshold below 0.
    """
    check_threshold("threshold", threshold)
    return _active_units(encode_all(model, x, batch_size, observed)[0], threshold)


def _kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    return reference.gaussian_kl(mu.unsqueeze(-1), logvar.unsqueeze(-1)).mean(0)


def _active_units(mu: Tensor, threshold: float) -> ActiveUnits:
    variances = mu.var(0, correction=0)
    mask = variances > threshold
    return ActiveUnits(int(mask.sum()), variances, mask)


# ---- the aggregate posterior ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MutualInformation:
    """The two parts of the mean KL, in nats: mutual_information + aggregate_kl."""

    mutual_information: float
    """I_q(n; z): information in z about its datapoint's index n.

    It is at most log N.
    """
    aggregate_kl: float
    """KL(q(z) || p(z)) of the aggregate posterior q(z) = 1/N sum_n q(z|x_n)."""
    mean_kl: float
    """Mean over datapoints of KL(q(z|x) || p(z)); exact."""
    standard_error: float
    """Standard error of mutual_information and of aggregate_kl alike.

    It is the same for both because their sum is exact. It measures the noise of the samples of z, for the given N
    datapoints. With one sample of each datapoint, that noise cannot be told from variation between datapoints. The
    standard error is then too large rather than too small.
    """
    num_datapoints: int
    """N."""


@takes_plain_values
@torch.no_grad()
def mutual_information(
    model: Encoder,
    x: Tensor,
    num_samples: int = 1,
    *,
    seed: int = 0,
    batch_size: int = 1000,
    observed: Tensor | None = None,
) -> MutualInformation:
    """Information in z about its datapoint, and the aggregate posterior's KL.

    ``mean_n KL(q(z|x_n) || p(z)) = I_q(n; z) + KL(q(z) || p(z))`` with ``q(z) = 1/N sum_n q(z|x_n)`` over the N given
    datapoints (Hoffman & Johnson 2016, "ELBO surgery"). ``I_q(n; z) = mean_n E_q(z|x_n)[log q(z|x_n) - log q(z)]`` is
    estimated, without bias, with `num_samples` samples of each posterior; log q(z) is exact. The left side is exact
    too, so the other term follows.

    I_q(n; z) is at most log N. Near that limit it says that N datapoints are told apart, and no more. The cost is
    O(num_samples N^2 D), in matrix products. The memory is O(num_samples N D), and a block of tens of megabytes.

    Args:
        model: as for `kl_per_dimension`.
        x: as for `kl_per_dimension`.
        num_samples: samples of z for each datapoint.
        seed: the samples of datapoint n are `aevb.sample_gaussian`'s for the seed ``aevb.mix_seed(seed, n)``.
        batch_size: as for `kl_per_dimension`.
        observed: as for `kl_per_dimension`.

    Raises:
        ValueError: as `kl_per_dimension`; num_samples below 1.
    """
    check_counts(num_samples=num_samples)
    return _mutual_information(*encode_all(model, x, batch_size, observed), num_samples, seed)


def _mutual_information(mu: Tensor, logvar: Tensor, num_samples: int, seed: int) -> MutualInformation:
    n, latent_dim = mu.shape
    eps = normals(mix_seed(seed, torch.arange(n, device=mu.device)), num_samples, latent_dim).double()
    z = mu.unsqueeze(1) + (0.5 * logvar).exp().unsqueeze(1) * eps
    log_posterior = -0.5 * (eps.square() + logvar.unsqueeze(1) + math.log(2 * math.pi)).sum(-1)
    blocks = z.flatten(0, 1).split(max(1, QUADRATIC_BLOCK // n))
    log_aggregate = torch.cat([_log_aggregate(block, mu, logvar) for block in blocks])
    information = log_posterior - log_aggregate.view(n, num_samples)
    # Within datapoints if possible: a datapoint's samples are the noise, the datapoints are given.
    spread = information.var(1).mean() if num_samples > 1 else information.var() if n > 1 else information.new_zeros(())
    mean, mean_kl = float(information.mean()), float(reference.gaussian_kl(mu, logvar).mean())
    error = math.sqrt(float(spread) / (n * num_samples))
    return MutualInformation(mean, mean_kl - mean, mean_kl, error, n)


def _log_aggregate(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Returns log 1/N sum_n N(z; mu_n, exp(logvar_n)).

    The result is (M,), float64, for z (M, D).

    The squares are expanded for a matrix product: ``(z - mu)^2 / v = z^2 / v - 2 z mu / v + mu^2 / v``. Cancellation
    costs 2^-52 of the largest term. It might be seen in posteriors 20,000 times narrower than they are apart. The
    differences are then taken first, which is slower.
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
    """Use of the posterior's dimensions. `str` gives a table and sentences."""

    kl_per_dimension: Tensor
    """(D,), float64, in nats."""
    active_units: ActiveUnits
    """Dimensions whose posterior mean varies with x."""
    collapsed: Tensor
    """(D,), bool: whether the mean KL is below the threshold.

    Such a dimension is the prior whatever x is.
    """
    num_collapsed: int
    """Number of collapsed dimensions."""
    information: MutualInformation
    """Mutual information and the aggregate posterior's KL."""
    ignores_x: bool
    """Whether the mutual information is below the threshold.

    The posterior as a whole then tells nothing of x.
    """
    threshold: float
    """Threshold of the mean KL and the mutual information, in nats."""
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
    observed: Tensor | None = None,
) -> PosteriorCollapse:
    """Summary of collapsed dimensions, and of a posterior that ignores x.

    A dimension has collapsed where its mean KL is below `threshold`. The posterior ignores x where its mutual
    information is below it. The two differ: a posterior may be the same for every x without being the prior. Many
    dimensions of small KL may together tell something.

    Args:
        model: as for `kl_per_dimension`.
        x: as for `kl_per_dimension`; x is encoded once.
        threshold: in nats.
        active_threshold: the threshold of `active_units`.
        num_samples: as for `mutual_information`; the cost is O(num_samples N^2 D).
        seed: as for `mutual_information`.
        batch_size: as for `kl_per_dimension`.
        observed: as for `kl_per_dimension`.

    Raises:
        ValueError: as `kl_per_dimension`; a threshold below 0; num_samples below 1.
    """
    check_threshold("threshold", threshold)
    check_threshold("active_threshold", active_threshold)
    check_counts(num_samples=num_samples)
    mu, logvar = encode_all(model, x, batch_size, observed)
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
    """Returns the numbers as ranges: "0, 3-5" for [0, 3, 4, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
