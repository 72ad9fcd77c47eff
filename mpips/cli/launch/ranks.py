"""The processes of the ranks on this machine: which one ended first, and how.

Each rank leaves its process id in the launcher's folder. MPICH's mpiexec does not tell which rank failed: it ends all others,
and reports the status of one of them.
"""

from __future__ import annotations

import os
import selectors
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpips.cli.launch.keeper import is_of
from mpips.process.lifecycle import children, environ, stat


@dataclass(frozen=True)
class Fallen:
    """A rank whose process has ended.

    Attributes:
        rank: the rank.
        status: as from `os.waitstatus_to_exitcode`; None if mpiexec has reaped the process already.
        time: the wall clock, as in the ranks' failure reports.
    """

    rank: int
    status: int | None
    time: float


class Ranks:
    """The watch on the ranks' processes.

    Args:
        folder: the launcher's folder, where ranks leave their process ids.
        selector: becomes readable when a process ends; the owner then calls `note`, the key's data being this object.
        parent: mpiexec's process, if its children are watched before they have left their ids. MPI's fault tolerance does not
            end ranks that wait in MPI_Init for one that has died before.

    Attributes:
        fallen: the ranks that have ended, in order.
    """

    def __init__(self, folder: Path, selector: selectors.BaseSelector, parent: int = 0) -> None:
        self._folder, self._selector, self._parent = folder, selector, parent
        self._known: set[str] = set()
        self._open: dict[int, tuple[int, int]] = {}  # descriptor -> rank and process id
        self.fallen: list[Fallen] = []

    def look(self) -> None:
        """Begin to watch processes whose ids have appeared since the last call."""
        for path in self._folder.glob("process_*"):
            if path.name not in self._known:
                with suppress(
                    OSError, ValueError, AttributeError
                ):  # file half written; process gone; no pidfd_open on this system
                    self._watch(int(path.name.removeprefix("process_")), int(path.read_text()))
                    self._known.add(path.name)
        for pid in children(self._parent) if self._parent else ():
            rank = environ(pid).get("OMPI_COMM_WORLD_RANK", "")
            if rank.isdigit() and f"process_{rank}" not in self._known:
                with suppress(OSError, AttributeError):
                    self._watch(int(rank), pid)
                    self._known.add(f"process_{rank}")

    def _watch(self, rank: int, pid: int) -> None:
        """Watch a rank's process."""
        descriptor = os.pidfd_open(pid)
        if not is_of(self._folder, pid):  # a process id of another machine or container
            os.close(descriptor)
            return
        self._open[descriptor] = rank, pid
        self._selector.register(descriptor, selectors.EVENT_READ, self)

    def note(self, descriptor: int) -> None:
        """Take note of a process that has ended."""
        rank, pid = self._open.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        self.fallen.append(Fallen(rank, _status(pid), time.time()))

    def close(self) -> None:
        """Stop watching."""
        for descriptor in self._open:
            self._selector.unregister(descriptor)
            os.close(descriptor)
        self._open.clear()

    def first(self, until: float) -> Fallen | None:
        """Return the first rank that ended before its program did, no later than the time `until`; None if there is none."""
        lost = (one for one in self.fallen if one.status != 0 and not (self._folder / f"left_{one.rank}").exists())
        return next((one for one in lost if one.time <= until), None)


def _status(pid: int) -> int | None:
    """Return how a process has ended, if its parent has not reaped it."""
    fields = stat(pid)
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[:1] == ["Z"] else None
