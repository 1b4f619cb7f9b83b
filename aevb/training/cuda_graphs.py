"""CUDA graphs that stay valid whatever else the process does.

PyTorch gives cuBLAS a workspace for each thread and stream at the first product there. cuBLASLt, which adds the bias of
a layer, gets another. A captured graph writes to these workspaces at every replay.

But PyTorch frees all workspaces when torch.compile records graphs of its own (mode="reduce-overhead"). A replay would
then write to memory of another owner, or of none. An H100 ended in an illegal access; on an H200 other tensors changed.

So graphs are captured here on a stream of their own, whose workspaces lie in a memory pool. The pool lives as long as
the process: freed workspaces stay in it, and nothing else takes memory from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class _Products(torch.autograd.Function):
    """Product by cuBLAS and product by cuBLASLt, forward and backward."""

    @staticmethod
    def forward(ctx, a: torch.Tensor) -> torch.Tensor:
        return torch.addmm(a[0], torch.mm(a, a), a)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        return torch.addmm(grad[0], torch.mm(grad, grad), grad)


class _Captures:
    """Streams of a GPU for capturing graphs, and for the steps before.

    Args:
        index: the number of the GPU.
    """

    def __init__(self, index: int):
        self.device = torch.device("cuda", index)
        # PyTorch hands out a few streams by turns. Streams with a priority are hardly ever asked for.
        self.stream = torch.cuda.Stream(self.device, priority=-1)
        self.beside = torch.cuda.Stream(self.device)
        self.keeper: torch.cuda.CUDAGraph | None = None  # owner of the memory pool

    def provide_workspaces(self) -> None:
        """Give this thread and autograd's thread workspaces on the capture stream.

        Each takes products there, in a capture into the memory pool.
        """
        a = torch.ones(16, 16, device=self.device, requires_grad=True)

        def products() -> None:
            torch.autograd.grad(_Products.apply(a).sum(), a)

        with torch.enable_grad():
            products()  # initializes cuBLAS, which a capture cannot do
            graph = torch.cuda.CUDAGraph()
            pool = None if self.keeper is None else self.keeper.pool()
            with torch.cuda.graph(graph, stream=self.stream, pool=pool):
                products()
        self.keeper = self.keeper or graph


@functools.cache
def _captures(index: int) -> _Captures:
    return _Captures(index)


def beside(work: Callable[[], T]) -> T:
    """Returns the result of `work`, run beside the current stream.

    The steps before a capture must run on a stream of their own.
    """
    stream, current = _captures(torch.cuda.current_device()).beside, torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        found = work()
    current.wait_stream(stream)
    return found


def capture(work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Returns a CUDA graph of `work`, and the tensors that `work` returned.

    Each replay writes these tensors.

    Raises:
        RuntimeError: an operation of `work` cannot be captured.
    """
    current = None
    try:
        graph = torch.cuda.CUDAGraph()
        captures = _captures(torch.cuda.current_device())
        current = torch.cuda.current_stream()
        captures.provide_workspaces()
        with torch.cuda.graph(graph, stream=captures.stream):
            found = work()
    except RuntimeError:
        if current is not None:  # a capture that fails at its end leaves its stream current
            torch.cuda.set_stream(current)
        raise
    return graph, found
