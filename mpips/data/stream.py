"""A worker's share of a stream: all W workers read the stream in full, identically, and worker k takes batches j*W + k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from mpips.data import digest
from mpips.data.loader import Iterated, base_of, double_of, loader_length
from mpips.data.place import left
from mpips.data.samples import samples_in
from mpips.data.turns import QUIET, Found, Note, Part, Streams, after


class Streamed:
    """One worker's share of a stream.

    Args:
        data: an iterable of batches, or a loader of an IterableDataset.
        part: this worker's number and the number of workers.
        streams: a context in which the random streams are those that all workers share.
    """

    def __init__(self, data: Any, part: Part, streams: Streams) -> None:
        self._data, self._part = data, part
        self._streams = nullcontext() if type(data) in QUIET else streams

    def __len__(self) -> int:
        if isinstance(self._data, DataLoader):
            return loader_length(self._data, self._part)
        return len(range(self._part.index, len(self._data), self._part.workers))

    def first(self) -> list[Any]:
        """Return the first batch in a list, if that takes nothing from the stream; else an empty list."""
        return list(self._data[:1]) if type(self._data) in (list, tuple, range) else []

    def batches(self, taken: int, cuts: Sequence[Sequence[int]]) -> Found:
        """Return an iterator over this worker's batches; each counts as one item of a place.

        The stream is begun, and read up to the place, in this call.
        """
        with self._streams:
            whole = self._loaded(self._data) if isinstance(self._data, DataLoader) else self._noted(iter(self._data))
            units = iter(left(whole, cuts))
            units = after(units, taken * self._part.workers) if taken or cuts else units
        return units if isinstance(self._streams, nullcontext) and self._part.workers == 1 else self._own_batches(units)

    def _loaded(self, loader: DataLoader[Any]) -> Found:
        """Return the batches of a loader with their notes."""
        double = double_of(base_of(loader))
        double.follow(self._part)
        iterated = Iterated(loader, double)
        return self._counted(iter(iterated.loader), iterated)

    def _counted(self, batches: Iterator[Any], iterated: Iterated) -> Found:
        """Yield a loader's batches with their notes. The number of samples is exact if the loader counts its items."""
        try:
            for batch in batches:
                counts = iterated.double.counts
                yield batch, Note(1, counts.popleft() if counts else samples_in(batch), 0)
        finally:
            iterated.give_back()

    def _noted(self, batches: Iterator[Any]) -> Found:
        """Return an iterator over batches with their notes."""
        return ((batch, Note(1, samples_in(batch), 0)) for batch in batches)

    def _own_batches(self, units: Found) -> Found:
        """Yield this worker's batch of each group of one batch per worker. All workers read whole groups, so all draw alike."""
        crc, workers = 0, self._part.workers
        while True:
            own = None
            with self._streams:  # once for a group, since exchanging streams is slow
                for at, (batch, note) in enumerate(islice(units, workers)):
                    crc = digest.of_batch(batch, crc) if workers > 1 else 0
                    own = (batch, note) if at == self._part.index else own
            if own is None:
                return
            yield own[0], own[1]._replace(crc=crc) if crc else own[1]
