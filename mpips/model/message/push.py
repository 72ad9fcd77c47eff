"""The message to the server."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.model.buffers import LIMBS, Buffers
from mpips.model.flat import Flat
from mpips.model.message.header import COLUMNS, WEIGHT, WorkerStatus

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]


def wire_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the push message: MPI cannot sum 16-bit floats, and the server steps float32 master weights."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


@dataclass
class Contribution:
    """One client's contribution, for a rule that combines clients.

    Attributes:
        client: the client's number.
        body: `(tail_at,)`, as in a push message, times the weight; zero for a client that does not count.
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
        message: the whole message, one tensor.
        tail_at: where the tail begins.
        behind: the part of the message behind the gradients.
        blank: the initial contents of `behind`: zero, except for this rank's `hyper`.
        gradients, floats, limbs, presence: views of the message's parts.
        second: a further view of the gradients' length; None if the mode has none.
        hyper: `(size, width)` view, each rank's hyperparameters in limbs, see `mpips.optim.hyperparameters`.
        rows: `(size, columns)` view, one row per rank.
        heard: where the sum of all tails arrives: `limbs`, `presence` and `rows`. The message itself if MPI sends it, a
            `ReducedTail` in shared memory.
        shared: whether the message lies in shared memory. If its weight is 0, its gradients are ignored.
        raw: whether the gradients are not multiplied by their weight; the reduction multiplies them.
        span: the slice of the flat buffer that the message is about.
        clients: single clients' contributions, sent beside the message, whose body is then zero (`reduce/client_rows.py`).
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
            buffers.limb_numel,
            len(flat.slots),
            size * LIMBS * numbers,
            size * len(self.columns),
        ]
        self.span = slice(0, flat.numel)
        self.clients: list[Contribution] = []
        self.shared = self.raw = False
        self.blank = torch.zeros(sum(lengths[1:]), dtype=dtype, device=flat.device)
        self._lay_out(allocate(sum(lengths), dtype, flat.device), lengths)

    def _lay_out(self, memory: Tensor, lengths: list[int]) -> None:
        """Make the views of the message, given its memory and the lengths of its parts."""
        self.lengths, self.message = lengths, memory[: sum(lengths)]
        self.gradients, self.floats, second, self.limbs, self.presence, hyper, rows = torch.split(self.message, lengths)
        self.second = second if lengths[2] else None
        self.rows, self.hyper = rows.view(-1, len(self.columns)), hyper.view(self.ranks, -1)
        self.tail_at = sum(lengths[:3])
        self.behind = self.message[lengths[0] :]
        self._numbers: Any = None if memory.is_cuda else self.rows.numpy()  # numpy writes a few numbers faster than torch
        self._row = None if self._numbers is None else struct.Struct(f"{len(self.columns)}{self._numbers.dtype.char}")
        self._hyper = None if memory.is_cuda else self.hyper.numpy()
        self._around = None if memory.is_cuda else (self.behind.numpy(), self.presence.numpy(), self.blank.numpy())
        self.heard: Push | ReducedTail = self

    def move(self, memory: Tensor, raw: bool) -> None:
        """Move the message into shared memory."""
        self._lay_out(memory, self.lengths)
        self.heard = ReducedTail(torch.zeros_like(memory[self.tail_at :]), self.lengths[3:], self.ranks, len(self.columns))
        self.shared, self.raw = True, raw

    @contextmanager
    def as_sent(self) -> Iterator[None]:
        """Treat the message as one that is sent, also where ranks share memory: its own tail receives the sum of the tails."""
        reduced, raw, self.heard = self.heard, self.raw, self
        try:
            yield
        finally:
            self.heard, self.raw = reduced, raw

    def forget(self) -> None:
        """Empty the contribution. In shared memory the gradients stay, as nobody reads them at weight 0."""
        if not self.shared:
            self.gradients.zero_()
        self.clear_behind()

    def clear_behind(self) -> None:
        """Reset the part behind the gradients to `blank`."""
        if self._around is None:
            self.behind.copy_(self.blank)
        else:
            self._around[0][:] = self._around[2]

    def weight(self, rank: int) -> float:
        """Return the weight in the rank's row."""
        return float((self.rows if self._numbers is None else self._numbers)[rank, WEIGHT])

    def fill(self) -> None:
        """Copy this part from the whole message. It is there already, unless this is a `Fragment`."""

    def spill(self) -> None:
        """Copy the result of the round into the whole message. It is there already, unless this is a `Fragment`."""

    def table(self) -> list[list[float]]:
        """Return `rows` as lists of numbers."""
        return _table(self.rows, self._numbers)

    def weights(self) -> list[float]:
        """Return each rank's weight; see `ReducedTail`."""
        found: list[float] = self.rows[:, WEIGHT].tolist()
        return found

    def present(self) -> list[float]:
        """Return for each tensor how many ranks have a gradient; see `ReducedTail`."""
        found: list[float] = self.presence.tolist()
        return found

    @property
    def body(self) -> Tensor:
        """The part that a rule combines."""
        return self.message[: self.tail_at]

    @property
    def statistics(self) -> Tensor:
        """The part of the body behind the gradients."""
        return self.message[self.lengths[0] : self.tail_at]

    def own(self, rank: int) -> list[tuple[int, Tensor]]:
        """Return this rank's contributions, each as its row's index and its body."""
        return [(rank, self.body)]

    def write(self, rank: int, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Write the status and the metrics' sums to this rank's row. A request's message has one row, whatever the rank."""
        place = rank if self.ranks > 1 else 0
        if self._row is None:
            self.rows[place].copy_(torch.tensor([*vars(row).values(), *metrics], dtype=self.message.dtype))
            return
        try:
            self._row.pack_into(self._numbers, place * self._row.size, *vars(row).values(), *metrics)
        except OverflowError:  # a loss above the dtype's largest number
            self._numbers[place] = [*vars(row).values(), *metrics]

    def write_hyper(self, rank: int, limbs: Any) -> None:
        """Set this rank's hyperparameters in all further messages, given the array of `mpips.optim.hyperparameters.encode`."""
        numbers = self.blank[sum(self.lengths[1:5]) : sum(self.lengths[1:6])].view(self.ranks, -1)
        numbers[rank if self.ranks > 1 else 0].copy_(torch.from_numpy(limbs.astype(np.float64)))

    def told(self) -> Any:
        """Return the hyperparameters of all ranks, an array `(ranks, width)` of limbs."""
        return self.hyper.cpu().numpy() if self._hyper is None else self._hyper

    def write_presence(self, present: Sequence[bool]) -> None:
        """Write which parameters have a gradient."""
        if self._around is not None:
            self._around[1].fill(1) if all(present) else np.copyto(self._around[1], present)
        else:
            self.presence.copy_(self.presence.new_tensor(present))


class ReducedTail:
    """The sum of all ranks' tails.

    Attributes:
        message: the whole tail, one tensor.
        limbs, presence, hyper, rows: views, as in `Push`.
    """

    def __init__(self, message: Tensor, lengths: list[int], ranks: int, columns: int) -> None:
        self.message = message
        self.limbs, self.presence, hyper, rows = torch.split(message, lengths)
        self.rows, self.hyper = rows.view(-1, columns), hyper.view(ranks, -1)
        self._numbers = None if rows.is_cuda else self.rows.numpy()
        self._present = None if rows.is_cuda else self.presence.numpy()
        self._hyper = None if rows.is_cuda else self.hyper.numpy()

    def weights(self) -> list[float]:
        """Return the weight of each rank's contribution."""
        found: list[float] = (self.rows if self._numbers is None else self._numbers)[:, WEIGHT].tolist()
        return found

    def present(self) -> list[float]:
        """Return for each tensor how many ranks have a gradient."""
        found: list[float] = (self.presence if self._present is None else self._present).tolist()
        return found

    def table(self) -> list[list[float]]:
        """Return `rows` as lists of numbers."""
        return _table(self.rows, self._numbers)

    def told(self) -> Any:
        """Return the hyperparameters of all ranks, an array `(ranks, width)` of limbs."""
        return self.hyper.cpu().numpy() if self._hyper is None else self._hyper


def _table(rows: Tensor, numbers: Any) -> list[list[float]]:
    found: list[list[float]] = (rows if numbers is None else numbers).tolist()
    return found


class Fragment(Push):
    """The push message of adjacent parameters: the part `span` of the gradients, and everything behind the gradients.

    Args:
        whole: the whole push message.
        slots: the indices of the parameters.
        span: the parameters' slice of the flat buffer.
        memory: where the message lies.
    """

    def __init__(self, whole: Push, slots: slice, span: slice, memory: Tensor) -> None:
        self.whole, self.slots, self.span, self.columns = whole, slots, span, whole.columns
        self.ranks = whole.ranks
        self.clients, self.shared, self.raw, self.blank = whole.clients, False, whole.raw, whole.blank
        self._lay_out(memory, [span.stop - span.start, *whole.lengths[1:]])

    def fill(self) -> None:
        """Copy the fragment's part from the whole message. Other parameters count as absent, so the server skips them."""
        self.raw = self.whole.raw
        self.gradients.copy_(self.whole.gradients[self.span])
        self.message[self.lengths[0] :].copy_(self.whole.message[self.whole.lengths[0] :])
        self._confine(self.presence)

    def confine(self) -> None:
        """Mark the other parameters as absent in the whole message, which is read in place."""
        self._confine(self.whole.presence)

    def _confine(self, presence: Tensor) -> None:
        presence[: self.slots.start].zero_()
        presence[self.slots.stop :].zero_()

    def spill(self) -> None:
        """Copy the result to the whole message, and zero the gradients of the other parameters."""
        self.whole.gradients.zero_()
        self.whole.gradients[self.span].copy_(self.gradients)
        self.whole.message[self.whole.lengths[0] :].copy_(self.message[self.lengths[0] :])
