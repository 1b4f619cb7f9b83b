"""Inference methods that every trained model has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .. import likelihoods
from ..checks.arguments import takes_plain_values
from ..checks.choices import unknown
from ..checks.errors import check_dense
from ..inference.imputation import Method, Restoration, restore
from ..inference.noise_models import GaussianNoise, MaskedObservation, NoisyBits, Observation
from ..likelihoods.values import check_pixels
from ..ops import mix_seed, sample_gaussian
from ..ops.plain_modules import weight_of
from .latent_space import kl_per_dimension
from .protocols import encoded, observed_part
from .standardised import own_z, standardised

if TYPE_CHECKING:
    from .protocols import GenerativeModel as _Model
else:
    _Model = object  # the inheriting module has the protocol's methods

BATCH = 1000  # datapoints encoded at a time


@dataclass(frozen=True, eq=False)
class Embedding:
    """Posterior q(z|x) = N(mu, exp(logvar)) of each datapoint."""

    mu: Tensor
    """(N, latent_dim): posterior mean."""
    logvar: Tensor
    """(N, latent_dim): logarithm of the posterior variance."""
    z: Tensor | None
    """(num_samples, N, latent_dim): draws of the posterior, if requested."""


class InferenceMethods(_Model):
    """Recognition, generation, restoration and visualization (Kingma & Welling 2013, section 1).

    A mixin for a module with `data_dim`, `latent_dim`, `likelihood` (a name), `encode`, `decode`, `mean`, `moments`,
    `pixel_log_prob` and `log_prob`: see `aevb.VAE`. The prior is N(0, I), or that of its `prior_parameters`. Results
    that are z's are in the model's own coordinates.

    No method leaves a gradient. x is (N, data_dim), on the model's device; every sample is a function of a seed. A
    model with dropout belongs in `eval()`.
    """

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Returns a sample x of p(x|z), (..., data_dim).

        `noise` is standard normals of x's shape.

        Raises:
            ValueError: the model's likelihood is unknown.
        """
        family = likelihoods.of(self)
        if family is None:
            raise unknown("likelihood", self.likelihood, likelihoods.REGISTRY)
        return family.sample(family.parameters(self.decode(z)), noise)

    @takes_plain_values
    @torch.no_grad()
    def embed(
        self, x: Tensor, num_samples: int | None = None, *, seed: int = 0, observed: Tensor | None = None
    ) -> Embedding:
        """Posterior of each datapoint: mu, logvar, and draws of z if requested.

        Args:
            x: (N, data_dim).
            num_samples: draws of each posterior; None for no draws.
            seed: the draws of datapoint n are `aevb.sample_gaussian`'s for the seed ``aevb.mix_seed(seed, n)``, mixed
                with the draw's number.
            observed: bool, (N, data_dim) or (data_dim,): False where a value is missing, for which the encoder is given
                0, and with `mask_input` the mask too.

        Raises:
            ValueError: a num_samples below 1, or x or a mask of another shape.
        """
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected at least 1")
        _check(self, x=x)
        x, observed = observed_part(x, observed)
        check_pixels(self, {"x": x})
        masks = [None] * len(x) if observed is None else observed.split(BATCH)
        found = [encoded(self, part, mask) for part, mask in zip(x.split(BATCH), masks, strict=False)]
        mu, logvar = (torch.cat(t) for t in zip(*found, strict=True))
        if num_samples is None:
            return Embedding(mu, logvar, None)
        return Embedding(mu, logvar, posterior_draws(mu, logvar, num_samples, seed))

    @takes_plain_values
    def impute(
        self,
        x: Tensor,
        observed: Tensor,
        *,
        method: Method = "gradient",
        steps: int = 50,
        num_samples: int = 500,
        seed: int = 0,
        fill: Tensor | float = 0.5,
        clean: Tensor | None = None,
    ) -> Restoration:
        """Posterior of missing pixels, ``E[x_missing | x_observed]``.

        Its likelihood is of the observed pixels alone: ``p(z|y)`` is in proportion to
        ``p(z) prod_{i observed} p(x_i|z)``. See `aevb.inference.imputation`.

        Sources: Mattei & Frellsen 2019 ("MIWAE"), eq. 13, and 2018 ("Leveraging the exact likelihood of deep latent
        variable models"), algorithm 2; Rezende et al. 2014, appendix F.

        Args:
            x: (B, data_dim). Missing pixels are not used and may be NaN.
            observed: bool, (data_dim,) or (B, data_dim): True where a pixel is known.
            method: "gradient" or "gibbs".
            steps: of Adam on each datapoint's (mu, logvar).
            num_samples: importance samples; with "gibbs" the draws that its chains keep.
            seed: all noise follows from it and a datapoint's number.
            fill: a number or (data_dim,): the encoder's first input where pixels are missing; 0 where training data had
                missing values themselves. With `mask_input` it is 0.
            clean: (B, data_dim): the true image where it is known, for `Restoration.log_prob`.

        Returns:
            The posterior's moments. Observed pixels are unchanged in its `mean`.

        Raises:
            ValueError: shapes that do not fit, pixels that are observed but NaN, or numbers that are too small.
        """
        observed = _observed(self, x, observed)
        check_pixels(self, {"x": torch.where(observed, x, 0.5), "clean": clean})

        def observe(rows: slice) -> Observation:
            return MaskedObservation(self, x[rows].float(), observed[rows], fill)

        index = torch.arange(len(x), device=x.device)
        found = restore(
            self, observe, index, method=method, steps=steps, num_samples=num_samples, seed=seed, clean=clean
        )
        return replace(  # observed pixels are exact, without the rounding of weights
            found,
            mean=torch.where(observed, x.to(found.mean.dtype), found.mean),
            variance=found.variance.where(~observed, 0.0),
            log_prob=None if found.log_prob is None else found.log_prob.where(~observed, 0.0),
        )

    @takes_plain_values
    def denoise(
        self,
        x: Tensor,
        *,
        flip: float | None = None,
        sigma: float | None = None,
        observed: Tensor | None = None,
        method: Method = "gradient",
        steps: int = 50,
        num_samples: int = 500,
        seed: int = 0,
        fill: Tensor | float = 0.5,
        clean: Tensor | None = None,
    ) -> Restoration:
        """Posterior of the clean image, ``E[clean | x]``, under known noise.

        The noise is one of two:

        * `flip`: each bit was flipped with that probability (a Bernoulli model).
        * `sigma`: N(0, sigma^2) was added to each pixel. Under a Bernoulli model the clean pixels are then bits.

        The likelihood of z is taken of the noisy pixels,
        ``p(x|z) = prod_i sum or integral of p(x_i|clean_i) p(clean_i|z)``. The clean pixel follows by Bayes' rule.
        `NoisyBits` and `GaussianNoise` in `aevb.inference.noise_models` have the formulas.

        Args:
            x: (B, data_dim), the noisy images.
            flip: between 0 and 1.
            sigma: above 0, where pixels are in [0, 1].
            observed: as in `impute`, where pixels are missing as well.
            method: as in `impute`.
            steps: as in `impute`.
            num_samples: as in `impute`.
            seed: as in `impute`.
            fill: as in `impute`.
            clean: as in `impute`.

        Raises:
            ValueError: as `impute`; both kinds of noise, or none; flips of pixels that are not bits; for a Bernoulli
                model, a `clean` that is not bits.
        """
        family = _check_noise(self, flip, sigma)
        _check(self, x=x)
        observed = _observed(self, x, torch.ones_like(x, dtype=torch.bool) if observed is None else observed)
        check_pixels(self, {"x": torch.where(observed, x, 0.5)}, sigma or 0.0)
        check_pixels(self, {"clean": clean})
        if flip is not None and not ((x == 0) | (x == 1) | ~observed).all():
            raise ValueError("x holds values other than 0 and 1; expected bits, since bits are what flip changes")

        if family.of_bits and clean is not None and not ((clean == 0) | (clean == 1)).all():
            raise ValueError(
                "clean holds values other than 0 and 1, and the model's pixels are bernoulli; expected bits, or a "
                "model with a gaussian likelihood"
            )

        def observe(rows: slice) -> Observation:
            y = x[rows].float()
            if flip is not None:
                return NoisyBits.flipped(self, y, observed[rows], fill, flip)
            assert sigma is not None
            noisy = NoisyBits.with_gaussian if family.of_bits else GaussianNoise
            return noisy(self, y, observed[rows], fill, sigma)

        index = torch.arange(len(x), device=x.device)
        return restore(
            self, observe, index, method=method, steps=steps, num_samples=num_samples, seed=seed, clean=clean
        )

    @takes_plain_values
    @torch.no_grad()
    def manifold(self, n: int = 20) -> Tensor:
        """Returns E[x|z], (n, n, data_dim), on a grid over a latent plane.

        Each coordinate goes through the quantiles (i + 1/2) / n of its prior. So the prior has the same mass
        around every point (Kingma & Welling 2013, figure 4). z_1 grows along a row, z_2 from the last row to the first,
        as axes are drawn.

        Args:
            n: points along each axis.

        Raises:
            ValueError: a latent_dim other than 2 (see `traverse`), or n below 1.
        """
        if self.latent_dim != 2:
            raise ValueError(
                f"the model's latent_dim is {self.latent_dim}; the manifold is a picture of 2 dimensions: traverse "
                "shows more, dimension by dimension"
            )
        quantiles = self._quantiles("n", n)
        z1, z2 = quantiles.expand(n, n), quantiles.flip(0).unsqueeze(-1).expand(n, n)
        return self.mean(own_z(standardised(self), torch.stack([z1, z2], -1)))

    @takes_plain_values
    @torch.no_grad()
    def traverse(
        self, x: Tensor, dims: Sequence[int] | None = None, steps: int = 10, *, observed: Tensor | None = None
    ) -> Tensor:
        """Returns E[x|z], (N, len(dims), steps, data_dim), varying one z_j at a time.

        z_j goes through the quantiles (i + 1/2) / steps of its prior. The others stay at the posterior mean of x.

        Args:
            x: (N, data_dim).
            dims: which dimensions; by default all, in the order of their mean KL over x, the most informative first.
            steps: values of z_j.
            observed: as in `embed`.

        Raises:
            ValueError: a dimension that the model has not, or steps below 1.
        """
        _check(self, x=x)
        x, observed = observed_part(x, observed)
        check_pixels(self, {"x": x})
        if dims is None:
            dims = kl_per_dimension(self, x, observed=observed).argsort(descending=True, stable=True).tolist()
        if wrong := [j for j in dims if not 0 <= j < self.latent_dim]:
            raise ValueError(f"dims has {wrong[0]}; expected dimensions from 0 to {self.latent_dim - 1}")
        quantiles = self._quantiles("steps", steps)
        model = standardised(self)
        mu, _ = encoded(model, x, observed)
        z = mu[:, None, None].repeat(1, len(dims), steps, 1)
        for row, j in enumerate(dims):
            z[:, row, :, j] = quantiles
        return self.mean(own_z(model, z))

    @takes_plain_values
    @torch.no_grad()
    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        steps: int = 10,
        *,
        spherical: bool = False,
        observed: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns E[x|z], (N, steps, data_dim), between two posterior means.

        z goes from the posterior mean of a to the posterior mean of b.

        Linear by default: ``z_t = (1 - t) z_a + t z_b``, t from 0 to 1. Since log p(z) is concave, the prior is nowhere
        on that line less dense than at the less dense of its ends.

        Spherical: ``z_t = (sin((1 - t) w) z_a + sin(t w) z_b) / sin w``, w the angle between them. It keeps to the
        lengths of the ends, both as they are where the prior is N(0, I). In many dimensions the middle of a line falls
        short of them (White 2016).

        Args:
            a: (N, data_dim), the first images.
            b: (N, data_dim), the last images.
            steps: number of points, with both ends.
            spherical: whether to interpolate along an arc.
            observed: the masks of a and of b, each as in `embed`.

        Raises:
            ValueError: shapes that differ, or steps below 2.
        """
        _check(self, a=a, b=b)
        (a, a_mask), (b, b_mask) = (
            observed_part(x, mask) for x, mask in zip((a, b), observed or (None, None), strict=True)
        )
        check_pixels(self, {"a": a, "b": b})
        if a.shape != b.shape:
            raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected one shape: pairs")
        if steps < 2:
            raise ValueError(f"steps is {steps}; expected at least 2, the ends")
        model = standardised(self)
        start, end = (encoded(model, x, mask)[0].unsqueeze(1) for x, mask in ((a, a_mask), (b, b_mask)))
        t = torch.linspace(0, 1, steps, device=start.device).unsqueeze(-1)
        first, second = _spherical(start, end, t) if spherical else (1 - t, t)
        return self.mean(own_z(model, first * start + second * end))

    def _quantiles(self, name: str, n: int) -> Tensor:
        if n < 1:
            raise ValueError(f"{name} is {n}; expected at least 1")
        p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return torch.special.ndtri(p).to(weight_of(cast(nn.Module, self)))


def posterior_draws(mu: Tensor, logvar: Tensor, num_samples: int, seed: int) -> Tensor:
    """Returns posterior draws (num_samples, N, latent_dim), by the seeds of `embed`.

    The datapoints are 0 to N - 1.
    """
    seeds = mix_seed(seed, torch.arange(len(mu), device=mu.device))
    draws = torch.arange(num_samples, device=mu.device).unsqueeze(-1)
    return sample_gaussian(mu, logvar, num_samples, seed=mix_seed(seeds, draws))[0]


def _spherical(a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the spherical weights of a and b at t.

    For vectors of (nearly) one direction or opposite ones, or of length 0, they are the linear weights.
    """
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    small = sine < 1e-3
    sine = sine.where(~small, 1.0)
    return (
        torch.where(small, 1 - t, ((1 - t) * angle).sin() / sine),
        torch.where(small, t, (t * angle).sin() / sine),
    )


def _check_noise(model: InferenceMethods, flip: float | None, sigma: float | None) -> likelihoods.Likelihood:
    """Returns the model's likelihood, after a check of `denoise`'s noise.

    Raises:
        ValueError: both kinds of noise, or none; a number out of range; or noise without a formula for the likelihood.
    """
    if (flip is None) == (sigma is None):
        raise ValueError(f"flip is {flip} and sigma {sigma}; expected one of them: the noise must be known")
    if flip is not None and not 0 < flip < 1:
        raise ValueError(f"flip is {flip}; expected a probability between 0 and 1")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; expected a positive number")
    family = likelihoods.of(model)
    if family is None:
        raise unknown("likelihood", model.likelihood, likelihoods.REGISTRY)
    if flip is not None and "flip" not in family.noise:
        raise ValueError(f"flip is {flip}, but the model's pixels are {model.likelihood}, no bits; expected sigma")
    if sigma is not None and "sigma" not in family.noise:
        raise ValueError(
            f"sigma is {sigma}, but with likelihood={model.likelihood!r} p(x|y) of Gaussian noise has no closed "
            "form; expected a bernoulli or gaussian model"
        )
    return family


def _check(model: InferenceMethods, **images: Tensor) -> None:
    check_dense(type(model).__name__, **images)
    for name, x in images.items():
        if x.dim() != 2 or x.shape[1] != model.data_dim or len(x) == 0:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected (N, {model.data_dim}), at least one datapoint"
            )


def _observed(model: InferenceMethods, x: Tensor, observed: Tensor) -> Tensor:
    """Returns the mask, of x's shape."""
    _check(model, x=x)
    if observed.dtype != torch.bool or tuple(observed.shape) not in ((model.data_dim,), tuple(x.shape)):
        raise ValueError(
            f"observed is {observed.dtype} {tuple(observed.shape)}; expected torch.bool ({model.data_dim},) or "
            f"{tuple(x.shape)}, True where a pixel is known"
        )
    observed = observed.expand_as(x)
    if x.is_floating_point() and not (x.isfinite() | ~observed).all():
        raise ValueError("x holds NaN or infinities where it is observed; expected numbers, or observed=False there")
    return observed
