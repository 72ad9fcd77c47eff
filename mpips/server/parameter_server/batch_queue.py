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
        self._unpushed: dict[int, list[int]] = {rank: [] for rank in self._dealt}  # used, but behind no contribution yet
        self._next = 0
        self._returned: list[int] = []  # a heap
        self._of_dead: set[int] = set()  # those in it that a dead rank has had

    @property
    def left_by_dead(self) -> int:
        """The number of batches of dead ranks that nobody has taken; not numbers beyond the last, which living ones return."""
        last = min((ticket for ticket in self._returned if ticket not in self._of_dead), default=self._next)
        return sum(ticket < last for ticket in self._of_dead)

    def deal(self, rank: int) -> int:
        """Return the number of the next batch for `rank`; returned batches come first."""
        if self._returned:
            ticket = heapq.heappop(self._returned)
            self._of_dead.discard(ticket)
        else:
            ticket, self._next = self._next, self._next + 1
        self._dealt[rank].append(ticket)
        return ticket

    def used(self, rank: int, count: int, pushed: bool = True) -> None:
        """Remove the first `count` batches of `rank`, which it has used.

        Args:
            rank: the rank.
            count: the number of batches.
            pushed: whether the request has a contribution, which is then that of all batches used so far.
        """
        taken = [self._dealt[rank].popleft() for _ in range(min(count, len(self._dealt[rank])))]
        self._unpushed[rank] = [] if pushed else self._unpushed[rank] + taken

    def give_back(self, rank: int) -> None:
        """Return the unused batches of `rank`, which ends, to the queue."""
        while self._dealt[rank]:
            heapq.heappush(self._returned, self._dealt[rank].popleft())

    def lose(self, rank: int) -> None:
        """Return the batches of `rank`, which has died, to the queue, but for those behind what it has pushed."""
        self._dealt[rank].extend(self._unpushed[rank])
        self._unpushed[rank] = []
        self._of_dead.update(self._dealt[rank])
        self.give_back(rank)

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
        for known in (*self._dealt.values(), *self._unpushed.values()):
            known.clear()
        self._next = 0
        self._returned.clear()
        self._of_dead.clear()

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
