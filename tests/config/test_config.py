"""Settings: who wins, what is refused and in which words."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mpips
from mpips.config import (
    GROUPS,
    TAKEN,
    Config,
    ConfigError,
    add_arguments,
    allowed,
    fields,
    flags,
    foreseen,
    line,
    resolve,
    show,
    take_flags,
    trace,
    whole_line,
)
from mpips.model.message import COLUMNS
from mpips.report.run_report import FIXED
from tests.helpers.deadlines import patient
from tests.helpers.programs import mlp

FIELDS = fields()


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests gave to parsers, or had taken from the line, is forgotten."""
    monkeypatch.setattr(flags, "_handed", {})
    monkeypatch.setattr(line, "_taken", [])
    monkeypatch.setattr(line, "_line", ([], []))


def nest(key: str, value: Any) -> dict[str, Any]:
    group, dot, name = key.partition(".")
    return {group: {name: value}} if dot else {key: value}


def value(config: Config, key: str) -> Any:
    return config.settings()[key]


# Four different values of each kind of field, as Python gives them and as text.
VALUES: dict[str, list[Any]] = {
    "deterministic": [True, False, True, False],
    "buffers": ["server", "local", "mean", "server"],
    "clip": [0.5, 1.5, 2.5, None],
    "seed": [11, 12, 13, 14],
    "bucket_cap_mb": [1.0, 2.0, 3.0, 4.0],
    "run_dir": ["a", "b", "12", "no"],
    "resume": ["auto", "no", "12", "null"],
    "metrics": [("a",), ("b", "c"), (), ("d",)],
    "checkpoint.every": [1, 2, 3, 4],
    "early_stopping.target": [-1.0, 0.5, 1e-3, None],
    "early_stopping.mode": ["min", "max", "min", "max"],
}


def text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("sources", range(16))
@pytest.mark.parametrize("key", VALUES)
def test_flags_over_variables_over_the_file_over_arguments_over_defaults(
    key: str, sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    argument, in_file, variable, flag = VALUES[key]
    arguments, argv, expected = {}, [], value(Config(), key)
    if sources & 1:
        arguments, expected = nest(key, argument), argument
    if sources & 2:
        Path("c.yaml").write_text(f"{key.replace('.', ': {')}: {text(in_file)}{'}' if '.' in key else ''}\n")
        argv, expected = ["--config", "c.yaml"], in_file
    if sources & 4:
        monkeypatch.setenv(f"MPIPS_{key.replace('.', '__').upper()}", text(variable))
        expected = variable
    if sources & 8:
        expected = flag
        argv = [f"--{key}={text(flag)}", *argv]  # before --config: the order on the line says nothing
    assert value(resolve(arguments, argv), key) == expected


def test_the_file_may_come_from_a_variable_and_the_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.yaml").write_text("seed: 1\nclip: 5\n")
    Path("b.yaml").write_text("seed: 2\n")
    monkeypatch.setenv("MPIPS_CONFIG", "a.yaml")
    assert value(resolve({}, []), "seed") == 1
    config = resolve({}, ["--config=b.yaml"])
    assert (config.seed, config.clip) == (2, None)


def test_one_setting_of_a_group_leaves_its_neighbours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("early_stopping: {patience: 2, mode: min}\n")
    monkeypatch.setenv("MPIPS_EARLY_STOPPING__MIN_DELTA", "0.25")
    config = resolve({"early_stopping": {"patience": 9, "target": 7.0}}, ["--early_stopping.mode", "max", "--config", "c.yaml"])
    assert config.early_stopping == mpips.config.EarlyStopping(patience=2, min_delta=0.25, target=7.0, mode="max")


def test_dotted_keys_and_empty_files_are_fine() -> None:
    Path("c.yaml").write_text("checkpoint.every: 5  # as in a flag\n")
    Path("empty.yaml").write_text("# nothing\n")
    assert resolve({}, ["--config", "c.yaml"]).checkpoint.every == 5
    Path("c.yaml").write_text("checkpoint: {every: 30s}")
    found = [resolve({"checkpoint": {"every": "30s"}}), resolve({}, ["--checkpoint.every", "30s"])]
    for config in [*found, resolve({}, ["--config", "c.yaml"])]:
        assert (config.checkpoint.rounds, config.checkpoint.seconds) == (0, 30)
    assert (Config().checkpoint.rounds, Config().checkpoint.seconds) == (0, 0)
    assert resolve({}, ["--config", "empty.yaml"]) == Config()


@pytest.mark.parametrize("word", ["no", "on", "12", "1e3", "2024-01-01", "null", "~", "true"])
def test_text_in_a_file_is_the_text_that_stands_there(word: str) -> None:
    """YAML would make a boolean, a number or a date of it."""
    Path("c.yaml").write_text(f"resume: {word}\n")
    assert resolve({}, ["--config=c.yaml"]).resume == word


@pytest.mark.parametrize("folder", ["#1", "# 1", "&a", "---", "...", "a #b", "~1"])
def test_a_folder_may_have_any_name(folder: str) -> None:
    """Also one of which YAML would make nothing."""
    Path("saved.yaml").write_text(Config(run_dir=folder).yaml())
    assert resolve({}, ["--config", "saved.yaml"]).run_dir == folder
    assert resolve({}, [f"--run_dir={folder}"]).run_dir == folder
    assert resolve({}, ["--run_dir=null"]).run_dir is None


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.builds(
    dict,
    deterministic=st.booleans(),
    clip=st.none() | st.floats(1e-300, 1e300),
    seed=st.integers(-(2**53), 2**53),
    metrics=st.lists(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True).filter(str.isidentifier), max_size=3, unique=True)
        .map(lambda names: tuple(n for n in names if n not in TAKEN)),
    run_dir=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
        ,
    resume=st.sampled_from(["no", "auto", "yes", "1", "a: b", "# c", "'"]),
    early_stopping=st.builds(
        mpips.config.EarlyStopping, patience=st.integers(0, 10**6), target=st.none() | st.floats(-1e9, 1e9)
    ),
))  # fmt: skip
def test_the_saved_configuration_read_again_is_the_same(chosen: dict[str, Any]) -> None:
    config = Config(**chosen)
    Path("saved.yaml").write_text(config.yaml())
    assert resolve({}, ["--config", "saved.yaml"]) == config


# Each field's wrong values as text, and what the one line must say is allowed.
WRONG = [
    ("buffers", "Mean", "mean, server, local"),
    ("nonfinite", "", "raise, drop, skip"),
    ("deterministic", "maybe", "true or false"),
    ("deterministic", "1", "true or false"),
    ("server_trains", "null", "true or false"),
    ("clip", "abc", "a number or null"),
    ("clip", "0", "a number above 0"),
    ("clip", "-1", "a number above 0"),
    ("clip", ".nan", "a number above 0"),
    ("clip", ".inf", "a number above 0"),
    ("clip", "[1]", "a number or null"),
    ("seed", "1.5", "a whole number"),
    ("seed", "x", "a whole number"),
    ("seed", "true", "a whole number"),
    ("seed", "null", "a whole number"),
    ("seed", str(2**60), "a whole number from -2^53 to 2^53"),
    ("bucket_cap_mb", "0", "a number from 0.001 to 1000"),
    ("bucket_cap_mb", "1e9", "a number from 0.001 to 1000"),
    ("metrics", "acc", "a list of names, as [a,b]"),
    ("metrics", "[a, a]", "different Python names"),
    ("metrics", "[loss]", "different Python names, none of"),
    ("metrics", "[top-1]", "different Python names"),
    ("resume", "", "no, auto, aside, or a path"),
    ("checkpoint.every", "-1", "a whole number, 0 or more"),
    ("checkpoint.every", "soon", "a whole number, 0 or more, or seconds, as 30s"),
    ("checkpoint.every", "0s", "a whole number, 0 or more, or seconds, as 30s"),
    ("checkpoint.every", "-3s", "a whole number, 0 or more, or seconds, as 30s"),
    ("checkpoint.keep", "0", "a whole number, 1 or more"),
    ("early_stopping.patience", "-2", "a whole number, 0 or more"),
    ("early_stopping.patience", "1.0", "a whole number"),
    ("early_stopping.min_delta", "-0.1", "a number, 0 or more"),
    ("early_stopping.target", "best", "a number or null"),
    ("early_stopping.target", ".nan", "a number or null"),
    ("early_stopping.mode", "lower", "max, min"),
    ("clients.mu", "null", "a number"),
    ("clients.mu", "-1", "a number, 0 or more"),
]


def refusal(arguments: dict[str, Any], argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(arguments, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def bare(given: str) -> str:
    """A value as people read it: without quotes, and a number whichever way it is written."""
    given = given.replace("'", "").replace('"', "").lstrip(".")
    try:
        return str(float(given))
    except ValueError:
        return given.replace("None", "null").replace("True", "true")


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
@pytest.mark.parametrize(("key", "given", "allowed"), WRONG)
def test_one_line_says_key_given_and_allowed(
    key: str, given: str, allowed: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = []
    if source == "flag":
        argv = [f"--{key}={given}"]
    elif source == "variable":
        monkeypatch.setenv(f"MPIPS_{key.replace('.', '__').upper()}", given)
    else:
        Path("c.yaml").write_text(f"{key}: {given or repr('')}\n")
        argv = ["--config", "c.yaml"]
    match = re.fullmatch(r"(\S+): given (.*), allowed: (.*)", refusal({}, argv))
    assert match is not None
    assert match[1] == key
    assert match[3].startswith(allowed)
    assert bare(match[2]) == bare(given)


@pytest.mark.parametrize(("arguments", "line"), [
    ({"seed": "x"}, "seed: given 'x', allowed: a whole number"),
    ({"seed": 1.5}, "seed: given 1.5, allowed: a whole number"),
    ({"seed": None}, "seed: given None, allowed: a whole number"),
    ({"metrics": "acc"}, "metrics: given 'acc', allowed: a list of names, as [a,b]"),
    ({"clip": float("nan")}, "clip: given nan, allowed: a number above 0"),
    ({"deterministic": 1}, "deterministic: given 1, allowed: true or false"),
    ({"resume": None}, "resume: given None, allowed: text"),
    ({"checkpoint": 5}, "checkpoint: given 5, allowed: checkpoint.every, checkpoint.keep, checkpoint.epochs"),
    ({"checkpoint": {"every": None}}, "checkpoint.every: given None, allowed: a whole number or text"),
    ({"checkpoint": {"evry": 1}}, "checkpoint.evry: no such setting; did you mean checkpoint.every?"),
    ({"checkpoint": {1: 2}}, "checkpoint.1: no such setting; did you mean checkpoint.keep?"),
    ({"seed": {"a": 1}}, "seed: given {'a': 1}, allowed: a whole number"),
    ({"clip": "1.5"}, "clip: given '1.5', allowed: a number or null"),
    ({"clip": 10**400}, f"clip: given 1{'0' * 96}..., allowed: a number or null"),
    ({"early_stopping": {"patience": 10**30}},
     f"early_stopping.patience: given {10**30}, allowed: a whole number from -2^53 to 2^53"),
    ({"run_dir": b"x"}, "run_dir: given b'x', allowed: text or null"),
    ({"run_dir": ""}, "run_dir: given '', allowed: text or null"),
    ({"metrics": ["a", 1]}, "metrics: given ['a', 1], allowed: a list of names, as [a,b]"),
    ({"metrics": {"a"}}, "metrics: given {'a'}, allowed: a list of names, as [a,b]"),
    ({"buffers": 1}, "buffers: given 1, allowed: mean, server, local"),
    ({"clip": np.zeros((2, 1))}, "clip: given array([[0.],        [0.]]), allowed: a number or null"),
    ({"detreministic": True}, "detreministic: no such setting; did you mean deterministic?"),
])  # fmt: skip
def test_wrong_arguments_of_connect(arguments: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(arguments, []) == line
    with pytest.raises(SystemExit) as error:
        mpips.connect(mlp(), lambda p: None, **arguments)  # type: ignore[arg-type, return-value]
    assert error.value.code == 2
    assert capsys.readouterr().err == f"mpips: {line}\n"


def test_arguments_become_what_the_fields_are() -> None:
    config = resolve({"clip": 1, "metrics": ["a", "b"], "run_dir": Path("x") / "y"}, [])
    assert (config.clip, type(config.clip)) == (1.0, float)
    assert (config.metrics, config.run_dir) == (("a", "b"), "x/y")
    with pytest.raises(ConfigError, match="seed"):  # a numpy number is not quietly taken
        resolve({"seed": np.float32(1)}, [])


@pytest.mark.parametrize(("argv", "words"), [
    (["--mpips.checkpoint.evry", "1"], ["--mpips.checkpoint.evry: no such setting; did you mean --mpips.checkpoint.every?"]),
    (["--mpips.run-dir=x"], ["--mpips.run-dir: no such setting; did you mean --mpips.run_dir?"]),
    (["--mpips.checkpoint", "5"], ["--mpips.checkpoint: no such setting; did you mean --mpips.checkpoint."]),
    (["--mpips.", "5"], ["--mpips.: no such setting"]),
    (["--mpips.clip"], ["--mpips.clip: given nothing, allowed: a number or null"]),
    (["--mpips.clip", "--lr", "3"], ["--mpips.clip: given nothing, allowed: a number or null"]),
    (["--mpips.print_config=maybe"], ["print_config: given 'maybe', allowed: true or false"]),
    (["--clip"], ["--clip: given nothing, allowed: a number or null"]),
    (["--config"], ["--config: given nothing"]),
    (["--config", "none.yaml"], ["config: given 'none.yaml'", "No such file"]),
    (["--config", "."], ["config: given '.'", "YAML file"]),
])  # fmt: skip
def test_wrong_flags(argv: list[str], words: list[str]) -> None:
    line = refusal({}, argv)
    assert all(word in line for word in words), line


# Each list holds the one before nine times: ten lists are 3.5 billion names.
BOMB = "[" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "&a0 [x]" for n in range(10)) + "]"


@pytest.mark.parametrize(("content", "words"), [
    ("clip: [1\n", ["config: given 'c.yaml'", "line 2"]),
    ("\tclip: 1\n", ["config: given 'c.yaml'", "line 1"]),
    ("- a\n- b\n", ["config: given 'c.yaml'", "it holds ['a', 'b']", "`setting: value`"]),
    ("just text\n", ["config: given 'c.yaml'", "just text"]),
    ("nope: 1\n", ["nope: no such setting"]),
    ("clpi: 1\n", ["clpi: no such setting; did you mean clip?"]),
    ("checkpoint: {evry: 1}\n", ["checkpoint.evry: no such setting; did you mean checkpoint.every?"]),
    ("checkpoint: 5\n", ["checkpoint: given '5', allowed: checkpoint.every, checkpoint.keep, checkpoint.epochs"]),
    ("checkpoint:\n", ["checkpoint: given 'null'", "checkpoint.every"]),
    ("seed: {a: 1}\n", ["seed: given {'a': '1'}, allowed: a whole number (file c.yaml)"]),
    ("1: 2\n", ["1: no such setting"]),
    ("? [a]\n: 1\n", ["config: given 'c.yaml'"]),
    ("config: other.yaml\n", ["config: no such setting"]),
    ("a: &x [*x]\n", ["config: given 'c.yaml'", "x"]),
    ("!!python/object/apply:os.system ['touch hurt']\n", ["config: given 'c.yaml'", "allowed"]),
    ("clip: !!python/object/apply:os.system ['touch hurt']\n", ["config: given 'c.yaml'", "line 1: a tag"]),
    ("!!python/object/new:os.system {args: ['touch hurt']}\n", ["config: given 'c.yaml'", "line 1: a tag"]),
    (b"\xff\xfe\x00clip", ["config: given 'c.yaml'"]),
    ("seed: 1\nseed: 2\n", ["config: given 'c.yaml'", "'seed' is given twice"]),
    ("checkpoint: {every: 1}\ncheckpoint.every: 2\n", ["config: given 'c.yaml'", "'checkpoint.every' is given twice"]),
    ("seed: 1\n---\nseed: 2\n", ["config: given 'c.yaml'", "line 3: a second document"]),
    ("x: &x 1\nseed: *x\n", ["config: given 'c.yaml'", "line 1: an anchor or alias, x"]),
    (f"metrics: {BOMB}\n", ["config: given 'c.yaml'", "line 1: an anchor or alias, a0"]),
    (f"seed: {'[' * 3000}{']' * 3000}\n", ["config: given 'c.yaml'", "line 1: nested more than 3 levels deep"]),
    (f"seed: {'{a: ' * 3000}1{'}' * 3000}\n", ["config: given 'c.yaml'", "line 1: nested more than 3 levels deep"]),
    (f"rule: {'x' * 2_000_000}\n", ["config: given 'c.yaml'", "more than 1,000,000 bytes"]),
    (f"seed: {'9' * 5000}\n", ["seed: given '999", "9..., allowed: a whole number"]),
    ("seed: !foo 3\n", ["config: given 'c.yaml'", "line 1: a tag, !foo"]),
    ("run_dir: [a]\n", ["run_dir: given ['a'], allowed: text or null"]),
    ("run_dir: ''\n", ["run_dir: given '', allowed: text or null"]),
    ('run_dir: "a\\0b"\n', ["run_dir: given 'a\\x00b', allowed: a path"]),
    ("metrics: [null]\n", ["metrics: given ['null'], allowed: different Python names"]),
    ("metrics: [[a]]\n", ["metrics: given [['a']], allowed: a list of names"]),
    ("metrics: [lambda]\n", ["metrics: given ['lambda'], allowed: different Python names"]),
    ("'': 1\n", ["'': no such setting"]),
    (f"{'x' * 900}: 1\n", ["xxx...: no such setting"]),
])  # fmt: skip
def test_wrong_files_are_one_line_and_run_nothing(content: str | bytes, words: list[str]) -> None:
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal({}, ["--config", "c.yaml"])
    assert all(word in line for word in words), line
    assert len(line) < 400
    assert not Path("hurt").exists()


@pytest.mark.timeout(10)
def test_only_a_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe is there for one rank only, and one that nobody writes to would be waited for."""
    os.mkfifo("pipe")
    assert "it is no file" in refusal({}, ["--config", "pipe"])
    assert "it is no file" in refusal({}, ["--config=/dev/zero"])
    assert "No such file" in refusal({}, ["--config="])
    assert "File name too long" in refusal({}, [f"--config={'x' * 5000}"])
    monkeypatch.setenv("MPIPS_CONFIG", "")
    assert refusal({}, []).startswith("config: given '', allowed: a YAML file of settings")


@pytest.mark.parametrize("key", ["clip", "run_dir", "early_stopping.monitor", "metrics", "seed", "overlap", "staleness.policy"])
def test_nothing_is_no_value(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the default nor null: what a shell makes of a variable that is not there."""
    assert refusal({}, [f"--{key}="]).startswith(f"{key}: given '', allowed: ")
    monkeypatch.setenv(f"MPIPS_{key.replace('.', '__').upper()}", "")
    assert refusal({}, []).startswith(f"{key}: given '', allowed: ")


def test_a_bomb_in_a_flag_is_a_text() -> None:
    assert refusal({}, [f"--metrics={BOMB}"]).startswith("metrics: given '[&a0 [x], &a1 [*a0")


def test_quotes_make_a_text_of_null() -> None:
    Path("c.yaml").write_text("run_dir: 'null'\n")
    assert resolve({}, ["--config=c.yaml"]).run_dir == "null"
    Path("c.yaml").write_text("run_dir:\nclip: ~\n")
    assert resolve({"run_dir": "a", "clip": 3}, ["--config=c.yaml"]) == Config()


@pytest.mark.parametrize("given", ["variable", "flag", "file", "--set"])
def test_the_line_says_where_a_setting_comes_from(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv: dict[str, list[str]] = {"flag": ["--clip=-1"], "file": ["--config=c.yaml"]}
    if given == "variable":
        monkeypatch.setenv("MPIPS_CLIP", "-1")
    if given == "--set":
        monkeypatch.setenv("MPIPS_SET", '{"clip": "-1"}')
    Path("c.yaml").write_text("clip: -1\n")
    where = {"variable": "variable MPIPS_CLIP", "flag": "flag --clip", "file": "file c.yaml", "--set": "--set"}[given]
    assert refusal({}, argv.get(given, [])) == f"clip: given -1.0, allowed: a number above 0 ({where})"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=12))
@example("backup_workers", "?")  # a key without a value, in YAML
def test_any_text_is_a_setting_or_a_line(key: str, given: str) -> None:
    try:
        assert isinstance(resolve({}, [f"--{key}={given}"]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(f"{key}: given ")
        assert ", allowed: " in str(error)


@pytest.mark.parametrize(("name", "meant"), [
    ("MPIPS_CLPI", "did you mean MPIPS_CLIP?"),
    ("MPIPS_CHECKPOINT_EVERY", "did you mean MPIPS_CHECKPOINT__EVERY?"),
    ("MPIPS_clip", "did you mean"),
    ("MPIPS_EARLY_STOPPING", "did you mean MPIPS_EARLY_STOPPING__"),
])  # fmt: skip
def test_unknown_variables_of_ours_are_refused(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert refusal({}, []).startswith(f"{name}: no such variable; {meant}")


def test_others_variables_and_the_launcher_s_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIPS_LAUNCH_DIR", "/nowhere")
    monkeypatch.setenv("XMPIPS_CLIP", "x")
    monkeypatch.setenv("CLIP", "x")
    assert resolve({}, []) == Config()


ALONE = ["--clip", "1", "--config", "nowhere.yaml", "--mode=train", "--stop", "5", "--resume", "model.pth", "--deterministic"]


def test_plain_flags_are_the_script_s_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *ALONE, "--print_config"])
    assert trace({}) == trace({}, [])


SPLITS: list[tuple[list[str], list[str], dict[str, str | None]]] = [
    (["--lr", "0.1", "data/", "-v", "--name=x"], ["--lr", "0.1", "data/", "-v", "--name=x"], {}),
    (["--mpips.clip", "1", "--lr", "2", "--mpips.seed=3"], ["--lr", "2"], {"clip": "1", "seed": "3"}),
    (["--mpips.deterministic", "data/"], ["data/"], {"deterministic": "true"}),
    (["--mpips.deterministic", "false", "data/"], ["data/"], {"deterministic": "false"}),
    (["--mpips.deterministic", "no"], [], {"deterministic": "no"}),
    (["--mpips.deterministic", "--mpips.overlap"], [], {"deterministic": "true", "overlap": "true"}),
    (["--mpips.print_config", "--lr", "2"], ["--lr", "2"], {"print_config": "true"}),
    (["--mpips.early_stopping.target", "-0.5"], [], {"early_stopping.target": "-0.5"}),
    (["--mpips.clip", "--lr", "3"], ["--lr", "3"], {"clip": None}),
    (["--mpips.clip"], [], {"clip": None}),
    (["--mpips.clpi", "1", "data/"], ["data/"], {"clpi": "1"}),
    (["--mpips.run_dir", ""], [], {"run_dir": ""}),
    (["--mpips.run_dir=--x=y"], [], {"run_dir": "--x=y"}),
    (["--mpips.clip", "1", "--", "--mpips.clip", "2"], ["--", "--mpips.clip", "2"], {"clip": "1"}),
    (
        ["mpips.clip", "-mpips.clip", "--mpips", "1", "--mpipsclip"],
        ["mpips.clip", "-mpips.clip", "--mpips", "1", "--mpipsclip"],
        {},
    ),
]


@pytest.mark.parametrize(("argv", "rest", "ours"), SPLITS)
def test_only_flags_with_the_prefix_are_taken(
    argv: list[str], rest: list[str], ours: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    take_flags()
    assert sys.argv == ["script.py", *rest]
    assert {flag.key: flag.text for flag in line._taken} == ours
    assert whole_line() == argv


def test_flags_that_come_to_the_line_after_the_import_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--mpips.seed", "3", "--mpips.clip", "1"])
    take_flags()
    sys.argv += ["--mpips.clip", "2"]
    assert (resolve({}).seed, resolve({}).clip) == (3, 2.0)
    assert whole_line() == ["--mpips.clip", "2"]  # a line that the script has made


STRICT = """
import argparse, sys
import mpips
print([name for name in ("torch", "mpi4py", "numpy") if name in sys.modules])
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("file")
print(vars(parser.parse_args()), sys.argv[1:])
from mpips.config import resolve
print(resolve({}).clip, resolve({}).checkpoint.every)
"""


def test_a_strict_parser_never_sees_the_prefix() -> None:
    Path("ours.yaml").write_text("checkpoint: {every: 100}\n")
    argv = ["--mpips.clip", "1.5", "--config", "mine", "--mpips.config=ours.yaml", "data"]
    done = subprocess.run([sys.executable, "-c", STRICT, *argv], capture_output=True, text=True, timeout=patient(60))
    assert done.stdout.splitlines() == [
        "[]",
        "{'config': 'mine', 'file': 'data'} ['--config', 'mine', 'data']",
        "1.5 100",
    ], done.stderr


def parser(**given: Any) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="script", **given)
    made.add_argument("--lr", type=float, default=0.1)
    made.add_argument("folder")
    return made


def test_a_strict_parser_accepts_and_lists_all_our_flags() -> None:
    strict = parser()
    add_arguments(strict)
    given = {key: text(values[0]) for key, values in VALUES.items()}
    argv = ["data/", "--lr", "3", "--server_trains", *(word for key, v in given.items() for word in (f"--{key}", v))]
    assert vars(strict.parse_args(argv)) == {"lr": 3.0, "folder": "data/"}  # as if we were not there
    config = resolve({})
    assert {key: value(config, key) for key in VALUES} == {key: values[0] for key, values in VALUES.items()}
    assert config.server_trains
    shown = " ".join(strict.format_help().split())
    for key, (kind, words) in FIELDS.items():
        assert f"--{key} " in shown
        assert f"{words} ({allowed(kind)})" in shown
    assert "--config FILE" in shown
    assert "--print_config [X]" in shown


def test_the_script_s_own_flags_of_our_names_stay_its_own() -> None:
    strict = parser()
    strict.add_argument("--seed", type=int, default=7, help="mine")
    strict.add_argument_group("mine").add_argument("--config", help="mine, too")
    strict.add_argument("-m", dest="mode", default="train")
    add_arguments(strict)
    add_arguments(strict)  # once more does no harm
    args = strict.parse_args(["d", "--seed", "9", "--config", "nowhere.yaml", "--mode", "async"])
    assert (args.seed, args.config, args.mode) == (9, "nowhere.yaml", "train")
    assert resolve({}) == Config(mode="async")


def test_a_flag_that_the_script_adds_later_is_its_own_or_a_conflict() -> None:
    strict = parser()
    add_arguments(strict)
    with pytest.raises(argparse.ArgumentError, match="conflicting option string: --clip"):
        strict.add_argument("--clip")
    later = parser(conflict_handler="resolve")
    add_arguments(later)
    later.add_argument("--clip", default=7)
    assert later.parse_args(["d", "--clip", "9", "--buffers", "local"]).clip == "9"
    assert resolve({}) == Config(buffers="local")


def test_sub_commands_keep_their_flags_apart() -> None:
    """Which --config and which --mode it is, only the parser knows; the line says nothing of it."""
    outer = argparse.ArgumentParser()
    outer.add_argument("--config")
    verbs = outer.add_subparsers()
    add_arguments(verbs.add_parser("train"))
    verbs.add_parser("test").add_argument("--mode")
    assert outer.parse_args(["--config", "mine", "test", "--mode", "quick"]).mode == "quick"
    assert resolve({}) == Config()
    Path("ours.yaml").write_text("clip: 2\n")
    assert outer.parse_args(["--config", "mine", "train", "--config", "ours.yaml", "--mode", "async"]).config == "mine"
    assert resolve({}) == Config(clip=2.0, mode="async")


def test_what_the_parser_does_not_know_is_left_where_it_is() -> None:
    strict = parser()
    add_arguments(strict)
    assert strict.parse_known_args(["d", "--clip", "2", "--buffer", "3", "--rul", "x"])[1] == ["--buffer", "3", "--rul", "x"]
    assert resolve({}) == Config(clip=2.0)


WAYS: dict[str, Callable[[pytest.MonkeyPatch, str], None]] = {  # from the least to the highest
    "file c.yaml": lambda patch, text: (Path("c.yaml").write_text(f"clip: {text}\n"), patch.setenv("MPIPS_CONFIG", "c.yaml"))[
        1
    ],
    "variable MPIPS_CLIP": lambda patch, text: patch.setenv("MPIPS_CLIP", text),
    "flag --clip": lambda patch, text: _parsed("--clip", text),
    "flag --mpips.clip": lambda patch, text: patch.setattr(sys, "argv", ["script.py", "--mpips.clip", text]),
    "--set": lambda patch, text: patch.setenv("MPIPS_SET", json.dumps({"clip": text})),
}


def _parsed(*argv: str) -> None:
    made = argparse.ArgumentParser()
    add_arguments(made)
    made.parse_args(argv)


@pytest.mark.parametrize("order", [list(WAYS), list(WAYS)[::-1]], ids=["up", "down"])
def test_each_way_wins_over_those_below_it(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    assert trace({}).origins["clip"] == "default"
    assert trace({"clip": None}).origins["clip"] == "connect"
    for way in order:
        WAYS[way](monkeypatch, str(1 + list(WAYS).index(way)))
        used.append(way)
        highest = max(used, key=list(WAYS).index)
        resolved = trace({"clip": 99})
        assert (resolved.config.clip, resolved.origins["clip"]) == (1 + list(WAYS).index(highest), highest)


@pytest.mark.parametrize(("given", "said"), [
    ("{", "MPIPS_SET: given '{', allowed: what mpips run --set writes there"),
    ("[]", "MPIPS_SET: given '[]', allowed: what mpips run --set writes there"),
    ('{"clip": 1}', "MPIPS_SET: given '{\"clip\": 1}', allowed: what mpips run --set writes there"),
    ('{"clpi": "1"}', "clpi: no such setting; did you mean clip?"),
    ('{"clip": "abc"}', "clip: given 'abc', allowed: a number or null"),
    ('{"config": "none.yaml"}', "config: given 'none.yaml', allowed: a YAML file"),
    ('{"print_config": "1"}', "print_config: given '1', allowed: true or false"),
])  # fmt: skip
def test_wrong_settings_of_the_launcher(given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIPS_SET", given)
    assert refusal({}, []).startswith(said)
    if said[0].islower():  # what mpips run can see before it starts a rank
        with pytest.raises(ConfigError) as error:
            foreseen(json.loads(given), [])
        assert str(error.value).startswith(said)


def test_settings_of_the_launcher_may_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("seed: 5\n")
    assert foreseen({"config": "c.yaml", "clip": "1"}, []).config == Config(seed=5, clip=1.0)
    monkeypatch.setenv("MPIPS_SET", '{"config": "c.yaml", "clip": "1"}')
    assert resolve({}) == Config(seed=5, clip=1.0)


def test_what_is_shown_says_where_from_and_gives_the_same_settings_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("early_stopping: {patience: 2}\n")
    monkeypatch.setenv("MPIPS_CHECKPOINT__EVERY", "7")
    monkeypatch.setenv("MPIPS_SET", '{"checkpoint.keep": "9"}')
    given = {"metrics": ["a", "b"], "run_dir": "a #b\nc", "clip": 1e-7, "resume": "no: # 'ü' " * 20}
    resolved = trace(given, ["--mpips.config", "c.yaml", "--mpips.seed", "3"])
    shown = show(resolved)
    for words in (
        "mode: sync # default",
        "clip: 1.0e-07 # connect",
        "metrics: [a, b] # connect",
        "seed: 3 # flag --mpips.seed",
        "checkpoint: every: 7 # variable MPIPS_CHECKPOINT__EVERY keep: 9 # --set",
        "early_stopping: patience: 2 # file c.yaml",
    ):
        assert words in " ".join(shown.split()), words
    assert [text.endswith(":") or "  # " in text for text in shown.splitlines()] == [True] * (len(FIELDS) + len(GROUPS))
    monkeypatch.delenv("MPIPS_CHECKPOINT__EVERY")
    monkeypatch.delenv("MPIPS_SET")
    Path("shown.yaml").write_text(shown)
    assert resolve({}, ["--config", "shown.yaml"]) == resolved.config


@pytest.mark.parametrize("rank", [0, 1])
def test_print_config_prints_on_rank_0_and_ends_all(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")  # else MPI would be asked
    _parsed("--print_config", "--clip", "2")
    with pytest.raises(SystemExit) as end:
        mpips.connect(mlp(), lambda p: None, seed=4)  # type: ignore[arg-type, return-value]
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("clip: 2.0 # flag --clip" in out and "seed: 4 # connect" in out) if rank == 0 else out == ""
    assert not Path("runs").exists()


def test_wrong_settings_are_refused_not_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--mpips.print_config", "--mpips.rule", "krumm"])
    with pytest.raises(SystemExit) as end:
        mpips.configure()
    assert (end.value.code, capsys.readouterr().out) == (2, "")


def test_no_metric_can_hide_another_column() -> None:
    assert {*COLUMNS, *FIXED} <= set(TAKEN)
    for name in TAKEN:
        with pytest.raises(ConfigError, match="metrics"):
            Config(metrics=(name,))


def test_settings_are_few_explained_and_frozen() -> None:
    algorithms = ("staleness.", "local.", "outer.", "clients.", "robust.")
    assert len([key for key in FIELDS if not key.startswith(algorithms)]) <= 33  # with chaos, deadline and min_workers,
    assert len(FIELDS) <= 54  # which train nothing
    assert list(FIELDS) == list(Config().settings())
    assert {key.split(".")[0] for key in FIELDS if "." in key} == set(GROUPS)
    for _, words in FIELDS.values():
        assert words and words[0] != " "
    with pytest.raises(AttributeError):
        Config().seed = 1  # type: ignore[misc]
