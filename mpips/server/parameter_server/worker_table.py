"""Who is where in a loop: what each rank said last, who waits, who has been told what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpips.server.parameter_server.request import BUSY, BYE

WorkerStatus = Mapping[str, float]
ABSENT: WorkerStatus = {"done": 0.0, "stop": 0.0, "want": 0.0}  # of a rank that has not asked yet


class WorkerTable:
    """The workers' ranks.

    Attributes:
        clocks: rank -> its clock, one more with each push; at the end of a loop all have the furthest one's.
        rows: rank -> the row of its last request in this loop.
        open: ranks that will ask again in this loop.
        gone: ranks that have closed.
        held: ranks that wait for an answer.
        told: ranks that have been told to write a checkpoint.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.clocks = dict.fromkeys(ranks, 0)
        self.rows: dict[int, WorkerStatus] = {}
        self.open, self.gone, self.held, self.told = set[int](), set[int](), set[int](), set[int]()

    def clear(self) -> None:
        """Everybody begins again, those that have closed, too."""
        for known in (self.rows, self.open, self.gone, self.held, self.told):
            known.clear()

    def end_loop(self, level: bool) -> None:
        """Nobody has asked yet; with `level` clocks are alike, so that who had less to do does not hold the others."""
        self.rows.clear()
        if level:
            self.clocks = dict.fromkeys(self.clocks, max(self.clocks.values()))

    @property
    def present(self) -> set[int]:
        """Who has not closed."""
        return self.clocks.keys() - self.gone

    @property
    def left(self) -> list[int]:
        """Who has left its loop, to take part in nothing that follows."""
        return [rank for rank in sorted(self.open) if self.row(rank)["stop"] == 2]

    @property
    def training(self) -> set[int]:
        """Of whom more is to be expected in this loop."""
        rows = ((rank, self.row(rank)) for rank in self.present)
        return {rank for rank, row in rows if not row["done"] and row["stop"] < 2}

    @property
    def slowest(self) -> int:
        """The least clock of those that train: one that is done never holds the others."""
        return min(self.clocks[rank] for rank in self.training)

    def row(self, rank: int) -> WorkerStatus:
        """What it said last."""
        return self.rows.get(rank, ABSENT)

    def closes(self, rank: int) -> bool:
        """Whether it says good-bye."""
        return self.row(rank)["stop"] == BYE

    def settled(self, rank: int) -> bool:
        """Whether it may end here, and give its state: it is in the middle of nothing."""
        return not int(self.row(rank)["want"]) & BUSY or rank not in self.training

    def all_here(self) -> bool:
        """Whether everybody waits for an answer, and is settled."""
        return all(rank in self.held and self.settled(rank) for rank in self.open)
