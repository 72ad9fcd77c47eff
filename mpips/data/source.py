"""The kinds of datasets that `Clients` takes."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset


def as_dataset(data: Any) -> Any:
    """Return a tuple of tensors as a TensorDataset; anything else as it is.

    Raises:
        ValueError: the tensors differ in their first dimension, the number of items.
    """
    if not (isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data)):
        return data
    if not data[0].ndim or len({t.shape[:1] for t in data}) > 1:
        raise ValueError(f"tensors of shapes {[tuple(t.shape) for t in data]} given; expected the same first dimension")
    return TensorDataset(*data)


def is_map(data: object) -> bool:
    """Return whether the data is a map-style dataset: it has a length and items by index. A list is an iterable of batches."""
    streams = (DataLoader, IterableDataset, list)  # an IterableDataset may have a length, and inherits __getitem__
    return isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, streams)


def is_tensors(data: Any) -> bool:
    """Return whether the data is a TensorDataset, or a subset of one; a derived class may index its rows differently."""
    while type(data) is Subset:
        data = data.dataset
    return type(data) is TensorDataset


def rows(data: Any, batch: Sequence[int]) -> list[Tensor]:
    """Return the rows of a batch, stacked, one tensor for each tensor of the data; for data that `is_tensors`."""
    if isinstance(data, Subset):
        return rows(data.dataset, [data.indices[i] for i in batch])
    index = torch.tensor(batch)
    return [t[index] for t in data.tensors]
