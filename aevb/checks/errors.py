"""What a call says: which argument was no dense tensor, how much memory was asked for and for what, and warnings."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C

READERS = {  # who calls an op of another name, or `log_prob` of a likelihood
    "negative_elbo": "FusedELBO",
    **dict.fromkeys(_C.likelihoods(), "log_prob"),
    **{name: f"{kind}_log_prob" for kind in ("bernoulli", "gaussian") for name in _C.likelihoods() if kind in name},
}
_strided = torch.strided


def is_dense(t: object) -> bool:
    """Whether t is a tensor whose elements lie at strides, as kernels read them."""
    return isinstance(t, Tensor) and t.layout is _strided and not t.is_quantized and not t.is_nested


def check_dense(reader: str, **tensors: object) -> None:
    """Raises, for the first of the arguments of `reader` that is no dense tensor, a TypeError that says what it is."""
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
    """Raises what is to be said instead of `error`, of a kernel, if something is; `fake` gives its results' shapes."""
    likelihood = arguments.get("likelihood", "") if op == "log_prob" else ""
    reader = READERS.get(likelihood or op, op)
    # A likelihood's parameters by their own names.
    named = {f"p{i}": name for i, name in enumerate(_C.likelihoods().get(likelihood, ()))}
    tensors = {named.get(name, name): t for name, t in arguments.items() if isinstance(t, Tensor)}
    check_dense(reader, **tensors)
    explain_memory(error, reader, tensors, lambda: fake(*arguments.values()))
    if likelihood and str(error).startswith(f"aevb.{op}: "):
        raise RuntimeError(str(error).replace(f"aevb.{op}: ", f"aevb.{reader}: ", 1)) from error


def explain_memory(
    error: BaseException, reader: str, tensors: Mapping[str, Tensor], fake: Callable[[], Tensor | Sequence[Tensor]]
) -> None:
    """Raises, where a kernel of `reader` found too little memory, an error that says how many bytes for what."""
    if isinstance(error, torch.OutOfMemoryError):
        return
    try:
        results = fake()
    except Exception:  # of arguments that are wrong otherwise, which the error says
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
    """What a kernel allocates, and how many bytes: its results, and copies of rows that are not evenly spaced."""
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
