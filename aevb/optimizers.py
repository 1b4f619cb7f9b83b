"""The optimizers, and the learning rate that a schedule gives them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor


class _Light(torch.optim.Optimizer):
    """PyTorch wraps these in something that imports torch._dynamo: a second that training does not need."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class _Adam(_Light, torch.optim.Adam):
    pass


class _Adagrad(_Light, torch.optim.Adagrad):
    pass


class _CapturableAdagrad(_Adagrad):
    """For a CUDA graph: torch's own reads the learning rate and the number of the step on the host, and has no fused
    kernel for a GPU. A step's number matters only to lr_decay, which is 0."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            grads = [p.grad for p in parameters]
            sums = [self.state[p]["sum"] for p in parameters]
            torch._foreach_addcmul_(sums, grads, grads, value=1)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, torch._foreach_mul(grads, -group["lr"]), roots)


def _adam(parameters, lr: float | Tensor, device: torch.device) -> torch.optim.Optimizer:
    adam = _Adam(parameters, lr=lr, fused=True, capturable=device.type == "cuda")
    adam._warned_capturable_if_run_uncaptured = True  # the steps before the captured one are meant
    return adam


def _adagrad(parameters, lr: float | Tensor, device: torch.device) -> torch.optim.Optimizer:
    return _CapturableAdagrad(parameters, lr=lr) if device.type == "cuda" else _Adagrad(parameters, lr=lr, fused=True)


OPTIMIZERS = {"adam": _adam, "adagrad": _adagrad}


def schedule_factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """What multiplies the learning rate of the step after `step` of `steps`.

    It grows in a line from 1 / warmup to 1 within the first `warmup` steps; then it is 1 ("constant"), or falls to 0 at
    the end, in a line ("linear") or along half a cosine ("cosine", Loshchilov & Hutter 2017, eq. 5 without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 1.0 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2


class Schedule:
    """Sets an optimizer's learning rates before a step. A constant one leaves them alone, so that a user may change
    them."""

    def __init__(self, kind: str, steps: int, warmup: int):
        self.kind, self.steps, self.warmup = kind, steps, warmup

    @property
    def is_constant(self) -> bool:
        return self.kind == "constant" and self.warmup == 0

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.is_constant:
            return
        factor = schedule_factor(self.kind, step, self.steps, self.warmup)
        for group in optimizer.param_groups:
            if "initial_lr" not in group:
                group["initial_lr"] = float(group["lr"])
            rate = factor * group["initial_lr"]
            if isinstance(group["lr"], Tensor):  # a captured step reads it where it is
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors, and what of it is numbers or text, for JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for number, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{number}.{key}"] = value
    groups = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"values": rest, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Puts back what `optimizer_state` gave, but for what the device decides. Raises ValueError where it is another
    optimizer's."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *rest["values"].items()):
        number, key = name.split(".", 1)
        # A copy of its own, since an optimizer writes to it in place.
        state.setdefault(int(number), {})[key] = value.clone() if isinstance(value, Tensor) else value
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for group, was in zip(optimizer.param_groups, before, strict=True):
        group.update({key: was[key] for key in ("capturable", "fused", "foreach") if key in was})
        if isinstance(was["lr"], Tensor):
            group["lr"] = was["lr"].fill_(group["lr"])
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})  # JSON has lists
