"""A group of ranks on each of several nodes: the first ranks of the nodes, their leaders, speak for them.

Where every node serves some of the slices it is a `ReduceScatterGroup`, where the server serves all a `RootReduceGroup`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpips.comm.node_group import Barrier, BufferSpec, NodeGroup, Op
from mpips.comm.peer_buffers import PeerBuffers
from mpips.model.layout import pieces, share

Finish = Callable[[], None]  # waits until all is sent and there
Begin = Callable[[], Finish]
Sent = list[tuple[int, Tensor]]  # a node, and what goes there or comes from there


class LeaderGroup(Protocol):
    """The first ranks of all nodes; the server's is the first of them.

    Attributes:
        node: this one's number.
    """

    node: int

    def allreduce(self, values: Tensor) -> None:
        """The sum of all leaders' `values` lands in everybody's."""

    def reduce(self, values: Tensor, op: Op) -> None:
        """The least, or the sum, of all leaders' `values` lands in the first one's; they may be on a device."""

    def broadcast(self, message: Tensor) -> None:
        """The first one's `message`, bytes, lands in everybody's; it may be on a device."""

    def progress(self) -> None:
        """Let what is under way get on: MPI moves data while it is called."""

    def persistent_sendrecv(self, sent: Sent, taken: Sent) -> Begin:
        """What is to be sent to and received from others, again and again: the same memory, in this order."""


class MultiNodeGroup(NodeGroup):
    """One rank's place in its node's group.

    Args:
        nodes: the ranks of each node.
        rank: this one.
        board: the messages of this node's ranks.
        parts: further memory of the node's, as `sizes` has it behind the messages.
        meeting: how the ranks of this node wait for each other.
        contents: what each group holds.
        leaders: the others, if this is one.
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
    ) -> None:
        self._node = next(n for n, ranks in enumerate(nodes) if rank in ranks)
        super().__init__(nodes[self._node], rank, buffers, parts, barrier, spec)
        self.nodes = [list(ranks) for ranks in nodes]
        self._leaders, self._progress = leaders, leaders.progress if leaders else None
        self.sample_weights = parts[2].view(torch.float64)

    def _by_hand(self, span: slice) -> list[slice]:
        """This rank's share of what its node adds up, in pieces that stay in a cache; a leader has to send and receive."""
        others = len(self.members) - 1
        if not others:
            return pieces(span)
        return pieces(share(span, self.buffers.place - 1, others)) if self.buffers.place else []

    def _tell(self, part: slice) -> None:
        """Leaders: these bytes of the server's pull message land in every node's."""
        if self._leaders:
            self._leaders.broadcast(self.buffers.pull[part])
            self.buffers.copy_to_peers(part)


def sizes(spec: BufferSpec, ranks: int) -> list[int]:
    """The bytes of the parts of every group of `ranks` ranks, the board's first; see `MultiNodeGroup`."""
    return [*spec.sizes(ranks), ranks * 8]
