"""A training loop of one's own in several processes: torchrun --nproc-per-node=2 examples/two_processes.py

The noise of an image is that of its number in the data set, whichever process it is in, so that any number of processes
gives the same losses. `torchrun --nproc-per-node=2 -m aevb train` does all of this, and evaluates, saves and resumes.
"""

import gc

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import aevb
from aevb.data import load


class Loss(torch.nn.Module):
    """What DistributedDataParallel wraps: its forward gives the loss."""

    def __init__(self, model: aevb.VAE):
        super().__init__()
        self.model, self.criterion = model, aevb.FusedELBO()

    def forward(self, x, seeds):
        z, kl = self.criterion.sample(*self.model.encode(x), seed=seeds)
        return self.criterion(self.model.linear_logits(z), x, kl=kl)


def train() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    digits = load("digits")
    images = digits.train_images
    model = aevb.VAE(digits.data_dim, 200, 10, generator=torch.Generator().manual_seed(0))
    loss_of = DistributedDataParallel(Loss(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(5):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        total = torch.zeros(())
        for index in order.split(100):  # the batch of all processes together: every image of it has one of them
            mine = index.tensor_split(size)[rank]
            x = aevb.binarize(images, mine, seed=2 * epoch, max_value=digits.max_value)
            loss = loss_of(x, aevb.mix_seed(2 * epoch + 1, mine))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(mine)
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: ELBO {-total / len(images):.4f} nats per image", flush=True)


dist.init_process_group("gloo")
train()
gc.collect()  # DistributedDataParallel is part of a cycle, and holds on to the group, which is to end first
dist.destroy_process_group()
