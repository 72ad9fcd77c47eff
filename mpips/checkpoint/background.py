"""Checkpoints written while training goes on: a snapshot is taken, and a thread writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import numpy as np

from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.folder import prune, save_snapshot
from mpips.checkpoint.layout import Tree
from mpips.checkpoint.snapshot import Buffer, Snapshot

Memory = bytes | bytearray | memoryview
_writers: WeakSet[Writer] = WeakSet()  # those of this process


def stop_writing() -> None:
    """Let no earlier run of this process write any more: an abandoned one could, to the folder that the next run resumes from.

    A checkpoint that is being written is finished first.
    """
    for writer in list(_writers):
        if writer.writing is not None and not writer.writing.cancel():
            wait([writer.writing])


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on the disk.

    Attributes:
        step: its step.
        path: its file.
        nbytes: the length of the file.
        time: when it was there, by `time.perf_counter`.
    """

    step: int
    path: Path
    nbytes: int
    time: float


class Writer:
    """Writes the checkpoints of one folder, one at a time, here or on a thread.

    Python does not exit before the thread has written what it has begun.

    Args:
        folder: the folder; it is made if it does not exist.
        keep: the number of checkpoints to keep.
        before: called before each checkpoint is written, where it is written.

    Attributes:
        writing: what the thread does, until `wait`; None if it has nothing to do.
    """

    def __init__(self, folder: Path, keep: int, before: Callable[[], object] = lambda: None) -> None:
        self._folder, self._keep, self._before = folder, keep, before
        self._buffer = Buffer()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mpips-checkpoint")
        self.writing: Future[Written] | None = None
        _writers.add(self)

    @property
    def busy(self) -> bool:
        """Whether the thread writes a checkpoint."""
        return self.writing is not None and not self.writing.done()

    @property
    def done(self) -> bool:
        """Whether the thread has written a checkpoint, or failed to, that `wait` has not been called for."""
        return self.writing is not None and self.writing.done()

    def begin(self, step: int, tree: Tree, still: Sequence[Memory] = ()) -> None:
        """Copy a tree, and write it on the thread. Call `wait` before the next write.

        Args:
            step: the step.
            tree: the tree.
            still: memory that nobody changes any more; what lies there is not copied.

        Raises:
            ValueError, TypeError: the tree holds something that cannot be stored.
        """
        assert self.writing is None, "two writers"
        snapshot = Snapshot(tree)
        memory = [np.frombuffer(one, np.uint8) for one in still if len(one)]
        snapshot.copy(self._buffer, [range(one.ctypes.data, one.ctypes.data + len(one)) for one in memory])
        try:
            self.writing = self._thread.submit(self._write, step, snapshot)
        except RuntimeError:  # Python is about to exit, and begins no more threads
            written = self._write(step, snapshot)
            self.writing = Future()
            self.writing.set_result(written)

    def wait(self) -> Written | None:
        """Wait for what the thread writes, and return it; None if there was nothing to wait for.

        Raises:
            CheckpointError: it could not be written. All older checkpoints are unchanged.
        """
        writing, self.writing = self.writing, None
        return writing.result() if writing else None

    def write(self, step: int, tree: Tree) -> Written:
        """Write a tree, without copying it, and return when that is done.

        Raises:
            CheckpointError, ValueError, TypeError: as `save`.
        """
        assert self.writing is None, "two writers"
        return self._write(step, Snapshot(tree))

    def _write(self, step: int, snapshot: Snapshot) -> Written:
        self._before()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError.from_os(self._folder, "make the folder of checkpoints", error) from error
        path = save_snapshot(self._folder, step, snapshot)
        written = Written(step, path, path.stat().st_size, time.perf_counter())
        prune(self._folder, step, self._keep)
        return written
