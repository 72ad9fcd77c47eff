"""The ranks on this machine, whose processes are known by a word that each has left: which one ended first, and how.

MPICH's mpiexec does not tell: it ends the others, and says how one of all has ended.
"""

from __future__ import annotations

import os
import selectors
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpips.cli.launch.keeper import is_of
from mpips.process.lifecycle import stat


@dataclass(frozen=True)
class Fallen:
    """A rank whose process has ended.

    Attributes:
        status: as `os.waitstatus_to_exitcode` has it; None where mpiexec was faster than we.
        time: by the wall clock, as in the ranks' failure reports.
    """

    rank: int
    status: int | None
    time: float


class Ranks:
    """Watches their processes.

    Args:
        folder: the launcher's, in which they leave their process ids.
        selector: wakes its owner when one ends; it then calls `note` with the key's data.

    Attributes:
        fallen: those that have ended, first one first.
    """

    def __init__(self, folder: Path, selector: selectors.BaseSelector) -> None:
        self._folder, self._selector = folder, selector
        self._known: set[str] = set()
        self._open: dict[int, tuple[int, int]] = {}  # by descriptor: rank and process
        self.fallen: list[Fallen] = []

    def look(self) -> None:
        """Watch those that have left word since the last look."""
        for path in self._folder.glob("process_*"):
            if path.name not in self._known:
                with suppress(OSError, ValueError, AttributeError):  # half written; gone; no such call on this system
                    self._watch(int(path.name.removeprefix("process_")), int(path.read_text()))
                    self._known.add(path.name)

    def _watch(self, rank: int, pid: int) -> None:
        descriptor = os.pidfd_open(pid)
        if not is_of(self._folder, pid):  # another machine's, or container's
            os.close(descriptor)
            return
        self._open[descriptor] = rank, pid
        self._selector.register(descriptor, selectors.EVENT_READ, self)

    def note(self, descriptor: int) -> None:
        """One has ended."""
        rank, pid = self._open.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        self.fallen.append(Fallen(rank, _status(pid), time.time()))

    def close(self) -> None:
        """Watch no longer."""
        for descriptor in self._open:
            self._selector.unregister(descriptor)
            os.close(descriptor)
        self._open.clear()

    def first(self, until: float) -> Fallen | None:
        """The first that ended, up to that moment, before its program's end."""
        lost = (one for one in self.fallen if one.status != 0 and not (self._folder / f"left_{one.rank}").exists())
        return next((one for one in lost if one.time <= until), None)


def _status(pid: int) -> int | None:
    """How a process has ended, as long as its parent has not asked."""
    fields = stat(pid)
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[:1] == ["Z"] else None
