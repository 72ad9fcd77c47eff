"""Where settings come from: flags, variables, a file, arguments; resolved once, before MPI starts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mpips.config import line
from mpips.config.config import GROUPS, Config, flatten
from mpips.config.error import ConfigError, check, cut, unknown
from mpips.config.field import fields
from mpips.config.file import Bare, settings_of
from mpips.config.flags import handed
from mpips.config.value import bare, built, typed

CONNECT, DEFAULT = "connect", "default"  # origins of which a message need not speak

Given = dict[str, tuple[Any, str]]  # key -> what was given, and where


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The configuration of a process, where each setting comes from, and whether it was asked to print that and end."""

    config: Config
    origins: Mapping[str, str]
    print_config: bool


def _variable(key: str) -> str:
    """The environment variable of a setting."""
    return f"MPIPS_{key.replace('.', '__').upper()}"


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {"MPIPS_CONFIG", *map(_variable, fields())}
    for name in environ:
        if name.startswith("MPIPS_") and name not in known | {"MPIPS_LAUNCH_DIR", line.SET}:  # the launcher's
            raise unknown(name, known, "variable")


def resolve(arguments: Mapping[str, Any], argv: Sequence[str] | None = None) -> Config:
    """The configuration of this process; arguments and errors as those of `trace`."""
    return trace(arguments, argv).config


def trace(arguments: Mapping[str, Any], argv: Sequence[str] | None = None) -> Resolved:
    """The configuration of this process, and where it comes from.

    Args:
        arguments: what the script gave to `connect`; nested settings as dicts (`checkpoint={"every": 50}`).
        argv: flags that are all ours, with or without the prefix `--mpips.`. When None, what this process was given: the
            script's own line is read only for flags with the prefix, and through a parser that has seen `add_arguments`.

    Raises:
        ConfigError: one line with the key, what was given and what is allowed.
    """
    flags = handed() | line.on_the_line() if argv is None else line.texts(line.split(argv, bare=True)[1])
    said, printing = _said(flags, os.environ)
    given = dict(flatten(arguments))
    _check_known(given, CONNECT)
    given = {key: (value, CONNECT) for key, value in given.items()} | said
    origins = dict.fromkeys(fields(), DEFAULT) | {key: origin for key, (_, origin) in given.items()}
    return Resolved(_built(given), origins, printing)


def foreseen(settings: Mapping[str, str], argv: Sequence[str]) -> Resolved:
    """What a script started here will be told, as far as it can be seen from outside.

    Args:
        settings: what was given to `mpips run --set`.
        argv: the script's line.

    Returns:
        The configuration, with defaults where nothing but the script may say something.

    Raises:
        ConfigError: as `trace`.
    """
    said, printing = _said(line.texts(line.split(argv)[1]), os.environ | {line.SET: json.dumps(settings)})
    return Resolved(_built(said), {key: origin for key, (_, origin) in said.items()}, printing)


def whence(error: ConfigError, origins: Mapping[str, str]) -> ConfigError:
    """The error about a setting with where that comes from, unless it is the script's own or nobody's."""
    origin = origins.get(str(error).partition(":")[0], CONNECT)
    return error if origin in (CONNECT, DEFAULT) else ConfigError(f"{error} ({cut(origin)})")


def _said(flags: line.Texts, environ: Mapping[str, str]) -> tuple[Given, bool]:
    """What flags, variables and a file say; whether to print the settings and end."""
    _check_variables(environ)
    flags = flags | line.from_launcher(environ)
    kinds = {key: kind for key, (kind, _) in fields().items()}
    printing = typed("print_config", bool, Bare(flags.pop("print_config", ("false", ""))[0]))
    variables = {key: (environ[name], f"variable {name}") for key in kinds if (name := _variable(key)) in environ}
    path = flags.pop("config", (environ.get("MPIPS_CONFIG"), ""))[0]
    in_file = {} if path is None else settings_of(path)
    _check_known(in_file, f"file {path}")
    texts = {key: (bare(kinds[key], text), origin) for key, (text, origin) in (variables | flags).items()}
    return {key: (value, f"file {path}") for key, value in in_file.items()} | texts, printing


def _built(given: Given) -> Config:
    """The defaults with what was given over them."""
    kinds = fields()
    try:
        return built({key: typed(key, kinds[key][0], value) for key, (value, _) in given.items()})
    except ConfigError as error:
        raise whence(error, {key: origin for key, (_, origin) in given.items()}) from None


def _check_known(settings: Mapping[str, Any], origin: str) -> None:
    for key, value in settings.items():
        try:
            if key in GROUPS:
                check(key, value, ", ".join(k for k in fields() if k.startswith(f"{key}.")), False)
            if key not in fields():
                raise unknown(key, fields())
        except ConfigError as error:
            raise whence(error, {str(error).partition(":")[0]: origin}) from None
