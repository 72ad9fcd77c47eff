"""A worker's turns: which batches of indices it takes of the order that a sampler yields, and what is known of each batch.

    the order of one process    0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 ...      a group: what all workers take in one step
    worker 0 of 2, batch of 3   0   2   4   | 6   8   10    | 12
    worker 1 of 2                 1   3   5 |   7   9    11 |

In one step, n workers together take what one process with an n times larger batch would take. A batch sampler of an unknown
class yields whole batches; a group is then one batch for each worker.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from mpips.data import digest
from mpips.data.place import left

QUIET = (SequentialSampler, list, tuple, range)  # these draw no random numbers
AT_ONCE = (
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)  # these draw from the process's streams at their first item only

Streams = AbstractContextManager[None]
T = TypeVar("T")


class Note(NamedTuple):
    """What is known of a batch: the items by which a place advances, the samples or None, a hash of the order up to here."""

    items: int
    samples: int | None
    crc: int


Found = Iterator[tuple[Any, Note]]  # batches, each with its note
Order = list[tuple[Any, Note]]  # batches of indices, each with its note


@dataclass(frozen=True)
class Part:
    """A worker's number and the number of workers."""

    index: int
    workers: int


def is_by_item(sampler: Any, batched: bool) -> bool:
    """Return whether the sampler is torch's own BatchSampler, whose items can be divided among workers."""
    return batched and type(sampler) is BatchSampler


def noted(batch: Any, sampler: Any, batched: bool, crc: int) -> Note:
    """Return the note of a batch of indices. Without a batch sampler, a list of indices asks the dataset for a whole batch."""
    several = isinstance(batch, list) or (batched and hasattr(batch, "__len__"))
    samples = len(batch) if several else None
    return Note(len(batch) if is_by_item(sampler, batched) else 1, samples, crc)


def length(sampler: Any, batched: bool, part: Part) -> int:
    """Return the number of this worker's batches in an epoch.

    Raises:
        TypeError: the sampler does not know its length.
    """
    if not is_by_item(sampler, batched):
        return _share_of(len(sampler), 1, part)
    return _share_of(len(sampler.sampler), sampler.batch_size, part, sampler.drop_last)


def _share_of(count: int, size: int, part: Part, drop_last: bool = False) -> int:
    """Return this worker's number of batches, given the number of items and the batch size."""
    full, rest = divmod(count, size * part.workers)
    return full + (rest > part.index and not drop_last)


def first_indices(sampler: Any, batched: bool) -> Sequence[Any]:
    """Return the indices of a batch that one of torch's own samplers could yield, without drawing; else none.

    There may be more than the dataset has: a batch size has no limit.
    """
    size, order = (sampler.batch_size, sampler.sampler) if is_by_item(sampler, batched) else (1, sampler)
    if batched and not is_by_item(sampler, batched):
        return ()
    if isinstance(order, SubsetRandomSampler):
        order = order.indices
    if type(order) in (list, tuple, range):
        return order[:size]  # type: ignore[no-any-return]
    return range(size) if type(order) in (SequentialSampler, *AT_ONCE) else ()


class Turns:
    """This worker's turns in one loop.

    Args:
        sampler: a loader's batch sampler, or its sampler if the loader makes no batches.
        batched: whether it is a batch sampler.
        part: this worker's number and the number of workers.
        taken, cuts: as in a `Place`.
        streams: a context in which the random streams are the ones to draw from.

    Attributes:
        notes: the notes of the batches that were drawn and that the script has not received yet.
    """

    def __init__(
        self, sampler: Any, batched: bool, part: Part, taken: int, cuts: Sequence[Sequence[int]], streams: Streams
    ) -> None:
        self.sampler, self.batched, self.part, self.streams = sampler, batched, part, streams
        self.taken, self.cuts = taken, [list(cut) for cut in cuts]  # a copy: the place advances during the loop
        self.notes: deque[Note] = deque()
        self._latest: weakref.ref[Drawing] | None = None

    def open(self) -> Iterator[Any]:
        """Return an iterator over the batches of indices from the place on. Torch calls this once or twice in a loop."""
        drawing = Drawing(self)
        self._latest = weakref.ref(drawing)
        return drawing

    def skip(self) -> None:
        """Draw the indices before the place now."""
        drawing = self._latest() if self._latest else None
        if drawing:
            drawing.skip()


def after(units: Iterator[T], count: int) -> Iterator[T]:
    """Return the iterator without its first `count` elements, which are drawn now.

    If `count` is 0, the first element is drawn now and kept, and with it whatever the iterator leaves out before it.
    """
    deque(islice(units, count), maxlen=0)
    return units if count else chain(list(islice(units, 1)), units)


class Drawing(Iterator[Any]):
    """One iteration over a worker's turns. It draws when torch's own batch sampler would."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._crc = turns, 0
        sampler = turns.sampler
        self._by_item = is_by_item(sampler, turns.batched)
        self._order = sampler.sampler if self._by_item else sampler
        self._swaps = (
            0 if type(self._order) in QUIET else 1 if type(self._order) in AT_ONCE else -1
        )  # how many draws use `streams`; -1: all
        self._size = turns.part.workers * (sampler.batch_size if self._by_item else 1)  # items of a group
        self._drop_last = self._by_item and sampler.drop_last
        self._units: Iterator[Any] | None = None
        self._drawn: Iterator[Any] | None = None
        if not self._by_item:  # some samplers draw when iteration begins
            with turns.streams if self._swaps else nullcontext():
                self._drawn = iter(self._order)

    def __next__(self) -> Any:
        turns, part = self._turns, self._turns.part
        self.skip()
        group = self._draw(self._size)
        if part.workers > 1:
            self._crc = digest.of_order(group, self._crc)
        own = group[part.index :: part.workers]
        if not own or (self._drop_last and len(group) < self._size):
            raise StopIteration
        batch = own if self._by_item else own[0]
        turns.notes.append(noted(batch, turns.sampler, turns.batched, self._crc))
        return batch

    def skip(self) -> None:
        """Draw the indices before the place, unless that is done."""
        if self._units is not None:
            return
        turns = self._turns
        with turns.streams if self._swaps else nullcontext():
            self._units = iter(left(self._drawn or iter(self._order), turns.cuts))
        before = turns.taken * turns.part.workers
        if before or turns.cuts:
            with self._streams():
                self._units = after(self._units, before)

    def _draw(self, count: int) -> list[Any]:
        """Return the next `count` elements of the order."""
        assert self._units is not None
        with self._streams():
            return list(islice(self._units, count))

    def _streams(self) -> Streams:
        """Return the context for the next draw: a null context if it draws no random numbers."""
        swaps, self._swaps = self._swaps, max(self._swaps - 1, -1) if self._swaps else 0
        return self._turns.streams if swaps else nullcontext()


class Dealt:
    """Batches of indices that are dealt out by number to whichever worker is free.

    Args:
        order: all batches of an epoch with their notes.
        next_ticket: returns the number of the next batch, or None.
        epoch: the epoch, for error messages.
    """

    def __init__(self, order: Order, next_ticket: Callable[[], int | None], epoch: int) -> None:
        self._order, self._next_ticket, self._epoch = order, next_ticket, epoch
        self.notes: deque[Note] = deque()

    def open(self) -> Iterator[Any]:
        """Return an iterator over the batches of indices that are dealt to this worker."""
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        while (ticket := self._next_ticket()) is not None:
            if not 0 <= ticket < len(self._order):
                raise IndexError(f"ticket {ticket} given; epoch {self._epoch} has {len(self._order)} batches, from 0")
            batch, note = self._order[ticket]
            self.notes.append(note)
            yield batch


def whole(sampler: Any, batched: bool, seed: Callable[[], None], compare: bool) -> Order | None:
    """Return all batches of an epoch, drawn at once; None if the sampler has no length, or does not end there.

    Args:
        sampler: as for `Turns`.
        batched: as for `Turns`.
        seed: called when torch would draw the seed of a loader's worker processes.
        compare: whether to hash the order, so that workers can compare it.
    """
    try:
        count = len(sampler)
    except (TypeError, NotImplementedError):
        return None
    drawn = iter(sampler)
    seed()
    batches = list(islice(drawn, count + 1))
    if len(batches) > count:
        return None
    crc = digest.of_order(batches, 0) if compare else 0
    return [(batch, noted(batch, sampler, batched, crc)) for batch in batches]
