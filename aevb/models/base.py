"""What every VAE of aevb is: encode, decode, log p(x|z), files, and its questions."""

from __future__ import annotations

import functools
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
from ..inference.methods import InferenceMethods
from ..likelihoods import GaussianOutput, LinearLogits, LinearOutput
from ..likelihoods.base import Parameter
from ..likelihoods.values import check_likelihood, check_pixels, is_wanted, look_once
from ..ops.fused_linear import rows_log_prob
from ..ops.gaussian import sample_gaussian
from ..ops.likelihood import likelihood_log_prob
from ..ops.plain_modules import weight_of

M = TypeVar("M", bound="BaseVAE")


MODELS: dict[str, type[BaseVAE]] = {}  # that a file can hold, by the name of their class


class BaseVAE(InferenceMethods, nn.Module):
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
        check_last(self, x, "x", self.data_dim, ": flatten each datapoint, x.flatten(1)")
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
        check_last(self, z, "z", self.latent_dim)
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


def _options_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a file that says nothing: a Bernoulli VAE's sizes are those of the weights."""
    layers = sum(name.startswith("encoder.") and name.endswith(".weight") for name in weights)
    return {
        "class": "VAE",
        "data_dim": weights["encoder.0.weight"].shape[1],
        "hidden_dims": [len(weights[f"encoder.{2 * i}.weight"]) for i in range(layers - 1)],
        "latent_dim": weights["decoder.0.weight"].shape[1],
    }


@torch.no_grad()
def set_initial_bias(last: nn.Module, values: Sequence[float]) -> None:
    assert isinstance(last.bias, Tensor)
    for part, value in zip(last.bias.chunk(len(values)), values, strict=True):
        part.fill_(value)


def check_last(model: nn.Module, t: Tensor, name: str, size: int, hint: str = "") -> None:
    if not is_dense(t):
        check_dense(type(model).__name__, **{name: t})
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected (..., {size}){hint}")
