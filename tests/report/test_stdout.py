"""What a command prints on a stdout that is a pipe that ends, a full disk, or closed: a status, and one line or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpips import checkpoint
from tests.helpers.deadlines import patient

PLAN = ["plan", "--nodes", "4", "--ranks-per-node", "2", "--model-mb", "10", "--gbit", "10"]
COMMANDS = {
    "inspect": ["inspect", "round_00000001.h5"],
    "json": ["inspect", "round_00000001.h5", "--json"],
    "export": ["export", "round_00000001.h5", "--to", "model.pt"],
    "plan": PLAN,
    "dry-run": ["run", "-n", "2", "--dry-run", "train.py"],
    "help": ["--help"],
    "version": ["--version"],
}
TRAIN = "import torch, mpips\nmpips.connect(torch.nn.Linear(2, 1), lambda p: None)\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, 1, {"round": 1, "parameters": {f"p{i}": torch.ones(1) for i in range(300)}})
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def shell(folder: Path, words: list[str], redirected: str) -> tuple[int, list[str]]:
    """The command's status, and its lines on stderr."""
    line = f'"$@" {redirected}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=patient(60)
    )
    return done.returncode, done.stderr.splitlines()


def commands() -> list[tuple[str, list[str]]]:
    every = [(name, ["-m", "mpips.cli.main", *words]) for name, words in COMMANDS.items()]
    return [*every, ("print_config", ["train.py", "--mpips.print_config"])]


@pytest.mark.parametrize(("name", "words"), commands(), ids=[name for name, _ in commands()])
def test_a_full_disk_is_one_line_and_a_status(name: str, words: list[str], folder: Path) -> None:
    status, lines = shell(folder, words, "> /dev/full")
    start = "mpips: print_config" if name == "print_config" else f"mpips {words[2]}"
    assert (status, lines) == (1, [f"{start}: stdout cannot be written (No space left on device)"])


@pytest.mark.parametrize(("name", "words"), commands(), ids=[name for name, _ in commands()])
def test_a_reader_that_has_had_enough_ends_it_without_a_word(name: str, words: list[str], folder: Path) -> None:
    waits = f"import os, time; time.sleep(0.5); os.execv({sys.executable!r}, [{sys.executable!r}, *{words!r}])"
    assert shell(folder, ["-c", waits], "| true") == (141, [])


@pytest.mark.parametrize("name", ["inspect", "export", "plan", "dry-run"])
def test_a_closed_stdout_is_one_line_and_a_status(name: str, folder: Path) -> None:
    status, lines = shell(folder, ["-m", "mpips.cli.main", *COMMANDS[name]], ">&-")
    assert (status, lines) == (1, [f"mpips {COMMANDS[name][0]}: stdout is closed, expected a terminal, file or pipe"])
    assert (folder / "model.pt").exists() == (name == "export")  # what is not printing was done
