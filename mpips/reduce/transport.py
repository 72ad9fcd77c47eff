"""The transport of a round: how contributions come together, and how the new weights come back.

Worker and server know this one object, which `reduce/choice.py` makes at `connect`. Every rank makes the same four calls:

| call   | the server                                        | every other rank                               |
|--------|---------------------------------------------------|------------------------------------------------|
| push   | its push message is written                       | its push message is written                    |
| reduce | gets what the rule makes of all contributions     | hands in its contribution, combines its slices |
| decide | says whether the step is taken; steps its slices  | steps its slices as the server says            |
| pull   | hands out the control, weights and buffers        | gets them                                      |

`MessageTransport` sends messages by a communicator. `SharedMemoryTransport` has the messages in memory that the ranks of a node
share, and sends between nodes only what must travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from mpips.comm import Communicator
from mpips.model.bucket_ready import BucketReadiness
from mpips.model.message import Control, Replica
from mpips.reduce.aggregate import AggregationResult, bring_together
from mpips.reduce.combine import prepare
from mpips.rules import Needs, Rule


@dataclass(frozen=True)
class Decision:
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
    """One rank's end of the rounds.

    Attributes:
        plan: "root" if rank 0 steps the whole model, "sharded" if every rank steps its slices.
        how: how contributions come together, for people.
        encodes: whether what travels is encoded by a codec that is not exact.
        ready: which buckets are complete during backward, where these travel before backward ends; else None.
        steps_whole: whether rank 0 steps the whole model with the optimizer that it was given.
    """

    plan: str
    how: str
    encodes: bool
    ready: BucketReadiness | None
    steps_whole: bool

    def begin(self, weight: float) -> None:
        """Start to reduce buckets as soon as `ready` says that their gradients are complete.

        Args:
            weight: the weight of this rank's contribution.

        Raises:
            RuntimeError: a reduction has begun already.
        """

    def push(self) -> None:
        """Declare this rank's push message written.

        Raises:
            ValueError: its weight differs from the weight that `begin` was given.
        """

    def reduce(self, round: float) -> AggregationResult:
        """Combine the contributions of all ranks by the rule.

        At the server the sum of all tails is then in `push.heard`, and the combination in the body of the push message, or in
        slices of it on the ranks that serve these.

        Returns:
            What came of it, at the server; an empty result elsewhere.
        """

    def decide(self, decision: Decision | None = None) -> None:
        """Carry out what the server decides about the combined gradient; other ranks than the server's give no decision."""

    def pull(self, control: Control | None = None, weights: Tensor | None = None) -> None:
        """Let the pull message land on every rank.

        Args:
            control: what the server says; None elsewhere.
            weights: `(numel,)`, what the server sends in place of the stepped weights.
        """

    def tell(self, control: Control | None = None) -> None:
        """Let the server's control land on every rank, between rounds; other ranks give none."""

    def average(self) -> None:
        """Combine the contributions in the push messages, and give every rank the whole combined message; no step is taken."""

    def optimizer_shard(self) -> dict[str, Any]:
        """Return the state of the optimizer's slices on this rank, for the server's checkpoint."""

    def optimizer_state(self, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return the state of the whole optimizer, at the server.

        Args:
            others: what `optimizer_shard` gave on the other ranks.
        """


def average_by_messages(communicator: Communicator, replica: Replica, rule: Rule, last: Needs, first: int) -> None:
    """Do what `Transport.average` says; any transport does it by messages."""
    push, rank = replica.push, communicator.rank
    prepare(rank, push, rule)
    if unscaled := push.raw and rule.needs == "sum":
        push.raw = False
        if (weight := push.weight(rank)) not in (0, 1):
            push.gradients.mul_(weight)
    bring_together(communicator, push, rule, last, first)
    push.raw |= unscaled
    communicator.broadcast(push.message)
