"""A folder of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .arrays import PARTS
from .source import Part, Source, need

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
_GREY_MODES, _COLOUR_MODES = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBX", "RGBa")


def image_folder(path: Path) -> Source | None:
    """The images in a directory, or None where there are none."""
    name = path.resolve().name
    folders = {PARTS[sub.name]: sub for sub in sorted(path.iterdir()) if sub.name in PARTS and sub.is_dir()}
    if "train" in folders and len(folders) > 1:
        listed = {part: _listed(folder) for part, folder in folders.items()}
        if empty := [str(folders[part]) for part, found in listed.items() if not found[0]]:
            raise ValueError(f"{empty[0]} has no images; expected files such as {', '.join(SUFFIXES[:3])}")
        if len({tuple(classes) for _, _, classes in listed.values()}) > 1:
            shown = "; ".join(
                f"{folders[part]}: {', '.join(classes) or 'none'}" for part, (*_, classes) in listed.items()
            )
            raise ValueError(f"the parts have other subfolders ({shown}); expected the same labels in each")
    else:
        folders, listed = {"train": path}, {"train": _listed(path)}
        if not listed["train"][0]:
            return None
    first: list[tuple[Path, tuple[int, ...]]] = []
    parts = {
        part: Part(_pixels(files, first), labels, str(folders[part])) for part, (files, labels, _) in listed.items()
    }
    return Source(name, parts, max_value=255)


def _listed(path: Path) -> tuple[list[Path], np.ndarray | None, list[str]]:
    """The image files, in order of their names, with labels and their names where they are in subfolders."""
    files = _files(path)
    subfolders = sorted(sub for sub in path.iterdir() if sub.is_dir() and not sub.name.startswith(".") and _files(sub))
    if not subfolders:
        return files, None, []
    if files:
        raise ValueError(
            f"{path} has images of its own, such as {files[0].name}, and others in {subfolders[0].name}/; expected all "
            "of them in subfolders, which are their labels, or none"
        )
    labelled = [(file, label) for label, sub in enumerate(subfolders) for file in _files(sub)]
    return (
        [file for file, _ in labelled],
        np.array([label for _, label in labelled]),
        [sub.name for sub in subfolders],
    )


def _files(path: Path) -> list[Path]:
    return sorted(
        f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file()
    )


def _pixels(files: list[Path], first: list[tuple[Path, tuple[int, ...]]]) -> np.ndarray:
    """(N, H, W) or (N, 3, H, W), uint8. `first` is the first file of all parts and its shape, once it is known."""
    pixels = None
    for i, file in enumerate(files):
        image = _read(file)
        if not first:
            first.append((file, image.shape))
        if image.shape != first[0][1]:
            raise ValueError(
                f"{file} is {_described(image.shape)}, {first[0][0]} {_described(first[0][1])}; expected images of one "
                "size, all grey or all in colour"
            )
        if pixels is None:
            pixels = np.empty((len(files), *image.shape), np.uint8)
        pixels[i] = image
    assert pixels is not None
    return pixels


def _read(file: Path) -> np.ndarray:
    pillow = need("PIL.Image", "pillow", "images", f"{file}, an image,")
    try:
        with pillow.open(file) as image:
            if image.mode not in (*_GREY_MODES, *_COLOUR_MODES):
                raise ValueError(
                    f"{file} has pixels of mode {image.mode!r}, more than 8 bits each; expected 8-bit grey or colour"
                )
            grey = image.mode in _GREY_MODES
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{file} is truncated, damaged or no image: {error}") from error
    return pixels if grey else np.moveaxis(pixels, -1, 0)


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[-2]}x{shape[-1]} {'grey' if len(shape) == 2 else 'in colour'}"
