"""A round in memory that the ranks of a node share: inside it nothing is sent.

The push messages lie beside each other, row by row, and the pull message is there once: its weights are the parameters of every
rank. What each rank may touch changes when all have arrived and the leader, the node's first rank, has let them go on:

| step    | arrive, release          | then                                                                                   |
|---------|--------------------------|----------------------------------------------------------------------------------------|
| reduce  | every push is written    | whoever serves slices combines theirs, in place, in the leader's row                   |
| report  | arrive                   | every slice is combined; the leader judges                                             |
| decide  | release                  | each rank steps its slices of the weights                                              |
| broadcast|every slice is stepped   | the leader fills in the rest, releases; each rank computes on, and writes its push     |

If the leader serves all slices it alone is waited for: `reduce` arrives, `broadcast` releases, nothing comes between.
Several nodes have a group each: `mpips.comm.multi_node`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
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
    """What a group's memory is to hold.

    Attributes:
        numel, dtype: of a push message.
        tail: where its tail begins; the body, left of it, is cut into slices.
        pull: bytes of the pull message.
        weights: where in these the weights are.
        model: the weights' dtype.
        lines: most numbers that a rank reports.
        answer: numbers in the server's verdict.
        together: whether other ranks than the server's serve slices, too.
        between: whether there may be rooms on several nodes, each adding up its own push messages first.
        codec: how weights and gradients are encoded between nodes.
        overlap: whether slices travel between nodes before all gradients are there.
        device: where the messages are.
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
        """How many elements of a push message are gradients, the first ones: as many as there are weights."""
        return int(self.weights.stop - self.weights.start) // self.model.itemsize

    def bytes_of(self, part: slice) -> slice:
        """Where in the pull message a slice of the weights is."""
        start, size = self.weights.start, self.model.itemsize
        return slice(start + part.start * size, start + part.stop * size)

    @property
    def row(self) -> int:
        """Bytes of a push message, such that what lies behind it is aligned, too."""
        return -(-self.numel * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def messages(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Push messages in rows of bytes."""
        return [row.view(self.dtype)[: self.numel] for row in rows]

    def sizes(self, ranks: int) -> list[int]:
        """The bytes of the parts that every group has, for so many ranks: push messages, pull message, reports, answer."""
        return [ranks * self.row, self.pull, ranks * self.lines * 8, self.answer * 8]


class Barrier(Protocol):
    """How the ranks of a group wait for each other: always `arrive`, then `release`.

    Attributes:
        leads: whether this rank is the leader.
    """

    leads: bool

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """This rank has come; the leader waits until all have, and calls `meanwhile` while it does."""

    def release(self) -> None:
        """The leader lets the others go on, who wait for that."""


class SliceReducer(Protocol):
    """What is done with slices of the push messages.

    Attributes:
        faults: `(lines,)` float64, what is wrong with those that have been added: a number by rank, infinite where nothing is.
    """

    faults: Tensor

    def reduce_local(self, part: slice, rows: Rows) -> None:
        """The group's pushes, times their weights, become one, in the memory of the first.

        Args:
            part: which slice of the body.
            rows: each rank's, its own memory.
        """

    def reduce_remote(self, part: slice, sums: Sequence[Tensor]) -> None:
        """What came of `reduce_local` in every group becomes one, in the memory of this group's.

        Args:
            part: which slice of the body.
            sums: by node, to be left as they are; this group's first row is one of them.
        """

    def report_nonfinite(self, faults: Tensor) -> None:
        """Write what is wrong on this node into this rank's tail, which is to speak for all of them."""

    def finalize(self, part: slice, total: Tensor) -> None:
        """The sum becomes the mean; all tails have been heard."""


class BucketReadiness(Protocol):
    """Which gradients are there; see `NodeGroup.reduce`."""

    def wait(self, step: int, meanwhile: Callable[[], object] | None) -> None:
        """Until those that this step is about are; steps behind the last gradient wait for the tail."""


class NodeGroup:
    """One rank's place in it.

    Args:
        members: the ranks that share it, in order.
        rank: this one.
        board: their messages.
        parts: further memory that they share, as `BufferSpec.sizes` has it behind the messages.
        meeting: how they wait for each other.
        contents: what it holds.

    Attributes:
        weights: `(numel,)`, the model's, in the pull message.
        leads: whether this rank is the server's.
        nodes: the ranks of each node.
        slices: what this rank serves of the weights, one of each bucket.
        spans: what it serves of the push message's body, in pieces.
        together: whether other ranks than the server's serve slices, too.
        each: the most elements of a bucket that a node is to serve.
        said: the weights of the group's ranks, where they are told before the tails.
        rounded: whether the weights that are stepped are not the model's, but these are rounded from them.
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
        self.leads = rank == 0
        self.weights = buffers.pull[spec.weights].view(spec.model)
        self._masters: list[Tensor] = []
        self.slices: list[slice] = []
        self.spans: list[slice] = []
        self.sharded = spec.sharded
        self.rounded = spec.sharded and spec.model != spec.dtype
        self._plain = not (self.rounded or buffers.staged)  # what is stepped is what all ranks see
        self.max_elements, self.sample_weights = spec.numel, torch.empty(0)

    @property
    def combined(self) -> Tensor:
        """Where what is combined lies; see `PeerBuffers`."""
        return self.buffers.combined

    def stepped(self, part: slice) -> Tensor:
        """A slice, served by this rank, of the weights that are stepped."""
        if not self.rounded:
            return self.weights[part]
        bucket = bisect_right([span.start for span in self.slices], part.start) - 1
        first = self.slices[bucket].start
        return self._masters[bucket][part.start - first : part.stop - first]

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """Deal out the slices.

        Args:
            buckets: for each a slice of the weights and gradients for each rank, node by node.
            behind: what of the body lies behind the gradients; it is the server's.
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
        """Wait until all of the group are here; see `Barrier`."""
        self._arrive(meanwhile)
        self._release()

    def reduce(self, weight: float, heard: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """Every push message is written.

        At the server, and where slices are served, the sum of all tails lands in `heard`. Then `work` is done: added, finished.

        Args:
            weight: this rank's, if others need it before they have heard the tails.
            heard: for the tail.
            work: what is done with slices.
            ready: says when, where slices travel before all is written.
        """
        self._arrive()
        if self.sharded:
            self._release()
        if not self.spans and not self.leads:
            return
        self.buffers.sum_tails(heard)
        self.combine(work)

    def combine(self, work: SliceReducer) -> None:
        """Let `work` combine the slices that this rank serves; after `reduce`, let it do so once more."""
        for span in self.spans:
            rows = self.buffers.rows_of(span)
            work.reduce_local(span, rows)
            work.finalize(span, rows[0])
            self.buffers.store(span, rows[0])

    def report(self, values: Tensor, op: Op) -> Tensor:
        """Every slice is combined: the least, or the sum, of every rank's numbers, `(lines,)` of float64, at the server."""
        if not self.sharded:
            return values
        self._reports[self.buffers.place].copy_(values)
        self._arrive()
        return self._reports.amin(0) if op == "min" else self._reports.sum(0)

    def decide(self, answer: Tensor) -> None:
        """After `report`: the server's numbers, float64 of always the same length, land in everybody's `answer`."""
        if not self.sharded:
            return
        if self._barrier.leads:
            self._answer.copy_(answer)
        self._release()
        answer.copy_(self._answer)

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """Every rank has done with the pull message as it was, and stepped its slices.

        Args:
            fill: completes it, at the server.
            moved: whether slices have been stepped.
            whole: whether `fill` writes weights, too.
        """
        for span in self.slices if moved and not self._plain else []:
            self._show(span)
        if not self._arrived:
            self._arrive()
        if self.leads:
            fill()
            for part in [] if self._plain else [slice(None)] if whole else self._around():
                self.buffers.copy_to_peers(part)
        self._release()

    def _show(self, span: slice) -> None:
        """What this rank has stepped is the model's from now on."""
        if self.rounded:
            self.weights[span].copy_(self.stepped(span))
        self.buffers.copy_to_peers(self.spec.bytes_of(span))

    def _around(self) -> list[slice]:
        """The pull message but for the weights."""
        where = self.spec.weights
        return [slice(0, where.start), slice(where.stop, None)]

    def _arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        self._barrier.arrive(meanwhile)
        self._arrived = True

    def _release(self) -> None:
        self._arrived = False
        self._barrier.release()
