"""Checks and conversions of seeds and generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .arguments import converted
from .errors import check_dense, is_dense

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator]"  # or one per datapoint


def int64(value: Tensor | int, name: str, device: torch.device | None = None) -> Tensor:
    """Returns an int or an int64 tensor as a tensor.

    Args:
        value: The seed or index. A number that is not whole is not cut to one.
        name: Name of the argument, for the error.
        device: Device of the tensor made of an int.

    Raises:
        RuntimeError: A tensor of another dtype.
        ValueError: A number that is not whole, or does not fit in 64 bits.
        TypeError: A tensor that is not dense.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise RuntimeError(f"{name} has dtype {str(value.dtype)[6:]}; expected an int or an int64 tensor")
        if not is_dense(value):
            check_dense("mix_seed", **{name: value})
        return value
    if not isinstance(value, int):
        value = converted(name, value, int)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}; expected a 64-bit signed integer")
    return torch.full((), value, dtype=torch.int64, device=device)  # a fill: a copy would synchronize with the GPU


def check_generators(generators: Sequence[torch.Generator], mu: Tensor) -> None:
    """Checks that each datapoint of mu (*batch, D) has one generator.

    Raises:
        ValueError: Another number of generators than mu's first dimension, or mu of fewer than 2 dimensions.
    """
    if mu.dim() < 2 or len(generators) != mu.shape[0]:
        raise ValueError(
            f"there are {len(generators)} generators for mu of shape {tuple(mu.shape)}; expected one for each of its "
            "first dimension"
        )


def check_seed(seed: object, batch_dims: int | None, num_samples: int | None) -> None:
    """Checks that a seed tensor has at most one seed per datapoint.

    Only a tensor of seeds with batch_dims given is checked.

    Raises:
        ValueError: A seed of more dimensions than the batch, and the samples with num_samples.
    """
    if batch_dims is None or not isinstance(seed, Tensor):
        return
    most = batch_dims + (num_samples is not None)
    if seed.dim() > most:
        expected = "(), (num_samples,) or (num_samples, *batch)" if num_samples is not None else "() or (*batch,)"
        raise ValueError(
            f"seed has shape {tuple(seed.shape)} and batch_dims is {batch_dims}; expected {expected}: the noise of a "
            "datapoint has one seed"
        )
