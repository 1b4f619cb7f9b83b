"""`aevb.binarize` for images that are not bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops.autograd import on_reference
from ..ops.random import mix_seed

# Where mix_seed(seed, index) is the seed of an image, samples of z have the indices from 0 up.
_STREAM = -1
_LARGEST = 1 - 2**-24  # below 1, to which float32 would round


def bernoulli_bits(x: Tensor, index: Tensor, seed: Tensor | int) -> Tensor:
    """Bits, (B, D), each set with the probability x, float32 in [0, 1], (B, D): dynamic binarization.

    ``u < x``, u = Phi(e) with the normals e of the seed ``mix_seed(mix_seed(seed, index[b]), -1)``: as for
    `aevb.binarize` the noise belongs to the image, index (B,), and to the seed. Probabilities are exact to 1e-7; 0 is
    never set, and 1 always.
    """
    seeds = mix_seed(mix_seed(seed, index), _STREAM)
    on_kernel = torch.ops.aevb.normal.default
    normals = reference.normal(seeds, x.shape, torch.float32) if on_reference(x) else on_kernel(seeds, list(x.shape))
    u = torch.special.ndtr(normals).clamp_max_(_LARGEST)
    return u < x
