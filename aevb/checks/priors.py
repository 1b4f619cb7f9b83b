"""The prior of a posterior, as rows of the batch or one row for all, and the range of logvar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arguments import converted
from .errors import check_dense

Prior = tuple[Tensor, Tensor]
Range = tuple[float, float]


def checked_prior(prior: object, reader: str) -> Prior:
    """Returns (prior_mu, prior_logvar).

    Raises:
        ValueError: Not a pair, or of another dtype than a floating one.
        TypeError: Something else than two dense tensors.
    """
    if not isinstance(prior, tuple | list) or len(prior) != 2:
        what = f"a tensor of shape {tuple(prior.shape)}" if isinstance(prior, Tensor) else repr(prior)
        raise ValueError(f"aevb.{reader}: prior is {what}; expected a pair of tensors, (prior_mu, prior_logvar)")
    mu, logvar = prior
    if not (type(mu) is Tensor is type(logvar)):
        check_dense(reader, prior_mu=mu, prior_logvar=logvar)
    for name, t in (("prior_mu", mu), ("prior_logvar", logvar)):
        if not t.is_floating_point():
            raise ValueError(f"aevb.{reader}: {name} has dtype {str(t.dtype)[6:]}; expected a floating dtype")
    return mu, logvar


def is_shared(t: Tensor, latent_dims: int) -> bool:
    """Whether all rows of the batch share t: it has no dimension of the batch but such of size 1."""
    return t.shape[: max(t.dim() - latent_dims, 0)].numel() == 1


def rows_of(
    name: str,
    t: Tensor,
    mu: Tensor,
    batch_dims: int | None,
    expand: Callable[[Tensor, Sequence[int]], Tensor] = Tensor.expand,
) -> Tensor:
    """Returns a prior's tensor t as (D,) where all rows of the batch share it, else as (*batch, D).

    Args:
        name: What t is called.
        t: Of the shape of mu, or of one that broadcasts to it.
        mu: (*batch, *latent), the posterior's.
        batch_dims: Number of leading batch dimensions. With None the batch is all dimensions but the last.
        expand: Broadcasts a tensor to a shape.

    Raises:
        ValueError: Another shape.
    """
    if batch_dims is None and t.shape in (mu.shape, mu.shape[-1:]):  # the usual ones, at once
        return t
    batch = mu.dim() - 1 if batch_dims is None else batch_dims
    latent = mu.shape[batch:]
    shared = is_shared(t, len(latent))
    rows = t
    while rows.dim() > (len(latent) if shared else mu.dim()) and rows.shape[0] == 1:
        rows = rows.squeeze(0)
    if rows.dim() > mu.dim():
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} and mu {tuple(mu.shape)}: a prior cannot differ between the samples of "
            "a datapoint. Flatten the samples into the batch: expand mu and logvar by them, without num_samples"
        )
    shape = latent if shared else mu.shape
    if rows.shape != shape:
        sizes = zip(reversed(rows.shape), reversed(shape), strict=False)
        if not all(size in (1, wanted) for size, wanted in sizes):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)} and mu {tuple(mu.shape)}; expected a shape that broadcasts to "
                f"mu's, as {tuple(latent)} does: one prior for all datapoints"
            )
        rows = expand(rows, shape)
    return rows if len(latent) == 1 else rows.flatten(0 if shared else batch)


def check_own_parameters(prior: Prior, latent_dims: int) -> None:
    """Checks that the doubly reparameterized gradient holds for this prior.

    Raises:
        ValueError: A prior that was computed for each datapoint and has a gradient.
    """
    for name, t in zip(("prior_mu", "prior_logvar"), prior, strict=True):
        if t.requires_grad and not is_shared(t, latent_dims) and not t.is_leaf:
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} was computed for each datapoint, as from another latent, and has a "
                "gradient. The doubly reparameterized gradient is derived for a prior with parameters of its own "
                "(Bauer & Mnih 2021): share them between the datapoints, detach them, or use gradient 'total' "
                "(estimator 'iwae')"
            )


def checked_range(logvar_range: object) -> Range:
    """Returns the range of logvar as two floats.

    Raises:
        ValueError: Not two numbers, NaN, or the greater one first.
    """
    if not isinstance(logvar_range, tuple | list) or len(logvar_range) != 2:
        raise ValueError(f"logvar_range is {logvar_range!r}; expected two numbers, the least and the greatest logvar")
    low, high = (n if isinstance(n, float) else converted("logvar_range", n, float) for n in logvar_range)
    if not low <= high:
        raise ValueError(f"logvar_range is {(low, high)}; expected the least logvar before the greatest, and no NaN")
    return low, high


def clamped(logvar: Tensor, logvar_range: Range | None) -> Tensor:
    """Returns logvar within its range."""
    return logvar if logvar_range is None else torch.clamp(logvar, *checked_range(logvar_range))
