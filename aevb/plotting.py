"""matplotlib as pictures are drawn with it, whatever the world around has made of it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_within = False


def _matplotlib() -> Any:
    """The module, imported without a MPLBACKEND that is a notebook's: no figure here needs a backend of a screen."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


@contextlib.contextmanager
def style(**settings: Any) -> Iterator[None]:
    """Figures within are drawn with matplotlib's defaults and `settings`, not with a user's matplotlibrc.

    A "$" is a dollar sign. Within another `style`, only the settings are added.
    """
    global _within
    matplotlib = _matplotlib()
    outer = _within
    with matplotlib.rc_context():
        if not outer:
            matplotlib.rcdefaults()
            matplotlib.rcParams["text.parse_math"] = False
        matplotlib.rcParams.update(settings)
        _within = True
        try:
            yield
        finally:
            _within = outer


def drawn(function: Callable[P, T]) -> Callable[P, T]:
    """A function that makes or writes figures, within `style`."""

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with style():
            return function(*args, **kwargs)

    return within


def printable(text: str) -> str:
    """The text with what no font has, of a file's name that is no text, as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()
