"""Who is waited for, and which rank says it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpips.comm.flight_recorder import FlightRecorder
from mpips.comm.waits import AGAIN, LATE, UNUSUAL, Told, Waits
from tests.conftest import launch_environment, run
from tests.helpers.deadlines import patient
from tests.promises.test_failure import script
from tests.test_under_mpi import MPICH


def stall(told: Told, begun: float, seconds: float, waiting: list[int]) -> list[str]:
    """What is said while these ranks wait, looking once a second."""
    lines = []
    for second in range(1, int(seconds) + 1):
        for rank in waiting:
            told.hear(rank, second, begun + second)
        lines.append(told.line(begun + second))
    return [line for line in lines if line]


def test_who_does_not_tell_is_named_once() -> None:
    said = stall(Told(0, 4), 100.0, 60, [0, 1])
    assert said == [f"mpips: for {LATE:.0f} s all others have waited for ranks 2, 3\n"]


def test_it_is_said_again_after_a_minute() -> None:
    assert len(stall(Told(0, 4), 0.0, LATE + 2 * AGAIN, [0, 1, 3])) == 3


@pytest.mark.parametrize(("waiting", "speaker"), [([1, 2], 1), ([2], 1), ([0, 2], 0), ([0], 0)])
def test_one_says_it_for_all(waiting: list[int], speaker: int) -> None:
    said = [len(stall(Told(rank, 3), 0.0, LATE + 5, waiting)) for rank in (0, 1)]
    assert said == [1 - speaker, speaker]


def test_what_is_usual_is_not_said() -> None:
    told = Told(0, 2)
    stall(told, 0.0, LATE, [0])
    assert told.line(LATE + 5) == ""  # it is over
    assert stall(told, 100.0, UNUSUAL * LATE - 1, [0]) == []
    assert told.line(200.0) == ""
    assert len(stall(told, 300.0, UNUSUAL * UNUSUAL * LATE, [0])) == 1


def test_nobody_is_named_where_all_wait_or_none_does() -> None:
    assert stall(Told(0, 3), 0.0, 100, [0, 1, 2]) == []
    assert stall(Told(0, 3), 0.0, 100, []) == []


def test_a_wait_is_over_when_it_is_left() -> None:
    waits = Waits()
    assert waits.seconds() == 0.0
    with waits:
        time.sleep(0.01)
        assert 0.01 <= waits.seconds() < 10
    with pytest.raises(KeyError), waits:
        raise KeyError
    assert waits.seconds() == 0.0


SLOW = """
from mpips.comm import waits
waits.LATE, waits.PERIOD, waits.FRESH, waits.UNUSUAL = 1.0, 0.1, 0.3, 0  # ranks may have come to connect late
torch.manual_seed(1)
model = torch.nn.Linear(3, 1)
ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run"{settings})
for _ in ps.epochs(1):
    for step, batch in enumerate(ps.batches(torch.ones(48, 3), 4)):
        loss = model(batch).sum()
        loss.backward()
        {within}
        ps.step(loss)
{after}
"""


KINDS = ["", ", mode='async'", ", ranks_per_node=1", ", ranks_per_node=1, mode='async'", ", rule='median'"]
PLACES = [("round", kind) for kind in KINDS] + [("end", kind) for kind in KINDS[:2]]


@pytest.mark.parametrize(
    ("place", "settings", "python"),
    [(*where, sys.executable) for where in PLACES]
    + [
        pytest.param("round", kind, str(MPICH), marks=pytest.mark.skipif(not MPICH.exists(), reason="no MPICH"))
        for kind in KINDS[:2]
    ],
)
def test_a_slow_worker_is_named_in_every_kind_of_round(
    place: str, settings: str, python: str, mpirun: Callable[..., Any], tmp_path: Path
) -> None:
    nap = "time.sleep(2.5 if rank == 2 and {} else 0.05)"  # async deals batches to whoever is free: rank 1 leaves rank 2 some
    within, after = (nap.format("step == 0"), "") if place == "round" else (nap.format(False), nap.format(True))
    done = mpirun(3, script(tmp_path, SLOW.format(settings=settings, within=within, after=after)), python=python)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "have waited" in line]
    assert said[-1].endswith("s all others have waited for rank 2")


def test_the_deadline_is_of_who_speaks_and_of_a_stall_that_lasts() -> None:
    told = [Told(rank, 3) for rank in (0, 1)]
    for one in told:
        stall(one, 0.0, 20, [0, 1])
    assert [one.overdue(20) for one in told] == [False, False]  # a message may come one look late
    assert [one.overdue(20) for one in told] == [True, False]
    assert [one.overdue(21) for one in told] == [False, False]
    assert [one.overdue(20) for one in told] == [False, False]  # not twice in a row
    assert told[0].missing == [2]
    assert told[0].line(30.0) == ""  # it is over
    assert not told[0].overdue(0)


def test_the_dead_are_not_waited_for_and_after_a_fence_waits_count_anew() -> None:
    told = Told(0, 4)
    told.dead.add(3)
    stall(told, 0.0, 5, [0, 1])
    assert told.missing == [2]
    told.forget(5.0)
    told.hear(1, 5.5, 5.5)  # sent before
    told.line(5.5)
    assert not told.overdue(2)
    assert not told.overdue(2)
    stall(told, 5.0, 3, [0, 1])
    assert [told.overdue(2), told.overdue(2)] == [False, True]


def test_a_record_has_the_stacks_of_all_threads(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, 7, lambda: {"round": 12})
    entered, leave = threading.Event(), threading.Event()

    def naps() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=naps, name="napping")
    thread.start()
    entered.wait()
    recorder.write(0.0)
    recorder.write(3.21)
    leave.set()
    thread.join()
    (path,) = (tmp_path / "stalls").iterdir()
    record = json.loads(path.read_text())
    assert (path.name, record["rank"], record["round"], record["phase"]) == ("rank_0007.json", 7, 12, "waits for 3.2 s")
    assert "in naps: leave.wait()" in "".join(record["threads"]["napping"])
    assert "test_a_record_has_the_stacks" in "".join(record["threads"]["MainThread"])
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_record_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    FlightRecorder(tmp_path / "missing", 0, dict).write(0.0)
    (tmp_path / "stalls").write_text("in the way")
    FlightRecorder(tmp_path, 0, dict).write(0.0)


STUCK = """
from mpips.comm import waits
waits.LATE, waits.PERIOD, waits.FRESH, waits.UNUSUAL = 1.0, 0.1, 0.3, 0
torch.manual_seed(1)
model = torch.nn.Linear(3, 1)
ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run", checkpoint={{"every": 2}}{settings})
for _ in ps.epochs(1):
    for step, batch in enumerate(ps.batches(torch.ones(48, 3), 4)):
        loss = model(batch).sum()
        loss.backward()
        if rank == 2 and ps.round == 3 and not (ROOT / "stuck").exists():
            {stuck}
        ps.step(loss)
"""


def hangs_here(tmp_path: Path, stuck: str, settings: str = "") -> Path:
    body = STUCK.format(settings=settings, stuck=stuck).replace("ROOT", f"__import__('pathlib').Path({str(tmp_path)!r})")
    return script(tmp_path, body)


PYTHONS = [sys.executable, pytest.param(str(MPICH), marks=pytest.mark.skipif(not MPICH.exists(), reason="no MPICH"))]


@pytest.mark.parametrize("python", PYTHONS, ids=["own", "mpich"])
def test_each_rank_records_what_it_does_when_one_is_stuck(python: str, mpirun: Callable[..., Any], tmp_path: Path) -> None:
    done = mpirun(3, hangs_here(tmp_path, "time.sleep(2.5)"), python=python)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "stalls").iterdir())]
    assert [(one["rank"], one["role"]) for one in records] == [(0, "server"), (1, "worker 0"), (2, "worker 1")]
    assert [one["phase"].split()[0] for one in records] == ["waits", "waits", "works"]
    assert "time.sleep(2.5)" in records[2]["threads"]["MainThread"][-1]
    assert records[2]["round"] == 3
    assert "have waited for rank 2" in (tmp_path / "run" / "logs" / "rank_0000.log").read_text()


def test_without_a_stall_nothing_is_recorded(mpirun: Callable[..., Any], tmp_path: Path) -> None:
    assert mpirun(3, hangs_here(tmp_path, "pass"), environment={}).returncode == 0
    assert not (tmp_path / "run" / "stalls").exists()


@pytest.mark.parametrize("python", PYTHONS, ids=["own", "mpich"])
@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_after_the_deadline_the_run_ends_and_is_started_again(python: str, how: str, tmp_path: Path) -> None:
    mark = "(ROOT / 'stuck').touch(); "
    stuck = mark + {"stopped": "os.kill(os.getpid(), 19)", "asleep": "time.sleep(600)"}[how]
    path = hangs_here(tmp_path, stuck, ", deadline=2")
    words = [python, "-m", "mpips.cli.main", "run", "-n", "3", "--retries", "1", str(path)]
    began = time.monotonic()
    done = run(words, tmp_path, 60, launch_environment())
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < patient(45)
    why = "rank 2 was waited for by all others for longer than the deadline, 2 s"
    assert f"mpips: {why}: the run ends\n" in done.stderr
    assert f"mpips: {why}: attempt 1 of 1 to go on, from round_00000002.h5\n" in done.stderr
    names = sorted(path.name for path in (tmp_path / "run" / "stalls").iterdir())
    expected = [f"rank_000{rank}.json" for rank in range(3)]
    assert names[:2] == expected[:2]
    assert names == expected or how == "stopped"  # mpiexec continues a rank before it kills it, in time for a record or not
    assert (tmp_path / "run" / "DONE").exists()
