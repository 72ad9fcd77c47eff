"""The report of a run: one folder, written line by line.

    config.yaml  env.json  events.jsonl  metrics.csv  validations.csv  logs/rank_0000.log  checkpoints/*.h5  DONE

Tables hold only numbers that are the same when the run is repeated, so a resumed run's tables equal those of an uninterrupted
run. Whatever depends on the clock is an event. Ranks write plain lines; the launcher draws the screen.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TextIO

from mpips.process.files import private, write_private
from mpips.process.lifecycle import emit
from mpips.report.slow_ranks import SlowRanks

LOG = logging.getLogger("mpips")
VALIDATED = ("round", "epoch", "value", "name")  # validations.csv
FIXED = ("round", "epoch", "version", "samples", "loss", "lr")  # metrics.csv, followed by the script's own metrics
EVENTS_A_SECOND = 5.0
BLOCK = 1 << 16  # bytes
LINE_EVERY = 10.0  # seconds between progress lines if no launcher draws


def script_name() -> str:
    """Return the name of the running script, without its suffix."""
    return Path(sys.argv[0]).stem or "python"


def new_id(count: int) -> str:
    """Return an id for run number `count` of a script; the run's files and checkpoints contain it."""
    return secrets.token_hex(6) + (f".{count}" if count > 1 else "")


def number(run: str) -> int:
    """Return which of its script's runs has this id, from 1."""
    return int(run.partition(".")[2] or 1)


def run_id(folder: Path) -> str:
    """Return the id of the run in a folder; empty if it is unknown."""
    try:
        return str(json.loads((folder / "env.json").read_text())["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def log_to(folder: Path, rank: int, run: str) -> None:
    """Send this rank's log lines, and a copy of what its Python prints, to the rank's file in the run folder."""
    for old in LOG.handlers[:]:
        LOG.removeHandler(old)
        with suppress(OSError):  # the disk of the previous run is full
            old.close()
    path = folder / "logs" / f"rank_{rank:04d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    end_torn_line(path)
    stop_copying()
    os.close(private(str(path), os.O_WRONLY | os.O_CREAT))  # logging creates it for all to read
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            _copy(stream, path)
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.info("run %s", run or "of an id that its folder does not say")


_copied: list[TextIO] = []


def _copy(stream: TextIO, path: Path) -> None:
    """Copy what is written to a stream to a file, too.

    The stream object stays the same, because logging handlers and progress bars hold it; only its `write` method is replaced.
    Duplicating the descriptor instead would need a process between each rank and its screen.
    """
    write, file = stream.write, open(path, "ab", buffering=0, opener=private)  # noqa: SIM115  stays open

    def both(text: str) -> int:
        written = write(text)
        with suppress(Exception):  # a full disk must not fail the script's print
            file.write(text.replace("\0", "").encode(errors="backslashreplace"))
        return written

    with suppress(AttributeError):  # a stream object of the script that forbids it
        stream.write = both  # type: ignore[method-assign]
        _copied.append(stream)


def stop_copying() -> None:
    """Stop copying printed text to the log."""
    while _copied:
        with suppress(AttributeError):
            del _copied.pop().write


def end_torn_line(path: Path) -> None:
    """Repair a file before a line is appended: remove the zeros that a machine crash leaves, and end the last line."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        data = b""
        while end and not data:
            start = max(0, end - BLOCK)
            file.seek(start)
            data = file.read(end - start).rstrip(b"\0")
            end = start + len(data)
        if end < size:
            file.truncate(end)
        if data and not data.endswith(b"\n"):
            file.seek(end)
            file.write(b"\n")


def rank_states(rows: Mapping[int, Mapping[str, float]], server_trains: bool) -> list[dict[str, Any]]:
    """Return what each rank is doing, for the launcher's screen, from the rows of a round."""
    server = {"rank": 0, "role": "server", "state": "serving", "samples_per_s": 0.0, "wait": 0.0, "done": False}
    table: list[dict[str, Any]] = [] if server_trains else [server]
    for rank, row in rows.items():
        spent = max(row["train"] + row["wait"], 1e-9)
        state = {"state": "done" if row["done"] else "training", "done": bool(row["done"])}
        speed = {"samples_per_s": row["samples"] / spent, "wait": row["wait"] / spent}
        times = {"train": row["train"], "round": spent}
        table.append({"rank": rank, "role": "worker" if rank else "server, worker", **state, **speed, **times})
    return table


class Table:
    """A table in the run folder, whose written rows are not kept in memory.

    Args:
        path: the file; None to write no file.
        columns: the names of the columns.
        line: the format of a row.

    Attributes:
        count: the number of rows.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], line: str) -> None:
        self._path, self._head, self._line = path, ",".join(columns) + "\n", line
        self.count = 0
        self._before: Path | None = None  # the table of the run that is resumed
        self._rows: list[tuple[Any, ...]] = []  # not written yet: formatting many at once takes half the time
        self._file: TextIO | None = None  # opened when the run begins, so that a refused resume changes nothing

    def restore(self, count: int, before: Path) -> None:
        """Begin with the first `count` rows of the table `before`, which may be this table's own file."""
        self.count, self._before = count, before

    def open(self) -> str:
        """Create the file with the rows to begin with, unless that is done.

        Returns:
            A warning if rows to begin with are missing; else "".
        """
        if self._path is None or self._file:
            return ""
        expected = self.count if self._before else 0
        temporary = self._path.with_name(f".{self._path.name}")
        with open(temporary, "w", encoding="utf-8", opener=private) as file:
            file.write(self._head)
            found = self._copy(expected, file)
        temporary.replace(self._path)  # the file is never shorter than the checkpoint says
        self._file = self._path.open("a", buffering=1 << 16, encoding="utf-8")
        self.count -= expected - found
        warning = f"{self._before} has {found} of the {expected} rows before this checkpoint: the table lacks them"
        return warning if found < expected else ""

    def _copy(self, expected: int, file: TextIO) -> int:
        """Copy the rows to begin with to `file`; return their number."""
        found = 0
        with suppress(OSError):
            if self._before:
                with self._before.open(encoding="utf-8", errors="replace") as before:
                    for row in takewhile(self._is_row, islice(before, 1, 1 + expected)):
                        file.write(row)
                        found += 1
        return found

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row."""
        self.count += 1
        if self._path is not None:
            self._rows.append(row)

    def flush(self) -> None:
        """Write all rows to the file."""
        if self._file:
            rows, self._rows = self._rows, []
            self._file.writelines(self._line % row for row in rows)
            self._file.flush()

    def sync(self) -> None:
        """Make what `flush` has written durable. May be called on another thread than the other methods."""
        if self._file:
            with suppress(OSError):  # the file system does not support it
                os.fsync(self._file.fileno())

    def _is_row(self, line: str) -> bool:
        """Return whether a line is a whole row: a machine crash may leave half a line, or zeros."""
        return line.endswith("\n") and "\0" not in line and line.count(",") >= self._head.count(",")

    def read(self) -> list[list[str]]:
        """Return all rows of the file."""
        if self._path is None or not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]


class Report:
    """The server's report of a run.

    Args:
        folder: the run folder; None to write and print nothing.
        metrics: the names of the script's own metrics.
        run: the run's id, which all files except the tables contain.

    Attributes:
        metrics: the table with a row for each round.
        validations: the table with a row for each validated value.
        slow: judges the ranks' times, where all wait for the slowest; else None.
    """

    def __init__(self, folder: Path | None, metrics: Sequence[str] = (), run: str = "") -> None:
        self.folder, self.run = folder, run
        self.columns = FIXED + tuple(metrics)
        line = "%d,%d,%d,%d" + ",%r" * (len(self.columns) - 4) + "\n"
        self.metrics = Table(folder and folder / "metrics.csv", self.columns, line)
        self.validations = Table(folder and folder / "validations.csv", VALIDATED, "%d,%d,%r,%s\n")
        self._begun = False  # whether the tables are open
        self._loss = float("nan")  # the latest known loss
        self.epochs: int | None = None
        self.begun = time.time()
        self.name = "validation"
        self.slow: SlowRanks | None = None
        self._last_event = self._last_line = 0.0
        self._drawn = "MPIPS_LAUNCH_DIR" in os.environ
        if folder is not None:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            end_torn_line(folder / "events.jsonl")
            self._events = open(folder / "events.jsonl", "a", buffering=1, opener=private)  # noqa: SIM115  stays open
            self._tell_launcher(folder)

    @property
    def in_place(self) -> bool:
        """Whether the run folder is still where it was when the run began."""
        if self.folder is None:
            return True
        ours = os.fstat(self._events.fileno())
        with suppress(OSError):
            there = (self.folder / "events.jsonl").stat()
            return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)
        return False

    def restore(self, metrics: int, validations: int, folder: Path) -> None:
        """Begin with the first rows of the tables in a run folder, as many as there were at the checkpoint."""
        self.metrics.restore(metrics, folder / "metrics.csv")
        self.validations.restore(validations, folder / "validations.csv")

    @property
    def values(self) -> list[float]:
        """The validated values so far, read from their table."""
        self.flush()
        return [float(row[2]) for row in self.validations.read()]

    def start(self, config_yaml: str, environment: dict[str, Any], **facts: Any) -> None:
        """Report the start of the run: settings, environment, and facts about the run. Called once, before the first round."""
        if self.folder is not None:
            self._begin()
            settings = f"# run {self.run}\n{config_yaml}"
            write_private(self.folder / "config.yaml", settings.encode("utf-8", "surrogateescape"))
            machine = json.dumps({"run": self.run, **environment}, indent=2, default=str)
            write_private(self.folder / "env.json", f"{machine}\n".encode())
        self.event("start", run=self.run, **facts, run_dir=str(self.folder))
        self.line("{workers} worker(s), {mpi}, torch {torch} on {device}, {parameters:,} trainable parameters"
                  .format(**facts), always=True)  # fmt: skip

    def round(self, row: tuple[float, ...], speed: float, ranks: Callable[[], list[dict[str, Any]]]) -> None:
        """Report a round: always its metrics, and an event a few times a second.

        Args:
            row: the row of metrics.csv.
            speed: samples per second.
            ranks: returns what each rank is doing.
        """
        self._begin()
        self.metrics.add(row)
        if row[3]:
            self._loss = row[4]
        now = time.time()
        if self.folder is not None and now - self._last_event >= 1 / EVENTS_A_SECOND:
            self._last_event = now
            self.flush()
            line = dict(zip(self.columns, row, strict=True))
            states = ranks()
            self.event("round", **line, epochs=self.epochs, samples_per_s=speed, ranks=states)
            for message in self.slow.look(states) if self.slow else []:
                self.event("warning", message=message, round=row[0])
                self.line(message, always=True)
            self.line(f"round {row[0]:.0f}  epoch {row[1]:.0f}  {_loss(row[4])}{speed:.0f} samples/s")

    def validated(self, epoch: int, number: int, value: float, best: float, name: str) -> None:
        """Report a validated value."""
        self.name = name
        self._begin()
        quoted = " ".join(name.split()).replace('"', '""')  # a row is one line
        self.validations.add((number, epoch, value, f'"{quoted}"'))
        self.event("validate", epoch=epoch, round=number, value=value, best=best, name=name)
        self.line(f"epoch {epoch}  round {number}  {_loss(self._loss)}{name} {value:.4f}", always=True)

    def stopped(self, reason: str, number: int, ranks: Sequence[int]) -> None:
        """Report why, when and by which ranks the run is ended before its last epoch."""
        self.event("stop", reason=reason, round=number, ranks=list(ranks))
        self.line(f"stops after round {number}: {reason}, by rank {', '.join(map(str, ranks))}", always=True)

    def event(self, event: str, **facts: Any) -> None:
        """Write a line of events.jsonl."""
        if self.folder is not None:
            self._events.write(json.dumps({"time": time.time(), "event": event, "rank": 0, **facts}) + "\n")
            if event != "round":
                LOG.info("%s %s", event, facts)

    def line(self, text: str, always: bool = False) -> None:
        """Print a line, unless the launcher draws the screen. Progress lines are limited to one every few seconds."""
        now = time.time()
        if self.folder is None or self._drawn or not (always or now - self._last_line >= LINE_EVERY):
            return
        self._last_line = now
        emit(1, f"mpips: {text}\n")

    def flush(self) -> None:
        """Write everything so far to the files."""
        self._begin()
        for table in (self.metrics, self.validations):
            table.flush()

    def sync(self) -> None:
        """Make what `flush` has written to the tables durable. May be called on another thread than the other methods."""
        for table in (self.metrics, self.validations):
            table.sync()

    def done(self, summary: dict[str, Any]) -> None:
        """Report that the run has ended normally. Everything is in the files before DONE appears."""
        summary = {"run": self.run, **summary}
        self.event("done", **summary)
        if self.folder is None:
            return
        self.flush()
        temporary = self.folder / ".DONE"
        write_private(temporary, f"{json.dumps(summary, indent=2)}\n".encode())
        temporary.replace(self.folder / "DONE")

        value = "" if summary["value"] is None else f", {self.name} {summary['value']:.4f}"
        self.line(f"done: {summary['seconds']:.1f} s, {summary['rounds']} rounds{value}", always=True)
        self.line(f"run folder {self.folder}", always=True)
        self.line(f"checkpoint {summary['checkpoint']}", always=True)

    def preempted(self, path: Path | None) -> None:
        """Report that the run has been preempted and can be resumed from the checkpoint."""
        self.flush()
        self.line(f"preempted: checkpoint {path}; start again with --mpips.resume auto", always=True)

    def _begin(self) -> None:
        """When a table is first needed, open the tables and remove DONE."""
        if self._begun or self.folder is None:
            return
        self._begun = True
        (self.folder / "DONE").unlink(missing_ok=True)
        for table in (self.metrics, self.validations):
            if warning := table.open():
                self.event("warning", message=warning)

    def _tell_launcher(self, folder: Path) -> None:
        """Tell the launcher, if its folder is on this machine, the folders of the script's first run and of its latest one."""
        if launch := os.environ.get("MPIPS_LAUNCH_DIR"):
            for told in (Path(launch, "run_dir"), Path(launch, "latest_run_dir")):
                if told.name == "run_dir" and told.exists():
                    continue
                with suppress(OSError):
                    temporary = told.with_name(f".{told.name}")
                    temporary.write_bytes(os.fsencode(folder))
                    temporary.replace(told)


def _loss(value: float) -> str:
    """Return the loss as text for a line; empty if no worker has given it, as with a plain `optimizer.step()`."""
    return "" if math.isnan(value) else f"loss {value:.4f}  "
