"""Autograd for the fused ops of `torch.ops.aevb`.

No single way of giving a custom op a gradient keeps all of PyTorch's promises. So `DifferentiableOp` arranges each op
in four ways:

* eager: an `autograd.Function` around the bare kernel, the cheapest boundary there is;
* `torch.compile`, `torch.export`: the op itself, by `register_autograd`, so that a graph holds one trainable node;
* `torch.func`: the formulas of `aevb.reference` on the same noise, which every transform understands;
* a gradient of a gradient, or of a rarely differentiated input (x, beta): the same formulas.
"""

from __future__ import annotations

import functools
import operator
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C, _torch  # importing _C registers the ops
from ..checks.errors import READERS, explain, explain_memory

_functorch_active = _torch.functorch_active
_is_legacy_batched = _torch.is_legacy_batched
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
kept_graph = _torch.keeps_graph


# ---- where there are no kernels --------------------------------------------------------------------------------------


def _without_kernels() -> dict[str, str]:
    """Returns the device types that use aevb.reference, with the reason for each.

    Kernels are slower there, or missing.
    """
    found = {}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and _C.cpu_isa() == "plain" and not os.environ.get("AEVB_ISA"):
        found["cpu"] = "this CPU lacks AVX2 and FMA"
    cuda = _C.build_info()["cuda"]
    if not cuda.startswith("built"):
        found["cuda"] = f"this installation's CUDA kernels are {cuda}"
    return found


_reference_on = _without_kernels()


@functools.cache
def _say_why(device_type: str) -> None:
    warnings.warn(
        f"{_reference_on[device_type]}, so aevb computes with aevb.reference (plain PyTorch) on {device_type} tensors",
        stacklevel=4,
    )


def has_no_kernels(device_type: str) -> bool:
    """Whether aevb.reference computes on this type of device."""
    return device_type in _reference_on


def on_reference(t: Tensor) -> bool:
    """Whether aevb.reference computes results of t outside of graphs: of float64, and where there are no kernels.

    The first time on a device type a warning gives the reason.
    """
    if _functorch_active() or t.dtype is torch.float64:
        return True
    if not _reference_on or (t.is_cpu and "cpu" not in _reference_on):  # a device's name takes half a microsecond
        return False
    if t.device.type not in _reference_on:
        return False
    if not _is_compiling():
        _say_why(t.device.type)
    return True


# ---- the arrangement -------------------------------------------------------------------------------------------------


class GradientInForward(NamedTuple):
    """Gradient of an op, computed in its forward pass.

    The forward kernel has most inputs of the first argument's gradient in registers. Computing that gradient there
    saves a pass over memory and much of the arithmetic. The saved tensor is as large as the gradient, which the
    backward pass would allocate anyway.
    """

    applies: Callable[..., bool]
    """(*args): whether to compute the gradient in the forward pass."""
    forward: Callable[..., tuple]
    """(*args): (result, *gradients) for an upstream gradient of 1 everywhere."""
    backward: Callable[..., tuple | None]
    """(tensors, options, *gradients, *upstream): the fused gradients, or None.

    They have the backward kernel's bits. None where `gradients` cannot give them.
    """


class Derived(NamedTuple):
    """Gradient of an op that follows from the kernel's gradient of the first argument."""

    applies: Callable[[Sequence], bool]
    """(options): whether it does."""
    gradient: Callable[[Sequence, Sequence, Tensor], Tensor]
    """(tensors, options, gradient of the first argument): the gradient."""


class _Saved(NamedTuple):
    """Part of an autograd context that a backward pass reads."""

    saved_tensors: Sequence
    options: Sequence
    needs_input_grad: Sequence[bool]


class DifferentiableOp:
    """Op of `torch.ops.aevb` with its gradient.

    It works in eager mode, graphs, `torch.func` transforms and gradients of gradients.

    Args:
        name: the op; `name_forward` is its bare kernel and `name_backward` the kernel of its gradients.
        num_tensors: how many of its arguments are tensors or None; the others, behind them, are plain options.
        fused: the positions whose gradients `name_backward` returns.
        formula: the op in plain PyTorch.
        fake: the op's results without values, from its arguments.
        for_kernel: (options, upstream gradients): the upstream arguments of `name_backward`.
        only_needed: `name_backward` also takes a bit mask of needed gradients, and returns anything for the others.
        in_forward: how eager mode computes a gradient in the forward pass, if it can.
        derived: gradients that follow from the first argument's, by their argument's position.
        results: how many results it has where only the first is differentiable; the others are for reports.
        backward: the op of its gradients, if that is not `name_backward`.
    """

    def __init__(
        self,
        name: str,
        num_tensors: int,
        fused: tuple[int, ...],
        formula: Callable,
        fake: Callable,
        for_kernel: Callable | None = None,
        only_needed: bool = False,
        in_forward: GradientInForward | None = None,
        derived: Mapping[int, Derived] | None = None,
        results: int = 1,
        backward: str | None = None,
    ):
        self.name, self.num_tensors, self.fused, self.formula, self.fake = name, num_tensors, fused, formula, fake
        self.for_kernel, self.only_needed, self.in_forward = for_kernel, only_needed, in_forward
        self.derived, self.results = derived or {}, results
        ops = torch.ops.aevb
        self.op = getattr(ops, name).default
        self.kernel = getattr(ops, f"{name}_forward").default
        self.backward_kernel = getattr(ops, backward or f"{name}_backward").default
        self.has_own_backward = backward is None
        self.argument_names = [argument.name for argument in self.kernel._schema.arguments]
        self.backward_names = [argument.name for argument in self.backward_kernel._schema.arguments]
        self.rare = tuple(i for i in range(num_tensors) if i not in fused)
        # Gradients by position, None where there are none: of the tuple of fused gradients with a None behind them.
        positions = (fused.index(i) if i in fused else len(fused) for i in range(len(self.argument_names)))
        self.by_position = operator.itemgetter(*positions)
        self.apply = self._eager()
        self.apply_in_forward = None if in_forward is None else self._eager_in_forward(in_forward)
        self._register_for_graphs()

    def __call__(self, *args: Any) -> Any:
        """Returns the op's results, arranged as the moment asks."""
        first = args[0]
        if on_reference(first):
            return self.formula(*args)
        if _is_compiling():
            return self.op(*args)
        try:
            if (
                self.apply_in_forward is not None
                and first.requires_grad
                and _grad_enabled()
                and self.in_forward.applies(*args)  # type: ignore[union-attr]
            ):
                return self.apply_in_forward(*args)
            return self.apply(*args)
        except (RuntimeError, MemoryError) as error:
            arguments = dict(zip(self.argument_names, args, strict=True))
            explain(error, self.name, arguments, lambda *a: self.fake(*map(to_meta, a)))
            raise

    # ---- eager mode ----

    def _eager(self) -> Callable:
        kernel, num_tensors, name, reports = self.kernel, self.num_tensors, self.name, self.results > 1

        class Eager(Function):
            @staticmethod
            def forward(ctx, *args):
                save(ctx, args, num_tensors)
                found = kernel(*args)
                if reports:
                    ctx.mark_non_differentiable(*found[1:])
                return found

            backward = staticmethod(self.gradients)

        Eager.__name__ = Eager.__qualname__ = name  # the name that grad_fn shows
        return _torch.apply_of(Eager)

    def _eager_in_forward(self, in_forward: GradientInForward) -> Callable:
        num_tensors, name, gradients, rare = self.num_tensors, self.name, self.gradients, self.rare
        by_position, results = self.by_position, self.results

        class Eager(Function):
            @staticmethod
            def forward(ctx, *args):
                found = in_forward.forward(*args)
                save(ctx, args, num_tensors, found[results:])
                if results == 1:
                    return found[0]
                ctx.mark_non_differentiable(*found[1:results])
                return found[:results]

            @staticmethod
            def backward(ctx, *grads):
                grads = grads if results == 1 else grads[:1]
                tensors, taken = ctx.saved_tensors[:num_tensors], ctx.saved_tensors[num_tensors:]
                needs = ctx.needs_input_grad
                if not (torch.is_grad_enabled() or any([needs[i] for i in rare]) or is_batched(*grads)):
                    found = in_forward.backward(tensors, ctx.options, *taken, *grads)
                    if found is not None:
                        return by_position((*found, None))
                return gradients(_Saved(tensors, ctx.options, needs), *grads)

        Eager.__name__ = Eager.__qualname__ = name
        return _torch.apply_of(Eager)

    # ---- graphs ----

    def _register_for_graphs(self) -> None:
        name, num_tensors = f"aevb::{self.name}", self.num_tensors

        def setup_context(ctx, inputs, output):
            save(ctx, inputs, num_tensors)
            if self.results > 1:
                ctx.mark_non_differentiable(*output[1:])

        torch.library.register_autograd(name, self.gradients, setup_context=setup_context)
        torch.library.register_fake(name, self.fake)
        torch.library.register_fake(f"{name}_forward", self.fake)
        if self.has_own_backward:
            torch.library.register_fake(f"{name}_backward", self._fake_backward)

    def _fake_backward(self, *args):
        wanted = from_bits(args[-1], len(self.fused)) if self.only_needed else [True] * len(self.fused)
        found = tuple(fake_gradient(args[i], args[0], want) for i, want in zip(self.fused, wanted, strict=True))
        return found if len(found) > 1 else found[0]

    # ---- gradients, by the kernel or by the formula ----

    def gradients(self, ctx, *grads):
        """Returns a gradient or None for each argument: the backward pass.

        Eager mode and graphs use it.
        """
        needs, tensors, options = ctx.needs_input_grad, ctx.saved_tensors, ctx.options
        grads = grads if self.results == 1 else grads[:1]
        rare = [i for i in self.rare if needs[i]]
        by_formula = torch.is_grad_enabled() or _functorch_active()
        if by_formula or not all([i in self.derived and self.derived[i].applies(options) for i in rare]):
            found = reference_gradients(self.formula, tensors, options, needs[: self.num_tensors], grads)
            return *found, *(None,) * len(options)
        if self.for_kernel is not None:
            grads = self.for_kernel(options, grads)
        if self.only_needed:
            wanted = [needs[i] for i in self.fused]
            wanted[0] = wanted[0] or bool(rare)
            found = self._run_backward(*tensors, *options, *grads, as_bits(wanted))
            found = tuple([f if want else None for f, want in zip(found, wanted, strict=True)])
        else:
            found = self._run_backward(*tensors, *options, *grads)
        by_position = self.by_position((*found, None) if len(self.fused) > 1 else (found, None))
        if not rare:
            return by_position
        derived = {i: self.derived[i].gradient(tensors, options, found[0]) for i in rare}
        return tuple(derived.get(i, gradient) for i, gradient in enumerate(by_position))

    def _run_backward(self, *args):
        try:
            return self.backward_kernel(*args)
        except (RuntimeError, MemoryError) as error:
            tensors = {key: t for key, t in zip(self.backward_names, args, strict=False) if isinstance(t, Tensor)}
            reader = f"{READERS.get(self.name, self.name)}, backward"
            explain_memory(error, reader, tensors, lambda: self._fake_backward(*map(to_meta, args)))
            raise


class Function(torch.autograd.Function):
    """Op in eager mode."""

    public: str = ""
    """Its name in aevb, where the class has another."""

    @classmethod
    def jvp(cls, ctx, *tangents):
        """Raises NotImplementedError: no kernel computes forward-mode derivatives."""
        raise NotImplementedError(
            f"aevb.{cls.public or cls.__name__} does not support forward-mode automatic differentiation; "
            "aevb.reference has the same function in plain PyTorch, which does"
        )


class KernelFunction(Function):
    """A function of tensors and options whose gradients are a kernel's.

    Its formula gives them where a gradient of the gradient is asked for, or the gradient of an input in `rare`. A
    subclass has `forward`, which calls `save`, and `kernel_gradients`.
    """

    num_tensors: int
    """How many of its arguments are tensors or None; the others are behind them."""
    rare: tuple[int, ...] = ()
    """Positions of inputs whose gradients no kernel gives."""

    @staticmethod
    def formula(ctx: Any) -> tuple[Callable, Sequence]:
        """Returns the function in plain PyTorch, and its options."""
        raise NotImplementedError

    @staticmethod
    def kernel_gradients(ctx: Any, tensors: Sequence, taken: Sequence, needs: Sequence[bool], grad: Tensor) -> Sequence:
        """Returns a gradient for each tensor, or None.

        Args:
            ctx: the context, with `options`.
            tensors: the inputs.
            taken: the other tensors that `forward` saved.
            needs: which gradients are needed.
            grad: the upstream gradient.
        """
        raise NotImplementedError

    @classmethod
    def backward(cls, ctx, grad, *_):
        """Returns a gradient for each argument, or None, from the first result's."""
        tensors, taken = ctx.saved_tensors[: cls.num_tensors], ctx.saved_tensors[cls.num_tensors :]
        needs = ctx.needs_input_grad[: cls.num_tensors]
        if torch.is_grad_enabled() or any([needs[i] for i in cls.rare]) or is_batched(grad):
            formula, options = cls.formula(ctx)
            found: Sequence = reference_gradients(formula, tensors, options, needs, (grad,))
        else:
            found = cls.kernel_gradients(ctx, tensors, taken, needs, grad)
        return *found, *(None,) * (len(ctx.needs_input_grad) - cls.num_tensors)


def times(gradients: Sequence[Tensor | None], grad: Tensor) -> Sequence[Tensor | None]:
    """Returns gradients for an upstream gradient of 1, multiplied by another one, 0-d.

    Where the graph is not kept nobody reads them again, so they are written over.
    """
    keep = kept_graph()
    if not keep and grad.is_cpu and float(grad) == 1:
        return gradients
    return [g if g is None else g * grad.to(g.dtype) if keep else g.mul_(grad.to(g.dtype)) for g in gradients]


def save(ctx, args: Sequence, num_tensors: int, taken: Sequence[Tensor] = ()) -> None:
    """Save the arguments, and gradients computed already, for the backward pass."""
    ctx.save_for_backward(*args[:num_tensors], *taken)
    ctx.options = args[num_tensors:]
    ctx.set_materialize_grads(False)


def reference_gradients(
    formula: Callable, tensors: Sequence, options: Sequence, needs: Sequence[bool], grads: Sequence
):
    """Returns the gradients by autograd on `formula`, themselves differentiable."""
    with torch.enable_grad():
        # A view stands for each input: the gradient must stop there, even where one input was computed from another.
        inputs = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=False)]
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
        outputs = formula(*inputs, *options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs[: len(grads)], grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
    return tuple(next(found) if need else None for need in needs)


# ---- small things that ops share -------------------------------------------------------------------------------------


def as_bits(needs: Sequence[bool]) -> int:
    """Returns the needed gradients as a mask: bit i for the i-th."""
    return sum([1 << i for i, need in enumerate(needs) if need])


def from_bits(needs: int, count: int) -> list[bool]:
    """Returns whether each of `count` gradients is needed, from `as_bits`."""
    return [bool(needs >> i & 1) for i in range(count)]


def to_meta(argument):
    """Returns a tensor without its values, and anything else unchanged."""
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def fake_gradient(of: Tensor | None, other: Tensor, wanted: bool) -> Tensor:
    """Returns a valueless gradient, empty if not wanted or `of` is None."""
    if of is None or not wanted:
        return (other if of is None else of).new_empty(0)
    return torch.empty_like(of, memory_format=torch.contiguous_format)


def is_batched(*grads: Tensor | None) -> bool:
    """Whether a gradient stands for many, under `vmap` or ``is_grads_batched=True``.

    Such gradients of `vmap` or `torch.autograd.grad` cannot be read, nor multiplied into a tensor that stands for one.
    """
    return _functorch_active() or any([g is not None and _is_legacy_batched(g) for g in grads])
