"""Optimizers, and schedules of the learning rate."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from .. import _C, _torch  # noqa: F401  _C registers the ops
from ..checks.choices import unknown

_adam_step = torch.ops.aevb.adam_.default


class _Light(torch.optim.Optimizer):
    """Optimizer with two methods free of PyTorch's wrappers.

    The wrappers import torch._dynamo, which takes a second and is not needed for training.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class _Adam(_Light, torch.optim.Adam):
    pass


class _GpuAdam(_Adam):
    """Adam with aevb's own CUDA kernel where the weights are float32.

    PyTorch's kernel leaves most of a GPU idle for a model of less than ten million weights. Of a captured step of 100
    images it took 71 of 182 us on an H100.
    """

    @torch.no_grad()
    def step(self, closure=None):
        plain = _torch.knows_groups(self) and all(map(self._is_plain, self.param_groups))
        if closure is not None or not plain:
            return inspect.unwrap(torch.optim.Adam.step)(self, closure)
        for group in self.param_groups:
            weights: list[Tensor] = []
            kept: tuple[list[Tensor], ...] = [], [], [], [], []  # grads, means, squares, largest squares, steps
            self._init_group(group, weights, *kept)
            grads, means, squares, _, steps = kept
            if not weights:
                continue
            _torch.foreach_add_(steps, 1)
            lr, (beta1, beta2) = group["lr"], group["betas"]
            rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
            _adam_step(
                weights, [g.contiguous() for g in grads], means, squares, steps, *rate, beta1, beta2, group["eps"]
            )
        return None

    @staticmethod
    def _is_plain(group: dict[str, Any]) -> bool:
        """Whether the kernel supports the group: plain Adam, float32, on a GPU."""
        options = (
            group["amsgrad"] or group["maximize"] or group["differentiable"] or group.get("decoupled_weight_decay")
        )
        plain = not options and group["weight_decay"] == 0 and all(0 < beta < 1 for beta in group["betas"])
        rate = group["lr"]
        on_gpu = not isinstance(rate, Tensor) or (rate.is_cuda and rate.dtype == torch.float32)
        weights = (p for p in group["params"] if p.grad is not None)
        return plain and on_gpu and all(_is_float32_on_gpu(p) and not p.grad.is_sparse for p in weights)


def _is_float32_on_gpu(t: Tensor) -> bool:
    return t.is_cuda and t.dtype == torch.float32 and t.is_contiguous()


class _Adagrad(_Light, torch.optim.Adagrad):
    pass


class _CapturableAdagrad(_Adagrad):
    """Adagrad that a CUDA graph can capture.

    PyTorch's unfused Adagrad reads the learning rate and the step number on the host. Its fused kernel is missing on a
    GPU in older versions. The step number matters only to lr_decay, which is 0.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            grads = [p.grad for p in parameters]
            sums = [self.state[p]["sum"] for p in parameters]
            _torch.foreach_addcmul_(sums, grads, grads, value=1)
            roots = _torch.foreach_sqrt(sums)
            _torch.foreach_add_(roots, group["eps"])
            _torch.foreach_addcdiv_(parameters, _torch.foreach_mul(grads, -group["lr"]), roots)


def _adam(parameters, lr: float | Tensor, device: torch.device) -> torch.optim.Optimizer:
    on_gpu = device.type == "cuda"
    adam = (_GpuAdam if on_gpu else _Adam)(parameters, lr=lr, fused=True, capturable=on_gpu)
    adam._warned_capturable_if_run_uncaptured = True  # the steps before capture are uncaptured on purpose
    return adam


def _adagrad(parameters, lr: float | Tensor, device: torch.device) -> torch.optim.Optimizer:
    return _CapturableAdagrad(parameters, lr=lr) if device.type == "cuda" else _Adagrad(parameters, lr=lr, fused=True)


OPTIMIZERS = {"adam": _adam, "adagrad": _adagrad}


def schedule_factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate in a step.

    It grows linearly from 1 / warmup to 1 within the first `warmup` steps. Then it is 1 ("constant") or falls to 0 at
    the end. It falls linearly ("linear") or along half a cosine ("cosine", Loshchilov & Hutter 2017, eq. 5 without
    restarts).

    Args:
        kind: "constant", "linear" or "cosine".
        step: the number of steps done before this step.
        steps: the number of steps of the run.
        warmup: the number of warm-up steps.

    Raises:
        ValueError: kind is unknown.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    raise unknown("schedule", kind, ("constant", "linear", "cosine"))


class Schedule:
    """Schedule of an optimizer's learning rates.

    A constant schedule leaves them alone, so that a user may change them.

    Args:
        kind: "constant", "linear" or "cosine".
        steps: the number of steps of the run.
        warmup: the number of warm-up steps.
    """

    def __init__(self, kind: str, steps: int, warmup: int):
        self.kind, self.steps, self.warmup = kind, steps, warmup

    @property
    def is_constant(self) -> bool:
        """Whether the learning rates never change."""
        return self.kind == "constant" and self.warmup == 0

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set an optimizer's learning rates for the step after `step`."""
        if self.is_constant:
            return
        factor = schedule_factor(self.kind, step, self.steps, self.warmup)
        for group in optimizer.param_groups:
            if "initial_lr" not in group:
                group["initial_lr"] = float(group["lr"])
            rate = factor * group["initial_lr"]
            if isinstance(group["lr"], Tensor):  # in place, since a captured step reads this memory
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimizer's state: tensors, and numbers or text for JSON."""
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
    """Load the state that `optimizer_state` returned.

    The options that depend on the device stay as they are: capturable, fused and foreach.

    Args:
        optimizer: the optimizer that gets the state.
        tensors: the state's tensors.
        rest: the state's numbers and text.

    Raises:
        ValueError: the state is another optimizer's.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *rest["values"].items()):
        number, key = name.split(".", 1)
        # A copy, since an optimizer writes to its state in place.
        state.setdefault(int(number), {})[key] = value.clone() if isinstance(value, Tensor) else value
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for group, was in zip(optimizer.param_groups, before, strict=True):
        group.update({key: was[key] for key in ("capturable", "fused", "foreach") if key in was})
        if isinstance(was["lr"], Tensor):
            group["lr"] = was["lr"].fill_(group["lr"])
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})  # JSON makes it a list
