"""What a run leaves behind to be read: one folder, written line by line.

    config.yaml  env.json  events.jsonl  metrics.csv  validations.csv  logs/rank_0000.log  checkpoints/*.h5  DONE

Tables hold only what a repeat of the run would give again, so a resumed run's equal the uninterrupted one's; whatever
depends on the clock is an event. Ranks write plain lines; drawing is the launcher's business.
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

from mpips.process.lifecycle import emit

LOG = logging.getLogger("mpips")
VALIDATED = ("round", "epoch", "value", "name")  # validations.csv
FIXED = ("round", "epoch", "version", "samples", "loss", "lr")  # metrics.csv, then the script's own
EVENTS_A_SECOND = 5.0
BLOCK = 1 << 16  # bytes
LINE_EVERY = 10.0  # seconds between progress lines where no launcher draws


def script_name() -> str:
    """The running script's name without its ending."""
    return Path(sys.argv[0]).stem or "python"


def new_id(count: int) -> str:
    """An id for a script's new run number `count`, which stands in its files and checkpoints."""
    return secrets.token_hex(6) + (f".{count}" if count > 1 else "")


def number(run: str) -> int:
    """Which of its script's runs the one with this id is."""
    return int(run.partition(".")[2] or 1)


def run_id(folder: Path) -> str:
    """The id of the run in a folder; empty if it does not say."""
    try:
        return str(json.loads((folder / "env.json").read_text())["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def log_to(folder: Path, rank: int, run: str) -> None:
    """Send this rank's log lines, the run's id first, and a copy of what its Python prints, to its file in the run folder."""
    for old in LOG.handlers[:]:
        LOG.removeHandler(old)
        with suppress(OSError):  # its disk is full; the next run's may not be
            old.close()
    path = folder / "logs" / f"rank_{rank:04d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    end_torn_line(path)
    stop_copying()
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
    """Have what is written to a stream in a file, too.

    The object stays the one that it is, as handlers of logging and progress bars hold on to it; only its method is another. Not
    its descriptor, which would need a process between each rank and its screen.
    """
    write, file = stream.write, path.open("ab", buffering=0)

    def both(text: str) -> int:
        written = write(text)
        with suppress(Exception):  # a full disk is no matter of the script's print
            file.write(text.replace("\0", "").encode(errors="backslashreplace"))
        return written

    with suppress(AttributeError):  # an object of the script's own that allows no other
        stream.write = both  # type: ignore[method-assign]
        _copied.append(stream)


def stop_copying() -> None:
    """What is printed from now on is in no log."""
    while _copied:
        with suppress(AttributeError):
            del _copied.pop().write


def end_torn_line(path: Path) -> None:
    """Cut off the zeros that a crash of the machine leaves at the end of a file, and end its last line, before one is added."""
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
    """What each rank is doing, for the launcher's screen, from the rows of a round."""
    server = {"rank": 0, "role": "server", "state": "serving", "samples_per_s": 0.0, "wait": 0.0, "done": False}
    table: list[dict[str, Any]] = [] if server_trains else [server]
    for rank, row in rows.items():
        spent = max(row["train"] + row["wait"], 1e-9)
        state = {"state": "done" if row["done"] else "training", "done": bool(row["done"])}
        speed = {"samples_per_s": row["samples"] / spent, "wait": row["wait"] / spent}
        table.append({"rank": rank, "role": "worker" if rank else "server, worker", **state, **speed})
    return table


class Table:
    """A table in the run folder, of which nothing stays in memory.

    Args:
        path: the file; None writes none.
        columns: their names.
        line: makes a line of a row.

    Attributes:
        count: its rows.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], line: str) -> None:
        self._path, self._head, self._line = path, ",".join(columns) + "\n", line
        self.count = 0
        self._before: Path | None = None  # a resumed run's, to go on from
        self._rows: list[tuple[Any, ...]] = []  # not written: text is made of many in half the time
        self._file: TextIO | None = None  # opened when the run begins: a resume that is refused costs nothing

    def restore(self, count: int, before: Path) -> None:
        """Begin with the first `count` rows of the table `before`, which may be this one."""
        self.count, self._before = count, before

    def open(self) -> str:
        """Begin the file, once.

        Returns:
            What is wrong with the rows that were to be there before; else "".
        """
        if self._path is None or self._file:
            return ""
        wanted = self.count if self._before else 0
        beside = self._path.with_name(f".{self._path.name}")
        with beside.open("w", encoding="utf-8") as file:
            file.write(self._head)
            found = self._copy(wanted, file)
        beside.replace(self._path)  # at no time is the table shorter than the checkpoint counts
        self._file = self._path.open("a", buffering=1 << 16, encoding="utf-8")
        self.count -= wanted - found
        lacking = f"{self._before} has {found} of the {wanted} rows before this checkpoint: the table lacks them"
        return lacking if found < wanted else ""

    def _copy(self, wanted: int, file: TextIO) -> int:
        """Write the rows that were there before; how many they are."""
        found = 0
        with suppress(OSError):
            if self._before:
                with self._before.open(encoding="utf-8", errors="replace") as before:
                    for row in takewhile(self._is_row, islice(before, 1, 1 + wanted)):
                        file.write(row)
                        found += 1
        return found

    def add(self, row: tuple[Any, ...]) -> None:
        """One row more."""
        self.count += 1
        if self._path is not None:
            self._rows.append(row)

    def flush(self, lasting: bool) -> None:
        """Everything so far is in the file, which has been opened; on the disk, if it is to be `lasting`."""
        if self._file:
            rows, self._rows = self._rows, []
            self._file.writelines(self._line % row for row in rows)
            self._file.flush()
            if lasting:
                with suppress(OSError):  # a file system that cannot
                    os.fsync(self._file.fileno())

    def _is_row(self, line: str) -> bool:
        """Whether a line is whole: a crash of the machine may leave half of one, or zeros."""
        return line.endswith("\n") and "\0" not in line and line.count(",") >= self._head.count(",")

    def read(self) -> list[list[str]]:
        """All rows, from the file."""
        if self._path is None or not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]


class Report:
    """The server's report of a run.

    Args:
        folder: the run folder; None writes and prints nothing.
        metrics: names of the script's own metrics.
        run: the run's id, which all files but the tables say.

    Attributes:
        metrics: a row for each round.
        validations: a row for each validated value.
    """

    def __init__(self, folder: Path | None, metrics: Sequence[str] = (), run: str = "") -> None:
        self.folder, self.run = folder, run
        self.columns = FIXED + tuple(metrics)
        line = "%d,%d,%d,%d" + ",%r" * (len(self.columns) - 4) + "\n"
        self.metrics = Table(folder and folder / "metrics.csv", self.columns, line)
        self.validations = Table(folder and folder / "validations.csv", VALIDATED, "%d,%d,%r,%s\n")
        self._begun = False  # whether the tables are
        self._loss = float("nan")  # the last that was said
        self.epochs: int | None = None
        self.begun = time.time()
        self.name = "validation"
        self._last_event = self._last_line = 0.0
        self._drawn = "MPIPS_LAUNCH_DIR" in os.environ
        if folder is not None:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            end_torn_line(folder / "events.jsonl")
            self._events = (folder / "events.jsonl").open("a", buffering=1)
            self._tell_launcher(folder)

    def restore(self, metrics: int, validations: int, folder: Path) -> None:
        """Begin with what was there at a checkpoint: so many rows of the tables in a run folder."""
        self.metrics.restore(metrics, folder / "metrics.csv")
        self.validations.restore(validations, folder / "validations.csv")

    @property
    def values(self) -> list[float]:
        """The validated values so far, from their table."""
        self.flush()
        return [float(row[2]) for row in self.validations.read()]

    def start(self, config_yaml: str, environment: dict[str, Any], **facts: Any) -> None:
        """Once, before the first round."""
        if self.folder is not None:
            self._begin()
            settings = f"# run {self.run}\n{config_yaml}"
            (self.folder / "config.yaml").write_bytes(settings.encode("utf-8", "surrogateescape"))
            (self.folder / "env.json").write_text(json.dumps({"run": self.run, **environment}, indent=2, default=str) + "\n")
        self.event("start", run=self.run, **facts, run_dir=str(self.folder))
        self.line("{workers} worker(s), {mpi}, torch {torch} on {device}, {parameters:,} trainable parameters"
                  .format(**facts), always=True)  # fmt: skip

    def round(self, row: tuple[float, ...], speed: float, ranks: Callable[[], list[dict[str, Any]]]) -> None:
        """One round: its metrics always, its event a few times a second.

        Args:
            row: its line of metrics.csv.
            speed: samples a second.
            ranks: what each rank is doing.
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
            self.event("round", **line, epochs=self.epochs, samples_per_s=speed, ranks=ranks())
            self.line(f"round {row[0]:.0f}  epoch {row[1]:.0f}  {_loss(row[4])}{speed:.0f} samples/s")

    def validated(self, epoch: int, number: int, value: float, best: float, name: str) -> None:
        """One validation on the server."""
        self.name = name
        self._begin()
        quoted = " ".join(name.split()).replace('"', '""')  # a row is one line
        self.validations.add((number, epoch, value, f'"{quoted}"'))
        self.event("validate", epoch=epoch, round=number, value=value, best=best, name=name)
        self.line(f"epoch {epoch}  round {number}  {_loss(self._loss)}{name} {value:.4f}", always=True)

    def stopped(self, reason: str, number: int, ranks: Sequence[int]) -> None:
        """Why, when and by whom the run is ended before its last epoch."""
        self.event("stop", reason=reason, round=number, ranks=list(ranks))
        self.line(f"stops after round {number}: {reason}, by rank {', '.join(map(str, ranks))}", always=True)

    def event(self, event: str, **facts: Any) -> None:
        """One line of events.jsonl."""
        if self.folder is not None:
            self._events.write(json.dumps({"time": time.time(), "event": event, "rank": 0, **facts}) + "\n")
            if event != "round":
                LOG.info("%s %s", event, facts)

    def line(self, text: str, always: bool = False) -> None:
        """A plain line for the screen; progress at most every few seconds, and none where the launcher draws."""
        now = time.time()
        if self.folder is None or self._drawn or not (always or now - self._last_line >= LINE_EVERY):
            return
        self._last_line = now
        emit(1, f"mpips: {text}\n")

    def flush(self, lasting: bool = False) -> None:
        """Everything so far is in the files; the tables' rows on the disk, if they are to be `lasting`."""
        self._begin()
        for table in (self.metrics, self.validations):
            table.flush(lasting)

    def done(self, summary: dict[str, Any]) -> None:
        """The run has ended as it should: all is on disk before DONE appears."""
        summary = {"run": self.run, **summary}
        self.event("done", **summary)
        if self.folder is None:
            return
        self.flush()
        beside = self.folder / ".DONE"
        beside.write_text(json.dumps(summary, indent=2) + "\n")
        beside.replace(self.folder / "DONE")

        value = "" if summary["value"] is None else f", {self.name} {summary['value']:.4f}"
        self.line(f"done: {summary['seconds']:.1f} s, {summary['rounds']} rounds{value}", always=True)
        self.line(f"run folder {self.folder}", always=True)
        self.line(f"checkpoint {summary['checkpoint']}", always=True)

    def preempted(self, path: Path | None) -> None:
        """The run ends early and can go on from the checkpoint."""
        self.flush()
        self.line(f"preempted: checkpoint {path}; start again with --mpips.resume auto", always=True)

    def _begin(self) -> None:
        """Begin the tables, and no longer be a run that has ended, when one of them is first needed."""
        if self._begun or self.folder is None:
            return
        self._begun = True
        (self.folder / "DONE").unlink(missing_ok=True)
        for table in (self.metrics, self.validations):
            if lacking := table.open():
                self.event("warning", message=lacking)

    def _tell_launcher(self, folder: Path) -> None:
        if launch := os.environ.get("MPIPS_LAUNCH_DIR"):
            beside = Path(launch) / ".run_dir"
            beside.write_bytes(os.fsencode(folder))
            beside.replace(Path(launch) / "run_dir")


def _loss(value: float) -> str:
    """For the screen; nothing where no worker has said it, as `optimizer.step()` does not."""
    return "" if math.isnan(value) else f"loss {value:.4f}  "
