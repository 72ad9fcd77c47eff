"""Which gradients of this rank are there, while backward is under way: slices may travel before the last one is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mpips.model.flat import Slot

PAUSE = 0.0001  # seconds between two calls of what is to be done meanwhile


class BucketReadiness:
    """One rank's, for one push after another.

    Args:
        steps: what travels together, slices of the body; what lies behind the gradients comes with the tail.
        slots: the tensors.
    """

    def __init__(self, steps: Sequence[Sequence[slice]], slots: Sequence[Slot]) -> None:
        self._needs = [_within(step, slots) for step in steps]
        self._needed_by: list[list[int]] = [[] for _ in slots]
        for step, needs in enumerate(self._needs):
            for slot in needs:
                self._needed_by[slot].append(step)
        self._events = [threading.Event() for _ in range(len(steps) + 1)]  # the last is the tail's
        self.begin()

    def begin(self) -> None:
        """Nothing is there yet."""
        self._missing = [len(needs) for needs in self._needs]
        self._there = [False] * len(self._needed_by)
        for event in self._events:
            event.clear()

    def mark(self, slot: int) -> None:
        """A tensor's gradient is there, to stay as it is.

        Raises:
            RuntimeError: it was there already, and may have left.
        """
        if self._there[slot]:
            raise RuntimeError(
                "ps.backward() gave a parameter a gradient twice, as reentrant checkpoints do; it may be on its way already: "
                "use checkpoint(use_reentrant=False), or loss.backward()"
            )
        self._there[slot] = True
        for step in self._needed_by[slot]:
            self._missing[step] -= 1
            if not self._missing[step]:
                self._events[step].set()

    def rest(self) -> list[int]:
        """The tensors whose gradients are not there."""
        return [slot for slot, there in enumerate(self._there) if not there]

    def end(self) -> None:
        """The message is written to its end."""
        for slot in self.rest():
            self.mark(slot)
        self._events[-1].set()

    def wait(self, step: int, meanwhile: Callable[[], object] | None) -> None:
        """Until the gradients that a step is about are there; without any, until the message is written to its end.

        Args:
            step: its number; that behind the last one is the tail's.
            meanwhile: called again and again.
        """
        event = self._events[step if step < len(self._needs) and self._needs[step] else -1]
        while not event.wait(PAUSE if meanwhile else None):
            assert meanwhile
            meanwhile()


def _within(step: Sequence[slice], slots: Sequence[Slot]) -> list[int]:
    """The tensors that a step has a part of: its slices are neighbours."""
    spans = [span for span in step if span.start < span.stop]
    start, stop = min((span.start for span in spans), default=0), max((span.stop for span in spans), default=0)
    return [n for n, slot in enumerate(slots) if slot.offset < stop and start < slot.offset + slot.numel]
