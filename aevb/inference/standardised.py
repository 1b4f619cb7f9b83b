"""Models with another prior than N(0, I), made into ones with it.

With ``u = (z - prior_mu) / exp(prior_logvar / 2)``, a model of the prior N(prior_mu, exp(prior_logvar)) is one of the
prior N(0, I), whose posterior is ``N((mu - prior_mu) exp(-prior_logvar / 2), exp(logvar - prior_logvar))``. log p(x),
importance weights, KL divergences, mutual information and quantiles of the prior are the same in either coordinates. So
`aevb.inference` asks the standardised model, and only what is a z itself is put back into the model's own coordinates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks.priors import Prior

if TYPE_CHECKING:
    from .noise_models import Observation


def prior_of(model: Any) -> Prior | None:
    """Returns a model's `prior_parameters`: None, or (prior_mu, prior_logvar).

    None stands for N(0, I), and so does a model without the attribute.

    Raises:
        ValueError: something else than None or two floating tensors (latent_dim,).
    """
    # Not with a default where it is a property, whose own AttributeError would pass for N(0, I).
    is_of_class = hasattr(type(model), "prior_parameters")
    prior = model.prior_parameters if is_of_class else getattr(model, "prior_parameters", None)
    if prior is None:
        return None
    if (
        isinstance(prior, tuple | list)
        and len(prior) == 2
        and all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 1 for t in prior)
        and prior[0].shape == prior[1].shape
    ):
        return prior[0], prior[1]
    given = ", ".join(_what(t) for t in prior) if isinstance(prior, tuple | list) else _what(prior)
    raise ValueError(
        f"{type(model).__name__}.prior_parameters is {given}; expected None for N(0, I), or (prior_mu, prior_logvar), "
        "floating tensors (latent_dim,)"
    )


def _what(given: object) -> str:
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


class Standardised:
    """A model in the coordinates in which its prior is N(0, I).

    It is made for questions without a gradient by the prior. All but `encode` and `log_prob` is the model's own.

    Args:
        model: the model.
        prior: its (prior_mu, prior_logvar).
    """

    prior_parameters = None

    def __init__(self, model: Any, prior: Prior):
        self.model = model
        self.prior_mu, self.prior_logvar = (t.detach() for t in prior)
        self.scale = (0.5 * self.prior_logvar).exp()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Returns (mu, logvar) of u, in the dtype of the model's."""
        mu, logvar = self.model.encode(x, **options)
        if mu.shape[-1:] != self.scale.shape:
            raise ValueError(
                f"{type(self.model).__name__}.prior_parameters have shape {tuple(self.scale.shape)}, and encode gives "
                f"mu {tuple(mu.shape)}; expected (latent_dim,), mu's last dimension"
            )
        return ((mu - self.prior_mu) / self.scale).to(mu.dtype), (logvar - self.prior_logvar).to(logvar.dtype)

    def log_prob(self, x: Tensor, u: Tensor, **options: Any) -> Tensor:
        """Returns log p(x|z(u))."""
        return self.model.log_prob(x, self.own_z(u), **options)

    def own_z(self, u: Tensor) -> Tensor:
        """Returns z(u), in u's dtype."""
        return (self.prior_mu + self.scale * u).to(u.dtype)


class _StandardisedObservation:
    """An observation of a standardised model's data."""

    def __init__(self, observation: Observation, model: Standardised):
        self.observation, self.model = observation, model
        self.start, self.observed = observation.start, observation.observed

    def log_prob(self, u: Tensor) -> Tensor:
        return self.observation.log_prob(self.model.own_z(u))

    def clean(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.observation.clean(self.model.own_z(u))

    def draw(self, u: Tensor, noise: Tensor) -> Tensor:
        return self.observation.draw(self.model.own_z(u), noise)

    def clean_log_prob(self, x: Tensor, u: Tensor) -> Tensor:
        return self.observation.clean_log_prob(x, self.model.own_z(u))


def standardised(model: Any) -> Any:
    """Returns the model if its prior is N(0, I), else its `Standardised`."""
    prior = prior_of(model)
    return model if prior is None else Standardised(model, prior)


def standardised_observation(model: Any, observation: Observation) -> Observation:
    """Returns an observation whose z is in the coordinates of a `standardised` model."""
    return _StandardisedObservation(observation, model) if isinstance(model, Standardised) else observation


def own_z(model: Any, u: Tensor) -> Tensor:
    """Returns z in the own coordinates of a `standardised` model."""
    return model.own_z(u) if isinstance(model, Standardised) else u


def own_posterior(model: Any, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (mu, logvar) in the own coordinates of a `standardised` model."""
    if not isinstance(model, Standardised):
        return mu, logvar
    return model.own_z(mu), (logvar + model.prior_logvar).to(logvar.dtype)
