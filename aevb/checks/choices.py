"""Choices of the text options, and the error for an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

# Values are the kernels' codes.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
GRADIENTS = ("total", "path", "doubly_reparameterized")
ACTIVATIONS = ("none", "tanh", "relu")

PriorName = Literal["standard", "learned"]
PRIORS: tuple[str, ...] = get_args(PriorName)


class Estimator(NamedTuple):
    """How a bound and its gradient are estimated from samples."""

    gradient: str | None  # of `sample_gaussian_log_ratio`; None: the KL is computed in closed form instead
    importance_weighted: bool


ESTIMATORS = {
    "sgvb-b": Estimator(None, False),
    "sgvb-a": Estimator("total", False),
    "stl": Estimator("path", False),
    "iwae": Estimator("total", True),
    "dreg": Estimator("doubly_reparameterized", True),
}


def unknown(name: str, value: object, choices: Iterable[object]) -> ValueError:
    """Returns the ValueError for a `value` that is not among the choices.

    Every dispatch raises it, so that no unknown option is taken for one of the choices.
    """
    return ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
