"""The lower bound of a round: every rank copies the model once; between hosts, the line rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

LONG = 1 << 24  # bytes; shorter messages do not reach the line rate


class Copy:
    """The memory bound: each rank copies the model's bytes once, between warm buffers."""

    alone = False
    scale = 1.0

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = (np.ones(nbytes // 4, np.float32) for _ in range(2))

    def fill(self) -> None:
        """Do nothing."""

    def round(self) -> None:
        """Copy the bytes."""
        np.copyto(self._target, self._source)


class Line:
    """The network bound: the model's bytes, at least 16 MB, sent one way between the first ranks of two hosts.

    Each of N hosts must send and receive 2(N-1)/N times the model's bytes: `scale` is that amount relative to what is sent
    here.
    """

    alone = False

    def __init__(self, comm: MPI.Comm, leaders: list[int], nbytes: int) -> None:
        self._comm, self._ends = comm, leaders[:2]
        length = max(nbytes, LONG)
        self._buffer = np.ones(length // 4 if comm.rank in self._ends else 0, np.float32)
        self.scale = 2 * (len(leaders) - 1) / len(leaders) * nbytes / length

    def fill(self) -> None:
        """Do nothing."""

    def round(self) -> None:
        """Send one way. The longest time of all ranks is the receiver's."""
        source, target = self._ends
        if self._comm.rank == source:
            self._comm.Send(self._buffer, dest=target)
        elif self._comm.rank == target:
            self._comm.Recv(self._buffer, source=source)


def limit(comm: MPI.Comm, leaders: list[int], nbytes: int) -> Copy | Line:
    """Return the bound that applies: memory on one host, network on several."""
    return Copy(nbytes) if len(leaders) == 1 else Line(comm, leaders, nbytes)
