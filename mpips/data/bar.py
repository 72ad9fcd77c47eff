"""Progress bars around data, such as tqdm's: they show this worker's batches instead of all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from mpips.data.turns import Found, Note


def is_bar(data: Any) -> bool:
    """Return whether the data is a progress bar."""
    return not isinstance(data, DataLoader) and all(hasattr(data, name) for name in ("iterable", "total", "update"))


def through(bar: Any, found: Found, total: int | None) -> Found:
    """Yield the batches through a progress bar. The bar gets its own iterable back afterwards.

    Args:
        bar: the bar.
        found: the batches with their notes.
        total: the number of batches, None if unknown.
    """
    notes, given = deque[Note](), bar.iterable
    bar.iterable, bar.total = _aside(found, notes), total
    try:
        for batch in bar:
            yield batch, notes.popleft()
    finally:
        bar.iterable = given


def _aside(found: Found, notes: deque[Note]) -> Iterator[Any]:
    """Yield the batches, and put their notes aside."""
    for batch, note in found:
        notes.append(note)
        yield batch
