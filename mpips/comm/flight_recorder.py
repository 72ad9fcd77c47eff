"""What a rank was doing while others waited: one file for each rank, in the run folder, with the stacks of all threads."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mpips.process.files import write_private

FOLDER = "stalls"  # in the run folder


class FlightRecorder:
    """The recorder of one rank.

    Args:
        folder: the run folder.
        rank: this rank.
        facts: returns what the run knows of this rank: its round, its part.
    """

    def __init__(self, folder: Path, rank: int, facts: Callable[[], Mapping[str, object]]) -> None:
        self._path, self._rank, self._facts = folder / FOLDER / f"rank_{rank:04d}.json", rank, facts

    def write(self, waited: float) -> None:
        """Write what this rank does now, and for how many seconds it has waited. The file of an earlier stall is replaced."""
        record = {
            "time": time.time(),
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self._facts(),
            "phase": f"waits for {waited:.1f} s" if waited else "works",
            "threads": _stacks(),
        }
        temporary = self._path.with_name(f".{self._path.name}")
        with suppress(OSError):  # the disk is full, or this rank's machine has not the run folder
            self._path.parent.mkdir(exist_ok=True)
            write_private(temporary, f"{json.dumps(record, indent=2)}\n".encode())
            temporary.replace(self._path)


def _stacks() -> dict[str, list[str]]:
    """Return the stack of each Python thread, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): [
            f"{call.filename}:{call.lineno} in {call.name}: {call.line}" for call in traceback.extract_stack(frame)
        ]
        for ident, frame in sys._current_frames().items()
    }
