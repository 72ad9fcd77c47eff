"""Node groups of several nodes where the server serves everything: leaders Reduce their nodes' sums to it, then it tells them.

A round:

| step    | on a node                                           | between the leaders                  |
|---------|-----------------------------------------------------|--------------------------------------|
| reduce  | bucket by bucket: gradients are added by all ranks  | Reduce, while the next is added      |
|         | tails are added by the leader                       | Reduce                               |
| broadcast|the server has stepped                              | Bcast of the pull message            |

A message that is a single bucket the leader adds up alone, with its tail, and it goes in one Reduce: no rank meets another but
to hand in its push message and to take the pull message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mpips.comm.multi_node import LeaderGroup, MultiNodeGroup
from mpips.comm.node_group import Barrier, BucketReadiness, BufferSpec, SliceReducer
from mpips.comm.peer_buffers import PeerBuffers
from mpips.model.layout import BUCKET, piece, pieces


class RootReduceGroup(MultiNodeGroup):
    """One rank's place in its node's group; see `MultiNodeGroup` for the other arguments.

    Args:
        bucket: the most bytes that leaders reduce at a time.
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
        self._alone = buffers.staged or len(self._buckets) == 1
        self._in_round = False

    def reduce(self, weight: float, heard: Tensor, work: SliceReducer, ready: BucketReadiness | None = None) -> None:
        """See `NodeGroup`; only the server hears the tails."""
        self.sample_weights[self.buffers.place], self._in_round = weight, True
        if self._alone:
            self._arrive()
        else:
            self.barrier()
        for bucket in self._buckets:
            self._add(bucket, work)
            if self._leaders and len(self._buckets) > 1:
                self._leaders.reduce(self.combined[bucket], "sum")
        if self._leaders:
            self._speak(work)
        if self.leads:
            heard.copy_(self.buffers.row[self.spec.tail :])
            for span in self.spans:
                work.finalize(span, self.combined[span])

    def _add(self, bucket: slice, work: SliceReducer) -> None:
        """This node's sum of a bucket, in its leader's push message."""
        if self._alone:
            for part in pieces(bucket, piece(self.spec.device)) if self._leaders else []:
                work.reduce_local(part, self.buffers.rows_of(part))
            return
        for part in self._by_hand(bucket):
            work.reduce_local(part, self.buffers.rows_of(part))
        if bucket != self._buckets[-1]:
            self.barrier()
            return
        self._reports[self.buffers.place].copy_(work.faults)
        self._arrive()  # to be released with the pull message

    def _speak(self, work: SliceReducer) -> None:
        """A leader hands on its node's tails, with what is wrong there."""
        whole = self.buffers.row
        self.buffers.sum_tails(whole[self._behind])
        work.report_nonfinite(work.faults if self._alone else self._reports.amin(0))
        assert self._leaders
        self._leaders.reduce(whole if len(self._buckets) == 1 else whole[self._behind], "sum")

    def broadcast(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """See `NodeGroup`; in a round all of the message is told, as only the server knows whether it has stepped."""
        if not self._in_round:
            self._arrive()
        if self.leads:
            fill()
        for part in [slice(None)] if self._in_round else self._around():
            self._tell(part)
        self._in_round = False
        self._release()
