"""CUDA graphs that stay good whatever else the process does.

PyTorch gives cuBLAS a workspace for each thread and stream at the first product there, and cuBLASLt, which adds the
bias of a layer, another; a captured graph writes to them at every replay. But PyTorch gives all workspaces back where
torch.compile records graphs of its own (mode="reduce-overhead"), and a replay would write to memory that is somebody
else's, or nobody's: an H100 ended in an illegal access, on an H200 other tensors changed. So graphs are captured here
on a stream of their own, whose workspaces lie in a memory pool that lives as long as the process: given back, they
stay in the pool, from which nobody takes anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class _Products(torch.autograd.Function):
    """A product by cuBLAS and one by cuBLASLt, forward and backward."""

    @staticmethod
    def forward(ctx, a: torch.Tensor) -> torch.Tensor:
        return torch.addmm(a[0], torch.mm(a, a), a)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        return torch.addmm(grad[0], torch.mm(grad, grad), grad)


class _Captures:
    """The stream on which a GPU's graphs are captured, and the one for the steps before."""

    def __init__(self, index: int):
        self.device = torch.device("cuda", index)
        # PyTorch's streams come from a few by turns; of those with a priority hardly anybody takes one.
        self.stream = torch.cuda.Stream(self.device, priority=-1)
        self.beside = torch.cuda.Stream(self.device)
        self.keeper: torch.cuda.CUDAGraph | None = None  # whose pool it is

    def provide_workspaces(self) -> None:
        """Takes products on the stream, in this thread and in that of backward passes, so that both have workspaces."""
        a = torch.ones(16, 16, device=self.device, requires_grad=True)

        def products() -> None:
            torch.autograd.grad(_Products.apply(a).sum(), a)

        with torch.enable_grad():
            products()  # cuBLAS is there, which no capture could bring
            graph = torch.cuda.CUDAGraph()
            pool = None if self.keeper is None else self.keeper.pool()
            with torch.cuda.graph(graph, stream=self.stream, pool=pool):
                products()
        self.keeper = self.keeper or graph


@functools.cache
def _captures(index: int) -> _Captures:
    return _Captures(index)


def beside(work: Callable[[], T]) -> T:
    """What `work` gives, on a stream beside the current one, as capturing wants the steps before it."""
    stream, current = _captures(torch.cuda.current_device()).beside, torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        found = work()
    current.wait_stream(stream)
    return found


def capture(work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `work`, and what that returned: tensors that each replay writes.

    Raises RuntimeError where something in it cannot be captured.
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
        if current is not None:  # where ending the capture failed too, nobody came back from its stream
            torch.cuda.set_stream(current)
        raise
    return graph, found
