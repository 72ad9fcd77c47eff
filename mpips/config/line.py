"""Flags that a script's parser need not know: `--mpips.KEY VALUE` on its command line, and `mpips run --set KEY=VALUE`.

`import mpips` removes the first kind from `sys.argv`, so that a strict parser does not fail on them. The launcher passes the
second kind in an environment variable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpips.config.error import ConfigError, check, unknown
from mpips.config.field import allowed, fields

PREFIX = "--mpips."
SET = "MPIPS_SET"  # the launcher's variable: the values of `--set`, as JSON
SAID = ("true", "false", "yes", "no", "on", "off", "1", "0")  # a boolean flag's value; other words are the script's
ALSO: dict[str, tuple[Any, str]] = {  # flags that are not settings
    "config": (str, "YAML file with any of these settings"),
    "print_config": (bool, "print all settings and where each comes from, and end"),
}

Texts = dict[str, tuple[str, str]]  # key -> what was given, and its origin


@dataclass(frozen=True)
class Flag:
    """One flag as given on the command line; `text` is None if its value is missing."""

    name: str  # with dashes
    key: str
    text: str | None


_taken: list[Flag] = []
_line: tuple[list[str], list[str]] = [], []  # the command line before and after `take_flags`


def known() -> dict[str, tuple[Any, str]]:
    """Return key -> (type, help) for every flag."""
    return ALSO | fields()


def take_flags() -> None:
    """Move the flags of mpips and their values out of `sys.argv`. Errors in them are raised when the settings are resolved."""
    before = sys.argv[1:]
    rest, flags = split(before)
    _taken.extend(flags)
    _line[0][:], _line[1][:] = before, rest
    sys.argv[1:] = rest


def whole_line() -> list[str]:
    """Return the command line including the flags that `take_flags` removed: a launcher passes it to the ranks."""
    before, after = _line
    return list(before) if sys.argv[1:] == after else sys.argv[1:]


def split(argv: Sequence[str], *, bare: bool = False) -> tuple[list[str], list[Flag]]:
    """Return the script's words, and the flags of mpips. With `bare`, `--KEY` without the prefix is a flag of mpips, too."""
    kinds = {key: kind for key, (kind, _) in known().items()}
    rest: list[str] = []
    flags: list[Flag] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":  # no flags follow it
            return [*rest, word, *words], flags
        name, equals, text = word.partition("=")
        key = name.removeprefix(PREFIX)
        if key == name and bare and name.startswith("--") and name[2:] in kinds:
            key = name[2:]
        if key == name:
            rest.append(word)
        elif equals:
            flags.append(Flag(name, key, text))
        elif kinds.get(key) is bool:
            flags.append(Flag(name, key, words.pop(0) if words and words[0].lower() in SAID else "true"))
        else:  # for an unknown flag, too: the next word is probably its value
            flags.append(Flag(name, key, words.pop(0) if words and not words[0].startswith("--") else None))
    return rest, flags


def on_the_line() -> Texts:
    """Return the flags of this process, including those added to `sys.argv` after the import.

    Raises:
        ConfigError: a flag is unknown, or lacks a value.
    """
    return texts([*_taken, *split(sys.argv[1:])[1]])


def texts(flags: Iterable[Flag]) -> Texts:
    """Return the flags by key; the last one of each counts.

    Raises:
        ConfigError: a flag is unknown, or lacks a value.
    """
    found: Texts = {}
    kinds = {key: kind for key, (kind, _) in known().items()}
    for flag in flags:
        if flag.key not in kinds:
            raise unknown(flag.name, [PREFIX + key for key in kinds])
        if flag.text is None:
            raise ConfigError(f"{flag.name}: given nothing, allowed: {allowed(kinds[flag.key])}")
        found[flag.key] = flag.text, f"flag {flag.name}"
    return found


def from_launcher(environ: Mapping[str, str]) -> Texts:
    """Return the values of `mpips run --set`.

    Raises:
        ConfigError: a setting is unknown, or the variable was not written by the launcher.
    """
    try:
        given = json.loads(environ.get(SET, "{}"))
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        check(SET, environ[SET], 'what mpips run --set writes there, e.g. {"clip": "1.0"}', False)
    for key in given:
        if key not in known():
            raise ConfigError(f"{unknown(key, known())} (--set)")
    return {key: (text, "--set") for key, text in given.items()}
