"""A room on each of several nodes: their leaders send slices to each other.

Each node serves a slice of each bucket of the body, and each of its ranks a part of that. A round:

| step    | on a node                                | between the leaders                                              |
|---------|------------------------------------------|------------------------------------------------------------------|
| combine | bucket by bucket: gradients are added,   | each sends every other what that one serves: reduce-scatter      |
|         | and the nodes' sums of what it serves    |                                                                  |
|         | the rest is added; sums become means     | the rest of the messages is added                                |
| report  | as in one room                           | the least, or the sum, of the reports                            |
| verdict | as in one room                           | the server's                                                     |
| publish |                                          | the rest of the pull message                                     |
|         | bucket by bucket, where it is encoded    | each sends every other what it has stepped: allgather            |

While buckets travel, in all directions at once, the next is added up and what has come is joined, by all ranks but the leader,
who has to send and receive, unless it is alone. Each node sends and receives 2(N-1)/N times the model's bytes in a round, and
nobody more: that is the least for N nodes.

On a wire of bfloat16 sums travel rounded and are added in float32. What comes back is not the weights but by how much they
changed, rounded, from what all nodes have to what their owner has stepped to, in float32: the weights are alike on all nodes,
and within one rounding of the last change of the owner's, as what rounding left over is part of the next change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpips.exchange.room import Contents, Meeting, Op, Ready, Room, Work
from mpips.plan import BUCKET, EARLY, FLIGHT, LEAST, pieces, share, steps

Finish = Callable[[], None]  # waits until all is sent and there
Begin = Callable[[], Finish]
Sent = list[tuple[int, Tensor]]  # a node, and what goes there or comes from there


class Leaders(Protocol):
    """The first ranks of all nodes; the server's is the first of them.

    Attributes:
        node: this one's number.
    """

    node: int

    def sum(self, values: Tensor) -> None:
        """The sum of all leaders' `values` lands in everybody's."""

    def merge(self, values: Tensor, op: Op) -> None:
        """The least, or the sum, of all leaders' float64 `values` lands in the first one's."""

    def tell(self, message: Tensor) -> None:
        """The first one's `message`, bytes, lands in everybody's."""

    def progress(self) -> None:
        """Let what is under way get on: MPI moves data while it is called."""

    def prepare(self, sent: Sent, taken: Sent) -> Begin:
        """What is to be sent to and received from others, again and again: the same memory, in this order."""


class Rooms(Room):
    """One rank's place in its node's room.

    Args:
        nodes: the ranks of each node.
        rank: this one.
        rows, parts: the memory, as `sizes` has it.
        meeting: how the ranks of this node wait for each other.
        contents: what each room holds.
        leaders: the others, if this is one.
        bucket: the most bytes that a node sends, and receives, at a time.
    """

    def __init__(
        self,
        nodes: Sequence[Sequence[int]],
        rank: int,
        rows: Sequence[Tensor],
        parts: Sequence[Tensor],
        meeting: Meeting,
        contents: Contents,
        leaders: Leaders | None,
        bucket: int,
    ) -> None:
        self._node = next(n for n, ranks in enumerate(nodes) if rank in ranks)
        super().__init__(nodes[self._node], rank, rows, parts, meeting, contents)
        self.nodes = [list(ranks) for ranks in nodes]
        self._leaders, self.each = leaders, length(bucket, contents, len(nodes))
        self._progress = leaders.progress if leaders else None
        told, said, window, outbox = parts[3:]
        self._told, self.said = told.view(contents.dtype), said.view(torch.float64)
        self._window = window.view(contents.wire).view(FLIGHT + 1, len(nodes) - 1, -1)
        self._outbox = outbox.view(contents.wire).view(FLIGHT + 1, len(nodes), -1)
        self._masters: list[Tensor] = []
        self._pushes: list[Begin] = []
        self._pulls: list[Begin] = []
        self.rounded = contents.wire != contents.dtype

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """See `Room`."""
        super().serve(buckets, behind)
        counts = [len(ranks) for ranks in self.nodes]
        by_bucket = [steps(bucket, counts, self.each) for bucket in buckets]
        self.pull_steps = [step for of_bucket in by_bucket for step in of_bucket]  # the first layers are needed first
        self._bucket_of = [number for number, of_bucket in enumerate(by_bucket) for _ in of_bucket]
        self.push_steps = [step for of_bucket in reversed(by_bucket) for step in of_bucket]  # the last have gradients first
        if self.rounded:
            self._masters = [self.weights[span].clone() for span in self.slices]
        if self._leaders:
            pulled = self._changes if self.rounded else self._weights
            self._pushes = [self._leaders.prepare(*self._sums(*each)) for each in enumerate(self.push_steps)]
            self._pulls = [self._leaders.prepare(*pulled(*each)) for each in enumerate(self.pull_steps)]

    def stepped(self, part: slice) -> Tensor:
        """See `Room`."""
        if not self.rounded:
            return self.weights[part]
        bucket = bisect_right([span.start for span in self.slices], part.start) - 1
        first = self.slices[bucket].start
        return self._masters[bucket][part.start - first : part.stop - first]

    def combine(self, weight: float, heard: Tensor, work: Work, ready: Ready | None = None) -> None:
        """See `Room`; here everybody hears the tails."""
        self.said[self._place] = weight

        def before(number: int, step: list[slice]) -> None:
            if self.contents.overlap or not number:
                if ready:
                    ready.wait(number, self._progress)
                self.meet(self._progress)
            self._add(number, step, work)

        self._travel(self.push_steps, before, self._pushes, lambda number, step: self._join(number, step, work))
        if ready:
            ready.wait(len(self.push_steps), self._progress)
        self._arrive(self._progress)
        behind = slice(self.weights.numel(), self.contents.tail)
        if self._leaders:
            self._hear(self._told)
            self._leaders.sum(self._told)
        self._release()
        heard.copy_(self._told[behind.stop - behind.start :])
        if self.leads:
            self.combined[behind].copy_(self._told[: behind.stop - behind.start])
        for span in self.spans:
            work.finish(span, self.combined[span])

    def _travel(
        self,
        plan: list[list[slice]],
        before: Callable[[int, list[slice]], None],
        begin: Sequence[Begin],
        after: Callable[[int, list[slice]], None],
    ) -> None:
        """Bucket by bucket: all ranks do what comes before, leaders send and receive, all do what comes after."""
        begun: list[Finish] = []
        for number in range(len(plan) + FLIGHT):
            if number < len(plan):
                before(number, plan[number])
            done = number - FLIGHT
            self._arrive(self._progress)
            if self._leaders:
                if number < len(plan):
                    begun.append(begin[number]())
                if done >= 0:
                    begun[done]()
            self._release()
            if done >= 0:
                after(done, plan[done])

    def _mine(self, span: slice) -> list[slice]:
        """This rank's share of what its node does, in pieces that stay in its cache."""
        others = len(self.members) - 1
        if not others:
            return pieces(span)
        return pieces(share(span, self._place - 1, others)) if self._place else []

    def _add(self, number: int, step: list[slice], work: Work) -> None:
        for node, span in enumerate(step):
            for part in self._mine(span):
                work.add(part, self._rows_of(part))
                if self.rounded and node != self._node:
                    self._slot(self._outbox, number, node, span, part).copy_(self.combined[part])

    def _sums(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """Each other node's slice goes there; what comes is the others' sums of this node's."""
        own = step[self._node]
        sent = [
            (node, self._leaving(number, node, step[node])) for node in self._others() if step[node].start < step[node].stop
        ]
        taken = [(node, self._slot(self._window, number, self._seat(node), own, own)) for node in self._others()]
        return sent, taken if own.start < own.stop else []

    def _leaving(self, number: int, node: int, span: slice) -> Tensor:
        return self._slot(self._outbox, number, node, span, span) if self.rounded else self.combined[span]

    def _join(self, number: int, step: list[slice], work: Work) -> None:
        own = step[self._node]
        for part in self._mine(own):
            sums = [self._slot(self._window, number, self._seat(node), own, part) for node in self._others()]
            work.join(part, [*sums[: self._node], self.combined[part], *sums[self._node :]])

    def _others(self) -> list[int]:
        return [node for node in range(len(self.nodes)) if node != self._node]

    def _seat(self, node: int) -> int:
        """Where in the window what comes from a node lies."""
        return node - (node > self._node)

    @staticmethod
    def _slot(room: Tensor, number: int, row: int, span: slice, part: slice) -> Tensor:
        """Where a part of a step's span lies in the window or the outbox."""
        return room[number % (FLIGHT + 1), row, part.start - span.start : part.stop - span.start]

    def report(self, values: Tensor, op: Op) -> Tensor:
        """See `Room`."""
        reported = super().report(values, op)
        if self._leaders:
            self._leaders.merge(reported, op)
        return reported

    def verdict(self, answer: Tensor) -> None:
        """See `Room`."""
        if self._leaders:
            self._leaders.tell(answer.view(torch.uint8))
        super().verdict(answer)

    def publish(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """See `Room`.

        Raises:
            ValueError: weights are given, which other nodes do not expect.
        """
        if whole:
            raise ValueError(
                "weights were given to send to all ranks, while each node sends those that it has stepped; expected none, or "
                "plan=root, or shared_memory=False"
            )
        self._arrive()
        if self._leaders:
            if self.leads:
                fill()
            where = self.contents.weights
            self._leaders.tell(self.pull[: where.start])
            self._leaders.tell(self.pull[where.stop :])
        if self.rounded and moved:
            self._release()
            self._travel(self.pull_steps, self._change, self._pulls, self._follow)
            self.meet()
            return
        if self._leaders and moved:
            for finish in [begin() for begin in self._pulls]:
                finish()
        self._release()

    def _weights(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """This node's slice goes to all others; theirs come."""
        own, others = step[self._node], self._others()
        sent = [(node, self.weights[own]) for node in others] if own.start < own.stop else []
        return sent, [(n, self.weights[step[n]]) for n in others if step[n].start < step[n].stop]

    def _change(self, number: int, step: list[slice]) -> None:
        """By how much the weights change, rounded; on this node they do."""
        own, served = step[self._node], self.slices[self._bucket_of[number]]
        for part in pieces(slice(max(served.start, own.start), min(served.stop, own.stop))):
            change = self._slot(self._outbox, number, self._node, own, part)
            change.copy_(self.stepped(part) - self.weights[part])
            self.weights[part].add_(change)

    def _changes(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """The same with changes, by way of the outbox and the window."""
        own, others = step[self._node], self._others()
        change = self._slot(self._outbox, number, self._node, own, own)
        sent = [(node, change) for node in others] if own.start < own.stop else []
        come = [(n, self._slot(self._window, number, self._seat(n), step[n], step[n])) for n in others]
        return sent, [(n, room) for n, room in come if len(room)]

    def _follow(self, number: int, step: list[slice]) -> None:
        for node in self._others():
            for part in self._mine(step[node]):
                self.weights[part].add_(self._slot(self._window, number, self._seat(node), step[node], part))


def length(bucket: int, contents: Contents, nodes: int) -> int:
    """How many elements a node sends each other at a time, if it is to send at most `bucket` bytes to all of them."""
    return max(LEAST, min(bucket, EARLY if contents.overlap else BUCKET) // contents.wire.itemsize // (nodes - 1))


def sizes(contents: Contents, ranks: int, nodes: int, bucket: int) -> list[int]:
    """The bytes of the parts of a room of `ranks` ranks, one of `nodes` rooms; see `Rooms`."""
    each = length(bucket, contents, nodes) * contents.wire.itemsize
    rounded = contents.wire != contents.dtype
    told = (contents.numel - contents.gradients) * contents.dtype.itemsize
    outbox = (FLIGHT + 1) * nodes * each if rounded else 0
    return [*contents.sizes(ranks), told, ranks * 8, (FLIGHT + 1) * (nodes - 1) * each, outbox]
