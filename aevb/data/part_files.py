"""Reader of a folder of array files that are parts.

Examples are train.npy and test.npy, MNIST's four IDX files, and binarized MNIST's three .amat files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

import numpy as np

from .arrays import is_large, labels_alone, mat, note_on_training, npy_part, npz
from .idx import check_idx, idx_labels, idx_part, is_idx
from .parts import Chosen, NoTrainingPartError, choose, not_read, read
from .raw import Part, Source, check_labels
from .text import amat_part, check_amat, is_amat


def form(path: Path) -> str | None:
    """Returns a file's form: ".npy", ".npz", ".mat", ".amat", "IDX", or None."""
    if is_amat(path):
        return ".amat"
    if path.suffix.lower() in (".npy", ".npz", ".mat"):
        return path.suffix.lower()
    return "IDX" if is_idx(path) else None


def part_files(root: Path, files: Sequence[PurePath]) -> Source | None:
    """Returns the parts of a folder's `files`, or None without any.

    Raises:
        ValueError: As `choose`.
        FileNotFoundError: One of MNIST's IDX files or of three .amat files is missing.
    """
    forms = {file: str(form(root / file)) for file in files}
    kept = _without_copies(forms)
    try:
        chosen = choose(map(str, kept), str(root))
    except NoTrainingPartError:
        _check_complete(root, kept, forms, set())
        raise
    if not chosen:
        named = {part for file in kept for part in read(str(file)).parts}
        _check_complete(root, kept, forms, named)
        return None
    images = [PurePath(names.images) for names in chosen.values()]
    _check_complete(root, images, forms, set(chosen))
    mapped = {forms[file] for file in images} == {".npy"} and any(is_large(root / file) for file in images)
    sources = {part: _source(root, part, names, forms, mapped) for part, names in chosen.items()}
    used = {PurePath(name) for names in chosen.values() for name in names if name is not None}
    notes = [
        note_on_training(chosen),
        *(s.note for s in sources.values()),
        not_read([f for f in kept if f not in used]),
    ]
    return Source(
        root.resolve().name or "data",
        {part: source.parts[part] for part, source in sources.items()},
        max_value=255 if {forms[file] for file in images} == {"IDX"} else None,
        image_shape=sources["train"].image_shape,
        note="; ".join(dict.fromkeys(filter(None, notes))),
    )


def _without_copies(forms: dict[PurePath, str]) -> list[PurePath]:
    """Returns the files without second copies of IDX or .amat files.

    An IDX or .amat file may be packed and unpacked, or in a folder of its own as well. The highest, unpacked one is
    kept.
    """
    kept: dict[tuple, PurePath] = {}
    for file in sorted(forms, key=lambda file: (len(file.parts), file.suffix == ".gz", file)):
        alone = forms[file] not in ("IDX", ".amat")
        kept.setdefault((forms[file], file) if alone else (forms[file], read(str(file)).words), file)
    return sorted(kept.values())


def _check_complete(root: Path, files: Sequence[PurePath], forms: dict[PurePath, str], parts: set[str]) -> None:
    of_files = {forms[file] for file in files}
    if of_files == {"IDX"}:
        check_idx(parts, root)
    if of_files == {".amat"}:
        check_amat(parts, [root / file for file in files], root)


def _source(root: Path, part: str, names: Chosen, forms: dict[PurePath, str], mapped: bool) -> Source:
    """Returns a source with a single part."""
    path = root / names.images
    readers: dict[str, Callable[[], Source | Part]] = {
        ".npy": lambda: npy_part(path, mapped),
        ".npz": lambda: npz(path, part),
        ".mat": lambda: mat(path, part),
        ".amat": lambda: amat_part(path),
        "IDX": lambda: idx_part(path, None),
    }
    found = readers[forms[PurePath(names.images)]]()
    source = found if isinstance(found, Source) else Source("", {part: found})
    if names.labels is None:
        return source
    of_part, labels_path = source.parts[part], root / names.labels
    if of_part.labels is not None:
        raise ValueError(f"{path} has labels, and {labels_path} others; expected one of them")
    labels = _labels(labels_path, forms[PurePath(names.labels)])
    check_labels(labels, labels_path, of_part.shape[0], path)
    return dataclasses.replace(source, parts={part: of_part._replace(labels=labels)})


def _labels(path: Path, of_form: str) -> np.ndarray:
    if of_form == "IDX":
        return idx_labels(path)
    images = amat_part(path).images if of_form == ".amat" else labels_alone(path)
    assert isinstance(images, np.ndarray)
    return images
