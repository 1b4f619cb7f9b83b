"""Kinds of pixel values (bits, bytes, [0, 1]) and range checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sentences import number

CHUNK_BYTES = 1 << 26
# The rounding of x / 255 or x * (1 / 255) in float32, times 255, is less than half of this.
_FRACTION_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Kind:
    """Kind of pixel values, with the range in which they are kept.

    Attributes:
        max_value: Largest value.
        words: Note for the description, or "".
    """

    max_value: int
    words: str


# From the most to the least particular: the first possible kind is taken.
KINDS = {
    "bits": Kind(1, ""),
    "fractions": Kind(255, "given as multiples of 1/255 in [0, 1]"),
    "unit": Kind(1, ""),
    "bytes": Kind(255, ""),
}


def readings(values: np.ndarray, where: str, first_row: int = 0) -> set[str]:
    """Returns the possible kinds of the numbers: names in `KINDS`.

    Args:
        values: (N, D).
        where: The file, for the error.
        first_row: Index of the first row in the file.

    Raises:
        ValueError: Values that fit no kind; the message has the place and the value.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(f"{where} holds {values.dtype}; expected numbers: images in 0..255 or in [0, 1]")
    found = set(KINDS)
    smallest, largest = np.inf, -np.inf
    for start, chunk in _chunks(values):
        of_chunk = _readings_of_chunk(chunk, where, first_row + start)
        smallest, largest = min(smallest, chunk.min()), max(largest, chunk.max())
        if not found & of_chunk:
            row, pixel = np.argwhere(chunk == chunk.max())[0]
            place = f"datapoint {first_row + start + row}, pixel {pixel}"
            raise ValueError(
                f"{where}: values from {number(smallest)} to {number(largest)} that are neither all whole nor all in "
                f"[0, 1] (the largest is at {place}); expected 0..255 or [0, 1]"
            )
        found &= of_chunk
    return found


def _readings_of_chunk(chunk: np.ndarray, where: str, first_row: int) -> set[str]:
    if chunk.dtype.kind == "b":
        return {"bits"}
    smallest, largest = chunk.min(), chunk.max()
    if not (smallest >= 0 and largest <= 255):  # also False for NaN
        wrong = ~((chunk >= 0) & (chunk <= 255))
        values = (
            f", of values from {number(np.nanmin(chunk))} to {number(np.nanmax(chunk))}"
            if not np.isnan(chunk).all()
            else ""
        )
        raise ValueError(_at(chunk, wrong, where, first_row) + f"{values}; expected 0..255 or [0, 1]{_hint(chunk)}")
    if chunk.dtype.kind in "ui":
        return {"bits", "bytes"} if largest <= 1 else {"bytes"}
    fraction = chunk != np.rint(chunk)
    if largest > 1:
        if fraction.any():
            raise ValueError(
                _at(chunk, fraction, where, first_row)
                + f", and the largest is {number(largest)}; expected whole numbers 0..255, or values in [0, 1]"
            )
        return {"bytes"}
    if not fraction.any():
        return {"bits", "fractions", "unit", "bytes"}
    steps = chunk.astype(np.float32) * np.float32(255)
    return {"fractions", "unit"} if np.abs(steps - np.rint(steps)).max() < _FRACTION_TOLERANCE else {"unit"}


def agreed(arrays: Sequence[tuple[np.ndarray, str]]) -> str:
    """Returns the kind that all parts of a data set share.

    Args:
        arrays: Each with its file, for the error.

    Raises:
        ValueError: No kind fits all; the message names the files.
    """
    common = set(KINDS)
    for values, where in arrays:
        common &= readings(values, where)
        if not common:
            others = ", ".join(where for _, where in arrays)
            raise ValueError(f"{others} have values of several ranges, 0..255 and [0, 1]; expected one for all")
    return next(kind for kind in KINDS if kind in common)


def converted(values: np.ndarray, kind: str) -> Tensor:
    """Returns the numbers, (N, D), in the dtype of their kind.

    The dtype is uint8 in 0..max_value, or float32 for "unit".
    """
    out = np.empty(values.shape, np.float32 if kind == "unit" else np.uint8)
    for start, chunk in _chunks(values):
        as_kept = chunk != 0 if kind == "bits" else np.rint(chunk * 255.0) if kind == "fractions" else chunk
        out[start : start + len(chunk)] = as_kept
    return torch.from_numpy(out)


def check_rows(values: np.ndarray, rows: np.ndarray, kind: str, where: str) -> None:
    """Checks that gathered numbers, (B, D), are of the file's kind.

    Args:
        values: (B, D), gathered.
        rows: (B,), their rows in the file.
        kind: Kind that the file was seen to have.
        where: The file, for the error.

    Raises:
        ValueError: A value of another kind, with its place.
    """
    if values.size == 0:
        return
    if kind == "bytes" and values.dtype.kind == "f":
        good = (values >= 0) & (values <= 255) & (values == np.rint(values))
        if good.all():
            return
    else:
        limit = 255 if kind == "bytes" else 1
        if values.min() >= 0 and values.max() <= limit:
            return
        good = (values >= 0) & (values <= limit)
    row, pixel = np.argwhere(~good)[0]
    expected = {"bits": "0 or 1", "bytes": "a whole number in 0..255", "unit": "a value in [0, 1]"}[kind]
    raise ValueError(
        f"{where}: datapoint {rows[row]}, pixel {pixel} is {number(values[row, pixel])}; expected {expected}, as in "
        "the parts of the file that were looked at when it was opened"
    )


def _hint(chunk: np.ndarray) -> str:
    """Returns a hint for a NaN, or for values beyond 0..255 by less than 1, which a resize produces."""
    if np.isnan(chunk).any():
        return "; where a NaN stands for a missing value, --missing nan"
    beyond = chunk.min() > -1 and 255 < chunk.max() < 256 and chunk.dtype.kind == "f"
    return ". After a resize: images.clip(0, 255).round()" if beyond else ""


def _at(chunk: np.ndarray, wrong: np.ndarray, where: str, first_row: int) -> str:
    row, pixel = np.argwhere(wrong)[0]
    return f"{where}: datapoint {first_row + row}, pixel {pixel} is {number(chunk[row, pixel])}"


def _chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, CHUNK_BYTES // max(1, values[0].nbytes))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]
