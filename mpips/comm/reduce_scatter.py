"""Node groups of several nodes that serve a slice of each bucket: leaders send slices to each other.

Each node serves a slice of each bucket of the body, and each of its ranks a part of that. A round:

| step    | on a node                                | between the leaders                                              |
|---------|------------------------------------------|------------------------------------------------------------------|
| reduce  | bucket by bucket: gradients are added,   | each sends every other what that one serves: reduce-scatter      |
|         | and the nodes' sums of what it serves    |                                                                  |
|         | the rest is added; sums become means     | the rest of the messages is added                                |
| report  | as in one group                           | the least, or the sum, of the reports                            |
| decide  | as in one group                           | the server's                                                     |
| broadcast|                                         | the rest of the pull message                                     |
|         | bucket by bucket, where it is staged     | each sends every other what it has stepped: allgather            |

While buckets travel, in all directions at once, the next is added up and what has come is joined, by all ranks but the leader,
who has to send and receive, unless it is alone. Each node sends and receives 2(N-1)/N times the model's bytes in a round, and
nobody more: that is the least for N nodes.

What is encoded, and what is on GPUs, is staged: it leaves by an outbox and comes by a window, to which all ranks of a node copy
what they have added or stepped, and from where they take what they join or follow, while other buckets are under way.

With a codec that is not exact (`mpips.comm.codecs`) sums travel encoded, and are decoded before they are added. What comes back
is not the weights but their change, encoded with error feedback: the weights are alike on all nodes, and within one rounding of
the last change of the owner's. Weights of 16 bits come as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpips.comm import multi_node
from mpips.comm.codecs import ErrorFeedback
from mpips.comm.multi_node import Begin, Finish, LeaderGroup, MultiNodeGroup, Sent
from mpips.comm.node_group import Barrier, BucketReadiness, BufferSpec, Op, SliceReducer
from mpips.comm.peer_buffers import PeerBuffers
from mpips.model.layout import BUCKET, EARLY, FLIGHT, LEAST, SMALLEST, STEPS, both, piece, pieces, share, steps


class ReduceScatterGroup(MultiNodeGroup):
    """One rank's place in its node's group; see `MultiNodeGroup` for the other arguments.

    Args:
        bucket: the most bytes that a node sends, and receives, at a time.
    """

    def __init__(
        self,
        nodes: Sequence[Sequence[int]],
        rank: int,
        buffers: PeerBuffers,
        parts: Sequence[Tensor],
        barrier: Barrier,
        spec: BufferSpec,
        leaders: LeaderGroup | None,
        bucket: int,
    ) -> None:
        super().__init__(nodes, rank, buffers, parts, barrier, spec, leaders)
        self.max_elements = bucket_length(bucket, spec, len(nodes))
        told, window, outbox = parts[3:]
        self._told = told.view(spec.dtype)
        self._window, self._outbox = window.view(FLIGHT + 1, len(nodes) - 1, -1), outbox.view(FLIGHT + 1, len(nodes), -1)
        self._pushes: list[Begin] = []
        self._pulls: list[Begin] = []
        codec = spec.codec
        self._feedback = ErrorFeedback(codec)
        self._changes = codec.bytes(1) < spec.model.itemsize  # of the weights come back, not the weights
        self._pulled = codec.wire if self._changes else spec.model
        self._stages_push = buffers.staged or not codec.exact
        self._stages_pull = buffers.staged or self._changes
        self.rounded = self.rounded or self._changes

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """See `NodeGroup`."""
        super().serve(buckets, behind)
        counts = [len(ranks) for ranks in self.nodes]
        by_bucket = [steps(bucket, counts, self.max_elements) for bucket in buckets]
        served = [slices for slices, of_bucket in zip(self.slices, by_bucket, strict=True) for _ in of_bucket]
        self.pull_steps = [step for of_bucket in by_bucket for step in of_bucket]  # the first layers are needed first
        self.push_steps = [step for of_bucket in reversed(by_bucket) for step in of_bucket]  # the last have gradients first
        self._pull_served, self._push_served = served, served[::-1]  # for each step, this rank's slice of its bucket
        if self._leaders:
            self._pushes = [self._leaders.persistent_sendrecv(*self._sums(*each)) for each in enumerate(self.push_steps)]
            self._pulls = [self._leaders.persistent_sendrecv(*self._weights(*each)) for each in enumerate(self.pull_steps)]

    def reduce(self, weight: float, heard: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """See `NodeGroup`; here everybody hears the tails."""
        self.sample_weights[self.buffers.place] = weight

        def before(number: int, step: list[slice]) -> None:
            if self.spec.overlap or not number:
                if ready:
                    ready.wait(number, self._progress)
                self.barrier(self._progress)
            self._add(number, step, work)

        self._travel(self.push_steps, before, self._pushes, lambda number, step: self._join(number, step, work))
        if ready:
            ready.wait(len(self.push_steps), self._progress)
        self._arrive(self._progress)
        if self._leaders:
            self.buffers.sum_tails(self._told)
            self._leaders.allreduce(self._told)
        self._release()
        behind = slice(self.spec.gradients, self.spec.tail)
        heard.copy_(self._told[behind.stop - behind.start :])
        if self.leads:
            self.combined[behind].copy_(self._told[: behind.stop - behind.start])
        for span in self.spans:
            work.finalize(span, self.combined[span])

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

    def _theirs(self, span: slice) -> list[slice]:
        """This rank's share of a slice that another node serves; a GPU works on it while its leader sends and receives."""
        if not self.buffers.staged:
            return self._by_hand(span)
        return pieces(share(span, self.buffers.place, len(self.members)), piece(self.spec.device))

    def _ours(self, span: slice, served: slice) -> list[slice]:
        """This rank's share of a slice that its own node serves; on a GPU what it serves itself."""
        return pieces(both(span, served), piece(self.spec.device)) if self.buffers.staged else self._by_hand(span)

    def _add(self, number: int, step: list[slice], work: SliceReducer) -> None:
        for node, span in enumerate(step):
            ours = node == self._node
            for part in self._ours(span, self._push_served[number]) if ours else self._theirs(span):
                rows = self.buffers.rows_of(part)
                work.reduce_local(part, rows)
                if ours:
                    self.buffers.store(part, rows[0])
                elif self._stages_push:
                    self.spec.codec.encode(rows[0], self._slot(self._outbox, number, node, span, part))

    def _sums(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """Each other node's slice goes there; what comes is the others' sums of this node's."""
        own = step[self._node]
        sent = [
            (node, self._leaving(number, node, step[node])) for node in self._others() if step[node].start < step[node].stop
        ]
        taken = [(node, self._slot(self._window, number, self._seat(node), own, own)) for node in self._others()]
        return sent, taken if own.start < own.stop else []

    def _leaving(self, number: int, node: int, span: slice) -> Tensor:
        return self._slot(self._outbox, number, node, span, span) if self._stages_push else self.combined[span]

    def _join(self, number: int, step: list[slice], work: SliceReducer) -> None:
        own = step[self._node]
        for part in self._ours(own, self._push_served[number]):
            come = [self._slot(self._window, number, self._seat(node), own, part) for node in self._others()]
            sums = [self.spec.codec.decode(encoded, self.spec.device) for encoded in come]
            work.reduce_remote(part, [*sums[: self._node], self.combined[part], *sums[self._node :]])

    def _others(self) -> list[int]:
        return [node for node in range(len(self.nodes)) if node != self._node]

    def _seat(self, node: int) -> int:
        """Where in the window what comes from a node lies."""
        return node - (node > self._node)

    def _slot(
        self, memory: Tensor, number: int, row: int, span: slice, part: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Where a part of a step's span lies in the window or the outbox; of the wire's dtype unless another is given."""
        dtype = dtype or self.spec.codec.wire
        start, stop = ((at - span.start) * dtype.itemsize for at in (part.start, part.stop))
        return memory[number % (FLIGHT + 1), row, start:stop].view(dtype)

    def report(self, values: Tensor, op: Op) -> Tensor:
        """See `NodeGroup`."""
        reported = super().report(values, op)
        if self._leaders:
            self._leaders.reduce(reported, op)
        return reported

    def decide(self, answer: Tensor) -> None:
        """See `NodeGroup`."""
        if self._leaders:
            self._leaders.broadcast(answer.view(torch.uint8))
        super().decide(answer)

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """See `NodeGroup`.

        Raises:
            ValueError: weights are given, which other nodes do not expect.
        """
        if whole:
            raise ValueError(
                "weights were given to send to all ranks, while each node sends those that it has stepped; expected none, or "
                "plan=root, or shared_memory=False"
            )
        direct = moved and not self._stages_pull
        for span in self.slices if direct else []:
            self._show(span)
        self._arrive()
        if self.leads:
            fill()
        for part in self._around():
            self._tell(part)
        if self._leaders and direct:
            for finish in [begin() for begin in self._pulls]:
                finish()
        self._release()
        if moved and self._stages_pull:
            self._travel(self.pull_steps, self._give, self._pulls, self._follow)
            self.barrier()

    def _weights(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """What becomes of this node's slice goes to all others; theirs come."""

        def lies(memory: Tensor, row: int, span: slice) -> Tensor:
            return self._slot(memory, number, row, span, span, self._pulled) if self._stages_pull else self.weights[span]

        own, others = step[self._node], self._others()
        given = lies(self._outbox, self._node, own)
        taken = [(node, lies(self._window, self._seat(node), step[node])) for node in others]
        return [(node, given) for node in others if len(given)], [(node, room) for node, room in taken if len(room)]

    def _give(self, number: int, step: list[slice]) -> None:
        """What this rank has stepped leaves, and is the model's on this node."""
        own = step[self._node]
        for part in pieces(both(own, self._pull_served[number]), piece(self.spec.device)):
            out = self._slot(self._outbox, number, self._node, own, part, self._pulled)
            if self._changes:
                self._feedback.encode(self.stepped(part), self.weights[part], out)
                self.buffers.copy_to_peers(self.spec.bytes_of(part))
            else:
                self._show(part)
                out.copy_(self.weights[part], non_blocking=True)

    def _follow(self, number: int, step: list[slice]) -> None:
        """What the other nodes' ranks have stepped has come."""
        for node in self._others():
            for part in self._theirs(step[node]):
                come = self._slot(self._window, number, self._seat(node), step[node], part, self._pulled)
                if self._changes:
                    self._feedback.decode(come, self.weights[part])
                else:
                    self.weights[part].copy_(come, non_blocking=True)
                self.buffers.copy_to_peers(self.spec.bytes_of(part))


def bucket_length(bucket: int, spec: BufferSpec, nodes: int) -> int:
    """How many elements a node sends each other at a time, if it is to send at most `bucket` bytes to all of them."""
    sent = spec.codec.bytes(spec.gradients) * (nodes - 1) // nodes
    most = min(bucket, EARLY if spec.overlap else BUCKET, max(SMALLEST, sent // STEPS))
    return max(LEAST, most // spec.codec.bytes(1) // (nodes - 1))


def sizes(spec: BufferSpec, ranks: int, nodes: int, bucket: int, staged: bool = False) -> list[int]:
    """The bytes of the parts of a group of `ranks` ranks, one of `nodes`, its board `staged` or not; see `MultiNodeGroup`."""
    each = (FLIGHT + 1) * spec.codec.bytes(bucket_length(bucket, spec, nodes))
    told = (spec.numel - spec.gradients) * spec.dtype.itemsize
    stages = staged or not spec.codec.exact
    return [*multi_node.sizes(spec, ranks), told, (nodes - 1) * each, nodes * each if stages else 0]
