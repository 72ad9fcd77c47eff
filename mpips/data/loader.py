"""A loader's double: a copy that is iterated like the loader, but whose sampler yields this worker's batches only."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mpips.data.samples import Counted
from mpips.data.turns import Dealt, Part, Streams, Turns, length

OURS = "_mpips_"  # prefix of the attributes that mpips adds to a loader
KEPT = ("_iterator", "_get_iterator")  # attributes that a double does not copy
SWAPPED = ("batch_sampler", "sampler", "generator")
GOLDEN = 0x9E3779B9  # keeps seeds far apart, as in rng.diverge


def class_of(loader: DataLoader[Any]) -> type[DataLoader[Any]]:
    """Return the loader's class as the script made it, whether the loader is `sharded` or not."""
    kind = type(loader)
    return kind.__bases__[0] if OURS + "class" in vars(kind) else kind


def is_stream(loader: DataLoader[Any]) -> bool:
    """Return whether the loader's dataset can only be iterated."""
    return isinstance(loader.dataset, IterableDataset)


def is_batched(loader: DataLoader[Any]) -> bool:
    """Return whether the loader makes batches of a map-style dataset's items."""
    return loader.batch_sampler is not None


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return what the loader takes its indices from: its batch sampler, or its sampler if it makes no batches."""
    return loader.batch_sampler if is_batched(loader) else loader.sampler


def base_of(loader: Any) -> DataLoader[Any]:
    """Return the loader inside a loader of accelerate's, which only looks like a DataLoader; any other loader itself."""
    base: DataLoader[Any] = vars(loader).get("base_dataloader", loader)
    return base


class Seed:
    """A DataLoader's base seed, drawn from the common streams at the moment at which torch would draw it.

    The worker of number 0 keeps the seed; the others use seeds derived from it.

    Args:
        loader: the loader. If it has a generator of its own, the seed is drawn from that.
        part: this worker's number and the number of workers.
        streams: a context in which the random streams are those that all workers share.

    Attributes:
        generator: the generator from which torch draws the seed.
    """

    def __init__(self, loader: DataLoader[Any], part: Part, streams: Streams) -> None:
        self._source = torch.default_generator if loader.generator is None else loader.generator
        self._part, self._streams, self.generator = part, streams, torch.Generator()

    def draw(self) -> None:
        """Draw the seed."""
        with self._streams:
            self.generator.set_state(self._source.get_state())  # torch will draw the same number from it
            drawn = int(torch.empty((), dtype=torch.int64).random_(generator=self._source).item())
        if self._part.index:
            self.generator.manual_seed((drawn + self._part.index * GOLDEN) % 2**63)


class Index:
    """A stand-in for a loader's sampler: iterates over this worker's indices; its other attributes are the sampler's."""

    def __init__(self) -> None:
        self.given: Any = None
        self.batched = True
        self.part = Part(0, 1)
        self.turns: Turns | Dealt | None = None
        self.fresh = False  # whether a loader's iterator is being created, for which torch draws a seed
        self.seed: Seed | None = None  # drawn at that moment; None to leave that to torch

    def __iter__(self) -> Iterator[Any]:
        assert self.turns
        drawing = self.turns.open()
        if self.fresh and self.seed:
            self.seed.draw()
        self.fresh = False
        return drawing

    def __len__(self) -> int:
        return length(self.given, self.batched, self.part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["given"], name)


class Double:
    """The double of one loader, created once, so that the loader's worker processes persist from loop to loop.

    Attributes:
        loader: the double itself, of exactly the loader's class.
        index: the double's sampler.
        counts: the number of items of each batch of a stream that the script has not received yet.
        exact: whether the items of a stream's batches are counted.
    """

    def __init__(self, given: DataLoader[Any]) -> None:
        self.given = weakref.ref(given)
        self.loader: DataLoader[Any] = object.__new__(class_of(given))
        self.index = Index()
        self.counts: deque[int] = deque()
        self.exact = False
        self._ready: Any = None
        # No strong references to the given loader or to this object: a cycle would leave a loader with persistent workers to
        # the garbage collector, which would close the workers' queues before they are told to end.
        myself = weakref.ref(self)
        vars(self.loader).update(_iterator=None, _get_iterator=lambda: _alive(myself)._get_iterator())

    def follow(self, part: Part, turns: Turns | Dealt | None = None, seed: Seed | None = None, drawn: bool = False) -> None:
        """Copy the loader's present attributes, and use this worker's turns as the sampler.

        Args:
            part: this worker's number and the number of workers.
            turns: the turns; None for a stream, or if only the length is needed.
            seed: the seed of the loader's worker processes; None to let torch draw it.
            drawn: whether the seed has been drawn already.
        """
        given, attributes = self._alive(), vars(self.loader)
        self._ready = None
        attributes.update({name: value for name, value in vars(given).items() if not _own(name)})
        self.counts.clear()
        self.exact = class_of(given)._get_iterator is DataLoader._get_iterator and (
            is_batched(given) and (is_stream(given) or not getattr(given, "in_order", True))
        )
        if not is_stream(given):
            self.index.given, self.index.batched, self.index.part = sampler_of(given), is_batched(given), part
            self.index.turns, self.index.seed = turns or self.index.turns, None if drawn else seed
            attributes["batch_sampler" if is_batched(given) else "sampler"] = self.index
            if seed:
                attributes["generator"] = seed.generator

    def _alive(self) -> DataLoader[Any]:
        """Return the given loader."""
        given = self.given()
        assert given is not None
        return given

    def make_ready(self) -> None:
        """Create the iterator of the next iteration now. Persistent worker processes are started anew."""
        vars(self.loader)["_iterator"] = None
        self._ready = self._make()

    def passed_by(self) -> bool:
        """Return whether the first batch came without the sampler: a class's `__iter__` may not use it."""
        turns = self.index.turns
        return self._ready is not None or not (turns and turns.notes)

    def _get_iterator(self) -> Any:
        """Return the iterator that `make_ready` created, or a new one."""
        ready, self._ready = self._ready, None
        return self._make() if ready is None else ready

    def _make(self) -> Any:
        """Create an iterator of the loader's class; for a stream, one that counts the items of each batch."""
        attributes, self.index.fresh = vars(self.loader), True
        collate = attributes["collate_fn"]
        if self.exact:
            attributes["collate_fn"] = Counted(collate)
        iterator = type(self.loader)._get_iterator(self.loader)
        attributes["collate_fn"] = collate
        if self.exact:
            vars(iterator)["_next_data"] = partial(_next_counted, weakref.ref(iterator), weakref.ref(self))
        return iterator

    def give_back(self) -> None:
        """Copy back to the loader the attributes that its class's `__iter__` has changed in the double."""
        attributes = vars(self._alive())
        changed = {name: value for name, value in vars(self.loader).items() if attributes.get(name, self) is not value}
        attributes.update({name: value for name, value in changed.items() if name not in SWAPPED and not _own(name)})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the loader creates its own double


class Iterated:
    """The object that is iterated in place of a loader: its double, or accelerate's wrapper around the double.

    Args:
        given: the loader.
        double: the double of the loader, or of the loader inside accelerate's.

    Attributes:
        loader: the object to iterate.
    """

    def __init__(self, given: Any, double: Double) -> None:
        self._given, self.double, self.loader = given, double, double.loader
        self._adapted = base_of(given) is not given
        if self._adapted:
            self.loader = object.__new__(class_of(given))
            vars(self.loader).update(vars(given) | {"base_dataloader": double.loader})

    def give_back(self) -> None:
        """Copy back to the loader the attributes that its class's `__iter__` has changed."""
        if self._adapted:
            vars(self._given).update(vars(self.loader) | {"base_dataloader": base_of(self._given)})
        if class_of(base_of(self._given)).__iter__ is not DataLoader.__iter__:
            self.double.give_back()


def _own(name: str) -> bool:
    """Return whether an attribute belongs to mpips or the double, and is not copied."""
    return name in KEPT or name.startswith(OURS)


def _alive(double: weakref.ref[Double]) -> Double:
    """Return the object behind a weak reference."""
    found = double()
    assert found
    return found


def _next_counted(iterator: weakref.ref[Any], double: weakref.ref[Double]) -> Any:
    """Return an iterator's next batch, and put aside its number of items; replaces the iterator's `_next_data`."""
    loader_iterator: Any = iterator()
    count, batch = type(loader_iterator)._next_data(loader_iterator)
    _alive(double).counts.append(count)
    return batch


def double_of(loader: DataLoader[Any]) -> Double:
    """Return the loader's double, the same object in each call."""
    found = vars(loader).get(OURS + "double")
    if found is None or found.given() is not loader:  # a copied loader has the original's attributes
        found = vars(loader)[OURS + "double"] = Double(loader)
    double: Double = found
    return double


def sharded(
    loader: DataLoader[Any], iterate: Callable[[DataLoader[Any]], Iterator[Any]], part: Callable[[], Part] = lambda: Part(0, 1)
) -> DataLoader[Any]:
    """Return a copy of the loader whose iteration is `iterate`. It has the loader's class and all its other attributes.

    Args:
        loader: any DataLoader.
        iterate: called with the copy; returns the iterator.
        part: returns this worker's number and the number of workers; `len` of the copy is the number of its batches.
    """
    kind: Any = class_of(loader)
    copy: DataLoader[Any] = object.__new__(_class_of_shards(kind))
    vars(copy).update(vars(loader))
    vars(copy).update({"_iterator": None, OURS + "iterate": iterate, OURS + "part": part})
    return copy


def loader_length(loader: DataLoader[Any], part: Part) -> int:
    """Return the number of this worker's batches in an epoch, computed by the loader's own class.

    Raises:
        TypeError: the number is unknown.
    """
    double = Double(base_of(loader))  # a new one: that of a running loop must not change
    double.follow(part)
    count = len(double.loader)
    return count // part.workers + (count % part.workers > part.index) if is_stream(loader) else count


@cache
def _class_of_shards(given: Any) -> Any:
    """Return the class derived from a loader's class, with its own iteration and length."""

    def iterate(self: DataLoader[Any]) -> Iterator[Any]:
        found: Iterator[Any] = vars(self)[OURS + "iterate"](self)
        return found

    def count(self: DataLoader[Any]) -> int:
        return loader_length(self, vars(self)[OURS + "part"]())

    own = {"__iter__": iterate, "__len__": count, OURS + "class": True}
    named = {name: getattr(given, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(given)(given.__name__, (given,), own | named)
