"""The paper's model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import floating, linear
from .linear_likelihood import LinearLogits, linear_bernoulli_log_prob
from .ops import sample_gaussian
from .questions import Questions


class VAE(Questions, nn.Module):
    """A variational autoencoder with tanh hidden layers on each side (Kingma & Welling 2013, appendix C).

    The encoder gives the posterior q(z|x) = N(mu(x), exp(logvar(x))), the decoder the logits of a Bernoulli p(x|z);
    with one hidden layer::

        mu, logvar = W2 tanh(W1 x + b1) + b2            logits = W4 tanh(W3 z + b3) + b4

    Shapes: x (..., data_dim), values in [0, 1]; z, mu and logvar (..., latent_dim). Call the model for training::

        logits, kl = model(x)
        loss = aevb.FusedELBO()(logits, x, kl=kl)

    Args:
        data_dim: values a datapoint has: 784 for 28x28 images.
        hidden_dims: units of the encoder's hidden layers, from x on: a number for one layer, or a sequence. The decoder
            has the same in reverse.
        latent_dim: dimensions of z.
        generator: where the initial weights (Xavier-uniform; zero biases) are drawn; by default PyTorch's own.

    Raises:
        ValueError: a size below 1; at a call, a last dimension that does not fit, or x of integers.
    """

    likelihood = "bernoulli"

    def __init__(
        self,
        data_dim: int,
        hidden_dims: int | Sequence[int] = 500,
        latent_dim: int = 20,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        hidden = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        for name, size in (("data_dim", data_dim), ("latent_dim", latent_dim), *(("hidden_dims", h) for h in hidden)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if not hidden:
            raise ValueError("hidden_dims is empty; expected the units of at least one hidden layer")
        self.data_dim, self.hidden_dims, self.latent_dim = data_dim, hidden, latent_dim
        self.encoder = _mlp([data_dim, *hidden, 2 * latent_dim], generator)
        self.decoder = _mlp([latent_dim, *reversed(hidden), data_dim], generator)

    def forward(
        self, x: Tensor, num_samples: int | None = None, *, seed: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encodes, samples, decodes.

        Returns logits, (..., data_dim) or (num_samples, ..., data_dim), and the KL of the posterior from N(0, I),
        (...,), in nats. `seed` is that of `aevb.sample_gaussian`.
        """
        z, kl = sample_gaussian(*self.encode(x), num_samples, seed=seed)
        return self.decode(z), kl

    def encode(self, x: Tensor, x_scale: float | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (..., latent_dim), of the posterior q(z|x). x may be floating, bool, or uint8 with
        x_scale: 1/255 for pixels in 0..255. Bits and pixels are taken as they are where most of them are 0."""
        _check_last(x, "x", self.data_dim, ": flatten each datapoint, x.flatten(1)")
        if not (x.is_floating_point() or x.dtype == torch.bool or (x.dtype == torch.uint8 and x_scale is not None)):
            raise ValueError(
                f"x is {x.dtype}; expected values in [0, 1], floating or bool: for pixels, x_scale=1/255, or x / 255"
            )
        if x.is_floating_point():
            x = x.to(next(self.parameters()).dtype)
        mu, logvar = _output(self.encoder, _hidden(self.encoder, x, x_scale)).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The logits, (..., data_dim), of p(x|z)."""
        _check_last(z, "z", self.latent_dim)
        return _output(self.decoder, _hidden(self.decoder, z))

    def linear_logits(self, z: Tensor) -> LinearLogits:
        """The logits of p(x|z) that nobody has computed yet, to be passed to `FusedELBO` in place of `decode(z)`."""
        _check_last(z, "z", self.latent_dim)
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        return LinearLogits(_hidden(self.decoder, z), last.weight, last.bias)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), in nats, z's leading dimensions: x (..., data_dim), z (..., latent_dim) or (L, ..., latent_dim)
        for L samples. The logits are never in memory."""
        return linear_bernoulli_log_prob(*self.linear_logits(z), x)

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z], (..., data_dim): the probability of each pixel."""
        return self.decode(z).sigmoid()

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance of each pixel of p(x|z), both (..., data_dim)."""
        p = self.mean(z)
        return p, p * (1 - p)

    def pixel_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x_i|z) of each pixel, (..., data_dim), in nats: x (..., data_dim), z (..., latent_dim) or (L, ...,
        latent_dim). For where some pixels count and others do not; their sum is `log_prob`, which is faster."""
        logits = self.decode(z)
        return x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The probabilities, (n, data_dim), at n draws of z from the prior; no gradient."""
        if n < 0:
            raise ValueError(f"n is {n}; expected the number of samples")
        weight = next(self.parameters())
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=weight.dtype, device=weight.device)
        return self.mean(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The probabilities, (..., data_dim), at the posterior mean of x; no gradient."""
        return self.mean(self.encode(x)[0])

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
            data_dim, latent_dim = weights["encoder.0.weight"].shape[1], weights["decoder.0.weight"].shape[1]
            layers = sum(name.startswith("encoder.") and name.endswith(".weight") for name in weights)
            model = cls(data_dim, [len(weights[f"encoder.{2 * i}.weight"]) for i in range(layers - 1)], latent_dim)
            model.load_state_dict(weights)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold the weights of an aevb.VAE: {', '.join(sorted(weights))}"
            ) from error
        return model


def _mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        # "meta": nn.Linear would draw weights of its own, from PyTorch's generator. skip_init would import sympy for
        # that, half a second.
        layer = nn.Linear(inputs, outputs, device="meta")
        layer.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs), generator=generator))
        layer.bias = nn.Parameter(torch.zeros(outputs))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _hidden(mlp: nn.Sequential, x: Tensor, x_scale: float | None = None) -> Tensor:
    """What the last hidden layer gives."""
    *hidden, _ = mlp
    for layer, activation in zip(hidden[::2], hidden[1::2], strict=True):
        if is_plain(layer, nn.Linear) and is_plain(activation, nn.Tanh):
            x = linear(x, layer.weight, layer.bias, "tanh", x_scale)
        else:
            x = activation(layer(floating(x, x_scale, next(layer.parameters()))))
        x_scale = None
    return x


def _output(mlp: nn.Sequential, hidden: Tensor) -> Tensor:
    last = mlp[-1]
    return linear(hidden, last.weight, last.bias) if is_plain(last, nn.Linear) else last(hidden)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a call of the module is that of its class and no more: neither parametrized, nor with hooks, as pruning
    and spectral norm have them."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks


def _check_last(t: Tensor, name: str, size: int, hint: str = "") -> None:
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected (..., {size}){hint}")
