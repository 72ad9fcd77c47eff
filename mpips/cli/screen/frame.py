"""The live region: header, progress, a table of ranks, the latest events.

Invariant: a frame fits the terminal's size, whether there is one rank or a thousand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mpips import __version__
from mpips.cli.screen.progress import EVENTS_KEPT, Event, Progress, number, progress_line, ranks_of, real, wait_of, whole

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

MOST_ROWS = 16  # the largest number of ranks drawn, however tall the terminal
STATE_STYLE = {"training": "green", "serving": "cyan", "done": "dim"}


def frame(console: Console, progress: Progress, seconds: float, width: int, height: int) -> list[str]:
    """Return the live region as terminal lines: at most `height` lines, none wider than `width`."""
    from rich.text import Text

    start, now = progress.latest.get("start", {}), progress.latest.get("round", {})
    ranks = now.get("ranks")
    table = [rank for rank in ranks if isinstance(rank, Mapping)] if isinstance(ranks, list) else []
    rows = max(1, min(MOST_ROWS, height - 6 - EVENTS_KEPT))
    drawn = chosen(table, rows)
    parts: list[RenderableType] = [Text(_header(start, seconds), style="bold")]
    parts.append(Text(progress_line(progress) if now else "waiting for the first round", style="cyan"))
    if drawn:
        parts.append(_table(drawn))
    if len(drawn) < len(table):
        parts.append(Text(summary(table, len(drawn)), style="dim"))
    console.width = width  # rich may have measured another terminal (COLUMNS, stdin)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
        for line in progress.lines:
            console.print(Text(line, style="dim"), no_wrap=True, overflow="ellipsis")
    return capture.get().splitlines()[:height]


def _header(start: Event, seconds: float) -> str:
    """Return the line with version, time, script and ranks."""
    parts = [f"mpips {__version__}", f"{int(seconds) // 60}:{int(seconds) % 60:02d}"]
    if start:
        parts += [str(start.get("script") or "?"), ranks_of(start)]
    return " · ".join(parts)


def _table(ranks: Sequence[Event]) -> Table:
    """Return the table of ranks."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rank", "role", "state", "samples/s", "wait"):
        table.add_column(name, justify="left" if name in ("role", "state") else "right", no_wrap=True)
    for rank in ranks:
        state = str(rank.get("state"))
        speed = number(rank.get("samples_per_s"), ",.0f") if rank.get("samples_per_s") else "-"
        cells = (whole(rank.get("rank")), str(rank.get("role")), state, speed, f"{wait_of(rank):.0%}")
        table.add_row(*cells, style=STATE_STYLE.get(state))
    return table


def chosen(ranks: Sequence[Event], rows: int) -> list[Event]:
    """Return the ranks to draw in `rows` rows: the server, and those that wait least, because the others wait for them."""
    if len(ranks) <= rows:
        return list(ranks)
    busiest = sorted(ranks, key=lambda rank: (rank.get("role") != "server", rank.get("done") is True, wait_of(rank)))
    return sorted(busiest[:rows], key=lambda rank: int(real(rank.get("rank"))))


def summary(ranks: Sequence[Event], drawn: int) -> str:
    """Return one line about all ranks, for a table that does not show all."""
    states = [str(rank.get("state")) for rank in ranks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    waits = [wait_of(rank) for rank in ranks]
    return f"{drawn} of {len(ranks)} ranks shown (least waiting); {counts}; wait {min(waits):.0%} to {max(waits):.0%}"
