"""What a trained run is worth, in numbers: the table of `aevb evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..checks.arguments import takes_plain_values
from ..inference.latent_space import PosteriorCollapse, posterior_collapse
from ..inference.marginal_likelihood import log_marginal_likelihood
from ..training.trainer import Trainer


@dataclass(frozen=True)
class RunEvaluation:
    """The numbers, for evaluation.json, and as a table by `str`."""

    numbers: dict[str, Any]
    """Averages per test image, in nats."""
    posterior: PosteriorCollapse

    def __str__(self) -> str:
        n = self.numbers
        rows = [
            ("ELBO", n["elbo"], "log-likelihood less KL, one sample"),
            ("  log-likelihood", n["log_likelihood"], ""),
            ("  KL", n["kl"], ""),
            ("log p(x)", n["log_marginal_likelihood"], f"+- {n['standard_error']:.3f}, {n['num_samples']:,} samples"),
            ("  above the ELBO by", n["log_marginal_likelihood"] - n["elbo"], ""),
        ]
        lines = [f"{n['images']:,} test images of {n['data']}; nats per image"]
        if n["density"]:
            lines[0] += f", {n['density']}"
        lines += [f"{name:20}{value:10.2f}   {note}".rstrip() for name, value, note in rows]
        return "\n".join([*lines, "", str(self.posterior)])


@takes_plain_values
def evaluate(
    trainer: Trainer, num_samples: int = 5000, images: int | None = None, seed: int = 0, progress: bool = False
) -> RunEvaluation:
    """ELBO, log p(x) by importance sampling, and diagnostics of the posterior, on the run's test images.

    Args:
        trainer: a run's, from `Trainer.load`; its `epoch` and `step` are noted, as those of the weights.
        num_samples: of `log_marginal_likelihood`.
        images: only the first so many.
        seed: of the noise of log p(x) and of the diagnostics; the ELBO's noise is the run's own.
        progress: show a progress bar.

    Raises ValueError for numbers below 1.
    """
    if images is not None and images < 1:
        raise ValueError(f"images is {images}; expected at least 1")
    elbo = trainer.evaluate(images)
    held_out = trainer.held_out["test"]
    x = held_out.x(torch.arange(held_out.count, device=trainer.device)[:images])
    marginal = log_marginal_likelihood(trainer.model, x, num_samples, seed=seed, progress=progress)
    posterior = posterior_collapse(trainer.model, x, seed=seed)
    information = posterior.information
    family = trainer.model.family
    is_density = family.density == family
    density = "" if is_density else f"of the normalised {family.density.name}, since {family.name} is no density"
    numbers = {
        "data": trainer.config.data,
        "epoch": trainer.epoch,
        "step": trainer.step,
        "images": len(x),
        "elbo": elbo.elbo,
        "log_likelihood": elbo.log_likelihood,
        "kl": elbo.kl,
        "log_marginal_likelihood": marginal.mean,
        "standard_error": marginal.mean_standard_error,
        "num_samples": num_samples,
        "effective_samples_median": float(marginal.effective_sample_size.median()),
        "seed": seed,
        "latent_dim": trainer.model.latent_dim,
        "active_units": posterior.active_units.count,
        "collapsed_dimensions": posterior.num_collapsed,
        "kl_per_dimension": posterior.kl_per_dimension.tolist(),
        "density": density,
        "mutual_information": information.mutual_information,
        "aggregate_kl": information.aggregate_kl,
        "mean_kl": information.mean_kl,
        "information_standard_error": information.standard_error,
    }
    return RunEvaluation(numbers, posterior)
