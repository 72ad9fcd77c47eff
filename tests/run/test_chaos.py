"""Faults made on purpose: which texts are a fault, when each is made, that it is made once, what becomes of the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpips.config import Config, ConfigError, check_chaos
from mpips.config.chaos import Fault, faults
from mpips.run import chaos
from tests.cli.test_retry import PYTHONS
from tests.conftest import ROOT, launch_environment, run
from tests.helpers.programs import metrics
from tests.promises.test_resume import assert_same_runs, weights

SCRIPT = ROOT / "tests" / "helpers" / "resumable.py"


def test_a_text_is_a_list_of_faults() -> None:
    text = "kill:rank=2@round=50, stop:rank=1@30,stop:rank=1@9:1.5s,delay:rank=3:200ms,delay:rank=3@7:2m,enospc@ckpt:2"
    assert [(f.kind, f.rank, f.at, f.seconds) for f in faults(text)] == [
        ("kill", 2, 50, 0.0),
        ("stop", 1, 30, 0.0),
        ("stop", 1, 9, 1.5),
        ("delay", 3, 0, 0.2),
        ("delay", 3, 7, 120.0),
        ("enospc", 0, 2, 0.0),
    ]
    assert Config(chaos=text).chaos == text


@pytest.mark.parametrize(
    "text",
    ["", "kill", "kill:rank=1", "kill:rank=-1@3", "kill:rank=1@0", "kill:rank=1@3:2s", "delay:rank=1", "delay:rank=1:3",
     "stop:rank=1@3:x", "enospc@ckpt:0", "enospc@round=3", "kill:rank=1@3,", "kill:rank=1@3;stop:rank=1@4", "kill:rank=1@3\n"],
)  # fmt: skip
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^chaos: given .*, allowed: [^\n]*$"):
        Config(chaos=text + ",x" if text.endswith("\n") else text)


def test_a_rank_that_the_run_has_not_is_refused(solo: Any) -> None:
    check_chaos("kill:rank=2@3", 3)
    with pytest.raises(ConfigError, match="chaos: given 'kill:rank=3@3', allowed: a rank from 0 to 2, as there are 3 ranks"):
        check_chaos("enospc@ckpt:1,kill:rank=3@3", 3)
    refused = solo(SCRIPT, "--chaos", "kill:rank=1@3")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("mpips: chaos: given 'kill:rank=1@3', allowed: a rank from 0 to 0")


def test_without_the_setting_nothing_is_there() -> None:
    program = (
        "import torch, mpips, sys; m = torch.nn.Linear(1, 1); ps = mpips.connect(m, torch.optim.SGD(m.parameters(), lr=1))"
    )
    told = subprocess.run(
        [sys.executable, "-c", f"{program}; print('mpips.run.chaos' in sys.modules, 'step' in vars(ps._worker))"],
        capture_output=True, text=True, check=True, timeout=60, env=launch_environment(),
    )  # fmt: skip
    assert "False False" in told.stdout.splitlines()


def made(due: list[Fault], done: int, rounds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is made before which round, given what the rounds' numbers are when the rank comes to them."""
    log: list[Any] = []
    monkeypatch.setattr(chaos, "time", SimpleNamespace(sleep=lambda s: log.append((number, s)), strftime=time.strftime))
    kept = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "getpid")}
    kept |= {name: getattr(os, name) for name in ("O_WRONLY", "O_APPEND", "O_CREAT")}
    kill = lambda pid, n: log.append((number, signal.Signals(n).name))  # noqa: E731
    monkeypatch.setattr(chaos, "os", SimpleNamespace(kill=kill, **kept))
    notes = chaos.Notes(tmp_path / "notes", 1)
    in_rounds = chaos.InRounds([fault for fault in due if not notes.made(fault)], notes, done)
    for number in rounds:
        in_rounds.make(number)
    return log


def test_each_fault_is_made_once_and_a_delay_in_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due = faults("kill:rank=1@3,stop:rank=1@5,delay:rank=1:2s,delay:rank=1@4:7s")
    first = made(due, 0, [1, 2, 2, 3, 4, 6], tmp_path, monkeypatch)  # a round of two local steps; one that was not this rank's
    assert first == [(1, 2.0), (2, 2.0), (3, "SIGKILL"), (3, 2.0), (4, 2.0), (4, 7.0), (6, "SIGSTOP"), (6, 2.0)]
    again = made(due, 2, [3, 4, 5], tmp_path, monkeypatch)  # the run goes on from round 2
    assert again == [(3, 2.0), (4, 2.0), (5, 2.0)]
    later = made(faults("kill:rank=1@8"), 8, [9, 10], tmp_path, monkeypatch)  # of a round that is done
    assert later == []
    assert (tmp_path / "notes").stat().st_mode & 0o777 == 0o600


def test_one_process_kills_itself_once(solo: Any, tmp_path: Path) -> None:
    flags = ["--chaos", "kill:rank=0@round=30", "--run_dir", "run"]
    killed = solo(SCRIPT, *flags)
    assert killed.returncode == -signal.SIGKILL
    assert "mpips: chaos: rank 0 kills itself in round 30\n" in killed.stderr
    resumed = solo(SCRIPT, *flags, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "chaos" not in resumed.stderr
    assert metrics(tmp_path / "run")[-1]["round"] == 63


def test_a_full_disk_ends_the_run_by_name_and_the_checkpoint_before_stays(solo: Any, tmp_path: Path) -> None:
    flags = ["--chaos", "enospc@ckpt:3", "--run_dir", "run"]
    failed = solo(SCRIPT, *flags)
    assert failed.returncode == 1
    assert "mpips: chaos: rank 0 finds its disk full at checkpoint 3\n" in failed.stderr
    assert "round_00000012.h5: cannot save the checkpoint (No space left on device); free some space" in failed.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [f"round_0000000{n}.h5{end}" for n in (4, 8) for end in ("", ".sha256")]
    assert solo(SCRIPT, *flags, "--resume", "auto").returncode == 0


def launched(python: str, folder: Path, *flags: object, retries: int = 0) -> subprocess.CompletedProcess[str]:
    words = [python, "-m", "mpips.cli.main", "run", "-n", 3, "--retries", retries, SCRIPT, *flags]
    return run(list(map(str, words)), folder, 120, launch_environment())


@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: "own" if python == sys.executable else "mpich")
def test_all_faults_in_one_run_that_starts_again_change_no_bit(python: str, tmp_path: Path) -> None:
    text = "kill:rank=2@round=10,delay:rank=2@12:300ms,stop:rank=1@15:1s,enospc@ckpt:5,kill:rank=0@29"
    whole = launched(python, tmp_path, "--deterministic", "--run_dir", "whole")
    faulty = launched(python, tmp_path, "--deterministic", "--run_dir", "faulty", "--chaos", text, retries=4)
    assert (whole.returncode, faulty.returncode) == (0, 0), faulty.stderr
    said = [line for line in faulty.stderr.splitlines() if line.startswith("mpips: chaos:")]
    assert said == [f"mpips: chaos: rank {rank} {what}" for rank, what in [
        (2, "kills itself in round 10"), (2, "sleeps for 0.3 s in round 12"), (1, "stops itself in round 15 for 1 s"),
        (0, "finds its disk full at checkpoint 5"), (0, "kills itself in round 29"),
    ]], faulty.stderr  # fmt: skip
    again = re.findall(r"mpips: (.*): attempt (\d) of 4 to go on, from (\S+)", faulty.stderr)
    assert [(number, where) for _, number, where in again] == [
        ("1", "round_00000008.h5"), ("2", "round_00000020.h5"), ("3", "round_00000028.h5")
    ]  # fmt: skip
    assert again[0][0] == "rank 2 ended by signal 9: Killed"
    assert "No space left on device" in again[1][0]
    assert weights(faulty.stdout) == weights(whole.stdout)
    assert_same_runs(tmp_path / "whole", tmp_path / "faulty")


@pytest.mark.parametrize("mode", ["async", "local_sgd"])
def test_workers_and_servers_of_other_modes_make_theirs(mode: str, tmp_path: Path) -> None:
    text = "delay:rank=0@2:10ms,kill:rank=1@round=6"
    killed = launched(sys.executable, tmp_path, "--mode", mode, "--run_dir", "run", "--chaos", text)
    assert killed.returncode == 1
    assert "mpips: chaos: rank 0 sleeps for 0.01 s in round 2\n" in killed.stderr
    rounds = re.findall(r"mpips: chaos: rank 1 kills itself in round (\d+)\n", killed.stderr)
    assert [int(number) >= 6 for number in rounds] == [True], killed.stderr  # in mode async other workers' rounds come between
    assert "mpips: rank 1 failed first" in killed.stderr
