"""The likelihoods p(x|z), one class each: see `base`."""

from .base import REGISTRY, Likelihood, for_model, named, of
from .bernoulli import Bernoulli
from .gaussian import Gaussian
from .outputs import GaussianOutput, LinearLogits

__all__ = [
    "REGISTRY",
    "Bernoulli",
    "Gaussian",
    "GaussianOutput",
    "Likelihood",
    "LinearLogits",
    "for_model",
    "named",
    "of",
]
