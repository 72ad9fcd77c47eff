"""HDF5 -> tree, for a file whose SHA-256 is right and whose author may still mean harm.

Nothing of HDF5 is read: the footer says where the index is, and that where in the file each tensor's numbers are. So no other
file is opened, nothing is followed, and tensors take no more memory than the file is long.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpips.checkpoint import sidecar, text
from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.layout import ARRAY, FOOTER, FORMAT, TENSOR, VERSION, Array, Tree, stored, unpack
from mpips.checkpoint.saved import Saved

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def load(path: Path) -> Tree:
    """Return the tree saved at `path`, tensors on the host; CheckpointError if it is damaged or not a checkpoint.

    Asked for a key that it has not, the tree raises a CheckpointError, too.
    """
    path = Path(path)
    with sidecar.verified(path) as file:
        reader = _Reader(file)
        try:
            index = reader.index()
            tree = text.loads(index, {kind: partial(reader.leaf, kind) for kind in (TENSOR, ARRAY)})
            if not isinstance(tree, dict):
                raise ValueError(f"its index is a {type(tree).__name__}, expected a tree")
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise CheckpointError(f"{path}: {error}; load only files that mpips wrote, or use another checkpoint") from error
        return Saved(tree, str(path))


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = self._unclaimed = os.fstat(file.fileno()).st_size  # the latter: bytes that no leaf has claimed yet
        self._seen: dict[tuple[Any, ...], Any] = {}  # place -> what was read there

    def index(self) -> bytearray:
        """The index; ValueError if there is none that this version reads."""
        begin, end = bytearray(len(_SIGNATURE)), bytearray(FOOTER.size)
        if self._size < len(begin) + len(end):
            raise ValueError(f"{self._size} bytes are no checkpoint")
        self._fill(begin, 0)
        self._fill(end, self._size - len(end))
        at, size, version, name = FOOTER.unpack(end)
        if begin != _SIGNATURE:
            raise ValueError("does not begin as an HDF5 file; give the path of a checkpoint")
        if name != FORMAT.encode():
            raise ValueError(
                f"has no index at its end, as checkpoints of layout {VERSION} have: an earlier version of mpips wrote it, or "
                f"another program has changed it"
            )
        if version != VERSION:
            raise ValueError(f"is of layout {version}, expected {VERSION}, as this version of mpips writes it")
        if at + size > self._size:
            raise ValueError(f"its index ends at byte {at + size} of {self._size}")
        index = bytearray(size)
        self._fill(index, at)
        return index

    def leaf(self, kind: str, place: Any) -> Any:
        """Return the leaf that is at this place; ValueError or TypeError if none can be."""
        dtype, shape, _, _, at = place
        if not all(type(number) is int and number >= 0 for number in (at, *shape)):
            raise ValueError(f"a tensor of shape {shape} at byte {at}, expected whole numbers")
        known = (kind, dtype, tuple(shape), at)
        if known in self._seen:  # tied parameters are tied again
            return self._seen[known]
        found = unpack(kind, dtype, self._array(stored(kind, dtype), shape, at))
        if 0 not in shape:
            self._seen[known] = found
        return found

    def _array(self, dtype: "np.dtype[Any]", shape: list[int], at: int) -> Array:
        """Allocate only what lies in the file and no other leaf has claimed, and read it."""
        size = dtype.itemsize
        for length in shape:
            size *= length  # Python's integers: no overflow
        self._unclaimed -= size
        if at + size > self._size or self._unclaimed < 0:
            raise ValueError(f"declares {size} bytes of a tensor at byte {at}, expected no more than the file's {self._size}")
        array: Array = np.empty(shape, dtype)
        if size:
            self._fill(array.reshape(-1).view(np.uint8), at)
        return array

    def _fill(self, target: Any, at: int) -> None:
        view = memoryview(target)
        while view:
            read = os.preadv(self._file.fileno(), [view], at)
            if not read:
                raise ValueError("the file has become shorter")
            view, at = view[read:], at + read
