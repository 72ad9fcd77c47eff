"""The settings of a run: one frozen tree, resolved once, before MPI starts.

Flags win over `MPIPS_*` variables, these over the YAML file given by `--config`, this over the arguments of `connect`,
these over the defaults below. Whatever is not allowed is a `ConfigError` of one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

BAD_CONFIGURATION = 2  # exit status
GROUPS = ("checkpoint", "stop", "staleness", "local", "outer", "clients", "robust")  # flags that begin so are ours
SAID = ("true", "false", "yes", "no", "on", "off", "1", "0")  # after a boolean flag: its value and no word of the script's
TAKEN = (  # names that a metric cannot have: other columns of the messages and of the report
    *("samples", "weight", "loss", "bad", "done", "stop", "signal", "round", "train", "wait", "steps", "tickets", "want"),
    *("epoch", "version", "lr", "time", "event", "rank", "ranks", "epochs", "samples_per_s", "self"),
)


class ConfigError(ValueError):
    """A setting that is not allowed: names the key, what was given and what is allowed."""


def _allow(key: str, given: object, allowed: str, ok: bool) -> None:
    if not ok:
        raise ConfigError(f"{key}: given {given!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When checkpoints are written and how many stay."""

    every: int = field(default=0, metadata={"help": "also after so many rounds; 0: at the end of epochs only"})
    keep: int = field(default=3, metadata={"help": "the newest so many stay on disk"})
    epochs: int = field(default=1, metadata={"help": "at the end of each so many epochs, and of the last; 0: of the last only"})

    def __post_init__(self) -> None:
        _allow("checkpoint.every", self.every, "a whole number, 0 or more", self.every >= 0)
        _allow("checkpoint.epochs", self.epochs, "a whole number, 0 or more", self.epochs >= 0)
        _allow("checkpoint.keep", self.keep, "a whole number, 1 or more", self.keep >= 1)


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When the server ends the run early, judged on the value that `validate` returns."""

    patience: int = field(default=0, metadata={"help": "stop after so many validations without a gain; 0: never"})
    min_gain: float = field(default=0.0, metadata={"help": "a smaller gain over the best value does not count"})
    target: float | None = field(default=None, metadata={"help": "stop once the value is at least this good"})
    goal: Literal["max", "min"] = field(default="max", metadata={"help": "whether a larger or a smaller value is better"})

    def __post_init__(self) -> None:
        _allow("stop.patience", self.patience, "a whole number, 0 or more", self.patience >= 0)
        _allow("stop.min_gain", self.min_gain, "a number, 0 or more", 0 <= self.min_gain < math.inf)
        _allow("stop.target", self.target, "a number or null", self.target is None or math.isfinite(self.target))


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """What an asynchronous server does with contributions that come late; null is the mode's own value."""

    policy: Literal["none", "reject", "inverse", "poly", "hinge", "dc", "dc-adaptive"] | None = field(
        default=None, metadata={"help": "of a late contribution: take it, reject it, take it scaled, or compensated (DC-ASGD)"}
    )
    bound: int = field(
        default=4, metadata={"help": "ssp: clocks that a worker may be ahead; reject, hinge: versions it may be late"}
    )
    power: float = field(default=0.5, metadata={"help": "poly: (1 + staleness) to minus this; hinge: its slope"})
    strength: float = field(default=0.04, metadata={"help": "dc: lambda; dc-adaptive: its first value"})
    buffer: int | None = field(default=None, metadata={"help": "contributions that make one server update (fedbuff's K)"})

    def __post_init__(self) -> None:
        _allow("staleness.bound", self.bound, "a whole number, 0 or more", self.bound >= 0)
        _allow("staleness.power", self.power, "a number, 0 or more", 0 <= self.power < math.inf)
        _allow("staleness.strength", self.strength, "a number, 0 or more", 0 <= self.strength < math.inf)
        _allow("staleness.buffer", self.buffer, "a whole number, 1 or more, or null", self.buffer is None or self.buffer >= 1)


@dataclass(frozen=True, kw_only=True)
class Local:
    """Steps that a worker takes on its own between two rounds; null is the mode's own value."""

    steps: int | None = field(default=None, metadata={"help": "so many local steps between two rounds (H, tau)"})
    after: int = field(default=0, metadata={"help": "post-local SGD: one step a round for so many rounds first"})
    moving_rate: float | None = field(default=None, metadata={"help": "easgd: alpha; null: 0.9 / workers"})
    fragments: int = field(default=1, metadata={"help": "diloco, slowmo: send one of so many fragments at a time (streaming)"})
    delay: int = field(default=0, metadata={"help": "with fragments: local steps until a fragment's result is taken up"})
    mix: float = field(
        default=0.0, metadata={"help": "with fragments: share of the local weights kept when a result is taken up"}
    )

    def __post_init__(self) -> None:
        _allow("local.steps", self.steps, "a whole number, 1 or more, or null", self.steps is None or self.steps >= 1)
        _allow("local.after", self.after, "a whole number, 0 or more", self.after >= 0)
        ok = self.moving_rate is None or 0 <= self.moving_rate <= 1
        _allow("local.moving_rate", self.moving_rate, "a number from 0 to 1, or null", ok)
        _allow("local.fragments", self.fragments, "a whole number, 1 or more", self.fragments >= 1)
        _allow("local.delay", self.delay, "a whole number, 0 or more", self.delay >= 0)
        _allow("local.mix", self.mix, "a number from 0 to less than 1", 0 <= self.mix < 1)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The server's own step, in modes where the script's optimizer is the workers'; null is the mode's own value."""

    lr: float | None = field(default=None, metadata={"help": "learning rate"})
    momentum: float | None = field(default=None, metadata={"help": "momentum; beta_1 of fedadam, fedyogi, fedadagrad"})
    beta2: float = field(default=0.99, metadata={"help": "fedadam, fedyogi: decay of the second moment"})
    tau: float = field(default=1e-3, metadata={"help": "fedadam, fedyogi, fedadagrad: their degree of adaptivity"})

    def __post_init__(self) -> None:
        _allow("outer.lr", self.lr, "a number above 0, or null", self.lr is None or 0 < self.lr < math.inf)
        _allow("outer.momentum", self.momentum, "a number from 0 to less than 1, or null", 0 <= (self.momentum or 0) < 1)
        _allow("outer.beta2", self.beta2, "a number from 0 to less than 1", 0 <= self.beta2 < 1)
        _allow("outer.tau", self.tau, "a number above 0", 0 < self.tau < math.inf)


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Federated training: a round is an epoch in which some clients train, hosted by the workers."""

    fraction: float = field(default=1.0, metadata={"help": "share of the clients in a round (C); at least one takes part"})
    epochs: int = field(default=1, metadata={"help": "a client's epochs in a round (E)"})
    mu: float | None = field(default=None, metadata={"help": "fedprox: weight of the proximal term; null: 0.01"})
    q: float = field(default=1.0, metadata={"help": "qfedavg: 0 is the plain mean, more is fairer"})

    def __post_init__(self) -> None:
        _allow("clients.fraction", self.fraction, "a number from 0 to 1", 0 <= self.fraction <= 1)
        _allow("clients.epochs", self.epochs, "a whole number, 1 or more", self.epochs >= 1)
        _allow("clients.mu", self.mu, "a number, 0 or more, or null", self.mu is None or 0 <= self.mu < math.inf)
        _allow("clients.q", self.q, "a number, 0 or more", 0 <= self.q < math.inf)


@dataclass(frozen=True, kw_only=True)
class Robust:
    """What the rules that withstand faulty workers assume."""

    bad: int = field(default=1, metadata={"help": "faulty contributions to withstand (f)"})
    radius: float = field(default=1.0, metadata={"help": "cclip, normclip: the largest norm that counts in full"})
    iterations: int = field(default=8, metadata={"help": "rfa, cclip: iterations"})

    def __post_init__(self) -> None:
        _allow("robust.bad", self.bad, "a whole number, 0 or more", self.bad >= 0)
        _allow("robust.radius", self.radius, "a number above 0", 0 < self.radius < math.inf)
        _allow("robust.iterations", self.iterations, "a whole number, 1 or more", self.iterations >= 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. `--help` of any script that connects lists them."""

    mode: str = field(default="sync", metadata={"help": "how workers and server take turns: sync, async, local_sgd ..."})
    backup_workers: int = field(default=0, metadata={"help": "sync: do not wait for the last so many; late ones are left out"})
    overlap: bool = field(default=False, metadata={"help": "async, ssp: compute the next update while the last one travels"})
    rule: str = field(default="mean", metadata={"help": "how contributions are combined"})
    deterministic: bool = field(
        default=False, metadata={"help": "the same bits from any MPI library, algorithm and placement (Gather, not Reduce)"}
    )
    server_trains: bool = field(default=False, metadata={"help": "rank 0 also trains, so that no GPU serves alone"})
    buffers: Literal["mean", "server", "local"] = field(
        default="mean", metadata={"help": "BatchNorm statistics and other buffers: combined, rank 0's, or each rank's own"}
    )
    nonfinite: Literal["raise", "drop", "skip"] = field(
        default="raise", metadata={"help": "a NaN or Inf update: end the run, leave that worker out, or skip the round"}
    )
    clip: float | None = field(default=None, metadata={"help": "the combined gradient's largest global norm"})
    loss_scale: float | None = field(
        default=None, metadata={"help": "fp16: the first loss scale; it is then halved and doubled as needed"}
    )
    schedule: Literal["epoch", "round"] = field(default="epoch", metadata={"help": "when the LR scheduler steps"})
    metrics: tuple[str, ...] = field(default=(), metadata={"help": "names of the extra metrics given to step()"})
    seed: int = field(default=0, metadata={"help": "order of the data; the random streams are the script's own"})
    bucket_mb: float = field(default=16.0, metadata={"help": "largest single message, in MB (10^6 bytes)"})
    cuda_aware: bool = field(default=False, metadata={"help": "hand device pointers to MPI; only for a CUDA-aware MPI"})
    run_dir: str | None = field(default=None, metadata={"help": "the run's folder; default runs/<time>-<script>"})
    resume: str = field(default="no", metadata={"help": "no, auto (the newest checkpoint, if any), or a file or run folder"})
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    stop: Stopping = field(default_factory=Stopping)
    staleness: Staleness = field(default_factory=Staleness)
    local: Local = field(default_factory=Local)
    outer: Outer = field(default_factory=Outer)
    clients: Clients = field(default_factory=Clients)
    robust: Robust = field(default_factory=Robust)

    def __post_init__(self) -> None:
        _allow("backup_workers", self.backup_workers, "a whole number, 0 or more", self.backup_workers >= 0)
        _allow("clip", self.clip, "a number above 0", self.clip is None or 0 < self.clip < math.inf)
        _allow("loss_scale", self.loss_scale, "a number above 0", self.loss_scale is None or 0 < self.loss_scale < math.inf)
        free = [name for name in self.metrics if name.isidentifier() and name not in TAKEN]
        good = free == list(dict.fromkeys(self.metrics))
        _allow("metrics", list(self.metrics), f"different Python names, none of {', '.join(TAKEN)}", good)
        _allow("seed", self.seed, "a whole number from -2^53 to 2^53", abs(self.seed) <= 2**53)
        _allow("bucket_mb", self.bucket_mb, "a number from 0.001 to 1000", 0.001 <= self.bucket_mb <= 1000)
        _allow("resume", self.resume, "no, auto, or a path", self.resume != "")

    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted key, in a fixed order."""
        return dict(_flatten("", dataclasses.asdict(self)))

    def yaml(self) -> str:
        """The tree as a YAML file that `--config` takes."""
        tree = dataclasses.asdict(self) | {"metrics": list(self.metrics)}
        return yaml.safe_dump(tree, sort_keys=False)


def _flatten(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def fields(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Dotted key -> (type, help) of every setting."""
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
    """A setting's type in words."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, options))
    if typing.get_origin(kind) is tuple:
        return "a list of names, as [a,b]"
    if options:  # X | None
        return " or ".join(allowed(option) for option in options)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[kind]


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
                raise ConfigError(f"--{name}: no such setting{_meant(name, known)}")
        elif equals:
            ours.append(token)
        elif known[name] is bool and (not rest or rest[0].lower() not in SAID):
            ours.append(f"--{name}=true")
        elif rest:
            ours.append(f"--{name}={rest.pop(0)}")
        else:
            raise ConfigError(f"--{name}: given nothing, allowed: {allowed(known[name])}")
    return ours


def _variable(key: str) -> str:
    """The environment variable of a setting."""
    return f"MPIPS_{key.replace('.', '__').upper()}"


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {"MPIPS_CONFIG", "MPIPS_LAUNCH_DIR", *map(_variable, fields())}
    for name in environ:
        if name.startswith("MPIPS_") and name not in known:
            raise ConfigError(f"{name}: no such variable{_meant(name, known)}")


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


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
    given = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in _flatten("", arguments)}
    _check_known(given)
    parser = jsonargparse.ArgumentParser(prog="mpips", exit_on_error=False, default_env=False)
    parser.add_class_arguments(Config)
    try:
        parser.set_defaults(dict(_flatten("", parser.parse_object(given).as_dict())))  # checked on its way in
        tree = parser.parse_args([f"--{key}={text}" for key, text in texts.items()])
        _check_present(dict(_flatten("", tree.as_dict())))
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
    settings = dict(_flatten("", tree or {}))
    _check_known(settings)
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in settings.items()}


def _check_known(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in GROUPS:
            raise ConfigError(f"{key}: given {value!r}, allowed: {', '.join(k for k in fields() if k.startswith(f'{key}.'))}")
        if key not in fields():
            raise ConfigError(f"{key}: no such setting{_meant(str(key), fields())}")


def _check_present(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a None where none is allowed, which jsonargparse takes for a setting not given."""
    for key, (kind, _) in fields().items():
        _allow(key, settings[key], allowed(kind), settings[key] is not None or type(None) in typing.get_args(kind))


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
