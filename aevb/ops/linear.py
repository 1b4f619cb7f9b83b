"""Fully connected layer as one autograd node, reading bits and pixels unconverted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _torch, reference
from ..checks.choices import ACTIVATIONS, unknown
from ..checks.errors import check_dense, explain_memory, is_dense
from .autograd import KernelFunction
from .matmul import activation_grads, product, rows_product
from .plain_modules import is_plain

# Nonzero fraction of x up to which sums of weights beat a dense product. On Zen 3 they are two to three times as fast
# at a fifth, and no faster at a half.
SPARSE = 0.35
FUSED = {"tanh": nn.Tanh, "relu": nn.ReLU}

sparse_linear = torch.ops.aevb.sparse_linear.default
sparse_weight_grad = torch.ops.aevb.sparse_linear_weight_grad.default
_density = torch.ops.aevb.density.default


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", x_scale: float | None = None
) -> Tensor:
    """``activation(x_scale * x @ weight.T + bias)``, in one autograd node.

    On a CPU in float32 the product takes the faster route of PyTorch (see `aevb.ops.matmul`). Bias and activation are
    one pass, and so are their gradients.

    Sparse x of bool or uint8, such as binarized images, is never converted. A row of the result is then the sum of the
    weights of the row's few nonzero pixels, and the weight's gradient is computed alike. A pixel that is 0 adds nothing
    even where a weight is not finite.

    On other devices and dtypes, and under `torch.compile` and `torch.func`, the function uses PyTorch's own ops.

    Args:
        x: (..., D): floating, bool, or uint8 with x_scale.
        weight: (H, D), as in `torch.nn.Linear`.
        bias: (H,) or None, as in `torch.nn.Linear`.
        activation: "none", "tanh" or "relu".
        x_scale: multiplies x: 1/255 for pixels in 0..255.

    Returns:
        (..., H), in weight's dtype.

    Raises:
        ValueError: an unknown activation, uint8 without x_scale, or shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if not (is_dense(x) and isinstance(weight, Tensor)):
        check_dense("linear", x=x, weight=weight)
    if x.dtype == torch.uint8 and x_scale is None:
        raise ValueError("x is uint8 and x_scale is not given; pass x_scale=1/255 for pixels in 0..255")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., D) and (H, D)")
    if not _has_kernels(weight, x):
        return reference.linear(x, weight, bias, activation, x_scale)
    try:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return _Linear.apply(x, weight, bias, activation, x_scale)
        return layer_forward(x, weight, bias, activation, x_scale, is_sparse(x))
    except (RuntimeError, MemoryError) as error:
        out = torch.empty((*x.shape[:-1], len(weight)), device="meta")
        explain_memory(error, "linear", {"x": x, "weight": weight}, lambda: out)
        raise


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _has_kernels(weight: Tensor, x: Tensor) -> bool:
    return (
        weight.device.type == x.device.type == "cpu"
        and weight.dtype == torch.float32
        and x.dtype in (torch.float32, torch.bool, torch.uint8)
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN  # the layer's kernels have no fake or traced version
        and type(weight) in _PLAIN
        and not _torch.num_dispatch_modes()
        and not _torch.functorch_active()
        and not torch.is_autocast_enabled("cpu")
    )


def floating(x: Tensor, x_scale: float | None, weight: Tensor | None) -> Tensor:
    """Returns x_scale * x; integers first become floating, in weight's dtype."""
    x = x if x.is_floating_point() or weight is None else x.to(weight.dtype)
    return x if x_scale is None else x * x_scale


def call(module: nn.Module, x: Tensor, x_scale: float | None = None, weight: Tensor | None = None) -> Tensor:
    """Returns module(x_scale * x), with `linear` for plain layers of an `nn.Sequential`.

    See `is_plain` for plain layers. x of integers becomes floating in weight's dtype.
    """
    if not is_plain(module, nn.Sequential):
        return module(floating(x, x_scale, weight))
    return call_all(list(module), x, x_scale, weight)


def call_all(
    layers: Sequence[nn.Module], x: Tensor, x_scale: float | None = None, weight: Tensor | None = None
) -> Tensor:
    """Returns the layers applied in order, as `call` does."""
    done = 0
    while done < len(layers):
        layer, *after = layers[done : done + 2]
        activation = "none"
        if is_plain(layer, nn.Linear):
            activation = next((name for name, kind in FUSED.items() if after and is_plain(after[0], kind)), "none")
            x = linear(x, layer.weight, layer.bias, activation, x_scale)
        else:
            x = layer(floating(x, x_scale, weight))
        done += 1 if activation == "none" else 2
        x_scale = None
    return x if layers else floating(x, x_scale, weight)


def is_sparse(x: Tensor) -> bool:
    """Whether x is bool or uint8, at most SPARSE of it nonzero.

    Sums of weights then beat a dense product. x is on a CPU.
    """
    return not x.is_floating_point() and _density(x) <= SPARSE


def layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, x_scale: float | None, sparse: bool
) -> Tensor:
    """Returns `linear` without autograd, by sums of weights if `sparse` (see `is_sparse`)."""
    if sparse:
        return sparse_linear(x, x_scale, weight, bias, ACTIVATIONS.index(activation))
    rows = floating(x, x_scale, weight).reshape(-1, x.shape[-1])
    out = product(rows, weight, bias, activation)
    # A view could not be overwritten.
    return out if x.dim() == 2 else _torch.view_of_unshared(out, [*x.shape[:-1], weight.shape[0]])


def layer_backward(
    x: Tensor,
    weight: Tensor,
    out: Tensor | None,
    grad: Tensor,
    activation: str,
    x_scale: float | None,
    sparse: bool,
    needs: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns the gradients of x, weight and bias from an upstream gradient.

    Args:
        x: (..., D), the layer's input.
        weight: (H, D).
        out: the result of `layer_forward`; None will do for an activation of "none".
        grad: (..., H), the upstream gradient.
        activation: the layer's activation.
        x_scale: multiplies x.
        sparse: see `is_sparse`.
        needs: whether the gradients of x and weight are needed; None is returned for the others.
    """
    grad = grad.reshape(-1, weight.shape[0])
    grad, grad_bias = activation_grads(grad if out is None else out.view_as(grad), grad, activation)
    grad_x = grad_weight = None
    if needs[0]:
        grad_x = product(grad, weight.t()).view(x.shape)
        grad_x = grad_x if x_scale is None else grad_x.mul_(x_scale)
    if needs[1]:
        rows = x.reshape(-1, x.shape[-1])
        if sparse:
            grad_weight = sparse_weight_grad(rows, x_scale, grad)
        else:
            grad_weight = rows_product(grad, floating(rows, x_scale, weight)).contiguous()
    return grad_x, grad_weight, grad_bias


class _Linear(KernelFunction):
    """A layer on a CPU, by the kernels."""

    public, num_tensors = "linear", 3

    @staticmethod
    def forward(ctx, x, weight, bias, activation, x_scale):
        sparse = is_sparse(x)
        out = layer_forward(x, weight, bias, activation, x_scale, sparse)
        ctx.save_for_backward(x, weight, bias, None if activation == "none" else out)
        ctx.options = activation, x_scale, sparse
        return out

    @staticmethod
    def formula(ctx):
        return reference.linear, ctx.options[:2]

    @staticmethod
    def kernel_gradients(ctx, tensors, taken, needs, grad):
        (x, weight, _), (out,), (activation, x_scale, sparse) = tensors, taken, ctx.options
        try:
            found = layer_backward(x, weight, out, grad, activation, x_scale, sparse, needs[:2])
        except (RuntimeError, MemoryError) as error:
            made = [torch.empty_like(t, device="meta") for t, need in zip((x, weight), needs, strict=False) if need]
            explain_memory(error, "linear, backward", {"x": x, "weight": weight}, lambda: made)
            raise
        grad_x, grad_weight, grad_bias = found
        return grad_x, grad_weight, grad_bias if needs[2] else None
