"""Which leading dimensions of the posterior's parameters are the batch, and which the latent ones."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias

import torch
from torch import Tensor

from .explain import check_dense, is_dense

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator]"  # or one for each datapoint

_functorch_active = torch._C._are_functorch_transforms_active
_said: set[str] = set()


def checked_batch_dims(batch_dims: int | None) -> int | None:
    """batch_dims, None or a whole number from 0 up."""
    if batch_dims is None:
        return None
    try:
        number = -1 if isinstance(batch_dims, bool) else operator.index(batch_dims)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(
            f"batch_dims is {batch_dims!r}; expected how many leading dimensions are the batch: 1 for mu (B, C, H, W)"
        )
    return number


def latents(
    mu: Tensor, logvar: Tensor, batch_dims: int | None, reader: str = "", frames: int = 0
) -> tuple[Tensor, Tensor]:
    """mu and logvar as (*batch, D). Without batch_dims the batch is all but the last dimension, and `reader`, who was
    called so many frames above, says once how it read more than two."""
    if batch_dims is None:
        if mu.dim() > 2 and _can_say(reader):
            _say_batch(mu, reader, frames)
        return mu, logvar
    batch_dims = checked_batch_dims(batch_dims)
    assert batch_dims is not None
    if mu.dim() <= batch_dims:
        raise ValueError(
            f"mu has shape {tuple(mu.shape)} and batch_dims is {batch_dims}; expected (*batch, *latent): at least "
            f"{batch_dims + 1} dimensions"
        )
    if mu.shape != logvar.shape:  # which flat ones would not show
        raise ValueError(f"mu has shape {tuple(mu.shape)} and logvar {tuple(logvar.shape)}; expected one shape")
    if mu.dim() == batch_dims + 1:
        return mu, logvar
    return mu.flatten(batch_dims), logvar.flatten(batch_dims)


def shaped(z: Tensor, mu: Tensor, flat: Tensor) -> Tensor:
    """Samples (*samples, *batch, D) of flat latents, in the shape of mu."""
    return z if flat.dim() == mu.dim() else z.reshape(*z.shape[: z.dim() - flat.dim()], *mu.shape)


def int64(value: Tensor | SupportsIndex, name: str, device: torch.device | None = None) -> Tensor:
    """An int or a tensor of int64, as a tensor: what is no whole number is not cut to one."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise RuntimeError(f"{name} has dtype {str(value.dtype)[6:]}; expected an int or an int64 tensor")
        if not is_dense(value):
            check_dense("mix_seed", **{name: value})
        return value
    if not isinstance(value, int):
        try:
            value = operator.index(value)  # numpy's integers too
        except TypeError:
            raise ValueError(f"{name} is {value!r}; expected an integer, or an int64 tensor") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}; expected a 64-bit signed integer")
    return torch.full((), value, dtype=torch.int64, device=device)  # a fill: a copy would wait for a GPU


def check_generators(generators: Sequence[torch.Generator], mu: Tensor) -> None:
    """That there is one for each datapoint of mu (*batch, D), by its first dimension."""
    if mu.dim() < 2 or len(generators) != mu.shape[0]:
        raise ValueError(
            f"there are {len(generators)} generators for mu of shape {tuple(mu.shape)}; expected one for each of its "
            "first dimension"
        )


def check_seed(seed: object, batch_dims: int | None, num_samples: int | None) -> None:
    """That a tensor of seeds, where batch_dims is given, has a seed for each datapoint, or fewer."""
    if batch_dims is None or not isinstance(seed, Tensor):
        return
    most = batch_dims + (num_samples is not None)
    if seed.dim() > most:
        expected = "(), (num_samples,) or (num_samples, *batch)" if num_samples is not None else "() or (*batch,)"
        raise ValueError(
            f"seed has shape {tuple(seed.shape)} and batch_dims is {batch_dims}; expected {expected}: the noise of a "
            "datapoint has one seed"
        )


def _can_say(what: str) -> bool:
    """Whether to say it: once, and not where nobody would see it, or only part of the dimensions. What was said is no
    guard of a compiled function."""
    return not torch.compiler.is_compiling() and not _functorch_active() and what not in _said


def _say_batch(mu: Tensor, reader: str, frames: int) -> None:
    _said.add(reader)
    *batch, size = mu.shape
    count = torch.Size(batch).numel()
    warnings.warn(
        f"{reader} read mu of shape {tuple(mu.shape)} as {count} datapoints of {size} latent dimensions: without "
        f"batch_dims every dimension but the last is of the batch. batch_dims={len(batch)} says that this is meant; "
        f"batch_dims=1 means {mu.shape[0]} datapoints of {mu.shape[1:].numel()}",
        stacklevel=frames + 1,
    )


def say_one_datapoint(mu: Tensor, x: Tensor, frames: int) -> None:
    """Warns once of mu (B,) beside x (B, ...), which is one datapoint of B latent dimensions."""
    if not _can_say("1-d"):
        return
    _said.add("1-d")
    warnings.warn(
        f"FusedELBO read mu of shape {tuple(mu.shape)} and x of shape {tuple(x.shape)} as one datapoint of {len(mu)} "
        "latent dimensions. batch_dims=0 says that this is meant; one latent dimension of a batch is mu.unsqueeze(-1)",
        stacklevel=frames,
    )
