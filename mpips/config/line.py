"""Flags that no parser of a script has to know: `--mpips.KEY VALUE` on its line, and `mpips run --set KEY=VALUE`.

`import mpips` takes the first kind out of `sys.argv`, so that a strict parser does not stumble over them. The second kind
comes in a variable of the launcher's.
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
SET = "MPIPS_SET"  # the launcher's variable: what was given to `--set`, as JSON
SAID = ("true", "false", "yes", "no", "on", "off", "1", "0")  # after a boolean flag: its value and no word of the script's
ALSO: dict[str, tuple[Any, str]] = {  # flags that are no settings
    "config": (str, "YAML file with any of these settings"),
    "print_config": (bool, "print all settings and where each comes from, and end"),
}

Texts = dict[str, tuple[str, str]]  # key -> what was given, and where


@dataclass(frozen=True)
class Flag:
    """One flag as it stood on the line; `text` is None where a value is missing."""

    name: str  # with its dashes
    key: str
    text: str | None


_taken: list[Flag] = []
_line: tuple[list[str], list[str]] = [], []  # before and after the taking


def known() -> dict[str, tuple[Any, str]]:
    """Key -> (type, help) of all that a flag may give."""
    return ALSO | fields()


def take_flags() -> None:
    """Move our flags and their values out of `sys.argv`. What is wrong with them is said when the settings are resolved."""
    before = sys.argv[1:]
    rest, ours = split(before)
    _taken.extend(ours)
    _line[0][:], _line[1][:] = before, rest
    sys.argv[1:] = rest


def whole_line() -> list[str]:
    """The command line with what was taken back in its place: of a launcher's line it belongs to the ranks."""
    before, after = _line
    return list(before) if sys.argv[1:] == after else sys.argv[1:]


def split(argv: Sequence[str], *, bare: bool = False) -> tuple[list[str], list[Flag]]:
    """The script's words, and our flags. With `bare` the settings' names are ours without the prefix, too."""
    kinds = {key: kind for key, (kind, _) in known().items()}
    rest: list[str] = []
    ours: list[Flag] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":  # behind it are no flags
            return [*rest, word, *words], ours
        name, equals, text = word.partition("=")
        key = name.removeprefix(PREFIX)
        if key == name and bare and name.startswith("--") and name[2:] in kinds:
            key = name[2:]
        if key == name:
            rest.append(word)
        elif equals:
            ours.append(Flag(name, key, text))
        elif kinds.get(key) is bool:
            ours.append(Flag(name, key, words.pop(0) if words and words[0].lower() in SAID else "true"))
        else:  # of an unknown one as well: what follows is its value more often than the script's
            ours.append(Flag(name, key, words.pop(0) if words and not words[0].startswith("--") else None))
    return rest, ours


def on_the_line() -> Texts:
    """Our flags of this process, those also that came to `sys.argv` after the import.

    Raises:
        ConfigError: an unknown one, or one without a value.
    """
    return texts([*_taken, *split(sys.argv[1:])[1]])


def texts(flags: Iterable[Flag]) -> Texts:
    """The flags by key, the last one of each.

    Raises:
        ConfigError: an unknown one, or one without a value.
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
    """What was given to `mpips run --set`.

    Raises:
        ConfigError: an unknown setting, or something that the launcher has not written.
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
