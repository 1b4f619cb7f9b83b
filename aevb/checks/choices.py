"""What an option may be, and the sentence about one that is none of it."""

from __future__ import annotations

from collections.abc import Iterable

# By the kernels' codes.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
GRADIENTS = ("total", "path", "doubly_reparameterized")
ACTIVATIONS = ("none", "tanh", "relu")


def unknown(name: str, value: object, choices: Iterable[object]) -> ValueError:
    """What to raise where `value` is not among the choices: no dispatch takes the unknown for one of them."""
    return ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
