"""VAE models: multilayer perceptrons and convolutions, with decoders of any likelihood."""

from .base import BaseVAE
from .conv_vae import ConvVAE
from .vae import VAE

__all__ = ["VAE", "BaseVAE", "ConvVAE"]
