"""Who sends how many bytes to whom in which step, as `mpips.comm.reduce_scatter.ReduceScatterGroup` would.

In a step of the push every node sends each other that part of the other's slice that the step is about; in a step of the pull
it sends all others that part of its own. So a number for each node says all of a step, and nodes with slices of the same
length have the same number: there are few kinds of nodes, however many nodes there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from mpips.cli.cost.job import Job
from mpips.comm.reduce_scatter import length
from mpips.model.layout import steps

Way = Literal["push", "pull"]
Messages = list[tuple[int, int]]  # a node, and the bytes that go there or come from there


@dataclass(frozen=True)
class Schedule:
    """All that the leaders of several nodes send each other in a round.

    Attributes:
        kinds: of each node.
        counts: how many nodes are of each kind.
        parts: for each step of the pull the bytes, on the wire, of what it is about in the slice of a node of each kind.
        pushed: the steps in the order of the push.
        widest: the same, but of what a single rank of the node has to do with, in elements; that which has most.
        itemsize: bytes of an element on the wire.
    """

    kinds: Sequence[int]
    counts: Sequence[int]
    parts: Sequence[Sequence[int]]
    pushed: Sequence[int]
    widest: Sequence[Sequence[int]]
    itemsize: int

    @property
    def nodes(self) -> int:
        """How many."""
        return len(self.kinds)

    def messages(self, way: Way, step: int, node: int) -> tuple[Messages, Messages]:
        """What a node sends, and what it takes, each in the order in which it is posted; nothing is posted that is empty."""
        part = self.parts[self.pushed[step] if way == "push" else step]
        own = part[self.kinds[node]]
        theirs = [(n, part[kind]) for n, kind in enumerate(self.kinds) if n != node and part[kind]]
        mine = [(n, own) for n in range(self.nodes) if n != node and own]
        return (theirs, mine) if way == "push" else (mine, theirs)

    def sums(self, step: int) -> list[tuple[int, int, int]]:
        """For each kind of node: the bytes of the other nodes' parts, its own once for each of them, and how many messages."""
        part = self.parts[step]
        whole = sum(count * each for count, each in zip(self.counts, part, strict=True))
        full = sum(count for count, each in zip(self.counts, part, strict=True) if each)
        others = self.nodes - 1
        return [(whole - own, others * own, full - 1 + others if own else full) for own in part]

    def sent(self) -> list[int]:
        """The bytes that a node of each kind sends in a round."""
        totals = [self.sums(step) for step in range(len(self.parts))]
        return [sum(theirs + mine for theirs, mine, _ in (kinds[kind] for kinds in totals)) for kind in range(len(self.counts))]


def schedule(job: Job) -> Schedule:
    """A round's, between the nodes of `job`, which are several."""
    contents, dealt, counted = job.contents, job.buckets, [job.ranks] * job.nodes
    by_bucket = [steps(bucket, counted, length(job.bucket, contents, job.nodes)) for bucket in dealt]
    planned = [(number, step) for number, of_bucket in enumerate(by_bucket) for step in of_bucket]
    lasts = list(accumulate(map(len, by_bucket), initial=0))
    shapes = list(zip(*([part.stop - part.start for part in step] for _, step in planned), strict=True))
    counts, one = Counter(shapes), dict(zip(shapes, range(job.nodes), strict=True))
    kinds, first = {shape: kind for kind, shape in enumerate(counts)}, [one[shape] for shape in counts]
    itemsize = contents.wire.itemsize
    return Schedule(
        kinds=[kinds[shape] for shape in shapes],
        counts=list(counts.values()),
        parts=[[(step[node].stop - step[node].start) * itemsize for node in first] for _, step in planned],
        pushed=[step for start, stop in reversed(list(pairwise(lasts))) for step in range(start, stop)],
        widest=[
            [_widest(step[node], dealt[number][node * job.ranks : (node + 1) * job.ranks]) for node in first]
            for number, step in planned
        ],
        itemsize=itemsize,
    )


def _widest(part: slice, ranks: Sequence[slice]) -> int:
    """The most elements of a part that one rank serves."""
    return max(0, *(int(min(part.stop, own.stop) - max(part.start, own.start)) for own in ranks))
