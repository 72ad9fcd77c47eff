"""Which thread the server's work is done by at the moment, for those that want to wait until it is done."""

from __future__ import annotations

import threading


class Turn:
    """Entered, also more than once, by the thread that works."""

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
        """Whether nobody works."""
        return not self._threads

    def wait(self) -> None:
        """Until nobody works; at once in the thread that does, which would wait for itself."""
        if threading.get_ident() not in self._threads:
            self._over.wait()
