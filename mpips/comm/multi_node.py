"""A node group on each of several nodes. The first rank of each node, its leader, communicates with the other nodes.

If every node serves slices, the group is a `ReduceScatterGroup`; if the server serves all slices, a `RootReduceGroup`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpips.comm.node_group import Barrier, BufferSpec, NodeGroup, Op
from mpips.comm.peer_buffers import PeerBuffers
from mpips.model.layout import pieces, share

Finish = Callable[[], None]  # waits until everything is sent and received
Begin = Callable[[], Finish]  # starts a transfer
Sent = list[tuple[int, Tensor]]  # for each node, the tensor to send to it or to receive from it


class LeaderGroup(Protocol):
    """The group of all nodes' leaders; the server's rank is the first leader.

    Attributes:
        node: the index of this leader's node.
    """

    node: int

    def allreduce(self, values: Tensor) -> None:
        """Replace `values` by their sum over all leaders."""

    def reduce(self, values: Tensor, op: Op) -> None:
        """Replace the first leader's `values` by the minimum or the sum over all leaders; the tensor may lie on a device."""

    def broadcast(self, message: Tensor) -> None:
        """Copy the first leader's `message`, of dtype uint8, to all leaders; the tensor may lie on a device."""

    def progress(self) -> None:
        """Let MPI progress the transfers under way; it moves data only during calls."""

    def persistent_sendrecv(self, sent: Sent, taken: Sent) -> Begin:
        """Prepare a transfer that is repeated each round, from and to the same memory.

        Args:
            sent: the nodes to send to, and what to send to each.
            taken: the nodes to receive from, and the buffer for each.

        Returns:
            A function that starts the transfer and returns a function that waits for its end.
        """


class MultiNodeGroup(NodeGroup):
    """One rank's end of its node's group.

    Args:
        nodes: the ranks of each node.
        rank: this rank.
        buffers: the messages of this node's ranks.
        parts: further shared memory of the node, as in the sizes of `sizes` after those of the messages.
        barrier: the barrier of this node's ranks.
        spec: the size and layout of each group's buffers.
        leaders: the group of the leaders if this rank is one, else None.
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

    def _own_share(self, span: slice) -> list[slice]:
        """Return this rank's share of what its node sums, in pieces that fit a cache; none at a leader with other ranks."""
        others = len(self.members) - 1
        if not others:
            return pieces(span)
        return pieces(share(span, self.buffers.place - 1, others)) if self.buffers.place else []

    def _broadcast_pull(self, part: slice) -> None:
        """Broadcast these bytes of the server's pull message to all nodes, at the leaders."""
        if self._leaders:
            self._leaders.broadcast(self.buffers.pull[part])
            self.buffers.copy_to_peers(part)


def sizes(spec: BufferSpec, ranks: int) -> list[int]:
    """Return the sizes in bytes of the shared memory of a group of `ranks` ranks, the messages first; see `MultiNodeGroup`."""
    return [*spec.sizes(ranks), ranks * 8]
