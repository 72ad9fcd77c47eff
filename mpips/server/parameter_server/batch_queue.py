"""The batches of a loop, dealt out by number to whoever is free."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any


class BatchQueue:
    """Which batches each worker has been given and has not used up.

    Nobody here knows how many there are: a worker that is given a number beyond the last is at its end.

    Args:
        ranks: the workers' ranks.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._dealt: dict[int, deque[int]] = {rank: deque() for rank in ranks}
        self._next = 0
        self._returned: list[int] = []  # a heap

    def deal(self, rank: int) -> int:
        """The next batch, for this worker; first those that others gave back."""
        if self._returned:
            ticket = heapq.heappop(self._returned)
        else:
            ticket, self._next = self._next, self._next + 1
        self._dealt[rank].append(ticket)
        return ticket

    def used(self, rank: int, count: int) -> None:
        """This worker has used up its first `count`."""
        for _ in range(min(count, len(self._dealt[rank]))):
            self._dealt[rank].popleft()

    def give_back(self, rank: int) -> None:
        """This worker ends: what it was given and has not used is for others."""
        while self._dealt[rank]:
            heapq.heappush(self._returned, self._dealt[rank].popleft())

    def end_loop(self, over: bool) -> None:
        """Nobody has any batch. If the loop is not over but stopped, it may be gone on with: then what is left stays."""
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
        """For a checkpoint: the next batch, and those dealt out and not used up."""
        dealt = {str(rank): list(tickets) for rank, tickets in self._dealt.items() if tickets}
        return {"next": self._next, "waiting": sorted(self._returned), "dealt": dealt}

    def load_state_dict(self, tree: dict[str, Any], ahead: Mapping[int, int]) -> None:
        """Take back what `state_dict` gave; what was dealt out will be again.

        Args:
            tree: see above.
            ahead: rank -> how many of its batches it has used up for a contribution that it goes on with.
        """
        self.clear()
        self._next, self._returned = int(tree["next"]), [int(ticket) for ticket in tree["waiting"]]
        for rank, tickets in ((int(rank), [int(ticket) for ticket in dealt]) for rank, dealt in tree["dealt"].items()):
            kept = ahead.get(rank, 0)
            if kept:
                self._dealt[rank].extend(tickets[:kept])
            self._returned += tickets[kept:]
        heapq.heapify(self._returned)
