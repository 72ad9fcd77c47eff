"""The shared memory of one node's ranks, and the barrier by which these wait for each other.

The barrier is made of POSIX semaphores in that memory. A rank that waits polls for a moment, yielding its core between two
attempts, then sleeps in the kernel. So it neither occupies a core for long nor wakes late. Waking a sleeping rank takes some
5 us, on virtual machines 100 us. Posting and taking a semaphore also orders the ranks' writes to memory (POSIX, memory
synchronization).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from mpips.comm import shared_memory

AWAKE = 0.0005  # seconds; a small round is over by then
PAUSE = 0.0001  # seconds between two calls of `meanwhile`; yielding would take half a core from the ranks that work
SIZE = 64  # bytes of a semaphore, a cache line; glibc and musl need at most 32
LOOK = 0.002  # seconds of sleep until a leader looks whether a rank has died
WORD = 48  # where a rank's count of arrivals lies behind its semaphore
FindLost = Callable[[], Set[int]]
_at_once = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL, for calls that return at once
_waiting = ctypes.CDLL(None, use_errno=True)


class Semaphore:
    """A semaphore in memory that several processes map.

    Args:
        memory: the mapped memory.
        offset: the semaphore's offset there, in bytes.
        awake: the seconds to poll before sleeping.
    """

    def __init__(self, memory: mmap.mmap, offset: int, awake: float = AWAKE) -> None:
        self._awake = awake
        self._held = ctypes.c_char.from_buffer(memory, offset)  # so that the memory stays mapped
        self._at = ctypes.c_void_p(ctypes.addressof(self._held))

    def create(self) -> None:
        """Initialise the semaphore with the value 0; one process does this before the others use it."""
        if _at_once.sem_init(self._at, 1, 0):
            raise OSError(ctypes.get_errno(), "sem_init failed")

    def post(self) -> None:
        """Add one to the value, and wake a process that waits."""
        _at_once.sem_post(self._at)

    def try_take(self) -> bool:
        """Subtract one if the value is positive; return whether it was."""
        return not _at_once.sem_trywait(self._at)

    def take(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Wait until the value is positive, and subtract one. While waiting, call `meanwhile` repeatedly, with pauses."""
        if meanwhile:
            while not self.try_take():
                meanwhile()
                time.sleep(PAUSE)
            return
        awake = time.perf_counter() + self._awake
        while time.perf_counter() < awake:
            if self.try_take():
                return
            os.sched_yield()
        while _waiting.sem_wait(self._at):  # interrupted by a signal, whose Python handler runs between two calls
            pass

    def take_within(self, seconds: float) -> bool:
        """Wait at most so many seconds until the value is positive, and subtract one; return whether it was."""
        until = time.perf_counter() + min(seconds, self._awake)
        while time.perf_counter() < until:
            if self.try_take():
                return True
            os.sched_yield()
        at = time.time() + seconds
        spec = (ctypes.c_long * 2)(int(at), int(at % 1 * 1e9))  # a struct timespec
        return not _waiting.sem_timedwait(self._at, spec)


class NodeBarrier:
    """A barrier in two halves, made of one semaphore for each rank: all arrive at the leader, rank 0, who then releases them.

    Args:
        mapped: shared memory that begins with one semaphore for each rank.
        rank, size: this rank's number on its node, and the number of ranks there.
        awake: the seconds that a rank polls before it sleeps.
        waits: a context that is entered for the time of each wait.

    Attributes:
        leads: whether this rank is the leader.
        absent: the dead ranks that had not arrived when all others had, at the leader; see `SurvivingBarrier`.
    """

    absent: Set[int] = frozenset()

    def __init__(
        self, mapped: Any, rank: int, size: int, awake: float = AWAKE, waits: AbstractContextManager[None] | None = None
    ) -> None:
        self.leads = rank == 0
        self._waits = waits or nullcontext()
        self._semaphores = [Semaphore(mapped, SIZE * number, awake) for number in range(size)]
        self._own = self._semaphores[rank]
        if self.leads:
            for semaphore in self._semaphores:
                semaphore.create()

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Announce that this rank has arrived. The leader waits until all ranks have, and calls `meanwhile` while it waits."""
        if not self.leads:
            self._semaphores[0].post()
            return
        for _ in self._semaphores[1:]:
            self._take(meanwhile)

    def release(self) -> None:
        """Release the other ranks, at the leader, after `arrive`; elsewhere, wait for the release."""
        if not self.leads:
            self._take()
            return
        for semaphore in self._semaphores[1:]:
            semaphore.post()

    def _take(self, meanwhile: Callable[[], object] | None = None) -> None:
        if not self._own.try_take():
            with self._waits:
                self._own.take(meanwhile)


class SurvivingBarrier(NodeBarrier):
    """A barrier whose leader does not wait for ranks that have died.

    A rank counts its arrivals in shared memory, so that the leader knows whether a rank died before or after it arrived; a post
    of its semaphore only wakes the leader. Here the ranks' numbers are those of the whole run, on its only node.

    Args:
        mapped, rank, size, awake, waits: as in `NodeBarrier`.
        find_lost: returns the ranks that have died.
    """

    def __init__(
        self, mapped: Any, rank: int, size: int, awake: float, waits: AbstractContextManager[None] | None, find_lost: FindLost
    ) -> None:
        super().__init__(mapped, rank, size, awake, waits)
        self._rank, self._find_lost, self._arrivals = rank, find_lost, 0
        self._lost: set[int] = set()
        self._counts = np.frombuffer(mapped, np.int64, size * SIZE // 8)[WORD // 8 :: SIZE // 8]  # by rank

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """See `NodeBarrier`."""
        self._arrivals += 1
        if not self.leads:
            self._order()
            self._counts[self._rank] = self._arrivals
            self._semaphores[0].post()
            return
        if self._missing() - self._lost:
            with self._waits:
                while self._missing() - self._lost:
                    if not self._own.take_within(LOOK):
                        self._lost = set(self._find_lost())
        self.absent = self._missing()
        self._order()

    def _order(self) -> None:
        """Order memory around a count, which says that a message is whole: not all processors keep the order of writes."""
        self._own.post()
        self._own.try_take()

    def _missing(self) -> set[int]:
        """Return the ranks that have not arrived, whose messages may be half written."""
        return {rank for rank in range(1, len(self._counts)) if self._counts[rank] < self._arrivals}


def mapped(
    node: Any,
    sizes: list[int],
    awake: float = AWAKE,
    waits: AbstractContextManager[None] | None = None,
    find_lost: FindLost | None = None,
) -> tuple[list[Tensor], NodeBarrier] | None:
    """Map memory that all ranks of the MPI communicator `node` share.

    Args:
        node: the MPI communicator of the node's ranks.
        sizes: the sizes of the tensors, in bytes.
        awake: the seconds that a rank polls before it sleeps.
        waits: a context that is entered for the time of each wait.
        find_lost: returns the ranks that have died, if the others go on without them; on a run's only node.

    Returns:
        A uint8 tensor of zeros for each size, and the ranks' barrier. None, on all ranks, if the ranks ask for different sizes
        or the node has too little memory.
    """
    starts, end = [], SIZE * node.size
    for size in sizes:
        end = -(-end // shared_memory.PAGE) * shared_memory.PAGE if size else end
        starts.append(end)
        end += size
    asked = np.empty((node.size, 2), dtype=np.int64)
    node.Allgather(np.array([len(sizes), end], dtype=np.int64), asked)
    parts = zip([0, *starts], [SIZE * node.size, *sizes], strict=True)  # each rank allocates its share of each part
    own = [slice(at + size * node.rank // node.size, at + size * (node.rank + 1) // node.size) for at, size in parts]
    shared = shared_memory.mapped(node, end, own) if (asked == asked[0]).all() else None
    if shared is None:
        return None
    given = shared, node.rank, node.size, awake, waits
    barrier = SurvivingBarrier(*given, find_lost) if find_lost else NodeBarrier(*given)
    node.Barrier()
    return [shared_memory.tensor(shared, start, size) for start, size in zip(starts, sizes, strict=True)], barrier
