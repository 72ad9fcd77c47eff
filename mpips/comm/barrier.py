"""The shared memory of one node's ranks, and the barrier by which these wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from mpips.comm import shared_memory as memory
from mpips.comm.semaphore import AWAKE, SIZE, Semaphore


class NodeBarrier:
    """A barrier in two halves, made of one semaphore for each rank: all arrive at the leader, rank 0, who then releases them.

    Args:
        mapped: shared memory that begins with one semaphore for each rank.
        rank, size: this rank's number on its node, and the number of ranks there.
        awake: the seconds that a rank polls before it sleeps.
        waits: a context that is entered for the time of each wait.
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
        """Announce that this rank has arrived. The leader waits until all ranks have, and calls `meanwhile` while it waits."""
        if not self.leads:
            self._semaphores[0].post()
            return
        with self._waits:
            for _ in self._semaphores[1:]:
                self._own.take(meanwhile)

    def release(self) -> None:
        """Release the other ranks, at the leader, after `arrive`; elsewhere, wait for the release."""
        if not self.leads:
            with self._waits:
                self._own.take()
            return
        for semaphore in self._semaphores[1:]:
            semaphore.post()


def mapped(
    node: Any, sizes: list[int], awake: float = AWAKE, waits: AbstractContextManager[None] | None = None
) -> tuple[list[Tensor], NodeBarrier] | None:
    """Map memory that all ranks of the MPI communicator `node` share.

    Args:
        node: the MPI communicator of the node's ranks.
        sizes: the sizes of the tensors, in bytes.
        awake: the seconds that a rank polls before it sleeps.
        waits: a context that is entered for the time of each wait.

    Returns:
        A uint8 tensor of zeros for each size, and the ranks' barrier. None, on all ranks, if the ranks ask for different sizes
        or the node has too little memory.
    """
    starts, end = [], SIZE * node.size
    for size in sizes:
        end = -(-end // memory.PAGE) * memory.PAGE if size else end
        starts.append(end)
        end += size
    asked = np.empty((node.size, 2), dtype=np.int64)
    node.Allgather(np.array([len(sizes), end], dtype=np.int64), asked)
    parts = zip([0, *starts], [SIZE * node.size, *sizes], strict=True)  # each rank allocates its share of each part
    own = [slice(at + size * node.rank // node.size, at + size * (node.rank + 1) // node.size) for at, size in parts]
    shared = memory.mapped(node, end, own) if (asked == asked[0]).all() else None
    if shared is None:
        return None
    barrier = NodeBarrier(shared, node.rank, node.size, awake, waits)
    node.Barrier()
    return [memory.tensor(shared, start, size) for start, size in zip(starts, sizes, strict=True)], barrier
