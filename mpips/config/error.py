"""What a setting that is not allowed ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BAD_CONFIGURATION = 2  # exit status
LONGEST = 100  # characters of what was given that a message shows


class ConfigError(ValueError):
    """A setting that is not allowed: names the key, what was given and what is allowed."""


def check(key: str, given: object, allowed: str, ok: bool) -> None:
    """Raise ConfigError unless the setting is `ok`."""
    if not ok:
        raise ConfigError(f"{key}: given {shown(given)}, allowed: {allowed}")


def shown(given: object) -> str:
    """Whatever was given, in part of a line."""
    try:
        text = repr(given)
    except Exception:  # of somebody else's class, or nested too deeply
        text = f"a {type(given).__name__}"
    return cut(" ".join(text.splitlines()))


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def meant(name: str, known: Iterable[str]) -> str:
    """The name that was perhaps meant, for the end of an error message."""
    near = difflib.get_close_matches(name[:LONGEST], list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def unknown(name: object, known: Iterable[str], what: str = "setting") -> ConfigError:
    """The error about a name that none of the `known` is."""
    plain = isinstance(name, str) and name.isprintable() and name.strip() == name != ""
    return ConfigError(f"{cut(str(name)) if plain else shown(name)}: no such {what}{meant(str(name), known)}")
