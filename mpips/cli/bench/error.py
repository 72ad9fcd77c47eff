"""What ends a benchmark without figures."""

from __future__ import annotations


class BenchError(Exception):
    """A benchmark that has nothing to report: one line says why.

    Attributes:
        status: the exit status, 1 if it failed, 2 if it cannot be done as it was asked.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status
