"""mpips' flags among those of a script."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpips.config.config import GROUPS
from mpips.config.error import ConfigError, meant
from mpips.config.field import allowed, fields

SAID = ("true", "false", "yes", "no", "on", "off", "1", "0")  # after a boolean flag: its value and no word of the script's


def flags_of(argv: Sequence[str]) -> list[str]:
    """The flags in `argv` that are ours, as `--key=value`; the script's own flags are left to the script.

    Raises:
        ConfigError: an unknown flag of one of our groups, or one of ours without a value.
    """
    known = {key: kind for key, (kind, _) in fields().items()} | {"config": str}
    ours, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            break
        name, equals, _ = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            continue
        if name not in known:
            if name.split(".")[0] in GROUPS and ("." in name or name in ("checkpoint", "stop")):
                raise ConfigError(f"--{name}: no such setting{meant(name, known)}")
        elif equals:
            ours.append(token)
        elif known[name] is bool and (not rest or rest[0].lower() not in SAID):
            ours.append(f"--{name}=true")
        elif rest:
            ours.append(f"--{name}={rest.pop(0)}")
        else:
            raise ConfigError(f"--{name}: given nothing, allowed: {allowed(known[name])}")
    return ours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a script's own `argparse` parser accept and list mpips' flags; `connect` reads them from the command line."""
    parser.allow_abbrev = False  # `connect` knows no abbreviations
    group = parser.add_argument_group("mpips")
    flags: dict[str, tuple[str, str | None, str]] = {"config": ("FILE", None, "YAML file with any of these settings")}
    for key, (kind, text) in fields().items():
        flags[key] = ("X", "?" if kind is bool else None, f"{text} ({allowed(kind)})")
    for key, (metavar, nargs, text) in flags.items():
        if f"--{key}" not in parser._option_string_actions:  # the script's own flag of that name serves both
            group.add_argument(f"--{key}", metavar=metavar, nargs=nargs, type=_switch if nargs else str, help=text)


def _switch(text: str) -> str:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"given {text!r}, allowed: true or false; before a positional write --flag=true")
    return text
