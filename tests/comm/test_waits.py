"""Who is waited for, and which rank says it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpips.comm.waits import AGAIN, LATE, UNUSUAL, Told, Waits
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
