"""Diagnostics of a posterior's latent space, and annealed importance sampling.

They are functions of `aevb.inference`: active units, KL per dimension, mutual information, posterior collapse, log
p(x).
"""

from .inference.ais import AnnealedImportanceSampling, annealed_importance_sampling
from .inference.latent_space import (
    ActiveUnits,
    MutualInformation,
    PosteriorCollapse,
    active_units,
    kl_per_dimension,
    mutual_information,
    posterior_collapse,
)
from .inference.protocols import Encoder, LatentVariableModel

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
