"""The server that answers requests, one at a time: it handles the request, then answers every worker that may continue.

    action_listener    communicator.next_request   a request: a pull, or a push with the version it was computed at
    update_parameters  the server's step           the contribution is applied, scaled, compensated, buffered or rejected
    get_parameters     communicator.respond        what is new since the worker's version; acknowledges a push

So no update is lost, and no answer mixes two versions. A worker that must wait is not answered yet. All ranks act together on

- the end of a loop (no more data, a stop, a NaN), once every rank waits for an answer;
- a checkpoint: the server asks each worker for its state; the worker then waits until the server has all states.

A worker with used batches that are not pushed yet is asked for neither before its next push.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mpips.comm import RankLost
from mpips.config import ConfigError
from mpips.model.message import ROUNDS, Call, Control, Stop
from mpips.report.run_report import rank_states
from mpips.server.base import Service
from mpips.server.parameter_server.batch_queue import BatchQueue
from mpips.server.parameter_server.pending_updates import PendingUpdates
from mpips.server.parameter_server.request import BATCH, WEIGHTS
from mpips.server.parameter_server.turn import Turn
from mpips.server.parameter_server.worker_table import WorkerStatus, WorkerTable
from mpips.server.rank_state import RankState


class ParameterServer(Service):
    """The asynchronous server; see `Service` for its arguments.

    Attributes:
        intake: handles contributions.
        roll: the workers and their requests.
        dealing: the batches.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        backup = self.config.backup_workers
        if self.workers > 1 and backup >= self.workers:
            raise ConfigError(f"backup_workers: given {backup} with {self.workers} workers, allowed: fewer than the workers")
        self.ahead = self.config.staleness.bound - self.config.overlap  # a worker that overlaps is one step ahead
        ranks = range(self.first, self.first + self.workers)
        self.roll, self.dealing = WorkerTable(ranks), BatchQueue(ranks)
        self._here = Control()  # the answer to a worker on this rank
        self._asked_chief = 0
        self._owed = False  # a checkpoint is due that the worker on this rank must trigger
        self._started = False
        self._turn = Turn()

    def data_of_lost(self) -> str:
        """Return what becomes of the data of a worker that has died; see `Service`."""
        return "its batches are dealt out again"

    def create_model(self) -> None:
        """Create the model, and the handling of contributions; see `Service`."""
        super().create_model()
        self.intake = PendingUpdates(self)

    def start(self) -> None:
        """Agree with the workers and broadcast the weights; a running server is stopped first and starts again."""
        if self._started:
            if not self.control.stop:
                self.stop()
            self.states = b""  # the states of a resumed run are outdated by now
            self.dealing.clear()
            self.intake.in_round.clear()
        self.control.stop, self.control.culprit, self.control.checkpoint, self.stop_asked = Stop.NO, -1, 0, False
        self.roll.clear()
        self.roll.gone |= self.lost
        self.broadcast_initial_weights()

    def broadcast_initial_weights(self) -> None:
        """Broadcast the weights, and remember them for delay compensation; see `Service`."""
        super().broadcast_initial_weights()
        self._started = True
        for rank in self.roll.clocks:
            self.intake.sent.remember(rank, int(self.control.version), self.replica.pull.weights)

    def run(self) -> None:
        """Serve a loop, until every worker has been told that the loop ends or the run is to stop, or has closed.

        Raises:
            NonFiniteError: on all ranks, if a rank's update is not finite and `nonfinite` is "raise".
            CallError: on all ranks, if the workers disagree.
        """
        self.roll.open = self.roll.present
        self._serve()

    start_server = run

    def serve(self) -> None:
        """Serve loop after loop, and between them the calls that all workers make, until every worker has left."""
        while True:
            self.run()
            if self.control.stop == Stop.PREEMPTED or (self.control.call and self.take_part()):
                return

    def _serve(self) -> None:
        push = self.replica.push
        with self._turn:
            while self.roll.open:
                if self.communicator.lost - self.roll.gone:  # noticed here, or in a call or a checkpoint
                    self._go_on()
                    continue
                with suppress(RankLost):
                    self.action_listener(*self.communicator.next_request(push.message, push.tail_at))
        self._end_loop()
        if self.fault:
            self.complain()
        self.replica.check_finite(self.control)

    def stop(self) -> int:
        """End the run: tell every worker with its next answer, after accepting what it has sent before.

        The call waits until all workers have been told. Within a validation or a step of this server it only notes the request.

        Returns:
            The version of the weights.
        """
        self.stop_asked = True
        if self._turn.free:
            self._drain()
        self._turn.wait()
        return int(self.control.version)

    def _drain(self) -> None:
        if self.control.stop and not self.roll.open:
            return
        self.roll.open = self.roll.open or self.roll.present
        self._obey({})
        if self.roll.held:  # these wait since an exception ended a loop
            self._answer()
        self._serve()

    def stop_server(self) -> None:
        """Note the request to end the run for all ranks, and return at once."""
        self.stop_asked = True

    def validate(self, measure: Callable[..., Any], name: str = "validation") -> float:
        """Measure the model, while `stop` on another thread waits; see `Service`."""
        with self._turn:
            return super().validate(measure, name)

    def round(self, contributed: bool = True) -> Control:
        """Handle a request of the worker on this rank, in a run of one process, given its push message.

        Args:
            contributed: whether the push message holds a contribution.

        Returns:
            The answer.
        """
        rank, version = self.communicator.rank, self.control.version
        self.roll.open = {rank}
        if self.config.buffers == "server":
            self.replica.buffers.store(self.replica.pull.buffers)
        self.action_listener(rank, contributed)
        while self._here.again:
            self.roll.held.add(rank)
            self._answer()
        self._here.checkpoint, self._owed = float(self._owed), False
        if not self.roll.open:
            self._end_loop()
        self.replica.check_finite(self._here)
        if contributed or self.control.version > version:
            self.replica.buffers.load(self.replica.pull.buffers)
        return self._here

    def action_listener(self, rank: int, whole: bool) -> None:
        """Handle the request in the push message: a push if it is whole, else a pull.

        Args:
            rank: the rank that has sent it.
            whole: whether it is whole.
        """
        self.look_at_save()
        if rank in self.communicator.lost:  # sent before it died; its batches are dealt out again
            return
        row = dict(zip(self._columns, self.replica.push.rows[0].tolist(), strict=True))
        if rank == self.communicator.rank:
            row["round"] = self.control.version % ROUNDS
        self.roll.rows[rank] = row
        self.roll.held.add(rank)
        self.dealing.used(rank, int(row["tickets"]), pushed=whole)
        if row["done"] or row["stop"] >= 2:
            self.dealing.give_back(rank)
        if whole:
            self.follow([[*row.values()]], self.replica.push.told())
            self.update_parameters(rank, row)
        self._obey({rank: row})
        self._answer()

    def _go_on(self) -> None:
        """Go on without workers that have died: the batches that they have not pushed are dealt out again."""
        if self.communicator.lost - self.lost:
            self.note_lost()
        for rank in self.lost - self.roll.gone:
            self.roll.lose(rank)
            self.dealing.lose(rank)
            self.intake.in_round.discard(rank)
        self.control.chief = self.chief - self.first
        self._answer()

    def update_parameters(self, rank: int, row: WorkerStatus) -> bool:
        """Handle a worker's contribution by the mode and the policy.

        Args:
            rank: the worker's rank.
            row: its row.

        Returns:
            Whether the contribution was accepted, for this update or a later one.
        """
        self.roll.clocks[rank] += 1
        taken = self.intake.take(rank, row)
        self._note(row)
        return taken

    def _note(self, row: WorkerStatus) -> None:
        """Report one push, and decide whether a checkpoint is due."""
        control, samples = self.control, row["samples"]
        means = [row[name] / samples if samples else math.nan for name in ("loss", *self.config.metrics)]
        control.round += 1
        control.loss, control.lr = means[0], self.lr
        if self.is_save_due():
            control.checkpoint = self._can_save
        now = self.communicator.clock()
        if self._job_end < math.inf:
            self.look_at_time(now - self._last)
        speed, self._last = samples / max(now - self._last, 1e-9), now
        line = (control.round, self.place.epoch, control.version, samples, means[0], control.lr, *means[1:])
        self.report.round(line, speed, lambda: rank_states(dict(sorted(self.roll.rows.items())), self.trains))

    def _obey(self, rows: Mapping[int, WorkerStatus]) -> None:
        """End the run if a rank asks for it. A rank that has left its loop only waits for the loop's end."""
        if self.control.stop or self.control.culprit >= 0:
            return
        self.obey_ranks({rank: {**row, "stop": float(row["stop"] == 1)} for rank, row in rows.items()})
        if self.control.stop == Stop.PREEMPTED:
            self.control.checkpoint = self._can_save

    @property
    def training_goes_on(self) -> bool:
        """Whether training goes on after the checkpoint that is due; see `Service`."""
        due = self.control.checkpoint or self._here.checkpoint or self.control.call == Call.EPOCH
        return bool(due) and self.control.stop != Stop.PREEMPTED

    @property
    def asked_chief(self) -> int:
        """The chief when the first worker was asked for its state; see `Service`."""
        return self._asked_chief if self.roll.told else int(self.control.chief)

    @property
    def _can_save(self) -> bool:
        return bool(self.folder) and not self.roll.gone - self.lost  # a rank that has closed cannot give its state

    @property
    def _ending(self) -> bool:
        return bool(self.control.stop or not self.control.active or self.control.culprit >= 0 or self.fault)

    def _answer(self) -> None:
        """Answer every rank that waits and may continue; write a checkpoint once all ranks have been asked for their states."""
        while True:
            training = self.roll.training
            self.control.active = len(training)
            self.control.call = self._common_call(training)
            self.control.fault = bool(self.fault)
            self.intake.step_if_enough(training)
            self._conclude()
            going = [rank for rank in sorted(self.roll.held) if self._may_answer(rank)]
            for rank in going:
                self.roll.held.discard(rank)
                self.get_parameters(rank)
            if not self._saved():
                return

    def _common_call(self, training: set[int]) -> Call:
        """Return the call that all workers wait in; NONE if they do not."""
        rows = {rank: self.roll.row(rank) for rank in sorted(self.roll.present)}
        if training or not rows or not all("call" in row for row in rows.values()):
            return Call.NONE
        call, fault = self.agreement.meet(rows, self.measurer)
        self.fault = fault or self.fault
        return call

    def _conclude(self) -> None:
        """End the run if the loop ends and ranks have left it, since these take part in nothing further."""
        left = self.roll.left
        last_word = self.control.stop in (Stop.NO, Stop.REQUESTED) and self.control.culprit < 0
        if left and last_word and self._ending and not self.control.checkpoint and self.roll.all_here():
            self.end(Stop.ENDED if len(left) == self.workers - len(self.lost) else Stop.LEFT, left)

    def _may_answer(self, rank: int) -> bool:
        roll = self.roll
        if rank in roll.told:
            return False
        if self.control.checkpoint or not roll.settled(rank) or roll.closes(rank):
            return True
        if self._ending:
            return roll.all_here()
        if rank not in roll.training or rank in self.intake.in_round:
            return False
        return not self.mode.bounded or roll.clocks[rank] - roll.slowest <= self.ahead

    def get_parameters(self, rank: int) -> None:
        """Answer a worker: the control, and the weights if it wants them and has another version."""
        row, control, pull = self.roll.row(rank), Control(**vars(self.control)), self.replica.pull
        settled, want = self.roll.settled(rank), int(row["want"])
        told = bool(control.checkpoint) and settled
        ends = settled and not told and (self._ending or self.roll.closes(rank))
        control.checkpoint = control.again = float(told)
        if told:
            if not self.roll.told:
                self._asked_chief = int(control.chief)
            self.roll.told.add(rank)
        if ends:
            self.roll.open.discard(rank)
            if self.roll.closes(rank):
                self.roll.gone.add(rank)
        else:
            control.stop, control.culprit = Stop.NO, -1
        dealt = want & BATCH and not told and not ends
        control.ticket = self.dealing.deal(rank) if dealt else -1
        pull.control = control
        whole = bool(want & WEIGHTS) and row["round"] != control.version % ROUNDS
        if whole or rank == self.communicator.rank:
            self.intake.sent.remember(rank, int(control.version), pull.weights)
        if rank == self.communicator.rank:
            self._here = control
        else:
            self.communicator.respond(rank, pull.message if whole else pull.control_message)

    def _saved(self) -> bool:
        """Write the checkpoint if one is due and every rank has been asked for its state; return whether it was written."""
        if not self.control.checkpoint or self.roll.told != self.roll.present:
            return False
        if self.worker_state is None:
            self.replica.buffers.load(self.replica.pull.buffers)
            self.save_model()
        else:
            self._owed = True
        self.control.checkpoint = 0
        self.roll.told.clear()
        return True

    def _end_loop(self) -> None:
        self.roll.end_loop(level=not self.control.stop)
        self.replica.buffers.load(self.replica.pull.buffers)
        if self.lost and not self.control.stop and (count := self.dealing.left_by_dead):
            message = f"{count} batches of a worker that died are not trained on: the others had come to the end of the loop"
            self.report.event("warning", message=message)
            self.report.line(message, always=True)
        self.dealing.end_loop(over=not self.control.stop)

    def summary(self) -> dict[str, Any]:
        """Return the staleness of all contributions; see `Service`."""
        return self.intake.summary()

    def own_tree(self) -> dict[str, Any]:
        """Return the clocks, the staleness counts, the buffered contributions and the unused batches; see `Service`."""
        clocks = {str(rank): clock for rank, clock in self.roll.clocks.items()}
        return super().own_tree() | self.intake.state_dict() | {"clocks": clocks, "dealing": self.dealing.state_dict()}

    def put_own(self, tree: dict[str, Any], states: Sequence[RankState]) -> None:
        """Restore what `own_tree` returned; a worker that is new starts at the slowest clock. See `Service`."""
        super().put_own(tree, states)
        saved, ours = {int(rank): clock for rank, clock in tree["clocks"].items()}, self.roll.clocks
        self.roll.clocks = {rank: saved.get(rank, min(saved.values(), default=0)) for rank in ours}
        same = saved.keys() == ours.keys()
        self.intake.load_state_dict(tree, same)
        ahead = {rank: int(state.ahead.get("tickets", 0)) for rank, state in enumerate(states)}
        self.dealing.load_state_dict(tree["dealing"], ahead if same else {})
