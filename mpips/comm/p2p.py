"""Requests and answers as MPI messages.

    up to SMALL bytes   one message; its length says what it is
    above, or empty     an empty message, its length in bytes, then the pieces

A large message moves only while both sides attend to MPI. So the empty one goes ahead, and whoever sends the rest knows that
the other is there: a worker sends it when the server has taken the empty message (a synchronous send ends then); the server
at once, since a worker that has asked waits for nothing else, asleep for a millisecond at most. So the server never waits
for a worker that computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mpips.comm import SERVER, landing, pieces
from mpips.comm.backoff import patiently

SMALL = 1 << 16  # bytes; sent in one message
LARGEST = 1 << 28  # bytes in one point-to-point call; far below the 2^31 that a C int counts to
KNOWN = 8  # messages kept ready
ASK, ANSWER, REST = 1, 2, 3  # tags; 0 is that of blobs


class Conversation:
    """One rank's end of the requests.

    Args:
        mpi: the module mpi4py.MPI.
        comm: the communicator.
        waits: a context for the time of each wait.
    """

    def __init__(self, mpi: Any, comm: Any, waits: AbstractContextManager[None]) -> None:
        self._comm, self._byte, self._waits = comm, mpi.BYTE, waits
        self._status = mpi.Status()
        self._empty = mpi.buffer.allocate(0)
        self._buffer = mpi.buffer.fromaddress
        self._known: dict[int, tuple[Tensor, int, Any]] = {}  # messages made ready for MPI: a microsecond each time
        self._probe = partial(comm.Improbe, mpi.ANY_SOURCE, ASK, self._status)

    def receive(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """At the server: the next request, into `message` or `message[tail:]`; who sent it, and whether it is whole."""
        data, start = self._memory(message), tail * message.element_size()
        whole, short = len(data), len(data) - start
        with self._waits:
            found = self._probe() or patiently(self._probe)
        rank, length = self._status.source, self._status.count
        if length == whole > 0:
            found.Recv(data)
        elif length:
            landing(rank, length, whole, short)
            found.Recv(data[start:])
        else:
            found.Recv(self._empty)
            length = self._length(rank)
            self._take(rank, data if landing(rank, length, whole, short) else data[start:])
        return rank, length == whole

    def reply(self, rank: int, message: Tensor) -> None:
        """At the server: answer that rank, which waits."""
        data = self._memory(message)
        if 0 < len(data) <= SMALL:
            self._comm.Send(data, rank, ANSWER)
        else:
            self._comm.Send(self._empty, rank, ANSWER)
            self._give(rank, data)

    def begin(self, request: Tensor) -> Any:
        """Elsewhere: send the request; what `end` is to be given."""
        data = self._memory(request)
        if 0 < len(data) <= SMALL:
            return self._comm.Isend(data, SERVER, ASK)
        sent = self._comm.Issend(self._empty, SERVER, ASK)
        with self._waits:
            patiently(sent.Test)
        self._give(SERVER, data)
        return sent

    def end(self, sent: Any, answer: Tensor, short: int) -> bool:
        """Elsewhere: wait for the answer; whether it is whole."""
        data, end = self._memory(answer), short * answer.element_size()
        coming = self._comm.Irecv(data if len(data) <= SMALL else data[:SMALL], SERVER, ANSWER)
        gone = sent.Test()  # while there is time
        with self._waits:
            patiently(partial(coming.Test, self._status))
        length = self._status.count
        if not gone:
            sent.Wait()
        if length:
            return landing(SERVER, length, len(data), end)
        whole = landing(SERVER, self._length(SERVER), len(data), end)
        self._take(SERVER, data if whole else data[:end])
        return whole

    def _memory(self, tensor: Tensor) -> Any:
        """The bytes of a contiguous tensor, on the host or a device, as mpi4py takes them."""
        address = tensor.data_ptr()
        known = self._known.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == address:
            return known[2]
        if not tensor.is_contiguous():
            raise ValueError(f"a message must be contiguous, not of strides {tensor.stride()}")
        if len(self._known) >= KNOWN:
            self._known.clear()
        data = self._buffer(address, tensor.nbytes)
        self._known[id(tensor)] = tensor, address, data
        return data

    def _give(self, rank: int, data: Any) -> None:
        self._comm.Send(np.array([len(data)], dtype=np.int64), rank, REST)
        for piece in pieces(len(data), 1, LARGEST):
            self._comm.Send(data[piece], rank, REST)

    def _length(self, rank: int) -> int:
        length = np.empty(1, dtype=np.int64)
        self._comm.Recv(length, rank, REST)
        return int(length[0])

    def _take(self, rank: int, data: Any) -> None:
        for piece in pieces(len(data), 1, LARGEST):
            self._comm.Recv(data[piece], rank, REST)
