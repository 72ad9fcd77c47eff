"""Tree -> HDF5, one tensor at a time.

The file holds only what the table in `layout` lists: groups, contiguous datasets, hard links, and attributes of fixed length.
"""

import json
import os
from typing import Any

import h5py
import numpy as np
import torch
from h5py import h5d, h5p, h5s, h5t

from mpips.checkpoint import text
from mpips.checkpoint.latch import LatchingFile
from mpips.checkpoint.layout import (
    AT,
    BITS,
    BY_NAME,
    DATASET,
    DEEPEST,
    FIRST,
    FOOTER,
    FORMAT,
    INDEX,
    PACKED,
    SMALL,
    VERSION,
    Array,
    Tree,
    check_key,
    escaped,
    pack,
)

_LIBVER = ("v110", "v110")  # readable by every HDF5 since 1.10
_TOGETHER = 1 << 24  # about the bytes of small tensors in one dataset, which is assembled in memory

Entry = dict[str, list[Any]]  # a leaf's entry in the index


def write(file: LatchingFile, tree: Tree) -> None:
    """Write `tree` to the empty `file`. An I/O error is raised after libhdf5 has closed the file."""
    if clash := {INDEX, PACKED} & tree.keys():
        raise ValueError(f"/: keys {sorted(clash)} are the file's own; rename them")
    try:
        with h5py.File(file, "w", libver=_LIBVER, locking="best-effort") as root:
            root.attrs["format"], root.attrs["format_version"] = np.bytes_(FORMAT), VERSION
            where = _Writer(file, root).write(tree)
        file.seek(0, os.SEEK_END)
        file.write(FOOTER.pack(*where, VERSION, FORMAT.encode()))
    finally:
        file.finish()


class _Writer:
    """The writer of one file."""

    def __init__(self, file: LatchingFile, root: h5py.File) -> None:
        self._file, self._root = file, root.id
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._contiguous = h5p.create(h5p.DATASET_CREATE)
        self._contiguous.set_layout(h5d.CONTIGUOUS)
        self._contiguous.set_fill_time(h5d.FILL_TIME_NEVER)
        self._stored: dict[tuple[Any, ...], Entry] = {}  # identity of a tensor's memory -> its entry
        self._small: dict[str, _Small] = {}  # by the array's dtype
        self._packed = 0
        self._types: dict[Any, h5t.TypeID] = {}

    def write(self, tree: Tree) -> tuple[int, int]:
        """Write the tree; return the index's first byte in the file, and its length."""
        index = self._group(tree, "", False, DEEPEST)
        for dtype in self._small:
            self._write_small(dtype)
        data = json.dumps(index, allow_nan=False, separators=(",", ":")).encode()
        return self._dataset(f"/{INDEX}", np.frombuffer(data, np.uint8)), len(data)

    def _group(self, tree: Tree, path: str, by_name: bool, depth: int) -> object:
        """Write the tensors of a dict, and return its entry in the index."""
        if depth == 0:
            raise ValueError(f"{path[:80]}..: more than {DEEPEST} dicts within dicts; does one contain itself?")
        found: dict[str, object] = {}
        for key, value in tree.items():
            check_key(key, path or "/")
            if isinstance(value, dict):
                found[key] = self._group(value, f"{path}/{escaped(key)}", by_name or (not path and key in BY_NAME), depth - 1)
            elif isinstance(value, (torch.Tensor, np.ndarray)):
                found[key] = self._leaf(path, key, value, by_name)
            else:
                try:
                    found[key] = text.tagged(value)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{path or '/'}: {key!r}: {error}") from error
        return text.as_object(found)

    def _leaf(self, path: str, key: str, leaf: "torch.Tensor | Array", by_name: bool) -> Entry:
        """Write a tensor, or collect it if it is small, and return its entry in the index."""
        self._file.raise_latched()  # stop early on a full disk, not after the last tensor
        name, identity = f"{path}/{escaped(key)}", (by_name, _identity(leaf))
        if identity in self._stored:
            entry = self._stored[identity]
            self._link(name, entry)
            return entry
        kind, dtype, array = pack(leaf, f"{path or '/'}: {key!r}")
        place = [dtype, list(array.shape), name, 0, 0]
        if by_name or array.nbytes >= SMALL or dtype.startswith(">"):
            place[-1] = self._dataset(name, array, dtype if dtype in BITS else "")
        else:
            number = BITS.get(dtype, dtype)  # equals `array.dtype.name`, which numpy computes slowly
            small = self._small.setdefault(number, _Small())
            small.add(array, place)
            if small.nbytes > _TOGETHER:
                self._write_small(number)
        if identity[1] is not None:
            self._stored[identity] = {kind: place}
        return {kind: place}

    def _link(self, name: str, entry: Entry) -> None:
        """Give an existing dataset a second name. A part of a packed dataset has no name of its own."""
        (place,) = entry.values()
        if not place[DATASET].startswith(f"/{PACKED}/"):
            self._root.links.create_hard(name.encode(), self._root, place[DATASET].encode(), self._links)

    def _write_small(self, dtype: str) -> None:
        """Write the collected small arrays of a dtype as one dataset."""
        small, self._small[dtype] = self._small[dtype], _Small()
        if small.places:
            name, self._packed = f"/{PACKED}/{dtype}.{self._packed}", self._packed + 1
            small.settle(name, self._dataset(name, np.concatenate(small.arrays)))

    def _dataset(self, name: str, array: Array, dtype: str = "") -> int:
        """Write a dataset and return its first byte in the file. `dtype` is the tensor's dtype if the array holds its bits."""
        kind = self._types.get(array.dtype) or self._types.setdefault(array.dtype, h5t.py_create(array.dtype))
        space = h5s.create_simple(array.shape) if array.ndim else h5s.create(h5s.SCALAR)
        dataset = h5d.create(self._root, name.encode(), kind, space, self._contiguous, self._links)
        if array.size:
            dataset.write(h5s.ALL, h5s.ALL, np.asarray(array, order="C"))
        if dtype:
            h5py.Dataset(dataset).attrs["dtype"] = np.bytes_(dtype)
        return dataset.get_offset() or 0  # None for an empty dataset


class _Small:
    """Small arrays of one dtype that will share a dataset, flattened, and their entries in the index."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.places: list[list[Any]] = []
        self.nbytes = 0

    def add(self, array: Array, place: list[Any]) -> None:
        """Add an array. Its entry is completed by `settle`."""
        place[DATASET], place[FIRST] = f"/{PACKED}/", self.nbytes // array.itemsize
        self.arrays.append(array.reshape(-1))
        self.places.append(place)
        self.nbytes += array.nbytes

    def settle(self, name: str, start: int) -> None:
        """Complete the entries, given the dataset's name and its first byte in the file."""
        itemsize = self.arrays[0].itemsize
        for place in self.places:
            place[DATASET], place[AT] = name, start + itemsize * place[FIRST]


def _identity(leaf: "torch.Tensor | Array") -> tuple[Any, ...] | None:
    """Return a key that two tensors share if they are the same memory (tied parameters); None if nothing can be shared."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_meta or leaf.numel() == 0:
        return None
    return leaf.device, leaf.data_ptr(), leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.is_neg()
