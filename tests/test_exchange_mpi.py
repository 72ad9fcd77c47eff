from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_exchange import ExchangeContract, Program

from mpips.exchange import SERVER


def on_mpi(program: Program, bucket: int = 100_000) -> list[Any]:
    """Run a program on all ranks of this job; every rank gets all results."""
    from mpi4py import MPI

    from mpips.exchange.mpi import MpiExchange

    comm = MPI.COMM_WORLD.Dup()
    result = program(MpiExchange(comm, bucket, cuda_aware=False))
    results: list[Any] = comm.allgather(result)
    comm.Free()
    return results


@pytest.fixture
def size() -> int:
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.size)


@pytest.mark.mpi(min_size=2)
class TestMpi(ExchangeContract):
    def run(self, program: Program, size: int) -> list[Any]:
        return on_mpi(program)


@pytest.mark.mpi(min_size=2)
def test_more_than_2_to_the_31_bytes() -> None:
    from mpi4py import MPI

    from mpips.exchange.mpi import MpiExchange

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("2 ranks are enough for 2 GiB each")
    exchange = MpiExchange(MPI.COMM_WORLD.Dup(), 1 << 28, cuda_aware=False)
    numel = 2**31 // 4 + 1000  # float32
    message = torch.full((numel,), float(exchange.rank + 1))
    exchange.combine(message, numel - 1, "sum", lambda part, rows: None)
    exchange.publish(message)
    assert message[0] == message[numel // 2] == message[-1] == 3
    assert exchange.traffic["combine bytes"] == numel * 4 > 2**31


@pytest.mark.mpi(min_size=2)
def test_the_server_memory_for_rows_is_that_of_a_bucket() -> None:
    def program(e: Any) -> int:
        e.combine(torch.zeros(1_000_000), 1_000_000, "rows", lambda part, rows: None)
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
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, False),
    ],
)
def test_more_ranks_than_cores_are_noticed(variables: dict[str, str], crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpips.exchange.mpi import _crowded

    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _crowded() == crowded
