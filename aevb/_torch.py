"""PyTorch's private names that aevb uses, each with a fallback.

A fallback stands in for a name that a version of PyTorch lacks. It is the careful answer: a call then goes a slower
way, to the same numbers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F")


def find(path: str, otherwise: F) -> F | Any:
    """Returns the object of a dotted name under `torch`, or `otherwise`."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        return otherwise


# ---- transforms and modes around a call ------------------------------------------------------------------------------

_functorch_query: Callable[[], bool] | None = find("_C._are_functorch_transforms_active", None)


def _is_of_subclass(t: Tensor) -> bool:
    return type(t) not in (Tensor, nn.Parameter)


functorch_active: Callable[[], bool] = _functorch_query or (lambda: False)
"""Whether a transform of `torch.func` runs.

Without it, `apply_of` leaves transforms to PyTorch, which refuses them.
"""

is_legacy_batched: Callable[[Tensor], bool] = find("_C._functorch.is_legacy_batchedtensor", _is_of_subclass)
"""Whether a tensor stands for many, under ``torch.autograd.grad(..., is_grads_batched=True)``."""

num_dispatch_modes: Callable[[], int] = find("_C._len_torch_dispatch_stack", lambda: 1)
"""Number of dispatch modes, such as fake tensors, that see each operation."""

keeps_graph: Callable[[], bool] = find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)
"""Whether the running backward pass keeps its graph.

Then none of the graph's tensors may be overwritten.
"""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns `function.apply` without its support for `torch.func`.

    The support takes 2 us a call.
    """
    try:
        without = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    except AttributeError:
        return function.apply
    return function.apply if _functorch_query is None else without


# ---- hooks -----------------------------------------------------------------------------------------------------------

_modules: Any = importlib.import_module("torch.nn.modules.module")
_optimizers: Any = importlib.import_module("torch.optim.optimizer")
_REPLACED_CALL = ("forward", "_call_impl", "_compiled_call_impl")


def has_hooks(module: Any) -> bool:
    """Whether a call of the module runs a hook, own or global."""
    try:  # global hooks are looked up each time: registering one may replace the dictionary
        of_all = _modules._global_forward_hooks or _modules._global_forward_pre_hooks
        of_all = of_all or _modules._global_backward_hooks or _modules._global_backward_pre_hooks
        own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    except AttributeError:
        return True
    return bool(of_all or own)


def has_gradient_hooks(parameter: Any) -> bool:
    """Whether a backward pass calls a hook of this parameter."""
    try:
        return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
    except AttributeError:
        return True


def has_optimizer_hooks(optimizer: Any) -> bool:
    """Whether a step of the optimizer runs a hook, own or global."""
    try:
        of_all = _optimizers._global_optimizer_pre_hooks or _optimizers._global_optimizer_post_hooks
        own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    except AttributeError:
        return True
    return bool(of_all or own)


def has_call_replaced(module: nn.Module) -> bool:
    """Whether a method behind the module's call was replaced or compiled.

    Only replacements on this object count.
    """
    own = vars(module)
    return any(name in own for name in _REPLACED_CALL)


def version_of(t: Tensor) -> object:
    """Returns what changes when a tensor is written to: without a counter, something new each time."""
    return getattr(t, "_version", object())


def knows_groups(optimizer: Any) -> bool:
    """Whether an optimizer collects the tensors of a group, as PyTorch's own step does."""
    return hasattr(optimizer, "_init_group")


def uncompiled(model: Any) -> Any:
    """Returns the module inside one of `torch.compile`, which compiles no method but `forward`; any other as it is."""
    return getattr(model, "_orig_mod", model)


def former_parameters(module: nn.Module) -> list[Tensor]:
    """Returns the weights of a replica of `nn.DataParallel`, which are no parameters."""
    return [t for m in module.modules() for t in getattr(m, "_former_parameters", {}).values()]


def is_traced_by_fake_tensors(t: object) -> bool:
    """Whether t is a tensor of PyTorch's own tracing."""
    return type(t).__module__.startswith("torch._subclasses.")


# ---- operations ------------------------------------------------------------------------------------------------------

view_of_unshared: Callable[[Tensor, list[int]], Tensor] = find("ops.aten._unsafe_view", torch.reshape)
"""Returns an unshared tensor in another shape.

It is no view, so it may be overwritten.
"""


def linear_pointwise() -> Callable[..., Tensor] | None:
    """Returns oneDNN's product with bias, or None if missing or broken."""
    op = find("ops.mkldnn._linear_pointwise.default", None)
    a = torch.ones(3, 2)
    try:
        works = op is not None and torch.equal(op(a, a, None, "none", [], ""), a @ a.t())
    except (RuntimeError, TypeError):
        return None
    return op if works else None


reorder_linear_weight: Callable[[Tensor], Tensor] = find("ops.mkldnn._reorder_linear_weight", lambda t: t)
"""Returns a weight in oneDNN's preferred layout, for `linear_pointwise` alone."""


def _add_(tensors: Sequence[Tensor], others: Any) -> None:
    for t in tensors:
        t.add_(others)


def _addcmul_(tensors: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], value: float = 1) -> None:
    for t, x, y in zip(tensors, a, b, strict=True):
        t.addcmul_(x, y, value=value)


def _addcdiv_(tensors: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for t, x, y in zip(tensors, a, b, strict=True):
        t.addcdiv_(x, y)


# Each applies the operation of its name to every tensor of a list.
foreach_add_ = find("_foreach_add_", _add_)
foreach_addcmul_ = find("_foreach_addcmul_", _addcmul_)
foreach_addcdiv_ = find("_foreach_addcdiv_", _addcdiv_)
foreach_sqrt = find("_foreach_sqrt", lambda tensors: [t.sqrt() for t in tensors])
foreach_mul = find("_foreach_mul", lambda tensors, factor: [t * factor for t in tensors])
