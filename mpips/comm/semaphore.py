"""POSIX semaphores in shared memory: how the ranks of a node wait for each other.

A rank that waits tries for a moment, letting others run between two tries, then sleeps in the kernel: so it neither burns a
core nor is late. To wake a sleeping rank takes some 5 us, on virtual machines 100. Posting and taking a semaphore also orders
what the ranks write to memory (POSIX, memory synchronization).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

AWAKE = 0.0005  # seconds; a small round is over by then
PAUSE = 0.0001  # seconds between two calls of what is to be done meanwhile; yielding would take half of a core from who works
SIZE = 64  # bytes for each, a cache line; glibc and musl need 32 at most
_at_once = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: for calls that return at once
_waiting = ctypes.CDLL(None, use_errno=True)


class Semaphore:
    """One at an address that several processes map.

    Args:
        memory: what they map.
        offset: where in it, in bytes.
        awake: seconds to wait awake before sleeping.
    """

    def __init__(self, memory: mmap.mmap, offset: int, awake: float = AWAKE) -> None:
        self._awake = awake
        self._held = ctypes.c_char.from_buffer(memory, offset)  # so that the memory stays mapped
        self._at = ctypes.c_void_p(ctypes.addressof(self._held))

    def create(self) -> None:
        """Make it, with the value 0; one process does this, before the others use it."""
        if _at_once.sem_init(self._at, 1, 0):
            raise OSError(ctypes.get_errno(), "sem_init failed")

    def post(self) -> None:
        """Add one, and wake who waits for it."""
        _at_once.sem_post(self._at)

    def take(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Wait until it is above zero, and subtract one; `meanwhile` is called again and again, with pauses."""
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
        while _waiting.sem_wait(at):  # a signal came: its Python handler runs between two calls
            pass
