"""Tree -> HDF5, one tensor at a time.

The file holds only what the table in `layout` names: groups, contiguous datasets, hard links and scalar attributes.
"""

from typing import Any

import h5py
import numpy as np
import torch

from mpips.checkpoint import text
from mpips.checkpoint.latch import LatchingFile
from mpips.checkpoint.layout import DEEPEST, JSON, MARKS, Array, Tree, check_key, escaped, is_text, pack

# What every HDF5 since 1.10 can read. The newer object headers carry a checksum and attributes above 64 KiB.
_LIBVER = ("v110", "v110")


def write(file: LatchingFile, tree: Tree) -> None:
    """Write `tree` to the empty `file`; an I/O error is raised once libhdf5 has let go of the file."""
    if clash := MARKS.keys() & tree.keys():
        raise ValueError(f"/: keys {sorted(clash)} are the file's own; rename them")
    try:
        with h5py.File(file, "w", libver=_LIBVER, locking="best-effort", track_order=True) as root:
            _set_attributes(root, MARKS)
            _Writer(file).write_group(root, tree, DEEPEST)
    finally:
        file.finish()


class _Writer:
    def __init__(self, file: LatchingFile) -> None:
        self._file = file
        self._stored: dict[tuple[Any, ...], str] = {}  # identity of a tensor's memory -> name of its dataset

    def write_group(self, group: h5py.Group, tree: Tree, depth: int) -> None:
        if depth == 0:
            raise ValueError(f"{group.name[:80]}..: more than {DEEPEST} dicts within dicts; does one contain itself?")
        for key, value in tree.items():
            name = escaped(check_key(key, group.name))
            if isinstance(value, dict):
                self.write_group(group.create_group(name, track_order=True), value, depth - 1)
            elif isinstance(value, (torch.Tensor, np.ndarray)):
                self._write_array(group, name, value)
            else:
                _set_attributes(group, {name: value})

    def _write_array(self, group: h5py.Group, key: str, leaf: "torch.Tensor | Array") -> None:
        self._file.raise_latched()  # a full disk ends the work here, not after the last tensor
        identity = _identity(leaf)
        if identity in self._stored:
            group[key] = group.file[self._stored[identity]]
            return
        kind, dtype, array = pack(leaf, f"{group.name}: {key!r}")
        dataset = group.create_dataset(key, data=array)
        dataset.attrs["kind"] = kind
        if dtype is not None:
            dataset.attrs["dtype"] = dtype
        if identity is not None:
            self._stored[identity] = dataset.name


def _identity(leaf: "torch.Tensor | Array") -> tuple[Any, ...] | None:
    """Return what two tensors share when they are one (tied parameters); None where nothing can be shared."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_meta or leaf.numel() == 0:
        return None
    return leaf.device, leaf.data_ptr(), leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.is_neg()


def _set_attributes(group: h5py.Group, values: Tree) -> None:
    for key, value in values.items():
        native = _native(value)
        try:
            if native is None or key.endswith(JSON):  # so a name that ends in .json always holds JSON
                group.attrs[key + JSON] = text.dumps(value)
            else:
                group.attrs[key] = native
        except (TypeError, ValueError) as error:
            raise type(error)(f"{group.name}: {key!r}: {error}") from error


def _native(value: object) -> Any:
    """Return `value` as the HDF5 attribute that gives it back; None if none does."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int) and text.fits_int64(value):
        return np.int64(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, str) and is_text(value):
        return str(value)
    return None
