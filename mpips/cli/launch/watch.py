"""What a run reports: rank 0's folders, the ranks' failure reports, their stderr.

Invariant: files are only read, and nothing here waits. A file that is missing or half written counts as not there yet.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpips.cli.launch.ranks import Fallen
from mpips.cli.screen import Tail

CLOCKS = 2.0  # seconds by which a file server's clock may differ from this machine's

# mpiexec's messages about the rank that failed first, and its signal if there is one.
BLAME = (
    re.compile(r"process rank (?P<rank>\d+) with PID .* exited on\s+signal (?P<signal>\d+)", re.DOTALL),
    re.compile(r"MPI_ABORT was invoked on rank (?P<rank>\d+)"),
    re.compile(r"Process name: \[[^\]]*,(?P<rank>\d+)\]"),
    re.compile(r"application called MPI_Abort\(.*\) - process (?P<rank>\d+)"),
)
# MPICH's message on stdout: it has a signal, but names a process that mpiexec itself has ended.
HYDRA = re.compile(rb"TERMINATED WITH THE EXIT STRING: [^\n]*\(signal (?P<signal>\d+)\)")
LONGEST = 200  # bytes of that message
LONGEST_LINE = 1 << 16  # bytes of a line that are looked at
BY_SIGNAL = "ended by signal"  # how the text of such a failure begins


@dataclass(frozen=True)
class Failure:
    """The first failure.

    Attributes:
        rank: the rank; None if unknown.
        text: how the rank ended: its traceback, if there is one.
        others: the number of ranks that failed after it.
        died: whether the rank was ended by a signal, or with its node, and not by an exception or a status of its own.
    """

    rank: int | None
    text: str
    others: int = 0
    died: bool = False


class Stderr:
    """The listener to the ranks' output, for the first traceback and for mpiexec's message on the rank that failed first."""

    BEGINS = re.compile(r'Traceback \(most recent call last\)|  File ".*", line \d+$')  # the second: a SyntaxError
    CHAINED = ("Traceback (most", "During handling of", "The above exception")

    def __init__(self) -> None:
        self.half = b""
        self.block: list[str] = []
        self.complete = False
        self.recent: deque[str] = deque(maxlen=3)  # mpiexec's sentences span several lines
        self.rank: int | None = None
        self.signal: int | None = None
        self._last = b""

    def hear(self, data: bytes) -> None:
        """Search output from stdout."""
        data = self._last + data
        if found := HYDRA.search(data):
            self.signal = int(found["signal"])
        self._last = data[-LONGEST:]

    def feed(self, data: bytes) -> None:
        """Search output from stderr, which may come in parts of lines."""
        *lines, rest = (self.half + data).split(b"\n")
        self.half = rest.rpartition(b"\r")[2][-LONGEST_LINE:]  # a progress bar writes one line for ever
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self._traceback(text)
            self._blame(text)

    def _traceback(self, line: str) -> None:
        """Add a line to the first traceback."""
        if self.complete or (not self.block and not self.BEGINS.match(line)):
            return
        chained = line.startswith(self.CHAINED)
        if self._ended() and line and not chained:
            self.complete = True
        elif not self.block or line != self.block[-1]:  # ranks that fail in the same way repeat each other
            self.block.append(line)

    def _ended(self) -> bool:
        """Return whether the traceback has its last line, the exception: the only line that is not indented."""
        last = next((line for line in reversed(self.block) if line), " ")
        return not last[0].isspace() and not last.startswith(self.CHAINED)

    def _blame(self, line: str) -> None:
        """Search the recent lines for mpiexec's message."""
        self.recent.append(line)
        for pattern in BLAME if self.rank is None else ():
            found = pattern.search("\n".join(self.recent))
            if found:
                self.rank = int(found["rank"])
                if "signal" in found.groupdict():
                    self.signal = int(found["signal"])
                return


class Watch:
    """The files that rank 0 and failing ranks leave in the launcher's folder and in the run folder.

    Args:
        folder: the launcher's folder.
        ranks: the number of ranks.
        before: the reader of an earlier attempt's events, which has read them all; None for the first attempt.
    """

    def __init__(self, folder: Path, ranks: int, before: Tail | None = None) -> None:
        self.folder, self.ranks, self._before = folder, ranks, before
        self.since = time.time() - CLOCKS
        self.tail: Tail | None = None

    def run_dir(self) -> Path | None:
        """Return the run folder, once rank 0 has written it down."""
        if self.tail is None and (folder := self._told("run_dir")):
            path = folder / "events.jsonl"
            self.tail = self._before if self._before and self._before.path == path else Tail(path)
        return self.tail.path.parent if self.tail else None

    def _told(self, name: str) -> Path | None:
        """Return the folder that rank 0 has written to the file `name`."""
        with suppress(OSError):
            return Path(os.fsdecode((self.folder / name).read_bytes()))
        return None

    def events(self) -> list[dict[str, object]]:
        """Return new events of this run. The folder of a resumed run also has the events of earlier runs."""
        if not self.run_dir() or not self.tail:
            return []
        times = ((event, event.get("time")) for event in self.tail.read())
        return [event for event, when in times if not isinstance(when, int | float) or when >= self.since]

    def done(self) -> bool:
        """Return whether the script's latest run, not an earlier one in the same folder, has written DONE."""
        folder = self._told("latest_run_dir") or self.run_dir()
        with suppress(OSError):
            return folder is not None and (folder / "DONE").stat().st_mtime >= self.since
        return False

    def left(self) -> int:
        """Return how many ranks have reached the end of their program, after which only MPI's finalisation remains."""
        return len(list(self.folder.glob("left_*")))

    def fault(self) -> Failure | None:
        """Return the first rank with a traceback of faulthandler's, and that; None without one, as under Open MPI."""
        found = [path for path in self.folder.glob("fault_*") if path.stat().st_size]
        if not found:
            return None
        first = min(found, key=lambda path: path.stat().st_mtime)
        text = first.read_text(errors="replace").partition("\nExtension modules:")[0]
        return Failure(int(first.name.removeprefix("fault_")), text.rstrip(), died=True)

    def failures(self, until: float) -> list[dict[str, object]]:
        """Return the ranks' failure reports up to the time `until`, earliest first."""
        reports = []
        for path in self.folder.glob("failure_*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                report = dict(json.loads(path.read_text()))
                numbers = {"time": float(report["time"]), "rank": int(report["rank"]), "status": int(report["status"])}
                reports.append({**report, **numbers})
        return sorted((report for report in reports if report["time"] <= until), key=lambda report: report["time"])


def first_failure(
    reports: list[dict[str, object]], stderr: Stderr, fault: Failure | None = None, fallen: Fallen | None = None
) -> Failure:
    """Return which rank failed first.

    A rank that was killed by a signal leaves no report, and the other ranks' reports are consequences.
    """
    ranks = [report["rank"] for report in reports]
    if stderr.rank is None or (reports and stderr.signal is None):  # MPICH's mpiexec names nobody; else who called MPI_Abort
        if fault is not None:
            return Failure(fault.rank, fault.text, len(set(ranks) - {fault.rank}), died=True)
        noticed = fallen is not None and all(float(str(report["time"])) > fallen.time for report in reports)
        if fallen and noticed and fallen.rank not in ranks:
            traceback = "" if reports else "\n".join(stderr.block)
            text = _ended(fallen.status, stderr.signal, traceback) or "died"
            return Failure(fallen.rank, text, len(ranks), died=text.startswith(BY_SIGNAL) or text == "died")
    if stderr.signal is not None and stderr.rank not in ranks and not (stderr.rank is None and reports):
        return Failure(stderr.rank, _ended(-stderr.signal, None, ""), len(ranks), died=True)
    if reports:
        died, text = bool(reports[0].get("died")), str(reports[0].get("traceback", ""))
        if text == "died" and fallen and fallen.rank == ranks[0]:  # other ranks have told it, and do not know how
            text = _ended(fallen.status, None, "") or text
        return Failure(int(str(ranks[0])), text, len(ranks) - 1, died)
    # A rank that has ended with a status of its own is named. Nobody is where mpiexec, or a node, is gone.
    return Failure(stderr.rank, "\n".join(stderr.block), died=stderr.rank is None and not stderr.block)


def _ended(status: int | None, reported: int | None, traceback: str) -> str:
    """Return how a rank without a report ended: its status if known, else mpiexec's message on one of the ranks."""
    if status is None and not traceback and reported is not None:
        status = -reported
    if status is not None and status < 0:
        return f"{BY_SIGNAL} {-status}: {signal.strsignal(-status)}"
    return traceback or ("" if status is None else f"ended with status {status}")
