"""How what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def number(value: np.generic) -> str:
    """A number of an array, with as many digits as tell it from others: 255.00002 is not 255."""
    short = f"{value:g}"
    return short if value != value or value.dtype.type(short) == value else str(value)


def damaged(path: Path, error: BaseException, what: str = "truncated or damaged") -> ValueError:
    """What to raise where a reader raised `error`, of whatever kind: readers of damaged files raise many."""
    if isinstance(error, ValueError) and ("allow_pickle" in str(error) or "Python objects" in str(error)):
        return ValueError(f"{path} holds Python objects, which are not loaded; expected arrays of numbers")
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is {what}: {said}")
