"""Errors that name the argument or memory; warnings at the caller's line."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C

READERS = {  # the caller's name of an op, or of `log_prob` with a likelihood's kernel
    "negative_elbo": "FusedELBO",
    **{f"{name}_with_prior": name for name in ("gaussian_kl", "sample_gaussian", "sample_gaussian_log_ratio")},
    **dict.fromkeys(_C.likelihoods(), "log_prob"),
    **{name: f"{kind}_log_prob" for kind in ("bernoulli", "gaussian") for name in _C.likelihoods() if kind in name},
}
_strided = torch.strided


def is_dense(t: object) -> bool:
    """Whether t is a strided tensor, as kernels read it."""
    return isinstance(t, Tensor) and t.layout is _strided and not t.is_quantized and not t.is_nested


def check_dense(reader: str, **tensors: object) -> None:
    """Checks that every argument of `reader` is a dense tensor.

    Args:
        reader: Name of the called function, for the error.
        **tensors: The arguments, by name.

    Raises:
        TypeError: The first argument that is not a dense tensor; the message says of which kind it is.
    """
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            kind = type(t).__name__ if type(t).__module__ == "builtins" else f"{type(t).__module__}.{type(t).__name__}"
            hint = ": torch.from_numpy(...)" if kind == "numpy.ndarray" else ""
            raise TypeError(f"aevb.{reader}: {name} is a {kind}; expected a torch.Tensor{hint}")
        if t.is_nested:
            raise TypeError(f"aevb.{reader}: {name} is a nested tensor; expected a padded one, of one shape for all")
        if t.layout is not _strided:
            layout = str(t.layout).removeprefix("torch.").lstrip("_")
            raise TypeError(f"aevb.{reader}: {name} is a tensor of layout {layout}; expected a dense one: .to_dense()")
        if t.is_quantized:
            raise TypeError(f"aevb.{reader}: {name} is a quantized tensor; expected a dense one: .dequantize()")


def explain(error: BaseException, op: str, arguments: Mapping[str, Any], fake: Callable) -> None:
    """Raises a clearer error in place of a kernel's, if possible.

    Args:
        error: The kernel's error.
        op: Name of the op.
        arguments: The op's arguments by name, in order.
        fake: Function of the arguments that returns the op's results, for their shapes.

    Raises:
        TypeError: An argument that is not a dense tensor.
        OutOfMemoryError: See `explain_memory`.
        RuntimeError: The kernel's own error, with the name of the function that was called.
    """
    likelihood = arguments.get("likelihood", "") if op == "log_prob" else ""
    reader = READERS.get(likelihood or op, op)
    # A likelihood's parameters get their own names.
    named = {f"p{i}": name for i, name in enumerate(_C.likelihoods().get(likelihood, ()))}
    tensors = {named.get(name, name): t for name, t in arguments.items() if isinstance(t, Tensor)}
    check_dense(reader, **tensors)
    explain_memory(error, reader, tensors, lambda: fake(*arguments.values()))
    if likelihood and str(error).startswith(f"aevb.{op}: "):
        raise RuntimeError(str(error).replace(f"aevb.{op}: ", f"aevb.{reader}: ", 1)) from error


def explain_memory(
    error: BaseException, reader: str, tensors: Mapping[str, Tensor], fake: Callable[[], Tensor | Sequence[Tensor]]
) -> None:
    """Raises an OutOfMemoryError that says how many bytes are needed.

    Args:
        error: The kernel's error.
        reader: Name of the called function.
        tensors: Its tensor arguments, by name.
        fake: Returns the op's results, for their shapes.

    Raises:
        OutOfMemoryError: The kernel found too little memory for the results and copies that it needs.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    try:
        results = fake()
    except Exception:  # wrong arguments, which the original error names
        return
    parts = list(_parts(tensors, [results] if isinstance(results, Tensor) else results))
    total = sum(size for _, size in parts)
    device = next(iter(tensors.values())).device
    if isinstance(error, MemoryError) or "allocat" in str(error) or total > _free(device):
        what = ", ".join(text for text, _ in parts)
        raise torch.OutOfMemoryError(
            f"aevb.{reader}: {total:,} bytes are needed for {what}, and {device} has not so many left"
        ) from error


def _parts(tensors: Mapping[str, Tensor], results: Sequence[Tensor]) -> Iterator[tuple[str, int]]:
    """Yields description and bytes of each tensor that a kernel allocates.

    These are the results, and copies of the tensors that are not contiguous.
    """
    for t in results:
        if t.numel():
            yield f"a result, {_of(t)}", t.numel() * t.element_size()
    for name, t in tensors.items():
        if not t.is_contiguous():
            yield f"a copy of {name}, {_of(t)}", t.numel() * t.element_size()


def _of(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return float("inf")


def warn(sentence: str) -> None:
    """Warns at the line that called the library."""
    frame, count = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("aevb", "torch"):
        frame, count = frame.f_back, count + 1
    warnings.warn(sentence, stacklevel=count + 1)
