"""How the ranks of a node wait for each other, and who says for whom."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mpips.exchange import node
from mpips.exchange.node import Gates
from mpips.exchange.semaphore import SIZE


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(node, "LATE", 0.2)
    monkeypatch.setattr(node, "emit", lambda stream, text: lines.append(text))
    return lines


def gates(count: int) -> list[Gates]:
    memory = mmap.mmap(-1, count * SIZE)
    made = [Gates(memory, rank, count) for rank in range(count)]
    for gate in made:
        gate.members = range(10, 10 + count)
    return made


def meet(gate: Gates, before: float = 0.0, between: float = 0.0, meanwhile: Any = None) -> None:
    time.sleep(before)
    gate.arrive(meanwhile)
    time.sleep(between)
    gate.release()


@pytest.mark.parametrize("meanwhile", [None, lambda: None])
def test_who_is_waited_for_long_is_said_once(said: list[str], meanwhile: Any) -> None:
    ranks = gates(4)
    with ThreadPoolExecutor(4) as pool:
        for met in [pool.submit(meet, r, 0.8 * (k > 1), 0.0, None if k else meanwhile) for k, r in enumerate(ranks)]:
            met.result(10)
    assert [line.partition("all ")[2] for line in said] == ["have waited for ranks 12, 13\n"]


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_leader_that_is_waited_for_is_named_by_one(said: list[str], when: str) -> None:
    ranks = gates(3)
    with ThreadPoolExecutor(3) as pool:
        for met in [pool.submit(meet, gate, **{when: 0.0 if k else 0.8}) for k, gate in enumerate(ranks)]:
            met.result(10)
    assert [line.partition("all ")[2] for line in said] == ["have waited for rank 10\n"]


def test_what_is_usual_is_not_said(said: list[str]) -> None:
    ranks = gates(2)
    for gate in ranks:
        gate._longest, gate._due = 0.4, 1.2
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            for met in [pool.submit(meet, gate, 0.5 * k) for k, gate in enumerate(ranks)]:
                met.result(10)
    assert said == []
