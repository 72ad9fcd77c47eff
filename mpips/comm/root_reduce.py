"""Node groups in which the server serves all slices: leaders Reduce their nodes' sums, the server broadcasts the weights.

A round:

| call      | on a node                                             | between the leaders                 |
|-----------|-------------------------------------------------------|-------------------------------------|
| reduce    | bucket by bucket, all ranks sum the gradients         | Reduce, while the next bucket is    |
|           |                                                       | summed                              |
|           | the leader sums the tails                             | Reduce                              |
| broadcast | the server has stepped                                | Bcast of the pull message           |

If the message is a single bucket, the leader alone sums it, with the tails, and sends it in one Reduce. Then a rank waits for
others only twice: to hand in its push message, and to take the pull message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mpips.comm.multi_node import LeaderGroup, MultiNodeGroup
from mpips.comm.node_group import Barrier, BucketReadiness, BufferSpec, SliceReducer
from mpips.comm.peer_buffers import PeerBuffers
from mpips.model.layout import BUCKET, piece, pieces


class RootReduceGroup(MultiNodeGroup):
    """One rank's end of its node's group; see `MultiNodeGroup` for the other arguments.

    Args:
        bucket: the largest number of bytes that leaders reduce at a time.
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
        self._buckets = pieces(slice(0, spec.gradients), max(1, min(bucket, BUCKET) // spec.dtype.itemsize))
        self._behind = slice(spec.gradients, spec.numel)
        self._leader_sums = buffers.staged or len(self._buckets) == 1
        self._in_round = False

    def reduce(self, weight: float, tail_sum: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """Reduce bucket by bucket to the server, which alone gets the sum of the tails; see `NodeGroup`."""
        self.sample_weights[self.buffers.place], self._in_round = weight, True
        if self._leader_sums:
            self._arrive()
        else:
            self.barrier()
        for bucket in self._buckets:
            self._sum_bucket(bucket, work)
            if self._leaders and len(self._buckets) > 1:
                self._leaders.reduce(self.combined[bucket], "sum")
        if self._leaders:
            self._reduce_tails(work)
        if self.leads:
            tail_sum.copy_(self.buffers.row[self.spec.tail :])
            for span in self.spans:
                work.finalize(span, self.combined[span])

    def _sum_bucket(self, bucket: slice, work: SliceReducer) -> None:
        """Sum a bucket over this node's ranks, in the leader's push message."""
        if self._leader_sums:
            for part in pieces(bucket, piece(self.spec.device)) if self._leaders else []:
                work.reduce_local(part, self.buffers.rows_of(part))
            return
        for part in self._own_share(bucket):
            work.reduce_local(part, self.buffers.rows_of(part))
        if bucket != self._buckets[-1]:
            self.barrier()
            return
        self._reports[self.buffers.place].copy_(work.faults)
        self._arrive()  # released in `broadcast`

    def _reduce_tails(self, work: SliceReducer) -> None:
        """Reduce this node's tails, with the faults of its ranks, to the server, at a leader."""
        whole = self.buffers.row
        self.buffers.sum_tails(whole[self._behind])
        work.report_nonfinite(work.faults if self._leader_sums else self._reports.amin(0))
        assert self._leaders
        self._leaders.reduce(whole if len(self._buckets) == 1 else whole[self._behind], "sum")

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """Broadcast the pull message; see `NodeGroup`.

        In a round the weights are sent, too, as only the server knows whether it has stepped.
        """
        if not self._in_round:
            self._arrive()
        if self.leads:
            fill()
        for part in [slice(None)] if self._in_round else self._around():
            self._broadcast_pull(part)
        self._in_round = False
        self._release()
