"""`mpips run --retries`: which endings are worth another attempt, with which settings it goes on, what is said of it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mpips.cli import launch
from mpips.cli.launch import launch_command
from mpips.cli.screen import Lines
from mpips.process.environment import Mpiexec
from tests.cli.test_launch import RANK, SAY, real  # noqa: F401  a fixture
from tests.conftest import ROOT, launch_environment, run
from tests.promises.test_resume import assert_same_runs, weights

pytestmark = pytest.mark.skipif(
    any(int(os.environ.get(name, 1)) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
    reason="a launcher started by every rank of another launcher",
)

# A rank of a fake run: `attempt` is 1, 2, ...; `begin` is what `connect` leaves, `save` a checkpoint with its hash.
ATTEMPT = """
import hashlib, signal
said = pathlib.Path("said"); said.mkdir(exist_ok=True)
attempt = len(list(said.iterdir())) + 1
given = json.loads(os.environ.get("MPIPS_SET", "{}"))
(said / str(attempt)).write_text(json.dumps(given))
folder = pathlib.Path(given.get("run_dir", "run")).absolute()
folder.mkdir(exist_ok=True)
def begin(resume="no"):
    (folder / "config.yaml").write_text(f"resume: {given.get('resume', resume)}\\n")
    run_dir(); event("start")
def save(number):
    (folder / "checkpoints").mkdir(exist_ok=True)
    path = folder / "checkpoints" / f"round_{number:08d}.h5"
    path.write_bytes(b"x")
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(b'x').hexdigest()}  {path.name}\\n")
    event("checkpoint", path=str(path))
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
# It says what Open MPI's says of a rank that was killed or has ended by itself, and ends as it does.
MPIEXEC = """#!/bin/sh
shift 2
"$@"
status=$?
[ $status = 137 ] && echo "prterun noticed that process rank 2 with PID 7 on node a exited on
signal 9 (Killed)." >&2
[ $status = 3 ] && echo "  Process name: [prterun-a-7@1,2] Exit code:    3" >&2
exit $status
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., launch.Outcome]:
    """Run a script's text through a fake mpiexec, again after a death; its outcome."""
    monkeypatch.chdir(tmp_path)
    mpiexec, script = tmp_path / "mpiexec", tmp_path / "script.py"
    mpiexec.write_text(MPIEXEC)
    mpiexec.chmod(0o755)

    def start(source: str, retries: int = 3, timeout: int | None = None, **settings: str) -> launch.Outcome:
        script.write_text(SAY + ATTEMPT + textwrap.dedent(source))

        def command(given: Mapping[str, str], left: int | None) -> launch.LaunchCommand:
            return launch_command(1, [str(script)], settings=given, timeout=left, mpiexec=Mpiexec(str(mpiexec), "unknown", ""))

        return launch.run_again(command, settings, Lines(), retries=retries, timeout=timeout)

    return start


def settings(attempt: int) -> Any:
    return json.loads(Path("said", str(attempt)).read_text())


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "attempt" in line or "again" in line]


def test_a_killed_run_goes_on_from_its_last_checkpoint(fake: Any, capfd: Any) -> None:
    outcome = fake("begin(); save(4); save(8)\nif attempt < 3: die()\ndone()", clip="1.0")
    assert (outcome.exit, outcome.attempts, outcome.failed_rank) == (0, 3, None)
    goes_on = {"clip": "1.0", "run_dir": str(Path("run").absolute()), "resume": "auto"}
    assert [settings(n) for n in (1, 2, 3)] == [{"clip": "1.0"}, goes_on, goes_on]
    how = "mpips: rank 2 ended by signal 9: Killed"
    assert said(capfd) == [f"{how}: attempt {n} of 3 to go on, from round_00000008.h5" for n in (1, 2)]


def test_it_gives_up_with_the_last_status_and_says_where_nothing_moves(fake: Any, capfd: Any) -> None:
    outcome = fake("begin()\nif attempt == 1: save(4)\ndie()", retries=2)
    assert (outcome.exit, outcome.attempts, outcome.failed_rank) == (1, 3, 2)
    how, goes_on = "mpips: rank 2 ended by signal 9: Killed", "of 2 to go on, from round_00000004.h5"
    assert said(capfd) == [
        f"{how}: attempt 1 {goes_on}",
        f"{how}, with no checkpoint since the attempt before: attempt 2 {goes_on}",
        "mpips: no attempt is left of 2",
    ]


def test_attempts_leave_no_descriptor_open(fake: Any) -> None:
    fake("begin(); save(4)\nif attempt == 1: die()\ndone()")  # what is opened once is open from now on
    before = len(os.listdir("/proc/self/fd"))
    fake("begin(); save(attempt)\nif attempt < 6: die()\ndone()")
    assert len(os.listdir("/proc/self/fd")) <= before  # an earlier test's may have been closed meanwhile


def test_a_damaged_checkpoint_is_passed_over_and_said(fake: Any, capfd: Any) -> None:
    fake("begin()\nif attempt == 2: sys.exit(2)\nsave(4); save(8)\n"
         "(folder / 'checkpoints' / 'round_00000008.h5').write_bytes(b'y')\ndie()")  # fmt: skip
    err = capfd.readouterr().err
    assert "round_00000008.h5: damaged" in err
    assert "to go on, from round_00000004.h5" in err


@pytest.mark.parametrize(
    ("source", "attempts"),
    [
        ("die()", 3),  # before connect: there is nothing to go on from, and the death may be the machine's
        ("begin(); die()", 3),
        ("begin(); fail(0, 'ValueError: x'); sys.exit(1)", 1),  # it would come again
        ("begin(); sys.exit(3)", 1),
        ("begin(); save(attempt); fail(0, 'ValueError: x'); sys.exit(1)", 3),
        ("begin(); save(4) if attempt == 1 else None; fail(0, 'ValueError: x'); sys.exit(1)", 2),
        ("begin(); save(4); fail(0, 'mpips: clip: given', status=2); sys.exit(2)", 1),
        ("begin(); save(4); sys.exit(75)", 1),
        ("begin(); save(4); done(); die()", 1),  # the run is complete
        ("begin(); save(4); os.kill(os.getppid(), 9); time.sleep(9)", 3),  # mpiexec died
    ],
)
def test_what_is_worth_another_attempt(fake: Any, source: str, attempts: int) -> None:
    outcome = fake(source, retries=2)
    assert (outcome.attempts, outcome.exit != 0) == (attempts, True)


def test_no_attempt_is_made_after_the_time_limit(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpips.cli.launch.job.AFTER_TERM", 0.3)
    outcome = fake("begin(); save(4)\nif attempt == 1: time.sleep(0.3); die()\ntime.sleep(60)", timeout=1)
    assert (outcome.exit, outcome.attempts) == (1, 2)
    assert fake("begin(); save(4)\ntime.sleep(60)", timeout=1).attempts == 1


def test_a_checkpoint_that_was_named_stays_the_beginning_until_the_run_has_one(fake: Any, capfd: Any) -> None:
    given = {"run_dir": "b", "resume": "a/checkpoints/round_00000002.h5"}
    fake("begin()\nif attempt == 3: save(4)\nif attempt < 4: die()\ndone()", **given)
    goes_on = {"run_dir": str(Path("b").absolute()), "resume": "auto"}
    assert [settings(n) for n in (1, 2, 3, 4)] == [given, given, given, goes_on]
    assert Path("b.1", "config.yaml").exists()
    assert Path("b.2", "config.yaml").exists()
    assert f"in {Path('b.2').absolute()} now" in capfd.readouterr().err


def test_before_the_run_has_begun_its_settings_stay(fake: Any) -> None:
    fake("if attempt == 1: die()\nbegin(); done()", resume="aside", run_dir="a")
    assert settings(2) == {"resume": "aside", "run_dir": "a"}


PYTHONS = [sys.executable, *([os.environ["MPICH_PYTHON"]] if "MPICH_PYTHON" in os.environ else [])]


@pytest.mark.parametrize("victim", [2, 0])
@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: "own" if python == sys.executable else "mpich")
def test_a_rank_killed_at_a_random_round_changes_no_bit(real: Any, tmp_path: Path, python: str, victim: int) -> None:  # noqa: F811
    script, flags = ROOT / "tests" / "helpers" / "resumable.py", ["--deterministic", "--model", "dropout"]
    at = random.Random(f"{victim} {python == sys.executable}").randint(1, 20)
    epoch = 7 if victim == 0 else 11  # rounds: 330 samples in batches of 16, of three workers or two

    def started(*given: object) -> subprocess.CompletedProcess[str]:
        words = [python, "-m", "mpips.cli.main", "run", "-n", 3, "--retries", 2, "--json", script, *flags, *given]
        return run(list(map(str, words)), tmp_path, 120, launch_environment())

    whole = started("--run_dir", "whole")
    # Rank 0 serves and is never in the script's loop: it is told apart by --mpips.server_trains.
    killed = started("--run_dir", "killed", "--die-at", at, "--die-rank", victim, "--die-once",
                     *(["--server_trains"] if victim == 0 else []))  # fmt: skip
    if victim == 0:
        whole = started("--run_dir", "whole", "--server_trains", "--resume", "aside")
    assert (whole.returncode, killed.returncode) == (0, 0), killed.stderr
    assert (tmp_path / "died").exists()
    said = re.findall(r"mpips: (rank \d .*): attempt (\d) of 2 to go on, (from .*)", killed.stderr)
    assert [(how, number) for how, number, _ in said] == [(f"rank {victim} ended by signal 9: Killed", "1")], killed.stderr
    begun = [n for n in range(at) if n % 4 == 0 or n % epoch == 0]  # the last one is written behind the rounds after it
    names = [f"from round_{n:08d}.h5" if n else "from the beginning: there is no checkpoint" for n in [*begun, at]]
    assert said[0][2] in names[-3:], "the last whole one, or the one before if the last was not on the disk yet"
    assert json.loads(killed.stdout.splitlines()[-1])["attempts"] == 2
    assert weights(killed.stdout) == weights(whole.stdout)
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


TWO_RUNS = """
import torch, mpips
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
x = torch.randn(60, 4)
for _ in range(2):
    ps = mpips.connect(model, optimizer, run_dir="run", checkpoint={"every": 5})
    for _ in ps.epochs(2):
        for rows in ps.batches(x, 5):
            model(rows).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    ps.close()
ps.print("weights", model.weight.tolist(), float(optimizer.state[model.weight]["step"]))
"""


def test_a_death_in_a_later_run_of_a_script_is_gone_on_from_too(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_RUNS)

    def started(name: str, *words: str) -> tuple[list[str], str]:
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", "mpips.cli.main", "run", "-n", "2", "--retries", "4", *words, str(tmp_path / "two.py")]
        done = run(command, folder, 150, launch_environment())
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("weights")], done.stderr

    whole, _ = started("whole")
    killed, said = started("killed", "--set", "chaos=kill:rank=1@round=12,kill:rank=0@round=21")
    assert len(whole) == 1
    assert whole == killed
    assert whole[0].endswith(" 48.0")
    assert re.findall(r"rank (\d) ended by signal 9: Killed.*: attempt (\d) of 4", said) == [
        *zip("1010", "1234", strict=True)
    ], said
