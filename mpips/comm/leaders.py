"""The leaders of several nodes, over MPI; see `mpips.comm.multi_node`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpips.comm import pieces
from mpips.comm.backoff import patiently
from mpips.comm.multi_node import Begin, Finish, Sent
from mpips.comm.node_group import Op
from mpips.comm.p2p import LARGEST
from mpips.comm.semaphore import AWAKE, PAUSE
from mpips.comm.staging import Staging, memory_of


class MpiLeaderGroup:
    """One leader's end.

    Args:
        mpi: the module.
        comm: the leaders' communicator, which is in their nodes' order.
        staging: for what is on a device.
        bucket: the most bytes of it that are staged at a time.
        waits: a context for the time of each wait.
        beside: whether this rank computes meanwhile, and is to have its core.
    """

    def __init__(
        self, mpi: Any, comm: Any, staging: Staging, bucket: int, waits: AbstractContextManager[None], beside: bool = False
    ) -> None:
        self._waits = waits
        self._mpi, self._comm, self._staging, self._bucket, self._computes = mpi, comm, staging, bucket, beside
        self.node = comm.rank
        self._begun: list[Any] = []

    def allreduce(self, values: Tensor) -> None:
        """See `LeaderGroup`; here those that are early wait for the others, without burning a core."""
        with self._waits:
            patiently(self._comm.Iallreduce(self._mpi.IN_PLACE, values.numpy(), op=self._mpi.SUM).Test)

    def reduce(self, values: Tensor, op: Op) -> None:
        """See `LeaderGroup`."""
        how, first = self._mpi.MIN if op == "min" else self._mpi.SUM, self.node == 0
        for memory in self._staging.through(self._parts(values), read=True, written=first):
            given = (self._mpi.IN_PLACE, memory_of(memory)) if first else (memory_of(memory), None)
            with self._waits:
                self._comm.Reduce(*given, op=how, root=0)

    def broadcast(self, message: Tensor) -> None:
        """See `LeaderGroup`."""
        first = self.node == 0
        for memory in self._staging.through(self._parts(message), read=first, written=not first):
            with self._waits:
                self._comm.Bcast(memory_of(memory), root=0)

    def _parts(self, message: Tensor) -> list[Tensor]:
        largest = self._bucket if message.is_cuda else LARGEST
        return [message[part] for part in pieces(message.numel(), message.element_size(), largest)]

    def persistent_sendrecv(self, sent: Sent, taken: Sent) -> Begin:
        """See `LeaderGroup`; to begin so takes a tenth of the time that making requests anew does."""
        requests = [self._comm.Recv_init(_bytes(room), source=node) for node, room in taken]
        requests += [self._comm.Send_init(_bytes(part), dest=node) for node, part in sent]

        def begin() -> Finish:
            self._begun = requests
            if requests:
                self._mpi.Prequest.Startall(requests)
            return partial(self._wait, requests)

        return begin

    def _wait(self, begun: list[Any]) -> None:
        """Not in MPI's own call, which keeps a core busy until the slowest node is there."""
        asleep = time.perf_counter() + (0 if self._computes else AWAKE)
        with self._waits:
            while not self._mpi.Request.Testall(begun):
                if time.perf_counter() > asleep:
                    time.sleep(PAUSE)

    def progress(self) -> None:
        """See `LeaderGroup`."""
        self._mpi.Request.Testall(self._begun)


def _bytes(tensor: Tensor) -> Any:
    return memory_of(tensor.view(torch.uint8))
