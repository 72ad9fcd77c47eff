"""The data that a script gives, converted to one of two kinds: a DataLoader, or an iterable of batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

Columns = Tensor | list[Tensor] | dict[str, Tensor]
TAKEN = "a dataset, a DataLoader, tensors or arrays, or an iterable of batches"


class Table(Dataset[Any]):
    """Columns with the same number of rows. A batch of rows is indexed at once, instead of fetched row by row and stacked.

    Args:
        columns: a tensor, or a list or a dict of tensors. A batch has the same form.
        order: the indices of the rows that belong to the table; None for all.
    """

    def __init__(self, columns: Columns, order: Sequence[int] | None = None) -> None:
        self.columns, self.order = columns, order

    def __len__(self) -> int:
        return len(self.order) if self.order is not None else len(list_of(self.columns)[0])

    def __getitem__(self, row: int) -> Any:
        batch = self.__getitems__([row])
        return _map(batch, lambda column: column[0])

    def __getitems__(self, batch: Sequence[int]) -> Columns:
        """Return the rows with these indices."""
        index = torch.tensor(batch if self.order is None else [self.order[i] for i in batch], dtype=torch.int64)
        rows: Columns = _map(self.columns, lambda column: column[index])
        return rows


def as_it_is(batch: Any) -> Any:
    """Return the batch unchanged: a collate function for batches that were indexed at once."""
    return batch


def as_loader(data: Any, batch_size: int, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
    """Return the DataLoader that a script would write for this data.

    Args:
        data: a map-style dataset, tensors or arrays, or a list of samples.
        batch_size: as for a DataLoader.
        shuffle: as for a DataLoader.
        drop_last: as for a DataLoader.

    Raises:
        ValueError: no loader can be made of the data.
    """
    dataset = _table(data)
    if dataset is None and not _numbered(data):
        raise ValueError(f"a {type(data).__name__} given with batch_size={batch_size}; expected {TAKEN}")
    collate = None if dataset is None else as_it_is
    whole = data if dataset is None else dataset
    shuffle = shuffle and len(whole) > 0  # torch's RandomSampler refuses empty data
    slices = not shuffle and not isinstance(data, Dataset)  # such data must not move torch's random stream
    own = torch.Generator() if slices else None
    return DataLoader(whole, batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collate, generator=own)


def _numbered(data: Any) -> bool:
    """Return whether the data has a length, and items by index."""
    return isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, (Mapping, str, bytes))


def _table(data: Any) -> Table | None:
    """Return the data as a table if it is nothing but rows of tensors, else None."""
    if type(data) in (Subset, TensorDataset):
        return _table_of_dataset(data)
    if isinstance(data, (Tensor, np.ndarray)):
        return Table(_tensor(data)) if data.ndim else None
    columns = list(data.values()) if isinstance(data, Mapping) else data if type(data) in (tuple, list) else ()
    if not columns or not all(isinstance(column, (Tensor, np.ndarray)) for column in columns):
        return None
    _check_rows(columns, isinstance(data, list))
    tensors = [_tensor(column) for column in columns]
    return Table(dict(zip(data, tensors, strict=True)) if isinstance(data, Mapping) else tensors)


def _table_of_dataset(data: Any) -> Table | None:
    """Return a table of torch's own dataset classes; None for a derived class, which may do something else."""
    order: Sequence[int] | None = None
    while type(data) is Subset:
        order = data.indices if order is None else [data.indices[i] for i in order]
        data = data.dataset
    return Table(list(data.tensors), order) if type(data) is TensorDataset else None


def _check_rows(columns: Sequence[Any], listed: bool) -> None:
    """Raise ValueError unless the columns have the same number of rows, and cannot be mistaken for samples."""
    shapes = [tuple(column.shape) for column in columns]
    if listed and len(columns) > 1 and len(set(shapes)) == 1:
        raise ValueError(
            f"a list of {len(shapes)} tensors of shape {shapes[0]} given: whole samples, or parts of each? For samples give"
            " torch.stack(list), for parts a tuple"
        )
    if not shapes[0] or len({shape[:1] for shape in shapes}) > 1:
        shown = f"{str(shapes[:4])[:-1]}, ...]" if len(shapes) > 4 else f"{shapes}"
        raise ValueError(f"tensors of shapes {shown} given; expected the same first dimension")


def _tensor(values: Any) -> Tensor:
    """Return the values as a tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only arrays, which are only read here
            return torch.as_tensor(values)
    except TypeError:
        raise ValueError(f"an array of {values.dtype} given; expected numbers") from None


def list_of(columns: Columns) -> list[Tensor]:
    """Return the columns of a table as a list."""
    return [columns] if isinstance(columns, Tensor) else list(columns.values() if isinstance(columns, dict) else columns)


def _map(columns: Any, change: Any) -> Any:
    """Return the columns in the same form, each changed by a function."""
    if isinstance(columns, Tensor):
        return change(columns)
    if isinstance(columns, dict):
        return {name: change(column) for name, column in columns.items()}
    return [change(column) for column in columns]


def as_given(data: Any, batch_size: Any, shuffle: bool, drop_last: bool) -> Any:
    """Return the data as a DataLoader or an iterable of batches.

    Raises:
        ValueError: the data is neither, a batch size is missing, or a batch size is given with data that has its own.
    """
    if isinstance(data, DataLoader) or not _items(data, batch_size):
        if isinstance(data, (str, bytes)) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
            raise ValueError(f"a {type(data).__name__} given as data; expected {TAKEN}")
        if batch_size is not None:
            kind = "a DataLoader" if isinstance(data, DataLoader) else "an iterable of batches"
            raise ValueError(f"batch_size={batch_size} given with {kind}, which has its own; leave it out")
        return data
    if batch_size is None:
        raise ValueError("batch_size is missing; a dataset needs one: ps.batches(dataset, batch_size=64)")
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} given; expected a whole number, 1 or more")
    return as_loader(data, int(batch_size), shuffle, drop_last)


def _items(data: Any, batch_size: Any) -> bool:
    """Return whether the data is items to be batched: a tuple of tensors, a dataset, or a list given with a batch size."""
    if isinstance(data, IterableDataset) or not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
        return False  # an IterableDataset may have a length, and inherits __getitem__
    if isinstance(data, tuple) and data and all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return True
    return batch_size is not None or not isinstance(data, (list, tuple, range, str, bytes))
