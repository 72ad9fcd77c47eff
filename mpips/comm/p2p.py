"""Requests and answers as MPI messages.

    1 to SMALL bytes     one message; its length tells a whole one from a short one
    more, or none        an empty message, then the length in bytes, then the data in pieces

MPI transfers a large message only while both sides are in MPI calls. So an empty message goes first: a rendezvous. A worker
sends it synchronously, and sends the data when the server has received it. The server sends the data at once, as a worker that
has sent a request polls for the answer at least every millisecond. So the server never waits for a worker that computes.
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
KNOWN = 8  # the most mpi4py buffers that are cached
ASK, ANSWER, REST = 1, 2, 3  # tags; 0 is the tag of `gather_bytes`


class Conversation:
    """One rank's end of the requests.

    Args:
        mpi: the module mpi4py.MPI.
        comm: the MPI communicator.
        waits: a context that is entered for the time of each wait.
    """

    def __init__(self, mpi: Any, comm: Any, waits: AbstractContextManager[None]) -> None:
        self._comm, self._waits = comm, waits
        self._status = mpi.Status()
        self._empty = mpi.buffer.allocate(0)
        self._buffer = mpi.buffer.fromaddress
        self._known: dict[int, tuple[Tensor, int, Any]] = {}  # mpi4py buffers, cached: making one takes a microsecond
        self._probe = partial(comm.Improbe, mpi.ANY_SOURCE, ASK, self._status)

    def receive(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """Receive the next request into `message`, or into `message[tail:]` if it is short, at the server.

        Returns:
            The rank, and whether the request is whole.
        """
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
        """Send the answer to `rank`, which waits for it, at the server."""
        data = self._memory(message)
        if 0 < len(data) <= SMALL:
            self._comm.Send(data, rank, ANSWER)
        else:
            self._comm.Send(self._empty, rank, ANSWER)
            self._give(rank, data)

    def begin(self, request: Tensor) -> Any:
        """Send the request to the server, and return the MPI request that `end` takes."""
        data = self._memory(request)
        if 0 < len(data) <= SMALL:
            return self._comm.Isend(data, SERVER, ASK)
        sent = self._comm.Issend(self._empty, SERVER, ASK)
        with self._waits:
            patiently(sent.Test)
        self._give(SERVER, data)
        return sent

    def end(self, sent: Any, answer: Tensor, short: int) -> bool:
        """Wait for the answer, and return whether it is whole.

        Args:
            sent: what `begin` returned.
            answer: the buffer for the answer.
            short: the number of elements of a short answer.
        """
        data, end = self._memory(answer), short * answer.element_size()
        coming = self._comm.Irecv(data if len(data) <= SMALL else data[:SMALL], SERVER, ANSWER)
        gone = sent.Test()  # progresses the send while the answer is awaited
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
        """Return the bytes of a contiguous tensor, on the host or a device, as an mpi4py buffer."""
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
