"""Layers of the models, with their initial weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_FEATURES = 4096  # features of a convolutional encoder that its last layer reads unscaled


def dense(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Returns a linear layer with Xavier-uniform weights and a zero bias."""
    # On "meta", nn.Linear draws no weights from PyTorch's generator. skip_init does the same, but imports sympy, which
    # takes half a second.
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs), generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def mlp(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Returns a multilayer perceptron with tanh between its linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [dense(inputs, outputs, generator), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolution(kind: type[Any], inputs: int, outputs: int, generator: torch.Generator | None, **options: Any) -> Any:
    """Returns a 4x4 convolution with stride 2, Kaiming-uniform, zero bias.

    Args:
        kind: `nn.Conv2d` or `nn.ConvTranspose2d`.
        inputs: channels of the input.
        outputs: channels of the result.
        generator: source of the weights.
        **options: further arguments of `kind`.
    """
    layer = kind(inputs, outputs, 4, stride=2, padding=1, device="meta", **options)
    weight = torch.empty(layer.weight.shape)
    # A pixel of a transposed convolution with stride 2 gets 4 of the 16 weights of each input.
    fan_in = inputs * (16 if kind is nn.Conv2d else 4)
    bound = math.sqrt(6 / fan_in)
    layer.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


class ScaledFlatten(nn.Flatten):
    """Flatten, then multiply by a scale that belongs to the next weights.

    Args:
        scale: the factor.
    """

    scale: Tensor

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Returns x flattened, times the scale."""
        return super().forward(x) * self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Weights saved before `scale` existed have a scale of 1.
        state_dict.setdefault(f"{prefix}scale", torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def flatten(features: int) -> nn.Flatten:
    """Returns a flattening layer before a linear layer over so many features.

    A step of Adam moves every weight by the learning rate, whatever the gradient is. An output that sums over all
    features, such as logvar, then moves in proportion to their number. For images of 105x105 it moves by 40, which
    makes a variance of exp(40). Smaller features and larger weights are the same function. A step of Adam is then no
    larger than with MOST_FEATURES features.
    """
    return nn.Flatten() if features <= MOST_FEATURES else ScaledFlatten(MOST_FEATURES / features)


@torch.no_grad()
def scale_up(last: nn.Module, before: nn.Module) -> None:
    """Divide the last layer's weights by the scale of a preceding `ScaledFlatten`.

    After another layer the weights are unchanged.
    """
    if isinstance(before, ScaledFlatten):
        assert isinstance(last.weight, nn.Parameter)
        last.weight.div_(before.scale)
