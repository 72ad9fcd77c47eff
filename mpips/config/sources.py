"""The sources of settings: flags, variables, a file, arguments; resolved once, before MPI starts."""

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

CONNECT, DEFAULT = "connect", "default"  # origins that error messages leave out

Given = dict[str, tuple[Any, str]]  # key -> what was given, and its origin


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The configuration of a process, the origin of each setting, and whether to print the settings and end."""

    config: Config
    origins: Mapping[str, str]
    print_config: bool


def _variable(key: str) -> str:
    """Return the name of a setting's environment variable."""
    return f"MPIPS_{key.replace('.', '__').upper()}"


def _check_variables(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable that begins with MPIPS_ and names no setting."""
    known = {"MPIPS_CONFIG", *map(_variable, fields())}
    for name in environ:
        if name.startswith("MPIPS_") and name not in known | {"MPIPS_LAUNCH_DIR", line.SET}:  # those of the launcher
            raise unknown(name, known, "variable")


def resolve(arguments: Mapping[str, Any], argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of this process; arguments and errors are those of `trace`."""
    return trace(arguments, argv).config


def trace(arguments: Mapping[str, Any], argv: Sequence[str] | None = None) -> Resolved:
    """Return the configuration of this process, with the origin of each setting.

    Args:
        arguments: the arguments of `connect`; nested settings as dicts (`checkpoint={"every": 50}`).
        argv: flags of mpips only, with or without the prefix `--mpips.`. If None, the flags of this process: those with the
            prefix on the script's command line, and those of a parser that has seen `add_arguments`.

    Raises:
        ConfigError: one line with the key, what was given and what is allowed.
    """
    flags = handed() | line.on_the_line() if argv is None else line.texts(line.split(argv, bare=True)[1])
    outside, printing = _from_outside(flags, os.environ)
    given = dict(flatten(arguments))
    _check_known(given, CONNECT)
    given = {key: (value, CONNECT) for key, value in given.items()} | outside
    origins = dict.fromkeys(fields(), DEFAULT) | {key: origin for key, (_, origin) in given.items()}
    return Resolved(_built(given), origins, printing)


def foreseen(settings: Mapping[str, str], argv: Sequence[str]) -> Resolved:
    """Return the configuration that a script will get if it is started here, as far as it can be known from outside.

    Args:
        settings: the values of `mpips run --set`.
        argv: the script's command line.

    Returns:
        The configuration. Settings that only the script can give have their defaults.

    Raises:
        ConfigError: as `trace`.
    """
    outside, printing = _from_outside(line.texts(line.split(argv)[1]), os.environ | {line.SET: json.dumps(settings)})
    return Resolved(_built(outside), {key: origin for key, (_, origin) in outside.items()}, printing)


def whence(error: ConfigError, origins: Mapping[str, str]) -> ConfigError:
    """Return the error with the setting's origin appended, unless the origin is the script or the default."""
    origin = origins.get(str(error).partition(":")[0], CONNECT)
    return error if origin in (CONNECT, DEFAULT) else ConfigError(f"{error} ({cut(origin)})")


def _from_outside(flags: line.Texts, environ: Mapping[str, str]) -> tuple[Given, bool]:
    """Return what flags, variables and the file say, and whether to print the settings and end."""
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
    """Return the configuration: the defaults, overridden by what was given."""
    kinds = fields()
    try:
        return built({key: typed(key, kinds[key][0], value) for key, (value, _) in given.items()})
    except ConfigError as error:
        raise whence(error, {key: origin for key, (_, origin) in given.items()}) from None


def _check_known(settings: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError for a key that is no setting."""
    for key, value in settings.items():
        try:
            if key in GROUPS:
                check(key, value, ", ".join(k for k in fields() if k.startswith(f"{key}.")), False)
            if key not in fields():
                raise unknown(key, fields())
        except ConfigError as error:
            raise whence(error, {str(error).partition(":")[0]: origin}) from None
