"""A round in memory that the ranks share: nothing is sent.

The push messages lie beside each other, row by row, and the pull message is there once: its weights are the parameters of every
rank. What each rank may touch changes when all have arrived and the leader, rank 0, has let them go on:

| step    | arrive, release          | then                                                                                   |
|---------|--------------------------|----------------------------------------------------------------------------------------|
| combine | every push is written    | whoever serves slices combines theirs, in place, in the leader's row                   |
| report  | arrive                   | every slice is combined; the leader judges                                             |
| verdict | release                  | each rank steps its slices of the weights                                              |
| publish | every slice is stepped   | the leader fills in the rest, releases; each rank computes on, and writes its push     |

If the leader serves all slices it alone is waited for: combine arrives, publish releases, nothing comes between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mpips.flat import ALIGNMENT


class Meeting(Protocol):
    """How the ranks of a room wait for each other: always `arrive`, then `release`.

    Attributes:
        leads: whether this rank is the leader.
    """

    leads: bool

    def arrive(self) -> None:
        """This rank has come; the leader waits until all have."""

    def release(self) -> None:
        """The leader lets the others go on, who wait for that."""


def sizes(ranks: int, numel: int, dtype: torch.dtype, pull: int, lines: int, answer: int) -> list[int]:
    """The bytes of a room's parts.

    Args:
        ranks, numel, dtype: push messages.
        pull: bytes of the pull message.
        lines, answer: numbers in a rank's report, and in the leader's verdict.
    """
    return [ranks * _row(numel, dtype), pull, ranks * lines * 8, answer * 8]


def _row(numel: int, dtype: torch.dtype) -> int:
    """The bytes that a push message takes up: the next one is aligned, too."""
    return -(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Room:
    """One rank's place in it.

    Args:
        rank, size: this rank, and how many they are.
        parts: the memory, as `sizes` has it.
        meeting: how the ranks wait for each other.
        numel, dtype: of a push message.

    Attributes:
        rows: `(size, numel)`, the push messages by rank.
        pull: the pull message.
        leads: whether this rank is the leader.
        spans: what this rank serves, slices of the push message's body.
        together: whether other ranks than the leader serve slices, too.
    """

    def __init__(self, rank: int, size: int, parts: Sequence[Tensor], meeting: Meeting, numel: int, dtype: torch.dtype) -> None:
        rows, self.pull, reports, answer = parts
        self.rank, self.size = rank, size
        self.rows = rows.view(dtype).view(size, -1)[:, :numel]
        self._numbers = self.rows.numpy()
        self._reports, self._answer = reports.view(torch.float64).view(size, -1), answer.view(torch.float64)
        self._meeting, self._arrived, self.leads = meeting, False, meeting.leads
        self._cut: dict[tuple[int, int], Sequence[Tensor]] = {}
        self.spans: list[slice] = []
        self.together = False

    @property
    def combined(self) -> Tensor:
        """Where what is combined lies: the leader's push message."""
        return self.rows[0]

    def combine(self, tail: int, heard: Tensor, apply: Callable[[slice, Sequence[Tensor]], None]) -> None:
        """Every push message is written.

        At the leader, and where slices are served, the sum of the tails lands in `heard`. `apply` is called with each slice
        and each rank's row of it, which is that rank's own memory.
        """
        self._arrive()
        if self.together:
            self._release()
        if not self.spans and not self.leads:
            return
        np.sum(self._numbers[:, tail:], 0, out=heard.numpy())  # for so few, faster than torch
        for span in self.spans:
            apply(span, self._rows_of(span))

    def _rows_of(self, span: slice) -> Sequence[Tensor]:
        """Made once: for a small model it takes as long as to add them."""
        key = span.start, span.stop
        if key not in self._cut:
            self._cut[key] = self.rows[:, span].unbind()
        return self._cut[key]

    def report(self, values: Tensor) -> Tensor:
        """Every slice is combined: a few numbers of every rank, `(lines,)` of float64, by rank, at the leader."""
        if not self.together:
            return values.unsqueeze(0)
        self._reports[self.rank].copy_(values)
        self._arrive()
        return self._reports

    def verdict(self, answer: Tensor) -> None:
        """After `report`: the leader's numbers, float64 of always the same length, land in everybody's `answer`."""
        if not self.together:
            return
        if self.leads:
            self._answer.copy_(answer)
        self._release()
        answer.copy_(self._answer)

    def publish(self, fill: Callable[[], None]) -> None:
        """Every rank has done with the pull message as it was, and stepped its slices; the leader completes it with `fill`."""
        if not self._arrived:
            self._arrive()
        if self.leads:
            fill()
        self._release()

    def _arrive(self) -> None:
        self._meeting.arrive()
        self._arrived = True

    def _release(self) -> None:
        self._arrived = False
        self._meeting.release()
