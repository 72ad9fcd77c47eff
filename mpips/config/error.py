"""The error for a setting that is not allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BAD_CONFIGURATION = 2  # exit status
LONGEST = 100  # characters of a given value that a message shows


class ConfigError(ValueError):
    """A setting that is not allowed. The message names the key, what was given and what is allowed."""


def check(key: str, given: object, allowed: str, ok: bool) -> None:
    """Raise ConfigError unless the setting is `ok`."""
    if not ok:
        raise ConfigError(f"{key}: given {shown(given)}, allowed: {allowed}")


def shown(given: object) -> str:
    """Return a given value as text that fits into a line."""
    try:
        text = repr(given)
    except Exception:  # a foreign class's __repr__, or too deep nesting
        text = f"a {type(given).__name__}"
    return cut(" ".join(text.splitlines()))


def cut(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def meant(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt name, to end an error message; empty if no known name is similar."""
    similar = difflib.get_close_matches(name[:LONGEST], list(known), n=1, cutoff=0.5)
    return f"; did you mean {similar[0]}?" if similar else ""


def unknown(name: object, known: Iterable[str], what: str = "setting") -> ConfigError:
    """Return the error for a name that is not `known`."""
    plain = isinstance(name, str) and name.isprintable() and name.strip() == name != ""
    return ConfigError(f"{cut(str(name)) if plain else shown(name)}: no such {what}{meant(str(name), known)}")
