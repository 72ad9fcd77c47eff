"""The random streams that orders are drawn from, alike on all workers, and where they were when the loop in progress began.

Each worker's own streams are another's noise (`rng.diverge`). What all must draw alike, they draw from streams that are put in
place of their own for that moment. One worker alone draws from the process's streams, as plain PyTorch does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpips.data.generators import Generators
from mpips.process import rng

Loop = tuple[int, int]  # epoch, and which loop of it
NO_LOOP: Loop = (-1, -1)


class Common:
    """Streams that all workers draw alike: `with common:` puts them in place of the process's own.

    They begin as the process's are now, so make this where all workers' are alike still, and keep it for the whole run. With
    one worker they are the process's streams, and nothing is put in their place.

    Args:
        workers: how many workers there are.

    Attributes:
        seed: what torch's stream was seeded with.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._streams = _streams()  # while they are in place: the process's own
        self._depth = 0
        self._loop, self._begin = NO_LOOP, _captured()
        self._generators = Generators()
        self._saved: rng.State = {}  # of a resumed run that has begun no loop yet
        self.seed = torch.initial_seed()  # where these began
        self._own: rng.State | None = {}  # worker 0's as the loop began; None once it has drawn in a loop

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._swap()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._swap()

    def _swap(self) -> None:
        if self.workers > 1:
            here = _streams()
            _put(self._streams)
            self._streams = here

    def begin(self, loop: Loop, generators: Sequence[Any] = (), own: bool = False) -> None:
        """A loop begins; in a resumed run, put the streams that decide its order where they were when it first began.

        Args:
            loop: its epoch, and its number there.
            generators: those of the script's own that may decide the order.
            own: whether the order is drawn from the process's streams and not from those that all workers draw alike.
        """
        resumed = bool(self._saved) and tuple(self._saved["loop"].tolist()) == loop
        if resumed:
            self._restore(_under("begin ", self._saved), own)
        self._saved = {}
        self._generators.begin(loop[1], generators, resumed, again=loop == self._loop)
        self._loop, self._begin = loop, self._now(own)

    def again(self) -> None:
        """Put streams and generators back to where they were when the loop in progress began."""
        self._restore(self._begin)
        self._generators.again()

    def tell(self) -> str:
        """Worker 0's own streams, as it begins a loop: where one process's would be, unless it has drawn in a loop before.

        What one process draws in a loop, as for dropout, several workers draw otherwise; until then all orders are as its.
        """
        if self._own is None:
            return ""
        self._own = _captured()
        return rng.to_text(self._own)

    def take(self, told: str) -> None:
        """Go on from what worker 0 has told, if it has."""
        if told:
            with self:
                rng.restore(rng.from_text(told))

    def hand_over(self) -> None:
        """At the end of a loop let worker 0's own streams go on where those of the order are, if it drew nothing beside."""
        if not self._own:
            return
        if _same(self._own, _captured()):
            rng.restore(self._now())
        else:
            self._own = None

    def state_dict(self) -> rng.State:
        """All that a checkpoint must hold: the streams now, and as the loop in progress began."""
        if self._saved:
            return dict(self._saved)
        tree = {"loop": np.array(self._loop, dtype=np.int64)}
        tree |= {f"begin {name}": value for name, value in self._begin.items()}
        tree |= {f"now {name}": value for name, value in self._now().items()}
        tree["alike"] = np.array(self._own is not None)
        tree |= {f"own {name}": value for name, value in (self._own or {}).items()}
        return tree | {f"generator {name}": value for name, value in self._generators.state_dict().items()}

    def load_state_dict(self, tree: rng.State) -> None:
        """Go on from a checkpoint, in a run that has begun no loop yet. The process's streams are the caller's to restore."""
        self._saved = dict(tree)
        self._generators.load_state_dict(_under("generator ", tree))
        self._own = _under("own ", tree) if tree["alike"] else None
        if self.workers > 1:
            self._restore(_under("now ", tree))

    def _now(self, own: bool = False) -> rng.State:
        if own:
            return _captured()
        with self:
            return _captured()

    def _restore(self, state: rng.State, own: bool = False) -> None:
        if own:
            rng.restore(state)
            return
        with self:
            rng.restore(state)


def _same(one: rng.State, other: rng.State) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def _under(prefix: str, tree: rng.State) -> rng.State:
    return {name.removeprefix(prefix): value for name, value in tree.items() if name.startswith(prefix)}


def _captured() -> rng.State:
    """The streams of the processor alone: no order is drawn from a GPU's."""
    return {name: value for name, value in rng.capture().items() if name != "cuda"}


def _streams() -> tuple[Any, Any, Any]:
    """The streams as they are, in the quickest form: they may change places at every batch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _put(streams: tuple[Any, Any, Any]) -> None:
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    torch.set_rng_state(streams[2])
