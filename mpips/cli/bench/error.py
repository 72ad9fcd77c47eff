"""The error that ends a benchmark without figures."""

from __future__ import annotations


class BenchError(Exception):
    """A benchmark without a result. The text is one line.

    Attributes:
        status: the exit status: 1 if the benchmark failed, 2 if it cannot be done as asked.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status
