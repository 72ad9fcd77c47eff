"""Deadlines of tests, on a machine that may do other work, too."""

from __future__ import annotations

import os


def patient(seconds: float) -> float:
    """Return the seconds that something takes at most, given what it takes at most on a machine that does nothing else.

    A second test run beside this one, say, doubles the time. A deadline is there to find what hangs, not what is slow.
    """
    return seconds * max(1.0, max(os.getloadavg()) / len(os.sched_getaffinity(0)))
