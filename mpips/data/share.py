"""Each worker's share of the data.

A loader is iterated itself, through its own class; only its sampler gives this worker's batches alone (`turns.py`). Of a
stream, which all workers read in full, batch j*W + k is worker k's. Or the batches of an epoch are dealt out by number to
whoever is free: a slow worker then takes fewer.

With one worker that is plain PyTorch: the same draws from the same random streams at the same moments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import accumulate, chain, islice
from typing import Any

from torch.utils.data import DataLoader

from mpips.data import digest
from mpips.data.common import Common
from mpips.data.generators import generators_of
from mpips.data.given import as_given
from mpips.data.loader import Double, class_of, double_of, is_batched, is_stream, loader_length, sampler_of
from mpips.data.place import Place, left
from mpips.data.refuse import refuse_split
from mpips.data.samples import samples_in
from mpips.data.turns import Dealt, Note, Part, Streams, Turns, after, whole

Found = Iterator[tuple[Any, Note]]
Batches = Iterator[tuple[Any, int, int | None]]


class Share:
    """One worker's batches of one loop.

    Args:
        data: a DataLoader (of any class, with any sampler), a map-style dataset, tensors or arrays (one, or a tuple or dict of
            them), a list of samples, any iterable of batches; or a progress bar around one of them.
        batch_size: items a batch, for data that is not in batches already.
        shuffle: whether such data is drawn in a new order for each loop, as a DataLoader would.
        drop_last: whether to leave out what does not fill a batch on every worker.
        index, workers: which worker of how many.
        common: the streams that orders are drawn from.
        own: whether the data is this rank's alone; then it is not dealt out, and on another number of workers the loop that
            was interrupted begins anew.

    Attributes:
        digest: 24 bits that all workers must have alike as of the batch at hand: of the data, and of what was drawn of it. 0 if
            there is nothing to compare.

    Raises:
        ValueError: if the data is of another kind, is dealt out to processes already, or its batch size is missing or given
            twice.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None,
        shuffle: bool,
        drop_last: bool,
        index: int,
        workers: int,
        common: Common,
        own: bool = False,
    ) -> None:
        self._bar = data if _is_bar(data) else None
        self.data = as_given(data.iterable if _is_bar(data) else data, batch_size, shuffle, drop_last)
        self.part = Part(0, 1) if own else Part(index, workers)
        self.common, self.own, self.digest = common, own, 0
        if isinstance(self.data, DataLoader) and not own:
            refuse_split(self.data)
        compared = not own and workers > 1
        self._of_data = digest.of_data(self.data) if compared else 0
        self._order: list[tuple[Any, Note]] | None = None  # of an epoch that is dealt out

    def __len__(self) -> int:
        """This worker's batches in an epoch.

        Raises:
            TypeError: if that is not known.
        """
        if isinstance(self.data, DataLoader):
            return loader_length(self.data, self.part)
        return len(range(self.part.index, len(self.data), self.part.workers))

    def batches(self, place: Place) -> Batches:
        """This worker's batches from its place on; what came before is skipped here and now.

        Returns:
            An iterator over the batch, the items in it by which a place counts, and its samples, or None if that is not known.
        """
        self._begin((place.epoch, place.loop))
        return self._given(self._stream(place) if self._streamed else self._loaded(self._turns(place), place.taken))

    def tickets(self, epoch: int, loop: int = 0) -> int | None:
        """How many batches an epoch has when they are dealt out; its order is drawn here.

        Returns:
            The number; None for data that is not dealt out: a rank's own, streams, and samplers without an end or a length.
        """
        if self.own or self._streamed:
            return None
        if self._order is None:
            self._begin((epoch, loop))
            self._order = self._drawn()
        return None if self._order is None else len(self._order)

    def dealt(self, epoch: int, next_ticket: Callable[[], int | None]) -> Batches:
        """Batches by number, out of the order of all workers' items: ticket t names items t*B to (t+1)*B.

        Args:
            epoch: as given to `tickets`.
            next_ticket: gives the number of the next batch, from 0 to `tickets(epoch)` - 1, or None when there are no more. It
                is called on the caller's thread, once for each batch that is asked for; a DataLoader's own workers
                fetch ahead, so it is called up to `num_workers * prefetch_factor` batches before.

        Returns:
            As `batches`.

        Raises:
            ValueError: if the data is not dealt out, which is where `tickets` is None.
            IndexError: from the iterator, for a ticket that names no batch.
        """
        if self.tickets(epoch) is None:
            raise ValueError("this data is not dealt out in batches; iterate over `batches`")
        assert self._order is not None
        turns = Dealt(self._order, next_ticket, epoch)
        self._double.follow(self.part, turns, seeded=True)
        return self._given(self._loaded(turns, 0))

    def _begin(self, loop: tuple[int, int]) -> None:
        self.common.begin(loop, generators_of(self.data), self.own)

    @property
    def _streamed(self) -> bool:
        """Whether the data can only be iterated."""
        return not isinstance(self.data, DataLoader) or is_stream(self.data)

    @property
    def _double(self) -> Double:
        return double_of(self.data)

    @property
    def _joint(self) -> bool:
        """Whether workers draw together, from streams that are not their own."""
        return self.part.workers > 1

    @property
    def _streams(self) -> Streams:
        return nullcontext() if self.own else self.common

    def _turns(self, place: Place) -> Turns:
        """This worker's turns from its place on, with what lies before skipped."""
        loader, double, cuts = self.data, self._double, self._cuts(place)
        turns = Turns(sampler_of(loader), is_batched(loader), self.part, place.taken, cuts, self._streams)
        double.follow(self.part, turns, self._draw_seed if self._joint else None)
        if place.taken or cuts:
            double.make_ready()
            turns.skip()
        return turns

    def _cuts(self, place: Place) -> list[list[int]]:
        return [] if self.own else place.cuts

    def _draw_seed(self) -> None:
        with self._streams:
            self._double.draw_seed(self.part.index)

    def _drawn(self) -> list[tuple[Any, Note]] | None:
        """The whole order; None, and nothing drawn, for a sampler that does not end where it says."""
        loader = self.data
        with self._streams:
            order = whole(sampler_of(loader), is_batched(loader), self._draw_seed, self._joint)
        if order is None:
            self.common.again()
        return order

    def _loaded(self, turns: Turns | Dealt, taken: int) -> Found:
        """A loader's batches, in turn; here and now it begins to iterate, as a script that asks for an iterator expects."""
        return self._noted(iter(self._double.loader), turns.notes, taken)

    def _noted(self, batches: Iterator[Any], notes: deque[Note], taken: int) -> Found:
        double, plain, begun = self._double, class_of(self.data).__iter__ is DataLoader.__iter__, False
        try:
            for batch in batches:
                if not begun and double.passed_by():
                    yield from self._passed_by(chain([batch], batches), taken)
                    return
                begun = True
                note = _note_of(notes, batch, plain)
                yield batch, note._replace(samples=double.counts.popleft()) if double.counts else _counted(note, batch)
        finally:
            if not plain:
                double.give_back()

    def _passed_by(self, batches: Iterator[Any], taken: int) -> Found:
        """What a class's `__iter__` gives that asks no sampler: one worker may take all of it, several cannot divide it."""
        if self._joint or self._order is not None:
            raise ValueError(
                f"a {type(self.data).__name__} given whose batches its sampler did not draw, so they cannot be divided among"
                " workers; expected a loader that iterates with DataLoader.__iter__, or an iterable of batches"
            )
        for batch in islice(batches, taken, None):
            yield batch, Note(1, samples_in(batch), 0)

    def _stream(self, place: Place) -> Found:
        """A stream's batches in turn; here and now it begins, and what lies before the place is read."""
        if isinstance(self.data, DataLoader):
            self._double.follow(self.part)
        with self._streams:
            drawn = iter(self._double.loader if isinstance(self.data, DataLoader) else self.data)
        cuts = self._cuts(place)
        units = iter(left(self._read(drawn), cuts))
        return self._mine(after(units, place.taken * self.part.workers) if place.taken or cuts else units)

    def _read(self, stream: Iterator[Any]) -> Found:
        """All batches of a stream."""
        counts = self._double.counts if isinstance(self.data, DataLoader) else ()
        while True:
            with self._streams:
                try:
                    batch = next(stream)
                except StopIteration:
                    return
            yield batch, Note(1, counts.popleft() if counts else samples_in(batch), 0)

    def _mine(self, units: Found) -> Found:
        """Of each group of batches, one for each worker, this worker's; all workers read the group before they use it."""
        crc = 0
        while True:
            mine = None
            for at, (batch, note) in enumerate(islice(units, self.part.workers)):
                crc = digest.of_batch(batch, crc) if self._joint else 0
                mine = (batch, note) if at == self.part.index else mine
            if mine is None:
                return
            yield mine[0], mine[1]._replace(crc=crc)

    def _given(self, found: Found) -> Batches:
        for batch, note in found if self._bar is None else self._through(self._bar, found):
            self.digest = digest.together(self._of_data, note.crc) if self._joint else 0
            yield batch, note.items, note.samples

    def _through(self, bar: Any, found: Found) -> Found:
        """Have a progress bar show this worker's batches in place of all."""
        notes, given = deque[Note](), bar.iterable
        with suppress(TypeError):
            bar.total = len(self)
        bar.iterable = _aside(found, notes)
        try:
            for batch in bar:
                yield batch, notes.popleft()
        finally:
            bar.iterable = given


def _aside(found: Found, notes: deque[Note]) -> Iterator[Any]:
    for batch, note in found:
        notes.append(note)
        yield batch


def _is_bar(data: Any) -> bool:
    """Whether the data is a progress bar around some, as tqdm makes it."""
    return not isinstance(data, DataLoader) and all(hasattr(data, name) for name in ("iterable", "total", "update"))


def _counted(note: Note, batch: Any) -> Note:
    return note if note.samples is not None else note._replace(samples=samples_in(batch))


def _note_of(notes: deque[Note], batch: Any, plain: bool) -> Note:
    """What is known of a batch: the next note, or several where a class's `__iter__` has joined so many batches."""
    if not notes:
        return Note(0, None, 0)  # part of a batch that was noted before
    count = samples_in(batch) if not plain and len(notes) > 1 else None
    sums = list(accumulate(note.samples or 0 for note in notes)) if count else []
    joined = [notes.popleft() for _ in range(sums.index(count) + 1 if count in sums else 1)]
    if len(joined) == 1:
        return joined[0]
    return Note(sum(note.items for note in joined), count, joined[-1].crc)
