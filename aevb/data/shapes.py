"""Meaning of the dimensions of an array of images."""

from __future__ import annotations

import math

import numpy as np

CHANNELS = (1, 3, 4)


def image_shape(shape: tuple[int, ...], where: str) -> tuple[tuple[int, ...], bool, str]:
    """Returns the images' shape, whether channels are last, and a note.

    Args:
        shape: Shape of the array.
        where: The file, for errors.

    Returns:
        The shape (H, W) or (C, H, W), whether the array has the channels last, and a note or "".

    Raises:
        ValueError: A shape that is not one of images.
    """
    if len(shape) < 2 or len(shape) > 4 or (len(shape) == 4 and not {shape[1], shape[3]} & {*CHANNELS}):
        raise ValueError(
            f"{where} has shape {tuple(shape)}; expected images: (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C), "
            f"C one of {', '.join(map(str, CHANNELS))}"
        )
    if 0 in shape:
        raise ValueError(f"{where} is empty: its shape is {tuple(shape)}; expected at least one image")
    if len(shape) == 2:
        side = math.isqrt(shape[1])
        if side * side == shape[1]:
            return (side, side), False, ""
        return (1, shape[1]), False, f"{shape[1]} values are no square, so an image is one row"
    if len(shape) == 3:
        return tuple(shape[1:]), False, ""
    channels_last = shape[1] not in CHANNELS
    channels, height, width = (shape[3], *shape[1:3]) if channels_last else shape[1:]
    return ((height, width) if channels == 1 else (channels, height, width)), channels_last, ""


def flattened(array: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Returns images as (N, D), from one image or several, flat or in a shape that `image_shape` knows.

    Args:
        array: The images.
        shape: Shape of an image, (H, W) or (C, H, W).
        where: The file, for errors.

    Raises:
        ValueError: Images of another shape.
    """
    flat, given = (math.prod(shape),), array.shape
    one = {shape, flat, *([(*shape[1:], shape[0])] if len(shape) == 3 else [])}
    if array.shape in one:
        array = array[np.newaxis]
    if array.ndim == 4 and image_shape(array.shape, where)[1]:
        array = np.moveaxis(array, -1, 1)
    if array.size == 0 or array.shape[1:] not in (shape, flat, (1, *shape)):
        raise ValueError(f"{where} has shape {given}; expected {('N', *shape)} or {('N', *flat)}".replace("'", ""))
    return np.ascontiguousarray(array).reshape(len(array), -1)
