"""Float32 matrix products on a GPU, for a step made of kernels.

They are cuBLAS's, with the accuracy of float32, and faster:

* Tensor cores compute a large product. A float32 number is the sum of three bfloat16 numbers, high, middle and low. A
  product of two such sums needs six of their nine products, since three are below float32's last bit. All six are one
  product of bfloat16 operands in which the pieces lie one after the other, summed in float32. On an H100 it is 2.5
  times as fast as cuBLAS's float32 product, with the same error. Images of bytes (bits or pixels) are bfloat16 numbers
  themselves, and need three products.
* A product with a small result and a long sum would keep a few multiprocessors busy for long. The sum is cut into
  slices, a batch of products. The pass that adds the bias and applies the activation adds their results.
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

TILE = 64  # approximate rows and columns of a result that a block of threads computes
SHORTEST = 48  # terms of a slice's sums


def slices(rows: int, columns: int, terms: int, multiprocessors: int = 132) -> int:
    """Returns the number of slices for a product's sums, dividing `terms`.

    Args:
        rows: rows of the result.
        columns: columns of the result.
        terms: terms of each sum.
        multiprocessors: of the GPU.
    """
    blocks = -(-rows // TILE) * -(-columns // TILE)
    most = min(multiprocessors // max(blocks, 1), terms // SHORTEST)
    fitting = (n for n in range(most, 1, -1) if terms % n == 0 and terms // n % 4 == 0)  # 16-byte accesses
    return next(fitting, 1)


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Returns ``activation(a @ b.T + bias)``.

    a is (N, K), b (M, K), bias (M,) and the result (N, M).
    """
    code, n = ACTIVATIONS.index(activation), slices(a.shape[0], b.shape[0], a.shape[1])
    if n > 1:
        left, right = (t.unflatten(1, (n, -1)) for t in (a, b))
        return _add_pieces(torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)), 1.0, bias, code)
    out = torch.mm(a, b.t())
    if bias is not None or code:
        bias_activation(out, bias, code)
    return out


def rows_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum over rows ``a.T @ b``.

    a is (K, N), b (K, M) and the result (N, M).
    """
    n = slices(a.shape[1], b.shape[1], a.shape[0])
    if n > 1:
        left, right = (t.unflatten(0, (n, -1)) for t in (a, b))
        return _add_pieces(torch.bmm(left.transpose(1, 2), right), 1.0, None, 0)
    return torch.mm(a.t(), b)


# ---- bfloat16 pieces ------------------------------------------------------------------------------------------------

# The pieces of two float32 operands, in pairs, the smallest products first.
# BYTES repeats a byte operand for the three pieces of its float32 partner.
LEFT, RIGHT = "lhmmhh", "hlmhmh"
BYTES, BESIDE_BYTES = "hhh", "lmh"
FEWEST = 256, 128, 128  # rows, and the weight's two sizes, from which on pieces pay off


@functools.cache
def _is_faster_in_pieces(device: torch.device) -> bool:
    """Whether bfloat16 products are more than six times as fast as float32's.

    They are on the GPUs of data centres.
    """
    return torch.cuda.get_device_capability(device) in {(8, 0), (9, 0), (10, 0), (10, 3)}


def in_pieces(rows: int, weight: Tensor) -> bool:
    """Whether to compute products of `rows` rows with `weight` in pieces.

    TF32, where it is allowed, is faster.
    """
    large = all(n >= fewest for n, fewest in zip((rows, *weight.shape), FEWEST, strict=True))
    return large and torch.get_float32_matmul_precision() == "highest" and _is_faster_in_pieces(weight.device)


def pieces(t: Tensor, order: str) -> Tensor:
    """Returns t (N, K) as bfloat16 pieces (N, pieces, K).

    t is float32 or bytes, and each letter of `order` a piece: h(igh), m(iddle) or l(ow). K is padded with zeros to a
    multiple of 8, for cuBLAS's fastest kernels.
    """
    return _split(t, order, False)


def product_of_pieces(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b.T`` for pieces (N, pieces, K), (M, pieces, K)."""
    return torch.mm(a.flatten(1), b.flatten(1).t(), out_dtype=torch.float32)


def rows_product_of_pieces(a: Tensor, b: Tensor, columns: tuple[int, int]) -> Tensor:
    """Returns the sum over rows ``a.T @ b`` of pieces, without padding.

    Args:
        a: (K, pieces, N).
        b: (K, pieces, M).
        columns: the numbers of columns before padding, the result's shape.
    """
    found = torch.mm(a.flatten(0, 1).t(), b.flatten(0, 1), out_dtype=torch.float32)
    return found[: columns[0], : columns[1]].contiguous()


def product_with_weight(a: Tensor, weight: Tensor, order: str) -> Tensor:
    """Returns ``a @ weight`` from the pieces of a.

    The rows of the result may lie further apart than they are long.

    Args:
        a: (N, pieces, K).
        weight: (K, M), float32.
        order: the order of weight's pieces that meets a's.
    """
    found = torch.mm(a.flatten(1), _split(weight, order, True).flatten(0, 1), out_dtype=torch.float32)
    return found[:, : weight.shape[1]]


def activate(out: Tensor, scale: float, bias: Tensor | None, activation: str) -> Tensor:
    """Returns ``activation(scale * out + bias)``, in place if scale is 1."""
    code = ACTIVATIONS.index(activation)
    if scale != 1.0:
        return _add_pieces(out.unsqueeze(0), scale, bias, code)
    bias_activation(out, bias, code)
    return out
