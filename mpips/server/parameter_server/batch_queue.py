"""The batches of a loop, handed out by number to whichever worker is free."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any


class BatchQueue:
    """The batches that each worker has been given and has not used yet.

    The queue does not know how many batches there are. A worker that is given a number beyond the last has reached the end.

    Args:
        ranks: the workers' ranks.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._dealt: dict[int, deque[int]] = {rank: deque() for rank in ranks}
        self._next = 0
        self._returned: list[int] = []  # a heap

    def deal(self, rank: int) -> int:
        """Return the number of the next batch for `rank`; returned batches come first."""
        if self._returned:
            ticket = heapq.heappop(self._returned)
        else:
            ticket, self._next = self._next, self._next + 1
        self._dealt[rank].append(ticket)
        return ticket

    def used(self, rank: int, count: int) -> None:
        """Remove the first `count` batches of `rank`, which it has used."""
        for _ in range(min(count, len(self._dealt[rank]))):
            self._dealt[rank].popleft()

    def give_back(self, rank: int) -> None:
        """Return the unused batches of `rank`, which ends, to the queue."""
        while self._dealt[rank]:
            heapq.heappush(self._returned, self._dealt[rank].popleft())

    def end_loop(self, over: bool) -> None:
        """Take back all unused batches.

        Args:
            over: whether the loop is over, so that the next one begins with batch 0; else it was only stopped and may continue.
        """
        for rank in self._dealt:
            self.give_back(rank)
        if over:
            self.clear()

    def clear(self) -> None:
        """Begin with batch 0."""
        for dealt in self._dealt.values():
            dealt.clear()
        self._next = 0
        self._returned.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the next batch's number and the unused batches, for a checkpoint."""
        dealt = {str(rank): list(tickets) for rank, tickets in self._dealt.items() if tickets}
        return {"next": self._next, "waiting": sorted(self._returned), "dealt": dealt}

    def load_state_dict(self, tree: dict[str, Any], ahead: Mapping[int, int]) -> None:
        """Restore what `state_dict` returned; batches that were handed out are handed out again.

        Args:
            tree: what it returned.
            ahead: rank -> the number of its batches that it has used for a contribution that it still holds.
        """
        self.clear()
        self._next, self._returned = int(tree["next"]), [int(ticket) for ticket in tree["waiting"]]
        for rank, tickets in ((int(rank), [int(ticket) for ticket in dealt]) for rank, dealt in tree["dealt"].items()):
            kept = ahead.get(rank, 0)
            if kept:
                self._dealt[rank].extend(tickets[:kept])
            self._returned += tickets[kept:]
        heapq.heapify(self._returned)
