"""What went first, where a training step gave something that is not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import BaseVAE
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
    """The first weight that is not finite, in words."""
    for name, parameter in model.named_parameters():
        if place := _place(parameter):
            return _weight("", model, name, parameter, place)
    return None


def _weight(what: str, model: BaseVAE, name: str, value: Tensor, place: tuple[int, ...]) -> str:
    dimension = _latent_dimension(model, name, place)
    of = "" if dimension is None else f",{_of(dimension)},"
    return f"{what}{name}{list(place)}{of} is {_at(value, place)}"


@torch.no_grad()
def first_not_finite(step: AutogradStep, x: Tensor, index: Tensor, seeds: Tensor, part: str = "training") -> Finding:
    """Goes through a step on x, images `index` of a part of the data, again, one tensor after the other, as the
    parameters are now."""
    model = step.model
    if weight := broken_weight(model):
        return Finding(0, f"the weight {weight}")

    def image(place: tuple[int, ...]) -> str:
        return f"{part} image {int(index[place[0]])}"

    x_values = floating(x, step.x_scale, weight_of(model))
    if place := _place(x_values):
        return Finding(1, f"pixel {place[1]} of {image(place)} is {_at(x_values, place)}")
    with torch.enable_grad():
        mu, logvar = model.encode(x, step.x_scale)
    for name, value in (("mu", mu), ("logvar", logvar)):
        if place := _place(value):
            return Finding(2, f"{name}{_of(place[1])} is {_at(value, place)}, of {image(place)}")
    kls = gaussian_kl(mu, logvar, mu.shape[-1])
    if place := _place(kls):
        inputs = f"mu {_at(mu, place)}, logvar {_at(logvar, place)}"
        return Finding(3, f"the KL divergence{_of(place[1])} is {_at(kls, place)} ({inputs}), of {image(place)}")
    with torch.enable_grad():
        z = step.objective.sample(mu, logvar, seeds)
        loss = step.objective.terms_given(model, x, step.x_scale, mu, logvar, seeds).loss
    if place := _place(z):
        inputs = f"mu {_at(mu, place[-2:])}, logvar {_at(logvar, place[-2:])}"
        return Finding(4, f"z{_of(place[-1])} is {_at(z, place)} ({inputs}), of {image(place[-2:])}")
    output = model.decode(z)
    outputs = {"decoder's output": output} if isinstance(output, Tensor) else output._asdict()
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.dim() and (place := _place(value)):
            largest = _largest(z, place)
            return Finding(5, f"the {name} is {_at(value, place)} at pixel {place[-1]}{largest}")
    if not loss.isfinite():
        log_prob = model.log_prob(x_values, z)
        place = _place(log_prob) or ()
        of = f", of {image(place[-1:])}" if place else ""
        term = f"the log-likelihood is {_at(log_prob, place)}" if place else f"the loss is {float(loss)}"
        return Finding(6, f"{term}{_largest(z, place) if place else ''}{of}")
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, [mu, logvar, *parameters], allow_unused=True)
    for name, gradient in zip(("mu", "logvar"), gradients, strict=False):
        if gradient is not None and (place := _place(gradient)):
            return Finding(7, f"the gradient of {name}{_of(place[1])} is {_at(gradient, place)}, of {image(place)}")
    for name, gradient in zip(names, gradients[2:], strict=True):
        if gradient is not None and (place := _place(gradient)):
            return Finding(8, _weight("the gradient of ", model, name, gradient, place))
    return Finding(UPDATE, "after an update of finite gradients")


def _place(t: Tensor) -> tuple[int, ...] | None:
    """Where t is first not finite."""
    wrong = ~t.isfinite()
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None


def _at(t: Tensor, place: tuple[int, ...]) -> str:
    return f"{float(t[place].detach()):.6g}"


def _of(dimension: int | None) -> str:
    return "" if dimension is None else f" of latent dimension {dimension}"


def _largest(z: Tensor, place: tuple[int, ...]) -> str:
    """The latent dimension that is furthest out, where the tensor that went first has none."""
    row = z[place[: z.dim() - 1]]
    dimension = int(row.abs().argmax())
    return f" (the largest of z is {_at(row, (dimension,))}, of latent dimension {dimension})"


def _latent_dimension(model: BaseVAE, name: str, place: tuple[int, ...]) -> int | None:
    """The latent dimension that an element of a weight belongs to, if it is of a layer beside z."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    encoders = [n for n in linear if n.startswith("encoder")]
    decoders = [n for n in linear if n.startswith("decoder")]
    layer, _, kind = name.rpartition(".")
    if encoders and layer == encoders[-1]:
        return place[0] % model.latent_dim
    if decoders and layer == decoders[0] and kind == "weight":
        return place[1]
    return None
