"""The communicator of a run that goes on without workers that die: each message is between the server and one other rank.

If a rank dies in a collective of MPI, some ranks see an error and some a result. A message between two ranks fails for the
one that is left, and for nobody else. So here the server receives from each rank and sends to each: a death costs the dead
rank's messages, and the ranks that live need not hear of it. It takes Open MPI's fault tolerance (ULFM:
`mpiexec --with-ft ulfm`), without which mpiexec ends all ranks when one dies.

Within a node the messages of a round are in shared memory, where `barrier.SurvivingBarrier` waits for those that live.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from mpips.comm import SERVER, Apply, Blob, CommunicatorError, RankLost, pieces
from mpips.comm.mpi import MpiCommunicator, do_not_finalize
from mpips.comm.node_group import BufferSpec, NodeGroup
from mpips.comm.staging import memory_of
from mpips.process.lifecycle import tell_launcher
from mpips.rules import Needs

STAR, ARRIVED, RELEASED, NOTHING = 4, 5, 6, 7  # tags; smaller ones are those of blobs and requests; nobody sends the last
LOOK = 0.001  # seconds between two looks for dead ranks


class StarCommunicator(MpiCommunicator):
    """One rank's end; see `Communicator`.

    Args:
        plain: the communicator of the same ranks by which they have joined. It is used no more.

    Attributes:
        lost: the ranks that have died, as far as this rank knows; the server knows all.
    """

    def __init__(self, plain: MpiCommunicator) -> None:
        super().__init__(plain.comm, *plain.given)
        self.lost: Set[int] = set()
        self.find_lost = self._look
        self._looked = 0.0
        gone = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
        self._gone = {getattr(self._mpi, name, -1) for name in gone}  # error classes

    def node_group(self, spec: BufferSpec) -> NodeGroup | None:
        """Raise CommunicatorError if a rank dies meanwhile: all ranks take part in collectives here; see `Communicator`."""
        try:
            return super().node_group(spec)
        except self._mpi.Exception as error:
            if error.Get_error_class() not in self._gone:
                raise
            raise CommunicatorError("a rank has died while the run began, in which all take part: the run ends") from None

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """Receive each rank's whole message, and only then add it: a rank that dies in between has contributed nothing."""
        self._count("reduce", message)
        if self.rank != SERVER:
            self._give(SERVER, message)
            return
        if needs == "sum":
            row = self._rows_buffer(message.numel(), message)
            for rank in self._others():
                if self._take(rank, row):
                    message.add_(row)
            apply(slice(0, tail), message[:tail].unsqueeze(0))
            return
        rows = self._rows_buffer(self.size * message.numel(), message).view(self.size, -1)
        rows.zero_()
        rows[SERVER] = message
        for rank in self._others():
            if self._take(rank, rows[rank]):
                message[tail:].add_(rows[rank, tail:])
            else:
                rows[rank].zero_()
        for part in pieces(tail, message.element_size(), self._bucket):
            apply(part, rows[:, part])

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""
        self._count("broadcast", message)
        if self.rank != SERVER:
            self._take(SERVER, message)
            return
        for rank in self._others():
            self._give(rank, message)

    def gather_bytes(self, *parts: Blob) -> list[Blob]:
        """Return an empty blob for a rank that has died; see `Communicator`."""
        if self.rank != SERVER:
            with self._with(SERVER):
                self._send_blob(parts)
            return []
        blobs: list[Blob] = [b""] * self.size
        blobs[SERVER] = b"".join(parts)
        for rank in self._others():
            with self._with(rank):
                blobs[rank] = self._receive_blob(rank)
        return blobs

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """Return the server's own digest for a rank that has died; see `Communicator`."""
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        everyone = own.repeat(self.size, 1)
        if self.rank != SERVER:
            self._give(SERVER, own)
        else:
            for rank in self._others():
                row = torch.empty_like(own)
                if self._take(rank, row):
                    everyone[rank] = row
        self.broadcast(everyone)
        return [bytes(row.tolist()) for row in everyone]

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """Raise RankLost if a rank has died; see `Communicator`."""
        while True:
            try:
                return super().next_request(message, tail)
            except self._mpi.Exception as error:
                if error.Get_error_class() not in self._gone:
                    raise
                before = len(self.lost)
                self._acknowledge()
                if len(self.lost) > before:
                    raise RankLost from None

    def respond(self, rank: int, message: Tensor) -> None:
        """Answer nobody if the rank has died; see `Communicator`."""
        with self._with(rank):
            super().respond(rank, message)

    def _ask(self, request: Tensor, answer: Tensor, short: int) -> bool:
        with self._with(SERVER):  # which raises if the server has died
            return super()._ask(request, answer, short)
        return False

    def barrier(self, patience: float | None) -> None:
        """Wait until all ranks that live have called this; see `Communicator`."""
        until = None if patience is None else time.monotonic() + patience
        word = np.zeros(1, dtype=np.int64)
        if self.rank == SERVER:
            for rank in self._others():
                with self._with(rank):
                    self._await(self.comm.Irecv(np.empty(1, dtype=np.int64), rank, ARRIVED), patience, until)
            word[0] = len(self.lost)
            for rank in self._others():
                with self._with(rank):
                    self.comm.Send(word, rank, RELEASED)
        else:
            with self._with(SERVER):
                self.comm.Send(word, SERVER, ARRIVED)
                self._await(self.comm.Irecv(word, SERVER, RELEASED), patience, until)
        self._rest(patience)
        if word[0] and patience is None:  # the last word: nobody ends before all have heard it
            self.comm.Shrink().Barrier()
            do_not_finalize()

    def _others(self) -> Iterator[int]:
        """Yield the ranks that live, but for the server's."""
        return (rank for rank in range(1, self.size) if rank not in self.lost)

    def _give(self, rank: int, message: Tensor) -> None:
        """Send a message to a rank, in pieces; to nobody if it has died."""
        memory = message.contiguous().view(torch.uint8).cpu()
        with self._with(rank):
            for part in pieces(memory.numel(), 1, self._bucket):
                self.comm.Send(memory_of(memory[part]), rank, STAR)

    def _take(self, rank: int, message: Tensor) -> bool:
        """Receive a rank's message, in pieces; return whether it is whole, and not half of it because the rank has died."""
        memory = message.view(torch.uint8)
        room = torch.empty_like(memory, device="cpu") if memory.is_cuda else memory
        with self._with(rank):
            for part in pieces(room.numel(), 1, self._bucket):
                self.comm.Recv(memory_of(room[part]), rank, STAR)
            if room is not memory:
                memory.copy_(room)
            return True
        return False

    @contextmanager
    def _with(self, rank: int) -> Iterator[None]:
        """Do something with another rank. If that has died, note it at the server, and end whatever was done.

        Raises:
            CommunicatorError: the server has died.
        """
        try:
            with self._waits:
                yield
        except self._mpi.Exception as error:
            if error.Get_error_class() not in self._gone:
                raise
            if rank == SERVER:
                tell_launcher(SERVER, "died", 1, died=True)  # else this rank's failure could be the first that it hears of
                raise CommunicatorError("rank 0, the server, has died: the run cannot go on without it") from None
            self.lost |= {rank}

    def _look(self) -> Set[int]:
        """Return the ranks that have died, having looked for them a moment ago."""
        now = time.perf_counter()
        if now > self._looked + LOOK:
            self._looked = now
            with suppress(self._mpi.Exception):  # a rank has died
                self.comm.Iprobe(self._mpi.ANY_SOURCE, NOTHING)  # MPI learns of deaths only within calls
            self._acknowledge()
        return self.lost

    def _acknowledge(self) -> None:
        """Note the ranks that have died, so that messages from any other rank can be received again."""
        failed = self.comm.Get_failed()
        if failed.size:
            self.lost |= set(failed.Translate_ranks(None, self.comm.Get_group()))
            self.comm.Ack_failed(failed.size)
