"""The loss of a training algorithm on a batch, and what it reports: `SGVB` is the paper's, of any estimator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..checks.choices import ESTIMATORS
from ..inference.standardised import prior_of
from ..losses.elbo import FusedELBO
from ..models import BaseVAE
from ..models.own import encode, log_prob_of
from ..ops import mix_seed, sample_gaussian

Reports = Literal["elbo", "bound", "log_likelihood"]


class Terms(NamedTuple):
    """A batch's loss and its parts: means over datapoints, in nats, 0-d."""

    loss: Tensor
    """What is differentiated."""
    kl: Tensor
    """The mean KL(q(z|x) || p(z)), without a graph, for the report."""
    excess: Tensor
    """loss + what is reported, without a graph: under a beta, free bits or a capacity the loss is not -ELBO."""


def of_one_process(kl: Tensor) -> Tensor:
    """Returns the KLs as they are: one process has the whole batch."""
    return kl


class Objective:
    """A training algorithm: its loss on a batch.

    A subclass has `terms_given` and, where its step draws other noise, `seeds` and `sample`.
    """

    reports: Reports = "elbo"
    """What -(loss - excess) is: "elbo"; "bound", which has no two terms; or "log_likelihood", of given z."""
    beta: Tensor | float | None = None
    """The weight of the KL, where there is one: a captured step reads it anew each time."""

    def seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """Returns a seed for each z of images `index` (B,): (B,), or (L, B)."""
        return mix_seed(seed, index)

    def sample(self, mu: Tensor, logvar: Tensor, seeds: Tensor) -> Tensor:
        """Returns z of the posterior, as the loss draws it."""
        return sample_gaussian(mu, logvar, seed=seeds)[0]

    def terms(
        self,
        model: BaseVAE,
        x: Tensor,
        x_scale: float | None,
        seeds: Tensor,
        of_whole_batch: Callable[[Tensor], Tensor] = of_one_process,
        observed: Tensor | None = None,
    ) -> Terms:
        """Returns the loss on x (B, D), to be multiplied by x_scale, and its parts.

        Args:
            model: the VAE.
            x: the batch, as the data hold it.
            x_scale: what multiplies x, or None.
            seeds: those of `seeds`.
            of_whole_batch: makes KLs of a part of a batch such that their mean is that of the whole one.
            observed: bool, (B, D): False where a value is missing, and x holds 0; None where nothing is.
        """
        mu, logvar = encode(model, x, x_scale, observed)
        given = (model, x, x_scale, mu.float(), logvar.float(), seeds, of_whole_batch)
        return self.terms_given(*given) if observed is None else self.terms_given(*given, observed=observed)

    def takes_masks(self) -> bool:
        """Whether `terms_given` takes masks: an objective without missing values need not."""
        return "observed" in inspect.signature(self.terms_given).parameters

    def terms_given(
        self,
        model: BaseVAE,
        x: Tensor,
        x_scale: float | None,
        mu: Tensor,
        logvar: Tensor,
        seeds: Tensor,
        of_whole_batch: Callable[[Tensor], Tensor] = of_one_process,
        observed: Tensor | None = None,
    ) -> Terms:
        """Returns the same, where the posterior's parameters (B, latent_dim) are there already."""
        raise NotImplementedError

    def settings(self) -> tuple:
        """Returns all that a step built for this objective goes by, but for `beta`: where it changes, the step must."""
        return (self,)


class SGVB(Objective):
    """The AEVB algorithm (Kingma & Welling 2013, algorithm 1), with any estimator of `FusedELBO`.

    Args:
        criterion: the loss, with reduction "mean".
    """

    def __init__(self, criterion: FusedELBO):
        self.criterion = criterion

    @property
    def reports(self) -> Reports:  # type: ignore[override]
        """What the loss is minus: the ELBO, or of "iwae" and "dreg" their bound."""
        return "bound" if ESTIMATORS[self.criterion.estimator].importance_weighted else "elbo"

    @property  # type: ignore[override]
    def beta(self) -> Tensor | float:
        """The criterion's."""
        return self.criterion.beta

    @beta.setter
    def beta(self, value: Tensor | float) -> None:
        self.criterion.beta = value

    def seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """Returns (B,), or with num_samples (L, B)."""
        seeds = mix_seed(seed, index)
        L = self.criterion.num_samples
        return seeds if L is None else mix_seed(seeds, torch.arange(L, device=index.device).unsqueeze(1))

    def sample(self, mu: Tensor, logvar: Tensor, seeds: Tensor) -> Tensor:
        """Returns z as the criterion draws it."""
        return self.criterion.sample(mu, logvar, seed=seeds)[0]

    def terms_given(
        self,
        model: BaseVAE,
        x: Tensor,
        x_scale: float | None,
        mu: Tensor,
        logvar: Tensor,
        seeds: Tensor,
        of_whole_batch: Callable[[Tensor], Tensor] = of_one_process,
        observed: Tensor | None = None,
    ) -> Terms:
        """Returns the criterion's loss, the mean KL, and loss + ELBO."""
        z, kl = self.criterion.sample(mu, logvar, prior=prior_of(model), seed=seeds)
        kl = of_whole_batch(kl)
        if isinstance(model, BaseVAE):
            return self.terms_of(self.criterion(model.recon(z), x, kl=kl, weight=observed), kl)
        return self.terms_of(self.criterion.of_log_prob(log_prob_of(model, x, x_scale, z, observed), kl), kl)

    def terms_of(self, loss: Tensor, kl: Tensor) -> Terms:
        """Returns the terms of a loss, given the kl of `FusedELBO.sample`."""
        criterion, kl = self.criterion, kl.detach()
        mean = kl.mean() if criterion.free_bits is None else kl.sum() / max(kl[..., 0].numel(), 1)
        if ESTIMATORS[criterion.estimator].importance_weighted:
            return Terms(loss, mean, torch.zeros_like(mean))
        plain = criterion.free_bits is None and criterion.capacity is None
        beta = criterion.beta.detach() if isinstance(criterion.beta, Tensor) else criterion.beta
        return Terms(loss, mean, beta * (mean if plain else criterion.kl_term(kl).mean()) - mean)

    def settings(self) -> tuple:
        """Returns the criterion and its options."""
        options = vars(self.criterion).items()
        return (self.criterion, *(value for name, value in options if name != "beta" and not name.startswith("_")))


def objective_of(loss: Objective | FusedELBO) -> Objective:
    """Returns an objective as it is, and a criterion's `SGVB`."""
    return SGVB(loss) if isinstance(loss, FusedELBO) else loss
