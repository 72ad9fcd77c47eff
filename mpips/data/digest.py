"""Digests of what must agree on all workers: the data, the order drawn, the batches of a stream.

Only a part is hashed where the whole would take long: of a large tensor, elements at even distances.
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

OF_TENSOR, OF_BATCH, OF_LIST = 65_536, 4_096, 64  # the largest number of elements hashed


def together(data: int, drawn: int) -> int:
    """Return a 24-bit digest of two hashes, which a float32 holds exactly; never 0, which stands for "nothing to compare"."""
    mixed = blake2b(f"{data} {drawn}".encode(), digest_size=3).digest()  # equal changes in a sum of checksums could cancel
    return int.from_bytes(mixed, "big") or 1


def of_order(drawn: Sequence[Any], crc: int) -> int:
    """Update a hash with an order: indices, or whatever the sampler yields."""
    try:
        return crc32(array("q", drawn).tobytes(), crc)
    except (TypeError, OverflowError):
        return crc32(repr(drawn).encode(), crc)


def of_batch(batch: Any, crc: int) -> int:
    """Update a hash with a batch of a stream."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return _of_elements(batch, crc, OF_BATCH)
    if isinstance(batch, (str, bytes, int, float)):
        return crc32(repr(batch)[:OF_BATCH].encode(), crc)
    for part in parts_of(batch):
        crc = of_batch(part, crc)
    return crc32(type(batch).__name__.encode(), crc)


def of_data(data: Any, crc: int = 0) -> int:
    """Return a hash of a dataset, of a loader's dataset or of a stream: class, length, and known contents such as tensors."""
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
    """Update a hash with tensors."""
    for column in columns:
        crc = _of_elements(column, crc, OF_TENSOR)
    return crc


def _of_targets(data: Any, crc: int) -> int:
    """Update a hash with the dataset's targets or labels, if they are plain attributes; a property may be costly."""
    named = getattr(data, "__dict__", {})
    for name in ("targets", "labels"):
        values = named.get(name)
        if isinstance(values, (Tensor, np.ndarray)):
            crc = _of_elements(values, crc, OF_TENSOR)
        elif isinstance(values, (list, tuple)):
            crc = of_order(values[:: len(values) // OF_TENSOR + 1], crc)
    return crc


def _of_elements(values: Tensor | np.ndarray, crc: int, most: int) -> int:
    """Update a hash with shape, dtype and at most `most` elements at even distances."""
    crc = crc32(f"{tuple(values.shape)} {values.dtype}".encode(), crc)
    if isinstance(values, Tensor):
        return crc if values.is_sparse else _of_tensor(values.detach(), crc, most)
    flat = values.reshape(-1) if values.flags.c_contiguous else values.ravel()
    sample = flat[:: flat.size // most + 1]
    return crc32(repr(sample.tolist()).encode() if sample.dtype.hasobject else np.ascontiguousarray(sample).tobytes(), crc)


def _of_tensor(values: Tensor, crc: int, most: int) -> int:
    """Update a hash with at most `most` elements of a tensor, at even distances."""
    sample = values.reshape(-1)[:: values.numel() // most + 1]
    return crc32(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes(), crc) if sample.numel() else crc


def _numbers(indices: Any) -> Sequence[Any]:
    """Return indices as a sequence."""
    return indices.tolist() if isinstance(indices, (Tensor, np.ndarray)) else indices


def _length(data: Any) -> int:
    """Return the length of the data; -1 if it has none."""
    try:
        return len(data) if isinstance(data, Sized) else -1
    except TypeError:  # a stream's __len__ may raise this
        return -1
