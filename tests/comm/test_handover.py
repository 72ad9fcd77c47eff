"""Many bytes go to another process in memory that both map, or are sent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mpips.comm import handover
from tests.helpers.deadlines import patient

BLOB = np.random.default_rng(0).bytes(handover.LEAST + 12_345)


def given_to_another(program: str) -> str:
    """Offer BLOB, in three parts, to a process that runs the program with `told`; return what that prints."""
    told, memory = handover.offer([BLOB[:7], b"", BLOB[7:]])
    assert memory >= 0
    try:
        code = f"import numpy as np, os\nfrom mpips.comm import handover\ntold = np.array({told.tolist()})\n{program}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patient(60))
        return done.stdout.strip()
    finally:
        os.close(memory)


def test_another_process_has_the_bytes_and_may_write_to_them() -> None:
    import hashlib

    program = "import hashlib\nv = handover.take(told)\nprint(hashlib.sha256(v).hexdigest(), not v.readonly)"
    assert given_to_another(program) == f"{hashlib.sha256(BLOB).hexdigest()} True"


@pytest.mark.parametrize("change", ["told[3] += 1", "told[5] += 1", "told[2] += 900", "told[1] = 1 << 22", "told[0] -= 1"])
def test_memory_that_is_not_the_one_offered_is_not_taken(change: str) -> None:
    assert given_to_another(f"{change}\nprint(handover.take(told))") == "None"


def test_the_memory_stays_while_it_is_referred_to() -> None:
    told, memory = handover.offer([BLOB])
    assert os.fstat(memory).st_mode & 0o777 == 0o600
    view = handover.take(told)
    os.close(memory)
    assert view == BLOB
    assert handover.take(told) is None


def test_few_bytes_are_sent() -> None:
    told, memory = handover.offer([b"few"])
    assert (told.tolist(), memory) == ([3, 0, 0, 0, 0, 0], -1)


@pytest.mark.parametrize("call", ["memfd_create", "write"])
def test_without_memory_the_bytes_are_sent(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def fails(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, call, fails)
    told, memory = handover.offer([BLOB])
    assert (told[0], told[1], memory) == (len(BLOB), 0, -1)
    assert len(os.listdir("/proc/self/fd")) == before
