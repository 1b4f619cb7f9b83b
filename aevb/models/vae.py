"""VAE of Kingma & Welling 2013: two multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import likelihoods
from ..checks.arguments import takes_plain_values
from ..likelihoods import GaussianOutput, LinearLogits, LinearOutput
from ..ops.linear import call, call_all
from ..ops.plain_modules import inherits, is_plain, weight_of
from .base import MODELS, BaseVAE, check_last, set_initial_bias
from .layers import mlp


class VAE(BaseVAE):
    """Variational autoencoder with tanh hidden layers (Kingma & Welling 2013, appendix C).

    The encoder gives the posterior q(z|x) = N(mu(x), exp(logvar(x))), the decoder the parameters of p(x|z). With one
    hidden layer on each side::

        mu, logvar = W2 tanh(W1 x + b1) + b2            logits = W4 tanh(W3 z + b3) + b4

    Shapes: x (..., data_dim), values in [0, 1]; z, mu and logvar (..., latent_dim). Call the model for training::

        logits, kl = model(x)
        loss = aevb.FusedELBO()(logits, x, kl=kl)

    or, with a Gaussian decoder, ``aevb.FusedELBO(likelihood="gaussian", sigmoid_means=True)``.

    Args:
        data_dim: values a datapoint has: 784 for 28x28 images.
        hidden_dims: units of the encoder's hidden layers, from x on: a number for one layer, or a sequence. The decoder
            has the same in reverse.
        latent_dim: dimensions of z.
        generator: source of the initial weights (Xavier-uniform; zero biases); by default PyTorch's own.
        **likelihood: the options likelihood, variance, min_variance, mask_input and prior of `BaseVAE`.

    Raises:
        ValueError: a size below 1; at a call, a last dimension that does not fit, or x of integers.
    """

    @takes_plain_values
    def __init__(
        self,
        data_dim: int,
        hidden_dims: int | Sequence[int] = 500,
        latent_dim: int = 20,
        *,
        generator: torch.Generator | None = None,
        **likelihood: Any,
    ):
        super().__init__(data_dim, latent_dim, **likelihood)
        hidden = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        if not hidden:
            raise ValueError("hidden_dims is empty; expected the units of at least one hidden layer")
        if min(hidden) < 1:
            raise ValueError(f"hidden_dims is {min(hidden)}; expected at least 1")
        self.hidden_dims = hidden
        self.encoder = mlp([self._inputs * data_dim, *hidden, 2 * latent_dim], generator)
        self.decoder = decoder = mlp([latent_dim, *reversed(hidden), self._outputs * data_dim], generator)
        set_initial_bias(decoder[-1], self.family.initial[: self._outputs])

    def options(self) -> dict[str, Any]:
        """Returns the constructor's arguments for an equal model, as JSON values."""
        return {"data_dim": self.data_dim, "hidden_dims": self.hidden_dims, **super().options()}

    def recon(self, z: Tensor) -> Tensor | LinearLogits | LinearOutput | GaussianOutput:
        """Returns the `recon` argument of `FusedELBO`, with the last layer unevaluated.

        It is `decode(z)` where the decoder's last layer is more than a product with its weight.
        """
        if self._why_not_linear():
            return self.decode(z)
        if self.family == likelihoods.Bernoulli():
            return self.linear_logits(z)
        check_last(self, z, "z", self.latent_dim)
        *hidden, last = self.decoder.children()
        assert isinstance(last, nn.Linear)
        return LinearOutput(call_all(hidden, z), last.weight, last.bias, *self.beside_the_layer())

    def linear_logits(self, z: Tensor) -> LinearLogits:
        """Returns unevaluated logits of a Bernoulli p(x|z), for `FusedELBO`.

        They take the place of `decode(z)`.

        Raises:
            ValueError: another likelihood, or a last layer that is more than a product with its weight. Then `recon` is
                `decode`, or a `LinearOutput`.
        """
        check_last(self, z, "z", self.latent_dim)
        reason = self._why_not_linear()
        if self.family != likelihoods.Bernoulli():
            reason = f"likelihood is {self.likelihood!r}"
        if reason:
            raise ValueError(f"{reason}; expected a plain nn.Linear at the end: use recon(z), which calls it")
        hidden: list[nn.Module]
        last: nn.Linear
        *hidden, last = self.decoder.children()  # type: ignore[assignment]
        return LinearLogits(call_all(hidden, z), last.weight, last.bias)

    def _why_not_linear(self) -> str | None:
        """Returns why `decode` ends in no plain linear layer, or None."""
        if not inherits(self, VAE, "decode", "_decoded", "_output", "beside_the_layer"):
            return f"{type(self).__name__} decodes in its own way"
        if not is_plain(self.decoder, nn.Sequential):
            return f"the decoder, a {type(self.decoder).__name__}, does something of its own"
        if len(self.decoder) == 0 or not is_plain(self.decoder[-1], nn.Linear):
            return "the decoder's last layer does something of its own"
        return None

    def _encoded(self, x: Tensor, x_scale: float | None) -> Tensor:
        return call(self.encoder, x, x_scale, None if x.is_floating_point() else weight_of(self))

    def _decoded(self, z: Tensor) -> Tensor:
        return call(self.decoder, z)


MODELS["VAE"] = VAE
