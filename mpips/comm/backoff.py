"""The polling of an MPI request: without pauses at first, then yielding the core, then sleeping.

MPI's own blocking calls keep a core busy for as long as they wait. A small answer comes within microseconds, a late one after
minutes. So the pauses grow with the time waited: they delay an arrival by at most an eighth of that time, and by at most
`LONGEST`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SPINS = 100  # attempts without a pause, some 50 us, which is what a sleep costs
YIELDING = 0.0002  # further seconds, in which the core is yielded between two attempts
SHARE = 1 / 8  # the next pause, as a share of the time waited
LONGEST = 0.001  # seconds; an attempt with waking up takes some 10 us, so an idle rank uses about 1 % of a core


def patiently(attempt: Callable[[], T | None]) -> T:
    """Call `attempt` until it returns a true value, and return that value."""
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
