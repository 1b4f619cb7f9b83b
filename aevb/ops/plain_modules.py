"""Tests of whether a module does only its class's computation.

Only then may its weights be read instead of calling it.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .. import _torch
from .._torch import has_hooks

_CALL = nn.Module.__call__
# Each class's forward as PyTorch defines it; a class whose forward was replaced before the import is left out.
_FORWARD: dict[Any, Any] = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Tanh, nn.ReLU, nn.Sequential)
    if kind.forward.__module__ == kind.__module__ and not hasattr(kind.forward, "__wrapped__")
}
_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a call of the module is ``kind.forward`` of its own parameters.

    It is not in four cases:

    * The module is of another class, as after LoRA, quantization or a parametrization.
    * It has hooks, as pruning, offloading, profilers and `register_module_forward_hook` set them.
    * A method was replaced, or the module compiled.
    * A weight is a tensor with operations of its own, as a DTensor is.
    """
    return (
        type(module) is kind
        and _FORWARD.get(kind, kind.forward) is kind.forward
        and nn.Module.__call__ is _CALL
        and not has_hooks(module)
        and not _torch.has_call_replaced(module)
        and (kind is not nn.Linear or (_is_ordinary(module.weight) and _is_ordinary(module.bias)))
    )


def is_hooked(model: nn.Module) -> bool:
    """Whether a training step calls a hook of a module or parameter."""
    return any(map(has_hooks, model.modules())) or any(map(_torch.has_gradient_hooks, model.parameters()))


def inherits(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether the module, an instance of `kind`, inherits the given methods unchanged."""
    own, cls = vars(module), type(module)
    return all(name not in own and getattr(cls, name) is getattr(kind, name) for name in methods)


def _is_ordinary(t: Any) -> bool:
    # PyTorch traces with its own fake tensors.
    return t is None or type(t) in _ORDINARY or _torch.is_traced_by_fake_tensors(t)


def weight_of(module: nn.Module) -> Tensor:
    """Returns a floating tensor of the module, else an empty float32 tensor.

    The tensor has the module's dtype and device. A quantized module may have no parameters. A replica of
    `nn.DataParallel` keeps its weights under another name.
    """
    tensors = itertools.chain(module.parameters(), module.buffers(), _torch.former_parameters(module))
    return next((t for t in tensors if t is not None and t.is_floating_point()), torch.empty(0))
