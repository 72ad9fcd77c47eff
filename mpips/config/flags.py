"""The flags of mpips in a script's own argument parser, for scripts that want them there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mpips.config.field import allowed
from mpips.config.line import Texts, known

_handed: dict[str, str] = {}  # key -> the value that the script's parser got


class _Handed(argparse.Action):
    """An argparse action that stores its value in mpips and leaves nothing in the script's namespace.

    `sys.argv` is not searched, because only the parser knows which flags are its own: another parser, a sub-command or a later
    `conflict_handler="resolve"` may have a flag of the same name.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _handed[self.dest.removeprefix("mpips.")] = str(values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mpips to a script's `argparse` parser; their values become settings of `connect`.

    A flag that the parser already has stays the script's, and mpips does not read it; use `--mpips.KEY` for that setting. Call
    `parse_args` or `parse_known_args` before `connect`. The namespace that they return is the same as without mpips' flags.
    """
    parser.allow_abbrev = False  # else an unknown --rul would match --rule
    group = parser.add_argument_group("mpips")
    for key, (kind, text) in known().items():
        if f"--{key}" in parser._option_string_actions:
            continue
        switch = kind is bool
        group.add_argument(
            f"--{key}",
            action=_Handed,
            dest=f"mpips.{key}",
            default=argparse.SUPPRESS,
            metavar="FILE" if key == "config" else "X",
            nargs="?" if switch else None,
            const="true" if switch else None,
            type=_switch if switch else str,
            help=f"{text} ({allowed(kind)})".replace("%", "%%"),
        )


def handed() -> Texts:
    """Return the values that the script's parsers have stored, and their origins."""
    return {key: (text, f"flag --{key}") for key, text in _handed.items()}


def _switch(text: str) -> str:
    """Return a boolean flag's value; raise ArgumentTypeError if it is none."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"given {text!r}, allowed: true or false; before a positional write --flag=true")
    return text
