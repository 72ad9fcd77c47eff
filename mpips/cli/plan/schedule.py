"""The schedule: which node sends how many bytes to which other node in which step, as in `ReduceScatterGroup`.

In a step of the push, every node sends each other node the step's part of the other's slice. In a step of the pull, it sends
all others the step's part of its own slice. So one number per node describes a step. Nodes with slices of equal length have
equal numbers: there are few kinds of nodes, however many nodes there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from mpips.cli.plan.job import Job
from mpips.comm.reduce_scatter import bucket_length
from mpips.model.layout import steps

Way = Literal["push", "pull"]
Messages = list[tuple[int, int]]  # a node, and the bytes sent to it or received from it


@dataclass(frozen=True)
class Schedule:
    """All messages between the leaders of several nodes in a round.

    Attributes:
        kinds: the kind of each node.
        counts: the number of nodes of each kind.
        parts: for each step of the pull and each kind of node, the bytes on the wire of the step's part of such a node's slice.
        pushed: the indices of the steps in the order of the push.
        widest: for each step and kind, the largest number of elements of the part that a single rank handles.
        itemsize: the bytes of an element on the wire.
    """

    kinds: Sequence[int]
    counts: Sequence[int]
    parts: Sequence[Sequence[int]]
    pushed: Sequence[int]
    widest: Sequence[Sequence[int]]
    itemsize: int

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len(self.kinds)

    def messages(self, way: Way, step: int, node: int) -> tuple[Messages, Messages]:
        """Return what a node sends and what it receives in a step, each in posting order, without empty messages."""
        part = self.parts[self.pushed[step] if way == "push" else step]
        own = part[self.kinds[node]]
        other_parts = [(n, part[kind]) for n, kind in enumerate(self.kinds) if n != node and part[kind]]
        own_parts = [(n, own) for n in range(self.nodes) if n != node and own]
        return (other_parts, own_parts) if way == "push" else (own_parts, other_parts)

    def sums(self, step: int) -> list[tuple[int, int, int]]:
        """Return three numbers for each kind of node in a step of the pull.

        They are the bytes of all other nodes' parts, the bytes of its own part times the number of other nodes, and the number
        of messages.
        """
        part = self.parts[step]
        whole = sum(count * each for count, each in zip(self.counts, part, strict=True))
        full = sum(count for count, each in zip(self.counts, part, strict=True) if each)
        others = self.nodes - 1
        return [(whole - own, others * own, full - 1 + others if own else full) for own in part]

    def sent(self) -> list[int]:
        """Return the bytes that a node of each kind sends in a round."""
        totals = [self.sums(step) for step in range(len(self.parts))]
        return [sum(others + own for others, own, _ in (kinds[kind] for kinds in totals)) for kind in range(len(self.counts))]


def schedule(job: Job) -> Schedule:
    """Return the schedule of a round between the nodes of `job`, which has several."""
    spec, dealt, counted = job.spec, job.buckets, [job.ranks] * job.nodes
    by_bucket = [steps(bucket, counted, bucket_length(job.bucket, spec, job.nodes)) for bucket in dealt]
    planned = [(number, step) for number, of_bucket in enumerate(by_bucket) for step in of_bucket]
    lasts = list(accumulate(map(len, by_bucket), initial=0))
    shapes = list(zip(*([part.stop - part.start for part in step] for _, step in planned), strict=True))
    counts, one = Counter(shapes), dict(zip(shapes, range(job.nodes), strict=True))
    kinds, first = {shape: kind for kind, shape in enumerate(counts)}, [one[shape] for shape in counts]
    itemsize = spec.codec.bytes(1)
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
    """Return the largest number of elements of a part that one rank serves."""
    return max(0, *(int(min(part.stop, own.stop) - max(part.start, own.start)) for own in ranks))
