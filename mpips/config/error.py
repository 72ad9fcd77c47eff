"""What a setting that is not allowed ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BAD_CONFIGURATION = 2  # exit status


class ConfigError(ValueError):
    """A setting that is not allowed: names the key, what was given and what is allowed."""


def check(key: str, given: object, allowed: str, ok: bool) -> None:
    """Raise ConfigError unless the setting is `ok`."""
    if not ok:
        raise ConfigError(f"{key}: given {given!r}, allowed: {allowed}")


def meant(name: str, known: Iterable[str]) -> str:
    """The name that was perhaps meant, for the end of an error message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
