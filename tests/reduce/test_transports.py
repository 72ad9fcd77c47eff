"""Every transport of a round does what the contract says, on simulated ranks and over MPI."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mpips.comm.simulated import World
from mpips.config import Config
from mpips.model import layout
from mpips.reduce.message_transport import MessageTransport
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.comm.test_mpi import on_mpi
from tests.helpers.contract_transport import Program, TransportContract, end_of


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model is cut up as a large one would be."""
    monkeypatch.setattr(layout, "GRAIN", 64)


class TestMessages(TransportContract):
    def run(self, program: Program, config: Config) -> list[Any]:
        return World(4).run(lambda e: program(end_of(e, config)))

    def test_its_class(self) -> None:
        assert all(isinstance(end, MessageTransport) for end in self.rounds(lambda end: end.transport))


class TestSharedMemoryWithOneServer(TransportContract):
    def run(self, program: Program, config: Config) -> list[Any]:
        return World(4, shares=True).run(lambda e: program(end_of(e, config)))

    def test_its_class(self) -> None:
        assert all(isinstance(end, SharedMemoryTransport) for end in self.rounds(lambda end: end.transport))


class TestSharedMemoryInSlices(TestSharedMemoryWithOneServer):
    plan = "sharded"


class TestTwoNodesWithOneServer(TransportContract):
    def run(self, program: Program, config: Config) -> list[Any]:
        return World(4, shares=True, nodes=(2, 2)).run(lambda e: program(end_of(e, config)))


class TestTwoNodesInSlices(TestTwoNodesWithOneServer):
    plan = "sharded"


class OverMpi(TransportContract):
    @property
    def workers(self) -> list[int]:
        from mpi4py import MPI

        return list(range(1, MPI.COMM_WORLD.size))


@pytest.mark.mpi(min_size=4)
class TestMessagesOverMpi(OverMpi):
    def run(self, program: Program, config: Config) -> list[Any]:
        return on_mpi(lambda e: program(end_of(e, replace(config, shared_memory=False))))


@pytest.mark.mpi(min_size=4)
class TestSharedMemoryOverMpi(OverMpi):
    plan = "sharded"

    def run(self, program: Program, config: Config) -> list[Any]:
        return on_mpi(lambda e: program(end_of(e, config)))
