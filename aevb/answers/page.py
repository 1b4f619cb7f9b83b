"""A page of HTML that needs nothing else: no file beside it, no network, no script."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import pictures
from ..drawing import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own colour of text
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #62676d; --line: #d9dce0; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --faint: #9aa0a6; --line: #3a3e43; --paper: #17191c; }
}
body { max-width: 84rem; margin: 0 auto; padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; margin: 0 0 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.6rem; border-bottom: 1px solid var(--line); }
p { margin: 0.4rem 0; }
.faint { color: var(--faint); }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.figures > * { flex: 1 1 26rem; min-width: 0; max-width: 100%; }
.figures > img { flex: 0 1 auto; }
img { background: #ffffff; border-radius: 6px; max-width: 100%; height: auto; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 0.2rem 1.2rem 0.2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; }
"""


def page(title: str, parts: Sequence[str]) -> bytes:
    """The page, of parts that are HTML."""
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'.encode()


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{html.escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, faint: bool = False) -> str:
    return f"<p{' class=faint' if faint else ''}>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def figures(*parts: str) -> str:
    return f'<div class="figures">\n{"".join(parts)}\n</div>'


def table(rows: Mapping[str, Any], numbers: bool = False) -> str:
    """Names and values."""
    kind = ' class="number"' if numbers else ""
    lines = [f"<tr><th>{html.escape(name)}</th><td{kind}>{html.escape(str(v))}</td></tr>" for name, v in rows.items()]
    return f'<div class="wide"><table>\n{"".join(lines)}\n</table></div>'


def image(figure: Figure, alt: str) -> str:
    """A figure of pixels, as a PNG in the page."""
    data = base64.b64encode(pictures.png(figure)).decode()
    width = int(figure.get_figwidth() * 72)
    return f'<img width="{width}" alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">\n'


@contextlib.contextmanager
def ink() -> Iterator[None]:
    """Figures that are made within are drawn in the page's own colour, to be read on light and dark."""
    names: list[Any] = [
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    ]
    with style(**{**dict.fromkeys(names, INK), "svg.fonttype": "none", "svg.hashsalt": "aevb"}):
        yield


def svg(figure: Figure, alt: str) -> str:
    """A figure of lines and text made within `ink`, as SVG in the page, its text as text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, dpi=2 * pictures.DPI, metadata={"Date": None})
    text = file.getvalue()
    drawing = text[text.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(alt, quote=True)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
