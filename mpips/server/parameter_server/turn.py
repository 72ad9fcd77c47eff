"""The latch by which other threads wait until the server is idle."""

from __future__ import annotations

import threading


class Turn:
    """A latch, entered by the thread that works; that thread may enter it again."""

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._over = threading.Event()
        self._over.set()

    def __enter__(self) -> None:
        self._over.clear()
        self._threads.append(threading.get_ident())

    def __exit__(self, *error: object) -> None:
        self._threads.pop()
        if not self._threads:
            self._over.set()

    @property
    def free(self) -> bool:
        """Whether no thread works."""
        return not self._threads

    def wait(self) -> None:
        """Wait until no thread works. In the working thread return at once, as it would wait for itself."""
        if threading.get_ident() not in self._threads:
            self._over.wait()
