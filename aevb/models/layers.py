"""Layers of the models, with their initial weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_FEATURES = 4096  # of a convolutional encoder, that its last layer reads as they are


def dense(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    # "meta": nn.Linear would draw weights of its own, from PyTorch's generator. skip_init would import sympy for
    # that, half a second.
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs), generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [dense(inputs, outputs, generator), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolution(kind: type[Any], inputs: int, outputs: int, generator: torch.Generator | None, **options: Any) -> Any:
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


def flatten(features: int) -> nn.Flatten:
    """What flattens so many features for a layer of which each output is a sum over all of them.

    A step of Adam moves every weight by the learning rate, whatever the gradient is, so that it moves logvar in
    proportion to the features: by 40 for images of 105x105, which makes a variance of exp(40). Smaller features and
    larger weights are the same function, and a step of it is then no larger than that of MOST_FEATURES.
    """
    return nn.Flatten() if features <= MOST_FEATURES else ScaledFlatten(MOST_FEATURES / features)


@torch.no_grad()
def scale_up(last: nn.Module, before: nn.Module) -> None:
    if isinstance(before, ScaledFlatten):
        assert isinstance(last.weight, nn.Parameter)
        last.weight.div_(before.scale)
