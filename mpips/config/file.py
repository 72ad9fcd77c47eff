"""A YAML file of settings, read as texts: `resume: no` is then no boolean, and no tag acts.

What settings have no use for is refused as it is met, so that no file takes long or goes deep: aliases, which multiply;
tags; names given twice, of which YAML's own readers drop one; more levels than a group, its setting and a list.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import yaml

from mpips.config.config import flatten
from mpips.config.error import ConfigError, cut, shown

NULL = ("~", "null", "Null", "NULL")
LARGEST = 10**6  # bytes
DEEPEST = 3  # the file, a group, a list, a name


class Bare(str):
    """A text without quotes, which a setting's type makes something of."""

    __slots__ = ()


class FileError(ValueError):
    """What a file of settings cannot hold: says where and what."""


def settings_of(path: str) -> dict[str, Any]:
    """The settings in a file, by dotted key, as they stand there: texts, `Bare` ones, lists of them.

    Raises:
        ConfigError: one line with the file's name and what is wrong in it.
    """
    try:
        tree = value_of(_content(path))
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise FileError(f"it holds {shown(tree)}, expected lines as `setting: value`")
        return _once(flatten(tree))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: also no UTF-8, NUL in the path
        raise ConfigError(f"config: given {shown(path)}, allowed: a YAML file of settings ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {cut(error.problem or '')}"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return cut(" ".join(words.split()))


def value_of(text: str) -> Any:
    """One YAML document: None if there is nothing in it, else a text, a list or a dict.

    Raises:
        FileError, yaml.YAMLError: there is something in it that settings have no use for; it is no YAML.
    """
    events = (event for event in yaml.parse(text, Loader=yaml.BaseLoader) if not isinstance(event, _AROUND))
    first = next(events, None)
    value = None if first is None else _value(first, events, 0)
    if (more := next(events, None)) is not None:
        raise FileError(f"{_line(more)}: a second document, expected one")
    return value


_AROUND = yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent


def _content(path: str) -> str:
    # Each rank reads it, so a pipe will not do; and one that nobody writes to would be waited for.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileError("it is no file, expected one that each rank can read")
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise FileError(f"it has more than {LARGEST:,} bytes")
    return content.decode("utf-8-sig")


def _value(event: Any, events: Iterator[Any], depth: int) -> Any:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise FileError(f"{_line(event)}: an anchor or alias, {event.anchor}, expected the value itself")
    if event.tag is not None:
        raise FileError(f"{_line(event)}: a tag, {event.tag}, expected none")
    if depth > DEEPEST:
        raise FileError(f"{_line(event)}: nested more than {DEEPEST} levels deep")
    if isinstance(event, yaml.ScalarEvent):
        return Bare(event.value or "null") if event.style is None else event.value
    inside = takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, depth + 1) for item in inside]
    return _once((_name(key), _value(next(events), events, depth + 1)) for key in inside)


def _name(event: Any) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise FileError(f"{_line(event)}: a list or more settings in the place of a name")
    return str(_value(event, iter(()), 0))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FileError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _line(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"
