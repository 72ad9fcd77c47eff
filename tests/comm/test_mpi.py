from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from mpips.comm import SERVER
from tests.helpers.contract_communicator import CommunicatorContract, Program, RequestsContract

T = TypeVar("T")


def on_mpi(program: Program, bucket: int = 100_000) -> list[Any]:
    """Run a program on all ranks of this job; every rank gets all results."""
    from mpi4py import MPI

    from mpips.comm.mpi import MpiCommunicator

    comm = MPI.COMM_WORLD.Dup()
    result = program(MpiCommunicator(comm, bucket, cuda_aware=False))
    results: list[Any] = comm.allgather(result)
    comm.Free()
    return results


def on_one(compute: Callable[[], T]) -> T:
    """Compute what a collective test expects on one rank and give it to all: the others would need the same cores for it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    found: T = comm.bcast(compute() if comm.rank == 0 else None)
    return found


def as_simulated(program: Program) -> Program:
    """The program as a simulated world runs it: it leaves at its end, and gives None on a rank that has only served."""

    def run(communicator: Any) -> Any:
        leaving: list[Callable[[], None]] = []
        communicator.at_end = leaving.append
        try:
            result = program(communicator)
            for leave in leaving:
                leave()
        except SystemExit as end:
            if end.code:
                raise
            return None
        return result

    return run


@pytest.fixture
def size() -> int:
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.size)


@pytest.mark.mpi(min_size=2)
class TestMpi(CommunicatorContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return on_mpi(program)


def on_star(program: Program) -> list[Any]:
    """As `on_mpi`, by the communicator of runs that go on without workers that die; here none does."""
    from mpips.comm.star import StarCommunicator

    return on_mpi(lambda plain: program(StarCommunicator(plain)))


@pytest.mark.mpi(min_size=2)
class TestStar(CommunicatorContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return on_star(program)


@pytest.mark.mpi(min_size=2)
class TestRequestsOfStar(RequestsContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return on_star(program)


@pytest.mark.mpi(min_size=2)
class TestRequests(RequestsContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return on_mpi(program)


@pytest.mark.mpi(min_size=2)
class TestRequestsInPieces(RequestsContract):
    @pytest.fixture(autouse=True)
    def small_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mpips.comm import p2p as conversation

        monkeypatch.setattr(conversation, "SMALL", 40)
        monkeypatch.setattr(conversation, "LARGEST", 30_000)

    def run(self, program: Program, size: int) -> list[Any]:
        return on_mpi(program)


@pytest.mark.mpi(min_size=2)
class TestRequestsWithoutThreads(RequestsContract):
    """Where MPI was started without support for them: the whole conversation takes place when its end is waited for."""

    def run(self, program: Program, size: int) -> list[Any]:
        def without_threads(e: Any) -> Any:
            e._threads = False
            return program(e)

        return on_mpi(without_threads)


@pytest.mark.mpi(min_size=2)
def test_the_server_does_not_wait_for_a_rank_that_computes(tmp_path: Path) -> None:
    """Rank 1 asks with a large message, and makes no MPI call until the server has replied."""

    def program(e: Any) -> bool:
        numel, room = 1_000_000, torch.zeros(1_000_000)
        replied = Path(e.comm.bcast(str(tmp_path / "replied")))
        if e.rank == SERVER:
            e.next_request(room, 0)
            e.respond(1, torch.ones(numel))
            replied.touch()
        elif e.rank == 1:
            finish = e.request(torch.zeros(numel), room, 1, overlap=True)
            deadline = time.monotonic() + 20
            while not replied.exists():
                assert time.monotonic() < deadline, "the server waits"
            assert finish()
            assert bool((room == 1).all())
        return True

    assert all(on_mpi(program))


@pytest.mark.mpi(min_size=2)
def test_an_error_beside_surfaces_where_the_answer_is_taken() -> None:
    def program(e: Any) -> bool:
        def fail(request: Any) -> None:
            raise ZeroDivisionError("work")

        e._conversation.begin = fail
        with pytest.raises(ZeroDivisionError, match="work"):
            e.request(torch.zeros(4), torch.zeros(4), 1, overlap=True)()
        return True

    assert all(on_mpi(program))


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_leaves_its_core_to_others() -> None:
    def program(e: Any) -> float:
        message, used = torch.zeros(4), time.process_time()
        if e.rank == SERVER:
            held = [e.next_request(message, 0)[0] for _ in range(e.size - 1)]
            time.sleep(1)
            for rank in held:
                e.respond(rank, message)
            used = time.process_time()
            e.next_request(message, 0)
            share = time.process_time() - used
            e.respond(1, message)
            return share
        e.request(message, torch.zeros(4), 1)()
        share = time.process_time() - used
        if e.rank == 1:
            time.sleep(1)
            e.request(message, torch.zeros(4), 1)()
        return share

    assert max(on_mpi(program)) < 0.2  # seconds; a rank that spins takes 1


@pytest.mark.mpi(min_size=2)
def test_more_than_2_to_the_31_bytes() -> None:
    from mpi4py import MPI

    from mpips.comm.mpi import MpiCommunicator

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("2 ranks are enough for 2 GiB each")
    communicator = MpiCommunicator(MPI.COMM_WORLD.Dup(), 1 << 28, cuda_aware=False)
    numel = 2**31 // 4 + 1000  # float32
    message = torch.full((numel,), float(communicator.rank + 1))
    communicator.reduce(message, numel - 1, "sum", lambda part, rows: None)
    communicator.broadcast(message)
    assert message[0] == message[numel // 2] == message[-1] == 3
    assert communicator.traffic["reduce bytes"] == numel * 4 > 2**31


@pytest.mark.mpi(min_size=2)
def test_the_server_memory_for_rows_is_that_of_a_bucket() -> None:
    def program(e: Any) -> int:
        e.reduce(torch.zeros(1_000_000), 1_000_000, "rows", lambda part, rows: None)
        return int(e._rows.numel())

    results = on_mpi(program, bucket=40_000)
    assert results[SERVER] == len(results) * 10_000


@pytest.mark.parametrize(
    ("variables", "crowded"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "9999"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "9999(x2),1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "9999(x2),1", "SLURM_NODEID": "2"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, False),
        ({"PALS_LOCAL_SIZE": "9999"}, True),
    ],
)
def test_more_ranks_than_cores_are_noticed(variables: dict[str, str], crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpips.comm.mpi import _crowded

    monkeypatch.setattr(os, "environ", variables)
    assert _crowded() == crowded
