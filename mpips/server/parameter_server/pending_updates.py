"""The handling of a contribution by its staleness: applied, scaled, compensated, buffered or rejected."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mpips.algorithms.staleness import POLICIES
from mpips.config import ConfigError
from mpips.model.message import ROUNDS
from mpips.reduce.transport import Decision
from mpips.server.base import Service
from mpips.server.parameter_server.sent_weights import SentWeights
from mpips.server.parameter_server.update_buffer import UpdateBuffer
from mpips.server.parameter_server.worker_table import WorkerStatus


class PendingUpdates:
    """The contributions that have arrived, up to the update of the weights.

    Args:
        service: the server, whose model has been created and whose optimizer steps.

    Attributes:
        staleness: staleness -> the number of contributions accepted with it.
        rejected: the number of contributions that were rejected.
        sent: the weights that contributions were computed at.
        in_round: with backup workers, the ranks whose push for the present version has arrived.
    """

    def __init__(self, service: Service) -> None:
        self._service, config = service, service.config.staleness
        self._backup = service.config.backup_workers
        self._policy = config.policy or service.mode.policy
        enough = service.workers - self._backup if self._backup else config.buffer or service.mode.buffer
        self._needed = max(1, enough)  # the number of contributions to an update
        self._kept = UpdateBuffer(service.replica.push)
        self.sent = SentWeights(self._policy, config, service.config.overlap)
        self._orient_compensation()
        self.staleness: Counter[int] = Counter()
        self.rejected = 0
        self.in_round: set[int] = set()

    def _orient_compensation(self) -> None:
        """Negate the compensation's strength if the optimizer maximizes, as the curvature then has the other sign."""
        compensation, optimizer = self.sent.compensation, self._service.optimizer
        if compensation is None:
            return
        climbs = {bool(group.get("maximize")) for group in optimizer.torch.param_groups}
        if len(climbs) > 1:
            allowed = "one whose groups all have maximize, or none has"
            raise ConfigError(f"optimizer: given another with staleness.policy {self._policy}, allowed: {allowed}")
        if True in climbs:
            compensation.strength = -compensation.strength

    def take(self, rank: int, row: WorkerStatus) -> bool:
        """Handle the contribution in the push message by the mode and the policy; return whether it was accepted."""
        service, push = self._service, self._service.replica.push
        version = int(service.control.version)
        late = int(version - row["round"]) % ROUNDS
        scale = POLICIES[self._policy](late, service.config.staleness)
        taken = bool(row["weight"]) and scale > 0 and not (self._backup and late) and not row["bad"]
        if self._backup and not late:
            self.in_round.add(rank)
        if row["bad"]:
            service.handle_nonfinite({rank: int(row["bad"]) - 1})
        elif taken:
            self.staleness[late] += 1
            self.sent.correct(rank, version - late, push.gradients, service.replica.pull.weights)
            if self._needed > 1:
                self._kept.add(row["samples"] if self._backup else scale)
            else:
                self._step(scale)
        elif row["weight"]:
            self.rejected += 1
        return taken

    def step_if_enough(self, training: set[int]) -> None:
        """Take one update with the mean of the buffered contributions if there are enough of them.

        With backup workers, take it once enough of them have pushed for this version.

        Args:
            training: the ranks that are still training.
        """
        if self._backup:
            if not self.in_round or len(self.in_round) < min(self._needed, len(training | self.in_round)):
                return
            self.in_round.clear()
        elif self._kept.count < self._needed:
            return
        if self._kept.count:
            self._kept.take(by_share=bool(self._backup))
            self._step()

    def _step(self, scale: float = 1.0) -> None:
        """Take one update with the push message, unless it has become infinite or NaN only on the server."""
        replica = self._service.replica
        changed = self._needed > 1 or self.sent.compensation
        overflow = replica.flat.first_nonfinite(replica.push.gradients) if changed else None
        if overflow is None:
            self._service.decide(Decision("step", scale))
        else:
            self._service.handle_nonfinite({self._service.communicator.rank: overflow})

    def summary(self) -> dict[str, Any]:
        """Return the counts for the results of the run."""
        return {"staleness": {str(late): n for late, n in sorted(self.staleness.items())}, "rejected": self.rejected}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the buffered contributions, for a checkpoint."""
        own = {"kept": self._kept.state_dict(), "in_round": sorted(self.in_round), "compensation": self.sent.state_dict()}
        return self.summary() | own

    def load_state_dict(self, tree: dict[str, Any], same_ranks: bool) -> None:
        """Restore what `state_dict` returned.

        Args:
            tree: what it returned.
            same_ranks: whether the workers are on the same ranks as then.
        """
        self.staleness = Counter({int(late): count for late, count in tree["staleness"].items()})
        self.rejected = tree["rejected"]
        self._kept.load_state_dict(tree["kept"])
        self.in_round = set(tree["in_round"]) if same_ranks else set()
        self.sent.load_state_dict(tree["compensation"], same_ranks)
