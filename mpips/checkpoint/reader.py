"""HDF5 -> tree, for a file whose SHA-256 is right but whose author may be malicious.

HDF5's own structures are not read: the footer gives the position of the index, and the index that of each tensor's data. So no
other file is opened, no link is followed, and tensors take no more memory than the file's size.
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
    """Return the tree saved at `path`, tensors on the host.

    The tree raises CheckpointError for a missing key, too.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint.
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
    """The reader of one open file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = self._unclaimed = os.fstat(file.fileno()).st_size  # the latter: bytes not yet used by any leaf
        self._seen: dict[tuple[Any, ...], Any] = {}  # place -> the leaf read there

    def index(self) -> bytearray:
        """Return the index; raise ValueError if there is none that this version can read."""
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
        """Return the leaf at this place; raise ValueError or TypeError if the place is malformed."""
        dtype, shape, _, _, at = place
        if not all(type(number) is int and number >= 0 for number in (at, *shape)):
            raise ValueError(f"a tensor of shape {shape} at byte {at}, expected whole numbers")
        known = (kind, dtype, tuple(shape), at)
        if known in self._seen:  # tied parameters become one tensor again
            return self._seen[known]
        found = unpack(kind, dtype, self._array(stored(kind, dtype), shape, at))
        if 0 not in shape:
            self._seen[known] = found
        return found

    def _array(self, dtype: "np.dtype[Any]", shape: list[int], at: int) -> Array:
        """Read an array; raise ValueError if it ends beyond the file or all arrays together exceed the file's size."""
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
        """Read bytes at `at` until `target` is full."""
        view = memoryview(target)
        while view:
            read = os.preadv(self._file.fileno(), [view], at)
            if not read:
                raise ValueError("the file has become shorter")
            view, at = view[read:], at + read
