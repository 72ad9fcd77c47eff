"""A loader's double: a copy that is iterated as the loader itself is, and whose sampler gives this worker's batches alone."""

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

OURS = "_mpips_"  # begins the names of attributes that a sharded loader has and its class does not know
KEPT = ("_iterator", "_get_iterator")  # a double's own
SWAPPED = ("batch_sampler", "sampler", "generator")
GOLDEN = 0x9E3779B9  # far apart, as in rng.diverge


def class_of(loader: DataLoader[Any]) -> type[DataLoader[Any]]:
    """The class that the script gave a loader, whether `sharded` or not."""
    kind = type(loader)
    return kind.__bases__[0] if OURS + "class" in vars(kind) else kind


def is_stream(loader: DataLoader[Any]) -> bool:
    """Whether a loader's data can only be iterated."""
    return isinstance(loader.dataset, IterableDataset)


def is_batched(loader: DataLoader[Any]) -> bool:
    """Whether a loader makes batches of a map-style dataset's items."""
    return loader.batch_sampler is not None


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What a loader takes its indices from."""
    return loader.batch_sampler if is_batched(loader) else loader.sampler


def base_of(loader: Any) -> DataLoader[Any]:
    """The loader inside one of `accelerate`'s, which only look like a DataLoader; any other itself."""
    base: DataLoader[Any] = vars(loader).get("base_dataloader", loader)
    return base


class Seed:
    """Draw the seed of a loader's workers where all draw alike, as torch would; each rank's have another.

    Args:
        loader: the loader; its own generator, if it has one, is the one that is drawn from.
        part: which worker this is.
        streams: puts the streams to draw from in place.

    Attributes:
        generator: from which torch draws the seed.
    """

    def __init__(self, loader: DataLoader[Any], part: Part, streams: Streams) -> None:
        self._source = torch.default_generator if loader.generator is None else loader.generator
        self._part, self._streams, self.generator = part, streams, torch.Generator()

    def draw(self) -> None:
        """Draw it."""
        with self._streams:
            self.generator.set_state(self._source.get_state())  # from which torch will draw the same
            drawn = int(torch.empty((), dtype=torch.int64).random_(generator=self._source).item())
        if self._part.index:
            self.generator.manual_seed((drawn + self._part.index * GOLDEN) % 2**63)


class Index:
    """Stand in for a loader's sampler: give a worker's batches of indices, and be the sampler for whatever else is asked."""

    def __init__(self) -> None:
        self.given: Any = None
        self.batched = True
        self.part = Part(0, 1)
        self.turns: Turns | Dealt | None = None
        self.fresh = False  # whether an iterator is being made, for which torch will draw a seed
        self.seed: Seed | None = None  # to draw then, if it is not left to torch

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
    """The double of one loader, made once, so that the loader's own workers persist from loop to loop.

    Attributes:
        loader: the double itself, of exactly the loader's class.
        index: what it has for a sampler.
        counts: items in each batch of a stream that came out and is not yet with the script.
        exact: whether a stream's batches are counted.
    """

    def __init__(self, given: DataLoader[Any]) -> None:
        self.given = weakref.ref(given)
        self.loader: DataLoader[Any] = object.__new__(class_of(given))
        self.index = Index()
        self.counts: deque[int] = deque()
        self.exact = False
        self._ready: Any = None
        # Nothing here leads back to the given loader or to this object: a loader whose workers persist must not be left to the
        # garbage collector, which would close their queues before they are told to end.
        myself = weakref.ref(self)
        vars(self.loader).update(_iterator=None, _get_iterator=lambda: _alive(myself)._get_iterator())

    def follow(self, part: Part, turns: Turns | Dealt | None = None, seed: Seed | None = None, drawn: bool = False) -> None:
        """Be as the loader is now, with this worker's turns for a sampler.

        Args:
            part: which worker this is.
            turns: the turns; None for a stream, or if only the length is asked for.
            seed: the seed of the loader's workers, if torch is not to draw it itself.
            drawn: whether it is drawn already.
        """
        given, mine = self._alive(), vars(self.loader)
        self._ready = None
        mine.update({name: value for name, value in vars(given).items() if not _own(name)})
        self.counts.clear()
        self.exact = class_of(given)._get_iterator is DataLoader._get_iterator and (
            is_batched(given) and (is_stream(given) or not getattr(given, "in_order", True))
        )
        if not is_stream(given):
            self.index.given, self.index.batched, self.index.part = sampler_of(given), is_batched(given), part
            self.index.turns, self.index.seed = turns or self.index.turns, None if drawn else seed
            mine["batch_sampler" if is_batched(given) else "sampler"] = self.index
            if seed:
                mine["generator"] = seed.generator

    def _alive(self) -> DataLoader[Any]:
        given = self.given()
        assert given is not None
        return given

    def make_ready(self) -> None:
        """Make now the iterator that the next iteration will ask for; a loader's workers, if it has any, begin anew."""
        vars(self.loader)["_iterator"] = None
        self._ready = self._make()

    def passed_by(self) -> bool:
        """Whether the first batch came from elsewhere than the sampler: a class's `__iter__` may do without it."""
        turns = self.index.turns
        return self._ready is not None or not (turns and turns.notes)

    def _get_iterator(self) -> Any:
        ready, self._ready = self._ready, None
        return self._make() if ready is None else ready

    def _make(self) -> Any:
        mine, self.index.fresh = vars(self.loader), True
        collate = mine["collate_fn"]
        if self.exact:
            mine["collate_fn"] = Counted(collate)
        made = type(self.loader)._get_iterator(self.loader)
        mine["collate_fn"] = collate
        if self.exact:
            vars(made)["_next_data"] = partial(_next_counted, weakref.ref(made), weakref.ref(self))
        return made

    def give_back(self) -> None:
        """Give the loader what its class's `__iter__` has changed in the double."""
        theirs = vars(self._alive())
        changed = {name: value for name, value in vars(self.loader).items() if theirs.get(name, self) is not value}
        theirs.update({name: value for name, value in changed.items() if name not in SWAPPED and not _own(name)})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the loader has a double of its own


class Iterated:
    """What is iterated in place of a loader: its double, for a loader of `accelerate`'s a copy of that around the double.

    Args:
        given: the loader.
        double: that of the loader, or of the one inside it.

    Attributes:
        loader: what is iterated.
    """

    def __init__(self, given: Any, double: Double) -> None:
        self._given, self.double, self.loader = given, double, double.loader
        self._adapted = base_of(given) is not given
        if self._adapted:
            self.loader = object.__new__(class_of(given))
            vars(self.loader).update(vars(given) | {"base_dataloader": double.loader})

    def give_back(self) -> None:
        """Give the loader what its class's `__iter__` has changed."""
        if self._adapted:
            vars(self._given).update(vars(self.loader) | {"base_dataloader": base_of(self._given)})
        if class_of(base_of(self._given)).__iter__ is not DataLoader.__iter__:
            self.double.give_back()


def _own(name: str) -> bool:
    return name in KEPT or name.startswith(OURS)


def _alive(double: weakref.ref[Double]) -> Double:
    found = double()
    assert found
    return found


def _next_counted(iterator: weakref.ref[Any], double: weakref.ref[Double]) -> Any:
    """In place of an iterator's `_next_data`: the batch alone, with its count put aside."""
    mine: Any = iterator()
    count, batch = type(mine)._next_data(mine)
    _alive(double).counts.append(count)
    return batch


def double_of(loader: DataLoader[Any]) -> Double:
    """The loader's double, the same one each time."""
    found = vars(loader).get(OURS + "double")
    if found is None or found.given() is not loader:  # a copy of a loader has its attributes
        found = vars(loader)[OURS + "double"] = Double(loader)
    double: Double = found
    return double


def sharded(
    loader: DataLoader[Any], iterate: Callable[[DataLoader[Any]], Iterator[Any]], index: int = 0, workers: int = 1
) -> DataLoader[Any]:
    """A copy of the loader that is iterated by `iterate`; all else is the loader's own, and it is of the loader's class.

    Args:
        loader: any DataLoader.
        iterate: called with the copy for each iteration over it.
        index, workers: which worker of how many; so `len` gives this worker's batches.
    """
    kind: Any = class_of(loader)
    copy: DataLoader[Any] = object.__new__(_class_of_shards(kind))
    vars(copy).update(vars(loader))
    vars(copy).update({"_iterator": None, OURS + "iterate": iterate, OURS + "part": Part(index, workers)})
    return copy


def loader_length(loader: DataLoader[Any], part: Part) -> int:
    """This worker's batches in an epoch, as the loader's class says it.

    Raises:
        TypeError: if that is not known.
    """
    double = Double(base_of(loader))  # another one: that of a loop in progress is not to be touched
    double.follow(part)
    count = len(double.loader)
    return count // part.workers + (count % part.workers > part.index) if is_stream(loader) else count


@cache
def _class_of_shards(given: Any) -> Any:
    def iterate(self: DataLoader[Any]) -> Iterator[Any]:
        found: Iterator[Any] = vars(self)[OURS + "iterate"](self)
        return found

    def count(self: DataLoader[Any]) -> int:
        return loader_length(self, vars(self)[OURS + "part"])

    own = {"__iter__": iterate, "__len__": count, OURS + "class": True}
    named = {name: getattr(given, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(given)(given.__name__, (given,), own | named)
