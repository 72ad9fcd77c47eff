"""Each worker's share of the data, and its place in it.

Worker k of W takes items k, k+W, k+2W ... of an order that the seed and the epoch alone decide. Shards may differ by one item;
nobody pads, repeats or drops. Or the batches of that order are dealt out by number to whoever is free: a slow worker then
takes fewer.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from mpips.data.place import Place, left
from mpips.data.source import as_dataset, is_map, is_tensors, rows


class Shard:
    """One worker's batches of one loop.

    Args:
        data: a map-style dataset, a tuple of tensors, a DataLoader (its batch size, order, `collate_fn` and loader workers are
            kept), or any iterable of batches.
        batch_size: items a batch, for datasets and tensors.
        shuffle: whether the order is drawn anew for each epoch; a DataLoader says so itself.
        index, workers: which worker of how many.
        own: whether the data is this rank's alone; then it is not dealt out, and on another number of workers the loop that
            was interrupted begins anew.
        seed: with the epoch, decides the order.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None,
        shuffle: bool,
        drop_last: bool,
        index: int,
        workers: int,
        seed: int,
        own: bool = False,
    ) -> None:
        self.data, self.batch_size, self.shuffle, self.drop_last = as_dataset(data), batch_size, shuffle, drop_last
        self.index, self.workers, self.seed, self.own = index, workers, seed, own
        self._latest: tuple[int, Sequence[Any]] | None = None  # an epoch and its order
        if isinstance(self.data, DataLoader) or not is_map(self.data):
            if batch_size is not None:
                kind = "a DataLoader" if isinstance(self.data, DataLoader) else "an iterable of batches"
                raise ValueError(f"batch_size={batch_size} given with {kind}, which has its own; leave it out")
        elif batch_size is None:
            raise ValueError("batch_size is missing; a dataset needs one: ps.batches(dataset, batch_size=64)")
        elif not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} given; expected a whole number, 1 or more")

    def batches(self, place: Place) -> Iterator[tuple[Any, int, bool]]:
        """This worker's batches from its place on; what came before is skipped here and now.

        Returns:
            An iterator over the batch, the items in it, and whether it is known to be the worker's last.
        """
        if self._streamed:
            mine = iter(self.data) if self.own else islice(left(self.data, place.cuts), self.index, None, self.workers)
            next(islice(mine, place.taken, place.taken), None)
            return ((batch, 1, False) for batch in mine)
        order = self._order(place.epoch)
        items: list[Any] = list(order) if self.own else list(left(order, place.cuts))[self.index :: self.workers]
        return self._map_batches(items[place.taken :], place.epoch)

    def tickets(self, epoch: int) -> int | None:
        """How many batches an epoch has when they are dealt out; None for data that is not: a rank's own, and streams."""
        return None if self.own or self._streamed else self._batches_in(self._whole(epoch))

    def dealt(self, epoch: int, next_ticket: Callable[[], int | None]) -> Iterator[tuple[Any, int, bool]]:
        """Batches by number, out of the order of all workers' items: ticket t names items t*B to (t+1)*B.

        Args:
            epoch: with the seed, decides the order, alike on all workers.
            next_ticket: gives the number of the next batch, from 0 to `tickets(epoch)` - 1, or None when there are no more. It
                is called on the caller's thread, once for each batch that is asked for; a DataLoader's own workers
                fetch ahead, so it is called up to `num_workers * prefetch_factor` batches before.

        Returns:
            As `batches`; which batch is a worker's last is never known.

        Raises:
            ValueError: if the data is not dealt out, which is where `tickets` is None.
            IndexError: from the iterator, for a ticket that names no batch.
        """
        tickets = self.tickets(epoch)
        if tickets is None:
            raise ValueError("a rank's own data and streams are not dealt out in batches; iterate over `batches`")
        return self._dealt(epoch, next_ticket, tickets)

    def _dealt(self, epoch: int, next_ticket: Callable[[], int | None], tickets: int) -> Iterator[tuple[Any, int, bool]]:
        order, ahead = self._whole(epoch), deque[int]()

        def named() -> Iterator[Any]:
            while (ticket := next_ticket()) is not None:
                if not 0 <= ticket < tickets:
                    raise IndexError(f"ticket {ticket} given; epoch {epoch} has {tickets} batches, from 0")
                batch = self._batch(order, ticket)
                ahead.append(self._items_in(batch))
                yield batch

        for batch in self._fetch(named(), epoch):
            yield batch, ahead.popleft(), False

    def _map_batches(self, items: list[Any], epoch: int) -> Iterator[tuple[Any, int, bool]]:
        batches = [self._batch(items, number) for number in range(self._batches_in(items))]
        counts = [self._items_in(batch) for batch in batches]
        for number, (batch, count) in enumerate(zip(self._fetch(batches, epoch), counts, strict=True), 1):
            yield batch, count, number == len(batches)

    @property
    def _streamed(self) -> bool:
        """Whether the data can only be iterated: batches are then dealt out in turn, and the last is not known as such."""
        if isinstance(self.data, DataLoader):
            return isinstance(self.data.dataset, IterableDataset)
        return not is_map(self.data)

    @property
    def _by_batch(self) -> bool:
        """Whether the items dealt out are whole batches: a DataLoader's with a batch sampler of the user's own, or none."""
        return isinstance(self.data, DataLoader) and type(self.data.batch_sampler) is not BatchSampler

    def _whole(self, epoch: int) -> Sequence[Any]:
        """The order, drawn once for an epoch that is dealt out."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._order(epoch)
        return self._latest[1]

    def _order(self, epoch: int) -> Sequence[Any]:
        """All workers' items of an epoch, in order: indices, or lists of them."""
        if not isinstance(self.data, DataLoader):
            return self._permutation(len(self.data), epoch) if self.shuffle else range(len(self.data))
        sampler = self.data.batch_sampler or self.data.sampler
        sampler = sampler.sampler if type(sampler) is BatchSampler else sampler
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
            return self._permutation(sampler.num_samples, epoch)
        return self._drawn(sampler, epoch)

    def _permutation(self, n: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(n, generator=generator).tolist()
        return order

    def _drawn(self, sampler: Any, epoch: int) -> list[Any]:
        """A sampler of the user's own, drawn alike on all ranks, from whichever stream it draws."""
        seed = self.seed + epoch
        streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPUs' streams, too
        for drawn in (sampler, getattr(sampler, "sampler", None)):
            if isinstance(own := getattr(drawn, "generator", None), torch.Generator):
                own.manual_seed(seed)
        try:
            return list(sampler)
        finally:
            random.setstate(streams[0])
            np.random.set_state(streams[1])
            torch.set_rng_state(streams[2])

    @property
    def _size(self) -> tuple[int, bool]:
        """The items in a batch, and whether a last one with fewer is left out."""
        own = self.data.batch_sampler if isinstance(self.data, DataLoader) else None
        size, drop = (own.batch_size, own.drop_last) if isinstance(own, BatchSampler) else (self.batch_size, self.drop_last)
        assert size is not None
        return size, drop

    def _batches_in(self, items: Sequence[Any]) -> int:
        if self._by_batch:
            return len(items)
        size, drop = self._size
        return len(items) // size if drop else -(-len(items) // size)

    def _batch(self, items: Sequence[Any], number: int) -> Any:
        """The items of a batch: a list of indices, or what a loader's own sampler gave for one."""
        if self._by_batch:
            return items[number]
        size, _ = self._size
        return list(items[number * size : (number + 1) * size])

    def _items_in(self, batch: Any) -> int:
        return 1 if self._by_batch else len(batch)

    def _fetch(self, batches: Iterable[Any], epoch: int) -> Iterable[Any]:
        if is_tensors(self.data):
            return (rows(self.data, batch) for batch in batches)
        # A generator of its own: else each new iterator would draw from the script's stream, and a resumed run differ.
        own = torch.Generator().manual_seed(self.seed + epoch + 0x9E3779B9 * self.index)
        if not isinstance(self.data, DataLoader):
            return DataLoader(self.data, batch_sampler=batches, generator=own)
        given = self.data
        order = {"batch_sampler": batches} if given.batch_sampler is not None else {"batch_size": None, "sampler": batches}
        return DataLoader(
            given.dataset,
            **order,
            num_workers=given.num_workers,
            collate_fn=given.collate_fn,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            generator=own,
            prefetch_factor=given.prefetch_factor,
        )
