"""Digests of what all workers must have alike: the data, the order drawn of it, the batches of a stream.

They are looked at where they are cheap to look at: large tensors by some of their elements.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Sized
from hashlib import blake2b
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from mpips.data.given import Table, list_of
from mpips.data.samples import parts_of

OF_TENSOR, OF_BATCH, OF_LIST = 65_536, 4_096, 64  # elements looked at


def together(data: int, drawn: int) -> int:
    """24 bits, which a float32 holds exactly, of two hashes; never 0, which says that there is nothing to compare."""
    mixed = blake2b(f"{data} {drawn}".encode(), digest_size=3).digest()  # a sum of checksums would be 0 for like changes
    return int.from_bytes(mixed, "big") or 1


def of_order(drawn: Sequence[Any], crc: int) -> int:
    """Go on with the hash of an order by items: numbers, or whatever a sampler gives for an item or a batch."""
    try:
        return crc32(array("q", drawn).tobytes(), crc)
    except (TypeError, OverflowError):
        return crc32(repr(drawn).encode(), crc)


def of_batch(batch: Any, crc: int) -> int:
    """Go on with the hash of a stream by a batch."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return _of_elements(batch, crc, OF_BATCH)
    if isinstance(batch, (str, bytes, int, float)):
        return crc32(repr(batch)[:OF_BATCH].encode(), crc)
    for part in parts_of(batch):
        crc = of_batch(part, crc)
    return crc32(type(batch).__name__.encode(), crc)


def of_data(data: Any, crc: int = 0) -> int:
    """A hash of a dataset, a loader's or a stream: its class and length, and what else all workers are known to have alike."""
    if isinstance(data, DataLoader):
        data = data.dataset
    crc = crc32(f"{type(data).__qualname__} {_length(data)}".encode(), crc)
    if isinstance(data, (Tensor, np.ndarray)):
        return _of_elements(data, crc, OF_TENSOR)
    if isinstance(data, Subset):
        return of_data(data.dataset, of_order(_numbers(data.indices), crc))
    if isinstance(data, ConcatDataset):
        for part in data.datasets:
            crc = of_data(part, crc)
    elif type(data) is TensorDataset:
        crc = _of_columns(data.tensors, crc)
    elif isinstance(data, Table):
        crc = of_order(_numbers(data.order or ()), _of_columns(list_of(data.columns), crc))
    elif isinstance(data, (list, tuple)):
        for item in data[:: len(data) // OF_LIST + 1]:
            crc = of_batch(item, crc)
    return _of_targets(data, crc)


def _of_columns(columns: Sequence[Tensor], crc: int) -> int:
    for column in columns:
        crc = _of_elements(column, crc, OF_TENSOR)
    return crc


def _of_targets(data: Any, crc: int) -> int:
    """Attributes alone: a property may be the script's code, and cost what it will."""
    named = getattr(data, "__dict__", {})
    for name in ("targets", "labels"):
        values = named.get(name)
        if isinstance(values, (Tensor, np.ndarray)):
            crc = _of_elements(values, crc, OF_TENSOR)
        elif isinstance(values, (list, tuple)):
            crc = of_order(values[:: len(values) // OF_TENSOR + 1], crc)
    return crc


def _of_elements(values: Tensor | np.ndarray, crc: int, most: int) -> int:
    """Shape, type, and elements at even distances."""
    crc = crc32(f"{tuple(values.shape)} {values.dtype}".encode(), crc)
    if isinstance(values, Tensor):
        return crc if values.is_sparse else _of_tensor(values.detach(), crc, most)
    flat = values.reshape(-1) if values.flags.c_contiguous else values.ravel()
    some = flat[:: flat.size // most + 1]
    return crc32(repr(some.tolist()).encode() if some.dtype.hasobject else np.ascontiguousarray(some).tobytes(), crc)


def _of_tensor(values: Tensor, crc: int, most: int) -> int:
    some = values.reshape(-1)[:: values.numel() // most + 1]
    return crc32(some.cpu().contiguous().view(torch.uint8).numpy().tobytes(), crc) if some.numel() else crc


def _numbers(indices: Any) -> Sequence[Any]:
    return indices.tolist() if isinstance(indices, (Tensor, np.ndarray)) else indices


def _length(data: Any) -> int:
    try:
        return len(data) if isinstance(data, Sized) else -1
    except TypeError:  # a stream may have the method, and no answer
        return -1
