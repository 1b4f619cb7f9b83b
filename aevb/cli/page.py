"""Parts of an HTML page without other files, network or scripts."""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..plotting import style
from ..training import pictures

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own colour of text


@dataclass(frozen=True)
class Picture:
    """Picture with its caption.

    Attributes:
        caption: The text below it.
        png: A PNG as base64, or nothing.
        svg: An SVG, or nothing.
        width: Its least width, in rem.
    """

    caption: str
    png: str = ""
    svg: str = ""
    width: int = 24


@dataclass(frozen=True)
class Table:
    """Table of names and their values.

    Attributes:
        rows: Values by name.
        columns: Names of the values, where a row has more than one.
        numbers: Whether the values are numbers, which stand at the right.
        caption: The text above it.
    """

    rows: Mapping[str, Sequence[str]]
    columns: Sequence[str] = ()
    numbers: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Section of a page, with its paragraphs, pictures and tables."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    note: str = ""


def page(title: str, name: str, what: str, summary: str, sections: Sequence[Section]) -> bytes:
    """Returns the page, from report.html.jinja."""
    template = _environment().get_template("report.html.jinja")
    return template.render(title=title, name=name, what=what, summary=summary, sections=sections).encode()


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("aevb", "cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def image(figure: Figure, width: int = 24) -> Picture:
    """Returns a bare figure as a PNG; its text is the caption."""
    return Picture(pictures.caption(figure), png=base64.b64encode(pictures.png(figure)).decode(), width=width)


@contextlib.contextmanager
def ink() -> Iterator[None]:
    """Style of figures in the page's own colour, for light and dark."""
    names: list[Any] = ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color"]
    with style(**{**dict.fromkeys([*names, "ytick.color"], INK), "svg.fonttype": "none", "svg.hashsalt": "aevb"}):
        yield


def svg(figure: Figure, caption: str, width: int = 22) -> Picture:
    """Returns a figure made within `ink` as SVG, its text as text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, dpi=2 * pictures.DPI, metadata={"Date": None})
    text = file.getvalue()
    drawing = text[text.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(caption, quote=True)
    return Picture(caption, svg=drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1), width=width)
