"""The paper's model."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor, nn

from .ops import sample_gaussian


class VAE(nn.Module):
    """A variational autoencoder with one tanh hidden layer on each side (Kingma & Welling 2013, appendix C).

    The encoder gives the posterior q(z|x) = N(mu(x), exp(logvar(x))), the decoder the logits of a Bernoulli p(x|z)::

        mu, logvar = W2 tanh(W1 x + b1) + b2            logits = W4 tanh(W3 z + b3) + b4

    Shapes: x (..., data_dim), values in [0, 1]; z, mu and logvar (..., latent_dim). Call the model for training::

        logits, kl = model(x)
        loss = aevb.FusedELBO()(logits, x, kl=kl)

    Args:
        data_dim: values a datapoint has: 784 for 28x28 images.
        hidden_dim: units of each hidden layer.
        latent_dim: dimensions of z.
        generator: where the initial weights (Xavier-uniform; zero biases) are drawn; by default PyTorch's own.

    Raises:
        ValueError: a size below 1; at a call, a last dimension that does not fit, or x of integers.
    """

    def __init__(
        self,
        data_dim: int,
        hidden_dim: int = 500,
        latent_dim: int = 20,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, size in (("data_dim", data_dim), ("hidden_dim", hidden_dim), ("latent_dim", latent_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        self.data_dim, self.hidden_dim, self.latent_dim = data_dim, hidden_dim, latent_dim
        self.encoder = _mlp(data_dim, hidden_dim, 2 * latent_dim, generator)
        self.decoder = _mlp(latent_dim, hidden_dim, data_dim, generator)

    def forward(
        self, x: Tensor, num_samples: int | None = None, *, seed: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encodes, samples, decodes.

        Returns logits, (..., data_dim) or (num_samples, ..., data_dim), and the KL of the posterior from N(0, I),
        (...,), in nats. `seed` is that of `aevb.sample_gaussian`.
        """
        z, kl = sample_gaussian(*self.encode(x), num_samples, seed=seed)
        return self.decode(z), kl

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (..., latent_dim), of the posterior q(z|x). x may be floating or bool."""
        _check_last(x, "x", self.data_dim, ": flatten each datapoint, x.flatten(1)")
        if not (x.is_floating_point() or x.dtype == torch.bool):
            raise ValueError(f"x is {x.dtype}; expected values in [0, 1], floating or bool: for pixels, x / 255")
        mu, logvar = self.encoder(x.to(next(self.parameters()).dtype)).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The logits, (..., data_dim), of p(x|z)."""
        _check_last(z, "z", self.latent_dim)
        return self.decoder(z)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The probabilities, (n, data_dim), at n draws of z from the prior; no gradient."""
        if n < 0:
            raise ValueError(f"n is {n}; expected the number of samples")
        weight = next(self.parameters())
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=weight.dtype, device=weight.device)
        return self.decode(z).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The probabilities, (..., data_dim), at the posterior mean of x; no gradient."""
        return self.decode(self.encode(x)[0]).sigmoid()

    @classmethod
    def load(cls, path: str | PathLike[str]) -> VAE:
        """The model in a run's `model.safetensors`; its sizes are those of the weights.

        Raises FileNotFoundError, or ValueError where the file is damaged or holds another model.
        """
        import safetensors
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from error
        try:
            hidden_dim, data_dim = weights["encoder.0.weight"].shape
            model = cls(data_dim, hidden_dim, weights["decoder.0.weight"].shape[1])
            model.load_state_dict(weights)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold the weights of an aevb.VAE: {', '.join(sorted(weights))}"
            ) from error
        return model


def _mlp(inputs: int, hidden: int, outputs: int, generator: torch.Generator | None) -> nn.Sequential:
    def linear(inputs: int, outputs: int) -> nn.Module:
        # skip_init: nn.Linear would draw weights of its own, from PyTorch's generator.
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        return layer

    return nn.Sequential(linear(inputs, hidden), nn.Tanh(), linear(hidden, outputs))


def _check_last(t: Tensor, name: str, size: int, hint: str = "") -> None:
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected (..., {size}){hint}")
