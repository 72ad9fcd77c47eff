"""A training rank's half of a round: push its contribution, pull the new weights.

    push  update.write: the body and this rank's row   exchange.combine
    pull  exchange.publish: control, weights, buffers  read

The weights land where the model's parameters are; there is nothing to copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from mpips import contract, lanes, rng
from mpips.combine import contribute
from mpips.config import Config, ConfigError
from mpips.data import Place
from mpips.exchange import Exchange, share
from mpips.message import ROUNDS, Control, Replica, Row, replicate
from mpips.mode import choose_mode, judges_clients, make_update, server_optimizer, summed
from mpips.optimizer import FlatOptimizer, MakeOptimizer, MakeScheduler, Scheduler
from mpips.rule import choose
from mpips.slices import Slices, settle
from mpips.state import RankState, for_worker, unpack_all


@dataclass
class Tally:
    """What has been reported of the steps since the last push: sums over samples."""

    samples: float = 0
    loss: float = 0
    metrics: list[float] = field(default_factory=list)

    def add(self, loss: float, samples: float, metrics: Sequence[float]) -> None:
        """Take note of a step's means."""
        self.samples += samples
        self.loss += loss * samples if samples else 0.0
        sums = [m * samples if samples else 0.0 for m in metrics]
        self.metrics = [a + b for a, b in zip(self.metrics, sums, strict=True)] if self.metrics else sums


class Serving(Protocol):
    """What a worker needs of the server on the same rank."""

    replica: Replica
    inner: FlatOptimizer | None
    slices: Slices | None
    states: bytes
    place: Place
    worker_state: Callable[[], RankState] | None

    def round(self, contributed: bool = True) -> Control:
        """One whole round, with this rank's push message as it stands."""

    def save_model(self) -> object:
        """Write a checkpoint together with all other ranks."""


def place_of(exchange: Exchange, config: Config) -> tuple[int, int]:
    """This rank's worker number, -1 if it only serves, and the number of workers."""
    dedicated = exchange.size > 1 and not config.server_trains
    return exchange.rank - dedicated, exchange.size - dedicated


class Worker:
    """One worker.

    Args:
        exchange: this rank's end.
        model: the model to train.
        config: the settings.
        server: the server on the same rank, if any, which has begun; it then does the rounds.
        optimizer, scheduler: as the server's; used in modes where a worker takes steps of its own.

    Attributes:
        replica: the model's flat buffers and messages.
        update: what this worker computes between pull and push.
        place: where the worker is in its data.
        index, workers: its number, from 0, and how many there are.
        done: whether its shard is exhausted; the server is told with the next round.
        used: batches used up since the last push.
        signalled: set to have the server write a checkpoint and end the run at the next round.
        stop: 1 to ask the server to end the run, 2 when the script has left its loop.
    """

    def __init__(
        self,
        exchange: Exchange,
        model: nn.Module,
        config: Config | None = None,
        server: Serving | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        scheduler: Scheduler | MakeScheduler | None = None,
    ) -> None:
        self.exchange, self.config = exchange, config or Config()
        self.index, self.workers = place_of(exchange, self.config)
        self.mode = mode = choose_mode(self.config)
        rows = 1 if mode.requests else exchange.size
        self.replica = server.replica if server else replicate(model, self.config, rows, exchange.allocate, mode.vectors)
        self._rule, self._last = choose(self.config)
        self._server = server
        self.slices: Slices | None = None  # where there is a server here, it has them
        self.inner = server.inner if server else None
        if mode.local and not server:
            if optimizer is None:
                raise ConfigError(f"optimizer: given none with mode {self.config.mode}, allowed: the workers' optimizer")
            self.inner = FlatOptimizer(self.replica, optimizer, scheduler, own=True)
        self._optimizer: FlatOptimizer | None = None  # of slices of the server's weights, perhaps
        if optimizer is not None and not server and not mode.requests:
            self._optimizer = server_optimizer(mode, self.config, self.workers, self.replica, optimizer, None, masters=False)
        self.update = make_update(mode, self.config, self.replica, exchange.rank, self.index, self.workers, self.inner)
        self.update.here = server is not None
        self.tally = Tally()
        self.place = Place()
        self.signalled = False
        self.stop = self.used = 0
        self.done = self._told = False
        self._control = Control()
        self._kept: Tensor | None = None  # gradients that an idle round must not push
        self._rest: Callable[[], None] | None = None  # of a round that goes on beside the script
        self._streams: rng.State | None = None
        if self.config.overlap and mode.gradients:
            model.register_forward_pre_hook(lambda *_: self.settle())  # no function that deepcopy would follow
        self._begun = self._left = exchange.clock()

    @property
    def control(self) -> Control:
        """What the server said last."""
        return self._control

    def receive_initial_weights(self) -> None:
        """Agree with all ranks, take the server's weights and, if the run is resumed, this worker's own state."""
        if self._server:
            states = self._server.states
        else:
            contract.begin(self.exchange, self.replica, self.config)
            states = share(self.exchange, b"")
            update = summed(self.mode, self.config)
            self.slices = settle(self.exchange, self.replica, self.config, self._rule, self._optimizer, update, trains=True)
            self._optimizer = None  # what steps here, if anything, is in the slices
            if self.inner:
                self.inner.rebind()
        rng.diverge(self.index)
        mine = for_worker(unpack_all(states), self.index, self.workers) if states else None
        if mine is not None:
            self._restore(mine)
        self.replica.buffers.load(self.replica.pull.buffers)
        self._control = self.replica.pull.control
        self.replica.clear()
        self.update.received()
        if mine is not None:
            self.replica.flat.resume(mine.gradients)
            self.update.put(mine.own)
        if self._server:
            self._server.place, self._server.worker_state = self.place, self.state

    def _restore(self, mine: RankState) -> None:
        self.place = mine.place
        if mine.streams:
            rng.restore(mine.streams)
        for name, tensor in mine.buffers.items():
            self.replica.buffers.named[name].copy_(tensor)

    def backward(self, loss: Tensor, samples: float) -> None:
        """Backward, the last before a step; slices may leave as soon as their gradients are there."""
        self.settle()
        slices = self._overlapping
        if slices is None or slices.ready is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        ready, flat = slices.ready, self.replica.flat

        def there(number: int) -> None:
            self.replica.hand(number)
            ready.mark(number)

        slices.begin(self.update.weigh(samples))
        flat.watch = there
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            flat.watch = None
        flat.collect()
        for number in ready.rest():
            there(number)

    def step(self, loss: float, samples: int, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """The script has taken a step: push and pull, see both, if the update says that it is time.

        With `overlap` in rounds that goes on while the script does, until `settle`.
        """
        self.settle()
        self._note(loss, samples, metrics, taken)
        if not self.update.step(loss, samples, self._control) and not (self.done and self.update.pending):
            return self._control
        if self._overlapping:
            self._write()
            self.replica.flat.clear()  # of what is on its way nothing is left to the script
            self._streams = rng.capture()  # what it draws from now on belongs to the next round
            self._rest = self.exchange.beside(self._send_and_receive)
            return self._control
        self._push()
        return self.pull()

    @property
    def _overlapping(self) -> Slices | None:
        """The slices that travel while the script goes on, if any do."""
        slices = self.slices or (self._server.slices if self._server else None)
        return slices if slices and slices.ready else None

    def _send_and_receive(self) -> None:
        self._send()
        self._receive(contributed=True)

    def settle(self) -> None:
        """Wait for the end of a round that goes on beside, if one does; the model then has the new weights.

        Raises:
            See `pull`.
        """
        rest, self._rest = self._rest, None
        if rest:
            rest()
            self._streams = None

    def push(self, loss: float, samples: int, metrics: Sequence[float] = (), taken: int = 0) -> None:
        """Send the gradient that backward left, or what the mode pushes in its place, and this rank's row.

        Args:
            loss: the mean loss over the samples.
            samples: how many samples the gradient is the mean of.
            metrics: the mean of each of the script's own metrics, in the order of the `metrics` setting.
            taken: items of the shard that this step has used up.
        """
        self.settle()
        self._note(loss, samples, metrics, taken)
        self.update.step(loss, samples, self._control)
        self._push()

    def _note(self, loss: float, samples: int, metrics: Sequence[float], taken: int) -> None:
        self.place.taken += taken
        self.tally.add(loss, samples, metrics or [0.0] * len(self.config.metrics))

    def _push(self) -> None:
        self._write()
        self._send()

    def _write(self) -> None:
        """Fill the push message with what has been noted since the last one."""
        tally, self.tally = self.tally, Tally()
        row = self._row(samples=tally.samples, loss=tally.loss)
        self.update.write(row, tally.metrics or [0.0] * len(self.config.metrics), self._control.loss_scale)
        self.replica.flat.pushed()
        if slices := self._overlapping:
            slices.end()

    def pull(self) -> Control:
        """Take the new weights and what the server says; gradients are then None.

        Raises:
            NonFiniteError: on all ranks, when a rank's update is not finite and `nonfinite` is "raise".
        """
        self._receive(contributed=True)
        self.replica.flat.clear()
        return self._control

    def idle(self) -> Control:
        """Take part in a round without a new step: with what has not been pushed yet, gradients apart, or with nothing."""
        self.settle()
        if self.update.pending:
            self._push()
            return self.pull()
        flat = self.replica.flat
        if flat.pending:
            flat.collect()
        self._kept = flat.grad.clone() if flat.pending else None
        self.update.write_nothing(self._row(), len(self.config.metrics))
        if slices := self._overlapping:
            slices.end()
        self._send()
        self._receive(contributed=False)
        if self.replica.wire_is_grad:
            flat.grad.zero_() if self._kept is None else flat.grad.copy_(self._kept)
        self._kept = None
        return self._control

    def begin(self) -> None:
        """A new loop over the shard begins."""
        self.update.unpark()
        self.done = self._told = False

    def finish(self) -> None:
        """The shard is exhausted: take part until every worker's is."""
        self.settle()
        self.done = True
        while not self._told or (self._control.active and not self._control.stop):
            self.idle()
        self.update.park()

    def hear(self) -> None:
        """Take what the server says between rounds."""
        if self.slices:
            self.slices.publish()
        elif not self._server:
            self.exchange.publish(self.replica.pull.control_message)
        self._control = self.replica.pull.control

    def give_performance(self) -> None:
        """This rank's traffic, at the end of the run."""
        self.exchange.collect(json.dumps(self.exchange.traffic).encode())

    def state(self) -> RankState:
        """What only this rank knows."""
        own = self.replica.buffers.named if self.config.buffers == "local" else {}
        flat = self.replica.flat
        if flat.pending and self._kept is None:
            flat.collect()
        waiting = self._kept if self._kept is not None else flat.grad
        pending = dict(flat.named(waiting)) if flat.pending else {}
        slices = self.slices.own() if self.slices else {}
        return RankState(self.index, self.place, self._streams or rng.capture(), own, pending, self.update.tree(), slices)

    def end_epoch(self) -> None:
        """All ranks have ended an epoch: step the scheduler of the worker's own optimizer, as the server did if it is here."""
        if self.inner and not self._server and self.config.schedule == "epoch":
            self.inner.schedule(None if math.isnan(self._control.value) else self._control.value)

    def save(self) -> None:
        """This rank's part of a checkpoint, together with all other ranks."""
        if self._server:
            self._server.save_model()
        else:
            self.exchange.collect(self.state().pack())

    def _row(self, samples: float = 0, loss: float = 0) -> Row:
        now = self.exchange.clock()
        row = Row(samples=samples, loss=loss, done=self.done, stop=self.stop, signal=self.signalled)
        row.round = self._control.round % ROUNDS
        row.train, row.wait = now - self._left, self._left - self._begun
        return row

    def _send(self) -> None:
        """The push message as it stands; where the server is on this rank, it takes it from there."""
        self._begun = self.exchange.clock()
        self._told = self.done
        push = self.replica.push if self._server else self.replica.push_for(self._control.round)
        if self.slices:
            self.slices.combine()
            self.slices.follow()
        elif not self._server:
            if judges_clients(self.mode, self.config):
                lanes.contribute(self.exchange, push, self._rule, self._last, self.config.bucket_mb)
            else:
                contribute(self.exchange, push, self._rule, self._last)

    def _receive(self, contributed: bool) -> None:
        self._control = self._server.round(contributed) if self._server else self._pull_message(contributed)
        self.update.received()
        self._left = self.exchange.clock()

    def _pull_message(self, contributed: bool) -> Control:
        version = self._control.version
        if self.slices:
            self.slices.publish()
        else:
            for part in self.replica.pull_for(self._control.round):
                self.exchange.publish(part)
        self._control = self.replica.pull.control
        self.place.over = not self._control.active
        self.replica.check_finite(self._control)
        if self.inner and self.config.schedule == "round" and self._control.version > version:
            self.inner.schedule()
        if contributed or self._control.version > version:
            self.replica.buffers.load(self.replica.pull.buffers)
        if self._control.checkpoint:
            self.save()
        return self._control
