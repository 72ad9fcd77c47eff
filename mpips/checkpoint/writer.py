"""Snapshot -> HDF5.

The file holds only what the table in `layout` lists: groups, contiguous datasets, hard links, and attributes of fixed length.
libhdf5 makes the structure and assigns each dataset its bytes of the file. The values are written there without libhdf5, which
would hold its own lock and Python's meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from operator import itemgetter
from queue import Queue
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from mpips.checkpoint.latch import LatchingFile, begin_writeback, fsync, pwrite_all
from mpips.checkpoint.layout import FOOTER, FORMAT, INDEX, VERSION
from mpips.checkpoint.snapshot import Dataset, Snapshot

LARGE = 1 << 23  # bytes of a file that is hashed on a thread beside; a smaller one is hashed sooner than the thread has begun
_LIBVER = ("v110", "v110")  # readable by every HDF5 since 1.10
_AT_ONCE = 1 << 23  # bytes that the disk begins with while the next are written to its cache
_BLOCK = 1 << 20


def write(fd: int, snapshot: Snapshot) -> str:
    """Write `snapshot` to the empty file `fd`, and return the file's SHA-256.

    A large file is also synced: the disk works while the rest is hashed.
    """
    placed, (at, length) = _write_structure(fd, snapshot)
    end = os.fstat(fd).st_size
    footer = FOOTER.pack(at, length, VERSION, FORMAT.encode())
    with _Hash(beside=end >= LARGE) as sha:
        done = 0
        for start, dataset in sorted(placed, key=itemgetter(0)):
            _hash_structure(sha, fd, done, start)
            done = start
            for array in dataset.arrays():
                view = array.reshape(-1).view(np.uint8).data
                for at_once in range(0, len(view), _AT_ONCE):
                    part = view[at_once : at_once + _AT_ONCE]
                    pwrite_all(fd, part, done + at_once)
                    sha.add(part)
                    if end >= LARGE:
                        begin_writeback(fd, done + at_once, len(part))
                if dataset.on_gpu or array.flags.owndata:
                    sha.wait()  # a copy is let go before the next one is made
                done += len(view)
        _hash_structure(sha, fd, done, end)
        pwrite_all(fd, memoryview(footer), end)
        sha.add(memoryview(footer))
        if end >= LARGE:
            fsync(fd)
    return sha.hexdigest()


def _write_structure(fd: int, snapshot: Snapshot) -> tuple[list[tuple[int, Dataset]], tuple[int, int]]:
    """Write everything but the values. An I/O error is raised after libhdf5 has closed the file.

    Returns:
        The datasets, each with its first byte in the file; the index's first byte, and its length.
    """
    file = LatchingFile(fd)
    placed = []
    try:
        with h5py.File(file, "w", libver=_LIBVER, locking="best-effort") as root:
            root.attrs["format"], root.attrs["format_version"] = np.bytes_(FORMAT), VERSION
            structure = _Structure(root)
            for dataset in snapshot.datasets:
                file.raise_latched()  # stop early on a full disk, not after the last dataset
                start = structure.add(dataset)
                dataset.settle(start)
                placed.append((start, dataset))
            for name, target in snapshot.links:
                structure.link(name, target)
            data = json.dumps(snapshot.index, allow_nan=False, separators=(",", ":")).encode()
            index = Dataset(f"/{INDEX}", np.dtype(np.uint8), (len(data),), [np.frombuffer(data, np.uint8)], "", [])
            start = structure.add(index)
            placed.append((start, index))
    finally:
        file.finish()
    return placed, (start, len(data))


class _Structure:
    """Makes datasets and links in an open file."""

    def __init__(self, root: h5py.File) -> None:
        self._root = root.id
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._contiguous = h5p.create(h5p.DATASET_CREATE)
        self._contiguous.set_layout(h5d.CONTIGUOUS)
        self._contiguous.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        self._contiguous.set_fill_time(h5d.FILL_TIME_NEVER)
        self._types: dict[Any, h5t.TypeID] = {}

    def add(self, dataset: Dataset) -> int:
        """Make a dataset, and return its first byte in the file."""
        kind = self._types.get(dataset.dtype) or self._types.setdefault(dataset.dtype, h5t.py_create(dataset.dtype))
        space = h5s.create_simple(dataset.shape) if dataset.shape else h5s.create(h5s.SCALAR)
        made = h5d.create(self._root, dataset.name.encode(), kind, space, self._contiguous, self._links)
        if dataset.tag:
            h5py.Dataset(made).attrs["dtype"] = np.bytes_(dataset.tag)
        return made.get_offset() or 0  # None for an empty dataset

    def link(self, name: str, target: str) -> None:
        """Give an existing dataset a second name."""
        self._root.links.create_hard(name.encode(), self._root, target.encode(), self._links)


def _hash_structure(sha: _Hash, fd: int, start: int, end: int) -> None:
    """Hash what libhdf5 has written to a part of the file."""
    while start < end:
        block = os.pread(fd, min(_BLOCK, end - start), start)
        if not block:
            raise OSError(errno.EIO, "the file has become shorter")
        sha.add(memoryview(block))
        start += len(block)


class _Hash:
    """A SHA-256, computed on a thread beside if asked: neither hashing nor writing holds Python's lock.

    Args:
        beside: whether to use a thread.
    """

    def __init__(self, beside: bool) -> None:
        self._sha = hashlib.sha256()
        self._queue: Queue[memoryview | None] = Queue()
        self._thread = threading.Thread(target=self._run, name="mpips-checkpoint-hash") if beside else None

    def __enter__(self) -> _Hash:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread:
            self._queue.put(None)
            self._thread.join()

    def add(self, view: memoryview) -> None:
        """Hash further bytes, which must not change."""
        if self._thread:
            self._queue.put(view)
        else:
            self._sha.update(view)

    def wait(self) -> None:
        """Wait until everything that was added is hashed."""
        self._queue.join()

    def hexdigest(self) -> str:
        """Return the hash, after the end of the context."""
        return self._sha.hexdigest()

    def _run(self) -> None:
        while (view := self._queue.get()) is not None:
            self._sha.update(view)
            view = None  # let go of the bytes before they count as hashed
            self._queue.task_done()
