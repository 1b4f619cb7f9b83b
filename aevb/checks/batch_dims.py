"""Batch and latent dimensions of the posterior's mu and logvar."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _torch
from .arguments import converted
from .errors import warn

_functorch_active = _torch.functorch_active
_said: set[str] = set()


def checked_batch_dims(batch_dims: int | None) -> int | None:
    """Returns batch_dims as None or a whole number from 0 up.

    Raises:
        ValueError: Another value.
    """
    if batch_dims is not None and (isinstance(batch_dims, bool) or not isinstance(batch_dims, int)):
        batch_dims = converted("batch_dims", batch_dims, int)
    if batch_dims is not None and batch_dims < 0:
        raise ValueError(
            f"batch_dims is {batch_dims}; expected how many leading dimensions are the batch: 1 for mu (B, C, H, W)"
        )
    return batch_dims


def datapoints(x: Tensor, batch: Sequence[int]) -> Tensor:
    """Returns x (*batch, *datapoint) as (*batch, D), each datapoint flat.

    Everything after the batch is the datapoint; without any dimension left it is one element.

    Raises:
        ValueError: x does not begin with the batch.
    """
    if tuple(x.shape[: len(batch)]) != tuple(batch):
        raise ValueError(f"x has shape {tuple(x.shape)} and kl is of a batch {tuple(batch)}; expected x (*batch, ...)")
    return x.flatten(len(batch)) if x.dim() > len(batch) else x.unsqueeze(-1)


def samples_of(recon: Tensor, x: Tensor) -> int:
    """Returns how many samples of each datapoint there are in recon (*samples, *batch, *datapoint).

    The datapoint may have another shape in recon than in x (*batch, *datapoint).
    """
    return recon.numel() // x.numel() if x.numel() else recon.shape[: recon.dim() - x.dim()].numel()


def matched(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar in one dtype and one shape, as PyTorch promotes and broadcasts them.

    Shapes that do not broadcast, and tensors that are not dense, are returned as they are: what reads them raises then.
    """
    if mu.is_nested or logvar.is_nested or (mu.dtype == logvar.dtype and mu.shape == logvar.shape):
        return mu, logvar
    if mu.is_floating_point() and logvar.is_floating_point():
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    with contextlib.suppress(RuntimeError):
        mu, logvar = torch.broadcast_tensors(mu, logvar)
    return mu, logvar


def latents(mu: Tensor, logvar: Tensor, batch_dims: int | None, reader: str = "") -> tuple[Tensor, Tensor]:
    """Returns mu and logvar as (*batch, D).

    Args:
        mu: (*batch, *latent).
        logvar: Of mu's shape.
        batch_dims: Number of leading batch dimensions. With None the batch is all dimensions but the last.
        reader: Name of the calling function. It warns once how mu of more than two dimensions was read without
            batch_dims.

    Raises:
        ValueError: mu without a latent dimension, or logvar of another shape, with batch_dims given.
    """
    if batch_dims is None:
        if mu.dim() > 2 and _can_say(reader):
            _say_batch(mu, reader)
        return mu, logvar
    batch_dims = checked_batch_dims(batch_dims)
    assert batch_dims is not None
    if mu.dim() <= batch_dims:
        raise ValueError(
            f"mu has shape {tuple(mu.shape)} and batch_dims is {batch_dims}; expected (*batch, *latent): at least "
            f"{batch_dims + 1} dimensions"
        )
    if mu.shape != logvar.shape:  # flattened shapes could agree
        raise ValueError(f"mu has shape {tuple(mu.shape)} and logvar {tuple(logvar.shape)}; expected one shape")
    if mu.dim() == batch_dims + 1:
        return mu, logvar
    return mu.flatten(batch_dims), logvar.flatten(batch_dims)


def shaped(z: Tensor, mu: Tensor, flat: Tensor) -> Tensor:
    """Returns samples of flat latents, (*samples, *batch, D), in mu's shape."""
    return z if flat.dim() == mu.dim() else z.reshape(*z.shape[: z.dim() - flat.dim()], *mu.shape)


def _can_say(what: str) -> bool:
    """Whether to warn now: once, and where the user sees it.

    There is no warning in compiled code or under `torch.func`, where only part of the dimensions is seen. The set of
    warnings given is not read while compiling, so it is no guard of a compiled function.
    """
    return not torch.compiler.is_compiling() and not _functorch_active() and what not in _said


def _say_batch(mu: Tensor, reader: str) -> None:
    _said.add(reader)
    *batch, size = mu.shape
    count = torch.Size(batch).numel()
    warn(
        f"{reader} read mu of shape {tuple(mu.shape)} as {count} datapoints of {size} latent dimensions: without "
        f"batch_dims every dimension but the last is of the batch. batch_dims={len(batch)} says that this is meant; "
        f"batch_dims=1 means {mu.shape[0]} datapoints of {mu.shape[1:].numel()}"
    )


def say_one_datapoint(mu: Tensor, x: Tensor) -> None:
    """Warns once of mu (B,) read as one datapoint.

    Beside x (B, ...) such a mu may be meant as B datapoints of one latent dimension.
    """
    if not _can_say("1-d"):
        return
    _said.add("1-d")
    warn(
        f"FusedELBO read mu of shape {tuple(mu.shape)} and x of shape {tuple(x.shape)} as one datapoint of {len(mu)} "
        "latent dimensions. batch_dims=0 says that this is meant; one latent dimension of a batch is mu.unsqueeze(-1)"
    )
