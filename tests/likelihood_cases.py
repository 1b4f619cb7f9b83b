"""Every likelihood of the registry, with parameters and data of it."""

import pytest
from conftest import rand, randn

from aevb import likelihoods
from aevb.likelihoods import REGISTRY

FAMILIES = {
    **{name: cls() for name, cls in REGISTRY.items()},
    "bernoulli, probabilities": likelihoods.Bernoulli(from_probs=True),
    "gaussian, sigmoid means": likelihoods.Gaussian(sigmoid_means=True),
}
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def drawn(family, *shape, number=1):
    """Parameters, float32."""
    params = [0.7 * randn(number + i, *shape) for i in range(len(family.params))]
    if getattr(family, "from_probs", False):
        params[0] = 0.05 + 0.9 * rand(number, *shape)
    return params


def data(family, *shape):
    """x in the support, away from where a density has a kink."""
    low, high = family.support
    x = rand(7, *shape)
    return x if (low, high) == (0, 1) else x + 0.01 if low == 0 else 3 * x - 1


def as_recon(params):
    return params[0] if len(params) == 1 else tuple(params)
