"""The server's half of a round, and all that it alone decides.

    collect_updates  combine, rule            the contributions become one
    update_weights   clip, the server's step  the weights become the next version
    send_updates     exchange.publish         every rank has them

Rank 0 is the server. It may train as well; then its own contribution is already in the push message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from mpips import lanes
from mpips.combine import Combined, combine, left_out
from mpips.exchange import ExchangeError
from mpips.message import BAD, COLUMNS, DONE, LOSS, ROUND, ROUNDS, SAMPLES, SIGNAL, STEPS, STOP, WEIGHT, Control, Stop
from mpips.mode import judges_clients
from mpips.report import rank_states
from mpips.service import Service


class Updates:
    """What a round brought.

    Args:
        rows: the workers' rows of the tail, by rank.
        columns: their names.
        first: the rank of the first worker.

    Attributes:
        rows: see above.
        totals: their sums, column by column.
        epsilons: the privacy spent by each rank; empty, as no rank trains with differential privacy.
    """

    def __init__(self, rows: list[list[float]], columns: tuple[str, ...], first: int) -> None:
        self.rows, self._columns, self._first = rows, columns, first
        self.totals = [sum(column) for column in zip(*rows, strict=True)]
        self.epsilons: list[float] = []

    @property
    def samples(self) -> dict[int, float]:
        """Rank -> samples behind its contribution."""
        return {rank: row[SAMPLES] for rank, row in enumerate(self.rows, self._first)}

    @property
    def results(self) -> dict[int, dict[str, float]]:
        """Rank -> its row by column: loss, flags, times, metrics."""
        return {rank: dict(zip(self._columns, row, strict=True)) for rank, row in enumerate(self.rows, self._first)}

    @property
    def bad(self) -> dict[int, int]:
        """Rank -> its first tensor that is not finite, of those who say that they have one."""
        if not self.totals[BAD]:
            return {}
        return {rank: int(row[BAD]) - 1 for rank, row in enumerate(self.rows, self._first) if row[BAD]}

    def leave_out(self, ranks: Iterable[int]) -> None:
        """Samples, loss and metrics of these count for nothing."""
        for row in [self.rows[rank - self._first] for rank in ranks if rank >= self._first]:
            for column in (SAMPLES, LOSS, *range(len(COLUMNS), len(row))):
                row[column] = 0.0
        self.totals = [sum(column) for column in zip(*self.rows, strict=True)]


class Server(Service):
    """The synchronous server; see `Service` for its arguments."""

    def start_server(self) -> None:
        """Serve rounds until every worker's shard is exhausted or the run is to stop."""
        while True:
            control = self.round()
            if not control.active or control.stop:
                return

    def stop_server(self) -> None:
        """End the run for all ranks, with the next message to them."""
        self.stop_asked = True

    def round(self, contributed: bool = True) -> Control:
        """One whole round: collect, combine, step, send, and a checkpoint if one is due.

        Args:
            contributed: whether a worker on this rank had an update; without one its buffers stay, unless the weights move.

        Raises:
            NonFiniteError: on all ranks, when a rank's update is not finite and `nonfinite` is "raise".
        """
        version = self.control.version
        updates = self.collect_updates()
        self.update_weights(updates)
        self.note(updates)
        self.send_updates()
        self.replica.check_finite(self.control)
        if contributed or self.control.version > version:
            self.replica.buffers.load(self.replica.pull.buffers)
        if self.control.checkpoint:
            self.save_model()
        return self.control

    def collect_updates(self) -> Updates:
        """Take every worker's contribution of this round; their combination is left in the push message.

        Raises:
            ExchangeError: a rank is in another round.
        """
        push = self.replica.push
        if not self.trains:
            push.forget()
        push = self.replica.push_for(self.control.round)
        if self.slices:
            self.slices.combine()
            self.combined = Combined(sorted(left_out(push.heard.rows, self.rule)))
        elif judges_clients(self.mode, self.config):
            self.combined = lanes.combine(self.exchange, push, self.rule, self.last, self.first, self.config.bucket_mb)
        else:
            self.combined = combine(self.exchange, push, self.rule, self.last, self.first)
        push.spill()
        rows, expected = push.heard.table()[self.first :], self.control.round % ROUNDS
        for rank, row in enumerate(rows, self.first):
            if row[ROUND] != expected:
                raise ExchangeError(f"rank {rank} is in round {row[ROUND]:.0f}, the server in {self.control.round:.0f}")
        return Updates(rows, self._columns, self.first)

    def update_weights(self, updates: Updates) -> None:
        """One server update with the combined gradient, unless there is none or it is not to be taken."""
        if self.combined.faulty or self.combined.refused:
            self._say_what_was_left_out()
        bad, found = updates.bad, self._found()
        if bad or found:
            bad |= found
            updates.leave_out(bad)
        take = updates.totals[WEIGHT] and not self.combined.refused and not found
        if take and not (bad and (self.config.loss_scale or self.config.nonfinite != "drop")):
            self.step_with(updates.totals[STEPS] / updates.totals[WEIGHT] if self.mode.normalised else 1.0)
        else:
            self.optimizer.skip()
        if bad:
            self.judge(bad)
        if self.config.buffers == "server":
            self.replica.buffers.store(self.replica.pull.buffers)

    def _say_what_was_left_out(self) -> None:
        whose = "client" if judges_clients(self.mode, self.config) else "rank"
        for number in self.combined.faulty:
            self.report.event("warning", message=f"{whose} {number}: left out by the rule", round=self.control.round)
        if self.combined.refused:
            self.report.event("warning", message=f"no update: {self.combined.refused}", round=self.control.round)

    def _found(self) -> dict[int, int]:
        """Whose combined gradient is not finite, rank -> slot: of a rank that has not said so, or the server's, if of none."""
        if not self.slices:
            overflow = self.replica.flat.first_nonfinite(self.replica.push.gradients)
            return {} if overflow is None else {self.exchange.rank: overflow}
        return self.slices.guilty()

    def note(self, updates: Updates) -> None:
        """What this round means for the next: the control, and the report."""
        totals, control = updates.totals, self.control
        samples = totals[SAMPLES]
        means = [totals[column] / samples if samples else math.nan for column in self._averaged]
        control.round += 1
        control.active = len(updates.rows) - totals[DONE]
        self.place.over = not control.active
        control.loss, control.lr, control.loss_scale = means[0], self.lr, self.loss_scale.scale
        if totals[SIGNAL] or totals[STOP] or self.signalled or self.stop_asked:
            self.obey_ranks(updates.results)
        every = self.config.checkpoint.every
        control.checkpoint = bool(self.folder) and (
            control.stop == Stop.PREEMPTED or (every > 0 and control.round % every == 0)
        )
        now = self.exchange.clock()
        speed, self._last = samples / max(now - self._last, 1e-9), now
        row = (control.round, self.place.epoch, control.version, samples, means[0], control.lr, *means[1:])
        self.report.round(row, speed, lambda: rank_states(updates.results, self.trains))

    def send_updates(self, weights: Tensor | None = None) -> None:
        """Send the weights, or these ones (`(numel,)`, the flat layout), and the control to all ranks; `note` has come before.

        With `local.fragments` the round's fragment alone is sent.
        """
        if self.slices:
            self.slices.publish(self.control, weights)
            return
        if weights is not None:
            self.replica.pull.weights.copy_(weights)
        self.replica.pull.control = self.control
        for part in self.replica.pull_for(self.control.round - 1):
            self.exchange.publish(part)
