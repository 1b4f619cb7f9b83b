"""Reading of names: their part, images or labels.

One table serves folders, arrays and files.

A name is read word by word: ``X_train``, ``trainX``, ``images/train`` and ``mnist-train-images`` name the training
part. Upper and lower case, separators, digits and sizes such as 32x32 do not matter. A word that is in no table, such
as ``mnist``, is a qualifier. Names with qualifiers are parts where they differ in nothing but the word for the part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainings", "trn"),
    "test": ("test", "tests", "testing", "tst", "t10k", "eval", "evals", "evaluation"),
    "validation": (
        *("validation", "validations", "valid", "valids", "validate", "val", "vals", "vld"),
        *("dev", "devs", "development"),
    ),
}
ABBREVIATED = {"tr": "train", "te": "test", "va": "validation"}  # only beside x or y: "trX", "y_te"
# In order of preference, for a file with several names and no parts.
IMAGES = (
    *("x", "images", "data", "arr_0", "image", "imgs", "img", "inputs", "input", "pixels", "patterns", "samples"),
    *("dataset", "datasets", "pictures", "photos", "features", "feats", "fea"),
)
LABELS = ("y", "labels", "label", "targets", "target", "classes", "class", "lbls", "lbl", "gnd")
NEUTRAL = (  # words that do not name another data set
    *("set", "sets", "split", "splits", "part", "parts", "subset", "raw"),
    *("npy", "npz", "mat", "amat", "gz", "idx", "ubyte", "byte", "int"),
)

_NOT_READ = 3  # names in a note

_SPELLED = {word: part for part, words in PARTS.items() for word in words}
_KNOWN = {*_SPELLED, *IMAGES, *LABELS, *NEUTRAL}
_LONGEST_FIRST = sorted(_KNOWN, key=len, reverse=True)
_JOINED = re.compile(f"(?:{'|'.join(map(re.escape, _LONGEST_FIRST))})+")
_SIZE = re.compile(r"\d+x\d+(?:x\d+)*", re.IGNORECASE)
_PIECE = re.compile(r"(?i:t10k)|[A-Za-z]+|\d+")
_CASED = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


class NoTrainingPartError(ValueError):
    """Names say other parts, and no training part."""


class Name(NamedTuple):
    """Meaning of a name.

    Attributes:
        parts: The parts that it says; there should be one.
        role: "images", "labels" or "".
        qualifiers: Words that are in no table.
        words: Words and numbers, once each, without words of no meaning.
    """

    parts: tuple[str, ...]
    role: str
    qualifiers: tuple[str, ...]
    words: tuple[str, ...]


class Chosen(NamedTuple):
    """Names of a part's images and labels."""

    images: str
    labels: str | None


@lru_cache(1 << 12)
def read(name: str) -> Name:
    """Returns the meaning of a name."""
    words = _words(name)
    spelled = {**_SPELLED, **ABBREVIATED} if {"x", "y"} & set(words) else _SPELLED
    said = {spelled.get(word) for word in words}
    role = "labels" if set(words) & set(LABELS) else "images" if set(words) & set(IMAGES) else ""
    return Name(
        tuple(part for part in PARTS if part in said),
        role,
        tuple(w for w in words if w not in _KNOWN and w not in spelled and len(w) > 1 and not w.isdigit()),
        tuple(dict.fromkeys([*(w for w in words if w not in NEUTRAL), *_SIZE.findall(name)])),
    )


def _words(name: str) -> list[str]:
    if name == "arr_0":  # numpy's own name for an array
        return [name]
    words: list[str] = []
    for piece in _PIECE.findall(_SIZE.sub(" ", name)):
        for word in _joined(piece.lower()) or _CASED.findall(piece) or [piece]:
            words += _joined(word.lower()) or [word.lower()]
    return words


def _joined(text: str) -> list[str]:
    """Returns the known words that make up a text, or [].

    For example "testdata" is made of two.
    """
    if text in _KNOWN:
        return [text]
    if text[:1] in ("x", "y") and text[1:] in ABBREVIATED:
        return [text[0], text[1:]]
    if len(text) < 4 or not _JOINED.fullmatch(text):
        return []
    for word in _LONGEST_FIRST:
        if text.startswith(word) and (rest := _joined(text[len(word) :])):
            return [word, *rest]
    return []


def named_parts(names: Sequence[str]) -> dict[str, str]:
    """Returns the part of each name that says one.

    The names lie side by side.

    A name says it by itself, as "Train" and "val2017" do. Or it differs from others in nothing but the part, as
    "seg_train" and "seg_test" do.
    """
    said = {name: read(name) for name in names}
    single = {name: n for name, n in said.items() if len(n.parts) == 1}
    families = _families(single)
    return {name: n.parts[0] for name, n in single.items() if not n.qualifiers or _is_family(families[n.qualifiers])}


def _families(said: Mapping[str, Name]) -> dict[tuple[str, ...], set[str]]:
    """Returns the parts that occur with each list of qualifiers."""
    families: dict[tuple[str, ...], set[str]] = {}
    for name in said.values():
        families.setdefault(name.qualifiers, set()).update(name.parts)
    return families


def _is_family(parts: set[str]) -> bool:
    return "train" in parts and len(parts) > 1


def choose(names: Iterable[str], where: str, only: str | None = None) -> dict[str, Chosen]:
    """Returns the names of each part's images and labels.

    The result is {} where no names say parts. Images without a part, beside a test part, are the training part: "data"
    and "testdata".

    Args:
        names: Names of arrays or files.
        where: Their file or folder, for errors.
        only: The one part that there may be, where the file's own name says so.

    Raises:
        ValueError: A name that says two parts, or two names that say the same. Images without a part beside a training
            part, or a part with labels alone.
        NoTrainingPartError: There is no training part.
    """
    said = {name: read(name) for name in names}
    images = _images(said, where)
    if not images:
        return {}
    if only is not None:
        return {only: _only(only, images, said, where)}
    unnamed = [name for name, s in said.items() if not s.parts and not s.qualifiers and s.role == "images"]
    if "train" in images and unnamed:
        raise ValueError(
            f"{where} has {images['train']}, which names the training part, and {unnamed[0]}, which names none; "
            "expected a part in each name, or in none"
        )
    takes_unnamed = "train" not in images and len(unnamed) == 1
    if takes_unnamed:
        images = {"train": unnamed[0], **images}
    if "train" not in images:
        raise no_training_part(where, images)
    found = {}
    for part in PARTS:
        named = () if part == "train" and takes_unnamed else (part,)
        labels = {name: s for name, s in said.items() if s.role == "labels" and s.parts == named}
        if part in images:
            found[part] = Chosen(images[part], _labels_of(images[part], labels, part, where))
        elif plain := [name for name, s in labels.items() if not s.qualifiers]:
            raise ValueError(
                f"{where} has {plain[0]}, labels of the {in_words(part)} part, and no images of it; expected both"
            )
    return found


def _only(part: str, images: Mapping[str, str], said: Mapping[str, Name], where: str) -> Chosen:
    for other, name in images.items():
        if other != part:
            raise ValueError(
                f"{where} is the {in_words(part)} part by its own name, and has {name}, which names the "
                f"{in_words(other)} part; expected one part in a file whose name says which"
            )
    labels = {name: s for name, s in said.items() if s.role == "labels" and s.parts == (part,)}
    return Chosen(images[part], _labels_of(images[part], labels, part, where))


def _images(said: Mapping[str, Name], where: str) -> dict[str, str]:
    """Returns the images of each part that names say."""
    images = {name: s for name, s in said.items() if s.parts and s.role != "labels"}
    for name, s in images.items():
        if len(s.parts) > 1 and (s.role or not s.qualifiers):
            raise two_parts(where, name, s.parts)
    images = {name: s for name, s in images.items() if len(s.parts) == 1}
    sure = {name: s for name, s in images.items() if s.role or not s.qualifiers}
    if not sure:  # such as mnist_train and mnist_test; not names_train beside x
        families = [q for q, parts in _families(images).items() if _is_family(parts)]
        sure = {name: s for name, s in images.items() if s.qualifiers in families}
        for name, s in sure.items():
            if other := [n for n, o in images.items() if n not in sure and o.parts == s.parts]:
                raise two_names(where, [name, other[0]], s.parts[0])
    found = {}
    for part in PARTS:
        of_part = [name for name, s in sure.items() if s.parts == (part,)]
        of_part = [name for name in of_part if not said[name].qualifiers] or of_part
        if len(of_part) > 1:
            raise two_names(where, of_part, part)
        if of_part:
            found[part] = of_part[0]
    qualified = {said[name].qualifiers: name for name in found.values() if said[name].qualifiers}
    if len(qualified) > 1:
        raise more_than_the_part(where, list(qualified.values()), "x_train and x_test")
    return found


def _labels_of(images: str, labels: Mapping[str, Name], part: str, where: str) -> str | None:
    """Returns the labels of `images`, or None.

    Labels with the same qualifiers go first, then without qualifiers, then any.
    """
    for qualifiers in (read(images).qualifiers, (), None):
        chosen = [name for name, s in labels.items() if qualifiers is None or s.qualifiers == qualifiers]
        if len(chosen) > 1:
            raise two_names(where, chosen, part, "labels of the ")
        if chosen:
            return chosen[0]
    return None


def not_read(names: Iterable[object]) -> str:
    """Returns the note on files or arrays left out, or ""."""
    left = list(map(str, names))
    more = f" and {len(left) - _NOT_READ} more" if len(left) > _NOT_READ else ""
    return f"not read: {', '.join(left[:_NOT_READ])}{more}" if left else ""


def in_words(part: str) -> str:
    """Returns the part's name in a sentence: "training" for "train"."""
    return "training" if part == "train" else part


def two_names(where: str, names: Sequence[str], part: str, what: str = "") -> ValueError:
    """Returns the error for two names of one part."""
    return ValueError(
        f"{where} has {names[0]} and {names[1]}, which both name {what or 'the '}{in_words(part)} part; expected one "
        "of them"
    )


def more_than_the_part(where: str, names: Sequence[str], such_as: str) -> ValueError:
    """Returns the error for names that differ in more than the part."""
    return ValueError(
        f"{where} has {names[0]} and {names[1]}, which differ in more than the part; expected names that differ in "
        f"nothing else, such as {such_as}"
    )


def two_parts(where: str, name: str, parts: Iterable[str]) -> ValueError:
    """Returns the error for a name that says two parts."""
    return ValueError(
        f"{where} has {name}, which names the {' and the '.join(map(in_words, parts))} part; expected one part "
        "in a name"
    )


def no_training_part(where: str, named: Mapping[str, str]) -> NoTrainingPartError:
    """Returns the error for names without a training part."""
    shown = ", ".join(f"{name} (the {in_words(part)} part)" for part, name in named.items())
    return NoTrainingPartError(f"{where} has {shown}, and no training part; expected it too, with 'train' in its name")
