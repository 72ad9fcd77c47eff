"""The report of the rank for which all others wait: MPI does not tell, but a rank that waits knows that it does.

A thread on each rank that waits sends a message to ranks 0 and 1 every second, on a communicator of its own. The ranks that
send no message are those that the others wait for. Rank 0 reports them; rank 1 does if rank 0 is one of them. Who reports lets
every rank record what it does (`flight_recorder`), and ends the run after the deadline, if there is one. A wait itself costs
one reading of the clock.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from mpips.comm.flight_recorder import FlightRecorder
from mpips.process.lifecycle import drain, emit, tell_launcher
from mpips.report.run_report import LOG

PERIOD = 1.0  # seconds between two messages; shorter waits are not reported
FRESH = 2.5 * PERIOD  # seconds for which a message counts
LATE, AGAIN = 10.0, 60.0  # seconds until the first report, and until the next one
UNUSUAL = 3  # a wait is reported if it is so many times longer than the longest one so far
SAYS = (0, 1)  # the ranks that receive the messages and report
RECORD = -1.0  # the message that asks a rank to record what it does


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
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._told: dict[int, tuple[float, float]] = {}
        self.missing: list[int] = []
        self._longest, self._stall, self._due = 0.0, 0.0, LATE

    def hear(self, rank: int, waited: float, now: float) -> None:
        """Note that `rank` has waited for `waited` seconds at the time `now`."""
        self._told[rank] = waited, now

    def line(self, now: float) -> str:
        """Return the report of the ranks that all others wait for; an empty string if it is not due."""
        waiting = {rank: waited for rank, (waited, told) in self._told.items() if now - told < FRESH}
        missing = [rank for rank in range(self._size) if rank not in waiting]
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
        """Return whether this rank is to report that, when `line` was called, others had waited as long as the deadline."""
        return self._stall >= deadline and bool(self.missing) and self._rank == (0 in self.missing)


class Watch:
    """The thread that sends this rank's messages and prints the reports, from its creation until `stop`.

    Args:
        mpi: the module mpi4py.MPI, initialised for calls from several threads.
        comm: an MPI communicator that nobody else uses.
        waits: this rank's waits.
    """

    def __init__(self, mpi: Any, comm: Any, waits: Waits) -> None:
        self._mpi, self._comm, self._waits = mpi, comm, waits
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

    def keep(self, recorder: FlightRecorder, deadline: float) -> None:
        """Record by `recorder` from now on, and end the run when others have waited for `deadline` seconds; 0: never."""
        self._recorder, self._deadline = recorder, deadline

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            waited = self._waits.seconds()
            if waited >= PERIOD:
                self._tell(waited)
            self._hear()
            if self._comm.rank not in SAYS:
                continue
            if line := self._told.line(time.perf_counter()):
                emit(2, line)
                if LOG.handlers:
                    LOG.warning(line.strip())
                self._record_everywhere()
            if self._deadline and self._told.overdue(self._deadline):
                self._end_run()

    def _record_everywhere(self) -> None:
        """Let each rank record what it does, unless it has not heard the last message."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank and (rank not in self._asked or self._asked[rank].Test()):
                self._asked[rank] = self._comm.Isend(self._record_word, rank)
        self._record()

    def _record(self) -> None:
        if self._recorder:
            self._recorder.write(self._waits.seconds())

    def _end_run(self) -> None:
        """End the run as a death of the rank that all others wait for."""
        rank, why = self._told.missing[0], f"was waited for by all others for longer than the deadline, {self._deadline:g} s"
        self._record_everywhere()
        emit(2, f"mpips: rank {rank} {why}: the run ends\n")
        if LOG.handlers:
            LOG.error("rank %d %s: the run ends", rank, why)
        tell_launcher(rank, why, 1, died=True)
        time.sleep(2 * PERIOD)  # for the others to record
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
        while self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status):
            self._comm.Recv(self._room, status.source)
            if self._room[0] == RECORD:
                self._record()
            else:
                self._told.hear(status.source, float(self._room[0]), time.perf_counter())
