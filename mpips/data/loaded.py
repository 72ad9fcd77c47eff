"""A worker's share of the loader of a map-style dataset: the loader's sampler is replaced by one with this worker's batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from mpips.data.loader import Iterated, Seed, base_of, class_of, double_of, is_batched, loader_length, sampler_of
from mpips.data.samples import samples_in
from mpips.data.turns import Dealt, Found, Note, Order, Part, Streams, Turns, first_indices, whole


class Loaded:
    """One worker's share of a loader.

    Args:
        loader: the loader.
        part: this worker's number and the number of workers.
        streams: a context in which the random streams are those that all workers share.
    """

    def __init__(self, loader: DataLoader[Any], part: Part, streams: Streams) -> None:
        self._given, self._loader, self._part, self._streams = loader, base_of(loader), part, streams
        self._double, self._seed = double_of(self._loader), Seed(self._loader, part, streams)
        self._joint = part.workers > 1  # whether the order is drawn from the common streams
        self._plain = class_of(self._loader).__iter__ is DataLoader.__iter__

    def __len__(self) -> int:
        return loader_length(self._loader, self._part)

    def batches(self, taken: int, cuts: Sequence[Sequence[int]]) -> Found:
        """Return an iterator over this worker's batches. The loader's iterator is created in this call, as `iter` would.

        Args:
            taken: as in a `Place`. Indices before the place are drawn in this call, but not fetched.
            cuts: as in a `Place`.
        """
        loader, double = self._loader, self._double
        turns = Turns(sampler_of(loader), is_batched(loader), self._part, taken, cuts, self._streams)
        double.follow(self._part, turns, self._seed if self._joint else None)
        if taken or cuts:
            double.make_ready()
            turns.skip()
        return self._iterate(turns, taken, not self._joint)

    def first(self) -> list[Any]:
        """Return a batch of the first items in a list; an empty list if they cannot be known without the sampler or class."""
        loader = self._loader
        indices = first_indices(sampler_of(loader), is_batched(loader)) if self._plain else ()
        names = ("collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context")
        how: dict[str, Any] = {name: getattr(loader, name) for name in names}
        how |= {"num_workers": min(1, loader.num_workers), "generator": torch.Generator()}
        if not indices or not len(loader.dataset):  # type: ignore[arg-type]
            return []
        if is_batched(loader):
            return list(DataLoader(loader.dataset, batch_sampler=[list(indices[: len(loader.dataset)])], **how))  # type: ignore[arg-type]
        return list(DataLoader(loader.dataset, batch_size=None, sampler=indices, **how))

    def order(self) -> Order | None:
        """Return all batches of an epoch, drawn as in one process; None if the sampler's length is wrong or unknown."""
        loader = self._loader
        with self._streams:
            return whole(sampler_of(loader), is_batched(loader), self._seed.draw, self._joint)

    def dealt(self, order: Order, next_ticket: Callable[[], int | None], epoch: int) -> Found:
        """Return an iterator over the batches of `order` whose tickets this worker gets."""
        turns = Dealt(order, next_ticket, epoch)
        self._double.follow(self._part, turns, self._seed, drawn=True)
        return self._iterate(turns, 0, False)

    def _iterate(self, turns: Turns | Dealt, taken: int, undivided: bool) -> Found:
        """Return the loader's batches with their notes."""
        iterated = Iterated(self._given, self._double)
        return self._noted(iter(iterated.loader), turns.notes, taken, undivided, iterated)

    def _noted(self, batches: Iterator[Any], notes: deque[Note], taken: int, undivided: bool, iterated: Iterated) -> Found:
        """Yield the batches with their notes; see `_passed_by` for a loader that does not ask its sampler."""
        counts, begun = self._double.counts, False
        try:
            for batch in batches:
                if not begun and self._double.passed_by():
                    yield from self._passed_by(chain([batch], batches), taken, undivided)
                    return
                begun, note = True, _next_note(notes, batch, self._plain)
                samples = counts.popleft() if counts else note.samples
                yield batch, note._replace(samples=samples_in(batch) if samples is None else samples)
        finally:
            iterated.give_back()

    def _passed_by(self, batches: Iterator[Any], taken: int, undivided: bool) -> Found:
        """Yield the batches of a class whose `__iter__` uses no sampler; raise ValueError if several workers divide them."""
        if not undivided:
            raise ValueError(
                f"a {class_of(self._loader).__name__} given whose batches its sampler did not draw, so they cannot be divided"
                " among workers; expected a loader that iterates with DataLoader.__iter__, or an iterable of batches"
            )
        for batch in islice(batches, taken, None):
            yield batch, Note(1, samples_in(batch), 0)


def _next_note(notes: deque[Note], batch: Any, plain: bool) -> Note:
    """Return the note of the next batch; a sum of notes if the class's `__iter__` has joined several batches."""
    if not notes:
        return Note(0, None, 0)  # the class's `__iter__` has split a batch, which is noted already
    count = samples_in(batch) if not plain and len(notes) > 1 else None
    sums = list(accumulate(note.samples or 0 for note in notes)) if count else []
    joined = [notes.popleft() for _ in range(sums.index(count) + 1 if count in sums else 1)]
    if len(joined) == 1:
        return joined[0]
    return Note(sum(note.items for note in joined), count, joined[-1].crc)
