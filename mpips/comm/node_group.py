"""A round in memory that the ranks of a node share: within the node, nothing is sent.

The push messages lie beside each other, one row for each rank. There is one pull message, whose weights are the parameters of
every rank. A barrier separates the phases of a round: all ranks arrive at the leader, the node's first rank, which then
releases them.

| call      | barrier                               | then                                                              |
|-----------|---------------------------------------|-------------------------------------------------------------------|
| reduce    | arrive, release: pushes are written   | each rank combines the slices it serves, in the leader's row      |
| report    | arrive: all slices are combined       | the leader decides                                                |
| decide    | release                               | each rank steps its slices of the weights                         |
| broadcast | arrive: all slices are stepped        | the leader writes the rest of the pull message                    |
|           | release                               | each rank computes on, and writes its next push message           |

If the leader serves all slices, only it waits: `reduce` arrives, `broadcast` releases, and nothing comes between.
On several nodes each node has a group of its own: `mpips.comm.multi_node`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mpips.comm.codecs import Codec
from mpips.comm.peer_buffers import PeerBuffers, Rows
from mpips.model.flat import ALIGNMENT
from mpips.model.layout import piece, pieces

Op = Literal["min", "sum"]
HOST = torch.device("cpu")


@dataclass(frozen=True)
class BufferSpec:
    """The size and layout of a node group's shared buffers.

    Attributes:
        numel, dtype: the push message's number of elements and dtype.
        tail: the index of the first element of its tail; the body in front of it is cut into slices.
        pull: the size of the pull message, in bytes.
        weights: the pull message's bytes that hold the weights.
        model: the dtype of the weights.
        lines: the largest number of values that a rank reports.
        answer: the number of values in the server's decision.
        sharded: whether other ranks than the server's serve slices, too.
        between: whether there may be groups on several nodes, each of which first sums its own push messages.
        codec: how weights and gradients are encoded between nodes.
        overlap: whether slices travel between nodes before all gradients are computed.
        device: where the messages lie.
    """

    numel: int
    dtype: torch.dtype
    tail: int
    pull: int
    weights: slice
    model: torch.dtype
    lines: int
    answer: int
    sharded: bool
    between: bool
    codec: Codec
    overlap: bool = False
    device: torch.device = HOST

    @property
    def gradients(self) -> int:
        """The number of gradients at the beginning of a push message, which is the number of weights."""
        return int(self.weights.stop - self.weights.start) // self.model.itemsize

    def bytes_of(self, part: slice) -> slice:
        """Return the bytes of the pull message that hold the slice `part` of the weights."""
        start, size = self.weights.start, self.model.itemsize
        return slice(start + part.start * size, start + part.stop * size)

    @property
    def row(self) -> int:
        """The size of a push message in bytes, rounded up so that the next row is aligned."""
        return -(-self.numel * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def messages(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the push messages in `rows`, uint8 tensors."""
        return [row.view(self.dtype)[: self.numel] for row in rows]

    def sizes(self, ranks: int) -> list[int]:
        """Return the sizes in bytes of a group's buffers: all push messages, the pull message, the reports, the decision."""
        return [ranks * self.row, self.pull, ranks * self.lines * 8, self.answer * 8]


class Barrier(Protocol):
    """The barrier of a group, in two halves: always `arrive`, then `release`.

    Attributes:
        leads: whether this rank is the leader.
        absent: the dead ranks that had not arrived when all others had, at the leader.
    """

    leads: bool
    absent: Set[int]

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Announce that this rank has arrived. The leader waits until all ranks have, and calls `meanwhile` while it waits."""

    def release(self) -> None:
        """Release the other ranks, at the leader; elsewhere, wait for the release."""


class SliceReducer(Protocol):
    """The reduction of slices, called by a group.

    Attributes:
        faults: `(lines,)` float64, by rank: the index of the first tensor in which a contribution is not finite; infinite if
            there is none.
    """

    faults: Tensor

    def reduce_local(self, part: slice, rows: Rows) -> None:
        """Reduce one slice over the ranks of this group, each rank's row times its weight, in the memory of the first row.

        Args:
            part: the slice of the push message's body.
            rows: each rank's elements, in its own memory.
        """

    def reduce_remote(self, part: slice, sums: Sequence[Tensor]) -> None:
        """Reduce the results of `reduce_local` over all groups, in the memory of this group's result.

        Args:
            part: the slice of the push message's body.
            sums: the results by node; this group's is its first row. The others must not be changed.
        """

    def report_nonfinite(self, faults: Tensor) -> None:
        """Write the faults of this node's ranks into this rank's tail, which holds the sum of the node's tails."""

    def finalize(self, part: slice, total: Tensor) -> None:
        """Apply the rule to the sum of one slice; all tails have been summed by now."""


class BucketReadiness(Protocol):
    """The gradients that are complete during backward; see `NodeGroup.reduce`."""

    def wait(self, step: int, meanwhile: Callable[[], object] | None) -> None:
        """Wait until the gradients of `step` are complete; for a step behind the last gradients, until the tail is written."""


class NodeGroup:
    """One rank's end of a node's group.

    Args:
        members: the ranks that share the memory, in order.
        rank: this rank.
        buffers: their messages.
        parts: further shared memory, as in the sizes of `BufferSpec.sizes` after those of the messages.
        barrier: the barrier of the members.
        spec: the size and layout of the buffers.

    Attributes:
        weights: `(numel,)`, the model's weights, in the pull message.
        leads: whether this rank is the server's.
        nodes: the ranks of each node.
        slices: the slices of the weights that this rank serves, one of each bucket.
        spans: the parts of the push message's body that this rank serves, in pieces.
        sharded: whether other ranks than the server's serve slices, too.
        max_elements: the largest number of elements of a bucket that a node serves.
        sample_weights: the members' weights, which they share before the tails, on several nodes; else empty.
        rounded: whether the step is taken on master weights, from which the model's weights are rounded.
    """

    def __init__(
        self,
        members: Sequence[int],
        rank: int,
        buffers: PeerBuffers,
        parts: Sequence[Tensor],
        barrier: Barrier,
        spec: BufferSpec,
    ) -> None:
        self.members, self.rank, self.buffers, self.spec = members, rank, buffers, spec
        self.nodes = [list(members)]
        reports, answer = parts[:2]
        self._reports, self._answer = reports.view(torch.float64).view(len(members), -1), answer.view(torch.float64)
        self._barrier, self._arrived = barrier, False
        self._cleared: set[int] = set()  # the dead ranks whose messages are zero
        self.leads = rank == 0
        self.weights = buffers.pull[spec.weights].view(spec.model)
        self._masters: list[Tensor] = []
        self.slices: list[slice] = []
        self.spans: list[slice] = []
        self.sharded = spec.sharded
        self.rounded = spec.sharded and spec.model != spec.dtype
        self._plain = not (self.rounded or buffers.staged)  # the stepped memory is the one that all ranks see
        self.max_elements, self.sample_weights = spec.numel, torch.empty(0)

    @property
    def combined(self) -> Tensor:
        """The memory of the combined gradients; see `PeerBuffers`."""
        return self.buffers.combined

    def stepped(self, part: slice) -> Tensor:
        """Return the weights to be stepped, master weights if there are any, of a slice that this rank serves."""
        if not self.rounded:
            return self.weights[part]
        bucket = bisect_right([span.start for span in self.slices], part.start) - 1
        first = self.slices[bucket].start
        return self._masters[bucket][part.start - first : part.stop - first]

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """Assign the slices to the ranks.

        Args:
            buckets: for each bucket, the slice of each rank, node by node; of the weights, and of the gradients.
            behind: the part of the body behind the gradients, which the server serves.
        """
        place = [rank for node in self.nodes for rank in node].index(self.rank)
        self.slices = [bucket[place] for bucket in buckets]
        self.spans = [part for span in self.slices for part in pieces(span, piece(self.spec.device))]
        if self.leads and behind.start < behind.stop:
            self.spans.append(behind)
        if self.rounded:
            self._masters = [self.weights[span].to(self.spec.dtype, copy=True) for span in self.slices]
        self.buffers.assign(buckets)

    def barrier(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Wait until all members have called this; see `Barrier`."""
        self._arrive(meanwhile)
        self._release()

    def reduce(self, weight: float, tail_sum: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """Reduce the push messages, which every rank has written.

        At the server, and on ranks that serve slices, the sum of all tails is written to `tail_sum`. Then `work` reduces and
        finalizes the slices that this rank serves.

        Args:
            weight: this rank's weight, which on several nodes is needed before the tails are summed.
            tail_sum: receives the sum of the tails.
            work: reduces the slices.
            ready: tells when gradients are complete, if buckets travel during backward.
        """
        self._arrive()
        for rank in self._barrier.absent - self._cleared if self._barrier.absent else ():
            self.buffers.rows[rank].zero_()  # what was half written
            self._cleared.add(rank)
        if self.sharded:
            self._release()
        if not self.spans and not self.leads:
            return
        self.buffers.sum_tails(tail_sum)
        self.combine(work)

    def combine(self, work: SliceReducer) -> None:
        """Let `work` reduce the slices that this rank serves. May be called once more after `reduce`."""
        for span in self.spans:
            rows = self.buffers.rows_of(span)
            work.reduce_local(span, rows)
            work.finalize(span, rows[0])
            self.buffers.store(span, rows[0])

    def report(self, values: Tensor, op: Op) -> Tensor:
        """Reduce every rank's `values`, `(lines,)` float64, by minimum or sum. All slices have been combined.

        Returns:
            The reduced values, at the server; elsewhere they mean nothing.
        """
        if not self.sharded:
            return values
        self._reports[self.buffers.place].copy_(values)
        self._arrive()
        return self._reports.amin(0) if op == "min" else self._reports.sum(0)

    def decide(self, answer: Tensor) -> None:
        """Copy the server's `answer`, float64 of constant length, to every rank's `answer`; called after `report`."""
        if not self.sharded:
            return
        if self._barrier.leads:
            self._answer.copy_(answer)
        self._release()
        answer.copy_(self._answer)

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """Complete the pull message for all ranks; each has stepped its slices and no longer reads the old message.

        Args:
            fill: completes the pull message, at the server.
            moved: whether slices have been stepped.
            whole: whether `fill` writes weights, too.
        """
        for span in self.slices if moved and not self._plain else []:
            self._publish(span)
        if not self._arrived:
            self._arrive()
        if self.leads:
            fill()
            for part in [] if self._plain else [slice(None)] if whole else self._around():
                self.buffers.copy_to_peers(part)
        self._release()

    def _publish(self, span: slice) -> None:
        """Make the stepped weights of a slice the model's, on this node."""
        if self.rounded:
            self.weights[span].copy_(self.stepped(span))
        self.buffers.copy_to_peers(self.spec.bytes_of(span))

    def _around(self) -> list[slice]:
        """Return the parts of the pull message around the weights."""
        where = self.spec.weights
        return [slice(0, where.start), slice(where.stop, None)]

    def _arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        self._barrier.arrive(meanwhile)
        self._arrived = True

    def _release(self) -> None:
        self._arrived = False
        self._barrier.release()
