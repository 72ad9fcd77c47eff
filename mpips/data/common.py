"""The random streams that orders are drawn from, identical on all workers, and their states at the beginning of the loop.

Each worker's own streams differ (`rng.diverge`). Whatever all workers must draw alike is drawn from common streams, which
replace the process's streams for that moment. A single worker draws from the process's streams, as in plain PyTorch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpips.data.generators import Generators
from mpips.process import rng

Loop = tuple[int, int]  # epoch, and the index of the loop in it
NO_LOOP: Loop = (-1, -1)


class Common:
    """Random streams that are identical on all workers. `with common:` puts them in place of the process's own.

    They begin as copies of the process's present streams. So create this object while the streams of all workers still agree,
    and keep it for the whole run. With one worker they are the process's streams, and nothing is replaced.

    Args:
        workers: the number of workers.

    Attributes:
        seed: the seed of torch's stream.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._streams = _streams()  # within `with common:`, the process's own streams
        self._depth = 0
        self._loop, self._begin = NO_LOOP, _captured()
        self._generators = Generators()
        self._saved: rng.State = {}  # the state of a resumed run, until a loop begins
        self.seed = torch.initial_seed()
        self._own: rng.State | None = {}  # worker 0's streams at the beginning of the loop; None once it has drawn in a loop

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._swap()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._swap()

    def _swap(self) -> None:
        """Exchange the common streams with the process's."""
        if self.workers > 1:
            present = _streams()
            _put(self._streams)
            self._streams = present

    def begin(self, loop: Loop, generators: Sequence[Any] = (), own: bool = False) -> None:
        """Begin a loop. In a resumed run, restore the streams that decide the loop's order to where they were at its beginning.

        Args:
            loop: the epoch and the index of the loop in it.
            generators: the script's own generators that may decide the order.
            own: whether the order is drawn from the process's streams instead of the common ones.
        """
        resumed = bool(self._saved) and tuple(self._saved["loop"].tolist()) == loop
        if resumed:
            self._restore(_under("begin ", self._saved), own)
        self._saved = {}
        self._generators.begin(loop[1], generators, resumed, again=loop == self._loop)
        self._loop, self._begin = loop, self._now(own)

    def again(self) -> None:
        """Restore streams and generators to their states at the beginning of the present loop."""
        self._restore(self._begin)
        self._generators.again()

    def tell(self) -> str:
        """Return worker 0's own streams as text, at the beginning of a loop; empty if worker 0 has drawn from them in a loop.

        Until then they are where one process's streams would be. What one process draws within a loop, such as dropout masks,
        several workers draw differently.
        """
        if self._own is None:
            return ""
        self._own = _captured()
        return rng.to_text(self._own)

    def take(self, told: str) -> None:
        """Continue from the streams that `tell` returned on worker 0, unless the text is empty."""
        if told:
            with self:
                rng.restore(rng.from_text(told))

    def hand_over(self) -> None:
        """After a loop, move worker 0's own streams to where the common ones are, unless worker 0 has drawn within the loop."""
        if not self._own:
            return
        if _same(self._own, _captured()):
            rng.restore(self._now())
        else:
            self._own = None

    def state_dict(self) -> rng.State:
        """Return the streams' present states, and their states at the beginning of the loop, for a checkpoint."""
        if self._saved:
            return dict(self._saved)
        tree = {"loop": np.array(self._loop, dtype=np.int64)}
        tree |= {f"begin {name}": value for name, value in self._begin.items()}
        tree |= {f"now {name}": value for name, value in self._now().items()}
        tree["alike"] = np.array(self._own is not None)
        tree |= {f"own {name}": value for name, value in (self._own or {}).items()}
        return tree | {f"generator {name}": value for name, value in self._generators.state_dict().items()}

    def load_state_dict(self, tree: rng.State) -> None:
        """Restore what `state_dict` returned, before any loop has begun. The caller restores the process's own streams."""
        self._saved = dict(tree)
        self._generators.load_state_dict(_under("generator ", tree))
        self._own = _under("own ", tree) if tree["alike"] else None
        if self.workers > 1:
            self._restore(_under("now ", tree))

    def _now(self, own: bool = False) -> rng.State:
        """Return the present states of the common streams, or of the process's `own`."""
        if own:
            return _captured()
        with self:
            return _captured()

    def _restore(self, state: rng.State, own: bool = False) -> None:
        """Restore the common streams, or the process's `own`."""
        if own:
            rng.restore(state)
            return
        with self:
            rng.restore(state)


def _same(one: rng.State, other: rng.State) -> bool:
    """Return whether two states are equal."""
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def _under(prefix: str, tree: rng.State) -> rng.State:
    """Return the entries whose names begin with a prefix, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in tree.items() if name.startswith(prefix)}


def _captured() -> rng.State:
    """Return the states of the CPU's streams; no order is drawn from a GPU's."""
    return {name: value for name, value in rng.capture().items() if name != "cuda"}


def _streams() -> tuple[Any, Any, Any]:
    """Return the states of the streams in the form that is quickest to restore, as they may be exchanged at every batch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _put(streams: tuple[Any, Any, Any]) -> None:
    """Restore the streams from what `_streams` returned."""
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    torch.set_rng_state(streams[2])
