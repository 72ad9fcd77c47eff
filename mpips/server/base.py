"""The state and the decisions that both servers share: model, optimizer, validation, stopping, checkpoints, report.

`Server` runs rounds on it, `ParameterServer` answers requests. Neither knows of the other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import mpips
from mpips import checkpoint
from mpips.algorithms.modes import Mode, choose_mode, server_optimizer
from mpips.comm import Blob, Communicator, broadcast_bytes
from mpips.config import Config
from mpips.data import Place
from mpips.model.message import (
    COLUMNS,
    LOSS,
    WEIGHT,
    Call,
    CallError,
    Control,
    Stop,
    WorkersLostError,
    replicate,
)
from mpips.optim import hyperparameters as hyper
from mpips.optim import snapshot
from mpips.optim.flat_optimizer import FlatOptimizer, MakeOptimizer, made
from mpips.process import rng
from mpips.process.environment import job_end
from mpips.process.lifecycle import tell_left
from mpips.reduce.choice import choose_transport
from mpips.reduce.transport import Decision, Transport
from mpips.report.run_report import Report, number
from mpips.rules import choose
from mpips.server import contract
from mpips.server.agreement import Agreement
from mpips.server.early_stopping import Patience
from mpips.server.rank_state import RankState, pack_all, told_streams

JOB_END = 20.0  # seconds before the job's end, besides rounds and a checkpoint, at which the run is preempted


class Service:
    """The base class of both servers.

    Args:
        communicator: rank 0's end.
        model: the model to serve; its parameters are rank 0's copy of the weights.
        optimizer: an optimizer of the model's parameters, or a function from a list of parameters to one. In modes with local
            steps it is the workers' optimizer.
        config: the settings.
        folder: the folder for checkpoints; None writes none.
        report: receives metrics and events.
        validation_data: makes the validation data, called on the server alone.
        validate: measures the model on the server at the end of each epoch; called as `measured` says.
        follows: whether the workers push their optimizer's hyperparameters, and the server's optimizer takes these over.

    Attributes:
        mode: the row of MODES that this run is.
        replica: the model's flat buffers and messages.
        optimizer: the optimizer of the server's own step.
        transport: moves the messages of a round; set by `broadcast_initial_weights`.
        inner: the workers' optimizer in modes with local steps: for its learning rate, and for a worker on this rank. Else
            None.
        fault: why no rank can continue, broadcast with the next message to all ranks; else "".
        control: what is broadcast to all ranks next.
        place: the place of this rank's worker in the data; without one, only its epoch has a meaning.
        signalled: set to write a checkpoint and end the run at the next round.
        stop_asked: set to end the run with the next message to all ranks.
        states: the ranks' packed states of a resumed run; else empty.
        worker_state: returns the state of a worker on this rank, for a checkpoint; None without one.
        lost: the ranks of workers that have died, and that the run goes on without.
        dealt: the ranks of the workers among which the data of the present loop is dealt out.
        validation_data: the data that `load_validation_data` has loaded.
        writer: writes the checkpoints; None without a folder.
        performances: rank -> its numbers of messages and bytes, set by `receive_performances_from_nodes`.
    """

    def __init__(
        self,
        communicator: Communicator,
        model: nn.Module,
        optimizer: Optimizer | MakeOptimizer,
        *,
        config: Config | None = None,
        folder: Path | None = None,
        report: Report | None = None,
        validation_data: Callable[[], Any] | None = None,
        validate: Callable[..., Any] | None = None,
        follows: bool = False,
    ) -> None:
        self.communicator, self.model, self.config, self.folder = communicator, model, config or Config(), folder
        self._settings = json.dumps(self.config.settings())
        self.mode: Mode = choose_mode(self.config)
        self.rule, self.last = choose(self.config)
        self.report = report or Report(None, self.config.metrics)
        self.trains = communicator.size == 1 or self.config.server_trains
        self.first = 0 if self.trains else 1  # rank of the first worker
        self.workers = communicator.size - self.first
        self.lost: set[int] = set()
        self.dealt = list(range(self.first, communicator.size))
        self.control = Control()
        self.patience: dict[str, Patience] = {}  # by the value's name, in the order of the first validations
        self.values: dict[str, float] = {}  # name -> the last value
        self.place = Place()
        self.worker_state: Callable[[int | None], RankState] | None = None
        self.validation_data: Any = None
        self.performances: dict[int, dict[str, int]] = {}
        self.last_checkpoint: Path | None = None
        self.writer = checkpoint.Writer(folder, self.config.checkpoint.keep, self.report.sync) if folder else None
        self._save_took = 0.0  # the seconds of the longest save
        self._saving = 0.0, 0.0  # when the last checkpoint was begun, and how long that has held the round
        self._save_rounds, self._save_seconds = self.config.checkpoint.rounds, self.config.checkpoint.seconds
        self.signalled = self.stop_asked = False
        self._signalled_by: list[int] = []  # the ranks by which the run is preempted at the end of a batch
        self._job_end, self._slowest = job_end(), 0.0  # when the job ends, and the seconds of the longest round
        self._given, self._make_data, self._measure, self._follows = optimizer, validation_data, validate, follows
        self.agreement = Agreement(self.first, communicator.clock, self._warn)
        self.digest = ""  # the contract's SHA-256
        self._told: list[float] = []  # the hyperparameters that were taken over last
        self._agreed = b""  # those of all workers, if all contributed in the last round
        self.fault = ""
        self.states = b""
        self.kept: dict[str, Any] = {}
        self.told_state: dict[str, Any] = {}
        self._bad_average: dict[int, int] = {}  # as `bad` of `Updates`, of the gradients that were averaged last
        self.optimizer: FlatOptimizer
        self.transport: Transport
        self._columns = COLUMNS + self.config.metrics
        self._averaged = [LOSS, *range(len(COLUMNS), len(self._columns))]  # columns that are sums over samples
        self._last = self._saved_at = communicator.clock()

    def create_model(self) -> None:
        """Lay the model out flat; create the master weights and the optimizers."""
        given = made(self._given, self.model)
        rows = 1 if self.mode.requests else self.communicator.size
        self._numbers = hyper.read(given)  # the hyperparameters at the start of the run
        numbers = len(self._numbers) if self._follows else 0
        self._terms = hyper.terms(given) if self._follows else []
        self.replica = replicate(self.model, self.config, rows, self.communicator.allocate, self.mode.vectors, numbers)
        self.inner = FlatOptimizer(self.replica, given, own=True) if self.mode.local else None
        self.optimizer = server_optimizer(self.mode, self.config, self.workers, self.replica, given)
        self.control.lr = self.lr
        self.check_requires_grad()

    @property
    def lr(self) -> float:
        """The learning rate of the script's optimizer, as the workers last pushed it."""
        return (self.inner or self.optimizer).lr

    def check_requires_grad(self) -> None:
        """Report which parameters are trained: only these travel after the initial broadcast."""
        flat = self.replica.flat
        trained = sum(slot.numel for slot in flat.slots)
        frozen = sum(p.numel() for p in flat.frozen.values())
        self.report.event("trainable", trained=trained, frozen=frozen, tensors=[slot.name for slot in flat.slots])

    def load_validation_data(self) -> None:
        """Load the validation data, once, on the server alone."""
        if self._make_data is not None and self.validation_data is None:
            self.validation_data = self._make_data()

    def broadcast_initial_weights(self) -> None:
        """Agree with all ranks on the contract, then broadcast the weights and, in a resumed run, the ranks' states.

        Raises:
            ContractError: the ranks do not agree.
        """
        if not hasattr(self, "replica"):
            self.create_model()
        self.replica.pull.control = self.control
        self.digest = contract.begin(self.communicator, self.replica, self.config, self._terms)
        broadcast_bytes(self.communicator, self.states)
        given = self.replica, self.config, self.mode, self.optimizer, self.rule, self.last
        self.transport = choose_transport(self.communicator, *given, serves=True)
        if self.inner:
            self.inner.rebind()
        if not self.trains:
            told_streams(self.communicator, rng.capture())
        if self.communicator.size > 1 and not self.mode.requests:
            self._report_plan()
        self._last = self.communicator.clock()

    def _report_plan(self) -> None:
        plan, how = self.transport.plan, self.transport.how
        self.report.event("plan", plan=plan, communicator=how)
        self.report.line(f"plan: {plan}, by {how}", always=True)
        if self.config.comm_dtype != "full" and not self.transport.encodes:
            self.report.event(
                "warning", message=f"comm_dtype: {self.config.comm_dtype} is for plan sharded on several nodes; not used here"
            )

    def decide(self, decision: Decision) -> None:
        """Let every rank carry out the decision on the combined contribution; a step is counted, and buffers are combined."""
        push, pull = self.replica.push, self.replica.pull
        if decision.action == "skip":
            self.transport.decide(decision)
            return
        if self.inner and self.optimizer.torch:
            for group in self.optimizer.torch.param_groups:
                if "inner_lr" in group:  # SlowMo's gamma
                    group["inner_lr"] = self.inner.lr
        self.transport.decide(decision)
        self.combine_buffers()
        if push.second is not None and pull.second is not None:
            pull.second.add_(push.second)
        self.control.version += 1

    def combine_buffers(self) -> None:
        """Replace the model's buffers by the combination of all workers' buffers."""
        push, buffers = self.replica.push, self.replica.buffers
        if buffers.names:
            buffers.combine(push.floats, push.heard.limbs, self.replica.pull.buffers)

    def follow(self, rows: Sequence[Sequence[float]], limbs: Any) -> None:
        """Take over the workers' hyperparameters if they have changed. Sets `fault` if the workers disagree.

        Args:
            rows: the workers' rows of the tail.
            limbs: array of shape `(workers, width)`, their hyperparameters in limbs.
        """
        if not self._follows or (told := limbs.tobytes()) == self._agreed:
            return
        stepping = [k for k, row in enumerate(rows) if row[WEIGHT]]
        if not stepping:
            return
        pushed, optimizer = limbs[stepping], (self.inner or self.optimizer).torch
        if not self.mode.local:  # there each worker has its own, and the first one's are taken
            if (pushed != pushed[0]).any():
                self._report_difference(optimizer, limbs, stepping)
                return
            self._agreed = told if len(pushed) == len(limbs) else b""
        before, self._told = self._told, hyper.decode(pushed[0])
        hyper.write(optimizer, self._told, before)

    def _report_difference(self, optimizer: Optimizer, limbs: Any, stepping: Sequence[int]) -> None:
        one = stepping[0]
        other = next(k for k in stepping if (limbs[k] != limbs[one]).any())
        at = int((limbs[other] != limbs[one]).nonzero()[0][0]) // hyper.LIMBS
        mine, its = (hyper.decode(limbs[k])[at] for k in (one, other))
        self.fault = (
            f"the workers do not agree: worker {one} (rank {one + self.first}) has {hyper.names(optimizer)[at]} = {mine:g}, "
            f"worker {other} (rank {other + self.first}) has {its:g}; set the optimizer's hyperparameters alike on all workers"
        )

    def handle_nonfinite(self, bad: dict[int, int]) -> None:
        """Report an update that is not finite, and end the run if `nonfinite` is "raise".

        Args:
            bad: rank -> the index of its first tensor that is not finite.
        """
        rank, slot = next(iter(bad.items()))
        if self.config.nonfinite == "raise":
            self.control.culprit, self.control.slot = rank, slot
        name = self.replica.flat.slots[slot].name
        self.report.event("warning", message=f"rank {rank}: NaN or Inf in the gradient of {name}", round=self.control.round)

    def obey_ranks(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """End the run for all ranks in this round if a rank was signalled to end, has left its loop or asks to stop.

        Args:
            rows: rank -> its row of the tail, by column.
        """
        if self.control.stop == Stop.PREEMPTED:
            return
        signalled = [rank for rank, row in rows.items() if row["signal"]] + [0] * self.signalled or self._signalled_by
        if signalled and any(row["more"] and row["call"] not in (Call.PAUSE, Call.LEAVE) for row in rows.values()):
            self.control.preempting = True  # a resumed run could not take the rest of a batch's steps
            self._signalled_by, signalled = signalled, []  # who may die until then
        left = [rank for rank, row in rows.items() if row["stop"] == 2]
        asked = [rank for rank, row in rows.items() if row["stop"] == 1] + [0] * self.stop_asked
        gone = Stop.ENDED if len(left) == self.workers - len(self.lost) else Stop.LEFT
        if gone == Stop.LEFT and not any(row["weight"] > 0 for row in rows.values()):
            left = []  # no other worker trains any more: they may merely reach their end later
        for stop, ranks in ((Stop.PREEMPTED, signalled), (gone, left), (Stop.REQUESTED, asked)):
            if ranks and (stop == Stop.PREEMPTED or not self.control.stop):
                self.end(stop, ranks)
                return

    def note_lost(self) -> None:
        """Note the workers that have died since the last call, and set `fault` if the run does not go on without them."""
        new = sorted(self.communicator.lost - self.lost)
        self.lost.update(new)
        present, needed = self.workers - len(self.lost), self.config.min_workers
        names = " and ".join(f"worker {rank - self.first} (rank {rank})" for rank in new)
        if present < max(1, needed):
            self.fault = f"{names} died: {present} of {self.workers} are left, min_workers is {needed}; the run ends"
        elif new:
            left = f"the run goes on with {present} of {self.workers} workers; {self.data_of_lost()}"
            message = f"{names} died after round {self.control.round:.0f}: {left}"
            self.report.event("warning", message=message)
            self.report.line(message, always=True)
            for rank in new:
                tell_left(rank)  # the launcher does not wait for its end

    def data_of_lost(self) -> str:
        """Return what becomes of the data of a worker that has died, as a text for people."""
        if self.mode.federated:
            return "its clients of this round do not count, and others host them from the next on"
        return "what is left of its data in this loop is not trained on"

    @property
    def chief(self) -> int:
        """The rank of the first worker that lives."""
        return next(rank for rank in range(self.first, self.communicator.size + 1) if rank not in self.lost)

    def look_at_time(self, seconds: float) -> None:
        """Preempt the run if the job is about to end: a checkpoint is to be on the disk before.

        Args:
            seconds: how long the last round has taken.
        """
        self._slowest = max(self._slowest, seconds)
        left = self._job_end - time.time()
        if left < JOB_END + 3 * self._slowest + 2 * self._save_took and not self.signalled:
            self.signalled = True
            self.report.event("warning", message=f"the job ends in {left:.0f} s", round=self.control.round)
            self.report.line(f"the job ends in {left:.0f} s: the run is preempted", always=True)

    def end(self, why: Stop, ranks: list[int]) -> None:
        """End the run for the reason `why`, at the request of `ranks`."""
        self.control.stop = why
        self.report.stopped(why.name.lower(), int(self.control.round), ranks)

    def send_stop_signal(self) -> None:
        """Broadcast the control between rounds, with the request to stop if there is one."""
        if self.stop_asked and not self.control.stop:
            self.end(Stop.REQUESTED, [0])
        self.transport.tell(self.control)

    def _warn(self, message: str) -> None:
        self.report.event("warning", message=message, round=self.control.round)
        self.report.line(message, always=True)

    @property
    def measurer(self) -> int | None:
        """The rank that measures in `ps.validate`; None if the server does."""
        return None if self._measure is not None else self.chief

    def complain(self) -> None:
        """Broadcast `fault` to all ranks, which expect it.

        Raises:
            CallError: always; a WorkersLostError if too many workers have died.
        """
        kind = WorkersLostError if self.lost else CallError
        raise kind(broadcast_bytes(self.communicator, self.fault.encode()).decode())

    def take_part(self) -> bool:
        """Carry out the call that all workers have made; return whether they have all left."""
        call = Call(int(self.control.call))
        if call == Call.AVERAGE:
            self.average()
        elif call != Call.LOOP:
            while "chief" in (reply := self.exchange_call(b"")):
                pass
            self.carry_out(reply)
        return call == Call.LEAVE

    def average(self) -> None:
        """Combine the workers' gradients, without a step, and give every rank the result.

        Raises:
            CallError: this server has no rounds.
        """
        raise CallError("gradients are averaged in modes with rounds only")

    def exchange_call(self, given: bytes) -> dict[str, Any]:
        """Gather the arguments of a call from all ranks, and broadcast the reply.

        Args:
            given: this rank's arguments, as JSON; empty if it has none.

        Returns:
            The reply. With "chief" in it all ranks are to make the exchange again: the worker that gives what all have in
            common has died, and this is the next one.
        """
        blobs = [bytes(blob) for blob in self.communicator.gather_bytes(given)]
        if self._chief_died(int(self.control.chief)):
            self.control.chief = self.chief - self.first
            blob = json.dumps({"chief": self.control.chief, "stop": int(self.control.stop)}).encode()
        else:
            blob = self.answer(blobs)
        reply: dict[str, Any] = json.loads(broadcast_bytes(self.communicator, blob))
        return reply

    def carry_out(self, reply: Mapping[str, Any]) -> None:
        """Write the checkpoint and the results that the reply to a call demands."""
        if reply["save"]:
            self.save_model()
        if self.control.call in (Call.FINISH, Call.LEAVE):
            self.end_save()
        if reply["finish"]:
            self.write_results(self.report.values)
        if reply["finish"] or reply["awaited"]:
            broadcast_bytes(self.communicator, b"")  # no worker continues before DONE, or what ps.save() saves, is written

    def tell_state(self) -> dict[str, Any]:
        """Put the optimizer's state together from all ranks' slices, and broadcast it.

        Returns:
            As `FlatOptimizer.state_dict`.
        """
        blobs = self.communicator.gather_bytes(RankState(-1, Place(), {}).pack())
        parts = self.transport.optimizer_state([RankState.unpack(blob).slices for blob in blobs if blob])
        tree = checkpoint.joined(parts)
        broadcast_bytes(self.communicator, RankState(-1, Place(), {}, own=tree).pack())
        return tree

    def answer(self, blobs: Sequence[bytes]) -> bytes:
        """Do the server's part of the call that all workers have made, and return the reply as JSON.

        Args:
            blobs: each rank's arguments, as JSON, by rank.
        """
        arguments = [json.loads(blob) for blob in blobs if blob]
        call = Call(int(self.control.call))
        left = self.control.stop == Stop.LEFT
        saves = call == Call.SAVE
        reply: dict[str, Any] = {"save": saves, "awaited": saves, "finish": call == Call.FINISH and not left}
        if call == Call.LEAVE:  # steps after the last epoch, or without epochs, are not saved yet
            reply["save"] = not all(one["ended"] for one in arguments)
            reply["finish"] = reply["save"] and not left
            self._spare_weights(arguments, reply)
        if call in (Call.BEGIN, Call.MEET):
            reply["told"] = next((one["told"] for one in arguments if one.get("told")), "")
        if call == Call.BEGIN and self.lost:
            self.dealt = [rank for rank in range(self.first, self.communicator.size) if rank not in self.lost]
            reply["lost"] = sorted(rank - self.first for rank in self.lost)
        if call == Call.VALIDATE:
            name = next(one["name"] for one in arguments if one)
            given = next((one["values"] for one in arguments if one.get("values")), None) or self.measure(name)
            self.take_values(given)
            reply |= {"told": list(given), "several": list(given) != [name]}
        elif call == Call.EPOCH:
            self._end_epoch(next(one for one in arguments if one), reply)
        return json.dumps(reply | {"values": self.values, "stop": int(self.control.stop)}).encode()

    def _spare_weights(self, arguments: Sequence[Mapping[str, Any]], reply: dict[str, Any]) -> None:
        """Cancel the checkpoint at the end of the script if that has changed the weights in place after the last round."""
        moved = next((one["moved"] for one in arguments if one["moved"]), "")
        if reply["save"] and moved and self.replica.push.shared:
            reply["save"] = False
            self.report.event(
                "warning",
                message=f"no checkpoint of the end: after the last round the script has changed {moved} in place; call "
                f"ps.save() before",
            )

    def _end_epoch(self, given: Mapping[str, Any], reply: dict[str, Any]) -> None:
        if not given["cut"]:
            if not self.trains:  # else it is the place of the worker on this rank, which has advanced it already
                self.place.next_epoch()
            if self._measure:
                self.take_values(self.measure("validation"), epoch=self.place.epoch - 1)
        every, done = self.config.checkpoint.epochs, self.place.epoch
        reply["save"] = bool(self.control.stop or done >= given["count"] or (every and done % every == 0))

    def measure(self, name: str) -> dict[str, float]:
        """Measure the model on this rank, by the function that `connect` was given.

        Returns:
            The measured values by name; `name` is the name of a single one.

        Raises:
            CallError: `connect` was given no function.
        """
        if self._measure is None:
            raise CallError(
                "ps.validate() without a function: given none to connect either; expected ps.validate(measure) or "
                "mpips.connect(..., validate=measure)"
            )
        self.load_validation_data()
        return measured(self.model, self._measure, self.validation_data, name)

    def take_values(self, values: Mapping[str, float], epoch: int | None = None) -> None:
        """Record validation values, and decide whether to stop.

        Args:
            values: the values by name.
            epoch: the epoch that they belong to; by default the one in progress.
        """
        epoch = self.place.epoch if epoch is None else epoch
        for name, value in values.items():
            self.values[name] = value
            self.check_improvement(value, name)
            self.report.validated(epoch, int(self.control.round), value, self.patience[name].best, name)

    def validate(self, measure: Callable[..., Any], name: str = "validation") -> float:
        """Measure the model on this rank, and decide whether to stop.

        Args:
            measure: called with the validation data if there are any, else without arguments; in eval mode and without grad.
            name: the name of the value.

        Returns:
            The value; of several, the first.
        """
        self.load_validation_data()
        values = measured(self.model, measure, self.validation_data, name)
        self.take_values(values)
        return next(iter(values.values()))

    def check_improvement(self, accuracy: float, name: str = "validation") -> bool:
        """Record a validation value.

        Args:
            accuracy: the value.
            name: the value's name.

        Returns:
            True to stop: the target is reached, or there was no gain for `early_stopping.patience` validations. False to
            continue. False also for values other than `early_stopping.monitor`, by default the first one validated.
        """
        verdict = self.patience.setdefault(name, Patience()).judge(accuracy, self.config.early_stopping)
        if name != (self.config.early_stopping.monitor or next(iter(self.patience))):
            return False
        if verdict and not self.control.stop:
            self.end(verdict, [0])
        return verdict != Stop.NO

    def get_queue(self) -> Communicator:
        """Return the communicator, from which the server receives."""
        return self.communicator

    def get_server_iterations(self) -> int:
        """Return the number of rounds done."""
        return int(self.control.round)

    def save_model(self, wandb_run: Any = None) -> Path | None:
        """Write a checkpoint; all ranks take part and send their states.

        A checkpoint that is due after a round or an epoch is only copied here, and written while training goes on.

        Args:
            wandb_run: an object with `save(path)`, such as a Weights & Biases run; it is passed the file's path.

        Returns:
            The file's path; None without a folder, or if the checkpoint is not written yet.

        Raises:
            CheckpointError: this checkpoint, or the one before, could not be written.
        """
        begun = time.perf_counter()
        blobs = self._gather_states()
        if self.writer is None:
            return None
        if not self.report.in_place:
            raise checkpoint.CheckpointError(
                f"{self.report.folder}: the run's folder has been moved or deleted since the run began; the run ends, as "
                f"part of its files would be in a new one. It can go on from its last checkpoint (--mpips.resume FOLDER)"
            )
        tree = self.state_dict(self._states(blobs))
        self.report.flush()  # the checkpoint holds the number of its rows
        self.end_save()
        self._saved_at = self.communicator.clock()
        if self.training_goes_on and wandb_run is None:
            self.writer.begin(int(self.control.round), tree, still=blobs)
            self._saving = begun, time.perf_counter() - begun
            return None
        written = self.writer.write(int(self.control.round), tree)
        self._note_saved(written, begun, written.time - begun)
        if wandb_run is not None:
            wandb_run.save(str(written.path))
        return written.path

    def _gather_states(self) -> list[Blob]:
        """Gather all ranks' states, and again if the worker that gives what all have in common died meanwhile."""
        chief: int | None = None
        while True:
            own = self.worker_state(chief) if self.worker_state else RankState(-1, self.place, rng.capture())
            blobs = self.communicator.gather_bytes(*own.parts())
            if not self.config.min_workers:
                return blobs
            died = self._chief_died(self.asked_chief if chief is None else chief)
            if died:
                chief = self.chief - self.first
                self.control.chief = chief
            broadcast_bytes(self.communicator, str(chief).encode() if died else b"")
            if not died:
                return blobs

    @property
    def asked_chief(self) -> int:
        """The number of the worker that gives what all have in common in the checkpoint in progress, as the workers know it."""
        return int(self.control.chief)

    def _chief_died(self, chief: int) -> bool:
        """Note who has died, and return whether worker `chief` has.

        Raises:
            WorkersLostError: nobody lives.
        """
        if len(self.communicator.lost) > len(self.lost):
            self.note_lost()
        if len(self.lost) == self.workers:
            self.complain()
        return self.first + chief in self.lost

    def _states(self, blobs: Sequence[Blob]) -> list[RankState]:
        """Return the ranks' states, the server's first if it does not train, then those of the workers that share the data.

        A worker that has died has given an empty blob. In a resumed run it goes on at the first living worker's place.
        """
        server = [RankState.unpack(blobs[0])] if not self.trains else []
        first = RankState.unpack(blobs[self.chief])
        return server + [
            RankState.unpack(blobs[rank]) if blobs[rank] else first.for_lost(index) for index, rank in enumerate(self.dealt)
        ]

    @property
    def training_goes_on(self) -> bool:
        """Whether the checkpoint that is due is one after which training goes on: after a round, or at the end of an epoch."""
        return bool(self.control.checkpoint or self.control.call == Call.EPOCH) and self.control.stop != Stop.PREEMPTED

    def end_save(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.writer and (written := self.writer.wait()):
            self._note_saved(written, *self._saving)

    def look_at_save(self) -> None:
        """Take note of a checkpoint that has been written meanwhile; see `end_save`."""
        if self.writer and self.writer.done:
            self.end_save()

    def _note_saved(self, written: checkpoint.Written, begun: float, held: float) -> None:
        self.last_checkpoint, self._save_took = written.path, max(self._save_took, written.time - begun)
        seconds = {"seconds": written.time - begun, "held": held}
        self.report.event("checkpoint", round=written.step, path=str(written.path), **seconds, bytes=written.nbytes)

    def is_save_due(self) -> bool:
        """Return whether `checkpoint.every` asks for a checkpoint after the round that has just been counted."""
        if self._save_seconds:
            late = self.communicator.clock() - self._saved_at >= self._save_seconds
            return late and self.writer is not None and not self.writer.busy
        return self._save_rounds > 0 and self.control.round % self._save_rounds == 0

    def state_dict(self, states: list[RankState]) -> dict[str, Any]:
        """Return everything that a run needs to continue, as nested dicts.

        Args:
            states: the ranks' states, by rank.
        """
        return self._tree(self.transport.optimizer_state([state.slices for state in states]), states)

    def _tree(self, optimizer: dict[str, Any], states: list[RankState]) -> dict[str, Any]:
        report = self.report
        return {
            "round": int(self.control.round),
            "version": int(self.control.version),
            "epoch": self.place.epoch,
            "run": report.run,
            "config": self._settings,
            "contract": self.digest,
            "versions": {"mpips": mpips.__version__, "torch": str(torch.__version__)},
            "world": {"size": self.first + len(self.dealt), "workers": len(self.dealt)},
            **snapshot.take_model(self.replica, next((state.frozen for state in states if state.frozen), {})),
            **optimizer,
            "inner": self.inner.state_dict() | {"masters": {}} if self.inner else {},
            "rule": {"name": self.config.rule, **self.rule.state_dict()},
            "mode": {"name": self.config.mode, **self.own_tree()},
            "stopping": {
                "names": json.dumps(list(self.values)),
                "value": torch.tensor(list(self.values.values()), dtype=torch.float64),
                "best": torch.tensor([self.patience[name].best for name in self.values], dtype=torch.float64),
                "waited": torch.tensor([self.patience[name].waited for name in self.values], dtype=torch.int64),
            },
            "given": torch.tensor(self._numbers, dtype=torch.float64),
            "kept": next((state.kept for state in states if state.kept), {}),
            "metrics": {"rows": report.metrics.count},
            "validations": {"rows": report.validations.count},
            "ranks": {str(rank): state.state_dict() for rank, state in enumerate(states)},
        }

    def own_tree(self) -> dict[str, Any]:
        """Return what this kind of server adds to a checkpoint."""
        second = self.replica.pull.second
        return {} if second is None else {"second": dict(self.replica.flat.named(second))}

    def put_own(self, tree: dict[str, Any], states: Sequence[RankState]) -> None:
        """Restore what `own_tree` returned.

        Args:
            tree: what it returned.
            states: the ranks' states in the same checkpoint.
        """
        if (second := self.replica.pull.second) is not None:
            ours = dict(self.replica.flat.named(second))
            snapshot.check_same("seconds", ours, tree["second"])
            for name, view in ours.items():
                view.copy_(tree["second"][name])

    def resume(self, path: Path, count: int = 1) -> None:
        """Restore a checkpoint; called after `create_model` and before `broadcast_initial_weights`.

        Args:
            path: the checkpoint.
            count: this run's number among the runs of its script, from 1.

        Raises:
            CheckpointError: the file is damaged or not a checkpoint.
            SnapshotError: it is of another model or optimizer, or lacks something.
        """
        try:
            tree = checkpoint.load(path)
            self._check_run(path, tree["run"], count)
            self._put(tree, path)
        except snapshot.SnapshotError as error:
            raise snapshot.SnapshotError(f"{path}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise snapshot.SnapshotError(
                f"{path}: holds what no run of this version writes ({type(error).__name__}: {error}); use another checkpoint"
            ) from error
        self.report.event("resume", round=self.control.round, path=str(path))
        if path.parent == self.folder and (aside := checkpoint.set_newer_aside(path)):
            message = f"resume: checkpoints that are newer than {path.name} are in {aside} now"
            self.report.event("warning", message=message)
            self.report.line(message, always=True)
        self.last_checkpoint = path

    def _put(self, tree: dict[str, Any], path: Path) -> None:
        """Restore what `state_dict` returned, which was saved at `path`."""
        for name in self._tree(self.optimizer.state_dict(), []):
            tree[name]  # KeyError for each missing entry, even for those that are not read
        saved = tree["mode"]["name"]
        if saved != self.config.mode and (self.mode.local or tree["inner"]):
            raise snapshot.SnapshotError(
                f"the checkpoint is of mode {saved}, this run of {self.config.mode}; give --mpips.mode {saved}"
            )
        states = [RankState.from_tree(tree["ranks"][str(rank)]) for rank in range(tree["world"]["size"])]
        snapshot.put_model(tree, self.replica)
        self.optimizer.load_state_dict(tree)
        self._warn_of_changes(tree["given"].tolist())
        if self.inner:
            self.inner.load_state_dict(tree["inner"])
        if tree["rule"]["name"] == self.config.rule:
            self.rule.load_state_dict({key: kept for key, kept in tree["rule"].items() if key != "name"})
        if saved == self.config.mode:
            self.put_own(tree["mode"], states)
        stopping = tree["stopping"]
        numbers = [stopping[key].tolist() for key in ("value", "best", "waited")]
        for name, value, best, waited in zip(json.loads(stopping["names"]), *numbers, strict=True):
            self.values[name], self.patience[name] = value, Patience(best, waited)
        self.kept = tree["kept"]
        self.states = pack_all(states)
        first, taken = states[-1].place, max(state.place.taken for state in states)  # the last rank is always a worker
        self.place = Place(first.epoch, first.loop, taken, first.over, inside=first.inside)
        rng.restore(states[0].streams)
        self.control = Control(int(tree["round"]), int(tree["version"]), active=self.workers, lr=self.lr)
        metrics, validations = (int(tree[table]["rows"]) for table in ("metrics", "validations"))
        self.report.restore(metrics, validations, path.parent.parent)

    def _check_run(self, path: Path, run: str, count: int) -> None:
        """Raise SnapshotError if `run` is not its script's run number `count`, or not the run of the folder that it lies in."""
        if number(run) != count:
            raise snapshot.SnapshotError(
                f"of its script's run number {number(run)}, this is number {count}; expected --mpips.resume auto, by which "
                f"each goes on with its own, or a checkpoint of the first"
            )
        if path.parent != self.folder:
            return
        self.report.run = self.report.run or run
        if run != self.report.run:
            raise snapshot.SnapshotError(
                f"of run {run}, its folder of run {self.report.run}; expected --mpips.run_dir with a "
                f"new folder for what goes on from it"
            )

    def _warn_of_changes(self, before: list[float]) -> None:
        """Warn of hyperparameters that the script now gives other values than at the start: the checkpoint's are used."""
        optimizer = (self.inner or self.optimizer).torch
        for name, old, new in zip(hyper.names(optimizer), before, self._numbers, strict=False):
            if old != new and old == old:
                message = f"resume: the script gives {name} = {new:g}, the run began with {old:g}; the checkpoint's is used"
                self.report.event("warning", message=message)
                self.report.line(message, always=True)
        self._numbers = before

    def receive_performances_from_nodes(self) -> tuple[int, int]:
        """Gather every rank's traffic into `performances`, once, at the end of the run.

        Returns:
            The number of calls and the number of bytes, summed over the ranks.
        """
        blobs = self.communicator.gather_bytes(json.dumps(self.communicator.traffic).encode())
        self.performances = {rank: json.loads(bytes(blob)) for rank, blob in enumerate(blobs) if blob}
        totals = [
            sum(n for traffic in self.performances.values() for call, n in traffic.items() if call.endswith(kind))
            for kind in ("calls", "bytes")
        ]
        return totals[0], totals[1]

    def write_results(self, accuracy_validation: list[float]) -> None:
        """Write the results of the run to the file DONE.

        Args:
            accuracy_validation: the validations' values.
        """
        messages, moved = self.receive_performances_from_nodes()
        value = accuracy_validation[-1] if accuracy_validation else None
        self.report.done(
            {
                "seconds": round(time.time() - self.report.begun, 3),
                "ranks": self.communicator.size,
                "rounds": self.get_server_iterations(),
                "versions": int(self.control.version),
                "name": self.report.name,
                "value": value,
                "validation": accuracy_validation,
                "stop": Stop(int(self.control.stop)).name.lower(),
                "checkpoint": None if self.last_checkpoint is None else str(self.last_checkpoint),
                "messages": messages,
                "bytes": moved,
                "lost": sorted(self.lost),
                **self.summary(),
            }
        )

    def summary(self) -> dict[str, Any]:
        """Return what this kind of server adds to the results of the run."""
        return {}


def measured(model: nn.Module, measure: Callable[..., Any], data: Any, name: str) -> dict[str, float]:
    """Return what `measure` returns for the model, in eval mode and without grad, as numbers by name.

    Args:
        model: the model; each module's mode is restored afterwards.
        measure: called with `data`, or without arguments if that is None.
        data: the validation data.
        name: the name of a single number; several are returned as a dict by names of their own.

    Raises:
        TypeError: `measure` returns something else than numbers.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        value = measure() if data is None else measure(data)
    for module, training in modes.items():  # one by one, as a script may keep a frozen module in eval mode
        module.training = training
    return {k: _number(v, k) for k, v in value.items()} if isinstance(value, Mapping) else {name: _number(value, name)}


def _number(value: Any, name: str) -> float:
    if isinstance(value, (Number, np.generic)) and not isinstance(value, (complex, np.complexfloating)):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        return _number(value.item(), name)
    given = f"a {type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
    raise TypeError(
        f"validate(): the function returned {given} for {name!r}; expected a number, or a dict of numbers by "
        f"name; a function that only prints is called `if ps.worker == 0:`"
    )
