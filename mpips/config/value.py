"""Converting what was given for a setting, a text or a Python value, to the setting's type."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal

import yaml

from mpips.config.config import Config
from mpips.config.error import check
from mpips.config.field import allowed
from mpips.config.file import NULL, Bare, FileError, value_of

LARGEST = 2**53  # exact in a float64, in which settings travel
WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|\.?(inf|nan))", re.IGNORECASE)


def typed(key: str, kind: Any, given: Any) -> Any:
    """Return a setting's value, converted to its type.

    Args:
        key: the setting's key.
        kind: the setting's type.
        given: a `Bare` text is parsed as this type; any other value must have the type already.

    Raises:
        ConfigError: the value is not of the type.
    """
    try:
        value = _read(kind, given) if isinstance(given, Bare) else _checked(kind, given)
    except (ValueError, OverflowError):  # a number with too many digits
        value = _Wrong
    check(key, given, allowed(kind), value is not _Wrong)
    if isinstance(value, int):
        check(key, given, "a whole number from -2^53 to 2^53", abs(value) <= LARGEST)
    return value


def bare(kind: Any, text: str) -> Any:
    """Return a text of the command line or of a variable as if it stood without quotes in a file; lists are parsed."""
    if typing.get_origin(kind) is tuple:
        with suppress(FileError, yaml.YAMLError):
            value = value_of(text)
            return text if value is None else value
        return text
    return Bare(text)


class _Wrong:
    """A marker: the value is not of the type."""


def _options(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of X | Y; a tuple of the type itself if it is no union."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _read(kind: Any, text: Bare) -> Any:
    """Parse a text as a type; return `_Wrong` if it is not of the type."""
    *_, last = options = _options(kind)
    if type(None) in options:
        if text in NULL:
            return None
        last = options[0]
        if not text:
            return _Wrong
    if options == (int, str):
        return int(text) if WHOLE.fullmatch(text) else _checked(str, str(text))
    if last is bool:
        return {"true": True, "false": False}.get(text.lower(), _Wrong)
    if last is int:
        return int(text) if WHOLE.fullmatch(text) else _Wrong
    if last is float:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if NUMBER.fullmatch(text) else _Wrong
    return _checked(last, str(text))


def _checked(kind: Any, given: Any) -> Any:
    """Check a Python value against a type, and return it; return `_Wrong` if it is not of the type."""
    options = _options(kind)
    if given is None:
        return None if type(None) in options else _Wrong
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    kind = str if isinstance(given, str) and str in options else options[0]
    if typing.get_origin(kind) is tuple:
        whole = isinstance(given, list | tuple) and all(isinstance(item, str) for item in given)
        return tuple(map(str, given)) if whole else _Wrong
    if typing.get_origin(kind) is Literal:
        return given if isinstance(given, str) and given in typing.get_args(kind) else _Wrong
    if kind is str:
        return str(given) if isinstance(given, str) and (given or len(options) == 1) else _Wrong
    if isinstance(given, bool) or kind is bool:
        return given if isinstance(given, bool) and kind is bool else _Wrong
    if kind is float:
        return float(given) if isinstance(given, int | float) else _Wrong
    return int(given) if isinstance(given, int) else _Wrong


def built(values: Mapping[str, Any]) -> Config:
    """Return the tree of settings, given values by dotted key."""
    tree: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, dot, name = key.rpartition(".")
        (groups.setdefault(group, {}) if dot else tree)[name] = value
    kinds = _group_types()
    return Config(**tree, **{group: kinds[group](**branch) for group, branch in groups.items()})


@cache
def _group_types() -> dict[str, Any]:
    """Return the class of each group of settings by its name."""
    return typing.get_type_hints(Config)
