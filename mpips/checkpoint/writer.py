"""Tree -> HDF5, one tensor at a time.

The file holds only what the table in `layout` names: groups, contiguous datasets, hard links, and attributes of fixed length.
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

_LIBVER = ("v110", "v110")  # what every HDF5 since 1.10 can read
_TOGETHER = 1 << 24  # bytes, about, of small tensors in one dataset: it is put together in memory

Entry = dict[str, list[Any]]  # a leaf's in the index


def write(file: LatchingFile, tree: Tree) -> None:
    """Write `tree` to the empty `file`; an I/O error is raised once libhdf5 has let go of the file."""
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
    def __init__(self, file: LatchingFile, root: h5py.File) -> None:
        self._file, self._root = file, root.id
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._contiguous = h5p.create(h5p.DATASET_CREATE)
        self._contiguous.set_layout(h5d.CONTIGUOUS)
        self._contiguous.set_fill_time(h5d.FILL_TIME_NEVER)
        self._stored: dict[tuple[Any, ...], Entry] = {}  # identity of a tensor's memory -> where it is
        self._small: dict[str, _Small] = {}  # by the dtype of the array
        self._packed = 0
        self._types: dict[Any, h5t.TypeID] = {}

    def write(self, tree: Tree) -> tuple[int, int]:
        """Write all; return the index's first byte in the file, and how many they are."""
        index = self._group(tree, "", False, DEEPEST)
        for dtype in self._small:
            self._write_small(dtype)
        data = json.dumps(index, allow_nan=False, separators=(",", ":")).encode()
        return self._dataset(f"/{INDEX}", np.frombuffer(data, np.uint8)), len(data)

    def _group(self, tree: Tree, path: str, by_name: bool, depth: int) -> object:
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
        self._file.raise_latched()  # a full disk ends the work here, not after the last tensor
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
            number = BITS.get(dtype, dtype)  # as `array.dtype.name`, which takes numpy longer than all else here
            small = self._small.setdefault(number, _Small())
            small.add(array, place)
            if small.nbytes > _TOGETHER:
                self._write_small(number)
        if identity[1] is not None:
            self._stored[identity] = {kind: place}
        return {kind: place}

    def _link(self, name: str, entry: Entry) -> None:
        """Give a dataset that is there a second name; a part of a packed one has none of its own."""
        (place,) = entry.values()
        if not place[DATASET].startswith(f"/{PACKED}/"):
            self._root.links.create_hard(name.encode(), self._root, place[DATASET].encode(), self._links)

    def _write_small(self, dtype: str) -> None:
        small, self._small[dtype] = self._small[dtype], _Small()
        if small.places:
            name, self._packed = f"/{PACKED}/{dtype}.{self._packed}", self._packed + 1
            small.settle(name, self._dataset(name, np.concatenate(small.arrays)))

    def _dataset(self, name: str, array: Array, dtype: str = "") -> int:
        """Write a dataset, of the bits of a `dtype` if that is given; return its first byte in the file."""
        kind = self._types.get(array.dtype) or self._types.setdefault(array.dtype, h5t.py_create(array.dtype))
        space = h5s.create_simple(array.shape) if array.ndim else h5s.create(h5s.SCALAR)
        dataset = h5d.create(self._root, name.encode(), kind, space, self._contiguous, self._links)
        if array.size:
            dataset.write(h5s.ALL, h5s.ALL, np.asarray(array, order="C"))
        if dtype:
            h5py.Dataset(dataset).attrs["dtype"] = np.bytes_(dtype)
        return dataset.get_offset() or 0  # none where nothing is stored


class _Small:
    """Arrays of one dtype that are to share a dataset, flat, and their places in the index."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.places: list[list[Any]] = []
        self.nbytes = 0

    def add(self, array: Array, place: list[Any]) -> None:
        """One more; its place is settled later."""
        place[DATASET], place[FIRST] = f"/{PACKED}/", self.nbytes // array.itemsize
        self.arrays.append(array.reshape(-1))
        self.places.append(place)
        self.nbytes += array.nbytes

    def settle(self, name: str, start: int) -> None:
        """They are in the dataset of this name, whose first byte in the file this is."""
        itemsize = self.arrays[0].itemsize
        for place in self.places:
            place[DATASET], place[AT] = name, start + itemsize * place[FIRST]


def _identity(leaf: "torch.Tensor | Array") -> tuple[Any, ...] | None:
    """Return what two tensors share when they are one (tied parameters); None where nothing can be shared."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_meta or leaf.numel() == 0:
        return None
    return leaf.device, leaf.data_ptr(), leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.is_neg()
