"""Observation models of a clean image: missing pixels, flipped bits, Gaussian noise.

Each pixel is observed by itself, by a known p(y_i|x_i), and the model's pixels are independent given z. So p(y|z) and
p(x|y, z) are products over pixels, in closed form.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import takes_plain_values
from ..ops import mix_seed
from ..ops.gaussian import normals
from .protocols import PixelModel

_LOG_2PI = math.log(2 * math.pi)


class Observation(Protocol):
    """Observation y of B clean images x."""

    start: Tensor
    """(B, data_dim): first input of the encoder.

    One with `mask_input` is given the mask too, and 0 where pixels are missing.
    """
    observed: Tensor
    """bool, (B, data_dim): True where a pixel was observed."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(y|z), (S, B), in nats, of z (S, B, latent_dim)."""
        ...

    def clean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|y, z), each (S, B, data_dim)."""
        ...

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|y, z), (S, B, data_dim).

        Args:
            z: (S, B, latent_dim).
            noise: (S, B, data_dim), standard normals.
        """
        ...

    def clean_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|y, z) of each pixel, (S, B, data_dim).

        It is 0 for a pixel that was observed without noise.

        Args:
            x: (B, data_dim).
            z: (S, B, latent_dim).
        """
        ...


class MaskedObservation:
    """Some pixels without noise: y_i = x_i where observed, nothing elsewhere.

    ``log p(y|z) = sum over observed i of log p(x_i|z)``.

    Args:
        model: the model.
        x: (B, data_dim); missing pixels are not used.
        observed: bool, (B, data_dim): True where a pixel is known.
        fill: the encoder's first input where pixels are missing.
    """

    def __init__(self, model: PixelModel, x: Tensor, observed: Tensor, fill: Tensor | float):
        self.model, self.observed = model, observed
        self.start = self.x = _filled(x, observed, fill)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(y|z), (S, B), in nats, of z (S, B, latent_dim)."""
        return self.model.pixel_log_prob(self.x, z).where(self.observed, 0.0).sum(-1)

    def clean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|y, z), each (S, B, data_dim)."""
        mean, variance = self.model.moments(z)
        return torch.where(self.observed, self.x, mean), variance.where(~self.observed, 0.0)

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|y, z), (S, B, data_dim).

        Args:
            z: (S, B, latent_dim).
            noise: (S, B, data_dim), standard normals.
        """
        return torch.where(self.observed, self.x, self.model.draw(z, noise))

    def clean_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|y, z) of each pixel, (S, B, data_dim), in nats.

        It is 0 for an observed pixel.
        """
        return self.model.pixel_log_prob(x, z).where(~self.observed, 0.0)


class NoisyBits:
    """Bits with noise under a Bernoulli p(x|z), by each bit's evidence.

    The evidence is log p(y_i|x_i = 1) and log p(y_i|x_i = 0). With m_i = p(x_i = 1|z), for an observed pixel::

        p(y_i|z) = m_i p(y_i|1) + (1 - m_i) p(y_i|0)        p(x_i = 1|y_i, z) = m_i p(y_i|1) / p(y_i|z)

    Both are computed from the logits of m_i, with log_odds = log p(y_i|1) - log p(y_i|0). The first is
    ``log p(y_i|z) = log p(y_i|0) + softplus(logit + log_odds) - softplus(logit)``. The second is the sigmoid of
    ``logit + log_odds``.

    Bits that are flipped with probability p have p(y_i|b) = 1 - p where y_i = b, and p elsewhere. So
    ``p(y_i = 1|z) = (1 - p) m_i + p (1 - m_i)``. Gaussian noise has p(y_i|b) = N(y_i; b, sigma^2), a mixture of two.

    Args:
        model: a Bernoulli model.
        start: (B, data_dim), the encoder's first input.
        observed: bool, (B, data_dim): True where a pixel was observed.
        if_one: (B, data_dim), log p(y_i|x_i = 1).
        if_zero: (B, data_dim), log p(y_i|x_i = 0).
    """

    def __init__(self, model: PixelModel, start: Tensor, observed: Tensor, if_one: Tensor, if_zero: Tensor):
        self.model, self.start, self.observed = model, start, observed
        self.if_zero, self.log_odds = if_zero, (if_one - if_zero).where(observed, 0.0)

    @classmethod
    def flipped(cls, model: PixelModel, y: Tensor, observed: Tensor, fill: Tensor | float, flip: float) -> NoisyBits:
        """Returns the observation of bits y, each flipped with probability `flip`."""
        right, wrong = math.log1p(-flip), math.log(flip)
        start = _filled(y, observed, fill)
        one, zero = (torch.where(start == bit, right, wrong) for bit in (1, 0))
        return cls(model, start, observed, one, zero)

    @classmethod
    def with_gaussian(
        cls, model: PixelModel, y: Tensor, observed: Tensor, fill: Tensor | float, sigma: float
    ) -> NoisyBits:
        """Returns the observation of bits plus N(0, sigma^2), the values y."""
        y = _filled(y, observed, fill)
        one, zero = (_normal_log_prob(y, bit, sigma**2) for bit in (1, 0))
        return cls(model, y.clamp(0, 1), observed, one, zero)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(y|z), (S, B), in nats, of z (S, B, latent_dim)."""
        logits = self.model.decode(z)
        pixels = self.if_zero + F.softplus(logits + self.log_odds) - F.softplus(logits)
        return pixels.where(self.observed, 0.0).sum(-1)

    def clean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|y, z), each (S, B, data_dim)."""
        p = (self.model.decode(z) + self.log_odds).sigmoid()
        return p, p * (1 - p)

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|y, z), (S, B, data_dim).

        Args:
            z: (S, B, latent_dim).
            noise: (S, B, data_dim), standard normals.
        """
        return (torch.special.ndtr(noise) < self.clean(z)[0]).to(noise.dtype)

    def clean_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|y, z) of each pixel, (S, B, data_dim), in nats."""
        logits = self.model.decode(z) + self.log_odds
        return x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)


class GaussianNoise:
    """Gaussian noise on values under a Gaussian p(x_i|z) = N(m_i, v_i).

    y_i = x_i + N(0, sigma^2) where observed::

        p(y_i|z) = N(y_i; m_i, v_i + sigma^2)
        p(x_i|y_i, z) = N((v_i y_i + sigma^2 m_i) / (v_i + sigma^2), v_i sigma^2 / (v_i + sigma^2))

    Args:
        model: a Gaussian model.
        y: (B, data_dim); missing pixels are not used.
        observed: bool, (B, data_dim): True where a pixel was observed.
        fill: the encoder's first input where pixels are missing.
        sigma: standard deviation of the noise.
    """

    def __init__(self, model: PixelModel, y: Tensor, observed: Tensor, fill: Tensor | float, sigma: float):
        self.model, self.observed, self.noise = model, observed, sigma**2
        self.start = self.y = _filled(y, observed, fill)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p(y|z), (S, B), in nats, of z (S, B, latent_dim)."""
        mean, variance = self.model.moments(z)
        return _normal_log_prob(self.y, mean, variance + self.noise).where(self.observed, 0.0).sum(-1)

    def clean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|y, z), each (S, B, data_dim)."""
        mean, variance = self.model.moments(z)
        total = variance + self.noise
        gain = (variance / total).where(self.observed, 0.0)
        # variance * (1 - gain) would cancel to 0 under little noise.
        return torch.lerp(mean, self.y, gain), (variance * (self.noise / total)).where(self.observed, variance)

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|y, z), (S, B, data_dim).

        Args:
            z: (S, B, latent_dim).
            noise: (S, B, data_dim), standard normals.
        """
        mean, variance = self.clean(z)
        return mean + variance.sqrt() * noise

    def clean_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|y, z) of each pixel, (S, B, data_dim), in nats."""
        return _normal_log_prob(x, *self.clean(z))


def _filled(x: Tensor, observed: Tensor, fill: Tensor | float) -> Tensor:
    """Returns x with its missing pixels replaced, NaN included."""
    return torch.where(observed, x, fill)


def _normal_log_prob(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    return -0.5 * ((x - mean).square() / variance + variance.log() + _LOG_2PI)


# ---- noise and masks for a demonstration ----------------------------------------------------------------------------


@takes_plain_values
def flip_bits(x: Tensor, flip: float, *, seed: int = 0) -> Tensor:
    """Returns bits x (B, D), each flipped with probability `flip`.

    The flips are a function of the seed, the datapoint and the pixel.
    """
    return torch.where(_uniform(x, seed) < flip, 1 - x, x)


@takes_plain_values
def add_gaussian(x: Tensor, sigma: float, *, seed: int = 0) -> Tensor:
    """Returns x (B, D) with N(0, sigma^2) added to each value.

    The noise is a function of the seed, the datapoint and the pixel.
    """
    return x + sigma * _noise(x, seed)


@takes_plain_values
def random_mask(x: Tensor, missing: float, *, seed: int = 0) -> Tensor:
    """Returns a bool mask (B, D), False where a pixel is missing.

    Each pixel is True with probability 1 - missing. The mask is a function of the seed, the datapoint and the pixel.
    """
    return _uniform(x, seed) >= missing


def _uniform(x: Tensor, seed: int) -> Tensor:
    return torch.special.ndtr(_noise(x, seed))


def _noise(x: Tensor, seed: int) -> Tensor:
    return normals(mix_seed(mix_seed(seed, torch.arange(len(x), device=x.device)), 3), x.shape[-1])
