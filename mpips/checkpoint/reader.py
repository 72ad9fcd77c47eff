"""HDF5 -> tree, for a file whose SHA-256 is right and whose author may still mean harm.

Only what the writer writes is read, decided from each object's header before its content: every link is a hard link,
every dataset contiguous, native, unfiltered and inside this file, every attribute one known scalar. Everything else is
refused by name, so that no other file is opened and no more memory is taken than the file is long.
"""

from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t

from mpips.checkpoint import sidecar, text
from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.layout import DEEPEST, JSON, MARKS, NATIVE, Array, Tree, check_key, is_text, unescaped, unpack

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ARRAYS = [h5t.py_create(np.dtype(name).newbyteorder(order)) for name in sorted(NATIVE) for order in ("<", ">")]
_SCALARS = [
    (h5t.STD_I64LE, int),
    (h5t.IEEE_F64LE, float),
    (h5t.py_create(np.dtype(np.bool_), logical=True), bool),
    (h5t.py_create(h5py.string_dtype(), logical=True), str),
]


def load(path: Path) -> Tree:
    """Return the tree saved at `path`, tensors on the host; CheckpointError if it is damaged or not a checkpoint."""
    path = Path(path)
    with sidecar.verified(path) as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:  # libhdf5 would go on to look for it behind a user block
            raise CheckpointError(f"{path}: does not begin as an HDF5 file; give the path of a checkpoint")
        try:
            with h5py.File(file, "r", locking="best-effort") as root:
                return _Reader(path, file).read_root(root)
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path}: libhdf5 cannot read it ({error}); use another checkpoint") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._size = file.seek(0, 2)
        self._unclaimed = self._size  # bytes that no dataset has claimed yet
        self._seen: dict[int, Any] = {}  # address of a group or dataset -> what was read there

    def read_root(self, root: h5py.File) -> Tree:
        for mark, expected in MARKS.items():
            found = self._read_attribute(root, mark, "/") if mark in root.attrs else None
            if found != expected:
                raise self._refused("/", f"has {mark}={found!r}", f"expected {expected!r}, as this version writes it")
        tree = self._read_group(root["/"].id, "/", DEEPEST)
        return {key: value for key, value in tree.items() if key not in MARKS}

    def _refused(self, name: str, what: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {name!r} {what}; {expected}; load only files that mpips wrote")

    def _read_group(self, group: Any, name: str, depth: int) -> Tree:
        if depth == 0:
            raise self._refused(name[:80], "lies too deep", f"expected at most {DEEPEST} groups within groups")
        address = h5o.get_info(group).addr
        if address in self._seen:
            raise self._refused(name, "is a group with a second name", "expected each group once")
        self._seen[address] = None
        tree = self._read_attributes(h5py.Group(group), name)
        for raw in group:
            key = self._key(raw, name)
            child = f"{name.rstrip('/')}/{key}"
            if key in tree:
                raise self._refused(child, "is both an attribute and a link", "expected one of them")
            tree[key] = self._read_child(group, raw, child, depth)
        return tree

    def _key(self, raw: bytes, name: str) -> str:
        try:
            key = unescaped(check_key(raw.decode(), name))
            if b"/" in raw:
                raise ValueError("'/' is written %2F")
            return key
        except ValueError as error:
            raise self._refused(name, f"holds the name {raw!r}", "expected a key of a tree") from error

    def _read_child(self, group: Any, raw: bytes, name: str, depth: int) -> Any:
        # An inner path is never opened as one: each link is looked at before it is followed.
        if group.links.get_info(raw).type != h5l.TYPE_HARD:
            raise self._refused(name, "is a soft, external or user-defined link", "expected hard links only")
        child = h5o.open(group, raw)
        if isinstance(child, h5g.GroupID):
            return self._read_group(child, name, depth - 1)
        if isinstance(child, h5d.DatasetID):
            return self._read_dataset(child, name)
        raise self._refused(name, "is a committed type", "expected groups and datasets only")

    def _read_dataset(self, dataset: Any, name: str) -> Any:
        address = h5o.get_info(dataset).addr
        if address not in self._seen:  # tied parameters are tied again
            self._check_storage(dataset, name)
            array = self._read_array(dataset, name)
            marks = self._read_attributes(h5py.Dataset(dataset), name)
            try:
                self._seen[address] = unpack(marks.pop("kind", ""), marks.pop("dtype", None), array)
            except (ValueError, TypeError) as error:
                raise self._refused(name, f"cannot be a leaf ({error})", "expected one that mpips stores") from error
            if marks:
                raise self._refused(name, f"has the attributes {sorted(marks)}", "expected only kind and dtype")
        return self._seen[address]

    def _check_storage(self, dataset: Any, name: str) -> None:
        """Look at the creation properties alone: asking a virtual dataset for its shape may open another file."""
        properties = dataset.get_create_plist()
        if properties.get_layout() != h5d.CONTIGUOUS:
            raise self._refused(name, "is chunked, compact or virtual", "expected contiguous storage")
        if properties.get_external_count():
            raise self._refused(name, "keeps its data in another file", "expected the data in this file")
        if properties.get_nfilters():
            raise self._refused(name, "passes through filters", "expected no filters")

    def _read_array(self, dataset: Any, name: str) -> Array:
        """Allocate only what lies in the file and no other dataset has claimed, and read it."""
        dtype, space = self._dtype(dataset, name), dataset.get_space()
        if space.get_simple_extent_type() == h5s.NULL:
            raise self._refused(name, "has no shape", "expected an array")
        size = dtype.itemsize
        for length in dataset.shape:
            size *= length  # Python's integers: no overflow
        stored = dataset.get_offset() or 0  # 0 where nothing was allocated
        self._unclaimed -= size
        if size and (not stored or stored + size > self._size or self._unclaimed < 0):
            raise self._refused(name, f"declares {size} bytes", "expected no more than the file holds")
        array: Array = np.empty(dataset.shape, dtype)
        if size:
            dataset.read(h5s.ALL, h5s.ALL, array)
        return array

    def _dtype(self, dataset: Any, name: str) -> "np.dtype[Any]":
        stored = dataset.get_type()
        if stored.committed() or not any(stored.equal(known) for known in _ARRAYS):
            raise self._refused(name, f"has the type {type(stored).__name__}", "expected plain integers or floats")
        dtype: np.dtype[Any] = stored.dtype
        return dtype

    def _read_attributes(self, owner: Any, name: str) -> Tree:
        tree: Tree = {}
        for stored_name in owner.attrs:
            key, value = stored_name, self._read_attribute(owner, stored_name, name)
            if stored_name.endswith(JSON):
                key = stored_name.removesuffix(JSON)
                try:
                    value = text.loads(value)
                except ValueError as error:
                    raise self._refused(f"{name}@{stored_name}", f"is malformed ({error})", "expected JSON") from error
            own = self._key(key.encode("utf-8", "surrogateescape"), name)
            if own in tree:
                raise self._refused(f"{name}@{stored_name}", "gives a key a second value", "expected one")
            tree[own] = value
        return tree

    def _read_attribute(self, owner: Any, key: str, name: str) -> Any:
        attribute = owner.attrs.get_id(key)
        stored = attribute.get_type()
        if attribute.get_space().get_simple_extent_type() == h5s.SCALAR and not stored.committed():
            for expected, plain in _SCALARS:
                if stored.equal(expected):
                    value = plain(owner.attrs[key])
                    if plain is not str or is_text(value):
                        return value
        raise self._refused(f"{name}@{key}", "is not a plain scalar", "expected int64, float64, bool or UTF-8 text")
