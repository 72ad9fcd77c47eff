"""Which gradients are ready during backward: a bucket may travel before the last gradient is ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mpips.model.flat import Slot

PAUSE = 0.0001  # seconds between two calls of `meanwhile`


class BucketReadiness:
    """The readiness of one rank's buckets, for one push after another.

    Args:
        steps: for each step, the slices of the body that travel together. What lies behind the gradients travels with the tail.
        slots: the tensors.
    """

    def __init__(self, steps: Sequence[Sequence[slice]], slots: Sequence[Slot]) -> None:
        self._needs = [_tensors_of(step, slots) for step in steps]
        self._needed_by: list[list[int]] = [[] for _ in slots]
        for step, needs in enumerate(self._needs):
            for slot in needs:
                self._needed_by[slot].append(step)
        self._events = [threading.Event() for _ in range(len(steps) + 1)]  # the last is the tail's
        self.begin()

    def begin(self) -> None:
        """Mark all gradients as not ready."""
        self._missing = [len(needs) for needs in self._needs]
        self._is_ready = [False] * len(self._needed_by)
        for event in self._events:
            event.clear()

    def mark(self, slot: int) -> None:
        """Mark a tensor's gradient as ready. It must not change any more.

        Raises:
            RuntimeError: the gradient was ready already, and may have been sent.
        """
        if self._is_ready[slot]:
            raise RuntimeError(
                "ps.backward() gave a parameter a gradient twice, as reentrant checkpoints do; it may be on its way already: "
                "use checkpoint(use_reentrant=False), or loss.backward()"
            )
        self._is_ready[slot] = True
        for step in self._needed_by[slot]:
            self._missing[step] -= 1
            if not self._missing[step]:
                self._events[step].set()

    def rest(self) -> list[int]:
        """Return the indices of the tensors whose gradients are not ready."""
        return [slot for slot, there in enumerate(self._is_ready) if not there]

    def end(self) -> None:
        """Mark all gradients and the tail as ready: the message is complete."""
        for slot in self.rest():
            self.mark(slot)
        self._events[-1].set()

    def wait(self, step: int, meanwhile: Callable[[], object] | None) -> None:
        """Wait until a step's gradients are ready. A step without gradients waits for the whole message.

        Args:
            step: the step's number; the number after the last step stands for the tail.
            meanwhile: called repeatedly while waiting.
        """
        event = self._events[step if step < len(self._needs) and self._needs[step] else -1]
        while not event.wait(PAUSE if meanwhile else None):
            assert meanwhile
            meanwhile()


def _tensors_of(step: Sequence[slice], slots: Sequence[Slot]) -> list[int]:
    """Return the indices of the tensors that a step has a part of. The step's slices are adjacent."""
    spans = [span for span in step if span.start < span.stop]
    start, stop = min((span.start for span in spans), default=0), max((span.stop for span in spans), default=0)
    return [n for n, slot in enumerate(slots) if slot.offset < stop and start < slot.offset + slot.numel]
