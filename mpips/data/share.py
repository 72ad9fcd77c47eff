"""Each worker's share of the data.

A loader is iterated itself, through its own class; only its sampler gives this worker's batches alone (`loaded.py`). A stream
is read in full by all workers, who take its batches in turn (`stream.py`). Or the batches of an epoch are dealt out by number
to whoever is free: a slow worker then takes fewer.

With one worker that is plain PyTorch: the same draws from the same random streams at the same moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
        self._bar = data if is_bar(data) else None
        self._data = data = as_given(data.iterable if self._bar else data, batch_size, shuffle, drop_last)
        self._common, self._own, self.digest = common, own, 0
        part = Part(0, 1) if own else Part(index, workers)
        loaded = isinstance(data, DataLoader)
        if loaded and not own:
            refuse_split(data)
        kind = Loaded if loaded and not is_stream(data) else Streamed
        self._share: Loaded | Streamed = kind(data, part, nullcontext() if own else common)
        self._of_data = digest.of_data(data) if part.workers > 1 else None
        self._order: Order | None = None  # of an epoch that is dealt out

    def __len__(self) -> int:
        """This worker's batches in an epoch.

        Raises:
            TypeError: if that is not known.
        """
        return len(self._share)

    def batches(self, place: Place) -> Batches:
        """This worker's batches from its place on; what came before is skipped here and now.

        Returns:
            An iterator over the batch, the items in it by which a place counts, and its samples, or None if that is not known.
        """
        self._begin((place.epoch, place.loop))
        return self._given(self._share.batches(place.taken, [] if self._own else place.cuts))

    def tickets(self, epoch: int, loop: int = 0) -> int | None:
        """How many batches an epoch has when they are dealt out; its order is drawn here.

        Args:
            epoch, loop: where that is.

        Returns:
            The number; None for data that is not dealt out: a rank's own, streams, and samplers without an end or a length.
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
        if self._order is None:
            self.tickets(epoch)
        if self._order is None or isinstance(self._share, Streamed):
            raise ValueError("this data is not dealt out in batches; iterate over `batches`")
        return self._given(self._share.dealt(self._order, next_ticket, epoch))

    def _begin(self, loop: tuple[int, int]) -> None:
        self._common.begin(loop, generators_of(self._data), self._own)

    def _given(self, found: Found) -> Batches:
        for batch, note in found if self._bar is None else through(self._bar, found, self._total()):
            self.digest = 0 if self._of_data is None else digest.together(self._of_data, note.crc)
            yield batch, note.items, note.samples

    def _total(self) -> int | None:
        try:
            return len(self)
        except TypeError:
            return None
