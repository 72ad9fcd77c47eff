"""Where settings come from: flags, variables, a file, arguments; resolved once, before MPI starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpips.config import line
from mpips.config.config import GROUPS, Config, flatten
from mpips.config.error import ConfigError, check, meant
from mpips.config.field import allowed, fields
from mpips.config.flags import handed

NULL = ("", "~", "null", "Null", "NULL")


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
            raise ConfigError(f"{name}: no such variable{meant(name, known)}")


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
    _check_variables(os.environ)
    flags = handed() | line.on_the_line() if argv is None else line.texts(line.split(argv, bare=True)[1])
    flags |= line.from_launcher(os.environ)
    printing = _switch(flags.pop("print_config", ("false", ""))[0])
    names = {key: _variable(key) for key in fields()}
    variables = {key: (os.environ[name], f"variable {name}") for key, name in names.items() if name in os.environ}
    path = flags.pop("config", ("", ""))[0] or os.environ.get("MPIPS_CONFIG")
    texts = (_read(path) if path else {}) | variables | flags
    given = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in flatten("", arguments)}
    _check_known(given)
    config = _parse(given, {key: text for key, (text, _) in texts.items()})
    origins = dict.fromkeys(fields(), "default") | dict.fromkeys(given, "connect")
    return Resolved(config, origins | {key: origin for key, (_, origin) in texts.items()}, printing)


def check_set(given: Mapping[str, str]) -> None:
    """Raise ConfigError for what `mpips run --set` cannot set, before a rank is started for it."""
    texts = {key: text for key, (text, _) in line.from_launcher({line.SET: json.dumps(given)}).items()}
    _switch(texts.pop("print_config", "false"))
    if path := texts.pop("config", ""):
        _read(path)
    _parse({}, texts)


def _switch(text: str) -> bool:
    check("print_config", text, allowed(bool), text.lower() in ("true", "false"))
    return text.lower() == "true"


def _parse(given: Mapping[str, Any], texts: Mapping[str, str]) -> Config:
    """The defaults with what was `given` to `connect` over them, and `texts` over that."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="mpips", exit_on_error=False, default_env=False)
    parser.add_class_arguments(Config)
    try:
        parser.set_defaults(dict(flatten("", parser.parse_object(dict(given)).as_dict())))  # checked on its way in
        tree = parser.parse_args([f"--{key}={text}" for key, text in texts.items()])
        for key, text in texts.items():
            if tree[key] is None and str in typing.get_args(fields()[key][0]) and text not in NULL:
                tree[key] = text  # "#1", of which YAML makes a comment
        _check_present(dict(flatten("", tree.as_dict())))
        return typing.cast(Config, _instance(Config, tree.as_dict()))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises several kinds, all about the settings
        raise ConfigError(_one_line(str(error), texts)) from None


def _read(path: str) -> line.Texts:
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
    texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in settings.items()}
    return {key: (text, f"file {path}") for key, text in texts.items()}


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


def _one_line(message: str, texts: Mapping[str, str]) -> str:
    """jsonargparse's paragraph as: key, what was given, what is allowed."""
    key = re.search(r'key "([^"]+)"', message)
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    if key and key[1] in fields() and (given or key[1] in texts):  # of some texts it fails to say the value
        value = given[1] if given else texts[key[1]]
        return f"{key[1]}: given {value!r}, allowed: {allowed(fields()[key[1]][0])}"
    return " ".join(message.split())
