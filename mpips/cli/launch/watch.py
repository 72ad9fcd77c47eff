"""What a run says about itself: rank 0's folders, the ranks' failure reports, their stderr.

Invariant: reading only; nothing here waits, and a file that is missing or half written is simply not there yet.
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

CLOCKS = 2.0  # seconds by which a file server's clock may differ from ours

# mpiexec's own words about who fell first: (rank, signal or nothing).
BLAME = (
    re.compile(r"process rank (?P<rank>\d+) with PID .* exited on\s+signal (?P<signal>\d+)", re.DOTALL),
    re.compile(r"MPI_ABORT was invoked on rank (?P<rank>\d+)"),
    re.compile(r"Process name: \[[^\]]*,(?P<rank>\d+)\]"),
    re.compile(r"application called MPI_Abort\(.*\) - process (?P<rank>\d+)"),
)
# MPICH's, on stdout: only that one has fallen. The process that it names is one of those that it has ended then.
HYDRA = re.compile(rb"TERMINATED WITH THE EXIT STRING: [^\n]*\(signal (?P<signal>\d+)\)")
LONGEST = 200  # bytes of that


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong: which rank, and its traceback where there is one."""

    rank: int | None
    text: str
    others: int = 0  # ranks that failed after it


class Stderr:
    """Listens to the ranks' stderr, and stdout, for the first traceback and for mpiexec's word on who failed first."""

    BEGINS = re.compile(r'Traceback \(most recent call last\)|  File ".*", line \d+$')  # the second: a SyntaxError
    CHAINED = ("Traceback (most", "During handling of", "The above exception")

    def __init__(self) -> None:
        self.half = b""
        self.block: list[str] = []
        self.complete = False
        self.recent: deque[str] = deque(maxlen=3)  # mpiexec's sentences break over lines
        self.rank: int | None = None
        self.signal: int | None = None
        self._last = b""

    def hear(self, data: bytes) -> None:
        """Take what was read from stdout."""
        data = self._last + data
        if found := HYDRA.search(data):
            self.signal = int(found["signal"])
        self._last = data[-LONGEST:]

    def feed(self, data: bytes) -> None:
        """Take what was read; lines may come in pieces."""
        *lines, self.half = (self.half + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self._traceback(text)
            self._blame(text)

    def _traceback(self, line: str) -> None:
        if self.complete or (not self.block and not self.BEGINS.match(line)):
            return
        chained = line.startswith(self.CHAINED)
        if self._ended() and line and not chained:
            self.complete = True
        elif not self.block or line != self.block[-1]:  # ranks that fail alike repeat each other
            self.block.append(line)

    def _ended(self) -> bool:
        """Whether the block has its last line, the exception: it alone is not indented."""
        last = next((line for line in reversed(self.block) if line), " ")
        return not last[0].isspace() and not last.startswith(self.CHAINED)

    def _blame(self, line: str) -> None:
        self.recent.append(line)
        for pattern in BLAME if self.rank is None else ():
            found = pattern.search("\n".join(self.recent))
            if found:
                self.rank = int(found["rank"])
                if "signal" in found.groupdict():
                    self.signal = int(found["signal"])
                return


class Watch:
    """What rank 0 and the failing ranks leave in the launcher's folder and in the run folder."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.since = time.time() - CLOCKS
        self.tail: Tail | None = None

    def run_dir(self) -> Path | None:
        """The run folder, once rank 0 has said it."""
        if self.tail is None:
            with suppress(OSError):
                self.tail = Tail(Path(os.fsdecode((self.folder / "run_dir").read_bytes())) / "events.jsonl")
        return self.tail.path.parent if self.tail else None

    def events(self) -> list[dict[str, object]]:
        """New events of this run. A resumed run's folder also holds those of the runs before it."""
        if not self.run_dir() or not self.tail:
            return []
        times = ((event, event.get("time")) for event in self.tail.read())
        return [event for event, when in times if not isinstance(when, int | float) or when >= self.since]

    def done(self) -> bool:
        """Whether this run, not one before it in the same folder, has written DONE."""
        folder = self.run_dir()
        with suppress(OSError):
            return bool(folder) and (Path(str(folder)) / "DONE").stat().st_mtime >= self.since
        return False

    def left(self) -> int:
        """How many ranks have come to the end of their program; only MPI's own finalisation is still before them."""
        return len(list(self.folder.glob("left_*")))

    def fault(self) -> Failure | None:
        """The first rank that has crashed, with where it was, if it has left word of that."""
        found = [path for path in self.folder.glob("fault_*") if path.stat().st_size]
        if not found:
            return None
        first = min(found, key=lambda path: path.stat().st_mtime)
        text = first.read_text(errors="replace").partition("\nExtension modules:")[0]
        return Failure(int(first.name.removeprefix("fault_")), text.rstrip())

    def failures(self, until: float) -> list[dict[str, object]]:
        """The ranks' own failure reports of up to that moment, first failure first."""
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
    """Who failed first: a rank that died by a signal left no report, and the reports of the others are collateral."""
    ranks = [report["rank"] for report in reports]
    if stderr.rank is None:  # MPICH's mpiexec names nobody
        if fault is not None:
            return Failure(fault.rank, fault.text, len(set(ranks) - {fault.rank}))
        noticed = fallen is not None and all(float(str(report["time"])) > fallen.time for report in reports)
        if fallen and noticed and fallen.rank not in ranks:
            traceback = "" if reports else "\n".join(stderr.block)
            return Failure(fallen.rank, _ended(fallen.status, stderr.signal, traceback), len(ranks))
    if stderr.signal is not None and stderr.rank not in ranks and not (stderr.rank is None and reports):
        return Failure(stderr.rank, _ended(-stderr.signal, None, ""), len(ranks))
    if reports:
        return Failure(int(str(ranks[0])), str(reports[0].get("traceback", "")), len(ranks) - 1)
    return Failure(stderr.rank, "\n".join(stderr.block))


def _ended(status: int | None, heard: int | None, traceback: str) -> str:
    """How a rank that has left no report ended: its status where that is known, else mpiexec's word on one of all."""
    if status is None and not traceback and heard is not None:
        status = -heard
    if status is not None and status < 0:
        return f"ended by signal {-status}: {signal.strsignal(-status)}"
    return traceback or ("" if status is None else f"ended with status {status}")
