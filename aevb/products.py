"""Matrix products, by the fastest public route on the machine.

On a CPU `F.linear` in float32 goes to MKL, which on AMD processors runs at about half of what oneDNN reaches (here 200
against 430 GFLOP/s); PyTorch carries both, and `torch.compile`'s own CPU code calls oneDNN by the op used here.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _onednn():
    """oneDNN's product with bias and activation folded in; None where this PyTorch has none."""
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        a = torch.ones(3, 2)
        assert torch.equal(op(a, a, None, "none", [], ""), a @ a.t())
    except (AttributeError, RuntimeError, AssertionError):
        return None
    return op


def packed(b: Tensor) -> Tensor:
    """b (M, K) in the layout that oneDNN likes best, for many products with it: a sixth faster. No other use of it."""
    if _onednn() is None or not _for_onednn(b):
        return b
    return torch.ops.mkldnn._reorder_linear_weight(b.contiguous())


def _for_onednn(t: Tensor) -> bool:
    """Whether a product with t goes to oneDNN, if there is one."""
    enabled = bool(torch.backends.mkldnn.enabled)
    return enabled and t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(a @ b.T + bias)`` for a (N, K), b (M, K), as it is or `packed`, and bias (M,).

    activation is "none", "tanh" or "relu". No gradient flows through it. float32 on a CPU goes to oneDNN, unless
    `torch.backends.mkldnn.flags` turns that off; everything else to `F.linear`, which has the fastest route already.
    """
    onednn = _onednn() if _for_onednn(a) and b.numel() else None
    if onednn is not None:
        return onednn(a, b, bias, activation, [], "")
    out = F.linear(a, b, bias)
    return out if activation == "none" else out.tanh_() if activation == "tanh" else out.relu_()
