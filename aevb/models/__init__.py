"""The models: the paper's, and a convolutional one, each with a decoder of any likelihood."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import likelihoods
from ..checks.arguments import takes_plain_values
from ..checks.errors import check_dense, is_dense
from ..files import MODEL
from ..likelihoods import GaussianOutput, LinearLogits, LinearOutput
from ..likelihoods.base import Parameter
from ..likelihoods.values import check_likelihood, check_pixels, is_wanted, look_once
from ..ops import likelihood_log_prob, sample_gaussian
from ..ops.fused_linear import rows_log_prob
from ..ops.linear import call, call_all, floating
from ..ops.plain_modules import inherits, is_plain, weight_of
from .questions import Questions

MOST_FEATURES = 4096  # of a convolutional encoder, that its last layer reads as they are

M = TypeVar("M", bound="BaseVAE")


class BaseVAE(Questions, nn.Module):
    """What the models share: everything but the two networks, `encoder` and `decoder`.

    Their decoder's output is the logits of a Bernoulli p(x|z), or a Gaussian's mean before the sigmoid and its logvar
    (Kingma & Welling 2013, appendix C, and section 5 for the sigmoid), or the parameters of another likelihood.

    Args:
        likelihood: the name of one of `aevb.likelihoods`; the object is the attribute `family`.
        variance: of the Gaussian and the Laplace. "learned": the decoder gives a logvar, or log-scale, for each pixel
            (appendix C.2); "shared": one learned number; or a fixed number.
        min_variance: which a learned variance approaches and never reaches. By default that of rounding to 8 bits,
            1 / (12 * 255^2): below it a density says more than the data do, and has no bound where a pixel is constant.
    """

    encoder: nn.Module
    decoder: nn.Module
    sigmoid_means = True  # of a Gaussian p(x|z): as `FusedELBO` has it

    @takes_plain_values
    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        likelihood: str = "bernoulli",
        variance: str | float = "learned",
        min_variance: float = 1 / (12 * 255**2),
    ):
        super().__init__()
        for name, size in (("data_dim", data_dim), ("latent_dim", latent_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        self.family = likelihoods.for_model(likelihood, self.sigmoid_means)
        if variance not in ("learned", "shared") and (isinstance(variance, str) or not 0 < variance < math.inf):
            raise ValueError(f"variance is {variance!r}; expected 'learned', 'shared' or a positive number")
        if not 0 < min_variance < math.inf:
            raise ValueError(f"min_variance is {min_variance}; expected a positive number")
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.variance, self.min_variance = variance, min_variance
        if self.family.has_spread and variance == "shared":
            self.logvar = nn.Parameter(torch.tensor(self.family.initial[1]))

    @property
    def likelihood(self) -> str:
        """The likelihood's name."""
        return self.family.name

    @likelihood.setter
    def likelihood(self, value: str) -> None:
        self.family = likelihoods.for_model(value, self.sigmoid_means)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "family" not in state:  # of before there was one
            state = dict(state)
            state["family"] = likelihoods.for_model(state.pop("likelihood"), self.sigmoid_means)
        super().__setstate__(state)

    @property
    def _outputs(self) -> int:
        """Numbers that the decoder gives for each pixel."""
        return len(self.family.params) - (self.family.has_spread and self.variance != "learned")

    def options(self) -> dict[str, Any]:
        """The arguments to make another one of: JSON's."""
        return {
            "latent_dim": self.latent_dim,
            "likelihood": self.likelihood,
            "variance": self.variance,
            "min_variance": self.min_variance,
        }

    def forward(
        self, x: Tensor, num_samples: int | None = None, *, seed: Tensor | int | None = None
    ) -> tuple[Tensor | GaussianOutput, Tensor]:
        """Encodes, samples, decodes.

        Returns what `decode` gives, (..., data_dim) or (num_samples, ..., data_dim), and the KL of the posterior from
        N(0, I), (...,), in nats. `seed` is that of `aevb.sample_gaussian`.
        """
        mu, logvar = self.encode(x)
        z, kl = sample_gaussian(mu, logvar, num_samples, batch_dims=mu.dim() - 1, seed=seed)
        return self.decode(z), kl

    def encode(self, x: Tensor, x_scale: float | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (..., latent_dim), of the posterior q(z|x). x may be floating, bool, or uint8 with
        x_scale: 1/255 for pixels in 0..255. Bits and pixels are taken as they are where most of them are 0."""
        _check_last(self, x, "x", self.data_dim, ": flatten each datapoint, x.flatten(1)")
        if not (x.is_floating_point() or x.dtype == torch.bool or (x.dtype == torch.uint8 and x_scale is not None)):
            raise ValueError(
                f"x is {x.dtype}; expected values in [0, 1], floating or bool: for pixels, x_scale=1/255, or x / 255"
            )
        if x.is_floating_point():
            x = x.to(weight_of(self).dtype)
        mu, logvar = self._encoded(x, x_scale).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor | GaussianOutput:
        """Of p(x|z) the logits, (..., data_dim); of a Gaussian (mean, logvar): the mean before the sigmoid, and logvar
        (..., data_dim), 0-d or a number."""
        _check_last(self, z, "z", self.latent_dim)
        return self._output(self._decoded(z))

    def recon(self, z: Tensor) -> Tensor | LinearLogits | LinearOutput | GaussianOutput:
        """What `FusedELBO` takes as `recon`: `decode(z)`, or what saves its memory, as `VAE`'s does."""
        return self.decode(z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), in nats, z's leading dimensions: x (..., data_dim), z (..., latent_dim) or (L, ..., latent_dim)
        for L samples."""
        check_dense(type(self).__name__, x=x)
        recon, family = self.recon(z), self.family.density
        is_linear = isinstance(recon, LinearLogits | LinearOutput)
        params = () if is_linear else family.parameters(recon)
        if is_wanted(key := f"log_prob, {family.name}", None, x):
            first = None if is_linear else params[0]
            look_once(key, None, functools.partial(check_likelihood, family), first, x, None)
        if isinstance(recon, LinearLogits | LinearOutput):
            return rows_log_prob(family, recon, x, None)
        return likelihood_log_prob(family, params, x, None)

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z], (..., data_dim): of bits the probability of each."""
        return self.family.mean(self.parameters_of(z))

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance of each pixel of p(x|z), both (..., data_dim)."""
        params = self.parameters_of(z)
        return self.family.mean(params), self.family.variance_of(params)

    def parameters_of(self, z: Tensor) -> tuple[Parameter, ...]:
        """The parameters of p(x|z), in the order of `family.params`: what `decode` gives, as a tuple."""
        return self.family.parameters(self.decode(z))

    def pixel_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x_i|z) of each pixel, (..., data_dim), in nats: x (..., data_dim), z (..., latent_dim) or (L, ...,
        latent_dim). For where some pixels count and others do not; their sum is `log_prob`, which is faster."""
        family = self.family.density
        return family.element_log_prob(family.parameters(self.decode(z)), x)

    @takes_plain_values
    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The pixel means, (n, data_dim), at n draws of z from the prior; no gradient."""
        if n < 0:
            raise ValueError(f"n is {n}; expected the number of samples")
        weight = weight_of(self)
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=weight.dtype, device=weight.device)
        return self.mean(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The pixel means, (..., data_dim), at the posterior mean of x; no gradient.

        Raises ValueError where x of a Bernoulli model is not of [0, 1].
        """
        check_pixels(self, {"x": x})
        return self.mean(self.encode(x)[0])

    def metadata(self) -> dict[str, str]:
        """What says in a file of weights which model they are of."""
        return {"model": json.dumps({"class": type(self).__name__, **self.options()})}

    @classmethod
    def load(cls: type[M], path: str | PathLike[str]) -> M:
        """The model in a run's `model.safetensors`, of the class and sizes that the file says.

        Args:
            path: the file, or the folder that it is in.

        Raises FileNotFoundError, or ValueError where the file is damaged or holds another model.
        """
        path = Path(path)
        if path.is_dir():
            path /= MODEL
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; expected a run's folder, or a {MODEL}")
        import safetensors

        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from error
        try:
            options = json.loads(metadata["model"]) if "model" in metadata else _options_of(weights)
            kind = MODELS[options.pop("class")]
            model = kind(**options)
            model.load_state_dict(weights)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold the weights of an aevb.{cls.__name__}: {', '.join(sorted(weights))}"
            ) from error
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {kind.__name__}; expected a {cls.__name__}")
        return model

    # ---- what a model has of its own ----

    def _encoded(self, x: Tensor, x_scale: float | None) -> Tensor:
        """mu and logvar side by side, (..., 2 latent_dim)."""
        raise NotImplementedError

    def _decoded(self, z: Tensor) -> Tensor:
        """The decoder's output, (..., _outputs * data_dim)."""
        raise NotImplementedError

    # ---- the likelihood ----

    def beside_the_layer(self) -> tuple[Tensor | float | None, float | None]:
        """The second parameter, where it does not come from the decoder, and the floor of one that does."""
        if not self.family.has_spread:
            return None, None
        if not isinstance(self.variance, str):
            return self.family.spread_of(self.variance), None
        if self.variance == "shared":
            return self.family.above(self.min_variance, self.logvar), None
        return None, self.family.spread_of(self.min_variance)

    def _output(self, decoded: Tensor) -> Tensor | GaussianOutput:
        family, params = self.family, decoded.chunk(self._outputs, dim=-1) if self._outputs > 1 else (decoded,)
        if not family.has_spread:
            return decoded if len(params) == 1 else params  # type: ignore[return-value]
        if not isinstance(self.variance, str):
            return family.output(decoded, family.spread_of(self.variance))  # type: ignore[return-value]
        spread = self.logvar if self.variance == "shared" else params[1]
        return family.output(params[0], family.above(self.min_variance, spread))  # type: ignore[return-value]


class VAE(BaseVAE):
    """A variational autoencoder with tanh hidden layers on each side (Kingma & Welling 2013, appendix C).

    The encoder gives the posterior q(z|x) = N(mu(x), exp(logvar(x))), the decoder the parameters of p(x|z); with one
    hidden layer::

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
        likelihood, variance, min_variance: see `BaseVAE`.
        generator: where the initial weights (Xavier-uniform; zero biases) are drawn; by default PyTorch's own.

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
        self.encoder = _mlp([data_dim, *hidden, 2 * latent_dim], generator)
        self.decoder = decoder = _mlp([latent_dim, *reversed(hidden), self._outputs * data_dim], generator)
        _set_initial_bias(decoder[-1], self.family.initial[: self._outputs])

    def options(self) -> dict[str, Any]:
        return {"data_dim": self.data_dim, "hidden_dims": self.hidden_dims, **super().options()}

    def recon(self, z: Tensor) -> Tensor | LinearLogits | LinearOutput | GaussianOutput:
        """What `FusedELBO` takes as `recon`: the parameters that nobody has computed yet."""
        if self._why_not_linear():
            return self.decode(z)
        if self.family == likelihoods.Bernoulli():
            return self.linear_logits(z)
        _check_last(self, z, "z", self.latent_dim)
        *hidden, last = self.decoder.children()
        assert isinstance(last, nn.Linear)
        return LinearOutput(call_all(hidden, z), last.weight, last.bias, *self.beside_the_layer())

    def linear_logits(self, z: Tensor) -> LinearLogits:
        """The logits of a Bernoulli p(x|z) that nobody has computed yet, for `FusedELBO` in place of `decode(z)`.

        Raises ValueError where the last layer is more than a product with its weight: then `recon` is `decode`.
        """
        _check_last(self, z, "z", self.latent_dim)
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
        """What `decode` does other than a product with the last layer's weight."""
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


class ConvVAE(BaseVAE):
    """A variational autoencoder with a small convolutional encoder and decoder.

    The encoder's layers are convolutions of 4x4 with stride 2, each halving the image, and ReLUs; then a linear layer
    gives mu and logvar. The decoder has the same in reverse, with transposed convolutions. Images are flat, as those of
    `VAE` are: x (..., data_dim) with data_dim = C * H * W.

    Args:
        image_shape: (H, W) or (C, H, W).
        channels: of the encoder's layers, from x on: a sequence.
        latent_dim, likelihood, variance, min_variance: see `BaseVAE`.
        generator: where the initial weights (Kaiming-uniform; zero biases) are drawn; by default PyTorch's own.

    Raises ValueError: a size below 1; an image too small for so many layers.
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
        encoder: list[nn.Module] = [nn.Unflatten(-1, (inputs, height, width))]
        for before, after in itertools.pairwise((inputs, *self.channels)):
            encoder += [_convolution(nn.Conv2d, before, after, generator), nn.ReLU()]
        encoder += [_flatten(features), _dense(features, 2 * latent_dim, generator)]
        _scale_up(encoder[-1], encoder[-2])
        decoder: list[nn.Module] = [_dense(latent_dim, features, generator), nn.Unflatten(-1, deepest)]
        widths = (*reversed(self.channels), self._outputs * inputs)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            small, large = sizes[len(sizes) - 1 - i], sizes[len(sizes) - 2 - i]
            padding = (large[0] - 2 * small[0], large[1] - 2 * small[1])  # 1 where halving dropped a row
            layer = _convolution(nn.ConvTranspose2d, before, after, generator, output_padding=padding)
            decoder += [nn.ReLU(), layer]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder, nn.Flatten())
        _set_initial_bias(decoder[-1], self.family.initial[: self._outputs])

    def options(self) -> dict[str, Any]:
        return {"image_shape": self.image_shape, "channels": self.channels, **super().options()}

    def _encoded(self, x: Tensor, x_scale: float | None) -> Tensor:
        x = floating(x, x_scale, weight_of(self))
        return self.encoder(x.reshape(-1, self.data_dim)).view(*x.shape[:-1], 2 * self.latent_dim)

    def _decoded(self, z: Tensor) -> Tensor:
        return self.decoder(z.reshape(-1, self.latent_dim)).view(*z.shape[:-1], self._outputs * self.data_dim)


MODELS: dict[str, type[BaseVAE]] = {"VAE": VAE, "ConvVAE": ConvVAE}


def _options_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a file that says nothing: a Bernoulli VAE's sizes are those of the weights."""
    layers = sum(name.startswith("encoder.") and name.endswith(".weight") for name in weights)
    return {
        "class": "VAE",
        "data_dim": weights["encoder.0.weight"].shape[1],
        "hidden_dims": [len(weights[f"encoder.{2 * i}.weight"]) for i in range(layers - 1)],
        "latent_dim": weights["decoder.0.weight"].shape[1],
    }


def _dense(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    # "meta": nn.Linear would draw weights of its own, from PyTorch's generator. skip_init would import sympy for
    # that, half a second.
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs), generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def _convolution(kind: type[Any], inputs: int, outputs: int, generator: torch.Generator | None, **options: Any) -> Any:
    layer = kind(inputs, outputs, 4, stride=2, padding=1, device="meta", **options)
    weight = torch.empty(layer.weight.shape)
    # Of a transposed convolution with stride 2 a pixel has 4 of the 16 weights of each input.
    fan_in = inputs * (16 if kind is nn.Conv2d else 4)
    bound = math.sqrt(6 / fan_in)
    layer.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


class ScaledFlatten(nn.Flatten):
    """Flattens, and multiplies by a number that belongs to the weights after it."""

    scale: Tensor

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Weights from before there was a scale go with none.
        state_dict.setdefault(f"{prefix}scale", torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _flatten(features: int) -> nn.Flatten:
    """What flattens so many features for a layer of which each output is a sum over all of them.

    A step of Adam moves every weight by the learning rate, whatever the gradient is, so that it moves logvar in
    proportion to the features: by 40 for images of 105x105, which makes a variance of exp(40). Smaller features and
    larger weights are the same function, and a step of it is then no larger than that of MOST_FEATURES.
    """
    return nn.Flatten() if features <= MOST_FEATURES else ScaledFlatten(MOST_FEATURES / features)


@torch.no_grad()
def _scale_up(last: nn.Module, before: nn.Module) -> None:
    if isinstance(before, ScaledFlatten):
        assert isinstance(last.weight, nn.Parameter)
        last.weight.div_(before.scale)


@torch.no_grad()
def _set_initial_bias(last: nn.Module, values: Sequence[float]) -> None:
    assert isinstance(last.bias, Tensor)
    for part, value in zip(last.bias.chunk(len(values)), values, strict=True):
        part.fill_(value)


def _mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [_dense(inputs, outputs, generator), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _check_last(model: nn.Module, t: Tensor, name: str, size: int, hint: str = "") -> None:
    if not is_dense(t):
        check_dense(type(model).__name__, **{name: t})
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected (..., {size}){hint}")
