"""POSIX semaphores in shared memory: how the ranks of a node wait for each other.

A rank that waits polls for a moment, yielding its core between two attempts, then sleeps in the kernel. So it neither occupies
a core for long nor wakes late. Waking a sleeping rank takes some 5 us, on virtual machines 100 us. Posting and taking a
semaphore also orders the ranks' writes to memory (POSIX, memory synchronization).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

AWAKE = 0.0005  # seconds; a small round is over by then
PAUSE = 0.0001  # seconds between two calls of `meanwhile`; yielding would take half a core from the ranks that work
SIZE = 64  # bytes of a semaphore, a cache line; glibc and musl need at most 32
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

    def take(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Wait until the value is positive, and subtract one. While waiting, call `meanwhile` repeatedly, with pauses."""
        attempt, at = _at_once.sem_trywait, self._at
        if not attempt(at):
            return
        while meanwhile:
            meanwhile()
            time.sleep(PAUSE)
            if not attempt(at):
                return
        awake = time.perf_counter() + self._awake
        while time.perf_counter() < awake:
            os.sched_yield()
            if not attempt(at):
                return
        while _waiting.sem_wait(at):  # interrupted by a signal, whose Python handler runs between two calls
            pass
