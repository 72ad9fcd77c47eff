"""The transport that sends the messages of a round through a communicator; see `mpips.reduce.transport`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mpips.comm import Communicator
from mpips.model.bucket_ready import BucketReadiness
from mpips.model.message import Control, Push, Replica
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.reduce.aggregate import AggregationResult, aggregate
from mpips.reduce.client_rows import aggregate_clients
from mpips.reduce.transport import Decision, average_by_messages
from mpips.rules import Needs, Rule


class MessageTransport:
    """The transport by a Reduce or Gather of the push messages, a step at rank 0, and a Bcast of the pull message.

    Args:
        communicator: this rank's end.
        replica: this rank's copy of the model.
        rule, last: the rule and what the last collective delivers, from `mpips.rules.choose`.
        first: the rank of the first worker.
        optimizer: the server's optimizer; None on other ranks.
        clip: the largest norm of the combined gradient; None does not clip.
    """

    plan, how, encodes = "root", "messages", False
    ready: BucketReadiness | None = None

    def __init__(
        self,
        communicator: Communicator,
        replica: Replica,
        rule: Rule,
        last: Needs,
        first: int,
        optimizer: FlatOptimizer | None,
        clip: float | None,
    ) -> None:
        self.communicator, self.replica, self._optimizer, self._clip = communicator, replica, optimizer, clip
        self._rule, self._last, self._first = rule, last, first
        self._round = 0.0

    def begin(self, weight: float) -> None:
        """Do nothing; as `ready` is None, nobody calls this. See `Transport`."""

    def push(self) -> None:
        """Do nothing: the push message is sent by `reduce`. See `Transport`."""

    def reduce(self, round: float) -> AggregationResult:
        """Aggregate by messages; see `Transport`."""
        self._round = round
        push = self.replica.fragment(round)
        push.fill()
        found = self._aggregate(push)
        if self._optimizer is None:
            return found
        push.spill()
        slot = self.replica.flat.first_nonfinite(self.replica.push.gradients)
        return found if slot is None else found._replace(nonfinite={self.communicator.rank: slot})

    def _aggregate(self, push: Push) -> AggregationResult:
        return aggregate(self.communicator, push, self._rule, self._last, self._first)

    def decide(self, decision: Decision | None = None) -> None:
        """Step at the server; other ranks have nothing to do. See `Transport`."""
        if decision is None or decision.action == "skip":
            return
        assert self._optimizer
        if decision.action == "adopt":
            self._optimizer.adopt()
        else:
            self._optimizer.step(self.replica.push.present(), self._clip, decision.scale, decision.times)

    def pull(self, control: Control | None = None, weights: Tensor | None = None) -> None:
        """Broadcast the pull message, with `local.fragments` only the round's fragment of the weights. See `Transport`."""
        pull = self.replica.pull
        if weights is not None:
            pull.weights.copy_(weights)
        if control is not None:
            pull.control = control
        for part in self.replica.pull_for(self._round):
            self.communicator.broadcast(part)

    def tell(self, control: Control | None = None) -> None:
        """Broadcast the control; see `Transport`."""
        if control is not None:
            self.replica.pull.control = control
        self.communicator.broadcast(self.replica.pull.control_message)

    def average(self) -> None:
        """Average by messages; see `Transport`."""
        average_by_messages(self.communicator, self.replica, self._rule, self._last, self._first)

    def optimizer_shard(self) -> dict[str, Any]:
        """Return nothing, as the server has the whole state; see `Transport`."""
        return {}

    def optimizer_state(self, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return the server's state; see `Transport`."""
        assert self._optimizer
        return self._optimizer.state_dict()


class ClientMessageTransport(MessageTransport):
    """A `MessageTransport` whose rule combines the contributions of clients, of which a rank hosts several.

    Args:
        bucket_cap_mb: the largest message, in MB.
        given: the arguments of `MessageTransport`.
    """

    def __init__(self, bucket_cap_mb: float, *given: Any) -> None:
        super().__init__(*given)
        self._bucket_cap_mb = bucket_cap_mb

    def _aggregate(self, push: Push) -> AggregationResult:
        return aggregate_clients(self.communicator, push, self._rule, self._last, self._first, self._bucket_cap_mb)
