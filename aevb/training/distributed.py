"""The processes that train one model together: those that torchrun started, or this one alone."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)  # what one of them may take longer than the others, to load data, say


class SingleProcess:
    """One process: nothing to be shared."""

    rank, size = 0, 1

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """This process's part of what a batch, or a data set, has in its first dimension."""
        return index

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the processes' tensors, the same in all of them."""
        return values

    def share(self, value: T) -> T:
        """The first process's value, for all of them."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        return [value]


class ProcessGroup(SingleProcess):
    """A process of those that `torch.distributed` connects."""

    def __init__(self, device: torch.device):
        import torch.distributed as dist

        super().__init__(device)
        self.dist = dist
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(_leave)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, index: Tensor) -> Tensor:
        return index.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        self.dist.all_reduce(values)
        return values.cpu()

    def share(self, value: T) -> T:
        found = [value]
        self.dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def gather(self, value: T) -> list[T]:
        found: list = [None] * self.size
        self.dist.all_gather_object(found, value)
        return found


def _leave() -> None:
    """Ends what `ProcessGroup` began. Left to the end of the process, its threads would be aborted where they are."""
    import torch.distributed as dist

    gc.collect()  # what wraps a model holds on to the group
    if dist.is_initialized():
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def processes(device: torch.device) -> SingleProcess:
    """This process and those beside it."""
    return ProcessGroup(device) if is_launched() else SingleProcess(device)


def local_rank() -> int:
    """Which process of its machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))
