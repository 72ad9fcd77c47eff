"""What a script may give as data."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset


def as_dataset(data: Any) -> Any:
    """A tuple of tensors as a dataset; anything else as it is.

    Raises:
        ValueError: if the tensors do not have the same number of items, their first dimension.
    """
    if not (isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data)):
        return data
    if not data[0].ndim or len({t.shape[:1] for t in data}) > 1:
        raise ValueError(f"tensors of shapes {[tuple(t.shape) for t in data]} given; expected the same first dimension")
    return TensorDataset(*data)


def is_map(data: object) -> bool:
    """Whether the data is a map-style dataset: it has a length and items by number. A list is an iterable of batches."""
    streams = (DataLoader, IterableDataset, list)  # an IterableDataset may have a length, and inherits a __getitem__
    return isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, streams)


def is_tensors(data: Any) -> bool:
    """Whether rows of tensors are what torch would fetch one by one and stack; a class derived from these may do otherwise."""
    while type(data) is Subset:
        data = data.dataset
    return type(data) is TensorDataset


def rows(data: Any, batch: Sequence[int]) -> list[Tensor]:
    """The rows of a batch from each tensor, stacked; for data that `is_tensors`."""
    if isinstance(data, Subset):
        return rows(data.dataset, [data.indices[i] for i in batch])
    index = torch.tensor(batch)
    return [t[index] for t in data.tensors]
