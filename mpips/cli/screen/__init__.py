"""How a run is shown: one live screen on a real terminal, plain lines anywhere else.

Invariant: only the launcher draws, because only the launcher has the real terminal (Open MPI gives every rank a
pseudo-terminal). What the ranks print reaches the user byte for byte. The live region stays below that output and is redrawn in
place.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol

from mpips.cli.screen.frame import frame
from mpips.cli.screen.output import outlet
from mpips.cli.screen.progress import Event, Progress, Tail, describe, progress_line

__all__ = ["Lines", "Progress", "Screen", "Tail", "View", "outlet", "view"]

LINE_EVERY = 10.0  # seconds between progress lines without a terminal, so that a batch log stays readable
DRAW_EVERY = 0.2  # seconds between two live frames
LOUD = ("start", "plan", "resume", "stop", "warning", "error", "done")  # events that get a line if there is no screen


class View(Protocol):
    """Where the launcher shows a run: the ranks' output, the launcher's own messages, the progress."""

    def write(self, stream: int, data: bytes) -> None:
        """Pass on what the ranks wrote to stdout (1) or stderr (2)."""

    def tell(self, text: str) -> None:
        """Print a message of the launcher to stderr: stdout belongs to the script."""

    def note(self, event: Event) -> None:
        """Take note of an event."""

    def show(self, progress: Progress) -> None:
        """Show the progress, if it is time to. Called often."""

    def close(self, progress: Progress) -> None:
        """End the view: the ranks write nothing more."""


class Lines:
    """The view for files, pipes and dumb terminals: output passes unchanged, with a progress line now and then."""

    def __init__(self) -> None:
        self.half = 0  # the stream whose last line has not ended; 0 if there is none
        self.next_line = time.monotonic() + LINE_EVERY
        self.shown: Event | None = None

    def write(self, stream: int, data: bytes) -> None:
        """Pass the bytes on."""
        outlet.emit(stream, data)
        self.half = 0 if data.endswith(b"\n") else stream

    def tell(self, text: str) -> None:
        """Print a message on a line of its own, after ending a rank's half line."""
        self._end_line()
        outlet.emit(2, f"mpips: {text}\n")

    def note(self, event: Event) -> None:
        """Print a line for an event that matters in a log."""
        text = describe(event)
        if text and event.get("event") in LOUD:
            self.tell(text)

    def show(self, progress: Progress) -> None:
        """Print a progress line, if there is new progress and the last line is old enough."""
        now = progress.latest.get("round")
        if now and now is not self.shown and "done" not in progress.latest and time.monotonic() >= self.next_line:
            self.shown, self.next_line = now, time.monotonic() + LINE_EVERY
            self.tell(progress_line(progress))

    def close(self, progress: Progress) -> None:
        """End a half line, so that further output begins on a line of its own."""
        self._end_line()

    def _end_line(self) -> None:
        """End a rank's half line, if there is one."""
        if self.half:
            outlet.emit(self.half, b"\n")
        self.half = 0


class Screen:
    """The view for a real terminal: the ranks' lines scroll above one region that is redrawn in place.

    rich's Live would re-wrap and re-colour the ranks' lines, which must stay as they are.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=sys.stdout, force_terminal=True, highlight=False)  # respects NO_COLOR
        self.started = time.monotonic()
        self.next_frame = 0.0
        self.frame: list[str] = []
        self.drawn: list[int] = []  # the visible widths of the region's present lines
        self.halves = {1: b"", 2: b""}

    def write(self, stream: int, data: bytes) -> None:
        """Print whole lines above the region; a half line waits for its end."""
        if stream == 2 and not sys.stderr.isatty():
            return outlet.emit(2, data)
        complete = data.rfind(b"\n") + 1
        lines, self.halves[stream] = self.halves[stream] + data[:complete], data[complete:]
        if not complete:
            self.halves[stream] = lines + data
            return None
        return self._draw(above=lines)

    def tell(self, text: str) -> None:
        """Print a message on a line above the region."""
        line = f"mpips: {text}\n".encode("utf-8", "surrogateescape")
        return self._draw(above=line) if sys.stderr.isatty() else outlet.emit(2, line)

    def note(self, event: Event) -> None:
        """Print warnings and errors, which must not disappear from the region's latest events."""
        if event.get("event") in ("warning", "error"):
            self.tell(describe(event) or "")

    def show(self, progress: Progress) -> None:
        """Draw a new frame, a few times a second."""
        if time.monotonic() >= self.next_frame and not outlet.waiting:
            self.next_frame = time.monotonic() + DRAW_EVERY
            self._render(progress)
            self._draw()

    def close(self, progress: Progress) -> None:
        """Draw the last frame and leave it; further output follows below."""
        rest = b"".join(half + b"\n" for half in self.halves.values() if half)
        self.halves = {1: b"", 2: b""}
        self._render(progress)
        self._draw(above=rest)
        self.frame, self.drawn = [], []

    def _render(self, progress: Progress) -> None:
        """Make the next frame."""
        width, height = _size()
        self.frame = frame(self.console, progress, time.monotonic() - self.started, width - 1, height - 1)

    def _draw(self, above: bytes = b"") -> None:
        """Erase the region, print `above` and draw the region again, in a single write to avoid flicker."""
        from rich.text import Text

        width, _ = _size()
        # A terminal that became narrower has wrapped the old lines: count the rows that they occupy now.
        rows = sum(max(1, -(-line // width)) for line in self.drawn)
        erase = f"\r\x1b[{rows}A\x1b[J" if rows else ""
        below = "".join(f"\x1b[0m{line}\x1b[0m\n" for line in self.frame)
        outlet.emit(1, erase.encode() + above + below.encode("utf-8", "surrogateescape"))
        self.drawn = [Text.from_ansi(line).cell_len for line in self.frame]


def view(*, json_wanted: bool) -> View:
    """Return the live screen on a real terminal, else plain lines."""
    live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not json_wanted
    return Screen() if live else Lines()


def _size() -> tuple[int, int]:
    """Return columns and lines of the terminal; a terminal that reports 0 does not know its size."""
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns, lines = 0, 0
    return max(20, columns or 80), max(6, lines or 24)
