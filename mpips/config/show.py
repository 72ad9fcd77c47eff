"""The resolved settings as YAML, with the origin of each in a comment."""

from __future__ import annotations

from typing import Any

import yaml

from mpips.config.sources import Resolved

WIDEST = 40  # columns before the comments; a longer value shifts only its own comment


def show(resolved: Resolved) -> str:
    """Return a YAML file of these settings, each with its origin in a comment."""
    settings, group = [], ""
    for key, value in resolved.config.settings().items():
        branch, _, name = key.rpartition(".")
        head = f"{branch}:\n" if branch not in ("", group) else ""
        group = branch
        settings.append((head, f"{'  ' if branch else ''}{name}: {_value(value)}", _one_line(resolved.origins[key])))
    width = max(len(text) for _, text, _ in settings if len(text) <= WIDEST)
    return "".join(f"{head}{text:{width}}  # {origin}\n" for head, text, origin in settings)


def _value(value: Any) -> str:
    """Return a value in one line of YAML."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, allow_unicode=not style, width=float("inf"))
    return text.strip()[1:-1]


def _one_line(origin: str) -> str:
    """Return an origin without line breaks."""
    return origin if origin.isprintable() else _value(origin)
