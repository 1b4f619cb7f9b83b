"""Convolutional VAE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.arguments import takes_plain_values
from ..ops.linear import floating
from ..ops.plain_modules import weight_of
from .base import MODELS, BaseVAE, set_initial_bias
from .layers import convolution, dense, flatten, scale_up


class ConvVAE(BaseVAE):
    """Variational autoencoder with a small convolutional encoder and decoder.

    The encoder's layers are convolutions of 4x4 with stride 2, each halving the image, and ReLUs. A linear layer after
    them gives mu and logvar. The decoder has the same in reverse, with transposed convolutions. Images are flat, as in
    `VAE`: x (..., data_dim) with data_dim = C * H * W.

    Args:
        image_shape: (H, W) or (C, H, W).
        channels: of the encoder's layers, from x on: a sequence.
        latent_dim: see `BaseVAE`.
        generator: source of the initial weights (Kaiming-uniform; zero biases); by default PyTorch's own.
        **likelihood: the options likelihood, variance, min_variance, mask_input and prior of `BaseVAE`.

    Raises:
        ValueError: a size below 1; an image too small for so many layers.
    """

    @takes_plain_values
    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        latent_dim: int = 20,
        *,
        generator: torch.Generator | None = None,
        **likelihood: Any,
    ):
        if len(image_shape) not in (2, 3):
            raise ValueError(f"image_shape is {tuple(image_shape)}; expected (H, W) or (C, H, W)")
        super().__init__(math.prod(image_shape), latent_dim, **likelihood)
        self.image_shape, self.channels = tuple(image_shape), tuple(channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels is {self.channels}; expected the channels of each layer, at least 1")
        height, width = self.image_shape[-2:]
        inputs = self.data_dim // (height * width)
        sizes = [(height >> i, width >> i) for i in range(len(self.channels) + 1)]
        if min(sizes[-1]) < 1:
            raise ValueError(
                f"image_shape is {self.image_shape} and channels has {len(self.channels)} layers, each of which halves "
                f"the image; expected at most {min(height, width).bit_length() - 1}"
            )
        deepest = (self.channels[-1], *sizes[-1])
        features = math.prod(deepest)
        given = self._inputs * inputs  # the mask's channels follow the image's
        encoder: list[nn.Module] = [nn.Unflatten(-1, (given, height, width))]
        for before, after in itertools.pairwise((given, *self.channels)):
            encoder += [convolution(nn.Conv2d, before, after, generator), nn.ReLU()]
        encoder += [flatten(features), dense(features, 2 * latent_dim, generator)]
        scale_up(encoder[-1], encoder[-2])
        decoder: list[nn.Module] = [dense(latent_dim, features, generator), nn.Unflatten(-1, deepest)]
        widths = (*reversed(self.channels), self._outputs * inputs)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            small, large = sizes[len(sizes) - 1 - i], sizes[len(sizes) - 2 - i]
            padding = (large[0] - 2 * small[0], large[1] - 2 * small[1])  # 1 where halving dropped a row
            layer = convolution(nn.ConvTranspose2d, before, after, generator, output_padding=padding)
            decoder += [nn.ReLU(), layer]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder, nn.Flatten())
        set_initial_bias(decoder[-1], self.family.initial[: self._outputs])

    def options(self) -> dict[str, Any]:
        """Returns the constructor's arguments for an equal model, as JSON values."""
        return {"image_shape": self.image_shape, "channels": self.channels, **super().options()}

    def _encoded(self, x: Tensor, x_scale: float | None) -> Tensor:
        x = floating(x, x_scale, weight_of(self))
        return self.encoder(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], 2 * self.latent_dim)

    def _decoded(self, z: Tensor) -> Tensor:
        return self.decoder(z.reshape(-1, self.latent_dim)).view(*z.shape[:-1], self._outputs * self.data_dim)


MODELS["ConvVAE"] = ConvVAE
