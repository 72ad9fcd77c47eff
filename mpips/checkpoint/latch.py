"""The file object that libhdf5 writes through. It keeps the first error to itself until libhdf5 is done.

libhdf5 crashes the process (SIGSEGV) if a flush or a close fails, as on a full disk. So every call from libhdf5 succeeds. After
the first error nothing more is written, and `raise_latched` raises that error.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}


class LatchingFile:
    """An empty file, open for reading and writing as `fd`, with the methods that h5py needs of a file object."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._end = 0  # the length that libhdf5 believes in, even after an error
        self._error: BaseException | None = None

    def raise_latched(self) -> None:
        """Raise the first error that occurred, if there was one."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Raise the first error that occurred. Later calls do not touch the disk."""
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
        """Write all of `data`; after an error, only pretend to."""
        view = memoryview(data).cast("B")
        self._attempt(lambda: pwrite_all(self._fd, view, self._at))
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return what was written; zeros where it was lost."""
        found = bytearray(size)
        self._attempt(lambda: os.preadv(self._fd, [found], self._at))
        self._at += size
        return bytes(found)

    def truncate(self, size: int) -> int:
        """Set the length of the file; after an error, only pretend to."""
        self._attempt(lambda: os.ftruncate(self._fd, size))
        self._end = size
        return size

    def flush(self) -> None:
        """Do nothing: no data is buffered here."""

    def _attempt(self, call: Callable[[], object]) -> None:
        """Make a call unless an error occurred earlier; keep the error that it raises."""
        if self._error is None:
            try:
                call()
            except BaseException as error:  # also KeyboardInterrupt: any exception that passes through libhdf5 breaks its close
                self._error = error


def pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view`: a single call writes at most 2 GiB, and less on a disk that fills up."""
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def fsync(fd: int) -> None:
    """Make a file, or the names in a folder, durable."""
    if_supported(os.fsync, fd)


def begin_writeback(fd: int, offset: int, size: int) -> None:
    """Start the writeback of a part of the file now, not at the next fsync; clean pages leave the page cache."""
    with suppress(OSError):  # only a hint
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def if_supported(call: Callable[..., object], *args: int) -> None:
    """Call a function that some file systems (CIFS, FUSE) do not support; the file is then only as durable as they allow."""
    try:
        call(*args)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
