"""Many bytes for another process of the same machine: memory that one process fills and the other maps.

The memory has no name, so nothing of it is left when both processes have gone. The other process finds it under /proc, and
knows it by a random token. Where that fails (another machine, other process numbers in a container, another system than Linux)
the bytes are sent.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpips.comm import Blob

LEAST = 1 << 20  # bytes; fewer are sent sooner
WORDS = 6  # of the offer: length, process, descriptor, token, machine
_ALIGNED = 64  # bytes; the token comes first

Offer = NDArray[np.int64]


@cache
def _machine() -> int:
    """Return a number that only processes of this machine have, since it was started; 0 if there is none."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:15], 16)
    return 0


def offer(parts: Sequence[Blob]) -> tuple[Offer, int]:
    """Put the bytes of all parts, one behind the other, into memory that another process can map.

    Returns:
        What to tell that process, and the memory's descriptor, to be closed once the process has answered; -1 if the bytes are
        to be sent.
    """
    told = np.zeros(WORDS, dtype=np.int64)
    told[0] = sum(map(len, parts))
    if told[0] < LEAST or not _machine() or not hasattr(os, "memfd_create"):
        return told, -1
    token = secrets.token_bytes(16)
    try:
        memory = os.memfd_create("mpips")
    except OSError:
        return told, -1
    try:
        os.fchmod(memory, 0o600)
        for part in (token.ljust(_ALIGNED, b"\0"), *parts):
            left = memoryview(part)
            while left:
                left = left[os.write(memory, left) :]
    except OSError:  # too little memory
        os.close(memory)
        return told, -1
    told[1:] = [os.getpid(), memory, *np.frombuffer(token, dtype=np.int64), _machine()]
    return told, memory


def take(told: Offer) -> memoryview | None:
    """Map what `offer` has put into memory; None if it is not there, so that the bytes must be sent.

    The memory is this process's from then on, and is freed with the last reference to it.
    """
    length, process, descriptor = (int(number) for number in told[:3])
    if not told[5] or told[5] != _machine():
        return None
    with suppress(OSError, ValueError):
        memory = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(memory).st_size == _ALIGNED + length and os.pread(memory, 16, 0) == told[3:5].tobytes():
                mapped = mmap.mmap(memory, _ALIGNED + length, mmap.MAP_SHARED)
                return memoryview(mapped)[_ALIGNED:]
        finally:
            os.close(memory)
    return None
