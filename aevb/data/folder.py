"""Reader of a folder of image files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import numpy as np

from .parts import in_words, more_than_the_part, named_parts, no_training_part, read, two_names, two_parts
from .raw import Part, Source, need
from .sentences import damaged

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
_NUMBER = re.compile(r"\d{3,}")
_FOR_IMAGES = ("images", "image", "imgs", "img")  # names that are no labels
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBX", "RGBa")
_ORIENTATION = 0x112  # EXIF's tag
_TURNS = {  # transposition to upright, by EXIF orientation
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"},
    **{7: "TRANSVERSE", 8: "ROTATE_90"},
}

Placed = dict[str, dict[PurePath, tuple[str, ...]]]
"""Files of each part, and their folders without the part's own folder."""


def is_image(file: PurePath) -> bool:
    """Whether a file's suffix is of an image format."""
    return file.suffix.lower() in SUFFIXES


def image_folder(root: Path, files: Sequence[PurePath], folders: Sequence[PurePath], note: str = "") -> Source:
    """Returns the parts of a folder of images, with labels.

    Folders whose names say parts are the parts, above the labels' folders or below them. Else the files' names give the
    parts, where they name several, as train_1.png and test_1.png do. Of the other folders the highest are labels. A
    folder that holds all images is no label where others lie in it, or where it is called images.

    Args:
        root: The folder.
        files: Its images, however deep: paths within `root`.
        folders: Its folders, likewise.
        note: Note to add to the source's.

    Raises:
        ValueError: A part beside images without one, or parts that are unclear for another reason.
    """
    parts = _placed_by_folders(root, files, folders) or _placed_by_names(root, files)
    parts = parts or {"train": {file: file.parent.parts for file in files}}
    if "train" not in parts:
        raise no_training_part(str(root), {part: str(min(of_part)) for part, of_part in parts.items()})
    found: dict[str, Part] = {}
    first: list[_Seen] = []
    labelled, names = _labelled(root, parts)
    for part, (listed, labels) in labelled.items():
        found[part] = Part(_pixels([root / file for file in listed], first), labels, str(_common(root, listed)))
    without = [in_words(part) for part, (_, labels) in labelled.items() if labels is None]
    if len(without) < len(labelled):
        note = "; ".join(filter(None, [*(f"the {part} part has no labels" for part in without), note]))
    return Source(root.resolve().name or "data", found, max_value=255, note=note, label_names=names)


# ---- parts and labels ------------------------------------------------------------------------------------------------


def _placed_by_folders(root: Path, files: Sequence[PurePath], folders: Sequence[PurePath]) -> Placed:
    """Returns the parts that folder names say, or {}."""
    said = _folders_of_parts(root, files, folders)
    if not said:
        return {}
    placed: dict[str, dict[PurePath, tuple[list[str], list[str]]]] = {}
    for file in files:
        above = [folder for folder in reversed(file.parents) if folder in said]
        if len({said[folder] for folder in above}) != 1:
            other = next(f for f in files if f != file and any(p in said for p in f.parents)) if not above else None
            raise _unclear(root, file, {folder: said[folder] for folder in above}, other)
        names = [folder.name for folder in reversed(file.parents) if folder not in said and folder.name]
        depth = len(above[0].parts) - 1
        below = names[depth:]
        while below and read(below[0]).words == read(above[-1].name).words:  # such as seg_train/seg_train/
            del below[0]
        placed.setdefault(said[above[0]], {})[file] = (names[:depth], below)
    outer = {tuple(above) for of_part in placed.values() for above, _ in of_part.values()}
    return {
        part: {file: (*(above if len(outer) > 1 else ()), *below) for file, (above, below) in of_part.items()}
        for part, of_part in placed.items()
    }


def _folders_of_parts(root: Path, files: Sequence[PurePath], folders: Sequence[PurePath]) -> dict[PurePath, str]:
    """Returns the part of each folder with images whose name says one."""
    holding = {folder for file in files for folder in file.parents}
    inner: dict[PurePath, list[PurePath]] = {}
    for folder in sorted(folders):
        inner.setdefault(folder.parent, []).append(folder)
    own: dict[PurePath, PurePath] = {}
    for file in files:
        own.setdefault(file.parent, file)
    said: dict[PurePath, str] = {}
    for outer in sorted(holding):
        found = _parts_beside_each_other(root, outer, inner.get(outer, []), holding, own.get(outer))
        said.update({outer / name: part for name, part in found.items()})
    return said


def _parts_beside_each_other(
    root: Path, outer: PurePath, inner: Sequence[PurePath], holding: set[PurePath], own: PurePath | None
) -> dict[str, str]:
    """Returns the parts that folders in `outer` say, by their names.

    Args:
        root: The folder of the data set.
        outer: The folder to look in.
        inner: Folders in `outer`.
        holding: All folders with images.
        own: An image in `outer` itself, or None.

    Raises:
        ValueError: Folders that name parts unclearly, or a part without images.
    """
    where = str(root / outer)
    names = [folder.name for folder in inner if folder in holding]
    named = named_parts(names)
    _check_parts(where, names, named)
    if not named:
        return {}
    name, part = next(iter(named.items()))
    if alone := [f"{other}/" for other in names if other not in named] + ([own.name] if own is not None else []):
        raise ValueError(
            f"{where} has {name}/, which names the {in_words(part)} part, and {alone[0]}, which names none; expected "
            f"parts alone, such as train/ and test/, or labels alone: rename {name}/ if it is a label, or put "
            f"{alone[0]} elsewhere"
        )
    for folder in inner:
        is_part = folder.name in named_parts([f.name for f in inner]) and read(folder.name).role != "labels"
        if is_part and folder not in holding:
            raise ValueError(f"{root / folder} has no images; expected files such as {', '.join(SUFFIXES[:3])}")
    return named


def _check_parts(where: str, names: Sequence[str], named: dict[str, str]) -> None:
    """Checks that each folder says one part, and no two the same."""
    for name in names:
        if len(said := read(name).parts) > 1 and not read(name).qualifiers:
            raise two_parts(where, f"{name}/", said)
    for part in dict.fromkeys(named.values()):
        if len(same := [f"{name}/" for name, other in named.items() if other == part]) > 1:
            raise two_names(where, same, part)
    others = {name: of_name[0] for name in names if name not in named and len(of_name := read(name).parts) == 1}
    if others and "train" in (both := {*named.values(), *others.values()}) and len(both) > 1:
        two = [f"{name}/" for name in (*named, *others)]  # such as mine_train/ and other_test/
        raise more_than_the_part(where, two, "train/ and test/")


def _unclear(root: Path, file: PurePath, said: dict[PurePath, str], other: PurePath | None) -> ValueError:
    if not said:
        return ValueError(
            f"{root / file} is in no part, and {other} is in one; expected all images in parts, or none of them"
        )
    shown = " and ".join(f"{folder}/ (the {in_words(part)} part)" for folder, part in said.items())
    return ValueError(f"{root / file} is in {shown}; expected one part for an image")


def _placed_by_names(root: Path, files: Sequence[PurePath]) -> Placed:
    """Returns the parts that file names say, or {} without several."""
    alike = {file.stem: _NUMBER.sub("000", file.stem) for file in files}  # many images differ in their number alone
    of_alike = named_parts(sorted(set(alike.values())))
    named = {stem: of_alike[name] for stem, name in alike.items() if name in of_alike}
    if len(set(named.values())) < 2:
        return {}
    placed: Placed = {}
    for file in files:
        if file.stem not in named:
            some = next(f for f in files if f.stem in named)
            raise ValueError(
                f"{root / some} names the {in_words(named[some.stem])} part, others name others, and {root / file} "
                "none; expected a part in the name of every image, or one part or none in all"
            )
        placed.setdefault(named[file.stem], {})[file] = file.parent.parts
    return placed


def _labelled(root: Path, parts: Placed) -> tuple[dict[str, tuple[list[PurePath], np.ndarray | None]], tuple[str, ...]]:
    """Returns each part's sorted files and labels, and the label names."""
    names = _label_names(parts)
    classes: dict[str, list[str]] = {}
    for part, of_part in names.items():
        alone = [file for file, name in of_part.items() if name is None]
        classes[part] = sorted({name for name in of_part.values() if name is not None})
        if alone and classes[part]:
            raise ValueError(
                f"{root / min(alone).parent} has images of its own, such as {min(alone).name}, and others in "
                f"{classes[part][0]}/; expected all of them in subfolders, which are their labels, or none"
            )
        images = [name for name in classes[part] if name.lower() in _FOR_IMAGES]
        if images and (others := [name for name in classes[part] if name not in images]):
            raise ValueError(
                f"{_common(root, of_part)} has {images[0]}/ beside {others[0]}/; expected images in subfolders that "
                f"are their labels, or in {images[0]}/ alone"
            )
    if len({tuple(of_part) for of_part in classes.values() if of_part}) > 1:
        shown = "; ".join(f"{_common(root, names[p])}: {', '.join(c)}" for p, c in classes.items() if c)
        raise ValueError(f"the parts have other subfolders ({shown}); expected the same labels in each")
    found = {}
    for part, of_part in names.items():
        listed = sorted(of_part, key=lambda file: (of_part[file] or "", file))
        labels = [classes[part].index(name) for file in listed if (name := of_part[file]) is not None]
        found[part] = (listed, np.array(labels) if labels else None)
    return found, next((tuple(of_part) for of_part in classes.values() if of_part), ())


def _label_names(parts: Placed) -> dict[str, dict[PurePath, str | None]]:
    """Returns each file's label, or None.

    It is the name of the file's highest folder that does not hold all files.
    """
    parts = {part: _without_images(of_part) for part, of_part in parts.items()}
    inner = [folders for of_part in parts.values() for folders in of_part.values()]
    depth = 0
    while len({folders[depth : depth + 1] for folders in inner}) == 1 and len(inner[0]) > depth:
        if all(len(folders) == depth + 1 for folders in inner):
            break
        depth += 1
    return {
        part: {file: folders[depth] if len(folders) > depth else None for file, folders in of_part.items()}
        for part, of_part in parts.items()
    }


def _without_images(of_part: dict[PurePath, tuple[str, ...]]) -> dict[PurePath, tuple[str, ...]]:
    """Returns the folders of a part's files without a common images folder."""
    while len(first := {folders[:1] for folders in of_part.values()}) == 1 and any(names := first.pop()):
        said = read(names[0])
        if said.role != "images" or said.qualifiers:
            break
        of_part = {file: folders[1:] for file, folders in of_part.items()}
    return of_part


def _common(root: Path, files: Sequence[PurePath] | dict[PurePath, str | None]) -> Path:
    """Returns the folder that holds all of the files."""
    return root / os.path.commonpath([file.parent for file in files])


# ---- pixels ----------------------------------------------------------------------------------------------------------


class _Seen:
    """An image that was read: file, pixels, and whether it was turned."""

    def __init__(self, file: Path):
        self.file = file
        self.pixels, self.turned = _read(file)

    def __str__(self) -> str:
        shape = self.pixels.shape
        return f"{shape[-2]}x{shape[-1]} {'grey' if len(shape) == 2 else 'in colour'}"


def _pixels(files: list[Path], first: list[_Seen]) -> np.ndarray:
    """Returns the pixels, uint8, (N, H, W) or (N, 3, H, W).

    `first` holds the first image of all parts, once it is known.
    """
    pixels = None
    for i, file in enumerate(files):
        image = _Seen(file)
        if not first:
            first.append(image)
        if image.pixels.shape != first[0].pixels.shape:
            how = "; turned upright, as their EXIF says" if image.turned or first[0].turned else ""
            raise ValueError(
                f"{file} is {image}, {first[0].file} {first[0]}; expected images of one size, all grey or all in "
                f"colour{how}"
            )
        if pixels is None:
            pixels = np.empty((len(files), *image.pixels.shape), np.uint8)
        pixels[i] = image.pixels
    assert pixels is not None
    return pixels


def _read(file: Path) -> tuple[np.ndarray, bool]:
    """Returns upright pixels and whether they were turned.

    The pixels are (H, W) or (3, H, W).
    """
    pillow = need("PIL.Image", "pillow", "images", f"{file}, an image,")
    try:
        # Given a path, Pillow maps some TIFFs into memory, and swaps height and width of turned ones.
        with file.open("rb") as content, pillow.open(content) as image:
            if image.mode not in (*_GREY_MODES, *_COLOUR_MODES):
                raise ValueError(
                    f"{file} has pixels of mode {image.mode!r}, more than 8 bits each; expected 8-bit grey or colour"
                )
            grey = image.mode in _GREY_MODES
            size = image.size
            image.load()  # turns a TIFF upright
            turn = _turn(pillow, image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if grey else "RGB")
            pixels = np.asarray(image if turn is None else image.transpose(turn))
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise damaged(file, error, "truncated, damaged or no image") from error
    turned = turn is not None or image.size != size
    return (pixels if grey else np.moveaxis(pixels, -1, 0)), turned


def _turn(pillow: ModuleType, image: Any) -> Any:
    """Returns Pillow's transposition to the upright image by EXIF, or None."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF raises many kinds; viewers ignore it
        return None
    name = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return None if name is None else pillow.Transpose[name]
