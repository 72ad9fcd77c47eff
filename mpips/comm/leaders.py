"""The group of the nodes' leaders, over MPI; see `mpips.comm.multi_node`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpips.comm import pieces
from mpips.comm.backoff import patiently
from mpips.comm.barrier import AWAKE, PAUSE
from mpips.comm.multi_node import Begin, Finish, Sent
from mpips.comm.node_group import Op
from mpips.comm.p2p import LARGEST
from mpips.comm.staging import Staging, memory_of


class MpiLeaderGroup:
    """One leader's end of the group.

    Args:
        mpi: the module mpi4py.MPI.
        comm: the MPI communicator of the leaders, in the order of their nodes.
        staging: the staging buffers for device memory.
        bucket: the largest message that is staged at a time, in bytes.
        waits: a context that is entered for the time of each wait.
        beside: whether this rank computes during a transfer, so that waiting must leave its core free.
    """

    def __init__(
        self, mpi: Any, comm: Any, staging: Staging, bucket: int, waits: AbstractContextManager[None], computes: bool = False
    ) -> None:
        self._waits = waits
        self._mpi, self._comm, self._staging, self._bucket, self._computes = mpi, comm, staging, bucket, computes
        self.node = comm.rank
        self._begun: list[Any] = []

    def allreduce(self, values: Tensor) -> None:
        """Sum the leaders' values by a non-blocking Allreduce, polled with pauses; see `LeaderGroup`."""
        with self._waits:
            patiently(self._comm.Iallreduce(self._mpi.IN_PLACE, values.numpy(), op=self._mpi.SUM).Test)

    def reduce(self, values: Tensor, op: Op) -> None:
        """Reduce the leaders' values to the first leader, staged where they lie on a device; see `LeaderGroup`."""
        how, first = self._mpi.MIN if op == "min" else self._mpi.SUM, self.node == 0
        for memory in self._staging.through(self._parts(values), read=True, written=first):
            given = (self._mpi.IN_PLACE, memory_of(memory)) if first else (memory_of(memory), None)
            with self._waits:
                self._comm.Reduce(*given, op=how, root=0)

    def broadcast(self, message: Tensor) -> None:
        """Broadcast the first leader's message, staged where it lies on a device; see `LeaderGroup`."""
        first = self.node == 0
        for memory in self._staging.through(self._parts(message), read=first, written=not first):
            with self._waits:
                self._comm.Bcast(memory_of(memory), root=0)

    def _parts(self, message: Tensor) -> list[Tensor]:
        largest = self._bucket if message.is_cuda else LARGEST
        return [message[part] for part in pieces(message.numel(), message.element_size(), largest)]

    def persistent_sendrecv(self, sent: Sent, taken: Sent) -> Begin:
        """Make persistent requests, whose start takes a tenth of the time of new requests; see `LeaderGroup`."""
        requests = [self._comm.Recv_init(_bytes(room), source=node) for node, room in taken]
        requests += [self._comm.Send_init(_bytes(part), dest=node) for node, part in sent]

        def begin() -> Finish:
            self._begun = requests
            if requests:
                self._mpi.Prequest.Startall(requests)
            return partial(self._wait, requests)

        return begin

    def _wait(self, begun: list[Any]) -> None:
        """Poll the requests: MPI's own wait keeps a core busy until the slowest node has arrived."""
        asleep = time.perf_counter() + (0 if self._computes else AWAKE)
        with self._waits:
            while not self._mpi.Request.Testall(begun):
                if time.perf_counter() > asleep:
                    time.sleep(PAUSE)

    def progress(self) -> None:
        """Test the requests under way, which lets MPI move their data; see `LeaderGroup`."""
        self._mpi.Request.Testall(self._begun)


def _bytes(tensor: Tensor) -> Any:
    return memory_of(tensor.view(torch.uint8))
