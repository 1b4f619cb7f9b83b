"""What stands on a page of HTML that needs nothing else: no file beside it, no network, no script."""

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
    """A picture with its caption: a PNG as base64, or an SVG; how wide it should be, at least, in rem."""

    caption: str
    png: str = ""
    svg: str = ""
    width: int = 24


@dataclass(frozen=True)
class Table:
    """Names and values: `columns` are the values' names, where there is more than one; numbers stand at the right."""

    rows: Mapping[str, Sequence[str]]
    columns: Sequence[str] = ()
    numbers: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    note: str = ""


def page(title: str, name: str, what: str, summary: str, sections: Sequence[Section]) -> bytes:
    """The page, from report.html.jinja."""
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
    """A bare figure of images, as a PNG; its text is the caption."""
    return Picture(pictures.caption(figure), png=base64.b64encode(pictures.png(figure)).decode(), width=width)


@contextlib.contextmanager
def ink() -> Iterator[None]:
    """Figures that are made within are drawn in the page's own colour, to be read on light and dark."""
    names: list[Any] = ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color"]
    with style(**{**dict.fromkeys([*names, "ytick.color"], INK), "svg.fonttype": "none", "svg.hashsalt": "aevb"}):
        yield


def svg(figure: Figure, caption: str, width: int = 22) -> Picture:
    """A figure of lines and text made within `ink`, as SVG, its text as text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, dpi=2 * pictures.DPI, metadata={"Date": None})
    text = file.getvalue()
    drawing = text[text.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(caption, quote=True)
    return Picture(caption, svg=drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1), width=width)
