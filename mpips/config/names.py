"""Settings that name an entry of another module's table: mode, rule and codec."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from mpips.config.config import Config
from mpips.config.error import check

PACKAGE = Path(__file__).parents[1]


def check_mode(name: str, modes: Iterable[str]) -> None:
    """Raise ConfigError if `name` is none of the modes."""
    known = list(modes)
    check("mode", name, ", ".join(known), name in known)


def check_rule(name: str, rules: Iterable[str]) -> None:
    """Raise ConfigError if `name` is neither one of the rules nor the full name of a class."""
    known = list(rules)
    place, _, attribute = name.rpartition(":" if ":" in name else ".")
    allowed = f"{', '.join(known)}, or a class by its name, package.module:Class"
    check("rule", name, allowed, name in known or bool(place and attribute))


def check_codec(name: str, codecs: Iterable[str]) -> None:
    """Raise ConfigError if `name` is none of the codecs."""
    known = list(codecs)
    check("comm_dtype", name, ", ".join(known), name in known)


def codec_names() -> list[str]:
    """Return the names of the codecs."""
    return _names("comm/codecs.py", "CODECS")


def check_names(config: Config) -> None:
    """Check mode, rule and codec without importing the modules with the tables, which would import torch."""
    check_codec(config.comm_dtype, codec_names())
    check_mode(config.mode, _names("algorithms/modes.py", "MODES"))
    check_rule(config.rule, _names("rules/__init__.py", "RULES"))


def _names(file: str, table: str) -> list[str]:
    """Return the keys of a table in a source file of this package."""
    for line in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == table:
            assert isinstance(line.value, ast.Dict)
            return [ast.literal_eval(name) for name in line.value.keys if name is not None]
    raise AssertionError(f"{file} has no table {table}")
