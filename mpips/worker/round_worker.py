"""A worker's half of a round: push a contribution, pull the new weights.

    push  update.write          the gradients, or what the mode pushes instead, and this rank's row
    pull  RemoteServer.round    the transport's push, reduce, decide and pull

The new weights arrive where the model's parameters are, so there is nothing to copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips.algorithms.modes import choose_mode, make_update, server_optimizer
from mpips.comm import Communicator
from mpips.config import Config, ConfigError
from mpips.data import Common, Part, Place
from mpips.model.message import (
    BAD,
    LOSS,
    ROUNDS,
    SAMPLES,
    WEIGHT,
    Call,
    CallError,
    Control,
    NonFiniteError,
    Replica,
    Stop,
    WorkerStatus,
    replicate,
)
from mpips.optim import hyperparameters as hyper
from mpips.optim.flat_optimizer import FlatOptimizer, MakeOptimizer, made
from mpips.process import rng
from mpips.reduce.transport import Transport
from mpips.server.rank_state import RankState, for_worker, told_streams, unpack_all
from mpips.worker.remote_server import RemoteServer

KEEPING = "the state_dict() of what ps.keep() is given", "leave it out; what connect() was given is in the checkpoint"


class Tally:
    """The steps since the last push, as sums over samples.

    Args:
        metrics: the number of metrics.
    """

    def __init__(self, metrics: int) -> None:
        self.samples = self.loss = 0.0
        self.metrics = [0.0] * metrics

    def add(self, loss: float, samples: float, metrics: Sequence[float]) -> None:
        """Add a step, given its mean loss and its mean metrics; without metrics, these are 0."""
        if samples:
            self.samples += samples
            self.loss += loss * samples
            for number, mean in enumerate(metrics):
                self.metrics[number] += mean * samples


class Serving(Protocol):
    """The part of a server that a worker calls: a `Server` on this rank, or a `RemoteServer`.

    Attributes:
        replica, inner, optimizer, transport, states, worker_state: as in `Service`.
        place: the place of this rank's worker in its data.
        told_state: the optimizer's state, after a round that was asked for it.
    """

    replica: Replica
    inner: FlatOptimizer | None
    optimizer: Any
    transport: Transport
    states: bytes
    place: Place
    worker_state: Callable[[int | None], RankState] | None
    told_state: dict[str, Any]

    def round(self, contributed: bool = True) -> Control:
        """Take part in one whole round, with this rank's push message as it is.

        Args:
            contributed: whether the push message holds a contribution.
        """

    def save_model(self) -> object:
        """Take part in a checkpoint with all other ranks."""

    def exchange_call(self, given: bytes) -> dict[str, Any]:
        """Send `given`, this worker's arguments to a call as JSON, and return the server's reply to all ranks."""

    def carry_out(self, reply: Mapping[str, Any]) -> None:
        """Take part in the checkpoint and the results that the reply to a call demands."""

    def average(self) -> None:
        """Combine the gradients of all workers without a step; the push message then holds the combination."""


def place_of(communicator: Communicator, config: Config) -> tuple[int, int]:
    """Return the number of this rank's worker, -1 if the rank only serves, and the number of workers."""
    dedicated = communicator.size > 1 and not config.server_trains
    return communicator.rank - dedicated, communicator.size - dedicated


@dataclass
class Before:
    """What a resumed worker begins with, and its script may change before the run goes on.

    Attributes:
        gradients: the gradients by name that are not pushed yet; empty if none are.
        held: the parameters with another gradient, see `Flat.held`.
        sums: a digest of each parameter.
        buffers: a copy of each buffer, by name.
    """

    gradients: dict[str, Tensor]
    held: Iterable[Sequence[int]]
    sums: list[int]
    buffers: dict[str, Tensor]


class Worker:
    """One worker in a run with rounds.

    Args:
        communicator: this rank's end.
        model: the model to train.
        config: the settings.
        server: the server on the same rank, which has begun and then runs the rounds; None if it is on another rank.
        optimizer: the same optimizer as the server's. It steps in modes with local steps, and on the slices that this rank
            serves.
        tells: whether the optimizer's hyperparameters are pushed with each contribution.

    Attributes:
        replica: the model's flat buffers and messages.
        update: what this worker computes between pull and push.
        place: where the worker is in its data.
        index, workers: its number, from 0, and the number of workers, of those that share the data of the present loop.
        status: this worker's row of the next message; the server learns what is set here in the next round.
        used: the number of batches used since the last push.
        control: the server's latest control.
        missed_steps: whether other workers have taken steps that this worker has not.
        clears: whether the gradients are removed after the step in progress, so that it does not matter what they are.
        common: the random streams that orders of data are drawn from, the same on all workers.
        kept: returns what the script keeps in the checkpoint.
    """

    def __init__(
        self,
        communicator: Communicator,
        model: nn.Module,
        config: Config | None = None,
        server: Serving | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        tells: bool = False,
    ) -> None:
        self.communicator, self.config = communicator, config or Config()
        self._number = self.index, self.workers = place_of(communicator, self.config)
        self.mode = mode = choose_mode(self.config)
        rows = 1 if mode.requests else communicator.size
        given = None if optimizer is None else made(optimizer, model)
        self.told = hyper.Told(given) if given and tells else None
        numbers = len(self.told.numbers) if self.told else 0
        self._terms = hyper.terms(given) if given and tells else []
        self.replica = (
            server.replica if server else replicate(model, self.config, rows, communicator.allocate, mode.vectors, numbers)
        )
        if self.told:
            self.replica.push.write_hyper(communicator.rank, self.told.limbs)
        self.server: Serving = server or self._remote_server(given)
        self.inner = self.server.inner
        self.update = make_update(mode, self.config, self.replica, communicator.rank, self.index, self.workers, self.inner)
        self.update.here = server is not None
        self._elsewhere = communicator.size > 1 and not self.update.apart  # weights are stepped on other ranks, or shared
        self.tally = Tally(len(self.config.metrics))
        self.place = Place()
        self.status = WorkerStatus()
        self.used = 0
        self._parked = False
        self.kept: Callable[[], dict[str, Any]] = dict
        self._averaging = (0.0, 0.0)
        self._averaged_by = 0.0  # this worker's samples in the last average of gradients
        self._weight = 0.0  # the last contribution's weight
        self._contributes_common = True  # whether this worker contributes what all workers have in common
        # Whether each contributes what all have in common, as one alone may die. Their mean may differ from it in the last bit.
        self._all_give = self.config.min_workers > 0
        self.control = Control()
        self.missed_steps = self.clears = False
        self._kept: Tensor | None = None  # the gradients, saved during an idle round
        self._background: Callable[[], None] | None = None  # waits for a round in the background
        self._checkpoint_due = False  # whether its part of a checkpoint is due
        self._streams: rng.State | None = None
        self._before: Before | None = None  # of a resumed run that has not gone on
        self._failed: Exception | None = None  # see `check_whole`
        self._alone_in: tuple[str, str] | None = None  # see `alone`
        if self.config.overlap and mode.gradients:
            model.register_forward_pre_hook(lambda *_: self.settle())  # deepcopy of the model does not follow it
        self._begun = self._left = communicator.clock()

    def _remote_server(self, given: Optimizer | None) -> RemoteServer:
        """Return the server on another rank, with the optimizers that this rank needs."""
        inner = optimizer = None
        if self.mode.local:
            if given is None:
                raise ConfigError(f"optimizer: given none with mode {self.config.mode}, allowed: the workers' optimizer")
            inner = FlatOptimizer(self.replica, given, own=True)
        if given is not None and not self.mode.requests:
            optimizer = server_optimizer(self.mode, self.config, self.workers, self.replica, given, masters=False)
        return RemoteServer(self.communicator, self.replica, self.config, self.mode, inner, optimizer, self._terms)

    def receive_initial_weights(self) -> None:
        """Agree with all ranks, receive the server's weights and, in a resumed run, restore this worker's own state."""
        if isinstance(self.server, RemoteServer):  # a server on this rank has begun before
            self.server.begin()
        states = self.server.states
        self.common = _common(self.communicator, self.workers)
        rng.diverge(self.index)
        mine = for_worker(unpack_all(states), self.index, self.workers) if states else None
        if mine is not None:
            self._restore(mine)
        self.replica.buffers.load(self.replica.pull.buffers)
        if mine is not None:
            self.replica.buffers.put(mine.buffers)
        self.control = self.replica.pull.control
        self.replica.clear()
        self.update.received()
        self.replica.flat.note_weights(moved=False, others=self._elsewhere)
        self.replica.flat.note_frozen()
        if mine is not None:
            self.replica.flat.resume(mine.gradients)
            self.remember(mine.own.get("held", ()))
            self.update.load_state_dict(mine.own)
            if tally := mine.own.get("tally"):  # the local steps that are not pushed
                self.tally.samples, self.tally.loss = float(tally["samples"]), float(tally["loss"])
                self.tally.metrics = [float(m) for m in tally["metrics"]]
            self._park()  # until the loop continues
        self.server.place, self.server.worker_state = self.place, self.state

    def _restore(self, mine: RankState) -> None:
        self.place = mine.place
        if mine.orders:
            self.common.load_state_dict(mine.orders)
        if mine.streams:
            rng.restore(mine.streams)

    def remember(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Remember what the script may change by code that a resumed run executes again, for `put_back`.

        Args:
            held: as `Flat.held` has returned it at the checkpoint; None to ask now.
        """
        flat = self.replica.flat
        gradients = {name: tensor.clone() for name, tensor in flat.unpushed(flat.grad).items()}
        buffers = {name: buffer.clone() for name, buffer in self.replica.buffers.named.items()}
        self._before = Before(gradients, flat.held(flat.grad) if held is None else held, self._sums_now(), buffers)

    def put_back(self, gradients: bool) -> None:
        """Put back what `remember` has found.

        Args:
            gradients: whether gradients are removed even if none were pending.

        Raises:
            RuntimeError: the script has changed weights.
        """
        if not self._before:
            return
        before, flat = self._before, self.replica.flat
        for number, (now, then) in enumerate(zip(self._sums_now(), before.sums, strict=True)):
            if now != then:
                raise RuntimeError(
                    f"resume: the script has changed {flat.slots[number].name} between connect and where the run goes on; "
                    f"expected weights that are loaded and initialised before connect"
                )
        self.replica.buffers.put(before.buffers)
        if gradients or before.gradients:
            flat.clear()
            flat.resume(before.gradients)
            flat.hold(before.held)
        else:  # what the script has was computed again, at later weights
            flat.spend()

    def forget(self) -> None:
        """Forget what `remember` has found."""
        self._before = None

    def _sums_now(self) -> list[int]:
        """Return a digest of each parameter; nothing where a worker has weights of its own besides the server's."""
        return [] if self.update.apart else self.replica.flat.sums()

    def backward(self, loss: Tensor, samples: float) -> None:
        """Compute the gradients, in the last backward before a step.

        With `overlap`, each bucket is reduced as soon as its gradients are complete.

        Args:
            loss: the loss.
            samples: the number of samples behind the gradient.
        """
        self.settle()
        transport, ready, flat = self.server.transport, self.server.transport.ready, self.replica.flat
        if ready is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return

        def there(number: int) -> None:
            self.replica.hand(number)
            ready.mark(number)

        transport.begin(self.update.weigh(samples))
        flat.watch = there
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            flat.watch = None
        flat.collect()
        for number in ready.rest():
            there(number)

    def step(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """Push and pull after a step of the script, if it is time for both by the update.

        With `overlap`, in modes with rounds, this goes on while the script continues, until `settle`.

        Args:
            loss: the mean loss over the samples.
            samples: the number of samples behind the gradient.
            metrics: the mean of each of the script's metrics, in the order of the setting `metrics`.
            taken: the number of items of the shard that this step has used.

        Returns:
            The server's latest control.

        Raises:
            NonFiniteError: see `pull`.
        """
        if self._alone_in:
            self._check_together("a step")
        self.settle()
        if self._parked:  # a step outside of loops starts from this worker's own weights, too
            self._unpark()
        self.look_at_hyper()
        self._look_at_weights()
        flat, members = self.replica.flat, self.update.members
        flat.check_spent(members)
        others = {} if members is None else flat.take_out(members)
        self._note(loss, samples, metrics, taken)
        if not self.update.step(loss, samples, self.control) and not (self.status.done and self.update.pending):
            flat.put_back(others)
            return self.control
        if self.server.transport.ready:
            self._write()
            flat.clear()  # the script must not see gradients that are under way
            self._streams = rng.capture()  # later draws belong to the next round
            self._background = self.communicator.run_async(self._send_and_receive)
            return self.control
        self._push()
        self.pull()
        flat.put_back(others)
        return self.control

    def look_at_hyper(self) -> None:
        """Take over the hyperparameters that the script has set in its optimizer's groups since the last step.

        Raises:
            RuntimeError: the optimizer has other groups than at `connect`.
        """
        told = self.told
        if told is None or not told.changed():
            return
        if len(told.limbs) != self.replica.push.hyper.shape[1]:
            raise RuntimeError(
                "the optimizer has other param_groups than it had at connect; add and remove groups before connect"
            )
        self.replica.push.write_hyper(self.communicator.rank, told.limbs)
        if self.inner:
            hyper.write(self.inner.torch, told.numbers, told.before)

    def _look_at_weights(self) -> None:
        """Take over the weights that the script has changed itself, where that is exact.

        Raises:
            RuntimeError: other ranks have their own copies of these weights, or share their memory.
        """
        flat = self.replica.flat
        changed = flat.changed_weights()
        if not changed:
            return
        own = self.inner if self.update.apart else self.server.optimizer if self.communicator.size == 1 else None
        if own is None:
            changed = [number for number in changed if number not in flat.renormalised]  # the pull overwrites those
            if not changed:
                return
            self._refuse(
                changed[0], "load, reset and clamp weights before connect, and swap an average's in inside ps.validate()"
            )
        own.refresh(changed)

    def changed_in_place(self) -> str:
        """Return the name of a parameter that the script has changed since the last round and no rank takes over; else ""."""
        self.settle()
        flat = self.replica.flat
        changed = [n for n in flat.changed_weights() if n not in flat.renormalised] if self._elsewhere else []
        return flat.slots[changed[0]].name if changed else ""

    def _refuse(self, number: int, instead: str) -> NoReturn:
        raise RuntimeError(
            f"the script has changed {self.replica.flat.slots[number].name} in place, outside optimizer.step(), after connect; "
            f"with several ranks {instead}"
        )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Allow the script to replace the model's weights within the context, such as by their average, if it restores them.

        Raises:
            RuntimeError: it has not restored them.
        """
        flat = self.replica.flat
        before = flat.sums() if self._elsewhere else []
        with self.alone(
            "what ps.validate() measures",
            "evaluate over the loader itself, not what ps.shard() has returned; step and save outside",
        ):
            yield
        if before:
            for number, (now, then) in enumerate(zip(flat.sums(), before, strict=True)):
                if now != then and number not in flat.renormalised:
                    self._refuse(number, "put back at the end of what ps.validate() is given the weights that were there")
            flat.note_weights(moved=False)

    @contextmanager
    def alone(self, where: str, instead: str) -> Iterator[None]:
        """Refuse within the context what all ranks do together, as this worker alone is there.

        Args:
            where: what the context is, for the message.
            instead: what to do instead.
        """
        before, self._alone_in = self._alone_in, (where, instead)
        try:
            yield
        finally:
            self._alone_in = before

    def _check_together(self, what: str) -> None:
        """Raise RuntimeError within `alone`, if there are other ranks."""
        if self._alone_in and self.communicator.size > 1:
            where, instead = self._alone_in
            raise RuntimeError(f"{what} inside {where}, on worker 0 alone; expected none there: {instead}")

    def _send_and_receive(self) -> None:
        self._hand_over()
        self._receive(contributed=True)

    def settle(self, pay: bool = True) -> None:
        """Wait for the end of a round that goes on in the background, if there is one; the model then has the new weights.

        Args:
            pay: whether to take part in the checkpoint that may be due, too.

        Raises:
            NonFiniteError: see `pull`.
            RuntimeError: see `check_whole`.
        """
        if self._failed and pay:  # not where an exception leaves a loop
            self.check_whole()
        if self._background:
            rest, self._background = self._background, None
            rest()
        if self._checkpoint_due and pay:
            self.pay()
        self._streams = None

    @property
    def travels(self) -> bool:
        """Whether a round goes on in the background."""
        return self._background is not None

    def pay(self) -> None:
        """Take part in the checkpoint that was due in the last round, now that the script has finished its step."""
        if self._checkpoint_due:
            self._checkpoint_due = False
            try:
                self.save()
            except Exception as error:
                self._note_failure(error)
                raise

    def _note_failure(self, error: Exception) -> None:
        """Note an exception in what all ranks do together: if it is this rank's alone, the others wait for the rest of it."""
        if self.communicator.size > 1 and not isinstance(error, (CallError, NonFiniteError)):  # which all ranks raise
            self._failed = error

    def check_whole(self) -> None:
        """Raise RuntimeError if something has failed before that all ranks do together, and the script has caught that."""
        if self._failed:
            raise RuntimeError(
                f"the run cannot go on after what the script has caught on this rank: the other ranks wait for the rest of it "
                f"({type(self._failed).__name__}: {self._failed})"
            ) from self._failed

    def push(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> None:
        """Push the gradient that backward has computed, or what the mode pushes instead, and this rank's row.

        Args:
            loss: the mean loss over the samples.
            samples: the number of samples behind the gradient.
            metrics: the mean of each of the script's metrics, in the order of the setting `metrics`.
            taken: the number of items of the shard that this step has used.
        """
        self.settle()
        self._note(loss, samples, metrics, taken)
        self.update.step(loss, samples, self.control)
        self._push()

    def _note(self, loss: float, samples: float, metrics: Sequence[float], taken: int) -> None:
        if self.replica.flat.averaged and samples and samples != self._averaged_by:
            raise ValueError(
                f"ps.step(samples={samples:g}) after the gradients were averaged with {self._averaged_by:g} samples of this "
                f"worker, by ps.average() or torch's clipping; expected ps.average(samples={samples:g}) before that"
            )
        self.place.taken += taken
        self.status.stepped = 1
        self.tally.add(loss, samples, metrics)

    def _push(self) -> None:
        self._write()
        self._hand_over()

    def _write(self) -> None:
        """Write the push message: the contribution, and the row with the steps since the last push."""
        tally, self.tally = self.tally, Tally(len(self.config.metrics))
        flat, row = self.replica.flat, self._row(tally.samples, tally.loss)
        if flat.averaged and self.config.rule == "mean" and not (self._all_give and self.config.reduction == "mean"):
            self.update.lead = self._contributes_common
        self.update.write(row, tally.metrics)
        self._weight = row.weight
        flat.pushed()
        flat.averaged, self.update.lead = False, None
        self.server.transport.push()  # here, not in the round, which with `overlap` waits on a thread for what travels already

    def pull(self) -> Control:
        """Receive the new weights and the control. Gradients are then spent, unless they are what backward has computed.

        Returns:
            The control.

        Raises:
            NonFiniteError: on all ranks, if a rank's update is not finite and `nonfinite` is "raise".
            CallError: on all ranks, if the workers disagree.
        """
        self._receive(contributed=True)
        if not self.clears:
            self._leave_gradients()
        self.replica.flat.pushed()
        return self.control

    def _leave_gradients(self) -> None:
        """Leave the gradients as backward has computed them, or as spent where their memory holds something else."""
        push, flat, update = self.replica.push, self.replica.flat, self.update
        if update.apart or self.communicator.size == 1 or not self.replica.wire_is_grad:
            there = not update.apart
        elif push.shared:
            there = push.raw and self.replica.keeps_push
        else:
            there = not update.here and self.config.rule == "mean" and self._weight > 0
            if there and self._weight != 1 and not push.raw:
                flat.grad.div_(self._weight)  # undoes the weighting
        if not there:
            flat.spend()

    def idle(self) -> Control:
        """Take part in a round without a new step. Local steps that are not pushed yet are pushed; gradients are kept.

        Returns:
            The control.
        """
        self.settle()
        if self.update.pending:
            self._push()
            return self.pull()
        version = self.control.version
        with self._gradients_kept():
            self.update.write_nothing(self._row(), len(self.config.metrics))
            self.server.transport.push()
            self._hand_over()
            self._receive(contributed=False)
        self.missed_steps |= self.control.version > version
        return self.control

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Keep this worker's gradients while the push message, in which they may lie, is used for something else."""
        flat = self.replica.flat
        if flat.pending:
            flat.collect()
        self._kept = flat.grad.clone() if flat.pending or flat.gradients() else None
        yield
        if self.replica.wire_is_grad:
            flat.grad.zero_() if self._kept is None else flat.grad.copy_(self._kept)
        self._kept = None

    def begin(self) -> None:
        """Begin a new loop over the shard."""
        self._check_together("a loop over a shard")
        self._unpark()
        self.status.begun, self.status.drawn, self.status.stepped = self.status.begun + 1, 0, 0
        self.status.done = False

    @property
    def is_chief(self) -> bool:
        """Whether this is the first worker that lives, which gives what all workers have in common."""
        return self._number[0] == self.control.chief

    def part(self) -> Part:
        """Return which part of the data is this worker's."""
        return Part(self.index, self.workers)

    def share_with(self, lost: Sequence[int]) -> None:
        """Share the data of the next loop with the workers that live.

        Args:
            lost: the numbers, at `connect`, of the workers that have died.
        """
        index, workers = self._number
        self.index, self.workers = index - sum(number < index for number in lost), workers - len(lost)
        self.update.index, self.update.workers = self.index, self.workers

    def finish(self) -> None:
        """Take part in rounds until every worker's shard is exhausted. The model then has the server's weights."""
        self.barrier(Call.LOOP)

    def call_for(self, call: Call, given: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Make a call together with all workers, and carry out the server's reply.

        Args:
            call: the call.
            given: this worker's arguments, or a function that returns them. It is called when all workers have made the call,
                with the server's weights in the model.

        Returns:
            The server's reply; empty if the run is preempted.

        Raises:
            CallError: the other workers do not make this call.
        """
        parked = self._parked
        self.barrier(call)
        reply: dict[str, Any] = {}
        if self.control.stop != Stop.PREEMPTED:
            try:
                reply = self._take_part(given or {})
            except Exception as error:
                self._note_failure(error)
                raise
        if not parked and not self.control.stop:
            self._unpark()
        return reply

    def barrier(self, call: Call) -> None:
        """Wait until all workers make this call; meanwhile take part in the rounds of the others.

        Raises:
            CallError: the other workers do not make this call.
            RuntimeError: see `_check_together`.
        """
        self._check_together(call.text)
        self.settle()
        if call not in (Call.AVERAGE, Call.LEAVE, Call.MEET):  # an optimizer with a closure changes weights in between
            self._look_at_weights()
        self.status.call, self.status.done = call, call != Call.PAUSE  # after a pause there may be more batches
        while True:
            self.idle()
            stop = self.control.stop
            if stop == Stop.PREEMPTED or (stop and call == Call.LOOP) or self._met():
                break
        self.status.call, self.status.done = Call.NONE, False
        self.pay()
        self._park()

    def _met(self) -> bool:
        """Return whether all workers wait in this worker's call. At the end of the script, take part in other calls."""
        if self.control.active or self.control.call in (Call.NONE, Call.STATE):
            return False
        if self.control.call == Call.AVERAGE and self.status.call != Call.AVERAGE:
            self._take_no_part_in_average()
        elif self.control.call == Call.AVERAGE:
            self._take_average()
        elif self.control.call not in (self.status.call, Call.LOOP):
            self._take_part({})
        return self.control.call == self.status.call

    def _take_part(self, given: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        reply: dict[str, Any] = {"chief": self.control.chief}
        while "chief" in reply:
            self.control.chief = reply["chief"]
            arguments = given() if callable(given) else given
            reply = self.server.exchange_call(json.dumps(arguments).encode() if arguments else b"")
        self.control.stop = reply["stop"]
        self.server.carry_out(reply)
        return reply

    def average(self, loss: float = 0.0, samples: float = 1) -> float:
        """Replace every worker's gradients by their combination over all workers, without a step.

        With one worker, or in modes with local steps, nothing is done.

        Args:
            loss: the mean loss over the samples.
            samples: the number of samples behind the gradient.

        Returns:
            The mean loss over all workers' samples; with `reduction` "sum", the sum of the losses.
        """
        if self.workers == 1 or not self.mode.gradients or self.replica.flat.averaged:
            self._contributes_common |= self.workers == 1  # the others may have died
            return loss
        self.look_at_hyper()
        adds = self.config.reduction == "sum"
        self._averaging, self._averaged_by = (loss if adds else loss * samples, samples), samples
        with self.replica.flat.without_spent():
            self.barrier(Call.AVERAGE)
        total, count = self._averaging
        return total if adds else total / count if count else math.nan  # no samples: no worker's gradient is finite

    def _take_no_part_in_average(self) -> None:
        """Take part in the combination of the other workers' gradients, with nothing."""
        push = self.replica.push
        with self._gradients_kept():
            row = self._row()
            push.message.zero_()
            push.write(self.communicator.rank, row, [0.0] * len(self.config.metrics))
            self.server.average()

    def _take_average(self) -> None:
        """Take part in the combination of gradients, with this worker's."""
        replica, push = self.replica, self.replica.push
        loss, samples = self._averaging
        row, metrics = self._row(samples=samples, loss=loss), [0.0] * len(self.config.metrics)
        members, self.update.members = self.update.members, None  # whichever of several optimizers has stepped last
        self.update.averages = True
        self.update.write(row, metrics)
        self.update.averages, self.update.members = False, members
        self.server.average()
        rows = push.table()
        if self.config.reduction == "sum":
            push.gradients.mul_(sum(row[WEIGHT] for row in rows))
        self._averaging = (sum(row[LOSS] for row in rows), sum(row[SAMPLES] for row in rows))
        if self.config.nonfinite != "drop" and any(row[BAD] and not row[WEIGHT] for row in rows):
            push.gradients.fill_(math.nan)  # a rule has gone without that worker's, finite or not: no step may
        replica.flat.take_average(push.gradients, push.present())
        if self.config.buffers == "mean":
            replica.buffers.combine(push.floats, push.limbs, [b.data for b in replica.buffers.tensors])
        first = next((rank for rank, row in enumerate(rows) if row[WEIGHT]), None)  # None if no gradient is finite
        self._contributes_common = self.is_chief if first is None else first == self.communicator.rank

    def lead(self) -> None:
        """Let the first worker alone contribute what all workers have in common, in the next `adopt`."""
        self._contributes_common = self.is_chief

    def adopt(self, weights: Tensor, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """Take part in a round in which the server adopts new weights, which are the same on all workers.

        Args:
            weights: `(numel,)`, the new weights.
            loss: the mean loss over the samples.
            samples: the number of samples behind the new weights.
            metrics: as in `step`.
            taken: the number of items of the shard that were used.

        Returns:
            The control.
        """
        self.settle()
        self.look_at_hyper()
        self._note(loss, samples, metrics, taken)
        tally, self.tally = self.tally, Tally(len(self.config.metrics))
        row, push, replica = self._row(tally.samples, tally.loss), self.replica.push, self.replica
        left = replica.flat.take_out(())  # as after any step they stay, and another optimizer may step with some of them
        row.adopt, row.weight = 1.0, float(self._contributes_common or self._all_give)
        row.steps = row.weight
        push.clear_behind()
        replica.buffers.write(push.floats, push.limbs, row.weight, self.update.first)
        push.gradients.copy_(weights)
        if row.weight:
            push.presence.fill_(1)
        elif not push.shared:
            push.body.zero_()
        push.write(self.communicator.rank, row, tally.metrics)
        self.server.transport.push()
        self._hand_over()
        self._receive(contributed=True)
        members = self.update.members or range(len(replica.flat.slots))
        replica.flat.clear()
        replica.flat.put_back(left, used=members)
        return self.control

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of the server's optimizer, as `FlatOptimizer.state_dict` does.

        Other workers call this, too, or wait in another call.

        Raises:
            CallError: another worker takes a step.
        """
        self._check_together(Call.STATE.text)
        self.settle()
        self.status.call = Call.STATE
        self._state: dict[str, Any] = {}
        while not self._state and self.control.stop != Stop.PREEMPTED:
            self.idle()
        self.status.call = Call.NONE
        return self._state

    def _park(self) -> None:
        self._parked = True
        self.update.park()

    def _unpark(self) -> None:
        if self._parked:
            self._parked = False
            self.update.unpark()

    def receive_control(self) -> None:
        """Receive the control that the server sends between rounds."""
        if isinstance(self.server, RemoteServer):
            self.control = self.server.receive_control()

    def give_performance(self) -> None:
        """Send this rank's traffic to the server, at the end of the run."""
        if isinstance(self.server, RemoteServer):
            self.server.give_performance()

    def _kept_state(self) -> dict[str, Any]:
        with self.alone(*KEEPING):
            return self.kept()

    def state(self, chief: int | None = None) -> RankState:
        """Return the state that only this rank has.

        Args:
            chief: the number of the first worker that lives, if it is another than the control has said.
        """
        if chief is not None:
            self.control.chief = chief
        buffers = self.replica.buffers.own(self.replica.pull.buffers)
        flat = self.replica.flat
        if flat.pending and self._kept is None:
            flat.collect()
        waiting = self._kept if self._kept is not None else flat.grad
        pending = flat.unpushed(waiting)
        slices = {} if self.update.here else self.server.transport.optimizer_shard()
        first, own = self.is_chief, self.update.state_dict()
        if self.tally.samples:
            own |= {"tally": vars(self.tally)}
        if held := flat.held(waiting):
            own |= {"held": torch.tensor(held)}
        return RankState(
            self.index,
            self.place,
            (None if self.place.calling else self._streams) or rng.capture(),
            buffers,
            pending,
            own,
            slices,
            kept=self._kept_state() if first else {},
            orders=self.common.state_dict(),
            frozen=flat.changed_frozen() if first and self.communicator.size > 1 else {},
        )

    def save(self) -> None:
        """Take part in a checkpoint with all other ranks."""
        if self.update.here:
            self.update.park()  # the server writes the weights in the model
        self.server.save_model()
        if self.update.here and not self._parked:
            self.update.unpark()

    def _row(self, samples: float = 0, loss: float = 0) -> WorkerStatus:
        """Return `status` for the next message, which has these samples and this loss behind it, and no contribution yet."""
        row, now = self.status, self.communicator.clock()
        row.samples, row.loss, row.round = samples, loss, self.control.round % ROUNDS
        row.weight = row.steps = row.bad = row.adopt = 0
        row.train, row.wait = now - self._left, self._left - self._begun
        return row

    def _hand_over(self) -> None:
        """Note the time at which the push message is handed over; it is sent in the round, see `_receive`."""
        self._begun = self.communicator.clock()

    def _receive(self, contributed: bool) -> None:
        version = self.control.version
        try:
            control = self.control = self.server.round(contributed)
        except Exception as error:
            self._note_failure(error)
            raise
        if control.chief and not (self.mode.requests or self.mode.federated):
            self.update.first = self.is_chief
        if self.status.call == Call.LOOP:  # a checkpoint of this round is of the loop's end
            self.place.over = not control.active
        self._checkpoint_due = bool(control.checkpoint)
        if control.call and control.call == Call.STATE:
            self._state = self.server.told_state
        self.update.received()
        if self._parked or control.stop:
            self._park()
        members, elsewhere = self.update.members if contributed else None, self._elsewhere
        moved = elsewhere and (contributed or control.version > version)
        self.replica.flat.note_weights(moved, members, others=elsewhere)
        self._left = self.communicator.clock()


def _common(communicator: Communicator, workers: int) -> Common:
    """Return the random streams of data orders, seeded by the server's, whatever this worker has drawn before."""
    own = rng.capture()
    if communicator.size > 1:
        rng.restore({name: value for name, value in told_streams(communicator, own).items() if name != "cuda"})
    common = Common(workers)
    rng.restore(own)
    return common
