"""The ranks of one node: memory that all of them map, and how they wait for each other in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from mpips.comm import shared_memory as memory
from mpips.comm.semaphore import AWAKE, SIZE, Semaphore


class NodeBarrier:
    """A gate for each rank of a node: all arrive at the leader's, rank 0's, who then opens the others'.

    Args:
        mapped: memory that begins with a gate for each rank, all closed.
        rank, size: this rank's number on its node, and how many they are.
        awake: seconds that a rank waits awake before it sleeps.
        waits: a context for the time of each wait.
    """

    def __init__(
        self, mapped: Any, rank: int, size: int, awake: float = AWAKE, waits: AbstractContextManager[None] | None = None
    ) -> None:
        self.leads = rank == 0
        self._waits = waits or nullcontext()
        self._semaphores = [Semaphore(mapped, SIZE * number, awake) for number in range(size)]
        self._own = self._semaphores[rank]
        if self.leads:
            for semaphore in self._semaphores:
                semaphore.create()

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """This rank has come; the leader waits until all have, and calls `meanwhile` while it does."""
        if not self.leads:
            self._semaphores[0].post()
            return
        with self._waits:
            for _ in self._semaphores[1:]:
                self._own.take(meanwhile)

    def release(self) -> None:
        """The leader, after `arrive`, lets the others go on; they wait for that."""
        if not self.leads:
            with self._waits:
                self._own.take()
            return
        for semaphore in self._semaphores[1:]:
            semaphore.post()


def mapped(
    node: Any, sizes: list[int], awake: float = AWAKE, waits: AbstractContextManager[None] | None = None
) -> tuple[list[Tensor], NodeBarrier] | None:
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
    barrier = NodeBarrier(room, node.rank, node.size, awake, waits)
    node.Barrier()
    return [memory.tensor(room, start, size) for start, size in zip(starts, sizes, strict=True)], barrier
