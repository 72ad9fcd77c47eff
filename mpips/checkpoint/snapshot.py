"""A tree as it will be stored: the index, and the datasets with the tensors' values.

`Snapshot(tree)` refers to the tree's tensors. `copy` copies them, so that training may go on while the copies are written.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpips.checkpoint import text
from mpips.checkpoint.layout import (
    AT,
    BITS,
    BY_NAME,
    DATASET,
    DEEPEST,
    FIRST,
    INDEX,
    NAMED,
    PACKED,
    SMALL,
    Array,
    Parts,
    Tree,
    Values,
    check_key,
    escaped,
    on_host,
    pack,
    stored,
)

_TOGETHER = 1 << 24  # about the bytes of small tensors in one dataset
_ALIGNED = 64  # bytes

Entry = dict[str, list[Any]]  # a leaf's entry in the index


class Buffer:
    """Memory on the host that is kept from one snapshot to the next: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of(self, nbytes: int, pinned: bool) -> Array:
        """Return at least `nbytes` of memory; what an earlier call has returned is overwritten.

        Args:
            nbytes: the number of bytes.
            pinned: whether new memory is page-locked, for copies from a GPU.
        """
        if len(self._memory) < nbytes:
            self._memory = np.empty(0, np.uint8)  # let go of the old memory first
            self._memory = _pinned(nbytes) if pinned else _mapped(nbytes)
        return self._memory


def _pinned(nbytes: int) -> Array:
    """Return page-locked memory."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def _mapped(nbytes: int) -> Array:
    """Return memory of large pages, whose first use takes less time. Forked children, which would keep old pages, lack it."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # the kernel knows no large pages
            memory.madvise(advice)
    return np.frombuffer(memory, np.uint8)


@dataclass
class Dataset:
    """One dataset of the file.

    Attributes:
        name: its path in the file.
        dtype: the dtype of its numbers.
        shape: its shape.
        values: the tensors and arrays that it consists of: one behind the other, flattened if they are several.
        tag: the tensor's dtype if the numbers are its bits; else "".
        places: the places in the index to be completed.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    values: list[Values]
    tag: str
    places: list[list[Any]]

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def scattered(self) -> bool:
        """Whether the values are many small tensors, each with its own place in the index, that must be joined."""
        return len(self.places) > 1 and len(self.values) > 1

    @property
    def on_gpu(self) -> bool:
        """Whether the values are on a GPU."""
        return isinstance(self.values[0], torch.Tensor) and self.values[0].is_cuda

    def arrays(self) -> list[Array]:
        """Return the values in C order, one behind the other: the memory that they are in, if possible, else a copy."""
        if self.scattered:
            return [np.concatenate([on_host(value).reshape(-1) for value in self.values])]
        return [np.asarray(on_host(value), order="C") for value in self.values]

    def moving(self, still: Sequence[range]) -> list[Values]:
        """Return the values that may change: those that do not lie in `still`. Small tensors are not looked at one by one."""
        if not still or self.scattered:
            return self.values
        addresses = [-1 if isinstance(value, torch.Tensor) else int(value.ctypes.data) for value in self.values]  # -1: a GPU
        return [
            value for value, address in zip(self.values, addresses, strict=True) if not any(address in there for there in still)
        ]

    def copy(self, memory: Array, moving: Sequence[Values]) -> None:
        """Copy some of the values to `memory`, one behind the other, and refer to the copies from now on."""
        if self.scattered:
            target = memory[: self.nbytes].view(self.dtype)
            np.concatenate([on_host(value).reshape(-1) for value in self.values], out=target)
            self.values = [target]
            return
        at, copies = 0, {}
        for value in moving:
            target = memory[at : (at := at + value.nbytes)].view(self.dtype).reshape(value.shape)
            if isinstance(value, torch.Tensor):  # on a GPU
                torch.from_numpy(target).copy_(value, non_blocking=True)
            else:
                np.copyto(target, value)
            copies[id(value)] = target
        self.values = [copies.get(id(value), value) for value in self.values]

    def settle(self, start: int) -> None:
        """Complete the places in the index, given the dataset's first byte in the file."""
        for place in self.places:
            place[DATASET], place[AT] = self.name, start + self.dtype.itemsize * place[FIRST]


class Snapshot:
    """A tree's index and datasets.

    Args:
        tree: the tree; what is not a tensor or an array is copied at once.

    Attributes:
        index: the index as JSON's types; it is complete when all datasets are settled.
        datasets: the datasets.
        links: further names of datasets, each with the dataset's name.

    Raises:
        ValueError, TypeError: the tree holds something that cannot be stored.
    """

    def __init__(self, tree: Tree) -> None:
        if clash := {INDEX, PACKED} & tree.keys():
            raise ValueError(f"/: keys {sorted(clash)} are the file's own; rename them")
        self.datasets: list[Dataset] = []
        self.links: list[tuple[str, str]] = []
        self._stored: dict[tuple[Any, ...], Entry] = {}  # identity of a tensor's memory -> its entry
        self._small: dict[str, Dataset] = {}  # by the numbers' dtype, those that small tensors are still added to
        self._packed = self._named = 0
        self.index = self._group(tree, "", False, DEEPEST)
        for number in self._small:
            self._close(number)

    def copy(self, buffer: Buffer, still: Sequence[range] = ()) -> None:
        """Copy all values to the buffer: the tree's tensors may change from now on.

        Args:
            buffer: the buffer.
            still: the addresses of memory that does not change; values there are not copied.
        """
        moving = [dataset.moving(still) for dataset in self.datasets]
        sizes = [-(-sum(value.nbytes for value in values) // _ALIGNED) * _ALIGNED for values in moving]
        gpus = {dataset.values[0].device for dataset in self.datasets if dataset.on_gpu}
        memory, at = buffer.of(sum(sizes), pinned=bool(gpus)), 0
        for dataset, values, size in zip(self.datasets, moving, sizes, strict=True):
            dataset.copy(memory[at:], values)
            at += size
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    def _group(self, tree: Tree, path: str, by_name: bool, depth: int) -> object:
        """Add the tensors of a dict, and return its entry in the index."""
        if depth == 0:
            raise ValueError(f"{path[:80]}..: more than {DEEPEST} dicts within dicts; does one contain itself?")
        found: dict[str, object] = {}
        for key, value in tree.items():
            check_key(key, path or "/")
            if isinstance(value, dict):
                found[key] = self._group(value, f"{path}/{escaped(key)}", by_name or (not path and key in BY_NAME), depth - 1)
            elif isinstance(value, (torch.Tensor, np.ndarray, Parts)):
                found[key] = self._leaf(path, key, value, by_name)
            else:
                try:
                    found[key] = text.tagged(value)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{path or '/'}: {key!r}: {error}") from error
        return text.as_object(found)

    def _leaf(self, path: str, key: str, leaf: torch.Tensor | Array | Parts, by_name: bool) -> Entry:
        """Add a tensor or an array, and return its entry in the index."""
        name, identity = f"{path}/{escaped(key)}", (by_name, _identity(leaf))
        if identity in self._stored:
            return self._link(name, self._stored[identity])
        pieces = leaf.pieces if isinstance(leaf, Parts) else (leaf,)
        packed = [pack(one, f"{path or '/'}: {key!r}") for one in pieces]
        (kind, dtype, first), values, shape = packed[0], [one for _, _, one in packed], tuple(leaf.shape)
        place = [dtype, list(shape), name, 0, 0]
        nbytes = sum(value.nbytes for value in values)
        if nbytes >= SMALL or len(values) > 1 or dtype.startswith(">") or self._by_name(by_name):
            tag = dtype if dtype in BITS else ""
            self.datasets.append(Dataset(name, stored(kind, dtype), shape, values, tag, [place]))
        else:
            self._add_small(kind, dtype, first, place)
        if identity[1] is not None:
            self._stored[identity] = {kind: place}
        return {kind: place}

    def _by_name(self, wanted: bool) -> bool:
        """Return whether a small tensor gets a dataset of its own."""
        self._named += wanted
        return wanted and self._named <= NAMED

    def _link(self, name: str, entry: Entry) -> Entry:
        """Give an existing dataset a second name, and return its entry. A part of a packed dataset has no name of its own."""
        (place,) = entry.values()
        if not place[DATASET].startswith(f"/{PACKED}/"):
            self.links.append((name, place[DATASET]))
        return entry

    def _add_small(self, kind: str, dtype: str, values: Values, place: list[Any]) -> None:
        """Add a small tensor to the dataset of those of its dtype."""
        number = BITS.get(dtype, dtype)  # equals the array's `dtype.name`, which numpy computes slowly
        if number not in self._small:
            self._small[number] = Dataset(f"/{PACKED}/", stored(kind, dtype), (0,), [], "", [])
        small = self._small[number]
        (length,) = small.shape
        place[DATASET], place[FIRST] = small.name, length
        small.shape = (length + math.prod(values.shape),)
        small.values.append(values)
        small.places.append(place)
        if small.nbytes > _TOGETHER:
            self._close(number)
            del self._small[number]

    def _close(self, number: str) -> None:
        """Name a dataset of small tensors, to which no more are added."""
        small = self._small[number]
        small.name, self._packed = f"/{PACKED}/{number}.{self._packed}", self._packed + 1
        self.datasets.append(small)


def _identity(leaf: torch.Tensor | Array | Parts) -> tuple[Any, ...] | None:
    """Return a key that two tensors share if they are the same memory (tied parameters); None if nothing can be shared."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_meta or leaf.numel() == 0:
        return None
    return leaf.device, leaf.data_ptr(), leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.is_neg()
