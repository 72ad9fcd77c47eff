"""Each worker's share of the data.

A loader is iterated through its own class; only its sampler is replaced, by one that yields this worker's batches
(`loaded.py`). A stream is read in full by all workers, which take its batches in turn (`stream.py`). In asynchronous modes the
server deals out the batches of an epoch by number to whichever worker is free, so a slow worker takes fewer.

With one worker this is plain PyTorch: the same draws from the same random streams at the same moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from mpips.data import digest
from mpips.data.bar import is_bar, through
from mpips.data.common import Common
from mpips.data.generators import generators_of
from mpips.data.given import as_given
from mpips.data.loaded import Loaded
from mpips.data.loader import is_stream
from mpips.data.place import Place
from mpips.data.refuse import refuse_split
from mpips.data.stream import Streamed
from mpips.data.turns import Found, Order, Part

Batches = Iterator[tuple[Any, int, int | None]]


class Share:
    """One worker's batches in one loop.

    Args:
        data: a DataLoader (of any class, with any sampler), a map-style dataset, tensors or arrays (one, or a tuple or dict of
            them), a list of samples, any iterable of batches; or a progress bar around one of these.
        batch_size: the items in a batch, for data that is not in batches already.
        shuffle: whether such data is drawn in a new order in each loop, as by a DataLoader.
        drop_last: whether to leave out the items that do not fill a batch on every worker.
        index, workers: this worker's number and the number of workers.
        common: the random streams that orders are drawn from.
        own: whether the data belongs to this rank only. It is then not dealt out, and a loop that is resumed on another number
            of workers begins anew.

    Attributes:
        digest: a 24-bit digest of the data, and of the order up to the present batch, which must agree on all workers. 0 if
            there is nothing to compare.

    Raises:
        ValueError: the data is of another kind, is divided among processes already, or its batch size is missing or given
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
        self._bar = data if is_bar(data) else None
        self._data = data = as_given(data.iterable if self._bar else data, batch_size, shuffle, drop_last)
        self._common, self._own, self.digest = common, own, 0
        part = Part(0, 1) if own else Part(index, workers)
        loaded = isinstance(data, DataLoader)
        if loaded and not own:
            refuse_split(data)
        kind = Loaded if loaded and not is_stream(data) else Streamed
        self._share: Loaded | Streamed = kind(data, part, nullcontext() if own else common)
        self._compares = part.workers > 1
        self._order: Order | None = None  # the order of an epoch that is dealt out

    @cached_property
    def _of_data(self) -> int:
        return digest.of_data(self._data)

    @property
    def identity(self) -> int:
        """A hash of the data and the batch size, by which a resumed run knows that they are those of its checkpoint.

        0 for a rank's own data: a script that makes them anew for each loop would pay for the hash each time.
        """
        return 0 if self._own else digest.together(self._of_data, getattr(self._data, "batch_size", None) or 0)

    def __len__(self) -> int:
        """Return the number of this worker's batches in an epoch.

        Raises:
            TypeError: the number is unknown.
        """
        return len(self._share)

    def batches(self, place: Place) -> Batches:
        """Return an iterator over this worker's batches from its place on. Earlier batches are skipped in this call.

        Returns:
            An iterator over tuples: the batch, the number of items by which the place advances, and the number of samples, None
                if unknown.
        """
        self._begin((place.epoch, place.loop))
        return self._given(self._share.batches(place.taken, [] if self._own else place.cuts))

    def first(self) -> list[Any]:
        """Return a batch of the data's first items in a list, without drawing from a sampler; an empty list for a stream."""
        return self._share.first()

    def tickets(self, epoch: int, loop: int = 0) -> int | None:
        """Return the number of batches that an epoch has when it is dealt out. Its order is drawn in this call.

        Args:
            epoch: the epoch.
            loop: the index of the loop in the epoch.

        Returns:
            The number; None for data that is not dealt out: a rank's own data, streams, and samplers without a known end.
        """
        if self._own or isinstance(self._share, Streamed):
            return None
        if self._order is None:
            self._begin((epoch, loop))
            self._order = self._share.order()
        if self._order is None:
            self._common.again()
            return None
        return len(self._order)

    def dealt(self, epoch: int, next_ticket: Callable[[], int | None]) -> Batches:
        """Return an iterator over batches that are dealt out by number.

        Ticket t names items t*B to (t+1)*B of the order that all workers share.

        Args:
            epoch: as given to `tickets`.
            next_ticket: returns the number of the next batch, from 0 to `tickets(epoch)` - 1, or None if there are no more.
                Called on the caller's thread, once for each batch that is requested. The workers of a DataLoader prefetch, so
                it is called up to `num_workers * prefetch_factor` batches ahead.

        Returns:
            As `batches`.

        Raises:
            ValueError: the data is not dealt out: `tickets` is None.
            IndexError: raised by the iterator, for a ticket that names no batch.
        """
        if self._order is None:
            self.tickets(epoch)
        if self._order is None or isinstance(self._share, Streamed):
            raise ValueError("this data is not dealt out in batches; iterate over `batches`")
        return self._given(self._share.dealt(self._order, next_ticket, epoch))

    def _begin(self, loop: tuple[int, int]) -> None:
        """Tell the common streams that a loop begins."""
        self._common.begin(loop, generators_of(self._data), self._own)

    def _given(self, found: Found) -> Batches:
        """Yield the batches, through the progress bar if there is one, keeping `digest` up to date."""
        for batch, note in found if self._bar is None else through(self._bar, found, self._total()):
            self.digest = digest.together(self._of_data, note.crc) if self._compares else 0
            yield batch, note.items, note.samples

    def _total(self) -> int | None:
        """Return the number of batches, or None if it is unknown."""
        try:
            return len(self)
        except TypeError:
            return None
