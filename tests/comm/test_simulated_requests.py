"""Requests in the simulated world: virtual times, orders, standstills, deaths."""

from __future__ import annotations

import pytest
import torch

from mpips.comm import SERVER, CommunicatorError
from mpips.comm.simulated import Killed, SimulatedCommunicator, World

MESSAGE = torch.zeros(2)  # 8 bytes


def server(world: World, count: int, work: float = 0.0) -> list[tuple[int, float]]:
    """Answer `count` requests, each after `work` seconds; who asked and when it was received."""
    end, came = world.ends[SERVER], []
    for _ in range(count):
        rank, _ = end.next_request(torch.zeros(2), 0)
        came.append((rank, end.clock()))
        world.sleep(SERVER, work)
        end.respond(rank, MESSAGE)
    return came


def ask(end: SimulatedCommunicator) -> float:
    """A round trip; when it was over."""
    end.request(MESSAGE, torch.zeros(2), 1)()
    return end.clock()


@pytest.mark.parametrize("seed", range(10))
def test_virtual_times_are_those_computed_by_hand(seed: int) -> None:
    world = World(3, seed=seed, latency=1.0, bandwidth=4.0)  # a message takes 1 + 8 / 4 = 3 s

    def program(e: SimulatedCommunicator) -> object:
        if e.rank == SERVER:
            return server(world, 5, work=0.5)
        times = []
        for _ in range(4 if e.rank == 1 else 1):
            world.sleep(e.rank, 2.0 if e.rank == 1 else 10.25)  # rank 2 is slow
            times.append(ask(e))
        return times

    came, fast, slow = world.run(program)
    # rank 1 asks at 2, arrives at 5, is answered at 5.5, hears at 8.5: a round of 8.5 s. Rank 2's arrives at 13.25,
    # before rank 1's second (10.5 + 3 = 13.5), which then waits until 13.75.
    assert came == [(1, 5.0), (2, 13.25), (1, 13.75), (1, 22.25), (1, 30.75)]
    assert fast == [8.5, 17.25, 25.75, 34.25]
    assert slow == [16.75]


def test_a_rank_that_overlaps_goes_on_by_its_own_clock() -> None:
    world = World(2, latency=1.0, bandwidth=4.0)

    def program(e: SimulatedCommunicator) -> object:
        if e.rank == SERVER:
            return server(world, 2)
        times = []
        for compute in (1.0, 20.0):
            finish = e.request(MESSAGE, torch.zeros(2), 1, overlap=True)
            world.sleep(1, compute)
            finish()
            times.append(e.clock())
        return times

    assert world.run(program) == [[(1, 3.0), (1, 9.0)], [6.0, 26.0]]


def test_the_server_waits_for_a_rank_that_may_still_ask_earlier() -> None:
    """Whatever the schedule, the request of the rank with the earlier clock is first, though the other's is there."""
    for seed in range(30):
        world = World(3, seed=seed)

        def program(e: SimulatedCommunicator, world: World = world) -> object:
            if e.rank == SERVER:
                return [rank for rank, _ in server(world, 2)]
            if e.rank == 1:
                for _ in range(5):
                    world.pause(1)  # the scheduler may run rank 2 before
            world.sleep(e.rank, float(e.rank))
            return ask(e)

        assert world.run(program)[SERVER] == [1, 2]


def order(seed: int) -> list[int]:
    world = World(5, seed=seed)

    def program(e: SimulatedCommunicator) -> list[int]:
        if e.rank == SERVER:
            return [rank for rank, _ in server(world, 20)]
        for turn in range(5):
            world.time[e.rank] = 10.0 * turn  # all at the same time
            ask(e)
        return []

    return world.run(program)[SERVER]


def test_the_seed_decides_between_simultaneous_arrivals() -> None:
    assert order(3) == order(3)
    orders = [order(seed) for seed in range(20)]
    assert len({tuple(o) for o in orders}) > 15
    assert all(sorted(o[4 * turn : 4 * turn + 4]) == [1, 2, 3, 4] for o in orders for turn in range(5))


def fails(world: World, server_does: str, others_do: str) -> dict[int, str]:
    """Run a program that comes to a standstill; what each rank was told."""
    told: dict[int, str] = {}

    def program(e: SimulatedCommunicator) -> None:
        try:
            for call in (server_does if e.rank == SERVER else others_do).split():
                if call == "serve":
                    server(world, 1)
                elif call == "next_request":
                    e.next_request(torch.zeros(2), 0)
                elif call == "request":
                    ask(e)
                else:
                    e.broadcast(torch.zeros(1))
        except CommunicatorError as error:
            told[e.rank] = str(error)
            raise

    with pytest.raises(CommunicatorError):
        world.run(program)
    return told


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("server_does", "others_do", "said"),
    [
        ("next_request", "", {0: "ranks [0] wait in next_request, [1, 2] have ended"}),
        ("", "request", {1: "ranks [1, 2] wait in request, [0] have ended"}),
        (
            "next_request",
            "broadcast",
            {0: "ranks [1, 2] wait in broadcast(1 x torch.float32) and ranks [0] wait in next_request"},
        ),
        ("broadcast", "request", {2: "ranks [0] wait in broadcast(1 x torch.float32) and ranks [1, 2] wait in request"}),
        (
            "next_request next_request next_request",
            "request",
            {0: "ranks [0] wait in next_request and ranks [1, 2] wait in request"},
        ),
    ],
)
def test_a_standstill_names_ranks_and_calls(seed: int, server_does: str, others_do: str, said: dict[int, str]) -> None:
    told = fails(World(3, seed=seed), server_does, others_do)
    waiting = [0] * bool(server_does) + [1, 2] * bool(others_do)
    assert sorted(told) == waiting, "everybody who waits is told"
    assert all(text in told[rank] for rank, text in said.items())


@pytest.mark.parametrize("call", range(4))  # ask, answer, ask, answer
def test_a_killed_rank_leaves_the_others_served_and_the_server_told(call: int) -> None:
    world = World(3, seed=call)
    world.kill(1, call=call)
    served: list[tuple[int, float]] = []
    told: list[str] = []

    def program(e: SimulatedCommunicator) -> None:
        if e.rank != SERVER:
            for _ in range(3):
                ask(e)
            return
        try:
            for _ in range(6):
                served.extend(server(world, 1))
        except CommunicatorError as error:
            told.append(str(error))
            raise

    with pytest.raises(Killed, match="rank 1"):
        world.run(program)
    ranks = [rank for rank, _ in served]
    assert ranks.count(2) == 3, "rank 2 was served to its end"
    assert ranks.count(1) == (call + 1) // 2
    assert told == ["ranks [0] wait in next_request, [1, 2] have ended"]


def test_a_killed_server_ends_the_others() -> None:
    world = World(3)
    world.kill(SERVER, call=3)  # receive, reply, receive, and no second reply

    def program(e: SimulatedCommunicator) -> None:
        if e.rank == SERVER:
            server(world, 2)
        else:
            ask(e)

    with pytest.raises(Killed, match="rank 0"):
        world.run(program)


def test_who_asks_and_who_answers() -> None:
    def program(e: SimulatedCommunicator) -> None:
        with pytest.raises(CommunicatorError, match="rank 0 receives and replies, the others ask"):
            e.request(MESSAGE, MESSAGE, 1) if e.rank == SERVER else e.next_request(MESSAGE, 0)
        if e.rank == SERVER:
            with pytest.raises(CommunicatorError, match="rank 1 is answered, but"):
                e.respond(1, MESSAGE)

    World(2).run(program)
    with pytest.raises(CommunicatorError, match="rank 0 of 1"):
        World(1).ends[0].next_request(MESSAGE, 0)


def test_no_other_call_while_a_request_is_under_way() -> None:
    world = World(2)

    def program(e: SimulatedCommunicator) -> None:
        if e.rank == SERVER:
            server(world, 1)
            return
        finish = e.request(MESSAGE, torch.zeros(2), 1)
        with pytest.raises(CommunicatorError, match=r"rank 1 calls broadcast.* before it has taken the answer"):
            e.broadcast(MESSAGE)
        finish()

    world.run(program)


def test_the_request_may_be_of_no_other_length() -> None:
    def program(e: SimulatedCommunicator) -> None:
        if e.rank == SERVER:
            with pytest.raises(CommunicatorError, match="rank 1 sent 12 bytes where 16 or 8 are expected"):
                e.next_request(torch.zeros(4), 2)
        else:
            e.request(torch.zeros(3), torch.zeros(4), 1)

    World(2).run(program)
