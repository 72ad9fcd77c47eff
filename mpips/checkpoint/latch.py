"""The file that libhdf5 writes through: it keeps the first error to itself and raises it once libhdf5 is done.

libhdf5 crashes the process (SIGSEGV) when a flush or a close fails, as on a full disk. So every call from libhdf5
succeeds; after the first error nothing more reaches the disk, and `raise_latched` tells the caller.
"""

import os
from collections.abc import Callable
from typing import Any


class LatchingFile:
    """An empty file, open for reading and writing as `fd`, with the methods that h5py asks of a file object."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._end = 0  # what libhdf5 believes, also after an error
        self._error: BaseException | None = None

    def raise_latched(self) -> None:
        """Raise the first error that a call met, if any did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Raise the first error that a call met; later calls touch the disk no more."""
        self.raise_latched()
        self._error = ValueError("the file is finished")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset`, as libhdf5 does before each read and write."""
        self._at = offset + (self._end if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def write(self, data: Any) -> int:
        """Write all of `data`, or pretend to."""
        view = memoryview(data).cast("B")
        self._attempt(lambda: pwrite_all(self._fd, view, self._at))
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return what was written; zeros where that is lost."""
        found = bytearray(size)
        self._attempt(lambda: os.preadv(self._fd, [found], self._at))
        self._at += size
        return bytes(found)

    def truncate(self, size: int) -> int:
        """Set the length of the file, or pretend to."""
        self._attempt(lambda: os.ftruncate(self._fd, size))
        self._end = size
        return size

    def flush(self) -> None:
        """Do nothing: no byte is held back here."""

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._error is None:
            try:
                call()
            except BaseException as error:  # Ctrl-C too: any exception that passes through libhdf5 breaks its close
                self._error = error


def pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view`: one call writes at most 2 GiB, and less than asked on a disk that fills up."""
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
