from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from mpips.comm import CommunicatorError
from mpips.comm.local import LocalCommunicator
from mpips.comm.simulated import Killed, SimulatedCommunicator, World
from tests.helpers.contract_communicator import CommunicatorContract, Program, RequestsContract


@pytest.mark.parametrize("size", [1, 2, 3, 5])
class TestSimulated(CommunicatorContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return World(size, seed=size, bucket=100_000).run(program)


@pytest.mark.parametrize("size", [1])
class TestLocal(CommunicatorContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return [program(LocalCommunicator())]


def test_without_other_ranks_there_are_no_requests() -> None:
    message, local = torch.zeros(2), LocalCommunicator()
    calls = (
        lambda: local.next_request(message, 0),
        lambda: local.respond(1, message),
        lambda: local.request(message, message, 1),
    )
    for call in calls:
        with pytest.raises(CommunicatorError, match="rank 0 of 1 "):
            call()


@pytest.mark.parametrize("size", [2, 3, 5])
class TestRequests(RequestsContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return World(size, seed=size, bucket=100_000).run(program)


def order_of_arrival(seed: int) -> list[int]:
    order: list[int] = []

    def program(e: SimulatedCommunicator) -> None:
        for _ in range(10):
            order.append(e.rank)
            e.broadcast(torch.zeros(1))

    World(3, seed=seed).run(program)
    return order


def test_a_seed_is_a_schedule() -> None:
    assert order_of_arrival(1) == order_of_arrival(1)
    assert len({tuple(order_of_arrival(seed)) for seed in range(20)}) > 15


def test_virtual_time_is_that_of_the_slowest_rank() -> None:
    world = World(2, latency=1.0, bandwidth=4.0)

    def program(e: SimulatedCommunicator) -> float:
        world.sleep(e.rank, 10.0 * e.rank)
        e.broadcast(torch.zeros(2))  # 8 bytes take 2 s
        return e.clock()

    assert world.run(program) == [13.0, 13.0]


def test_a_rank_that_is_elsewhere_is_named() -> None:
    def program(e: SimulatedCommunicator) -> None:
        if e.rank == 1:
            e.broadcast(torch.zeros(1))
        else:
            e.reduce(torch.zeros(2), 1, "sum", lambda part, rows: None)

    with pytest.raises(CommunicatorError, match=r"rank \d is at (broadcast|reduce).*ranks \[.*\] at (broadcast|reduce)"):
        World(3).run(program)


def test_a_rank_that_has_ended_is_named() -> None:
    def program(e: SimulatedCommunicator) -> None:
        if e.rank != 2:
            e.broadcast(torch.zeros(1))

    with pytest.raises(CommunicatorError, match=r"ranks \[0, 1\] wait in broadcast.*\[2\] have ended"):
        World(3).run(program)


def test_a_killed_rank_ends_the_others() -> None:
    world = World(3)
    world.kill(1, call=4)
    ended: list[int] = []

    def program(e: SimulatedCommunicator) -> None:
        try:
            for _ in range(10):
                e.broadcast(torch.zeros(1))
        except CommunicatorError:
            ended.append(e.rank)
            raise

    with pytest.raises(Killed, match="rank 1"):
        world.run(program)
    assert sorted(ended) == [0, 2]


def test_each_rank_has_random_streams_of_its_own() -> None:
    def program(e: SimulatedCommunicator) -> list[float]:
        torch.manual_seed(e.rank)
        drawn = []
        for _ in range(5):
            drawn.append(float(torch.rand(())))
            e.broadcast(torch.zeros(1))
        return drawn

    first = World(3, seed=1).run(program)
    assert first == World(3, seed=2).run(program)
    assert first[0] != first[1]


def test_a_rank_that_has_ended_is_gone_before_others_go_on() -> None:
    """Also what its thread kept: to let go of that may take locks, for which another rank must not wait."""
    kept, gone = threading.local(), list[int]()

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.05)
            gone.append(1)

    def program(e: SimulatedCommunicator) -> int:
        if e.rank:
            kept.held = Slow()
            return 0
        while world.can_run(1):
            world.pause(0)
        return len(gone)

    world = World(2, seed=1)
    assert world.run(program) == [1, 0]
