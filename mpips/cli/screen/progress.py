"""A run's events: read while they are written, the latest of each kind kept, each described in words.

Invariant: any field of an event may be missing or null, and any line of the file may be torn; the reader continues.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

Event = Mapping[str, object]

EVENTS_KEPT = 4
SHOWN_ELSEWHERE = ("start", "warning", "error")  # shown in the header, or as lines that stay
READ_AT_ONCE = 1 << 22  # bytes of events.jsonl read at once


class Tail:
    """The reader of a growing `events.jsonl`: each complete line is returned once, a half-written one at a later read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def read(self) -> list[dict[str, object]]:
        """Return the next events since the last call, in portions; an empty list if there are none, or no file yet."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0  # the file is new, or a resumed run has truncated it to its checkpoint
                file.seek(self.offset)
                data = file.read(READ_AT_ONCE)
                while b"\n" not in data and (more := file.read(READ_AT_ONCE)):  # a line may be of any length
                    data += more
        except OSError:
            return []
        complete = data.rfind(b"\n") + 1
        self.offset += complete
        return [event for line in data[:complete].splitlines() if (event := _event(line))]


def _event(line: bytes) -> dict[str, object] | None:
    """Return the event in a line, or None."""
    try:
        event = json.loads(line)
    except ValueError:  # a line torn by a crash
        return None
    return event if isinstance(event, dict) else None


class Progress:
    """The latest event of each kind, and the last few events in words."""

    def __init__(self) -> None:
        self.latest: dict[str, Event] = {}
        self.lines: deque[str] = deque(maxlen=EVENTS_KEPT)

    def update(self, event: Event) -> None:
        """Take note of an event."""
        kind = str(event.get("event"))
        self.latest[kind] = event
        text = describe(event)
        if text and kind not in SHOWN_ELSEWHERE:
            self.lines.append(f"{time.strftime('%H:%M:%S')} {text.splitlines()[0]}")

    def field(self, kind: str, name: str) -> object:
        """Return a field of the latest event of a kind; None if there was none."""
        return self.latest.get(kind, {}).get(name)

    def result(self) -> dict[str, object]:
        """Return how far the run came: rounds, last validation, last checkpoint."""
        done = self.latest.get("done", {})
        return {
            "rounds": done.get("rounds", self.field("round", "round")),
            "value": done.get("value", self.field("validate", "value")),
            "checkpoint": done.get("checkpoint") or self.field("checkpoint", "path"),
        }


def describe(event: Event) -> str | None:
    """Return an event in words; None for an event that only updates numbers."""
    kind = event.get("event")
    at = f"round {whole(event.get('round'))}"
    if kind == "start":
        return f"run folder {event.get('run_dir')}, {whole(event.get('parameters'))} parameters, {ranks_of(event)}"
    if kind == "plan":
        return f"plan: {event.get('plan')}, by {event.get('communicator')}"
    if kind == "validate":
        best = number(event.get("best"))
        return f"validation at {at}: {event.get('name') or 'value'} {number(event.get('value'))} (best {best})"
    if kind == "checkpoint":
        return f"checkpoint at {at} in {number(event.get('seconds'), '.2f')} s: {Path(str(event.get('path'))).name}"
    if kind == "resume":
        return f"resumed at {at} from {event.get('path')}"
    if kind == "stop":
        return f"stopping at {at}: {event.get('reason')}"
    if kind in ("warning", "error"):
        return f"{kind}: {event.get('message')}"
    if kind == "done":
        seconds = number(event.get("seconds"), ".1f")
        value = f", {event.get('name') or 'value'} {number(event['value'])}" if event.get("value") is not None else ""
        return f"done in {seconds} s, {whole(event.get('rounds'))} rounds{value}"
    return None


def progress_line(progress: Progress) -> str:
    """Return a line such as `round 120 · epoch 2/5 · loss 0.41 · 1,840 samples/s · accuracy 0.95 (best 0.95)`."""
    now = progress.latest.get("round", {})
    parts = [f"round {whole(now.get('round'))}"]
    if now.get("epoch") is not None:
        parts.append(f"epoch {whole(now.get('epoch'))}/{whole(now.get('epochs'))}")
    loss = now.get("loss")
    parts += [] if loss != loss else [f"loss {number(loss)}"]  # NaN if no worker has given it
    parts += [f"{number(now.get('samples_per_s'), ',.0f')} samples/s"]
    value = progress.latest.get("validate")
    if value:
        name = value.get("name") or "value"
        parts.append(f"{name} {number(value.get('value'))} (best {number(value.get('best'))})")
    return " · ".join(parts)


def ranks_of(start: Event) -> str:
    """Return a text such as `4 ranks, 3 workers · Open MPI 5.0.11 · torch 2.13.0 cpu`."""
    workers = f"{whole(start.get('workers'))} workers{', the server trains too' if start.get('server_trains') else ''}"
    torch = f"torch {start.get('torch')} {start.get('device')}"
    return f"{whole(start.get('size'))} ranks, {workers} · {start.get('mpi')} · {torch}"


def real(value: object) -> float:
    """Return a value as a number for comparison; 0 if the event lacks it."""
    return float(value) if isinstance(value, int | float) else 0.0


def wait_of(rank: Event) -> float:
    """Return the fraction of its time that a rank waits."""
    return real(rank.get("wait"))


def number(value: object, form: str = ".4g") -> str:
    """Return a number as text; a dash if the event lacks it."""
    return format(float(value), form) if isinstance(value, int | float) else "-"


def whole(value: object) -> str:
    """Return a whole number as text, a dash if the event lacks it. Metrics hold counts as floats."""
    return f"{round(value):,}" if isinstance(value, int | float) and math.isfinite(value) else "-"
