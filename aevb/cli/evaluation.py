"""The command `aevb evaluate`: a trained run in numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from ..inference.latent_space import PosteriorCollapse, posterior_collapse
from ..inference.marginal_likelihood import log_marginal_likelihood
from ..training.run_dir import EVALUATION
from ..training.trainer import Trainer
from .options import EvaluateOptions, Flat, ModelOptions


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluation of a run; `str` gives its table.

    Attributes:
        numbers: Values of evaluation.json: averages per test image, in nats.
        posterior: The diagnostics of posterior collapse.
    """

    numbers: dict[str, Any]
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
        if "observed" in n:
            lines[0] += f"; of the observed pixels, {n['observed']:.1%} of all"
        if n["density"]:
            lines[0] += f", {n['density']}"
        lines += [f"{name:20}{value:10.2f}   {note}".rstrip() for name, value, note in rows]
        return "\n".join([*lines, "", str(self.posterior)])


def evaluate(options: Flat[EvaluateOptions], model: Flat[ModelOptions]) -> str:
    """Evaluate a run on its test images.

    The numbers are the ELBO, log p(x), and the use of the latent dimensions by the posterior. Where pixels are missing,
    they are of those observed. Leaves evaluation.json in
    the run folder.

    Example: aevb evaluate runs/digits
    """
    trainer = model.load()
    found = evaluated(trainer, options)
    trainer.folder.write(EVALUATION, json.dumps(found.numbers, indent=2).encode() + b"\n")
    return f"{found}\n\nall of it  {trainer.folder.path / EVALUATION}"


def evaluated(trainer: Trainer, options: EvaluateOptions) -> RunEvaluation:
    """Evaluate a trainer's weights: ELBO, log p(x), diagnostics of the posterior.

    Args:
        trainer: The run; its `epoch` and `step` are noted, as the weights' own.
        options: The number of samples and images. The seed is of the noise of log p(x) and of the diagnostics; the
            ELBO's noise is the run's own.

    Raises:
        ValueError: A number is below 1.
    """
    images, num_samples, seed = options.images, options.num_samples, options.seed
    if images is not None and images < 1:
        raise ValueError(f"images is {images}; expected at least 1")
    elbo = trainer.evaluate(images)
    held_out = trainer.held_out["test"]
    index = torch.arange(held_out.count, device=trainer.device)[:images]
    x, observed = held_out.x(index), held_out.observed(index)
    marginal = log_marginal_likelihood(
        trainer.model, x, num_samples, seed=seed, progress=options.progress, observed=observed
    )
    posterior = posterior_collapse(trainer.model, x, seed=seed, observed=observed)
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
    if observed is not None:
        numbers["observed"] = float(observed.double().mean())
    return RunEvaluation(numbers, posterior)
