"""Which rank the others wait for, round after round: said without being asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

WINDOW = 60.0  # seconds that are judged together
FEWEST = 20  # looks at a rank, without which it is not judged
SLOWER = 1.5  # times as much of its own time in a round as the median of the others
LEAST = 0.2  # of the round's time is what it has beyond that median


class Times(NamedTuple):
    """A rank's times, as sums over the looks at it.

    Attributes:
        looks: the number of looks.
        own: the seconds of its own.
        rounds: the seconds of the rounds.
    """

    looks: int = 0
    own: float = 0.0
    rounds: float = 0.0

    def add(self, own: float, round: float) -> Times:
        """Return the sums with a further round."""
        return Times(self.looks + 1, self.own + own, self.rounds + round)


class SlowRanks:
    """Judges the ranks by their own time in a round, over windows of a minute.

    Args:
        window: the seconds of a window.
        clock: the time in seconds.
    """

    def __init__(self, window: float = WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock = window, clock
        self._begun = clock()
        self._seen: dict[int, Times] = {}  # by rank, in this window
        self._slow: set[int] = set()  # in the last window

    def look(self, ranks: Sequence[Mapping[str, Any]]) -> list[str]:
        """Note a round. At the end of a window, return a line for each rank that has become slow.

        Args:
            ranks: for each rank what it is doing, as `rank_states` returns it.
        """
        for state in ranks:
            if "train" in state and not state["done"]:
                self._seen[state["rank"]] = self._seen.get(state["rank"], Times()).add(state["train"], state["round"])
        now = self._clock()
        if now - self._begun < self._window:
            return []
        judged = {rank: seen for rank, seen in self._seen.items() if seen.looks >= FEWEST}
        self._begun, self._seen, before = now, {}, self._slow
        lines = {rank: line for rank in sorted(judged) if (line := self._judge(rank, judged))}
        self._slow = set(lines)
        return [line for rank, line in lines.items() if rank not in before]

    def _judge(self, rank: int, judged: Mapping[int, Times]) -> str:
        """Return the line about a rank, empty if it is not slow."""
        own = {number: seen.own / seen.looks for number, seen in judged.items()}
        others = [seconds for number, seconds in own.items() if number != rank]
        if not others:
            return ""
        usual, whole = median(others), judged[rank].rounds / judged[rank].looks
        beyond = own[rank] - usual
        if own[rank] < SLOWER * usual or beyond < LEAST * whole:
            return ""
        return (
            f"rank {rank} is slow: {own[rank]:.3g} s of its own in a round, the others {usual:.3g} s (median of the last "
            f"{self._window:.0f} s); they wait for it {100 * beyond / whole:.0f} % of the time"
        )
