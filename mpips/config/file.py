"""A YAML file of settings, read as texts, so that `resume: no` is not a boolean and no tag is executed.

Settings need neither aliases, tags, duplicate names nor deep nesting, so these are refused while the file is parsed. Thus no
file takes long (aliases multiply), loses a value (YAML's own readers drop one of two duplicates) or exhausts the stack.
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
DEEPEST = 3  # levels: the file, a group, a list, a name


class Bare(str):
    """A text without quotes, which the setting's type is to interpret."""

    __slots__ = ()


class FileError(ValueError):
    """A construct that a file of settings cannot have. The message gives the line and the construct."""


def settings_of(path: str) -> dict[str, Any]:
    """Return the settings in a file by dotted key, uninterpreted: texts, `Bare` texts, and lists of them.

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
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: invalid UTF-8, NUL in the path
        raise ConfigError(f"config: given {shown(path)}, allowed: a YAML file of settings ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Return the reason of an error as part of a line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {cut(error.problem or '')}"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return cut(" ".join(words.split()))


def value_of(text: str) -> Any:
    """Return the contents of one YAML document: a text, a list or a dict; None if it is empty.

    Raises:
        FileError: the document has a construct that settings do not need.
        yaml.YAMLError: the text is no YAML.
    """
    events = (event for event in yaml.parse(text, Loader=yaml.BaseLoader) if not isinstance(event, _AROUND))
    first = next(events, None)
    value = None if first is None else _value(first, events, 0)
    if (more := next(events, None)) is not None:
        raise FileError(f"{_line(more)}: a second document, expected one")
    return value


_AROUND = yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent


def _content(path: str) -> str:
    """Return the text of the file."""
    # Each rank reads the file, so a pipe cannot serve; opening one without a writer would block.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileError("it is no file, expected one that each rank can read")
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise FileError(f"it has more than {LARGEST:,} bytes")
    return content.decode("utf-8-sig")


def _value(event: Any, events: Iterator[Any], depth: int) -> Any:
    """Return the value that begins with `event`."""
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
    """Return the name in a YAML event."""
    if not isinstance(event, yaml.ScalarEvent):
        raise FileError(f"{_line(event)}: a list or more settings in the place of a name")
    return str(_value(event, iter(()), 0))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; raise FileError for a duplicate name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FileError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _line(event: Any) -> str:
    """Return the line of an event, for an error message."""
    return f"line {event.start_mark.line + 1}"
