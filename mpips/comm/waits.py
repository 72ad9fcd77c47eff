"""Who is waited for: no call of MPI says it, but a rank that waits knows that it does.

A thread of each rank tells rank 0 and rank 1 once a second that the rank waits, on a communicator of its own. All others wait
for whoever does not tell. Rank 0 says so; rank 1 does where rank 0 is waited for. A wait costs a reading of the clock.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from mpips.process.lifecycle import emit

PERIOD = 1.0  # seconds between two looks; who waits for less does not tell
FRESH = 2.5 * PERIOD  # seconds for which it counts that a rank has told
LATE, AGAIN = 10.0, 60.0  # seconds until it is said who is waited for, and again
UNUSUAL = 3  # times the longest wait that is behind
SAYS = (0, 1)  # the ranks that are told


class Waits:
    """This rank's waits: a context that it enters for the time of each."""

    def __init__(self) -> None:
        self._begun = 0.0  # of the present wait; 0 while there is none

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._begun = 0.0

    def seconds(self) -> float:
        """How long this rank has waited by now; 0 if it does not wait."""
        begun = self._begun
        return time.perf_counter() - begun if begun else 0.0


class Told:
    """What one of `SAYS` has been told, and the line that follows from it.

    Args:
        rank, size: this rank, and how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._told: dict[int, tuple[float, float]] = {}
        self._longest, self._stall, self._due = 0.0, 0.0, LATE

    def hear(self, rank: int, waited: float, now: float) -> None:
        """A rank tells at `now` that it has waited for so many seconds."""
        self._told[rank] = waited, now

    def line(self, now: float) -> str:
        """Whom all others have waited for, if that is unusually long and has not just been said; else an empty string."""
        waiting = {rank: waited for rank, (waited, told) in self._told.items() if now - told < FRESH}
        missing = [rank for rank in range(self._size) if rank not in waiting]
        if not waiting or not missing:
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


class Watch:
    """The thread that tells and says; from when it is made until `stop`.

    Args:
        mpi: the module mpi4py.MPI, in which several threads may call at a time.
        comm: a communicator that nobody else uses.
        waits: this rank's.
    """

    def __init__(self, mpi: Any, comm: Any, waits: Waits) -> None:
        self._mpi, self._comm, self._waits = mpi, comm, waits
        self._told = Told(comm.rank, comm.size)
        self._sent: dict[int, Any] = {rank: None for rank in SAYS if rank != comm.rank}
        self._word, self._room = np.zeros(1), np.zeros(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="mpips-waits", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread: after this it makes no call of MPI."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            waited = self._waits.seconds()
            if waited >= PERIOD:
                self._tell(waited)
            if self._comm.rank in SAYS:
                self._hear()
                if line := self._told.line(time.perf_counter()):
                    emit(2, line)

    def _tell(self, waited: float) -> None:
        if self._comm.rank in SAYS:
            self._told.hear(self._comm.rank, waited, time.perf_counter())
        if all(sent is None or sent.Test() for sent in self._sent.values()):  # else whom it tells does not listen
            self._word[0] = waited
            self._sent = {rank: self._comm.Isend(self._word, rank) for rank in self._sent}

    def _hear(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status):
            self._comm.Recv(self._room, status.source)
            self._told.hear(status.source, float(self._room[0]), time.perf_counter())
