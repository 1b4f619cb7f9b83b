"""Dynamic binarization of images that are not bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops.autograd import on_reference
from ..ops.random import mix_seed

# Below 0: under an image's seed, mix_seed(seed, index), samples of z have the indices from 0 up.
_STREAM = -1
_LARGEST = 1 - 2**-24  # largest float32 below 1


def bernoulli_bits(x: Tensor, index: Tensor, seed: Tensor | int) -> Tensor:
    """Returns bits, (B, D), each set with probability x: dynamic binarization.

    They are ``u < x`` with u = Phi(e), where e are the normals of the seed ``mix_seed(mix_seed(seed, index[b]), -1)``.
    As for `aevb.binarize` the noise belongs to the image and to the seed. Probabilities are exact to 1e-7; 0 is never
    set, and 1 always.

    Args:
        x: (B, D), float32 in [0, 1].
        index: (B,), the images' indices.
        seed: An int or an int64 tensor.
    """
    seeds = mix_seed(mix_seed(seed, index), _STREAM)
    on_kernel = torch.ops.aevb.normal.default
    normals = reference.normal(seeds, x.shape, torch.float32) if on_reference(x) else on_kernel(seeds, list(x.shape))
    u = torch.special.ndtr(normals).clamp_max_(_LARGEST)
    return u < x
