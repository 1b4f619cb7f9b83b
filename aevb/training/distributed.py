"""Processes that train one model together: torchrun's, or this process alone."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)  # how long a process may keep the others waiting, as when it loads data


class SingleProcess:
    """Process that trains alone, as rank 0 of 1.

    Args:
        device: the device that it trains on.
    """

    rank, size = 0, 1

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """Returns this process's rows of a batch or data set."""
        return index

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the processes' tensors, the same in all processes."""
        return values

    def share(self, value: T) -> T:
        """Returns the first process's value to all processes."""
        return value

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of ranks."""
        return [value]


class ProcessGroup(SingleProcess):
    """Process in the group that `torch.distributed` connects.

    Args:
        device: the device that it trains on: NCCL connects GPUs, Gloo CPUs.
    """

    def __init__(self, device: torch.device):
        import torch.distributed as dist

        super().__init__(device)
        self.dist = dist
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(_leave)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, index: Tensor) -> Tensor:
        """Returns this process's rows of a batch or data set."""
        return index.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the processes' tensors, on the CPU."""
        values = values.to(self.device, copy=True)
        self.dist.all_reduce(values)
        return values.cpu()

    def share(self, value: T) -> T:
        """Returns the first process's value to all processes."""
        found = [value]
        self.dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of ranks."""
        found: list = [None] * self.size
        self.dist.all_gather_object(found, value)
        return found


def _leave() -> None:
    """End the group that `ProcessGroup` began.

    Left to the end of the process, the group's threads would be aborted wherever they are.
    """
    import torch.distributed as dist

    gc.collect()  # DistributedDataParallel holds on to the group
    if dist.is_initialized():
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun started this process, or WORLD_SIZE is above 1."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def processes(device: torch.device) -> SingleProcess:
    """Returns the process group if launched, or this process alone."""
    return ProcessGroup(device) if is_launched() else SingleProcess(device)


def local_rank() -> int:
    """Returns the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))
