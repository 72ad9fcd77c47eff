"""Random generators of a script's own that decide an order: those of a loader, its samplers, a stream."""

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
    """The generators that the order of some data may be drawn from, in an order that the same script makes again.

    Those of a map-style dataset are left out: they decide what an item is, not which one it is.
    """
    found: dict[int, Any] = {}
    for thing in _things(data, set()):
        found.update((id(one), one) for one in _attributes(thing) if isinstance(one, KINDS))
    return list(found.values())


def _things(thing: Any, seen: set[int]) -> Iterator[Any]:
    """An object and, through its attributes, the loaders, samplers and streams that it is made of."""
    if id(thing) in seen or isinstance(thing, (list, tuple, range, str, torch.Tensor, np.ndarray)):
        return
    seen.add(id(thing))
    yield thing
    for one in list(getattr(thing, "__dict__", {}).values()):
        if isinstance(one, FOLLOWED) or _sampler_like(one):
            yield from _things(one, seen)


def _sampler_like(one: Any) -> bool:
    """Whether an attribute is an iterable of a class of the script's own: no more than that makes a sampler."""
    return hasattr(type(one), "__iter__") and hasattr(one, "__dict__") and not isinstance(one, (Dataset, *KINDS))


def _attributes(thing: Any) -> Iterator[Any]:
    for cls in type(thing).__mro__:
        yield from vars(cls).values()
    yield from getattr(thing, "__dict__", {}).values()


def state_of(generator: Any) -> np.ndarray:
    """A generator's state as bytes."""
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
    return value.tolist()  # of numpy's arrays and numbers


def set_state(generator: Any, state: np.ndarray) -> None:
    """Put a generator back to a state."""
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
    if isinstance(plain, dict):
        return {name: _arrays(value) for name, value in plain.items()}
    return np.array(plain, dtype=np.uint64) if isinstance(plain, list) else plain


class Generators:
    """The generators of each loop of an epoch: their states now, and as the loop in progress began.

    A resumed script makes them anew. One that is as it was at its very first loop goes on from its saved state; any other the
    script has set for this epoch, as it does in each, and it stays as it is.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[Any]] = {}  # the latest ones of each loop
        self._begin: list[np.ndarray] = []  # of the loop in progress
        self._loop = -1
        self._first: dict[str, np.ndarray] = {}  # as each was at its very first loop; empty if the script sets it each time
        self._saved: dict[str, np.ndarray] = {}  # of a resumed run, until its loops have gone on from it

    def begin(self, loop: int, generators: Sequence[Any], resumed: bool, again: bool) -> None:
        """Loop number `loop` begins, is `resumed`, or begins `again` because its order could not be dealt out."""
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
        state = state_of(generator)
        again = int(name.split()[0]) in self._of and np.array_equal(state, self._first.get(name, state[:0]))
        self._first[name] = state[:0] if again else self._first.get(name, state)

    def again(self) -> None:
        """Put those of the loop in progress back to where they were when it began."""
        for generator, state in zip(self._of[self._loop], self._begin, strict=True):
            set_state(generator, state)

    def state_dict(self) -> dict[str, np.ndarray]:
        """All that a checkpoint must hold."""
        tree = dict(self._saved)
        tree |= {f"first {name}": state for name, state in self._first.items()}
        tree |= {f"begin {at}": state for at, state in enumerate(self._begin)}
        for loop, generators in self._of.items():
            tree |= {f"now {loop} {at}": state_of(generator) for at, generator in enumerate(generators)}
        return tree

    def load_state_dict(self, tree: dict[str, np.ndarray]) -> None:
        """Go on from a checkpoint, in a run that has begun no loop yet."""
        self._first = {name.removeprefix("first "): state for name, state in tree.items() if name.startswith("first ")}
        self._saved = {name: state for name, state in tree.items() if not name.startswith("first ")}
