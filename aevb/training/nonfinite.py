"""The first tensor of a training step that is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..inference.standardised import prior_of
from ..models import BaseVAE
from ..models.own import encode, log_prob_of
from ..ops import gaussian_kl
from ..ops.linear import floating
from ..ops.plain_modules import weight_of
from .step import AutogradStep


class Finding(NamedTuple):
    """The first tensor of a step that is not finite. `stage` is its place in the order of computation."""

    stage: int
    text: str


UPDATE = 9  # the stage at which only the optimizer is left


def broken_weight(model: BaseVAE) -> str | None:
    """Returns the first weight that is not finite, in words."""
    for name, parameter in model.named_parameters():
        if place := _place(parameter):
            return _weight("", model, name, parameter, place)
    return None


def _weight(what: str, model: BaseVAE, name: str, value: Tensor, place: tuple[int, ...]) -> str:
    dimension = _latent_dimension(model, name, place)
    of = "" if dimension is None else f",{_of(dimension)},"
    return f"{what}{name}{list(place)}{of} is {_at(value, place)}"


@torch.no_grad()
def first_not_finite(
    step: AutogradStep,
    x: Tensor,
    index: Tensor,
    seeds: Tensor,
    part: str = "training",
    observed: Tensor | None = None,
) -> Finding:
    """Returns the first tensor of a step that is not finite, as the parameters are now.

    Args:
        step: the step, to be gone through again.
        x: its batch, as the data hold it.
        index: the numbers of its images.
        seeds: those of its samples.
        part: the part of the data that the images are of.
        observed: their masks, where values are missing.
    """
    search = _Search(step, x, index, seeds, part, observed)
    stages = (search.weights, search.pixels, search.posterior, search.kl, search.samples, search.outputs, search.loss)
    found = (stage() for stage in (*stages, search.gradients))
    return next((f for f in found if f is not None), Finding(UPDATE, "after an update of finite gradients"))


class _Search:
    """The stages of a step, one tensor after the other, each of which may find something that is not finite."""

    def __init__(self, step: AutogradStep, x: Tensor, index: Tensor, seeds: Tensor, part: str, observed: Tensor | None):
        self.step, self.model, self.x, self.index, self.seeds, self.part = step, step.model, x, index, seeds, part
        self.observed = observed
        self.x_values = floating(x, step.x_scale, weight_of(step.model))

    def image(self, place: tuple[int, ...]) -> str:
        """Returns the name of an image, by its place in the batch."""
        return f"{self.part} image {int(self.index[place[0]])}"

    def weights(self) -> Finding | None:
        """Looks at the weights."""
        weight = broken_weight(self.model)
        return Finding(0, f"the weight {weight}") if weight else None

    def pixels(self) -> Finding | None:
        """Looks at the data."""
        if place := _place(self.x_values):
            return Finding(1, f"pixel {place[1]} of {self.image(place)} is {_at(self.x_values, place)}")
        return None

    def posterior(self) -> Finding | None:
        """Looks at mu and logvar."""
        with torch.enable_grad():
            self.mu, self.logvar = encode(self.model, self.x, self.step.x_scale, self.observed)
        for name, value in (("mu", self.mu), ("logvar", self.logvar)):
            if place := _place(value):
                return Finding(2, f"{name}{_of(place[1])} is {_at(value, place)}, of {self.image(place)}")
        return None

    def kl(self) -> Finding | None:
        """Looks at the KL of each latent dimension."""
        kls = gaussian_kl(self.mu, self.logvar, self.mu.shape[-1], prior=prior_of(self.model))
        if place := _place(kls):
            value = f"the KL divergence{_of(place[1])} is {_at(kls, place)}"
            names = ("prior_mu", "prior_logvar")
            of_prior = [f", {n} {_at(t, place[1:])}" for n, t in zip(names, prior_of(self.model) or (), strict=False)]
            return Finding(3, f"{value} ({self._inputs(place)}{''.join(of_prior)}), of {self.image(place)}")
        return None

    def samples(self) -> Finding | None:
        """Looks at z."""
        with torch.enable_grad():
            self.z = self.step.objective.sample(self.mu, self.logvar, self.seeds)
            given = (self.model, self.x, self.step.x_scale, self.mu, self.logvar, self.seeds)
            more: dict[str, Any] = {} if self.observed is None else {"observed": self.observed}
            self.value = self.step.objective.terms_given(*given, **more).loss
        if place := _place(self.z):
            inputs, of = self._inputs(place[-2:]), self.image(place[-2:])
            return Finding(4, f"z{_of(place[-1])} is {_at(self.z, place)} ({inputs}), of {of}")
        return None

    def outputs(self) -> Finding | None:
        """Looks at the decoder's output."""
        if not isinstance(self.model, BaseVAE):
            return None
        output = self.model.decode(self.z)
        outputs = {"decoder's output": output} if isinstance(output, Tensor) else output._asdict()
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.dim() and (place := _place(value)):
                largest = _largest(self.z, place)
                return Finding(5, f"the {name} is {_at(value, place)} at pixel {place[-1]}{largest}")
        return None

    def loss(self) -> Finding | None:
        """Looks at the loss, and which image makes it so."""
        if self.value.isfinite():
            return None
        log_prob = log_prob_of(self.model, self.x_values, None, self.z, self.observed)
        place = _place(log_prob) or ()
        of = f", of {self.image(place[-1:])}" if place else ""
        term = f"the log-likelihood is {_at(log_prob, place)}" if place else f"the loss is {float(self.value)}"
        return Finding(6, f"{term}{_largest(self.z, place) if place else ''}{of}")

    def gradients(self) -> Finding | None:
        """Looks at the gradients of mu, logvar and the weights."""
        learned = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        names, parameters = zip(*learned, strict=True)
        latents = [t for t in (self.mu, self.logvar) if t.requires_grad]  # none of a frozen encoder
        found = torch.autograd.grad(self.value, [*latents, *parameters], allow_unused=True)
        gradients = [*(found[: len(latents)] or (None, None)), *found[len(latents) :]]
        for name, gradient in zip(("mu", "logvar"), gradients, strict=False):
            if gradient is not None and (place := _place(gradient)):
                value = f"the gradient of {name}{_of(place[1])} is {_at(gradient, place)}"
                return Finding(7, f"{value}, of {self.image(place)}")
        for name, gradient in zip(names, gradients[2:], strict=True):
            if gradient is not None and (place := _place(gradient)):
                return Finding(8, _weight("the gradient of ", self.model, name, gradient, place))
        return None

    def _inputs(self, place: tuple[int, ...]) -> str:
        return f"mu {_at(self.mu, place)}, logvar {_at(self.logvar, place)}"


def _place(t: Tensor) -> tuple[int, ...] | None:
    """Returns the place of the first element that is not finite."""
    wrong = ~t.isfinite()
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None


def _at(t: Tensor, place: tuple[int, ...]) -> str:
    return f"{float(t[place].detach()):.6g}"


def _of(dimension: int | None) -> str:
    return "" if dimension is None else f" of latent dimension {dimension}"


def _largest(z: Tensor, place: tuple[int, ...]) -> str:
    """Returns the latent dimension of largest |z|, for a tensor that has no latent dimension itself."""
    row = z[place[: z.dim() - 1]]
    dimension = int(row.abs().argmax())
    return f" (the largest of z is {_at(row, (dimension,))}, of latent dimension {dimension})"


def _latent_dimension(model: BaseVAE, name: str, place: tuple[int, ...]) -> int | None:
    """Returns the latent dimension of a weight's element, if the layer is beside z."""
    if isinstance(model, BaseVAE) and name in ("prior_mu", "prior_logvar"):
        return place[0]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    encoders = [n for n in linear if n.startswith("encoder")]
    decoders = [n for n in linear if n.startswith("decoder")]
    layer, _, kind = name.rpartition(".")
    if encoders and layer == encoders[-1]:
        return place[0] % model.latent_dim if isinstance(model, BaseVAE) else None
    if decoders and layer == decoders[0] and kind == "weight":
        return place[1]
    return None
