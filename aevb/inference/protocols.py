"""Model protocols of `aevb.inference`, and passes over data in batches.

A model is any object with `encode(x) -> (mu, logvar)` and `log_prob(x, z) -> log p(x|z)`. Its prior is N(0, I), or
N(prior_mu, exp(prior_logvar)) where it has an attribute `prior_parameters`, (prior_mu, prior_logvar), each
(latent_dim,). x has one datapoint for each index of its first dimension. Every function goes through x in batches,
without gradients, and sums in float64. Noise belongs to a datapoint, not to a batch, so that no result depends on the
batches beyond rounding. A model with dropout or batch normalisation belongs in `eval()` first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks.errors import check_dense
from ..likelihoods.values import check_pixels
from .standardised import standardised


class Encoder(Protocol):
    """Posterior q(z|x) = N(mu, exp(logvar)), diagonal."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (mu, logvar), each (B, D), of x (B, ...)."""
        ...


class LatentVariableModel(Encoder, Protocol):
    """Prior p(z), likelihood p(x|z), and a posterior."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x|z), (S, B), in nats.

        Args:
            x: (B, ...).
            z: (S, B, D).
        """
        ...


class PixelModel(Protocol):
    """Latent variable model with pixels that are independent given z."""

    data_dim: int
    latent_dim: int
    likelihood: str

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (mu, logvar), each (B, latent_dim), of x (B, data_dim)."""
        ...

    def decode(self, z: Tensor) -> Any:
        """Returns the parameters of p(x|z); of a Bernoulli model the logits."""
        ...

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x|z), in nats, of z's leading dimensions."""
        ...

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|z), both (..., data_dim)."""
        ...

    def pixel_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each pixel, (..., data_dim), in nats."""
        ...

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|z), from standard normals of its shape."""
        ...


class GenerativeModel(PixelModel, Protocol):
    """Pixel model with the mean of p(x|z)."""

    def mean(self, z: Tensor) -> Tensor:
        """Returns E[x|z], (..., data_dim)."""
        ...


def observed_part(x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns x with 0 where it is missing, and the mask in x's shape.

    Args:
        x: (..., *datapoint); of what is missing nothing is used, and it may be NaN.
        observed: bool, of x's shape or of trailing dimensions of it: True where a value is observed. None for all.

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    if observed is None:
        return x, None
    if observed.dtype != torch.bool or tuple(observed.shape) not in [tuple(x.shape[i:]) for i in range(x.dim())]:
        raise ValueError(
            f"observed is {observed.dtype} {tuple(observed.shape)}; expected torch.bool {tuple(x.shape)} or "
            f"{tuple(x.shape[1:])}, True where a value is observed"
        )
    observed = observed.expand(x.shape)
    return x.masked_fill(~observed, 0), observed


def encoded(model: Any, x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (mu, logvar) of x, which holds 0 where it is missing.

    A model whose `mask_input` is true is given the mask too.
    """
    if observed is None or not getattr(model, "mask_input", False):
        return model.encode(x)
    return model.encode(x, observed=observed)


def log_prob_observed(model: Any, x: Tensor, z: Tensor, observed: Tensor | None) -> Tensor:
    """Returns log p(x_observed|z), in nats, of z's leading dimensions."""
    return model.log_prob(x, z) if observed is None else model.log_prob(x, z, weight=observed)


def check_takes_weight(model: Any) -> None:
    """Check that a model's log_prob can leave missing values out.

    Raises:
        ValueError: it has no parameter `weight`.
    """
    parameters = inspect.signature(model.log_prob).parameters.values()
    if not any(p.name == "weight" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{type(model).__name__}.log_prob takes no weight, and values are missing; expected log_prob(x, z, "
            "weight=None), where weight is x's mask, False where a value is missing: of aevb.bernoulli_log_prob and "
            "the like it is an argument too"
        )


def in_batches(x: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yields batches of x, each with the index of its first datapoint.

    Raises:
        ValueError: a batch_size below 1, or no datapoints.
    """
    check_counts(batch_size=batch_size)
    check_dense("diagnostics", x=x)
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, ...), of at least one datapoint")
    for first in range(0, len(x), batch_size):
        yield first, x[first : first + batch_size]


def encode_all(model: Encoder, x: Tensor, batch_size: int, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar, (N, D), float64, of all datapoints.

    They are in the coordinates in which the prior is N(0, I).

    Raises:
        ValueError: no datapoints, a batch_size below 1, or an encoder with other shapes or non-finite results.
    """
    x, observed = observed_part(x, observed)
    check_pixels(model, {"x": x})
    model = standardised(model)
    found = [
        encoded_batch(model, batch, first, None if observed is None else observed[first : first + batch_size])
        for first, batch in in_batches(x, batch_size)
    ]
    mu, logvar = (torch.cat([t.double() for t in parts]) for parts in zip(*found, strict=True))
    return mu, logvar


def encoded_batch(model: Encoder, x: Tensor, first: int, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar of one batch, after a check.

    `first` is the index of the batch's first datapoint, for messages.

    Raises:
        ValueError: an encoder with other shapes or non-finite results.
    """
    mu, logvar = encoded(model, x, observed)
    if mu.dim() != 2 or len(mu) != len(x) or mu.shape != logvar.shape:
        raise ValueError(
            f"model.encode(x) gives mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} for x {tuple(x.shape)}; "
            f"expected ({len(x)}, latent_dim) of both"
        )
    for name, t in (("mu", mu), ("logvar", logvar)):
        wrong = ~t.isfinite()
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}[{column}] of datapoint {first + row} is {t[row, column].item()}; expected finite numbers: "
                "has training diverged, or is x not finite?"
            )
    return mu, logvar


def check_counts(**counts: int) -> None:
    """Check that each number, given by its name, is at least 1.

    Raises:
        ValueError: a number below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def check_threshold(name: str, threshold: float) -> None:
    """Check that a threshold is finite and at least 0.

    Raises:
        ValueError: another threshold.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{name} is {threshold}; expected a number from 0 up")
