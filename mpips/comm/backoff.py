"""How a rank waits: eagerly at first, then giving way to others, then asleep.

MPI's own blocking calls keep a core busy however long they wait. A small answer comes within microseconds, and a held one
after minutes; so the pauses grow with the time waited, which delays an arrival by an eighth of it, at most `LONGEST`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SPINS = 100  # tries without a pause, some 50 us: sleeping takes as long
YIELDING = 0.0002  # seconds more in which others may run between two tries
SHARE = 1 / 8  # of the time waited: the next pause
LONGEST = 0.001  # seconds; a try takes some 10 us with waking up, so that an idle rank takes some 1 % of a core


def patiently(attempt: Callable[[], T | None]) -> T:
    """Call `attempt` until it returns something true, and return that."""
    for _ in range(SPINS):
        if got := attempt():
            return got
    begun = time.perf_counter()
    while not (got := attempt()):
        waited = time.perf_counter() - begun
        if waited < YIELDING:
            os.sched_yield()
        else:
            time.sleep(min(waited * SHARE, LONGEST))
    return got
