"""The number of samples in a batch: counted by the loader that made it, or read from the form of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Counted:
    """A loader's `collate_fn` that also returns the number of items. It can be pickled if the loader's own can."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> tuple[int, Any]:
        """Return the number of items, and the batch made of them."""
        return len(items), self.collate(items)


def samples_in(batch: Any) -> int | None:
    """Return the number of samples in a batch; None if its form does not say.

    Known forms are a tensor or array; collections, including dataclasses, whose tensors all have the same first dimension; a
    batch of graphs; a packed sequence. Tensors in a tuple inside another collection, as made by `tuple(zip(*items))`, may be
    single items as well as batches, so the number is unknown.
    """
    if type(batch) is Tensor:  # the most frequent form
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0]) if len(batch.batch_sizes) else 0
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    lengths = set(_lengths(batch, inside=False))
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(part: Any, inside: bool) -> Iterator[int | None]:
    """Yield the first dimension of each tensor and array in a batch; None where it may be a single item."""
    if isinstance(part, (Tensor, np.ndarray)):
        yield part.shape[0] if part.ndim else None
    elif isinstance(part, tuple) and inside and any(isinstance(one, (Tensor, np.ndarray)) for one in part):
        yield None
    else:
        for one in parts_of(part):
            yield from _lengths(one, True)


def parts_of(part: Any) -> Iterator[Any]:
    """Yield the values of a collection in order; nothing if `part` is no collection."""
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, (tuple, list)):
        yield from part
    elif is_dataclass(part) and not isinstance(part, type):
        yield from (getattr(part, field.name) for field in fields(part))
