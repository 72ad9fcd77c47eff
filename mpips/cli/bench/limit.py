"""What a round cannot beat: every rank copies the model once; between hosts, the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

LONG = 1 << 24  # bytes; shorter messages do not show the line rate


class Copy:
    """Memory: each rank copies the model's bytes once, between buffers that are warm."""

    alone = False
    scale = 1.0

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = (np.ones(nbytes // 4, np.float32) for _ in range(2))

    def fill(self) -> None:
        """Nothing."""

    def round(self) -> None:
        """Copy."""
        np.copyto(self._target, self._source)


class Line:
    """Network: the model's bytes one way between the first ranks of two hosts, at least 16 MB of them.

    Of N hosts each must send, and receive, 2(N-1)/N of the model's bytes: `scale` is that in terms of what is sent here.
    """

    alone = False

    def __init__(self, comm: MPI.Comm, leaders: list[int], nbytes: int) -> None:
        self._comm, self._ends = comm, leaders[:2]
        length = max(nbytes, LONG)
        self._buffer = np.ones(length // 4 if comm.rank in self._ends else 0, np.float32)
        self.scale = 2 * (len(leaders) - 1) / len(leaders) * nbytes / length

    def fill(self) -> None:
        """Nothing."""

    def round(self) -> None:
        """One way; the longest of all ranks' seconds is the receiver's."""
        source, target = self._ends
        if self._comm.rank == source:
            self._comm.Send(self._buffer, dest=target)
        elif self._comm.rank == target:
            self._comm.Recv(self._buffer, source=source)


def limit(comm: MPI.Comm, leaders: list[int], nbytes: int) -> Copy | Line:
    """The one that binds here."""
    return Copy(nbytes) if len(leaders) == 1 else Line(comm, leaders, nbytes)
