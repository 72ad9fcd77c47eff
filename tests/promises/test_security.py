"""What a run leaves is its owner's alone, and holds no secret of the environment or the command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpips.checkpoint import set_newer_aside
from mpips.comm import shared_memory
from mpips.process.environment import HIDDEN, without_secrets
from tests.conftest import ROOT, launch_environment, run

SCRIPT = """
import argparse, logging, os, sys, time
import torch, torch.nn.functional as F
import mpips
parser = argparse.ArgumentParser()
parser.add_argument("--api_key")
parser.add_argument("--token")
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
assert args.api_key and args.token and os.environ["HF_TOKEN"] and os.environ["SLURM_JWT_TOKEN"]
torch.manual_seed(0)
x = torch.randn(24, 4)
model = torch.nn.Linear(4, 2)
ps = mpips.connect(model, torch.optim.Adam(model.parameters()), checkpoint={"every": 2})
for _ in ps.epochs(2):
    for (batch,) in ps.batches((x,), 4):
        loss = model(batch).square().mean()
        loss.backward()
        ps.step(loss)
        if args.fail and ps.round == 4:
            raise ValueError("on purpose")
    ps.validate(lambda: 0.5)
ps.print("the end")
"""
SECRETS = {"HF_TOKEN": "c4n4ry-of-HF", "SLURM_JWT_TOKEN": "c4n4ry-of-SLURM", "WANDB_API_KEY": "c4n4ry-of-WANDB"}
FLAGS = ["--api_key", "c4n4ry-of-a-flag", "--token=c4n4ry-of-another"]


def launched(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A run under `mpips run`, by a user whose umask hides nothing, with secrets all around."""
    (folder / "train.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "mpips.cli.main", "run", "-n", "3", "--json", "train.py", *FLAGS, *flags]
    words += ["--mpips.run_dir", "run", "--mpips.chaos", "delay:rank=1@3:1ms"]
    before = os.umask(0)
    try:
        return run(words, folder, 90, launch_environment() | SECRETS)
    finally:
        os.umask(before)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_files_of_its_owner_without_secrets(fails: bool, tmp_path: Path) -> None:
    ended = launched(tmp_path, *(["--fail"] if fails else []))
    assert ended.returncode == fails, ended.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names > {"config.yaml", "env.json", "events.jsonl", "metrics.csv", "rank_0000.log", "rank_0002.log", "chaos.log"}
    assert ("DONE" in names) != fails
    assert sum(name.endswith((".h5", ".sha256")) for name in names) >= 4
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == dict.fromkeys(names, "0o600")
    texts = {path.name: path.read_bytes() for path in files}
    texts |= {"stdout": ended.stdout.encode(), "stderr": ended.stderr.encode()}
    assert [name for name, text in texts.items() if b"c4n4ry" in text] == []
    assert f"--api_key '{HIDDEN}' '--token={HIDDEN}'" in ended.stderr
    assert HIDDEN in json.loads(ended.stdout.splitlines()[-1])["command"]
    assert json.loads(texts["env.json"])["variables"]["SLURM_JWT_TOKEN"] == HIDDEN


def test_one_process_leaves_the_same(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    before = os.umask(0)
    try:
        ended = run([sys.executable, "train.py", *FLAGS], tmp_path, 60, launch_environment() | SECRETS)
    finally:
        os.umask(before)
    assert ended.returncode == 0, ended.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert not any(b"c4n4ry" in path.read_bytes() for path in files)


def test_what_is_set_aside_stays_its_owner_s(tmp_path: Path) -> None:
    from mpips import checkpoint

    before = os.umask(0)
    try:
        first = checkpoint.save(tmp_path, 1, {})
        checkpoint.save(tmp_path, 2, {})
        aside = set_newer_aside(first)
    finally:
        os.umask(before)
    assert aside is not None
    assert {stat.S_IMODE(path.stat().st_mode) for path in aside.iterdir()} == {0o600}


def test_shared_memory_is_its_owner_s(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = shared_memory._open(str(tmp_path / "memory"), os.O_CREAT | os.O_EXCL)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600
    os.close(file)


def test_values_of_secrets_are_hidden_in_a_line() -> None:
    line = [
        "train.py",
        "--api_key",
        "a",
        "--hf-token=b",
        "--tokenizer",
        "c",
        "--max_tokens=7",
        "password=d",
        "--key",
        "--lr",
        "1",
    ]
    shown = [
        "train.py",
        "--api_key",
        HIDDEN,
        f"--hf-token={HIDDEN}",
        "--tokenizer",
        "c",
        "--max_tokens=7",
        f"password={HIDDEN}",
    ]
    assert without_secrets(line) == [*shown, "--key", "--lr", "1"]


def test_a_dry_run_shows_the_line_that_runs(tmp_path: Path, solo: Any) -> None:
    (tmp_path / "train.py").write_text("")
    shown = solo("-m", "mpips.cli.main", "run", "-n", "2", "--dry-run", "train.py", *FLAGS)
    assert "--api_key c4n4ry-of-a-flag" in shown.stdout


def test_who_reads_of_security_finds_it() -> None:
    assert "(security.md)" in (ROOT / "docs" / "limits.md").read_text()
    assert "../SECURITY.md" in (ROOT / "docs" / "security.md").read_text()
