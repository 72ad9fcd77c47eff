"""The ranks of one node: memory that all of them map, and how they wait for each other in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mpips.exchange import memory
from mpips.exchange.semaphore import AWAKE, SIZE, Semaphore
from mpips.process import emit

COUNTER = 7  # which eighth of a gate's memory counts how often its rank has arrived
LATE, AGAIN = 10.0, 60.0  # seconds until it is said who is waited for, and again
UNUSUAL = 3  # times the longest wait that is behind


class Gates:
    """A gate for each rank of a node: all arrive at the leader's, rank 0's, who then opens the others'.

    Args:
        mapped: memory that begins with a gate for each rank, all closed.
        rank, size: this rank's number on its node, and how many they are.
        awake: seconds that a rank waits awake before it sleeps.

    Attributes:
        members: their ranks among all, to name them by.
    """

    def __init__(self, mapped: Any, rank: int, size: int, awake: float = AWAKE) -> None:
        self.leads = rank == 0
        self.members: Sequence[int] = range(size)
        self._rank, self._size = rank, size
        self._counts = np.frombuffer(mapped, dtype=np.int64, count=size * SIZE // 8).reshape(size, -1)[:, COUNTER]
        self._begun, self._longest, self._due = 0.0, 0.0, LATE
        self._gates = [Semaphore(mapped, SIZE * number, awake) for number in range(size)]
        self._own = self._gates[rank]
        if self.leads:
            for gate in self._gates:
                gate.create()

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """This rank has come; the leader waits until all have, and calls `meanwhile` while it does."""
        self._counts[self._rank] += 1
        self._begun = time.perf_counter()
        if not self.leads:
            self._gates[0].post()
            return
        for _ in self._gates[1:]:
            self._own.take(meanwhile, self._late)
        self._note()

    def release(self) -> None:
        """The leader, after `arrive`, lets the others go on; they wait for that."""
        if not self.leads:
            self._own.take(late=self._late)
            self._note()
            return
        for gate in self._gates[1:]:
            gate.post()

    def _note(self) -> None:
        waited = time.perf_counter() - self._begun
        self._longest = max(self._longest, waited)
        self._due = max(LATE, UNUSUAL * self._longest)

    def _late(self) -> float:
        """Say who is waited for, when that is unusually long; one says it for all. Returns the seconds until then."""
        waited = time.perf_counter() - self._begun
        if waited >= self._due:
            self._due = waited + AGAIN
            missing = [k for k in range(self._size) if self._counts[k] < self._counts[self._rank]] or [0]
            if self._rank != (0 in missing):
                return AGAIN
            names = ", ".join(str(self.members[k]) for k in missing)
            emit(2, f"mpips: for {waited:.0f} s all have waited for rank{'s' * (len(missing) > 1)} {names}\n")
        return max(0.05, self._due - waited)


def mapped(node: Any, sizes: list[int], awake: float = AWAKE) -> tuple[list[Tensor], Gates] | None:
    """Memory that every rank of the communicator `node` maps: tensors of so many bytes, zero, and gates.

    None on all of them if they do not ask for the same, or there is no room for it.
    """
    starts, end = [], SIZE * node.size
    for size in sizes:
        end = -(-end // memory.PAGE) * memory.PAGE if size else end
        starts.append(end)
        end += size
    asked = np.empty((node.size, 2), dtype=np.int64)
    node.Allgather(np.array([len(sizes), end], dtype=np.int64), asked)
    parts = zip([0, *starts], [SIZE * node.size, *sizes], strict=True)  # of each, a rank has its share next to it
    own = [slice(at + size * node.rank // node.size, at + size * (node.rank + 1) // node.size) for at, size in parts]
    room = memory.mapped(node, end, own) if (asked == asked[0]).all() else None
    if room is None:
        return None
    gates = Gates(room, node.rank, node.size, awake)
    node.Barrier()
    return [memory.tensor(room, start, size) for start, size in zip(starts, sizes, strict=True)], gates
