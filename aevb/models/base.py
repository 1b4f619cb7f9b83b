"""Base class of all models: encoding, decoding, log p(x|z), files and inference."""

from __future__ import annotations

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
from ..checks.choices import PRIORS, unknown
from ..checks.errors import check_dense, is_dense
from ..checks.priors import Prior
from ..files import MODEL
from ..inference.methods import InferenceMethods
from ..inference.protocols import encoded, observed_part
from ..inference.standardised import own_z, standardised
from ..likelihoods import GaussianOutput, LinearLogits, LinearOutput
from ..likelihoods.base import Parameter
from ..likelihoods.target import real, target_of
from ..likelihoods.values import check_pixels, is_wanted, look_once
from ..ops.fused_linear import rows_log_prob
from ..ops.gaussian import sample_gaussian
from ..ops.likelihood import likelihood_log_prob
from ..ops.linear import floating
from ..ops.plain_modules import weight_of

M = TypeVar("M", bound="BaseVAE")


MODELS: dict[str, type[BaseVAE]] = {}  # classes that a weight file can name


class BaseVAE(InferenceMethods, nn.Module):
    """Base class of the models: everything but the networks `encoder` and `decoder`.

    The decoder's output depends on the likelihood p(x|z):

    * Bernoulli: logits.
    * Gaussian: the mean before the sigmoid, and its logvar (Kingma & Welling 2013, appendix C, and section 5 for the
      sigmoid).
    * Another likelihood: its parameters.

    Args:
        data_dim: number of values of a datapoint.
        latent_dim: number of dimensions of z.
        likelihood: the name of one of `aevb.likelihoods`; the object is the attribute `family`.
        variance: of the Gaussian and the Laplace. "learned": the decoder gives a logvar, or log-scale, for each pixel
            (appendix C.2); "shared": one learned number; or a fixed number.
        min_variance: lower limit of a learned variance, approached and never reached. The default, 1 / (12 * 255^2), is
            the variance of rounding to 8 bits. Below it a density says more than the data do, and has no bound where a
            pixel is constant.
        mask_input: the encoder is given the mask of what is observed too, beside the values. Without it, an encoder
            cannot tell a missing value from 0.
        prior: p(z). "standard": N(0, I). "learned": N(prior_mu, exp(prior_logvar)), diagonal, with the parameters
            `prior_mu` and `prior_logvar` (latent_dim,), which are 0 at first.

    Raises:
        ValueError: a size below 1, an unknown likelihood or prior, or a variance or min_variance that is no positive
            number.
    """

    encoder: nn.Module
    decoder: nn.Module
    sigmoid_means = True  # of a Gaussian p(x|z), as in `FusedELBO`
    mask_input = False
    prior = "standard"

    @takes_plain_values
    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        likelihood: str = "bernoulli",
        variance: str | float = "learned",
        min_variance: float = 1 / (12 * 255**2),
        mask_input: bool = False,
        prior: str = "standard",
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
        if prior not in PRIORS:
            raise unknown("prior", prior, PRIORS)
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.variance, self.min_variance, self.mask_input = variance, min_variance, mask_input
        if self.family.has_spread and variance == "shared":
            self.logvar = nn.Parameter(torch.tensor(self.family.initial[1]))
        self.prior = prior
        if prior == "learned":
            self.prior_mu = nn.Parameter(torch.zeros(latent_dim))
            self.prior_logvar = nn.Parameter(torch.zeros(latent_dim))

    @property
    def prior_parameters(self) -> Prior | None:
        """The prior as the ops take it: None, or (prior_mu, prior_logvar).

        None stands for N(0, I). It is the argument `prior` of `aevb.gaussian_kl`, `FusedELBO.sample` and the like.
        """
        return None if self.prior == "standard" else (self.prior_mu, self.prior_logvar)

    @property
    def likelihood(self) -> str:
        """The likelihood's name."""
        return self.family.name

    @likelihood.setter
    def likelihood(self, value: str) -> None:
        self.family = likelihoods.for_model(value, self.sigmoid_means)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "family" not in state:  # a state pickled before `family` existed
            state = dict(state)
            state["family"] = likelihoods.for_model(state.pop("likelihood"), self.sigmoid_means)
        super().__setstate__(state)

    @property
    def _outputs(self) -> int:
        """Number of decoder outputs for each pixel."""
        return len(self.family.params) - (self.family.has_spread and self.variance != "learned")

    @property
    def _inputs(self) -> int:
        """Number of encoder inputs for each pixel."""
        return 1 + self.mask_input

    def options(self) -> dict[str, Any]:
        """Returns the constructor's arguments for an equal model, as JSON values."""
        return {
            "latent_dim": self.latent_dim,
            "likelihood": self.likelihood,
            "variance": self.variance,
            "min_variance": self.min_variance,
            **({"mask_input": True} if self.mask_input else {}),
            **({"prior": self.prior} if self.prior != "standard" else {}),
        }

    def forward(
        self,
        x: Tensor,
        num_samples: int | None = None,
        *,
        seed: Tensor | int | None = None,
        observed: Tensor | None = None,
    ) -> tuple[Tensor | GaussianOutput, Tensor]:
        """Encode x, sample z and decode it.

        Args:
            x: (..., data_dim), as for `encode`.
            num_samples: number of samples of z for each datapoint, or None for one without a sample dimension.
            seed: as for `aevb.sample_gaussian`.
            observed: as for `encode`.

        Returns:
            The result of `decode`, (..., data_dim) or (num_samples, ..., data_dim); and the KL of the posterior from
            the prior, (...,), in nats.
        """
        mu, logvar = self.encode(x) if observed is None else self.encode(x, observed=observed)
        prior = self.prior_parameters
        z, kl = sample_gaussian(mu, logvar, num_samples, prior=prior, batch_dims=mu.dim() - 1, seed=seed)
        return self.decode(z), kl

    def encode(
        self, x: Tensor, x_scale: float | None = None, *, observed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (mu, logvar) of the posterior q(z|x), each (..., latent_dim).

        Bits and pixels of which most are 0 are not converted first.

        Args:
            x: (..., data_dim), values in [0, 1]: floating, bool, or uint8 with x_scale.
            x_scale: multiplies x: 1/255 for pixels in 0..255.
            observed: bool, (..., data_dim) or (data_dim,): False where a value is missing, for which the encoder is
                given 0, whatever x holds. With `mask_input` it is given the mask too, of None ones.

        Raises:
            ValueError: another shape, integers without x_scale, or a mask of another shape or dtype.
        """
        check_last(self, x, "x", self.data_dim, ": flatten each datapoint, x.flatten(1)")
        if not (x.is_floating_point() or x.dtype == torch.bool or (x.dtype == torch.uint8 and x_scale is not None)):
            raise ValueError(
                f"x is {x.dtype}; expected values in [0, 1], floating or bool: for pixels, x_scale=1/255, or x / 255"
            )
        if x.is_floating_point():
            x = x.to(weight_of(self).dtype)
        mu, logvar = self._encoded(*self.encoder_input(x, x_scale, observed)).chunk(2, dim=-1)
        return mu, logvar

    def encoder_input(self, x: Tensor, x_scale: float | None, observed: Tensor | None) -> tuple[Tensor, float | None]:
        """Returns what the encoder is given, and what multiplies it.

        It is x with 0 where a value is missing, and with `mask_input` the mask beside it, (..., 2 data_dim). Bits stay
        bits.
        """
        if observed is not None:
            x, observed = observed_part(x, observed)
        if not self.mask_input:
            return x, x_scale
        if x.dtype != torch.bool:
            x = floating(x, x_scale, weight_of(self))
        mask = torch.ones_like(x) if observed is None else observed.to(x.dtype)
        return torch.cat([x, mask], -1), None

    def decode(self, z: Tensor) -> Tensor | GaussianOutput:
        """Returns the parameters of p(x|z): logits, a (mean, logvar), or others.

        Args:
            z: (..., latent_dim).

        Returns:
            The logits of a Bernoulli, (..., data_dim). Of a Gaussian (mean, logvar): the mean before the sigmoid, and
            logvar, (..., data_dim), 0-d or a number.

        Raises:
            ValueError: z of another last dimension.
        """
        check_last(self, z, "z", self.latent_dim)
        return self._output(self._decoded(z))

    def recon(self, z: Tensor) -> Tensor | LinearLogits | LinearOutput | GaussianOutput:
        """Returns the `recon` argument of `FusedELBO`.

        It is `decode(z)`, or an unevaluated last layer that saves the output's memory, as in `VAE`.
        """
        return self.decode(z)

    def log_prob(self, x: Tensor, z: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Returns log p(x|z), in nats, of z's leading dimensions.

        Args:
            x: (..., data_dim).
            z: (..., latent_dim), or (L, ..., latent_dim) for L samples.
            weight: of x's shape or broadcast to it, as for `aevb.log_prob`: a mask of the observed elements, say.
        """
        name = type(self).__name__
        check_dense(name, x=x)
        target = target_of(name, real(x, z), None, weight, None, x.shape[:-1])
        recon, family = self.recon(z), self.family.density
        is_linear = isinstance(recon, LinearLogits | LinearOutput)
        params = () if is_linear else family.parameters(recon)
        if is_wanted(key := f"log_prob, {family.name}", None, x):
            first: Any = None if is_linear else params[0]
            look_once(key, None, family, first, target)
        if isinstance(recon, LinearLogits | LinearOutput):
            return rows_log_prob(family, recon, target)
        return likelihood_log_prob(family, params, target)

    def mean(self, z: Tensor) -> Tensor:
        """Returns E[x|z], (..., data_dim): for bits the probability of each."""
        return self.family.mean(self.parameters_of(z))

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of p(x_i|z), both (..., data_dim)."""
        params = self.parameters_of(z)
        return self.family.mean(params), self.family.variance_of(params)

    def parameters_of(self, z: Tensor) -> tuple[Parameter, ...]:
        """Returns the parameters of p(x|z), in the order of `family.params`.

        They are the result of `decode`, as a tuple.
        """
        return self.family.parameters(self.decode(z))

    def pixel_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each pixel, (..., data_dim), in nats.

        It is meant for sums over some of the pixels. The sum over all is `log_prob`, which is faster.

        Args:
            x: (..., data_dim).
            z: (..., latent_dim), or (L, ..., latent_dim) for L samples.
        """
        family = self.family.density
        return family.element_log_prob(family.parameters(self.decode(z)), x)

    @takes_plain_values
    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the pixel means at z drawn from the prior; no gradient.

        Args:
            n: number of draws.
            generator: source of the standard normals, on the model's device; by default PyTorch's own.

        Returns:
            (n, data_dim).

        Raises:
            ValueError: a negative n.
        """
        if n < 0:
            raise ValueError(f"n is {n}; expected the number of samples")
        weight = weight_of(self)
        u = torch.randn(n, self.latent_dim, generator=generator, dtype=weight.dtype, device=weight.device)
        return self.mean(own_z(standardised(self), u))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Returns the pixel means at the posterior mean of x; no gradient.

        Args:
            x: (..., data_dim).
            observed: as for `encode`. What is missing is filled with its mean at the posterior mean: see `impute`.

        Returns:
            (..., data_dim).

        Raises:
            ValueError: x of a Bernoulli model outside [0, 1] where it is observed.
        """
        x, observed = observed_part(x, observed)
        check_pixels(self, {"x": x})
        return self.mean(encoded(self, x, observed)[0])

    def metadata(self) -> dict[str, str]:
        """Returns a weight file's metadata: the model's class and options."""
        return {"model": json.dumps({"class": type(self).__name__, **self.options()})}

    @classmethod
    def load(cls: type[M], path: str | PathLike[str]) -> M:
        """Returns the model in a run's `model.safetensors`.

        The file's metadata gives the class and sizes.

        Args:
            path: the file, or its folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds another model.
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
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  file is no dict
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from error
        if (own := _own_class(metadata)) is not None:
            raise ValueError(
                f"{path} holds a model of your own, {own}; expected aevb.Trainer.load(run, model=...), which puts the "
                "weights into one"
            )
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

    # ---- the networks, defined by each model ----

    def _encoded(self, x: Tensor, x_scale: float | None) -> Tensor:
        """Returns mu and logvar side by side, (..., 2 latent_dim)."""
        raise NotImplementedError

    def _decoded(self, z: Tensor) -> Tensor:
        """Returns the decoder's output, (..., _outputs * data_dim)."""
        raise NotImplementedError

    # ---- the likelihood ----

    def beside_the_layer(self) -> tuple[Tensor | float | None, float | None]:
        """Returns (shared, floor) of the second parameter, as `LinearOutput` takes them.

        `shared` is the parameter if it does not come from the decoder. `floor` is the lower limit of a parameter that
        does. Both are None for a likelihood without a parameter of scale.
        """
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


def _own_class(metadata: Mapping[str, str]) -> str | None:
    """Returns the name of a user's own class, of whose weights a file is."""
    try:
        name = json.loads(metadata["model"])["class"]
    except (ValueError, KeyError, TypeError):
        return None
    return None if name in MODELS else name


def _options_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the options of a Bernoulli VAE, from its weights' shapes.

    Files without metadata hold such a model.
    """
    layers = sum(name.startswith("encoder.") and name.endswith(".weight") for name in weights)
    return {
        "class": "VAE",
        "data_dim": weights["encoder.0.weight"].shape[1],
        "hidden_dims": [len(weights[f"encoder.{2 * i}.weight"]) for i in range(layers - 1)],
        "latent_dim": weights["decoder.0.weight"].shape[1],
    }


@torch.no_grad()
def set_initial_bias(last: nn.Module, values: Sequence[float]) -> None:
    """Set the last layer's bias, one value for each likelihood parameter."""
    assert isinstance(last.bias, Tensor)
    for part, value in zip(last.bias.chunk(len(values)), values, strict=True):
        part.fill_(value)


def check_last(model: nn.Module, t: Tensor, name: str, size: int, hint: str = "") -> None:
    """Check that t is dense, with a last dimension of `size`.

    Args:
        model: the model, for the message.
        t: the tensor.
        name: the tensor's name in the message.
        size: the expected last dimension.
        hint: end of the message.

    Raises:
        ValueError: another last dimension.
    """
    if not is_dense(t):
        check_dense(type(model).__name__, **{name: t})
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected (..., {size}){hint}")
