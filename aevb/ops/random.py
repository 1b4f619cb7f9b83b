"""Seeds, and noise as a function of seeds: normals and binarized images."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks.errors import check_dense, explain_memory
from ..checks.seeds import int64
from .autograd import has_no_kernels

_ops = torch.ops.aevb


@torch.library.register_fake("aevb::normal")
def _(seed, size):
    return seed.new_empty(size, dtype=torch.float32)


@torch.library.register_vmap("aevb::normal")
def _(info, in_dims, seed, size):
    if in_dims[0] is None:
        return _ops.normal(seed, size), None
    return _ops.normal(seed.movedim(in_dims[0], 0), [info.batch_size, *size]), 0


@torch.library.register_fake("aevb::mix_seed")
def _(seed, index):
    return torch.empty_like(seed, memory_format=torch.contiguous_format)


@torch.library.register_vmap("aevb::mix_seed")
def _(info, in_dims, seed, index):
    seed, index = (
        t.unsqueeze(0).expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((seed, index), in_dims, strict=True)
    )
    return _ops.mix_seed(seed, index), 0


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Returns a fresh 0-d int64 seed on `device`, from PyTorch's generator.

    Raises:
        ValueError: a generator on another type of device.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device} but the tensors are on {device}; "
            f"make it with torch.Generator(device={device.type!r})"
        )
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)


def mix_seed(seed: Tensor | int, index: Tensor | int) -> Tensor:
    """Independent seeds for datapoints, steps or ranks.

    Each (seed, index) gives the first 64 bits of Philox4x32-10 at counter (index, 1, 0) under the key `seed`. The noise
    itself never uses that stream.

    Args:
        seed: an int or an int64 tensor.
        index: an int or an int64 tensor, broadcast against seed.

    Returns:
        An int64 tensor of their common shape, to be passed as `seed=`.

    Raises:
        RuntimeError: a tensor that is not int64, or shapes that do not broadcast.
        ValueError: an int beyond 64 bits.

    Example::

        seeds = aevb.mix_seed(run_seed, datapoint_index)           # (B,)
        z, kl = aevb.sample_gaussian(mu, logvar, seed=seeds)       # noise that belongs to the datapoint
    """
    device = next((t.device for t in (index, seed) if isinstance(t, Tensor)), None)
    seeds, indices = torch.broadcast_tensors(int64(seed, "seed", device), int64(index, "index", device))
    if seeds.is_cuda and has_no_kernels("cuda"):
        return reference.mix_seed(seeds, indices)
    return _ops.mix_seed.default(seeds, indices)


@torch.library.register_fake("aevb::binarize")
def _(images, index, seed, max_value):
    rows = images.shape[0] if index is None else index.shape[0]
    return images.new_empty((rows, images.shape[1]), dtype=torch.bool)


def binarize(images: Tensor, index: Tensor | None = None, *, seed: Tensor | int, max_value: int = 255) -> Tensor:
    """Random bits of grey images: dynamic binarization, with the images gathered.

    ``x[b, d] = u < images[index[b], d] / max_value`` with u uniform, so a bit's probability is its grey value. The
    noise belongs to the image, by the seed ``mix_seed(seed, index[b])``. So a batch, an epoch and a rank see the same
    bits of an image for the same seed. One pass, from bytes to bytes.

    Args:
        images: (N, D), uint8. A pixel of 0 is never set, and a pixel of max_value or more always. Probabilities between
            are exact to 6e-8.
        index: (B,), int64, which of them; by default all. On a GPU an index out of range ends in a device-side assert.
        seed: an int or a 0-d int64 tensor: one for each epoch, say.
        max_value: 1 to 255.

    Returns:
        (B, D), bool: targets for `bernoulli_log_prob`, and an input for `linear`, unconverted.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, and on a CPU an index out of range.
    """
    check_dense("binarize", images=images, **({} if index is None else {"index": index}))
    seed = int64(seed, "seed", images.device)
    if images.is_cuda and has_no_kernels("cuda"):
        return reference.binarize(images, index, seed, max_value)
    try:
        return _ops.binarize.default(images, index, seed, max_value)
    except (RuntimeError, MemoryError) as error:
        wanted = images if index is None else index

        def bits() -> Tensor:
            return torch.empty((len(wanted), *images.shape[1:]), dtype=torch.bool, device="meta")

        explain_memory(error, "binarize", {"images": images}, bits)
        raise


def noise_of(seed: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns standard normals of `seed`, of shape `size`, float32."""
    no_kernel = seed.is_cuda and has_no_kernels("cuda")
    return reference.normal(seed, size, torch.float32) if no_kernel else _ops.normal.default(seed, size)
