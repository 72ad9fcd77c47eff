"""mpips' flags in a script's own parser, where the script wants them there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mpips.config.field import allowed
from mpips.config.line import Texts, known

_handed: dict[str, str] = {}  # key -> what parsers were given


class _Handed(argparse.Action):
    """Hands its value to mpips; in the script's namespace it leaves nothing.

    Only the parser knows whose a flag is: another parser, a sub-command or a later `conflict_handler="resolve"` may have one
    of the same name. So nothing is looked for in `sys.argv`.
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
    """Let a script's own `argparse` parser accept and list mpips' flags; what it is given for them goes to `connect`.

    Flags that the parser already has are the script's, and mpips does not read them; `--mpips.KEY` is there for those. Call
    `parse_args` or `parse_known_args` before `connect`. Their result is what it would be without mpips' flags.
    """
    parser.allow_abbrev = False  # else an unknown --rul would be our --rule
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
    """What the script's parsers were given for us."""
    return {key: (text, f"flag --{key}") for key, text in _handed.items()}


def _switch(text: str) -> str:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"given {text!r}, allowed: true or false; before a positional write --flag=true")
    return text
