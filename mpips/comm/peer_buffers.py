"""The messages of a node's ranks, as one of them sees them: the push messages beside each other, the pull message once.

Here in the host's memory; `mpips.comm.cuda_ipc` has the same of GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

FEW = 1 << 15  # elements that numpy, which begins in a tenth of torch's time, adds up as fast


class Rows(list[Tensor]):
    """A part of every push message.

    Attributes:
        arrays: the same memory for numpy, if it is few elements of the host's; else None.
    """

    arrays: list[Any] | None = None


class PeerBuffers:
    """One rank's view.

    Args:
        rows: the push messages, `(numel,)` each, by place.
        place: this rank's, from 0.
        pull: the pull message, as bytes.

    Attributes:
        rows, place, pull: see above.
        row: this rank's push message.
        combined: where what is combined lies, as far as this rank sees it: the first push message.
        fills: whether this rank is the first that has this pull message.
    """

    staged = False  # whether what leaves the node passes through other memory

    def __init__(self, rows: Sequence[Tensor], place: int, pull: Tensor) -> None:
        self.rows, self.place, self.pull = rows, place, pull
        self.row, self.combined, self.fills = rows[place], rows[0], place == 0
        self._cut: dict[tuple[int, int], Rows] = {}
        self._heard: Tensor | None = None
        self._total: Any = None  # its memory as an array, and those of the tails
        self._tails: list[Any] = []

    def rows_of(self, part: slice) -> Rows:
        """A part of every row. Made once: for a small model it takes as long as to add them."""
        key = part.start, part.stop
        found = self._cut.get(key)
        if found is None:
            found = self._cut[key] = Rows(row[part] for row in self.rows)
            found.arrays = [row.numpy() for row in found] if part.stop - part.start <= FEW else None
        return found

    def store(self, part: slice, total: Tensor) -> None:
        """What has been made of a part, in the first of what `near` gave, comes to where what is combined lies: it is there."""

    def assign(self, buckets: Sequence[Sequence[slice]]) -> None:
        """Who serves what: for each bucket a slice for each place."""

    def gathered(self, part: slice) -> Tensor:
        """What is combined, whoever serves it."""
        return self.combined[part]

    def sum_tails(self, out: Tensor) -> None:
        """The sum of what lies behind in all rows, as much as `out` is long."""
        if self._heard is not out:  # always the same
            self._heard, self._total = out, out.numpy()  # for so few, faster than torch
            self._tails = [row[-len(out) :].numpy() for row in self.rows]
        first, second, *others = self._tails if len(self._tails) > 1 else [*self._tails, 0]
        np.add(first, second, out=self._total)
        for tail in others:
            np.add(self._total, tail, out=self._total)

    def copy_to_peers(self, part: slice) -> None:
        """These bytes of the pull message have been written: let all ranks of the node have them. They do."""
