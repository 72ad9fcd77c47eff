"""The report of the rank for which all others wait: MPI does not tell, but a rank that waits knows that it does.

A thread on each rank that waits sends a message to ranks 0 and 1 every second, on a communicator of its own. The ranks that
send no message are those that the others wait for. Rank 0 reports them; rank 1 does if rank 0 is one of them. Who reports lets
every rank record what it does (`flight_recorder`), and ends the run after the deadline, if there is one. A wait itself costs
one reading of the clock.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
import zlib
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from mpips.comm.flight_recorder import FlightRecorder
from mpips.process.lifecycle import drain, emit, environ, stat, tell_launcher
from mpips.report.run_report import LOG

PERIOD = 1.0  # seconds between two messages; shorter waits are not reported
FRESH = 2.5 * PERIOD  # seconds for which a message counts
LATE, AGAIN = 10.0, 60.0  # seconds until the first report, and until the next one
UNUSUAL = 3  # a wait is reported if it is so many times longer than the longest one so far
SAYS = (0, 1)  # the ranks that receive the messages and report
TELLS = 0.2  # seconds for a rank's last word to reach the others
RECORD = -1.0  # the message that asks a rank to record what it does
FENCE = -2.0  # the message that asks the ranks of a node to kill rank 0 there; less by k: rank k


class Waits:
    """This rank's waits: a context that the rank enters for the time of each wait."""

    def __init__(self) -> None:
        self._begun = 0.0  # when the present wait began; 0 if there is none

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._begun = 0.0

    def seconds(self) -> float:
        """Return how long the present wait has lasted; 0 if this rank does not wait."""
        begun = self._begun
        return time.perf_counter() - begun if begun else 0.0


class Told:
    """The messages that a rank in `SAYS` has received, and the report that follows from them.

    Args:
        rank, size: this rank, and the number of ranks.

    Attributes:
        missing: the ranks that all others wait for; empty if some do not wait.
        dead: the ranks that have died.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.dead: set[int] = set()
        self._told: dict[int, tuple[float, float]] = {}
        self.missing: list[int] = []
        self._longest, self._stall, self._due = 0.0, 0.0, LATE
        self._since = -math.inf
        self._late: list[int] = []  # at the last look

    def hear(self, rank: int, waited: float, now: float) -> None:
        """Note that `rank` has waited for `waited` seconds at the time `now`."""
        self._told[rank] = min(waited, now - self._since), now

    def forget(self, now: float) -> None:
        """Forget all messages: from now on waits count as if they had begun at the time `now`."""
        self._told.clear()
        self._stall, self._since = 0.0, now

    def line(self, now: float) -> str:
        """Return the report of the ranks that all others wait for; an empty string if it is not due."""
        waiting = {rank: waited for rank, (waited, told) in self._told.items() if now - told < FRESH}
        missing = [rank for rank in range(self._size) if rank not in waiting and rank not in self.dead]
        self.missing = missing if waiting else []
        if not self.missing:
            self._longest = max(self._longest, self._stall)
            self._stall, self._due = 0.0, max(LATE, UNUSUAL * self._longest)
            return ""
        self._stall = max(waiting.values())
        if self._stall < self._due:
            return ""
        self._due = self._stall + AGAIN
        if self._rank != (0 in missing):
            return ""
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        return f"mpips: for {self._stall:.0f} s all others have waited for {names}\n"

    def overdue(self, deadline: float) -> bool:
        """Return whether this rank is to report that others have waited as long as the deadline, for the same ranks as before.

        Call it once after each call of `line`. A message may come one look late, so a single look is not trusted.
        """
        late = self.missing if self._stall >= deadline and self._rank == (0 in self.missing) else []
        before, self._late = self._late, late
        return bool(late) and late == before


class Watch:
    """The thread that sends this rank's messages and prints the reports, from its creation until `stop`.

    Args:
        mpi: the module mpi4py.MPI, initialised for calls from several threads.
        comm: an MPI communicator that nobody else uses.
        waits: this rank's waits.
        tolerant: whether MPI lets the others go on when a rank dies. Then this thread ends the run, unless it goes on.
    """

    def __init__(self, mpi: Any, comm: Any, waits: Waits, tolerant: bool = False) -> None:
        self._mpi, self._comm, self._waits, self._tolerant = mpi, comm, waits, tolerant
        self._survives = self._over = False
        self._gone: set[int] = set()  # the neighbours whose processes were gone at the last look
        self._neighbours = _processes_here(comm) if tolerant else {}
        self._told = Told(comm.rank, comm.size)
        self._sent: dict[int, Any] = {rank: None for rank in SAYS if rank != comm.rank}
        self._asked: dict[int, Any] = {}
        self._word, self._room, self._record_word = np.zeros(1), np.zeros(1), np.full(1, RECORD)
        self._recorder: FlightRecorder | None = None
        self._deadline = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="mpips-waits", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, which makes no call of MPI after that."""
        self._ended.set()
        self._thread.join()

    def keep(self, recorder: FlightRecorder, deadline: float, survives: bool = False) -> None:
        """Record by `recorder` from now on.

        Args:
            recorder: records what this rank does.
            deadline: the seconds after which the run ends if all others have waited for a rank; 0: never.
            survives: whether the run goes on without workers that die. Then such a worker is killed after these seconds.
        """
        self._recorder, self._deadline, self._survives = recorder, deadline, survives

    def rest(self) -> None:
        """Note that all ranks have met for the last time, after which each may end."""
        self._over = True

    def end_all(self) -> None:
        """Let the thread of each other rank end that rank, where MPI_Abort ends no other: under MPI's fault tolerance."""
        if self._tolerant:
            self._ended.set()
            self._comm.Revoke()
            time.sleep(TELLS)

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            waited = self._waits.seconds()
            if self._tolerant and self._comm.Is_revoked():
                self._abort()
            try:
                self._note_dead()
                if waited >= PERIOD:
                    self._tell(waited)
                self._hear()
            except self._mpi.Exception:
                if not self._tolerant:
                    raise
                continue  # a rank has died, which is noted in the next turn
            if self._comm.rank not in SAYS:
                continue
            if line := self._told.line(time.perf_counter()):
                emit(2, line)
                if LOG.handlers:
                    LOG.warning(line.strip())
                self._record_everywhere()
            if self._deadline and self._told.overdue(self._deadline):
                if self._survives and 0 not in self._told.missing:
                    self._fence(self._told.missing)
                else:
                    self._end_run()

    def _note_dead(self) -> None:
        """Note the ranks that have died, and end the run if it does not go on without them."""
        if not self._tolerant:
            return
        failed = self._comm.Get_failed()
        if failed.size == len(self._told.dead):
            self._note_ended()
            return
        self._told.dead.update(failed.Translate_ranks(None, self._comm.Get_group()))
        self._comm.Ack_failed(failed.size)
        self._sent = {rank: sent for rank, sent in self._sent.items() if rank not in self._told.dead}
        if self._survives and 0 not in self._told.dead:
            return
        rank, why = min(self._told.dead), "died"
        first = next(rank for rank in range(self._comm.size) if rank not in self._told.dead)
        tell_launcher(rank, why, 1, died=True)
        if self._comm.rank == first:
            emit(2, f"mpips: rank {rank} {why}: the run ends\n")
        else:
            time.sleep(2 * PERIOD)  # until `first` has noticed it, too
        self._abort()

    def _note_ended(self) -> None:
        """End the run if a rank of this node has ended by itself in the middle of it, of which MPI does not tell."""
        before, self._gone = self._gone, {n for n, pid in self._neighbours.items() if stat(pid)[:1] in ([], ["Z"], ["X"])}
        ended = (self._gone & before) - self._told.dead
        if ended and not self._over and self._comm.rank == min(self._neighbours.keys() - self._gone):  # one of a node tells
            rank, why = min(ended), "has ended in the middle of the run"
            emit(2, f"mpips: rank {rank} {why}: all end\n")
            tell_launcher(rank, why, 1, died=True)
            self.end_all()
            self._abort()

    def _record_everywhere(self) -> None:
        """Let each rank record what it does, unless it has not heard the last message."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank and (rank not in self._asked or self._asked[rank].Test()):
                self._asked[rank] = self._comm.Isend(self._record_word, rank)
        self._record()

    def _record(self) -> None:
        if self._recorder:
            self._recorder.write(self._waits.seconds())

    def _fence(self, ranks: list[int]) -> None:
        """Kill workers that all others have waited for too long, so that the run goes on without them."""
        why = f"waited for by all others for longer than the deadline, {self._deadline:g} s"
        for rank in ranks:
            emit(2, f"mpips: rank {rank} was {why}: it is killed, and the others go on\n")
            if LOG.handlers:
                LOG.error("rank %d was %s: it is killed", rank, why)
            word = np.full(1, FENCE - rank)
            sent = [self._comm.Isend(word, other) for other in range(self._comm.size) if other not in {rank, self._comm.rank}]
            self._kill(rank)
            self._mpi.Request.Waitall(sent)
        self._told.forget(time.perf_counter())

    def _kill(self, rank: int) -> None:
        """Kill the process of a rank if it is on this node."""
        pid = self._neighbours.get(rank)
        if pid and environ(pid).get("OMPI_COMM_WORLD_RANK") == str(rank):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _end_run(self) -> None:
        """End the run as a death of the rank that all others wait for."""
        rank, why = self._told.missing[0], f"was waited for by all others for longer than the deadline, {self._deadline:g} s"
        self._record_everywhere()
        emit(2, f"mpips: rank {rank} {why}: the run ends\n")
        if LOG.handlers:
            LOG.error("rank %d %s: the run ends", rank, why)
        tell_launcher(rank, why, 1, died=True)
        time.sleep(2 * PERIOD)  # for the others to record
        self.end_all()
        self._abort()

    def _abort(self) -> None:
        drain()
        self._mpi.COMM_WORLD.Abort(1)

    def _tell(self, waited: float) -> None:
        if self._comm.rank in SAYS:
            self._told.hear(self._comm.rank, waited, time.perf_counter())
        if all(
            sent is None or sent.Test() for sent in self._sent.values()
        ):  # else the receiver has not taken the last message yet
            self._word[0] = waited
            self._sent = {rank: self._comm.Isend(self._word, rank) for rank in self._sent}

    def _hear(self) -> None:
        status = self._mpi.Status()
        found = partial(self._comm.Iprobe, self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status)
        while found() or found():  # Open MPI's sees no message that has not come before its last call
            self._comm.Recv(self._room, status.source)
            if self._room[0] <= FENCE:
                self._kill(int(FENCE - self._room[0]))
                self._told.forget(time.perf_counter())
            elif self._room[0] == RECORD:
                self._record()
            else:
                self._told.hear(status.source, float(self._room[0]), time.perf_counter())


def _processes_here(comm: Any) -> dict[int, int]:
    """Return the process ids of the ranks on this node, by rank; all ranks call this."""
    here = zlib.crc32(f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}".encode())
    known = np.empty((comm.size, 2), dtype=np.int64)
    comm.Allgather(np.array([here, os.getpid()], dtype=np.int64), known)
    return {rank: int(pid) for rank, (where, pid) in enumerate(known) if where == here}
