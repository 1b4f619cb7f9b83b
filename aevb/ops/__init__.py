"""Fused ops for samples, KL divergences, log-likelihoods and the negative ELBO.

Each op runs a kernel, or `aevb.reference` where the device has none.
"""

from .gaussian import gaussian_kl, sample_gaussian, sample_gaussian_log_ratio
from .likelihood import bernoulli_log_prob, gaussian_log_prob, log_prob, sample_likelihood
from .random import binarize, mix_seed

__all__ = [
    "bernoulli_log_prob",
    "binarize",
    "gaussian_kl",
    "gaussian_log_prob",
    "log_prob",
    "mix_seed",
    "sample_gaussian",
    "sample_gaussian_log_ratio",
    "sample_likelihood",
]
