"""Errors and numbers in messages about files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def number(value: np.generic) -> str:
    """Returns a number as text, with enough digits to tell it apart.

    255.00002 is not shown as 255.
    """
    short = f"{value:g}"
    return short if value != value or value.dtype.type(short) == value else str(value)


def damaged(path: Path, error: BaseException, what: str = "truncated or damaged") -> ValueError:
    """Returns the ValueError for a reader's error of any kind.

    Readers of damaged files raise many.

    Args:
        path: The file.
        error: Error that its reader raised.
        what: Description of the damage.
    """
    if isinstance(error, ValueError) and ("allow_pickle" in str(error) or "Python objects" in str(error)):
        return ValueError(f"{path} holds Python objects, which are not loaded; expected arrays of numbers")
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is {what}: {said}")
