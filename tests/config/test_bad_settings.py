"""Settings that are not allowed, several hundred of them: each is one line and status 2, from the launcher as from a rank."""

from __future__ import annotations

import json
import os
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mpips
from mpips.cli import main as cli
from mpips.cli.launch import command
from mpips.config import Config, ConfigError, fields, resolve, take_flags
from mpips.config import flags as parsers
from mpips.config import line as on_line
from mpips.process.environment import Mpiexec

FIELDS = {key: kind for key, (kind, _) in fields().items()}
DEEP = 3000


def wrong(kind: Any) -> list[str]:
    """Texts that are no value of a type."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return ["", "a", "[a", "[a, a]", "[[a]]", "[1]", "[null]", "{a: 1}", "[a b]", "&x [*x]", "[loss]", "[class]"]
    if options and typing.get_origin(kind) is not Literal:
        return wrong(options[0]) if options[0] is not str else [""]
    common = ["", "null", "~", "[1]", "{a: 1}", "!!python/name:os.system", "*x", "x" * 2000]
    if kind is str:
        return ["\0"]
    of: dict[Any, list[str]] = {
        int: [*common, "x", "1.5", "1e3", "0x10", "1_0", "true", "2026-01-01", ".inf", "9" * 40, "-" + "9" * 5000],
        float: [*common, "x", "1,5", "1e999", "nan", ".nan", "-inf", "true", "2026-01-01", "0x1p3", "9" * 5000],
        bool: [*common, "1", "0", "yes", "on", "2.0"],
    }
    return [text for text in of.get(kind, [*common, "1", "true", "nothing of these"]) if not (options and text in options)]


def generated() -> Iterator[tuple[str, str]]:
    """Each setting with what is none of its values."""
    for key, kind in FIELDS.items():
        none = type(None) in typing.get_args(kind)
        for text in wrong(kind):
            if not (none and text in ("null", "~")):
                yield key, text


NEGATIVE = [(key, "-1") for key, kind in FIELDS.items() if kind is int and key != "seed"]
NAMES = [
    ("mode", "asyncc"),
    ("mode", ""),
    ("mode", "[sync]"),
    ("rule", "krumm"),
    ("rule", ""),
    ("rule", ":x"),
    ("rule", "this:"),
]
PATHS = [
    *(("run_dir", name) for name in ("file", "file/x", "nothing", "nothing/x", "n" * 300, "a/" * 3000)),
    *(("resume", name) for name in ("", "nowhere", "nowhere/x.h5", "n" * 300)),
]
BOMB = "[" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "&a0 [x]" for n in range(10)) + "]"
FILES: list[str | bytes] = [
    *("nosuch: 1", "checkpont: {every: 1}", "checkpoint: {evry: 1}", "checkpoint: 3", "checkpoint: [1]", "stop: now", "stop:"),
    *("- a\n- b", "hello", "3", "seed: 1\n---\nseed: 2", "checkpoint:\n\tevery: 1", "metrics: [a, b", 'rule: "mean', "a: b: c"),
    *(
        "seed: 1\nseed: 2",
        "early_stopping: {patience: 1}\nearly_stopping: {patience: 2}",
        "early_stopping: {patience: 1}\nearly_stopping.patience: 1",
        "'seed': 1\nseed: 1",
    ),
    *(
        "seed: !foo 3",
        "seed: !!int 3",
        "run_dir: !!python/module:os",
        "rule: !!python/name:os.system",
        "seed: !!binary aGVsbG8=",
    ),
    *("!!python/object/apply:os.system ['touch HURT']", "rule: !!python/object/apply:os.system ['touch HURT']"),
    *("a: &a {b: *a}", "checkpoint: &a {every: *a}", "&a {seed: *a}", "metrics: &a [*a]", "seed: &a 3", "seed: *nowhere"),
    *(f"metrics: {BOMB}", f"a: {BOMB}", "x: &x {every: 1}\ncheckpoint:\n  <<: *x", "checkpoint: {<<: {every: 1}}"),
    *(
        f"seed: {'[' * DEEP}{']' * DEEP}",
        f"seed: {'{a: ' * DEEP}1{'}' * DEEP}",
        "[" * DEEP,
        "- " * DEEP + "a",
        "? " * DEEP + "a",
    ),
    *("\n".join(f"{' ' * n}a:" for n in range(DEEP)), "checkpoint: {every: {x: 1}}", "checkpoint: {every: [[[1]]]}"),
    *("~: 1", "3: 1", "? [a, b]\n: 1", "? {a: b}\n: 1", "'': 1", ".: 1", "checkpoint.: 1", ".every: 1", f"{'k' * 9000}: 1"),
    *("config: other.yaml", "print_config: true", "MPIPS_SEED: 1", "--seed: 1", "Seed: 1", "SEED: 1", "seed : x", '"a\\nb": 1'),
    *(
        'run_dir: "a\\0b"',
        'resume: "a\\0b"',
        "run_dir: ''",
        "run_dir: [a]",
        "run_dir: {a: 1}",
        "seed: \x01",
        "seed: '1'",
        'clip: "1"',
    ),
    *(
        b"rule: \xff\xfe",
        "seed: 1".encode("utf-16"),
        b"\xef\xbb\xbfseed: x",
        b"\0" * 100,
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x04K\x01.",
    ),
    *(
        b"#" * 2_000_000,
        "%YAML 9.9\n---\nseed: x",
        "@seed: 1",
        "`seed: 1",
        "seed: |\n  x",
        "seed: >\n  x",
        "{",
        "}",
        "---\n...\nx",
        ": : :",
    ),
]
FLAGS = [
    *(
        ["--mpips.seed"],
        ["--mpips.checkpoint.evry", "3"],
        ["--mpips.checkpoint", "3"],
        ["--mpips."],
        ["--mpips..", "1"],
        ["--mpips.=1"],
    ),
    *(["--mpips.config", "nowhere.yaml"], ["--mpips.config", "."], ["--mpips.config", ""], ["--mpips.config=/dev/zero"]),
    *(["--mpips.config=pipe"], ["--mpips.config", "n" * 5000], ["--mpips.config=file/x.yaml"], ["--mpips.config"]),
    *(["--mpips.SEED=1"], ["--mpips.run-dir=x"], ["--mpips.seed", "1", "--mpips.seed", "x"], ["--mpips.checkpoint.every.x=1"]),
    *(["--mpips.print_config=2"], ["--mpips.overlap=perhaps"], [f"--mpips.metrics={'[' * DEEP}"], [f"--mpips.{'x' * 5000}=1"]),
    *(["--mpips.metrics=" + BOMB], ["--mpips.seed\n=1"], ["--mpips.seed=1\n2"], ["--mpips.seed", "--mpips.clip", "1"]),
]
VARIABLES = [
    *(
        ("MPIPS_CLPI", "1"),
        ("MPIPS_clip", "1"),
        ("MPIPS_CHECKPOINT_EVERY", "1"),
        ("MPIPS_EARLY_STOPPING", "1"),
        ("MPIPS_", "1"),
    ),
    *(
        ("MPIPS_CONFIG", ""),
        ("MPIPS_CONFIG", "nowhere.yaml"),
        ("MPIPS_CONFIG", "."),
        ("MPIPS_CLIP ", "1"),
        ("MPIPS_PRINT_CONFIG", "1"),
    ),
]
ALONE = len(FILES) + len(FLAGS) + len(VARIABLES) + len(NEGATIVE) + len(NAMES) + len(PATHS)

Way = Callable[[pytest.MonkeyPatch, str, str], tuple[list[str], list[str]]]  # flags of run, flags of the script


def by_file(patch: pytest.MonkeyPatch, key: str, text: str) -> tuple[list[str], list[str]]:
    Path("c.yaml").write_text(yaml.safe_dump({key: text}) if "\0" in text else f"{key}: {text or repr('')}\n")
    return [], ["--mpips.config=c.yaml"]


def by_variable(patch: pytest.MonkeyPatch, key: str, text: str) -> tuple[list[str], list[str]]:
    patch.setenv(f"MPIPS_{key.replace('.', '__').upper()}", text)
    return [], []


def by_set(patch: pytest.MonkeyPatch, key: str, text: str) -> tuple[list[str], list[str]]:
    return ["--set", f"{key}={text}"], []


def by_flag(patch: pytest.MonkeyPatch, key: str, text: str) -> tuple[list[str], list[str]]:
    return [], [f"--mpips.{key}={text}"]


WAYS: tuple[Way, ...] = (by_flag, by_set, by_file, by_variable)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The launcher's line, and a rank's, which are the same; no rank is started."""
    Path("file").touch()
    Path("nothing").symlink_to("/nowhere/at/all")
    Path("train.py").write_text("open('RAN', 'w')\n")
    Path("mpiexec").write_text("#!/bin/sh\ntouch RAN\n")
    Path("mpiexec").chmod(0o755)
    monkeypatch.setattr(command, "find_mpiexec", lambda: Mpiexec(str(Path("mpiexec").absolute()), "unknown", ""))
    monkeypatch.setattr(parsers, "_handed", {})

    def look(own: list[str], script: list[str]) -> str:
        lines = []
        before = time.process_time()
        for rank in (False, True):
            monkeypatch.setattr(on_line, "_taken", [])
            monkeypatch.setattr(on_line, "_line", ([], []))
            if rank:
                pairs = dict(word.split("=", 1) for word in own if "=" in word)
                monkeypatch.setenv("MPIPS_SET", json.dumps(pairs))
                monkeypatch.setattr("sys.argv", ["train.py", *script])
                take_flags()
                with pytest.raises(SystemExit) as end:
                    mpips.configure()
                status = end.value.code
                monkeypatch.delenv("MPIPS_SET")
            else:
                status = cli.main(["run", "-n", "3", *own, "train.py", *script])
            out, err = capsys.readouterr()
            assert (status, out, len(err.splitlines())) == (2, "", 1), (rank, status, err)
            assert err.startswith("mpips: ")
            assert len(err) < 700
            lines.append(err)
        assert time.process_time() - before < 2  # of the processor, and for both
        assert lines[0] == lines[1]
        assert {path.name for path in Path().iterdir()} <= {"file", "nothing", "train.py", "mpiexec", "c.yaml", "pipe"}
        return lines[0]

    return look


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", FIELDS)
def test_what_is_no_value_of_a_setting(key: str, way: Way, both: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(text for name, text in [*generated(), *NEGATIVE, *NAMES, *PATHS] if name == key):
        if way is not by_set and number % 3 != WAYS.index(way) % 3:  # each in two ways
            continue
        if way is by_variable and "\0" in text:
            continue
        with monkeypatch.context() as patch:
            line = both(*way(patch, key, text))
        named = line.startswith((f"mpips: {key}: given ", "mpips: config: given 'c.yaml'"))
        assert named, (text, line)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_what_is_no_file_of_settings(number: int, both: Callable[..., str]) -> None:
    content = FILES[number]
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "c.yaml" in both([], ["--mpips.config=c.yaml"])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", range(len(FLAGS)))
def test_what_is_no_flag(number: int, both: Callable[..., str]) -> None:
    os.mkfifo("pipe")
    both([], FLAGS[number])


@pytest.mark.parametrize(("name", "text"), VARIABLES)
def test_what_is_no_variable(name: str, text: str, both: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    both([], [])


def test_they_are_many() -> None:
    assert ALONE > 140
    assert ALONE + len(list(generated())) > 600


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.text("{}[]&*!?:-,'\"|>%@ \nabseed01", max_size=40).map(str.encode)
    | st.recursive(
        st.sampled_from(["seed", "1", "x", ""]), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    ).map(lambda tree: yaml.safe_dump({"seed": tree}, allow_unicode=True).encode())
)
def test_any_file_is_settings_or_a_line(content: bytes) -> None:
    Path("c.yaml").write_bytes(content)
    try:
        assert isinstance(resolve({}, ["--config=c.yaml"]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 600
