"""Progress bars around data, as tqdm makes them: they show one worker's batches in place of all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from mpips.data.turns import Found, Note


def is_bar(data: Any) -> bool:
    """Whether the data is a progress bar around some."""
    return not isinstance(data, DataLoader) and all(hasattr(data, name) for name in ("iterable", "total", "update"))


def through(bar: Any, found: Found, total: int | None) -> Found:
    """Batches by way of a bar, which has its own iterable again afterwards.

    Args:
        bar: the bar.
        found: the batches, and what is known of each.
        total: how many there are, if that is known.
    """
    notes, given = deque[Note](), bar.iterable
    bar.iterable, bar.total = _aside(found, notes), total
    try:
        for batch in bar:
            yield batch, notes.popleft()
    finally:
        bar.iterable = given


def _aside(found: Found, notes: deque[Note]) -> Iterator[Any]:
    for batch, note in found:
        notes.append(note)
        yield batch
