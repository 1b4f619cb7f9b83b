"""Matrix products on a GPU, for a step that goes by kernels: cuBLAS's, with the accuracy of float32, and faster.

* A large product is taken by tensor cores. A float32 number is the sum of three bfloat16 numbers, high, middle and low,
  and a product of two such sums is six of the nine products of theirs, since three are below float32's last bit. All
  six are one product of bfloat16 operands in which the pieces lie one after the other, summed in float32: on an H100
  2.5 times as fast as cuBLAS's float32 product, with the same error. Images that are bytes, bits or pixels, are
  bfloat16 numbers themselves, and need three products.
* A product with a small result and a long sum would keep a few multiprocessors busy for long. The sum is cut into
  slices, a batch of products, whose results are added by the pass that adds the bias and takes the activation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..checks.choices import ACTIVATIONS

_ops = torch.ops.aevb
bias_activation = _ops.bias_activation_.default
activation_backward = _ops.activation_backward.default
_split = _ops.split_bfloat16.default
_add_pieces = _ops.add_pieces.default
elbo_terms = _ops.elbo_terms.default

# ---- slices ---------------------------------------------------------------------------------------------------------

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


# ---- bfloat16 pieces ------------------------------------------------------------------------------------------------

# The pieces of two operands that meet, the smallest products first; and of bytes and what is beside them.
LEFT, RIGHT = "lhmmhh", "hlmhmh"
BYTES, BESIDE_BYTES = "hhh", "lmh"
FEWEST = 256, 128, 128  # rows, and columns of each side, from which on the pieces are worth making


@functools.cache
def _is_faster_in_pieces(device: torch.device) -> bool:
    """Whether bfloat16 products are more than six times as fast as float32's: on the GPUs of data centres."""
    return torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0), (10, 3)}


def in_pieces(rows: int, weight: Tensor) -> bool:
    """Whether products with `weight`, of so many rows, are to be taken in pieces. TF32, where it is allowed, is
    faster."""
    large = all(n >= fewest for n, fewest in zip((rows, *weight.shape), FEWEST, strict=True))
    return large and torch.get_float32_matmul_precision() == "highest" and _is_faster_in_pieces(weight.device)


def pieces(t: Tensor, order: str) -> Tensor:
    """t (N, K), float32 or bytes, as bfloat16 pieces beside each other: (N, pieces, K), with zeros up to a multiple of
    8, for cuBLAS's fastest kernels."""
    return _split(t, order, False)


def product_of_pieces(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` for pieces (N, pieces, K), (M, pieces, K)."""
    return torch.mm(a.flatten(1), b.flatten(1).t(), out_dtype=torch.float32)


def rows_product_of_pieces(a: Tensor, b: Tensor, columns: tuple[int, int]) -> Tensor:
    """``a.T @ b``, a sum over rows, for pieces (K, pieces, N), (K, pieces, M): of that (N, M), which are `columns`."""
    found = torch.mm(a.flatten(0, 1).t(), b.flatten(0, 1), out_dtype=torch.float32)
    return found[: columns[0], : columns[1]].contiguous()


def product_with_weight(a: Tensor, weight: Tensor, order: str) -> Tensor:
    """``a @ weight`` for pieces a (N, pieces, K) and weight (K, M), whose pieces are in the order that meets a's. Its
    rows may lie further apart than they are long."""
    found = torch.mm(a.flatten(1), _split(weight, order, True).flatten(0, 1), out_dtype=torch.float32)
    return found[:, : weight.shape[1]]


def activate(out: Tensor, scale: float, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(scale * out + bias)``, over out where there is no scale."""
    code = ACTIVATIONS.index(activation)
    if scale != 1.0:
        return _add_pieces(out.unsqueeze(0), scale, bias, code)
    bias_activation(out, bias, code)
    return out
