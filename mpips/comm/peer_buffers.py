"""The messages of a node's ranks, as one rank sees them: all push messages, and the pull message that the ranks share.

The classes here are for host memory; those for GPUs are in `mpips.comm.cuda_ipc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

FEW = 1 << 15  # up to so many elements numpy is faster, as its calls start in a tenth of torch's time


class Rows(list[Tensor]):
    """The same part of every push message, in rank order.

    Attributes:
        arrays: the same memory as numpy arrays, if it is host memory and at most FEW elements; else None.
    """

    arrays: list[Any] | None = None


class PeerBuffers:
    """The messages of a node's ranks, as one rank sees them.

    Args:
        rows: the push messages, `(numel,)` each, in rank order.
        place: the index of this rank's push message.
        pull: the pull message, as bytes.

    Attributes:
        rows, place, pull: see above.
        row: this rank's push message.
        combined: the push message in whose memory this rank finds combined slices: the first one.
        fills: whether this rank is the first of those that share this pull message.
    """

    staged = False  # whether messages to other nodes go through staging buffers

    def __init__(self, rows: Sequence[Tensor], place: int, pull: Tensor) -> None:
        self.rows, self.place, self.pull = rows, place, pull
        self.row, self.combined, self.fills = rows[place], rows[0], place == 0
        self._parts: dict[tuple[int, int], Rows] = {}
        self._tail_sum: Tensor | None = None
        self._total: Any = None  # numpy views of that tensor and of the tails
        self._tails: list[Any] = []

    def rows_of(self, part: slice) -> Rows:
        """Return a part of every push message. It is cached, as slicing takes as long as adding up a small model."""
        key = part.start, part.stop
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = Rows(row[part] for row in self.rows)
            found.arrays = [row.numpy() for row in found] if part.stop - part.start <= FEW else None
        return found

    def store(self, part: slice, total: Tensor) -> None:
        """Copy `total`, the result for a part, to `combined`; do nothing in host memory, where `total` lies there already."""

    def assign(self, buckets: Sequence[Sequence[slice]]) -> None:
        """Note which rank serves what: for each bucket, a slice for each rank. In host memory this is not needed."""

    def gathered(self, part: slice) -> Tensor:
        """Return the combined part, whichever ranks serve it."""
        return self.combined[part]

    def sum_tails(self, out: Tensor) -> None:
        """Write the sum of the last `len(out)` elements of all rows to `out`."""
        if self._tail_sum is not out:  # the same tensor in every round
            self._tail_sum, self._total = out, out.numpy()  # numpy is faster for few elements
            self._tails = [row[-len(out) :].numpy() for row in self.rows]
        first, second, *others = self._tails if len(self._tails) > 1 else [*self._tails, 0]
        np.add(first, second, out=self._total)
        for tail in others:
            np.add(self._total, tail, out=self._total)

    def copy_to_peers(self, part: slice) -> None:
        """Copy a part of the pull message, in bytes, to the other copies on this node. In host memory there are none."""
