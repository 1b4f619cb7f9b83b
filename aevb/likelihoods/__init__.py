"""Likelihoods p(x|z), one class each; `base.Likelihood` is their interface."""

from .base import REGISTRY, Likelihood, for_model, named, of
from .bernoulli import Bernoulli
from .exponential import Exponential
from .gaussian import Gaussian
from .laplace import Laplace
from .mse import MSE
from .outputs import GaussianOutput, LinearLogits, LinearOutput

__all__ = [
    "MSE",
    "REGISTRY",
    "Bernoulli",
    "Exponential",
    "Gaussian",
    "GaussianOutput",
    "Laplace",
    "Likelihood",
    "LinearLogits",
    "LinearOutput",
    "for_model",
    "named",
    "of",
]
