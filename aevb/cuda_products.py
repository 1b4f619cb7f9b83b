"""Matrix products on a GPU, for a step that goes by kernels: cuBLAS's, cut so that they fill the GPU.

Two things that cuBLAS's float32 products do not do by themselves:

* A product with a small result and a long sum keeps a few multiprocessors busy for long. The sum is cut into slices, a
  batch of products, whose results are added by the pass that adds the bias and takes the activation.
* Images that are bytes, bits or pixels, are bfloat16 numbers exactly. A float32 operand beside them is the sum of three
  bfloat16 numbers, so that three products on tensor cores, whose sums are float32, give a float32 product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import ACTIVATIONS

_ops = torch.ops.aevb
bias_activation = _ops.bias_activation_.default
activation_backward = _ops.activation_backward_.default
_activation_backward = _ops.activation_backward.default
_split = _ops.split_bfloat16.default
_add_pieces = _ops.add_pieces.default
elbo_terms = _ops.elbo_terms.default

TILE = 64  # rows and columns of a result that a block of threads computes, about
SHORTEST = 48  # terms of a slice's sums


def slices(rows: int, columns: int, terms: int, multiprocessors: int = 132) -> int:
    """Into how many slices the sums of a product are cut: a divisor of `terms`."""
    blocks = -(-rows // TILE) * -(-columns // TILE)
    most = min(multiprocessors // max(blocks, 1), terms // SHORTEST)
    fitting = (n for n in range(most, 1, -1) if terms % n == 0 and terms // n % 4 == 0)  # 16 bytes, for wide accesses
    return next(fitting, 1)


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(a @ b.T + bias)`` for a (N, K), b (M, K)."""
    code, n = ACTIVATIONS.index(activation), slices(a.shape[0], b.shape[0], a.shape[1])
    if n > 1:
        left, right = (t.unflatten(1, (n, -1)) for t in (a, b))
        return _add_pieces(torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)), 1.0, bias, code)
    out = torch.mm(a, b.t())
    if bias is not None or code:
        bias_activation(out, bias, code)
    return out


def rows_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, a sum over rows, for a (K, N), b (K, M)."""
    n = slices(a.shape[1], b.shape[1], a.shape[0])
    if n > 1:
        left, right = (t.unflatten(0, (n, -1)) for t in (a, b))
        return _add_pieces(torch.bmm(left.transpose(1, 2), right), 1.0, None, 0)
    return torch.mm(a.t(), b)


def column_sums(t: Tensor) -> Tensor:
    return _activation_backward(t, t, 0)[1]


def bytes_linear(x: Tensor, x_scale: float | None, b: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x_scale * x @ b.T + bias)`` for x (N, K), bytes as bfloat16."""
    M, K = b.shape
    pieces = torch.mm(x, _split(b, False).view(3 * M, K).t(), out_dtype=torch.float32)  # (N, 3 M)
    scale = 1.0 if x_scale is None else x_scale
    return _add_pieces(pieces.unflatten(1, (3, M)).transpose(0, 1), scale, bias, ACTIVATIONS.index(activation))


def bytes_rows_product(a: Tensor, x: Tensor, x_scale: float | None) -> Tensor:
    """``a.T @ (x_scale * x)`` for a (K, N), x (K, M), bytes as bfloat16."""
    split = _split(a, True)  # (K, 3, N and some)
    pieces = torch.mm(split.flatten(1).t(), x, out_dtype=torch.float32).unflatten(0, (3, -1))
    return _add_pieces(pieces[:, : a.shape[1]], 1.0 if x_scale is None else x_scale, None, 0)
