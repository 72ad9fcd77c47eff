"""The launcher's stdout and stderr while a run goes on: a reader that does not read holds up the output, and nothing else.

A pager, Ctrl-S or a stopped `tee` blocks whoever writes. Signals, deadlines and the end of the run must not wait for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mpips.process.lifecycle import emit

FULL = 1 << 20  # bytes that wait, from which on no more output of the ranks is read
MOST = 1 << 26  # bytes that wait at most, of a run that has been asked to end and writes on


class Outlet:
    """Writes bytes to stdout (1) and stderr (2), in their order; within `behind` on a thread.

    Attributes:
        waiting: the number of bytes that are not written yet.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[int, bytes]] = deque()
        self._ready = threading.Condition()
        self._behind = self._dropped = False
        self.waiting = 0

    @property
    def full(self) -> bool:
        """Whether so much waits that no more output is to be read."""
        return self.waiting >= FULL

    def emit(self, stream: int, text: str | bytes) -> None:
        """Write a text or bytes; see `mpips.process.lifecycle.emit`."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        if not self._behind:
            if not self._dropped:
                emit(stream, data)
            return
        with self._ready:
            if self.waiting < MOST:
                self._queue.append((stream, data))
                self.waiting += len(data)
                self._ready.notify()

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Write on a thread within the context. What then still waits is dropped, with all that follows."""
        self._behind = True
        writer = threading.Thread(target=self._write, name="mpips-output", daemon=True)
        writer.start()
        try:
            yield
        finally:
            with self._ready:
                self._behind, self._dropped = False, self.waiting > 0
                self._ready.notify()
            if not self._dropped:
                writer.join()

    def _write(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._queue or not self._behind)
                if not self._behind:
                    return
                stream, data = self._queue.popleft()
            emit(stream, data)
            with self._ready:
                self.waiting -= len(data)


outlet = Outlet()
