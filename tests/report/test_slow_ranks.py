"""A rank that the others wait for is named, once, and again after it was as fast as they."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mpips
from mpips.comm.simulated import World
from mpips.report import slow_ranks
from mpips.report.slow_ranks import SlowRanks


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def minute(slow: SlowRanks, clock: Clock, train: dict[int, float], round_s: float, done: tuple[int, ...] = ()) -> list[str]:
    """What is said of a minute of rounds in which the ranks spend so many seconds of their own."""
    found: list[str] = []
    for _ in range(60):
        clock.now += 1.0
        states = [{"rank": rank, "train": own, "round": round_s, "done": rank in done} for rank, own in train.items()]
        found += slow.look([{"rank": 0, "done": False}, *states])
    return found


def test_a_slow_rank_is_named_once_until_it_has_recovered() -> None:
    clock = Clock()
    slow = SlowRanks(60, clock)
    even, uneven = {1: 0.1, 2: 0.11, 3: 0.1}, {1: 0.1, 2: 0.21, 3: 0.1}
    assert minute(slow, clock, even, 0.12) == []
    (line,) = minute(slow, clock, uneven, 0.22)
    assert line.startswith("rank 2 is slow: 0.21 s of its own in a round, the others 0.1 s (median of the last 60 s)")
    assert line.endswith("they wait for it 50 % of the time")
    assert minute(slow, clock, uneven, 0.22) == []
    assert minute(slow, clock, even, 0.12) == []
    assert len(minute(slow, clock, uneven, 0.22)) == 1


def test_a_window_takes_the_memory_of_one_look() -> None:
    clock = Clock()
    slow, states = SlowRanks(60, clock), [{"rank": rank, "train": 0.1, "round": 0.2, "done": False} for rank in range(8)]
    slow.look(states)
    before = sys.getallocatedblocks()
    for _ in range(1000):
        slow.look(states)
    assert sys.getallocatedblocks() - before < 100


@pytest.mark.parametrize(("train", "round_s", "done"), [
    ({1: 0.1, 2: 0.14}, 0.15, ()),  # less than half as long again
    ({1: 0.001, 2: 0.01}, 0.1, ()),  # the round takes its time elsewhere
    ({1: 0.1, 2: 0.3}, 0.3, (1,)),  # nobody waits for it
    ({1: 0.1}, 0.1, ()),
])  # fmt: skip
def test_a_rank_that_nobody_waits_for_is_not_named(train: dict[int, float], round_s: float, done: tuple[int, ...]) -> None:
    clock = Clock()
    assert minute(SlowRanks(60, clock), clock, train, round_s, done) == []


@pytest.mark.parametrize(("settings", "named"), [({}, True), ({"backup_workers": 1}, False), ({"mode": "async"}, False)])
def test_a_run_names_its_slow_rank_unasked(settings: dict[str, Any], named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ranks, "FEWEST", 1)
    monkeypatch.setattr("mpips.report.run_report.EVENTS_A_SECOND", 1e9)
    monkeypatch.setattr("mpips.server.round_server.SlowRanks", lambda: SlowRanks(0.0))
    world = World(4)

    def program(e: Any) -> None:
        net = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        ps = mpips.connect(net, optimizer, communicator=e, run_dir="run", **settings)
        for x in ps.batches(torch.ones(30, 1), 1):
            world.sleep(e.rank, 0.3 if e.rank == 2 else 0.1)
            net(x).sum().backward()
            optimizer.step()

    world.run(program)
    events = map(json.loads, Path("run", "events.jsonl").read_text().splitlines())
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert [line[:14] for line in said] == ["rank 2 is slow"] * named
