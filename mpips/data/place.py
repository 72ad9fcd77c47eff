"""Where a worker is in its data. A place counts items, so a run resumes where it was on any number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Place:
    """Where a worker is in its data.

    Attributes:
        epoch: the epoch in progress.
        loop: which `batches` loop of the epoch.
        taken: items of its shard taken in that loop.
        over: whether all ranks have ended that loop.
        cuts: for each earlier number of workers in this loop, the items that each of those workers had taken.
        samples: samples behind gradients that it has accumulated and not yet pushed.
        validations: validations done in the epoch.
        inside: whether this rank has come to that loop, though it may have taken nothing there.
    """

    epoch: int = 0
    loop: int = 0
    taken: int = 0
    over: bool = False
    cuts: list[list[int]] = field(default_factory=list)
    samples: float = 0
    validations: int = 0
    inside: bool = False

    @property
    def begun(self) -> bool:
        """Whether the loop is begun and not at its end."""
        return bool(self.inside or self.taken or self.cuts) and not self.over

    def next_loop(self) -> None:
        """At the start of the epoch's next `batches` loop."""
        self.loop, self.taken, self.over, self.cuts, self.inside = self.loop + 1, 0, False, [], False

    def next_epoch(self) -> None:
        """At the start of the next epoch."""
        self.next_loop()
        self.epoch, self.loop, self.validations = self.epoch + 1, 0, 0


def left(items: Iterable[T], cuts: Sequence[Sequence[int]]) -> Iterable[T]:
    """The items that no earlier set of workers has taken, in order."""
    for cut in cuts:
        items = _uncut(items, cut)
    return items


def _uncut(items: Iterable[T], cut: Sequence[int]) -> Iterator[T]:
    return (item for at, item in enumerate(items) if at // len(cut) >= cut[at % len(cut)])
