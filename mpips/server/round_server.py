"""The server's half of a round, and the decisions that it alone makes.

    collect_updates  transport.push, reduce   the contributions are combined by the rule
    update_weights   transport.decide         the server's step: the next version of the weights
    send_updates     transport.pull           every rank has the new weights

Rank 0 is the server. If it trains, too, its own contribution is already in the push message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from functools import reduce
from operator import add

from torch import Tensor

from mpips.algorithms.modes import judges_clients
from mpips.comm import CommunicatorError
from mpips.model.message import (
    ADOPT,
    BAD,
    CALL,
    COLUMNS,
    DIGEST,
    DONE,
    EPOCHS,
    LOSS,
    OVERFLOW,
    ROUND,
    ROUNDS,
    SAMPLES,
    SIGNAL,
    STEPS,
    STOP,
    WEIGHT,
    WHICH,
    Call,
    Control,
    Stop,
)
from mpips.optim.joint import Joint
from mpips.reduce.transport import Decision
from mpips.report.run_report import rank_states
from mpips.report.slow_ranks import SlowRanks
from mpips.server.base import Service


class Updates:
    """The contributions of a round, except for the gradients.

    Args:
        rows: the workers' rows of the tail, by rank.
        columns: the names of the columns.
        first: the rank of the first worker.
        lost: the ranks of the workers that have died.

    Attributes:
        rows: see above.
        totals: the sum of the rows.
        epsilons: each rank's privacy loss; empty, as no rank trains with differential privacy.
    """

    def __init__(self, rows: list[list[float]], columns: tuple[str, ...], first: int, lost: Set[int] = frozenset()) -> None:
        self.rows, self._columns, self._first, self._lost = rows, columns, first, lost
        self._add_up()
        self.epsilons: list[float] = []

    @property
    def samples(self) -> dict[int, float]:
        """Rank -> the number of samples behind its contribution."""
        return {rank: row[SAMPLES] for rank, row in enumerate(self.rows, self._first)}

    @property
    def results(self) -> dict[int, dict[str, float]]:
        """Rank -> its row by column: loss, flags, times, metrics; of the workers that live."""
        rows = ((rank, row) for rank, row in enumerate(self.rows, self._first) if rank not in self._lost)
        return {rank: dict(zip(self._columns, row, strict=True)) for rank, row in rows}

    @property
    def all_wait(self) -> bool:
        """Whether each worker only waits in a call."""
        return all(row[CALL] or rank in self._lost for rank, row in enumerate(self.rows, self._first))

    @property
    def bad(self) -> dict[int, int]:
        """Rank -> the index of its first tensor that is not finite, for the ranks that report one."""
        if not self.totals[BAD]:
            return {}
        return {rank: int(row[BAD]) - 1 for rank, row in enumerate(self.rows, self._first) if row[BAD]}

    def leave_out(self, ranks: Iterable[int]) -> None:
        """Set the samples, the loss and the metrics of these ranks to zero."""
        for row in [self.rows[rank - self._first] for rank in ranks if rank >= self._first]:
            for column in (SAMPLES, LOSS, *range(len(COLUMNS), len(row))):
                row[column] = 0.0
        self._add_up()

    def _add_up(self) -> None:
        self.totals = reduce(lambda totals, row: list(map(add, totals, row)), self.rows)


class Server(Service):
    """The synchronous server; see `Service` for its arguments."""

    def broadcast_initial_weights(self) -> None:
        """Broadcast the weights, and judge from now on which rank the others wait for; see `Service`."""
        super().broadcast_initial_weights()
        if self.workers > 1 and not self.config.backup_workers:
            self.report.slow = SlowRanks()

    def serve(self) -> None:
        """Serve rounds, and between them the calls that all workers make, until every worker has left."""
        while True:
            self.start_server()
            if self.control.stop == Stop.PREEMPTED or (not self.control.active and self.take_part()):
                return

    def start_server(self) -> None:
        """Serve rounds until every worker waits, as at the end of its shard, or the run is to stop."""
        while True:
            control = self.round()
            if not control.active or control.stop:
                return

    def stop_server(self) -> None:
        """End the run for all ranks with the next message to them."""
        self.stop_asked = True

    def round(self, contributed: bool = True) -> Control:
        """Run one whole round: collect, combine, step, send, and write a checkpoint if one is due.

        Args:
            contributed: whether the worker on this rank has contributed. If not, its buffers stay, unless the weights change.

        Returns:
            The control that was sent.

        Raises:
            NonFiniteError: on all ranks, if a rank's update is not finite and `nonfinite` is "raise".
            CallError: on all ranks, if the workers disagree.
            CheckpointError: the checkpoint that was being written could not be.
        """
        self.look_at_save()
        version = self.control.version
        updates = self.collect_updates()
        self.update_weights(updates)
        counts = self.note(updates)
        self.send_updates()
        if counts:  # here, as no rank waits for what is written
            self.report_round(updates)
        if self.fault:
            self.complain()
        self.replica.check_finite(self.control)
        if self.control.call == Call.STATE:
            self.told_state = self.tell_state()
        if self.replica.buffers.names and (contributed or self.control.version > version):
            self.replica.buffers.load(self.replica.pull.buffers)
        if self.control.checkpoint and self.worker_state is None:  # else the worker on this rank calls save_model
            self.save_model()
        return self.control

    def collect_updates(self) -> Updates:
        """Collect every worker's contribution to this round; their combination is left in the push message.

        Raises:
            CommunicatorError: a rank is in another round.
        """
        push = self.replica.push
        if not self.trains:
            push.forget()
            self.transport.push()
        self.combined = self.transport.reduce(self.control.round)
        rows, expected = push.heard.table()[self.first :], self.control.round % ROUNDS
        self._died = len(self.communicator.lost) > len(self.lost)  # whether a worker has died in this round
        if self.communicator.lost:
            self._go_on(rows)
        for rank, row in enumerate(rows, self.first):
            if row[ROUND] != expected:
                raise CommunicatorError(f"rank {rank} is in round {row[ROUND]:.0f}, the server in {self.control.round:.0f}")
        updates = Updates(rows, self._columns, self.first, self.lost)
        self.follow(rows, push.heard.told()[self.first :])
        if updates.totals[DIGEST]:
            self.fault = self.agreement.compare_data(rows) or self.fault
        return updates

    def _go_on(self, rows: Sequence[list[float]]) -> None:
        """Go on without workers that have died: their rows say that they have no data."""
        if self._died:
            self.note_lost()
        for rank in self.lost:
            row = rows[rank - self.first]
            row[DONE], row[ROUND] = 1.0, self.control.round % ROUNDS

    def update_weights(self, updates: Updates) -> None:
        """Take one server update with the combined gradient, unless there is none or it must not be taken."""
        totals, combined, mean = updates.totals, self.combined, self.config.reduction == "mean"
        if combined.faulty or combined.refused:
            self._report_left_out()
        skipped = self.control.skipped = bool(totals[OVERFLOW])
        bad: dict[int, int] = {}
        if not skipped and (totals[BAD] or combined.nonfinite):
            bad = updates.bad | combined.nonfinite
            updates.leave_out(bad)
        adopts = bool(totals[ADOPT]) and self._agree_on_adoption(updates)
        if isinstance(self.optimizer.torch, Joint):
            self._choose(self.optimizer.torch, {int(row[WHICH]) for row in updates.rows if row[WEIGHT]})
        weight = totals[WEIGHT]
        usable = not skipped and (not bad or (self.config.nonfinite == "drop" and not combined.nonfinite))
        if weight and usable and not (combined.refused or self.fault):
            scale = totals[STEPS] / weight if self.mode.normalised else 1.0
            times = 1.0 if mean else weight  # which makes a sum of the mean
            self.decide(Decision("adopt" if adopts else "step", scale, times))
        else:
            self.decide(Decision("skip"))
        if self._died and totals[SAMPLES] and not (weight or bad or skipped or self.fault):
            self.fault = "the worker that gave the gradient of all, averaged before the step, has died"
        if skipped:  # no step is taken, but forward has updated BatchNorm's statistics
            self.combine_buffers()
        if bad:
            self.handle_nonfinite(self._bad_average or bad)
        if weight or skipped or bad:
            self._bad_average = {}
        if self.config.buffers == "server":
            self.replica.buffers.store(self.replica.pull.buffers)

    def _agree_on_adoption(self, updates: Updates) -> bool:
        """Return whether the contribution is new weights; set `fault` unless the workers agree on that."""
        kinds, chief = {bool(row[ADOPT]) for row in updates.rows if row[WEIGHT]}, self.chief - self.first
        if not updates.rows[chief][ADOPT]:  # whose optimizer, the one that a checkpoint has, would lack the step
            others = ", ".join(str(worker) for worker, row in enumerate(updates.rows) if row[ADOPT])
            self.fault = (
                f"worker {chief} does not take a step that worker {others} takes with an optimizer that steps on the workers; "
                f"expected of worker {chief} every step that any worker takes"
            )
        elif not kinds:
            self.fault = "the worker whose new weights were to be taken over has died"
        elif len(kinds) > 1:
            self.fault = "the workers do not step alike: some by optimizer.step(closure), some without"
        return True in kinds

    def _choose(self, joint: Joint, stepping: set[int]) -> None:
        """Choose the optimizer that this round steps, of several."""
        if len(stepping) > 1:
            self.fault = (
                f"the workers do not step alike: some with the optimizer number {min(stepping)}, some with number "
                f"{max(stepping)} of those given to connect; every worker must step them in the same order"
            )
        elif stepping:
            (joint.which,) = stepping

    def _report_left_out(self) -> None:
        whose = "client" if judges_clients(self.mode, self.config) else "rank"
        for number in self.combined.faulty:
            self.report.event("warning", message=f"{whose} {number}: left out by the rule", round=self.control.round)
        if self.combined.refused:
            self.report.event("warning", message=f"no update: {self.combined.refused}", round=self.control.round)

    def average(self) -> None:
        """Combine the gradients of all workers by the transport; see `Service`."""
        if not self.trains:
            self.replica.push.message.zero_()
        self.transport.average()
        bad = {rank: int(row[BAD]) - 1 for rank, row in enumerate(self.replica.push.table()) if row[BAD]}
        if self.config.nonfinite != "drop":  # the average is NaN, and the script may take no step with it
            self._bad_average = bad and (self._bad_average or bad)  # the first of several evaluations tells whose it was
        elif bad:
            self.handle_nonfinite(bad)

    def note(self, updates: Updates) -> bool:
        """Update the control after a round; return whether the round counts: workers that all wait in a call give nothing."""
        totals, control = updates.totals, self.control
        counts = bool(totals[WEIGHT] or totals[BAD]) or not updates.all_wait
        control.round += counts
        control.active = len(updates.rows) - totals[DONE]
        control.call = Call.NONE
        if totals[CALL]:
            control.call, fault = self.agreement.look(updates.results, control.active, self.measurer)
            self.fault = fault or self.fault
            self.report.epochs = int(max(row[EPOCHS] for row in updates.rows)) or None
        control.lr = self.lr
        if self.lost:
            control.chief = self.chief - self.first
        if counts:
            control.loss = totals[LOSS] / totals[SAMPLES] if totals[SAMPLES] else math.nan
        if totals[SIGNAL] or totals[STOP] or self.signalled or self.stop_asked or control.preempting:
            self.obey_ranks(updates.results)
        control.checkpoint = bool(self.folder) and (control.stop == Stop.PREEMPTED or (counts and self.is_save_due()))
        control.fault = bool(self.fault)
        if counts and self._job_end < math.inf:
            self.look_at_time(self.communicator.clock() - self._last)
        return counts

    def report_round(self, updates: Updates) -> None:
        """Report the round that `note` has counted."""
        control, samples = self.control, updates.totals[SAMPLES]
        means = [updates.totals[column] / samples if samples else math.nan for column in self._averaged]
        now = self.communicator.clock()
        speed, self._last = samples / max(now - self._last, 1e-9), now
        row = (control.round, self.place.epoch, control.version, samples, means[0], control.lr, *means[1:])
        self.report.round(row, speed, lambda: rank_states(updates.results, self.trains))

    def send_updates(self, weights: Tensor | None = None) -> None:
        """Send the control and the weights to all ranks; called after `note`.

        Args:
            weights: `(numel,)`, sent instead of the server's weights.
        """
        self.transport.pull(self.control, weights)
