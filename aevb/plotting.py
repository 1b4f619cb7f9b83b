"""matplotlib with fixed defaults, independent of the user's configuration."""

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
    """Returns the matplotlib module, imported without the environment's MPLBACKEND.

    A notebook sets MPLBACKEND to a backend of its own; the figures here need no screen.
    """
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
    """Draws figures with matplotlib's defaults and `settings`, without the user's matplotlibrc.

    A "$" is drawn as a dollar sign. Inside another `style` only the settings are added.

    Args:
        **settings: Entries of `matplotlib.rcParams`.

    Yields:
        None.
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
    """Decorates a function that makes or writes figures to run within `style`."""

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with style():
            return function(*args, **kwargs)

    return within


def printable(text: str) -> str:
    r"""Returns the text with surrogate characters written as \udce9.

    No font has them. They come from file names that are not valid text.
    """
    return text.encode("utf-8", "backslashreplace").decode()
