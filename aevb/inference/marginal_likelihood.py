"""log p(x) by importance sampling, in memory independent of num_samples."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks.arguments import takes_plain_values
from ..checks.errors import check_dense
from ..likelihoods.values import check_pixels
from ..ops import mix_seed, sample_gaussian_log_ratio
from .protocols import check_takes_weight, encoded, log_prob_observed, observed_part
from .standardised import standardised

if TYPE_CHECKING:
    from .protocols import LatentVariableModel

ROWS = 8192  # samples that the decoder sees at a time


@dataclass(frozen=True, eq=False)
class MarginalLikelihood:
    """Estimate of log p(x) for each datapoint, in nats."""

    log_prob: Tensor
    """(B,), float64: logarithm of the mean importance weight."""
    standard_error: Tensor
    """(B,), float64: Monte Carlo standard error of log_prob.

    It is a first-order value, and NaN for one sample.
    """
    effective_sample_size: Tensor
    """(B,), float64: (sum of the weights)^2 / sum of their squares.

    Near 1, one sample decides, and the standard error is not to be trusted.
    """
    num_samples: int

    @property
    def mean(self) -> float:
        """The average of log_prob over datapoints."""
        return float(self.log_prob.mean())

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of `mean`.

        It measures the effect of other noise, not of other datapoints.
        """
        return float(self.standard_error.square().sum().sqrt() / len(self.standard_error))


class _LogMeanExp:
    """Running mean of exp(log_weight) and of its square, (B,), in float64."""

    def __init__(self, size: int, device: torch.device):
        self.count = 0
        self.largest = torch.full((size,), -math.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.largest)  # of exp(log_weight - largest)
        self.squares = torch.zeros_like(self.largest)

    def add(self, log_weight: Tensor) -> None:
        """Add log weights (samples, B)."""
        log_weight = log_weight.double()
        largest = torch.maximum(self.largest, log_weight.amax(0))
        shift = largest.where(largest > -math.inf, 0.0)  # weights that are all 0 so far; NaN stays NaN
        shift = shift.where(~largest.isnan(), largest)
        before = torch.exp(self.largest - shift)
        weight = torch.exp(log_weight - shift)
        self.total = self.total * before + weight.sum(0)
        self.squares = self.squares * before.square() + weight.square().sum(0)
        self.largest = largest
        self.count += len(log_weight)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the log mean, its standard error and the effective sample size."""
        log_mean = self.largest + torch.log(self.total / self.count)
        effective = self.total.square() / self.squares
        if self.count == 1:
            return log_mean, torch.full_like(log_mean, math.nan), effective
        relative_variance = (self.count / effective - 1).clamp_min(0) / (self.count - 1)
        return log_mean, relative_variance.sqrt(), effective


@torch.no_grad()
@takes_plain_values
def log_marginal_likelihood(
    model: LatentVariableModel,
    x: Tensor,
    num_samples: int = 5000,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    rows: int = ROWS,
    progress: bool = False,
    observed: Tensor | None = None,
) -> MarginalLikelihood:
    """Estimate of log p(x) by importance sampling from the posterior; no gradient.

    ``log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)``, z_k from q(z|x). Kingma & Welling 2013, appendix D, estimate the same
    quantity; the estimator is in Rezende et al. 2014, appendix E, and Burda et al. 2015, eq. 8. In expectation it is a
    lower bound of log p(x), and tightens as K grows. K = 1 is one sample, the ELBO's; K samples are K samples.

    The noise belongs to the datapoint and the sample, ``mix_seed(mix_seed(seed, index), k)``, and weights are summed in
    float64. So the estimate of a datapoint does not depend on `rows`, nor on the other datapoints of x, beyond the
    rounding of matrix products. The first K samples of a larger number are the samples of K. Memory does not grow with
    num_samples.

    Args:
        model: an `aevb.VAE`, or any object with ``encode(x) -> (mu, logvar)`` and ``log_prob(x, z) -> log p(x|z)``
            for z (samples, B, latent_dim). Its prior is N(0, I), or N(prior_mu, exp(prior_logvar)) where it has an
            attribute ``prior_parameters = (prior_mu, prior_logvar)``, each (latent_dim,). Dropout belongs in `eval()`
            first.
        x: (B, ...), the model's input.
        num_samples: K.
        seed: all the noise follows from it.
        index: (B,), int64: which datapoint each of x is; by default 0, 1, 2, ...
        rows: how many samples of z the model sees at a time, of one datapoint or of several.
        progress: whether to show a progress bar.
        observed: bool, of x's shape or of a datapoint's: False where a value is missing. The estimate is then of
            log p(x_observed), as of the MIWAE bound (Mattei & Frellsen 2019), and the model's log_prob is given the
            mask as `weight`. Of missing values nothing is used; they may be NaN.

    Returns:
        The estimates, their standard errors and effective sample sizes.

    Raises:
        ValueError: numbers below 1, an index or a mask that does not fit, or a model whose log_prob is not one number
            for each z, or takes no weight where values are missing.
    """
    for name, value in (("num_samples", num_samples), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    check_dense("log_marginal_likelihood", x=x)
    if x.dim() < 1:
        raise ValueError("x has no dimensions; expected datapoints in its first")
    x, observed = observed_part(x, observed)
    if observed is not None:
        check_takes_weight(model)
    check_pixels(model, {"x": x})
    model = standardised(model)
    count = len(x)
    if index is None:
        index = torch.arange(count, device=x.device)
    if tuple(index.shape) != (count,):
        raise ValueError(f"index has shape {tuple(index.shape)}; expected ({count},), one for each of x")
    seeds = mix_seed(seed, index)
    datapoints = max(min(count, rows // min(num_samples, rows // 2 or 1)), 1)
    samples = max(rows // datapoints, 1)
    found = []
    interval = 0.1 if sys.stderr.isatty() else 5  # seconds; each update of a log file is a line
    with tqdm(
        desc="log p(x)",
        total=count * num_samples,
        unit="sample",
        unit_scale=True,
        disable=not progress,
        mininterval=interval,
    ) as bar:
        for begin in range(0, count, datapoints):
            part = slice(begin, begin + datapoints)
            batch, batch_seeds, mask = x[part], seeds[part], None if observed is None else observed[part]
            mu, logvar = encoded(model, batch, mask)
            mean = _LogMeanExp(len(batch), mu.device)
            for first in range(0, num_samples, samples):
                k = torch.arange(first, min(first + samples, num_samples), device=mu.device)
                z, log_ratio = sample_gaussian_log_ratio(
                    mu, logvar, len(k), batch_dims=1, seed=mix_seed(batch_seeds, k.unsqueeze(-1))
                )
                log_prob = log_prob_observed(model, batch, z, mask)
                if log_prob.shape != log_ratio.shape:
                    raise ValueError(
                        f"model.log_prob(x, z) has shape {tuple(log_prob.shape)} for z {tuple(z.shape)}; expected "
                        f"{tuple(log_ratio.shape)}: one log p(x|z) for each z"
                    )
                mean.add(log_prob - log_ratio)
                bar.update(len(k) * len(batch))
            found.append(torch.stack(mean.result()))
    log_prob, standard_error, effective = torch.cat(found, 1) if found else torch.empty(3, 0, dtype=torch.float64)
    return MarginalLikelihood(log_prob, standard_error, effective, num_samples)
