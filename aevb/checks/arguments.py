"""Conversion of arguments from scripts, sweeps and files to their annotated types.

Accepted are a path for a text, numpy's number or a 0-d tensor for Python's, "1e-3" for a number, and 8 for (8,). A
value whose meaning is not plain is refused by an error that names the argument. No number is rounded to a whole one.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import torch

F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 100  # most characters of a wrong value in an error
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONES = ("none", "null")


class ArgumentTypeError(ValueError):
    """An argument of another kind than expected; the message names it."""


class _Wrong(Exception):
    """The value is not of the kind."""


def converted(name: str, value: Any, hint: Any) -> Any:
    """Returns the value converted to `hint`, a type annotation.

    Args:
        name: Name of the argument, for the error.
        value: Value as given.
        hint: bool, int, float, str, a `Literal` of texts, a tuple or sequence of these, or a union of them and None.

    Raises:
        ArgumentTypeError: A ValueError, where the value's meaning is not plain.
    """
    try:
        return _as(_unwrapped(value), hint)
    except _Wrong:
        raise ArgumentTypeError(f"{name} is {_shown(value)}; expected {_words(hint)}") from None


def takes_plain_values(function: F) -> F:
    """Returns the function with its arguments converted to their annotations first.

    Arguments whose annotation `converted` does not know, such as a tensor, stay as they are.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return _known_hints(function, signature)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = converted(name, value, hints()[name])
        return function(*bound.args, **bound.kwargs)

    return cast(F, call)


def _known_hints(function: Callable, signature: inspect.Signature) -> dict[str, Any]:
    found = {}
    for name, parameter in signature.parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, getattr(inspect.unwrap(function), "__globals__", {}))
            except NameError:  # imported under TYPE_CHECKING alone
                continue
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and _is_known(hint):
            found[name] = hint
    return found


def _is_known(hint: Any) -> bool:
    if _is_union(hint):
        return all(_is_known(part) for part in get_args(hint) if part is not type(None))
    if _is_sequence(hint):
        return _is_known(get_args(hint)[0])
    return hint in (bool, int, float, str) or get_origin(hint) is Literal


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def _is_sequence(hint: Any) -> bool:
    """Whether `hint` is a tuple or sequence of one kind, any length."""
    origin, args = get_origin(hint), get_args(hint)
    return origin is collections.abc.Sequence or (origin is tuple and len(args) == 2 and args[1] is Ellipsis)


# ---- conversions by kind --------------------------------------------------------------------------------------------


def _as(value: Any, hint: Any) -> Any:
    if _is_union(hint):
        return _as_one_of(value, get_args(hint))
    if _is_sequence(hint):
        return tuple(_as(_unwrapped(part), get_args(hint)[0]) for part in _parts(value))
    if get_origin(hint) is Literal:
        return _text(value, paths=False)
    return _BY_TYPE[hint](value)


def _as_one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    """Returns the value as the first kind in a union that fits.

    A `Literal` fits only where the value is one of its choices.
    """
    wanted = [hint for hint in hints if hint is not type(None)]
    if len(wanted) < len(hints):
        if value is None:
            return None
        if str not in wanted and isinstance(value, str) and value.strip().lower() in _NONES:
            return None
    for hint in wanted:
        try:
            found = _as(value, hint)
        except _Wrong:
            continue
        if get_origin(hint) is not Literal or found in get_args(hint) or len(wanted) == 1:
            return found
    raise _Wrong


def _unwrapped(value: Any) -> Any:
    """Returns the Python value of an enum member, number, array or tensor.

    numpy's numbers, 0-d arrays and 0-d tensors become Python's numbers.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, NotImplementedError):  # a tensor without data, such as a meta tensor
            raise _Wrong from None
    return value


def _bool(value: Any) -> bool:
    if isinstance(value, str):
        value = _BOOLS.get(value.strip().lower())
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise _Wrong


def _int(value: Any) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = _float(value)
    if isinstance(value, bool):
        raise _Wrong
    if hasattr(value, "__index__"):
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # not a single whole number
            raise _Wrong from None
    number = _float(value)
    if not math.isfinite(number) or number != math.floor(number) or number != value:
        raise _Wrong
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool | complex) or not isinstance(value, numbers.Number | str):
        raise _Wrong
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise _Wrong from None


def _text(value: Any, paths: bool = True) -> str:
    if isinstance(value, str):
        return str.__str__(value)  # subclasses such as numpy's and enums to str
    if paths and isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if paths and isinstance(value, torch.device):
        return str(value)
    raise _Wrong


def _parts(value: Any) -> Iterable[Any]:
    """Returns the values of a list or a separated text.

    Commas or spaces separate values in a text. A single value is a list of one.
    """
    if isinstance(value, str):
        return value.strip().strip("()[]").replace(",", " ").split()
    if isinstance(value, bytes | Mapping | Set) or value is None:  # without an order
        raise _Wrong
    if getattr(value, "ndim", 1) != 1:
        raise _Wrong
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, Iterable) else [value]


_BY_TYPE: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _text}


# ---- descriptions ---------------------------------------------------------------------------------------------------


def _words(hint: Any) -> str:
    if _is_union(hint):
        parts = [_words(part) for part in get_args(hint) if part is not type(None)]
        return " or ".join(parts).replace("one of ", "")
    if _is_sequence(hint):
        return _words(get_args(hint)[0]).replace("a ", "", 1) + "s: one, or a list"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text or a path"}[hint]


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_beta(beta: float) -> None:
    """Checks that beta, the KL's weight, is finite and not negative.

    Raises:
        ValueError: Another value.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is {beta}; expected a number from 0 up: the loss is beta KL - log p(x|z)")
