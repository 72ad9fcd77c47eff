"""Where settings come from: flags, variables, a file, arguments; resolved once, before MPI starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpips.config.config import GROUPS, Config, flatten
from mpips.config.error import ConfigError, check, meant
from mpips.config.field import allowed, fields
from mpips.config.flags import flags_of

NULL = ("", "~", "null", "Null", "NULL")


def _variable(key: str) -> str:
    """The environment variable of a setting."""
    return f"MPIPS_{key.replace('.', '__').upper()}"


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {"MPIPS_CONFIG", "MPIPS_LAUNCH_DIR", *map(_variable, fields())}
    for name in environ:
        if name.startswith("MPIPS_") and name not in known:
            raise ConfigError(f"{name}: no such variable{meant(name, known)}")


def resolve(arguments: Mapping[str, Any], argv: Sequence[str] | None = None) -> Config:
    """The configuration of this process.

    Args:
        arguments: what the script gave to `connect`; nested settings as dicts (`checkpoint={"every": 50}`).
        argv: the command line, `sys.argv[1:]` when None.

    Raises:
        ConfigError: one line with the key, what was given and what is allowed.
    """
    import jsonargparse

    _check_variables(os.environ)
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in flags_of(sys.argv[1:] if argv is None else argv))
    variables = {key: os.environ[name] for key in fields() if (name := _variable(key)) in os.environ}
    path = flags.pop("config", None) or os.environ.get("MPIPS_CONFIG")
    texts = (_read(path) if path else {}) | variables | flags
    given = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in flatten("", arguments)}
    _check_known(given)
    parser = jsonargparse.ArgumentParser(prog="mpips", exit_on_error=False, default_env=False)
    parser.add_class_arguments(Config)
    try:
        parser.set_defaults(dict(flatten("", parser.parse_object(given).as_dict())))  # checked on its way in
        tree = parser.parse_args([f"--{key}={text}" for key, text in texts.items()])
        for key, text in texts.items():
            if tree[key] is None and str in typing.get_args(fields()[key][0]) and text not in NULL:
                tree[key] = text  # "#1", of which YAML makes a comment
        _check_present(dict(flatten("", tree.as_dict())))
        return typing.cast(Config, _instance(Config, tree.as_dict()))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises several kinds, all about the settings
        raise ConfigError(_one_line(str(error))) from None


def _read(path: str) -> dict[str, str]:
    """The settings in a YAML file as texts, the way flags are given: `resume: no` is then no boolean, and no tag acts."""
    try:
        tree = yaml.BaseLoader(Path(path).read_text()).get_single_data()
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config: given {path!r}, allowed: a YAML file that can be read ({reason})") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"config: given {path!r}, which holds {tree!r}, allowed: a YAML file with `setting: value` lines")
    settings = dict(flatten("", tree or {}))
    _check_known(settings)
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in settings.items()}


def _check_known(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in GROUPS:
            raise ConfigError(f"{key}: given {value!r}, allowed: {', '.join(k for k in fields() if k.startswith(f'{key}.'))}")
        if key not in fields():
            raise ConfigError(f"{key}: no such setting{meant(str(key), fields())}")


def _check_present(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a None where none is allowed, which jsonargparse takes for a setting not given."""
    for key, (kind, _) in fields().items():
        check(key, settings[key], allowed(kind), settings[key] is not None or type(None) in typing.get_args(kind))


def _instance(cls: type, tree: Mapping[str, Any]) -> object:
    hints = typing.get_type_hints(cls)
    values = {}
    for f in dataclasses.fields(cls):
        value = tree[f.name]
        if dataclasses.is_dataclass(hints[f.name]):
            value = _instance(typing.cast(type, hints[f.name]), value)
        values[f.name] = value
    return cls(**values)


def _one_line(message: str) -> str:
    """jsonargparse's paragraph as: key, what was given, what is allowed."""
    key = re.search(r'key "([^"]+)"', message)
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    if key and given and key[1] in fields():
        return f"{key[1]}: given {given[1]!r}, allowed: {allowed(fields()[key[1]][0])}"
    return " ".join(message.split())
