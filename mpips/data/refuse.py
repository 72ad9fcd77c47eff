"""Refusing loaders that divide their data among processes already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

INSIDE = ("batch_sampler", "sampler", "dataset", "base_dataloader")


def refuse_split(loader: DataLoader[Any]) -> None:
    """Raise ValueError for a loader that yields another part of the data in each of several processes.

    Raises:
        ValueError: names the object that splits the data, and a remedy.
    """
    for thing in _things(loader, 0):
        kind = type(thing)
        parts = getattr(thing, "num_replicas", None) or getattr(thing, "num_processes", None)
        if kind.__module__.startswith("accelerate.") and kind.__name__ == "DataLoaderDispatcher":
            parts = getattr(getattr(thing, "state", None), "num_processes", None)
        if isinstance(parts, int) and parts > 1:
            raise ValueError(
                f"a {kind.__name__} that deals data out to {parts} processes given, and mpips deals it out to the workers;"
                f" expected a loader of all data: leave {kind.__name__} out, or say shard=False"
            )


def _things(thing: Any, depth: int) -> Iterator[Any]:
    """Yield a loader, and the samplers, datasets and loaders inside it."""
    yield thing
    if depth < 4:
        for name in INSIDE:
            inner = getattr(thing, "__dict__", {}).get(name)
            if inner is not None:
                yield from _things(inner, depth + 1)
