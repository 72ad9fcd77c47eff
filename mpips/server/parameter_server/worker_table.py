"""The state of each worker in a loop: its last request, and whether it waits, has been asked for its state, or has closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpips.server.parameter_server.request import BUSY, BYE

WorkerStatus = Mapping[str, float]
ABSENT: WorkerStatus = {"done": 0.0, "stop": 0.0, "want": 0.0}  # the row of a rank without a request


class WorkerTable:
    """The states of all workers.

    Attributes:
        clocks: rank -> its clock, the number of its pushes; at the end of a loop all clocks are set to the furthest one.
        rows: rank -> the row of its last request in this loop.
        open: the ranks that will send another request in this loop.
        gone: the ranks that have closed or died.
        held: the ranks that wait for an answer.
        told: the ranks that have been asked for their state, for a checkpoint.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.clocks = dict.fromkeys(ranks, 0)
        self.rows: dict[int, WorkerStatus] = {}
        self.open, self.gone, self.held, self.told = set[int](), set[int](), set[int](), set[int]()

    def clear(self) -> None:
        """Forget all requests; ranks that have closed may begin again."""
        for known in (self.rows, self.open, self.gone, self.held, self.told):
            known.clear()

    def end_loop(self, level: bool) -> None:
        """Forget the requests of the loop.

        Args:
            level: whether to set all clocks to the furthest one, so that a worker with fewer steps does not hold the others
                back.
        """
        self.rows.clear()
        if level:
            self.clocks = dict.fromkeys(self.clocks, max(self.clocks.values()))

    def lose(self, rank: int) -> None:
        """Forget a rank that has died; its clock holds nobody back."""
        self.rows.pop(rank, None)
        self.gone.add(rank)
        for known in (self.open, self.held, self.told):
            known.discard(rank)
        self.clocks[rank] = max(self.clocks.values())

    @property
    def present(self) -> set[int]:
        """The ranks that have neither closed nor died."""
        return self.clocks.keys() - self.gone

    @property
    def left(self) -> list[int]:
        """The ranks that have left their loop and take part in nothing further."""
        return [rank for rank in sorted(self.open) if self.row(rank)["stop"] == 2]

    @property
    def training(self) -> set[int]:
        """The ranks that are still training in this loop."""
        rows = ((rank, self.row(rank)) for rank in self.present)
        return {rank for rank, row in rows if not row["done"] and row["stop"] < 2}

    @property
    def slowest(self) -> int:
        """The smallest clock of the ranks that train; a rank that is done holds no other back."""
        return min(self.clocks[rank] for rank in self.training)

    def row(self, rank: int) -> WorkerStatus:
        """Return the row of the rank's last request."""
        return self.rows.get(rank, ABSENT)

    def closes(self, rank: int) -> bool:
        """Return whether the rank's last request closes it."""
        return self.row(rank)["stop"] == BYE

    def settled(self, rank: int) -> bool:
        """Return whether the rank may end here and give its state: it has no used batches that are not pushed."""
        return not int(self.row(rank)["want"]) & BUSY or rank not in self.training

    def all_here(self) -> bool:
        """Return whether every open rank waits for an answer and is settled."""
        return all(rank in self.held and self.settled(rank) for rank in self.open)
