"""The transport of a round: how contributions are combined, and how the new weights reach every rank.

Worker and server know this one object, made by `reduce/choice.py` at `connect`. Every rank makes the same four calls:

| call   | the server                                        | every other rank                               |
|--------|---------------------------------------------------|------------------------------------------------|
| push   | has written its push message                      | has written its push message                   |
| reduce | gets the combination of all contributions         | contributes, and combines its slices           |
| decide | decides whether to step, and steps its slices     | steps its slices as the server decides         |
| pull   | sends the control, weights and buffers            | receives them                                  |

`MessageTransport` sends the messages through a communicator. With `SharedMemoryTransport` they lie in memory that the ranks of
a node share, and only between nodes is anything sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from mpips.comm import Communicator
from mpips.model.bucket_ready import BucketReadiness
from mpips.model.message import Control, Replica
from mpips.reduce.aggregate import AggregationResult, bring_together
from mpips.reduce.combine import prepare
from mpips.rules import Needs, Rule


class Decision(NamedTuple):
    """What the server decides about a round.

    Attributes:
        action: "step" with the combined gradient, "adopt" it as the new weights, or "skip" the round.
        scale: the factor of the learning rates, in this step alone.
        times: the factor of the combined gradient, before it is clipped.
    """

    action: Literal["step", "adopt", "skip"]
    scale: float = 1.0
    times: float = 1.0


class Transport(Protocol):
    """One rank's end of the transport.

    Attributes:
        plan: "root" if rank 0 steps the whole model, "sharded" if every rank steps its slices.
        how: how contributions are brought together, as a text for people.
        encodes: whether messages are encoded by a codec that is not exact.
        ready: the buckets that are complete during backward, if buckets travel before its end; else None.
    """

    plan: str
    how: str
    encodes: bool
    ready: BucketReadiness | None

    def begin(self, weight: float) -> None:
        """Start to reduce buckets as soon as `ready` says that their gradients are complete.

        Args:
            weight: the weight of this rank's contribution.

        Raises:
            RuntimeError: a reduction has begun already.
        """

    def push(self) -> None:
        """Declare this rank's push message complete.

        Raises:
            ValueError: its weight differs from the weight that `begin` was given.
        """

    def reduce(self, round: float) -> AggregationResult:
        """Combine the contributions of all ranks by the rule.

        At the server, `push.heard` then holds the sum of all tails. The combination lies in the body of the push message, or in
        slices on the ranks that serve these.

        Args:
            round: the number of the round, which selects its fragment.

        Returns:
            The result, at the server; an empty result elsewhere.
        """

    def decide(self, decision: Decision | None = None) -> None:
        """Carry out the server's decision about the combined gradient.

        Args:
            decision: the decision, at the server; None on other ranks.
        """

    def pull(self, control: Control | None = None, weights: Tensor | None = None) -> None:
        """Give every rank the pull message.

        Args:
            control: the control, at the server; None on other ranks.
            weights: `(numel,)`, sent instead of the stepped weights.
        """

    def tell(self, control: Control | None = None) -> None:
        """Send the server's control to every rank, between rounds.

        Args:
            control: the control, at the server; None on other ranks.
        """

    def average(self) -> None:
        """Combine the contributions in the push messages, without a step; every rank gets the whole combined message."""

    def optimizer_shard(self) -> dict[str, Any]:
        """Return the optimizer's state for this rank's slices, for a checkpoint."""

    def optimizer_state(self, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return the state of the whole optimizer, at the server.

        Args:
            others: what `optimizer_shard` returned on the other ranks.
        """


def average_by_messages(communicator: Communicator, replica: Replica, rule: Rule, last: Needs, first: int) -> None:
    """Carry out `Transport.average` by messages, as every transport does."""
    push, rank = replica.push, communicator.rank
    prepare(rank, push, rule)
    with push.as_sent():
        if push.raw and rule.needs == "sum":
            push.raw = False
            if (weight := push.weight(rank)) not in (0, 1):
                push.gradients.mul_(weight)
        if push.weight(rank) == 0:  # in shared memory it may hold anything
            push.body.zero_()
        bring_together(communicator, push, rule, last, first)
    communicator.broadcast(push.message)
