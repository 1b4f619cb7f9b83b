"""The models: the paper's, and a convolutional one, each with a decoder of any likelihood."""

from .base import BaseVAE
from .conv_vae import ConvVAE
from .vae import VAE

__all__ = ["VAE", "BaseVAE", "ConvVAE"]
