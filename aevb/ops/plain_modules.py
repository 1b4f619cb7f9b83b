"""Whether a module does what its class says and no more. Only then may its weights be read instead of calling it."""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .. import _torch
from .._torch import has_hooks

_CALL = nn.Module.__call__
# As PyTorch has them: of classes whose forward somebody had replaced before, none is.
_FORWARD: dict[Any, Any] = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Tanh, nn.ReLU, nn.Sequential)
    if kind.forward.__module__ == kind.__module__ and not hasattr(kind.forward, "__wrapped__")
}
_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a call of the module is ``kind.forward`` of its own parameters.

    It is not where the module is of another class, as after LoRA, quantization or a parametrization; where it has
    hooks, as pruning, offloading, profilers and `register_module_forward_hook` set them; where a method was replaced
    or the module compiled; or where a weight is a tensor with operations of its own, as a DTensor is.
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
    """Whether a training step of the model calls somebody else's function: a hook of a module or of a parameter."""
    return any(map(has_hooks, model.modules())) or any(map(_torch.has_gradient_hooks, model.parameters()))


def inherits(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether the module, of a subclass of `kind`, has these methods from it."""
    own, cls = vars(module), type(module)
    return all(name not in own and getattr(cls, name) is getattr(kind, name) for name in methods)


def _is_ordinary(t: Any) -> bool:
    # PyTorch traces with its own fake tensors.
    return t is None or type(t) in _ORDINARY or _torch.is_traced_by_fake_tensors(t)


def weight_of(module: nn.Module) -> Tensor:
    """A tensor of the module's dtype and device; an empty float32 one where it has none.

    A quantized module may have no parameters, and a replica of `nn.DataParallel` has none that are called so.
    """
    tensors = itertools.chain(module.parameters(), module.buffers(), _torch.former_parameters(module))
    return next((t for t in tensors if t is not None and t.is_floating_point()), torch.empty(0))
