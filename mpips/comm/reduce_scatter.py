"""Node groups in which every node serves a slice of each bucket, by a reduce-scatter and an allgather of the leaders.

Each node serves a slice of each bucket of the body, and each of its ranks a part of that slice. A round:

| call      | on a node, bucket by bucket                 | between the leaders                            |
|-----------|---------------------------------------------|------------------------------------------------|
| reduce    | sum the push messages; add the sums of      | reduce-scatter: send each node the sum of the  |
|           | other nodes that have arrived               | slice that it serves                           |
|           | turn sums into means                        | Allreduce of the tails                         |
| report    | as in one group                             | Reduce of the reports, by minimum or sum       |
| decide    | as in one group                             | Bcast of the server's decision                 |
| broadcast |                                             | Bcast of the pull message without the weights  |
|           | copy to and from staging buffers, if staged | allgather of the stepped slices                |

While some buckets travel, in all directions at once, the ranks sum the next bucket and add what has arrived. A leader with
other ranks on its node does not add; it sends and receives. Each node sends and receives 2(N-1)/N times the bytes of the model
in a round, the least that is possible for N nodes.

Messages that are encoded, or lie on GPUs, are staged: the ranks copy what they send to an outbox, and take what arrives from a
window, while other buckets are under way.

With a codec that is not exact (`mpips.comm.codecs`) sums are encoded before they are sent and decoded before they are added.
The allgather then carries the changes of the weights, encoded with error feedback. So the weights are the same on all nodes,
and differ from their owner's master weights by no more than the rounding of the last change. 16-bit weights are sent as they
are.
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
    """One rank's end of its node's group; see `MultiNodeGroup` for the other arguments.

    Args:
        bucket: the largest number of bytes that a node sends, and receives, at a time.
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
        tails, window, outbox = parts[3:]
        self._tail_sum = tails.view(spec.dtype)
        self._window, self._outbox = window.view(FLIGHT + 1, len(nodes) - 1, -1), outbox.view(FLIGHT + 1, len(nodes), -1)
        self._pushes: list[Begin] = []
        self._pulls: list[Begin] = []
        codec = spec.codec
        self._feedback = ErrorFeedback(codec)
        self._changes = codec.bytes(1) < spec.model.itemsize  # changes of the weights travel, not the weights
        self._pulled = codec.wire if self._changes else spec.model
        self._stages_push = buffers.staged or not codec.exact
        self._stages_pull = buffers.staged or self._changes
        self.rounded = self.rounded or self._changes

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """Assign the slices, and prepare the transfers between the leaders; see `NodeGroup`."""
        super().serve(buckets, behind)
        counts = [len(ranks) for ranks in self.nodes]
        by_bucket = [steps(bucket, counts, self.max_elements) for bucket in buckets]
        served = [slices for slices, of_bucket in zip(self.slices, by_bucket, strict=True) for _ in of_bucket]
        self.pull_steps = [step for of_bucket in by_bucket for step in of_bucket]  # forward needs the first layers first
        self.push_steps = [step for of_bucket in reversed(by_bucket) for step in of_bucket]  # backward, the last ones
        self._pull_served, self._push_served = served, served[::-1]  # for each step, this rank's slice of its bucket
        if self._leaders:
            self._pushes = [
                self._leaders.persistent_sendrecv(*self._reduce_scatter_parts(*numbered))
                for numbered in enumerate(self.push_steps)
            ]
            self._pulls = [
                self._leaders.persistent_sendrecv(*self._allgather_parts(*numbered)) for numbered in enumerate(self.pull_steps)
            ]

    def reduce(self, weight: float, tail_sum: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """Reduce bucket by bucket while other buckets travel; every rank gets the sum of the tails. See `NodeGroup`."""
        self.sample_weights[self.buffers.place] = weight

        def before(number: int, step: list[slice]) -> None:
            if self.spec.overlap or not number:
                if ready:
                    ready.wait(number, self._progress)
                self.barrier(self._progress)
            self._sum_step(number, step, work)

        self._pipeline(self.push_steps, before, self._pushes, lambda number, step: self._add_received(number, step, work))
        if ready:
            ready.wait(len(self.push_steps), self._progress)
        self._arrive(self._progress)
        if self._leaders:
            self.buffers.sum_tails(self._tail_sum)
            self._leaders.allreduce(self._tail_sum)
        self._release()
        behind = slice(self.spec.gradients, self.spec.tail)
        tail_sum.copy_(self._tail_sum[behind.stop - behind.start :])
        if self.leads:
            self.combined[behind].copy_(self._tail_sum[: behind.stop - behind.start])
        for span in self.spans:
            work.finalize(span, self.combined[span])

    def _pipeline(
        self,
        plan: list[list[slice]],
        before: Callable[[int, list[slice]], None],
        begin: Sequence[Begin],
        after: Callable[[int, list[slice]], None],
    ) -> None:
        """Run the steps of a pipeline: all ranks call `before`, leaders send and receive, all ranks call `after`.

        Args:
            plan: for each step, the slice of each node.
            before: called with a step's number and slices before the step travels.
            begin: starts the transfer of each step, at the leaders.
            after: called with a step's number and slices when the step has arrived, FLIGHT steps later.
        """
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

    def _remote_share(self, span: slice) -> list[slice]:
        """Return this rank's share of a slice that another node serves; on GPUs the leader has one, too."""
        if not self.buffers.staged:
            return self._own_share(span)
        return pieces(share(span, self.buffers.place, len(self.members)), piece(self.spec.device))

    def _local_share(self, span: slice, served: slice) -> list[slice]:
        """Return this rank's share of a slice that its own node serves; on a GPU, the part that this rank serves itself."""
        return pieces(both(span, served), piece(self.spec.device)) if self.buffers.staged else self._own_share(span)

    def _sum_step(self, number: int, step: list[slice], work: SliceReducer) -> None:
        for node, span in enumerate(step):
            ours = node == self._node
            for part in self._local_share(span, self._push_served[number]) if ours else self._remote_share(span):
                rows = self.buffers.rows_of(part)
                work.reduce_local(part, rows)
                if ours:
                    self.buffers.store(part, rows[0])
                elif self._stages_push:
                    self.spec.codec.encode(rows[0], self._slot(self._outbox, number, node, span, part))

    def _reduce_scatter_parts(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """Return what a step's reduce-scatter sends to each other node, and the buffers for what it receives."""
        own = step[self._node]
        sent = [
            (node, self._to_send(number, node, step[node])) for node in self._others() if step[node].start < step[node].stop
        ]
        taken = [(node, self._slot(self._window, number, self._window_row(node), own, own)) for node in self._others()]
        return sent, taken if own.start < own.stop else []

    def _to_send(self, number: int, node: int, span: slice) -> Tensor:
        return self._slot(self._outbox, number, node, span, span) if self._stages_push else self.combined[span]

    def _add_received(self, number: int, step: list[slice], work: SliceReducer) -> None:
        own = step[self._node]
        for part in self._local_share(own, self._push_served[number]):
            received = [self._slot(self._window, number, self._window_row(node), own, part) for node in self._others()]
            sums = [self.spec.codec.decode(encoded, self.spec.device) for encoded in received]
            work.reduce_remote(part, [*sums[: self._node], self.combined[part], *sums[self._node :]])

    def _others(self) -> list[int]:
        return [node for node in range(len(self.nodes)) if node != self._node]

    def _window_row(self, node: int) -> int:
        """Return the row of the window that holds what comes from a node."""
        return node - (node > self._node)

    def _slot(
        self, memory: Tensor, number: int, row: int, span: slice, part: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the memory of a part of a step's span in the window or the outbox; of the codec's dtype by default."""
        dtype = dtype or self.spec.codec.wire
        start, stop = ((at - span.start) * dtype.itemsize for at in (part.start, part.stop))
        return memory[number % (FLIGHT + 1), row, start:stop].view(dtype)

    def report(self, values: Tensor, op: Op) -> Tensor:
        """Reduce the reports over all nodes; see `NodeGroup`."""
        reported = super().report(values, op)
        if self._leaders:
            self._leaders.reduce(reported, op)
        return reported

    def decide(self, answer: Tensor) -> None:
        """Copy the server's answer to the ranks of all nodes; see `NodeGroup`."""
        if self._leaders:
            self._leaders.broadcast(answer.view(torch.uint8))
        super().decide(answer)

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """Broadcast the control and the buffers, and allgather the stepped slices; see `NodeGroup`.

        Raises:
            ValueError: `whole` is set: other nodes do not expect weights from the server.
        """
        if whole:
            raise ValueError(
                "weights were given to send to all ranks, while each node sends those that it has stepped; expected none, or "
                "plan=root, or shared_memory=False"
            )
        direct = moved and not self._stages_pull
        for span in self.slices if direct else []:
            self._publish(span)
        self._arrive()
        if self.leads:
            fill()
        for part in self._around():
            self._broadcast_pull(part)
        if self._leaders and direct:
            for finish in [begin() for begin in self._pulls]:
                finish()
        self._release()
        if moved and self._stages_pull:
            self._pipeline(self.pull_steps, self._give, self._pulls, self._follow)
            self.barrier()

    def _allgather_parts(self, number: int, step: list[slice]) -> tuple[Sent, Sent]:
        """Return what a step's allgather sends to each other node, and the buffers for what it receives."""

        def lies(memory: Tensor, row: int, span: slice) -> Tensor:
            return self._slot(memory, number, row, span, span, self._pulled) if self._stages_pull else self.weights[span]

        own, others = step[self._node], self._others()
        given = lies(self._outbox, self._node, own)
        taken = [(node, lies(self._window, self._window_row(node), step[node])) for node in others]
        return [(node, given) for node in others if len(given)], [(node, room) for node, room in taken if len(room)]

    def _give(self, number: int, step: list[slice]) -> None:
        """Copy what this rank has stepped to the outbox and to the model's weights on this node."""
        own = step[self._node]
        for part in pieces(both(own, self._pull_served[number]), piece(self.spec.device)):
            out = self._slot(self._outbox, number, self._node, own, part, self._pulled)
            if self._changes:
                self._feedback.encode(self.stepped(part), self.weights[part], out)
                self.buffers.copy_to_peers(self.spec.bytes_of(part))
            else:
                self._publish(part)
                out.copy_(self.weights[part], non_blocking=True)

    def _follow(self, number: int, step: list[slice]) -> None:
        """Copy what other nodes have stepped from the window to the model's weights on this node."""
        for node in self._others():
            for part in self._remote_share(step[node]):
                received = self._slot(self._window, number, self._window_row(node), step[node], part, self._pulled)
                if self._changes:
                    self._feedback.decode(received, self.weights[part])
                else:
                    self.weights[part].copy_(received, non_blocking=True)
                self.buffers.copy_to_peers(self.spec.bytes_of(part))


def bucket_length(bucket: int, spec: BufferSpec, nodes: int) -> int:
    """Return the number of elements that a node sends each other node at a time.

    Args:
        bucket: the largest number of bytes that a node sends to all other nodes at a time.
        spec: the size and layout of the buffers.
        nodes: the number of nodes.
    """
    sent = spec.codec.bytes(spec.gradients) * (nodes - 1) // nodes
    most = min(bucket, EARLY if spec.overlap else BUCKET, max(SMALLEST, sent // STEPS))
    return max(LEAST, most // spec.codec.bytes(1) // (nodes - 1))


def sizes(spec: BufferSpec, ranks: int, nodes: int, bucket: int, staged: bool = False) -> list[int]:
    """Return the sizes in bytes of the shared memory of one of `nodes` groups, with `ranks` ranks; see `MultiNodeGroup`.

    Args:
        spec: the size and layout of the buffers.
        ranks: the number of ranks of this node.
        nodes: the number of nodes.
        bucket: as in `bucket_length`.
        staged: whether the messages lie on GPUs.
    """
    slot = (FLIGHT + 1) * spec.codec.bytes(bucket_length(bucket, spec, nodes))
    tails = (spec.numel - spec.gradients) * spec.dtype.itemsize
    stages = staged or not spec.codec.exact
    return [*multi_node.sizes(spec, ranks), tails, (nodes - 1) * slot, nodes * slot if stages else 0]
