"""What a posterior holds, and log p(x) by annealed importance sampling: the diagnostics of `aevb.inference`."""

from .inference.diagnostics import (
    ActiveUnits,
    AnnealedImportanceSampling,
    Encoder,
    LatentVariableModel,
    MutualInformation,
    PosteriorCollapse,
    active_units,
    annealed_importance_sampling,
    kl_per_dimension,
    mutual_information,
    posterior_collapse,
)

__all__ = [
    "ActiveUnits",
    "AnnealedImportanceSampling",
    "Encoder",
    "LatentVariableModel",
    "MutualInformation",
    "PosteriorCollapse",
    "active_units",
    "annealed_importance_sampling",
    "kl_per_dimension",
    "mutual_information",
    "posterior_collapse",
]
