"""The `batches` loops of one rank: which of them a resumed run skips, where the script is in one, what each step has used up.

A rank that trains draws its batches; one that only serves answers the others until every worker's shard is exhausted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NoReturn

from torch import Tensor

from mpips import rng
from mpips.client import Client
from mpips.clients import Clients, Hosting
from mpips.data import Shard, samples_in
from mpips.federated import FedAvg
from mpips.message import Stop
from mpips.parameter_server import ParameterServer
from mpips.server import Server
from mpips.worker import Worker


class Where(Enum):
    """Where the script is on a rank that trains: a `batches` loop is at its end, running, or was broken out of."""

    OUTSIDE = 0
    INSIDE = 1
    BROKE = 2


class Loop:
    """The loop in progress, and those before it in the epoch.

    Args:
        half: what this rank does in a loop: a worker if it trains, else a server.
        streams: a resumed run's random streams, to go on with where the loop does.
        preempted: called when the run ends because a rank was told to.

    Attributes:
        cut: whether a stop ended the epoch before its end.
    """

    def __init__(
        self, half: Worker | Server | ParameterServer, streams: rng.State | None, preempted: Callable[[], NoReturn]
    ) -> None:
        self._half, self._streams, self._preempted = half, streams, preempted
        self._where = Where.OUTSIDE
        self._begun = 0  # loops in this epoch, those included that a resumed run has behind it
        self._taken = 0  # items yielded since the last step
        self._samples = half.place.samples  # samples behind what has not been pushed
        self._steps = 0  # on the batch at hand
        self._several = False  # the script takes several steps on one batch
        self.cut = False

    def next_epoch(self) -> None:
        """An epoch begins."""
        self._begun = 0

    def batches(self, data: Any, how: tuple[int | None, bool, bool], own: bool) -> Iterator[Any]:
        """The next loop, on a worker: its batches. On a server: none, once all workers are through.

        Args:
            data: all of it, or what is this worker's `own`.
            how: batch size, whether to shuffle, whether to drop a last batch that is not full.
            own: see `data`.
        """
        self.drain()
        if self._where is Where.INSIDE:
            raise RuntimeError("a ps.batches loop inside another; one loop at a time can be resumed")
        half, place = self._half, self._half.place
        loop, self._begun = self._begun, self._begun + 1
        if half.control.stop:
            return
        if loop < place.loop:
            self._rewind(loop == place.loop - 1 and not place.begun)
            return
        if place.over:
            self._rewind(True)
        elif isinstance(half, Worker):
            yield from self._work(half, self._share(half, data, loop, how, own))
        else:
            self._enter()
            half.start_server()
            self._obey()
        if place.over:
            place.next_loop()

    def _share(self, worker: Worker, data: Any, loop: int, how: tuple[int | None, bool, bool], own: bool) -> Shard | Hosting:
        """What of the data is this worker's."""
        update, config = worker.update, worker.config
        if isinstance(update, FedAvg):
            return Hosting(update, data, *how, own, config.seed + (loop << 53), self._forget)
        seed = config.seed * 1_000_003 + loop * 1_009  # the epoch is added: neighbours must not share orders
        data = data.together() if isinstance(data, Clients) else data
        return Shard(data, *how, worker.index, worker.workers, seed, own)

    def _forget(self) -> None:
        self._samples = 0

    def _work(self, worker: Worker, shard: Shard | Hosting) -> Iterator[Any]:
        worker.begin()
        self._where = Where.INSIDE
        batches = _deal(worker, shard)
        self._enter()
        for batch, count, last in batches:
            worker.settle()
            self._obey()
            if worker.control.stop:
                return
            self._taken += count
            self._samples += samples_in(batch)
            self._steps, worker.done = 0, last and not self._several
            worker.used += 1
            try:
                yield batch
            except GeneratorExit:
                worker.settle()  # whoever breaks out may look at the weights
                if self._where is Where.INSIDE:
                    self._where = Where.BROKE
                raise
            if worker.control.stop:
                return
        worker.settle()
        self._obey()
        if not worker.control.stop:
            self._exhausted(worker)

    def _enter(self) -> None:
        """What the script draws from now on is drawn in the loop, and what a checkpoint then holds was captured there."""
        place = self._half.place
        self._rewind(place.begun)
        place.inside = True

    def _rewind(self, here: bool) -> None:
        """If a resumed run goes on `here`, undo what the script and the skipping have drawn on the way."""
        if here and self._streams is not None:
            rng.restore(self._streams)
        self._streams = None if here else self._streams

    def _exhausted(self, worker: Worker) -> None:
        """Wait with the others until every worker's shard is."""
        worker.place.taken += self._taken
        self._taken, worker.place.samples = 0, self._samples
        self._where = Where.OUTSIDE
        worker.finish()
        self._obey()

    def drain(self) -> None:
        """End a loop that the script broke out of: for this rank its shard is exhausted."""
        if self._where is Where.BROKE and isinstance(self._half, Worker):
            self._exhausted(self._half)
            if self._half.place.over:
                self._half.place.next_loop()

    def check_outside(self, call: str) -> None:
        """Raise RuntimeError if the script makes, in the middle of a loop, a call that belongs between loops."""
        self.drain()
        if self._where is Where.INSIDE:
            raise RuntimeError(
                f"{call} inside a ps.batches loop, where a server that does not train never comes; call it after the loop"
                f" (checkpoints inside: the setting checkpoint.every)"
            )

    def backward(self, loss: Tensor, samples: int | None) -> None:
        """The last backward before a step; see `Run.backward`."""
        worker = self._half
        if not isinstance(worker, Worker) or self._where is not Where.INSIDE:
            raise RuntimeError(
                "backward() outside a ps.batches loop, where the server does not wait for it; call it in the loop"
            )
        worker.backward(loss, self._samples if samples is None else samples)

    def step(self, loss: Tensor | float, samples: int | None, metrics: Mapping[str, float]) -> None:
        """The script has computed a gradient; see `Run.step`."""
        worker = self._half
        if not isinstance(worker, Worker) or self._where is not Where.INSIDE:
            raise RuntimeError("step() outside a ps.batches loop, where the server does not wait for it; call it in the loop")
        named = worker.config.metrics
        if metrics.keys() != set(named):
            raise ValueError(f"step() was given the metrics {sorted(metrics)}, the `metrics` setting names {named}")
        count = self._samples if samples is None else samples
        taken, self._taken, self._samples, worker.place.samples = self._taken, 0, 0, 0
        if count < 0:
            raise ValueError(f"step() was given samples={count}; expected 0 or more")
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if isinstance(worker.update, FedAvg) and worker.update.measuring:
            worker.update.measure(value, count)
            return
        self._steps += 1
        self._several = self._several or self._steps > 1
        if self._steps > 1 and worker.done:
            raise RuntimeError(
                "a first second step() on one batch, at a shard's last batch: the server has been told it is the end"
            )
        worker.step(value, count, [float(metrics[name]) for name in named], taken)
        self._obey()

    def _obey(self) -> None:
        """Do what the control says about ending."""
        stop = self._half.control.stop
        if stop:
            self.cut = True
            self._where = Where.OUTSIDE
        if stop == Stop.PREEMPTED:
            self._preempted()

    def leave(self) -> None:
        """The script ends: say so to the others if that is in the middle of a loop."""
        if self._where is not Where.OUTSIDE and isinstance(self._half, Worker):
            self._where = Where.OUTSIDE
            self._half.stop = 2
            self._half.idle()


def _deal(worker: Worker, shard: Shard | Hosting) -> Iterator[Any]:
    """This worker's own batches; or, of a server that answers requests, those that it deals out."""
    place = worker.place
    total = shard.tickets(place.epoch) if isinstance(worker, Client) and isinstance(shard, Shard) else None
    if total is None or isinstance(shard, Hosting):
        return shard.batches(place)

    def ticket() -> int | None:
        assert isinstance(worker, Client)
        number = worker.next_ticket()
        return None if number is None or number >= total else number

    return shard.dealt(place.epoch, ticket)
