"""Matrix products by the fastest public route on the machine.

PyTorch carries two libraries for float32 on x86 CPUs: MKL (`F.linear`, `torch.mm`) and oneDNN. `torch.compile`'s own
CPU code calls oneDNN's op. The processor decides which library is faster. A rule chooses, not a race, whose winner
could differ between two runs of one seed:

* AMD with AVX-512: oneDNN. MKL keeps to AVX2 there; on Zen 5 it runs at 200 GFLOP/s on two cores, oneDNN at 430-550.
* everything else: torch's own. On AMD with AVX2 (Zen 3) MKL runs at 150-170 GFLOP/s on two cores, 93% of the machine's
  peak, and oneDNN at 110-150. On Intel MKL takes every instruction set.

`AEVB_PRODUCTS=torch` or `onednn` overrides it; `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch
from ..checks.choices import ACTIVATIONS, unknown

CACHED = 32768  # elements from which on a result's memory comes from the kernels' cache of buffers

_empty = torch.ops.aevb.empty.default
bias_activation = torch.ops.aevb.bias_activation_.default
activation_backward_ = torch.ops.aevb.activation_backward_.default
_activation_backward = torch.ops.aevb.activation_backward.default


@functools.cache
def _onednn():
    """Returns oneDNN's product with bias, or None if torch's is faster."""
    return _torch.linear_pointwise() if _prefers_onednn() else None


def _prefers_onednn() -> bool:
    wanted = os.environ.get("AEVB_PRODUCTS", "")
    if wanted not in ("", "torch", "onednn"):
        raise ValueError(f"AEVB_PRODUCTS is {wanted!r}; expected 'torch' or 'onednn'")
    if wanted:
        return wanted == "onednn"
    return _is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_amd() -> bool:
    return "AuthenticAMD" in _cpuinfo()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products.

    Without them bfloat16 products are slower than float32's.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpuinfo().split())  # x86, x86, Arm


def route() -> str:
    """Returns the library of float32 products on a CPU: "oneDNN" or "torch"."""
    return "torch" if _onednn() is None else "oneDNN"


def _for_onednn(t: Tensor) -> bool:
    """Whether oneDNN, if it is the route, takes products with t."""
    enabled = bool(torch.backends.mkldnn.enabled)
    return enabled and t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0


def packed(b: Tensor) -> Tensor:
    """Returns b (M, K) in oneDNN's preferred layout, for repeated products.

    They are a sixth faster. Only `product` may read the result.
    """
    if _onednn() is None or not _for_onednn(b):
        return b
    return _torch.reorder_linear_weight(b.contiguous())


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "none", out: Tensor | None = None
) -> Tensor:
    """Returns ``activation(a @ b.T + bias)``, without autograd.

    Args:
        a: (N, K).
        b: (M, K), unchanged or `packed`.
        bias: (M,) or None.
        activation: "none", "tanh" or "relu".
        out: (N, M), contiguous and of a's dtype, memory that the result may take.

    Raises:
        ValueError: an unknown activation.
    """
    if activation != "none":
        return activate_(product(a, b, out=out), bias, activation)
    onednn = _onednn()
    if onednn is not None and _for_onednn(a) and b.numel():
        return onednn(a, b, bias, "none", [], "")
    out = _cached(a, a.shape[0], b.shape[0]) if out is None else out
    if out is None or a.dtype != b.dtype:
        return F.linear(a, b, bias)
    return torch.mm(a, b.t(), out=out) if bias is None else torch.addmm(bias, a, b.t(), out=out)


def _cached(like: Tensor, rows: int, columns: int) -> Tensor | None:
    """Returns reusable memory for a large result on a CPU, else None.

    malloc would return such memory to the system after each step, and each page would be a fault again.
    """
    if rows * columns < CACHED or like.device.type != "cpu":
        return None
    return _empty(like, [rows, columns])


MANY_ROWS = 256  # from which on oneDNN's product below is faster transposed, along the rows in both operands


def rows_product(a: Tensor, b: Tensor, total: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Returns ``a.T @ b``, a sum over rows, plus `total` if given.

    Args:
        a: (K, N).
        b: (K, M).
        total: (N, M), which the product is added to in place; sums then have total's dtype.
        out: memory that the result may take.

    Returns:
        (N, M).
    """
    onednn = _onednn()
    if onednn is not None and _for_onednn(a):
        found = product(b.t(), a.t()).t() if a.shape[0] > MANY_ROWS else product(a.t(), b.t())
    elif total is not None and total.dtype == a.dtype:
        return total.addmm_(a.t(), b)
    else:
        out = _cached(a, a.shape[1], b.shape[1]) if out is None else out
        found = torch.mm(a.t(), b) if out is None else torch.mm(a.t(), b, out=out)
    return found if total is None else total.add_(found)


def _has_kernel(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() and t.dim() > 0


def activate_(out: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Returns ``activation(out + bias)``, computed in place in out.

    Raises:
        ValueError: an unknown activation.
    """
    if _has_kernel(out):
        bias_activation(out, bias, ACTIVATIONS.index(activation))
        return out
    if bias is not None:
        out = out.add_(bias)
    if activation == "tanh":
        return out.tanh_()
    if activation == "relu":
        return out.relu_()
    if activation != "none":
        raise unknown("activation", activation, ACTIVATIONS)
    return out


def activation_grads(out: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Returns the gradients of t and bias.

    They are the arguments of ``out = activation(t + bias)``.

    Args:
        out: (N, M), the layer's result.
        grad: (N, M), the upstream gradient.
        activation: "none", "tanh" or "relu".

    Returns:
        (grad_t, grad_bias), of shapes (N, M) and (M,).

    Raises:
        ValueError: an unknown activation.
    """
    if _has_kernel(out) and grad.dtype == torch.float32:
        grad_input, grad_bias = _activation_backward(out, grad, ACTIVATIONS.index(activation))
        return (grad if activation == "none" else grad_input), grad_bias
    if activation == "tanh":
        grad = torch.ops.aten.tanh_backward(grad, out)
    elif activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    elif activation != "none":
        raise unknown("activation", activation, ACTIVATIONS)
    return grad, grad.sum(0)
