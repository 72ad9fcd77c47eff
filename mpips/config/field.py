"""The type and the help of each setting."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import Any, Literal

from mpips.config.config import Config


@cache
def fields(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (type, help) for every setting."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[Any, str]] = {}
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            found |= fields(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = (kind, str(f.metadata["help"]))
    return found


def allowed(kind: Any) -> str:
    """Return a setting's type in words."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, options))
    if typing.get_origin(kind) is tuple:
        return "a list of names, as [a,b]"
    if options:  # X | None, X | Y
        return " or ".join(allowed(option) for option in options)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[kind]
