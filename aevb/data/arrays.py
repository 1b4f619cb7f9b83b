"""Readers of array files: numpy's .npy and .npz, and MATLAB's .mat."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .memmap import MappedImages, open_npy
from .parts import IMAGES, LABELS, Chosen, choose, no_training_part, not_read, read
from .raw import Part, Source, name_of, need
from .sentences import damaged
from .shapes import CHANNELS, image_shape

MAPPED_ABOVE = 1 << 30  # bytes; smaller files are read whole

FREY_SHAPE = (28, 20)
_FREY_DIM = 28 * 20
_FREY_KEY = "ff"
_SHOWN = IMAGES[:4]  # the usual names of images
_MATRIX, _COMPRESSED = 14, 15  # element types of MATLAB 5
_MAT_TYPES = frozenset((*range(1, 8), 9, *range(12, 19)))


def npy(path: Path) -> Source:
    """Returns the source of a .npy file: a training part."""
    return Source(name_of(path), {"train": npy_part(path, is_large(path))})


def is_large(path: Path) -> bool:
    """Whether an array is mapped instead of read into memory."""
    return open_npy(path).nbytes > MAPPED_ABOVE


def npy_part(path: Path, mapped: bool) -> Part:
    """Returns the images of a .npy file, mapped or read, without labels."""
    array = open_npy(path)
    image_shape(array.shape, str(path))
    return Part(MappedImages(path) if mapped else np.array(array), None, str(path))


def numbers(path: Path) -> np.ndarray:
    """Returns the array of numbers of a .npy file.

    Raises:
        ValueError: The file is damaged, or holds no numbers.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file, or a damaged one ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} does not hold an array of numbers; expected a .npy file of images")
    return array


def numbers_by_name(path: Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a .npz file, by name."""
    return _Npz(path)


def npz(path: Path, only: str | None = None) -> Source:
    """Returns the parts of a .npz file, or `only` that part.

    `only` is the part that the file's own name says.
    """
    arrays = _Npz(path)
    chosen = _chosen(list(arrays), path, only)
    parts = {
        part: Part(arrays[names.images], _or_none(arrays, names.labels), f"{path} [{names.images}]")
        for part, names in chosen.items()
    }
    note = "; ".join(filter(None, [note_on_training(chosen), _note_on_others(arrays, chosen)]))
    return Source(name_of(path), parts, note=note)


class _Npz(Mapping[str, np.ndarray]):
    """Arrays of a .npz file, read on access and never unpickled."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as arrays:
            self.names = list(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        with self._open() as arrays:
            return arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                yield arrays
        except Exception as error:
            raise damaged(self.path, error) from error


def mat(path: Path, only: str | None = None) -> Source:
    """Returns the parts of a .mat file, or `only`, as `npz`."""
    arrays = _mat_arrays(path)
    chosen = _chosen(list(arrays), path, only, _FREY_KEY)
    for names in chosen.values():
        _check_numbers(arrays[names.images], f"{path} [{names.images}]")
    shapes = [arrays[names.images].shape for names in chosen.values()]
    is_frey = len(shapes[0]) == 2 and _FREY_DIM in shapes[0]
    last = _datapoints_are_last(shapes, [_shape_of(arrays, names.labels) for names in chosen.values()])
    parts = {}
    for part, names in chosen.items():
        images = np.moveaxis(arrays[names.images], -1, 0) if last else arrays[names.images]
        parts[part] = Part(images, _or_none(arrays, names.labels), f"{path} [{names.images}]")
    notes = [note_on_training(chosen)]
    if last and not is_frey:
        notes.append("the last dimension of the array counts the images")
    notes.append(_note_on_others(arrays, chosen))
    note = "; ".join(filter(None, notes))
    return Source(name_of(path), parts, image_shape=FREY_SHAPE if is_frey else None, note=note)


def _mat_arrays(path: Path) -> dict[str, Any]:
    matlab = need("scipy.io", "scipy", "data", f"{path}, a MATLAB file,")
    try:
        _check_elements(path)
        arrays: Mapping[str, Any] = matlab.loadmat(path)
    except NotImplementedError as error:  # HDF5
        raise ValueError(f"{path} is of MATLAB 7.3; expected MATLAB 5 to 7.2: save it with '-v7'") from error
    except Exception as error:
        raise damaged(path, error) from error
    return {name: array for name, array in arrays.items() if not name.startswith("__")}


def _check_elements(path: Path) -> None:
    """Checks the element headers of a MATLAB 5 file.

    SciPy's reader would crash on wrong headers.

    Raises:
        ValueError: An element of a type that the format does not have, or a matrix that lacks elements.
    """
    with open(path, "rb") as file:
        header = file.read(128)
        little = header[126:] == b"IM"
        if len(header) < 128 or 0 in header[:4] or header[125 if little else 124] != 1:  # not MATLAB 5
            return
        tag = struct.Struct("<II" if little else ">II")
        # Stacks for the file and its nested matrices: end offset, and number of elements still needed.
        ends, needed = [path.stat().st_size], [0]
        while ends:
            start = file.tell()
            if start + tag.size > ends[-1]:
                if needed.pop() > 0:
                    raise ValueError(f"a matrix that ends at byte {ends[-1]} before its numbers")
                file.seek(ends.pop())
                continue
            kind, size = tag.unpack(file.read(tag.size))
            if kind >> 16:  # small element: its data take the place of the size
                kind, size = kind & 0xFFFF, 0
            if kind not in _MAT_TYPES:
                raise ValueError(f"an element of type {kind} at byte {start}")
            needed[-1] -= 1
            if kind == _MATRIX:
                ends.append(min(start + tag.size + size, ends[-1]))
                needed.append(_elements_of(file.peek(16)[:16], tag))
            elif kind == _COMPRESSED:
                _check_compressed(file, size)
            else:
                file.seek(-(-size // 8) * 8, os.SEEK_CUR)


def _check_compressed(file: BinaryIO, size: int) -> None:
    """Reads `size` bytes of a zlib stream.

    Raises:
        ValueError: The stream is not complete.
        zlib.error: The stream's checksum does not fit its content.
    """
    stream = zlib.decompressobj()
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        size -= len(data)
        while data:
            stream.decompress(data, 1 << 20)
            data = stream.unconsumed_tail
    stream.flush()
    if not stream.eof:
        raise ValueError("a compressed element that is not complete")


def _elements_of(start: bytes, tag: struct.Struct) -> int:
    """Returns the number of elements of a matrix from its first bytes.

    The elements are flags, dimensions, name and numbers. A cell or structure, and too few bytes, count as 0.
    """
    if len(start) < 2 * tag.size:
        return 0
    flags, _ = tag.unpack(start[tag.size :])
    kind, is_complex = flags & 0xFF, bool(flags & 0x800)
    return 0 if kind in (1, 2, 3) else 4 + is_complex + 2 * (kind == 5)  # 5 is sparse: indices of 2 dimensions


def labels_alone(path: Path) -> np.ndarray:
    """Returns the labels of a file that has nothing else."""
    if path.suffix.lower() == ".npy":
        return np.array(open_npy(path))
    arrays = _Npz(path) if path.suffix.lower() == ".npz" else _mat_arrays(path)
    names = [name for name in LABELS if name in arrays] or list(arrays)
    if len(names) != 1:
        shown = ", ".join(map(repr, names)) or "nothing in it"
        raise ValueError(f"{path} has {shown}; expected one array, of labels")
    _check_numbers(arrays[names[0]], f"{path} [{names[0]}]", "labels")
    return arrays[names[0]]


def _check_numbers(array: Any, where: str, expected: str = "images") -> None:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise ValueError(f"{where} is no array of numbers; expected {expected}")


def _chosen(names: Sequence[str], path: Path, only: str | None, *more: str) -> dict[str, Chosen]:
    """Returns the names of each part's images and labels, "train" without parts.

    `more` are further names for images.
    """
    if parts := choose(names, str(path), only):
        return parts
    lower = {name.lower(): name for name in names}
    images = next((lower[key] for key in (*IMAGES, *more) if key in lower), None)
    if images is None and len(names) == 1:
        (images,) = names
        if only is None and (said := read(images).parts) and "train" not in said:
            raise no_training_part(str(path), {said[0]: images})
    if images is None:
        raise ValueError(
            f"{path} has {', '.join(map(repr, names)) or 'nothing in it'}; expected images as one of "
            f"{', '.join(_SHOWN)}, with y or labels, or x_train, y_train, x_test, y_test"
        )
    return {only or "train": Chosen(images, next((lower[key] for key in LABELS if key in lower), None))}


def note_on_training(chosen: Mapping[str, Chosen]) -> str:
    """Returns a note on a training part not named as such."""
    if len(chosen) == 1 or read(chosen["train"].images).parts:
        return ""
    return f"{chosen['train'].images} is the training part"


def _note_on_others(names: Iterable[str], chosen: Mapping[str, Chosen]) -> str:
    used = {name for of_part in chosen.values() for name in of_part}
    return not_read(name for name in names if name not in used)


def _or_none(arrays: Mapping[str, Any], name: str | None) -> np.ndarray | None:
    return None if name is None else arrays[name]


def _shape_of(arrays: Mapping[str, Any], name: str | None) -> tuple[int, ...]:
    return () if name is None else np.shape(arrays[name])


def _datapoints_are_last(shapes: Sequence[tuple[int, ...]], labels: Sequence[tuple[int, ...]]) -> bool:
    """Whether the last dimension counts the images, as often in MATLAB.

    It is decided by the number of labels, or by the dimension in which the parts differ, or by the first part's shape.
    """
    for last, count, other in ((False, 0, -1), (True, -1, 0)):
        counted = [s[count] in y and s[other] not in y for s, y in zip(shapes, labels, strict=True) if y]
        if counted and all(counted):
            return last
    for last, count, rest in ((False, 0, slice(1, None)), (True, -1, slice(None, -1))):
        if len({s[rest] for s in shapes}) == 1 < len({s[count] for s in shapes}):
            return last
    shape = shapes[0]
    if len(shape) == 4 and not {shape[1], shape[3]} & {*CHANNELS}:
        return bool({shape[0], shape[2]} & {*CHANNELS})
    if len(shape) != 2:
        return shape[-1] == max(shape) and shape[0] != shape[-1]
    if _FREY_DIM in shape:
        return shape[0] == _FREY_DIM
    return _is_square(shape[0]) and not _is_square(shape[1])


def _is_square(n: int) -> bool:
    return n > 1 and round(n**0.5) ** 2 == n
