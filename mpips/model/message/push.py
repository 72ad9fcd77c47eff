"""The message to the server."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.model.buffers import Buffers
from mpips.model.flat import Flat
from mpips.model.message.header import COLUMNS, WEIGHT, WorkerStatus

LIMBS = 4  # 16-bit pieces of an int64

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]


def wire_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """What a model's gradients travel in: MPI cannot sum 16-bit floats, and the server steps on float32 masters."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


@dataclass
class Contribution:
    """One client's, where a rule judges clients.

    Attributes:
        client: its number.
        body: `(tail_at,)` of a push message, times the weight; zero of one that does not count.
        samples, weight, bad: as in `WorkerStatus`.
    """

    client: int
    body: Tensor
    samples: float = 0
    weight: float = 0
    bad: float = 0


class Push:
    """The message to the server.

    Attributes:
        message: all of it.
        tail_at: where the tail begins.
        behind: the message but for the gradients.
        blank: the same before anything is said, but for this rank's `hyper`.
        gradients, floats, limbs, presence: views of its parts.
        second: a further view of the gradients' length; None where the mode has none.
        hyper: `(size, width)` view, each rank's optimizer's numbers in limbs, see `mpips.optim.hyperparameters`.
        rows: `(size, columns)` view, one row per rank.
        heard: where the sum of the tails arrives: `limbs`, `presence` and `rows`; the message itself, unless others read it.
        shared: whether others read it where it is: of weight 0, its gradients may be anything.
        raw: whether the gradients are not multiplied by their weight; they are where they are combined.
        span: the elements of the flat buffer that it is about.
        clients: contributions of this rank's to be sent one by one, beside the message, whose body is then zero
            (`reduce/client_rows.py`).
    """

    def __init__(
        self,
        flat: Flat,
        buffers: Buffers,
        size: int,
        metrics: Sequence[str],
        allocate: Allocate,
        vectors: int = 1,
        numbers: int = 0,
    ) -> None:
        dtype = wire_dtype(flat.dtype)
        self.columns = COLUMNS + tuple(metrics)
        self.ranks = size
        lengths = [
            flat.numel,
            buffers.float_numel,
            (vectors - 1) * flat.numel,
            LIMBS * buffers.integer_numel,
            len(flat.slots),
            size * LIMBS * numbers,
            size * len(self.columns),
        ]
        self.span = slice(0, flat.numel)
        self.clients: list[Contribution] = []
        self.shared = self.raw = False
        self.blank = torch.zeros(sum(lengths[1:]), dtype=dtype, device=flat.device)  # what is behind the gradients at first
        self._lay_out(allocate(sum(lengths), dtype, flat.device), lengths)

    def _lay_out(self, room: Tensor, lengths: list[int]) -> None:
        self.lengths, self.message = lengths, room[: sum(lengths)]
        self.gradients, self.floats, second, self.limbs, self.presence, hyper, rows = torch.split(self.message, lengths)
        self.second = second if lengths[2] else None
        self.rows, self.hyper = rows.view(-1, len(self.columns)), hyper.view(self.ranks, -1)
        self.tail_at = sum(lengths[:3])
        self.behind = self.message[lengths[0] :]
        self._numbers: Any = None if room.is_cuda else self.rows.numpy()  # to write a few numbers at less cost
        self._row = None if self._numbers is None else struct.Struct(f"{len(self.columns)}{self._numbers.dtype.char}")
        self._hyper = None if room.is_cuda else self.hyper.numpy()
        self._around = None if room.is_cuda else (self.behind.numpy(), self.presence.numpy(), self.blank.numpy())
        self.heard: Push | ReducedTail = self

    def move(self, room: Tensor, raw: bool) -> None:
        """From now on the message lies in `room`, where other ranks see it."""
        self._lay_out(room, self.lengths)
        self.heard = ReducedTail(torch.zeros_like(room[self.tail_at :]), self.lengths[3:], self.ranks, len(self.columns))
        self.shared, self.raw = True, raw

    def forget(self) -> None:
        """There is no contribution; gradients that nobody would read stay where they are."""
        if not self.shared:
            self.gradients.zero_()
        self.clear_behind()

    def clear_behind(self) -> None:
        """Zeros behind the gradients, and this rank's optimizer's numbers."""
        if self._around is None:
            self.behind.copy_(self.blank)
        else:
            self._around[0][:] = self._around[2]

    def weight(self, rank: int) -> float:
        """What its row says."""
        return float((self.rows if self._numbers is None else self._numbers)[rank, WEIGHT])

    def spill(self) -> None:
        """Put what has come into the whole message."""

    def table(self) -> list[list[float]]:
        """The numbers of `rows`."""
        return _table(self.rows, self._numbers)

    def weights(self) -> list[float]:
        """See `ReducedTail`."""
        found: list[float] = self.rows[:, WEIGHT].tolist()
        return found

    def present(self) -> list[float]:
        """See `ReducedTail`."""
        found: list[float] = self.presence.tolist()
        return found

    @property
    def body(self) -> Tensor:
        """What a rule combines."""
        return self.message[: self.tail_at]

    @property
    def statistics(self) -> Tensor:
        """What of it lies behind the gradients."""
        return self.message[self.lengths[0] : self.tail_at]

    def own(self, rank: int) -> list[tuple[int, Tensor]]:
        """The contributions of this rank: for each its row and its body."""
        return [(rank, self.body)]

    def write(self, rank: int, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Say `row` and the metrics' sums for this rank; a request has one row, whoever makes it."""
        place = rank if self.ranks > 1 else 0
        if self._row is None:
            self.rows[place].copy_(torch.tensor([*vars(row).values(), *metrics], dtype=self.message.dtype))
            return
        try:
            self._row.pack_into(self._numbers, place * self._row.size, *vars(row).values(), *metrics)
        except OverflowError:  # a loss beyond the message's largest number
            self._numbers[place] = [*vars(row).values(), *metrics]

    def write_hyper(self, rank: int, limbs: Any) -> None:
        """From now on say this rank's optimizer's numbers, an array of `mpips.optim.hyperparameters.encode`."""
        numbers = self.blank[sum(self.lengths[1:5]) : sum(self.lengths[1:6])].view(self.ranks, -1)
        numbers[rank if self.ranks > 1 else 0].copy_(torch.from_numpy(limbs.astype(np.float64)))

    def told(self) -> Any:
        """`(ranks, width)`, an array: what the ranks have said by `write_hyper`."""
        return self.hyper.cpu().numpy() if self._hyper is None else self._hyper

    def write_presence(self, present: Sequence[bool]) -> None:
        """Say which parameters have a gradient."""
        if self._around is not None:
            self._around[1].fill(1) if all(present) else np.copyto(self._around[1], present)
        else:
            self.presence.copy_(self.presence.new_tensor(present))


class ReducedTail:
    """The sum of all ranks' tails.

    Attributes:
        message: all of it.
        limbs, presence, hyper, rows: as in `Push`.
    """

    def __init__(self, message: Tensor, lengths: list[int], ranks: int, columns: int) -> None:
        self.message = message
        self.limbs, self.presence, hyper, rows = torch.split(message, lengths)
        self.rows, self.hyper = rows.view(-1, columns), hyper.view(ranks, -1)
        self._numbers = None if rows.is_cuda else self.rows.numpy()
        self._present = None if rows.is_cuda else self.presence.numpy()
        self._hyper = None if rows.is_cuda else self.hyper.numpy()

    def weights(self) -> list[float]:
        """What each rank's contribution counts."""
        found: list[float] = (self.rows if self._numbers is None else self._numbers)[:, WEIGHT].tolist()
        return found

    def present(self) -> list[float]:
        """For each tensor how many ranks have a gradient."""
        found: list[float] = (self.presence if self._present is None else self._present).tolist()
        return found

    def table(self) -> list[list[float]]:
        """The numbers of `rows`."""
        return _table(self.rows, self._numbers)

    def told(self) -> Any:
        """See `Push`."""
        return self.hyper.cpu().numpy() if self._hyper is None else self._hyper


def _table(rows: Tensor, numbers: Any) -> list[list[float]]:
    found: list[list[float]] = (rows if numbers is None else numbers).tolist()
    return found


class Fragment(Push):
    """The message of neighbouring `slots`, which take up `span`: their part of the gradients, and all that lies behind."""

    def __init__(self, whole: Push, slots: slice, span: slice, room: Tensor) -> None:
        self.whole, self.slots, self.span, self.columns = whole, slots, span, whole.columns
        self.ranks = whole.ranks
        self.clients, self.shared, self.raw, self.blank = whole.clients, False, False, whole.blank
        self._lay_out(room, [span.stop - span.start, *whole.lengths[1:]])

    def fill(self) -> None:
        """Take what is to be sent from the whole message; the other parameters count as absent: the server passes over them."""
        self.gradients.copy_(self.whole.gradients[self.span])
        self.message[self.lengths[0] :].copy_(self.whole.message[self.whole.lengths[0] :])
        self._confine(self.presence)

    def confine(self) -> None:
        """The other parameters count as absent in the whole message, too, which is to be read where it is."""
        self._confine(self.whole.presence)

    def _confine(self, presence: Tensor) -> None:
        presence[: self.slots.start].zero_()
        presence[self.slots.stop :].zero_()

    def spill(self) -> None:
        """See `Push`."""
        self.whole.gradients.zero_()
        self.whole.gradients[self.span].copy_(self.gradients)
        self.whole.message[self.whole.lengths[0] :].copy_(self.message[self.lengths[0] :])
