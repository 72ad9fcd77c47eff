"""The data of many clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from mpips.data import as_dataset, is_map
from mpips.data.clients import partition
from mpips.data.clients.draw import counted, seed_of
from mpips.data.source import is_tensors, rows

Numbers = Sequence[int] | np.ndarray | torch.Tensor


class Clients(Sequence[Any]):
    """The data of many clients; `clients[k]` is client k's data, a map-style dataset.

    `split`, `by_index`, `by_label` and `dirichlet` partition one dataset among clients. Such clients hold indices of items, not
    copies, and batches of tensors are indexed at once instead of item by item.

    Args:
        datasets: for each client a map-style dataset, or a tuple of tensors with the same first dimension. A client may have no
            items.

    Attributes:
        sizes: the number of items of each client.

    Raises:
        ValueError: there are no clients, or a client's data is of another kind.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        if isinstance(as_dataset(datasets), TensorDataset):
            raise ValueError("a tuple of tensors given, which is one dataset; `Clients.split` deals it out")
        self._datasets = [_map_style(data, f"client {k}: ") for k, data in enumerate(datasets)]
        if not self._datasets:
            raise ValueError("no clients given; expected the data of 1 or more")
        self.sizes = [len(data) for data in self._datasets]

    @classmethod
    def by_index(cls, data: Any, indices: Sequence[Numbers]) -> Clients:
        """Give client k the items `indices[k]` of the data, in that order. Items may be left out or given to several clients.

        Args:
            data: a map-style dataset, or a tuple of tensors.
            indices: for each client the indices of its items: a list, or a one-dimensional integer array or tensor.

        Raises:
            ValueError: there are no clients, or an index is out of range.
        """
        whole = _map_style(data)
        return cls([Subset(whole, _items(part, len(whole), k)) for k, part in enumerate(indices)])

    @classmethod
    def split(cls, data: Any, count: int, seed: int = 0) -> Clients:
        """Partition IID: a random order, cut into `count` shares whose sizes differ by at most one item.

        Raises:
            ValueError: `count` is below 1, or there are no items.
        """
        whole = _map_style(data)
        return cls.by_index(whole, partition.iid(len(whole), count, seed))

    @classmethod
    def by_label(cls, data: Any, labels: Any, count: int, shards_each: int = 2, seed: int = 0) -> Clients:
        """Partition into few labels per client, "pathological" non-IID (McMahan et al. 2017, arXiv 1602.05629, section 3).

        Items sorted by label are cut into `count * shards_each` shards whose sizes differ by at most one item. Each client gets
        `shards_each` random shards, and so at most that many labels, unless a shard spans two labels.

        Args:
            data: a map-style dataset, or a tuple of tensors.
            labels: one label for each item: a one-dimensional list, array or tensor.
            count: the number of clients.
            shards_each: the number of shards of a client.
            seed: decides which client gets which shards.

        Raises:
            ValueError: a number is below 1, there are no items or fewer items than shards, or not one label for each item.
        """
        whole = _map_style(data)
        return cls.by_index(whole, partition.by_label(len(whole), labels, count, shards_each, seed))

    @classmethod
    def dirichlet(cls, data: Any, labels: Any, count: int, alpha: float, seed: int = 0) -> Clients:
        """Partition with each client's labels from a Dirichlet distribution (Hsu et al. 2019, arXiv 1909.06335, section 3.1).

        Client k draws its label distribution q ~ Dir(alpha p), where p is the distribution of labels in all items. It then
        draws its items by q, without replacement; q is renormalised when a label runs out, so the last clients' distributions
        depend on what is left. Sizes differ by at most one item, and each item belongs to one client. With alpha -> 0 a client
        has one label; with alpha -> infinity the partition is IID.

        Args:
            data: a map-style dataset, or a tuple of tensors.
            labels: one label for each item: a one-dimensional list, array or tensor.
            count: the number of clients.
            alpha: the concentration, above 0.
            seed: decides the draws.

        Raises:
            ValueError: `count` is below 1, `alpha` is not above 0, there are no items, or not one label for each item.
        """
        whole = _map_style(data)
        return cls.by_index(whole, partition.dirichlet(len(whole), labels, count, alpha, seed))

    def __len__(self) -> int:
        return len(self._datasets)

    @overload
    def __getitem__(self, k: int) -> Any: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[Any]: ...
    def __getitem__(self, k: int | slice) -> Any:
        """Return client k's data, a map-style dataset."""
        if isinstance(k, slice):
            return self._datasets[k]
        return self._datasets[self._known(k)]

    def _known(self, k: int) -> int:
        """Return k; raise IndexError if there is no client k."""
        if not 0 <= k < len(self):
            raise IndexError(f"client {k} asked for; there are {len(self)}, from 0")
        return k

    def together(self) -> Any:
        """Return all clients' items as one map-style dataset, client 0's first, for modes without clients.

        Nothing is copied if the clients are a partition of one dataset. Tensors that clients brought themselves are
        concatenated.
        """
        first = self._datasets[0]
        if all(type(data) is Subset and data.dataset is getattr(first, "dataset", None) for data in self._datasets):
            return Subset(first.dataset, list(chain.from_iterable(data.indices for data in self._datasets)))
        if all(type(data) is TensorDataset for data in self._datasets):
            forms = {tuple((t.dtype, t.device, t.shape[1:]) for t in data.tensors) for data in self._datasets}
            if len(forms) == 1:
                columns = zip(*(data.tensors for data in self._datasets), strict=True)
                return TensorDataset(*(torch.cat(column) for column in columns))
        return ConcatDataset(self._datasets)

    def batches(
        self,
        k: int,
        round: int,
        epochs: int,
        batch_size: int | None,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[tuple[Any, int, bool]]:
        """Return an iterator over client k's batches of its local epochs in a round. It is the same on any worker.

        Args:
            k: the client.
            round: the round. With seed, client and local epoch it decides the order.
            epochs: the number of local epochs, E of FedAvg; 1 or more.
            batch_size: the items in a batch, B; None for all items of the client, B = infinity.
            seed: decides the order.
            shuffle: whether each local epoch draws a new order; if not, items keep the client's order.
            drop_last: whether to leave out an epoch's last batch if it is not full.

        Returns:
            An iterator over tuples: the batch (collated as by torch), the number of its items, and whether it is the client's
                last batch in this round. A client without items has no batches.

        Raises:
            IndexError: there is no client k.
            ValueError: `epochs` or `batch_size` is below 1.
        """
        data, size = self._datasets[self._known(k)], self.sizes[k]
        counted("epochs", epochs)
        if batch_size is not None:
            counted("batch_size", batch_size)
        seeds = [seed_of("order", seed, round, k, epoch) for epoch in range(epochs)]
        return _local(data, seeds, batch_size or size, shuffle, drop_last)


def _local(data: Any, seeds: list[int], size: int, shuffle: bool, drop_last: bool) -> Iterator[tuple[Any, int, bool]]:
    """Yield the batches of local epochs, one for each seed."""
    if not size:
        return
    for epoch, seed in enumerate(seeds, 1):
        own = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=own).tolist() if shuffle else list(range(len(data)))
        batches = [order[at : at + size] for at in range(0, len(order) - (size - 1) * drop_last, size)]
        fetched = (rows(data, items) for items in batches) if is_tensors(data) else _collated(data, batches, seed)
        for number, (items, batch) in enumerate(zip(batches, fetched, strict=True), 1):
            yield batch, len(items), epoch == len(seeds) and number == len(batches)


def _collated(data: Any, batches: list[list[int]], seed: int) -> DataLoader[Any]:
    """Return a loader of these batches of indices."""
    own = torch.Generator().manual_seed(seed)  # else a new iterator would draw from the process's stream
    return DataLoader(data, batch_sampler=batches, generator=own)


def _map_style(data: Any, whose: str = "") -> Any:
    """Return the data as a map-style dataset; raise ValueError if it is none."""
    data = as_dataset(data)
    if not is_map(data):
        raise ValueError(f"{whose}a {type(data).__name__} given; expected a map-style dataset or a tuple of tensors")
    return data


def _items(part: Any, n: int, k: int) -> list[int]:
    """Return a client's indices as a list; raise ValueError if they are out of range or no integers."""
    numbers = np.asarray(part)
    if not numbers.size:
        return []
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"client {k}: {numbers.dtype} of shape {numbers.shape} given; expected a list of numbers of items")
    wrong = numbers[(numbers < 0) | (numbers >= n)]
    if wrong.size:
        raise ValueError(f"client {k}: item {wrong[0]} given; the data has {n}, from 0")
    items: list[int] = numbers.tolist()
    return items
