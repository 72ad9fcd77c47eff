"""Random generators of the script that decide an order: those of a loader, of its samplers, of a stream."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
FOLLOWED = (DataLoader, Sampler, IterableDataset)


def generators_of(data: Any) -> list[Any]:
    """Return the generators that the data's order may be drawn from, in an order that is the same in each run of the script.

    Generators of a map-style dataset are left out: they affect the contents of items, not their order.
    """
    found: dict[int, Any] = {}
    for thing in _things(data, set()):
        found.update((id(one), one) for one in _attributes(thing) if isinstance(one, KINDS))
    return list(found.values())


def _things(thing: Any, seen: set[int]) -> Iterator[Any]:
    """Yield an object and, through its attributes, the loaders, samplers and streams that it consists of."""
    if id(thing) in seen or isinstance(thing, (list, tuple, range, str, torch.Tensor, np.ndarray)):
        return
    seen.add(id(thing))
    yield thing
    for one in list(getattr(thing, "__dict__", {}).values()):
        if isinstance(one, FOLLOWED) or _sampler_like(one):
            yield from _things(one, seen)


def _sampler_like(one: Any) -> bool:
    """Return whether an attribute may be a sampler: an iterable of a class of the script's own."""
    return hasattr(type(one), "__iter__") and hasattr(one, "__dict__") and not isinstance(one, (Dataset, *KINDS))


def _attributes(thing: Any) -> Iterator[Any]:
    """Yield the attributes of an object and of its classes."""
    for cls in type(thing).__mro__:
        yield from vars(cls).values()
    yield from getattr(thing, "__dict__", {}).values()


def state_of(generator: Any) -> np.ndarray:
    """Return a generator's state as bytes."""
    if isinstance(generator, torch.Generator):
        state: np.ndarray = generator.get_state().numpy()
        return state
    if isinstance(generator, random.Random):
        plain: Any = generator.getstate()
    elif isinstance(generator, np.random.RandomState):
        plain = generator.get_state(legacy=False)
    else:
        plain = generator.bit_generator.state
    return np.frombuffer(json.dumps(plain, default=_plain).encode(), dtype=np.uint8)


def _plain(value: Any) -> Any:
    """Return an array or number of numpy's as Python's."""
    return value.tolist()  # of numpy's arrays and numbers


def set_state(generator: Any, state: np.ndarray) -> None:
    """Restore a generator from the bytes of `state_of`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(np.array(state, dtype=np.uint8)))
        return
    plain = json.loads(np.asarray(state, dtype=np.uint8).tobytes())
    if isinstance(generator, random.Random):
        generator.setstate((plain[0], tuple(plain[1]), plain[2]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(plain))
    else:
        generator.bit_generator.state = _arrays(plain)


def _arrays(plain: Any) -> Any:
    """Return a state with arrays in place of lists."""
    if isinstance(plain, dict):
        return {name: _arrays(value) for name, value in plain.items()}
    return np.array(plain, dtype=np.uint64) if isinstance(plain, list) else plain


class Generators:
    """The script's generators of each loop in an epoch: their present states, and their states as the present loop began.

    A resumed script creates its generators anew. A generator that is in the same state as at its very first loop continues from
    its saved state. In any other state, the script has seeded it for this epoch, as it does in every epoch, and it is not
    touched.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[Any]] = {}  # loop -> the generators of its latest iteration
        self._begin: list[np.ndarray] = []  # states at the beginning of the present loop
        self._loop = -1
        self._first: dict[
            str, np.ndarray
        ] = {}  # the state of each at its very first loop; empty if the script seeds it each time
        self._saved: dict[str, np.ndarray] = {}  # the states of a resumed run, until each has been restored

    def begin(self, loop: int, generators: Sequence[Any], resumed: bool, again: bool) -> None:
        """Begin a loop, and restore the saved states of its generators in a resumed run.

        Args:
            loop: the index of the loop in the epoch.
            generators: the generators of the loop.
            resumed: whether the run is resumed within this loop.
            again: whether this loop has begun before, because its order could not be dealt out.
        """
        for at, generator in enumerate(generators):
            if not again:
                self._note_first(f"{loop} {at}", generator)
            begin, now = (self._saved.pop(f"{kind} {at}", None) for kind in ("begin", f"now {loop}"))
            if resumed and begin is not None:
                set_state(generator, begin)
            elif now is not None and np.array_equal(state_of(generator), self._first[f"{loop} {at}"]):
                set_state(generator, now)
        self._of[loop], self._loop = list(generators), loop
        self._begin = [state_of(generator) for generator in generators]

    def _note_first(self, name: str, generator: Any) -> None:
        """Note a generator's state at its very first loop; note none if the script seeds it each time."""
        state = state_of(generator)
        again = int(name.split()[0]) in self._of and np.array_equal(state, self._first.get(name, state[:0]))
        self._first[name] = state[:0] if again else self._first.get(name, state)

    def again(self) -> None:
        """Restore the generators to their states at the beginning of the present loop."""
        for generator, state in zip(self._of[self._loop], self._begin, strict=True):
            set_state(generator, state)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all states, for a checkpoint."""
        tree = dict(self._saved)
        tree |= {f"first {name}": state for name, state in self._first.items()}
        tree |= {f"begin {at}": state for at, state in enumerate(self._begin)}
        for loop, generators in self._of.items():
            tree |= {f"now {loop} {at}": state_of(generator) for at, generator in enumerate(generators)}
        return tree

    def load_state_dict(self, tree: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned, before any loop has begun."""
        self._first = {name.removeprefix("first "): state for name, state in tree.items() if name.startswith("first ")}
        self._saved = {name: state for name, state in tree.items() if not name.startswith("first ")}
