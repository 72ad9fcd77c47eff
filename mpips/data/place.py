"""A worker's place in its data. A place counts items, so a run can resume there on any number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Place:
    """A worker's place in its data.

    Attributes:
        epoch: the epoch in progress.
        loop: the index of the loop over data within the epoch.
        taken: the number of items that this worker has taken in that loop.
        over: whether all ranks have ended that loop.
        cuts: for each earlier number of workers in this loop, the items that each of those workers had taken.
        samples: the number of samples behind accumulated gradients that have not been pushed.
        inside: whether this rank has entered that loop, though it may not have taken anything.
        broke: whether the script of this rank has broken out of that loop.
        calls: the number of calls outside loops (steps, validations, ...) since the last loop of the epoch, or its beginning.
        calling: whether the worker is in a further such call, which a resumed run makes again.
        latest: the number of samples of the last step.
        data: a hash of that loop's data and batch size; 0 if it is unknown.
    """

    epoch: int = 0
    loop: int = 0
    taken: int = 0
    over: bool = False
    cuts: list[list[int]] = field(default_factory=list)
    samples: float = 0
    inside: bool = False
    broke: bool = False
    calls: int = 0
    calling: bool = False
    latest: float = 1
    data: int = 0

    @property
    def begun(self) -> bool:
        """Whether the loop has begun and has not ended."""
        return bool(self.inside or self.taken or self.cuts) and not self.over

    @property
    def between(self) -> bool:
        """Whether the worker is outside loops, and has made a call since the last one, or is in one."""
        return bool(self.calls or self.calling) and not self.begun and not self.over

    def next_loop(self) -> None:
        """Move to the start of the epoch's next loop."""
        self.loop, self.taken, self.over, self.cuts, self.inside = self.loop + 1, 0, False, [], False
        self.broke, self.calls, self.calling, self.data = False, 0, False, 0

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.next_loop()
        self.epoch, self.loop = self.epoch + 1, 0


def left(items: Iterable[T], cuts: Sequence[Sequence[int]]) -> Iterable[T]:
    """Return the items, in order, that no earlier set of workers has taken."""
    for cut in cuts:
        items = _uncut(items, cut)
    return items


def _uncut(items: Iterable[T], cut: Sequence[int]) -> Iterator[T]:
    """Return the items left by a set of n workers: worker k has taken the first `cut[k]` of items k, k + n, k + 2n, ..."""
    return (item for at, item in enumerate(items) if at // len(cut) >= cut[at % len(cut)])
