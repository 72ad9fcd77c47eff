"""Each worker's share of the data, and its place in it.

Worker k of W takes items k, k+W, k+2W ... of an order that the seed and the epoch alone decide. Shards may differ by one item;
nobody pads, repeats or drops. A place counts items, so a run resumes where it was on any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

T = TypeVar("T")


@dataclass
class Place:
    """Where a worker is in its data.

    Attributes:
        epoch: the epoch in progress.
        loop: which `batches` loop of the epoch.
        taken: items of its shard taken in that loop.
        over: whether all ranks have ended that loop.
        cuts: for each earlier number of workers in this loop, the items that each of those workers had taken.
        samples: samples behind gradients that it has accumulated and not yet pushed.
        validations: validations done in the epoch.
    """

    epoch: int = 0
    loop: int = 0
    taken: int = 0
    over: bool = False
    cuts: list[list[int]] = field(default_factory=list)
    samples: int = 0
    validations: int = 0

    @property
    def begun(self) -> bool:
        """Whether the loop is begun and not at its end."""
        return bool(self.taken or self.cuts) and not self.over

    def next_loop(self) -> None:
        """At the start of the epoch's next `batches` loop."""
        self.loop, self.taken, self.over, self.cuts = self.loop + 1, 0, False, []

    def next_epoch(self) -> None:
        """At the start of the next epoch."""
        self.epoch, self.loop, self.taken, self.over, self.cuts = self.epoch + 1, 0, 0, False, []
        self.validations = 0


def left(items: Iterable[T], cuts: Sequence[Sequence[int]]) -> Iterable[T]:
    """The items that no earlier set of workers has taken, in order."""
    for cut in cuts:
        items = _uncut(items, cut)
    return items


def _uncut(items: Iterable[T], cut: Sequence[int]) -> Iterator[T]:
    return (item for at, item in enumerate(items) if at // len(cut) >= cut[at % len(cut)])


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
        self.data, self.batch_size, self.shuffle, self.drop_last = data, batch_size, shuffle, drop_last
        self.index, self.workers, self.seed, self.own = index, workers, seed, own
        if isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data):
            self.data = TensorDataset(*data)
        if isinstance(self.data, DataLoader) or not _is_map(self.data):
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
        items = list(order) if self.own else list(left(order, place.cuts))[self.index :: self.workers]
        return self._map_batches(items[place.taken :], place.epoch)

    def _map_batches(self, items: list[Any], epoch: int) -> Iterator[tuple[Any, int, bool]]:
        batches = self._grouped(items)
        counts = [1] * len(batches) if self._by_batch else [len(batch) for batch in batches]
        for number, (batch, count) in enumerate(zip(self._fetch(batches, epoch), counts, strict=True), 1):
            yield batch, count, number == len(batches)

    @property
    def _streamed(self) -> bool:
        """Whether the data can only be iterated: batches are then dealt out in turn, and the last is not known as such."""
        if isinstance(self.data, DataLoader):
            return isinstance(self.data.dataset, IterableDataset)
        return not _is_map(self.data)

    @property
    def _by_batch(self) -> bool:
        """Whether the items dealt out are whole batches: a DataLoader's with a batch sampler of the user's own, or none."""
        return isinstance(self.data, DataLoader) and type(self.data.batch_sampler) is not BatchSampler

    def _order(self, epoch: int) -> Iterable[Any]:
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

    def _grouped(self, items: list[Any]) -> list[list[Any]]:
        if self._by_batch:
            return items
        own = self.data.batch_sampler if isinstance(self.data, DataLoader) else None
        size, drop = (own.batch_size, own.drop_last) if isinstance(own, BatchSampler) else (self.batch_size, self.drop_last)
        assert size is not None
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        return batches[:-1] if drop and batches and len(batches[-1]) < size else batches

    def _fetch(self, batches: list[list[int]], epoch: int) -> Iterable[Any]:
        if isinstance(self.data, TensorDataset):
            return ([t[torch.tensor(batch)] for t in self.data.tensors] for batch in batches)
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


def samples_in(batch: Any) -> int:
    """The length of the first tensor in a batch; 1 if there is none to tell."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((samples_in(part) for part in parts if isinstance(part, (Tensor, Mapping, tuple, list))), 1)


def _is_map(data: object) -> bool:
    return isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, (DataLoader, list))
