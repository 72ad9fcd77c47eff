"""The script's loops over data on one worker: which of them a resumed run skips, what each step has used up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NoReturn

from torch import Tensor

from mpips.algorithms.federated import FedAvg
from mpips.data import Common, Share
from mpips.data.clients import Clients, Hosting
from mpips.model.message import Call, Stop
from mpips.process import rng
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import Worker


class Where(Enum):
    """Where the script is: a loop over its shard is at its end, running, or was broken out of."""

    OUTSIDE = 0
    INSIDE = 1
    BROKE = 2


class Batches:
    """What `ps.batches` gives: each `iter` of it is a loop of its own.

    Args:
        loop: begins one.
    """

    def __init__(self, loop: Callable[[], Iterator[Any]]) -> None:
        self._loop = loop

    def __iter__(self) -> Iterator[Any]:
        return self._loop()


class Loop:
    """The loop in progress, and those before it in the epoch.

    Args:
        worker: takes the steps.
        common: the random streams that the order of the data is drawn from, alike on all workers.
        streams: a resumed run's random streams, to go on with where the loop does.
        preempted: called when the run ends because a rank was told to.

    Attributes:
        cut: whether a stop ended the epoch before its end.
    """

    def __init__(self, worker: Worker, common: Common, streams: rng.State | None, preempted: Callable[[], NoReturn]) -> None:
        self.worker, self._common, self._streams, self._preempted = worker, common, streams, preempted
        self._where = Where.OUTSIDE
        self._begun = 0  # loops in this epoch, those included that a resumed run has behind it
        self._taken = 0  # items yielded since the last step
        self._samples: float | None = worker.place.samples  # behind what has not been pushed; None if nobody knows
        self._latest: float | None = 1  # the samples of the last step: a second step on a batch is about as many
        self._unread = False  # a shard that no batch has been drawn of
        self._stepped_at = (0, 0)  # the loop and the batch of the last step
        self.cut = False

    @property
    def inside(self) -> bool:
        """Whether the script is in a loop over its shard."""
        return self._where is Where.INSIDE

    def next_epoch(self) -> None:
        """An epoch begins; a resumed run that begins it anew draws as it did."""
        self._begun, place = 0, self.worker.place
        self._rewind(not place.loop and not place.begun)

    def batches(self, data: Any, how: tuple[int | None, bool, bool], own: bool) -> Iterator[Any]:
        """The next loop: this worker's batches.

        Args:
            data: all of it, or what is this worker's `own`.
            how: batch size, whether to shuffle, whether to drop a last batch that is not full.
            own: see `data`.
        """
        self.drain()
        if self.inside:
            raise RuntimeError("a loop over a shard inside another; one loop at a time can be resumed")
        worker, place = self.worker, self.worker.place
        self._unread = False
        loop, self._begun = self._begun, self._begun + 1
        if worker.control.stop:
            return
        if loop < place.loop:
            self._rewind(loop == place.loop - 1 and not place.begun)
            return
        if place.over:
            self._rewind(True)
        else:
            yield from self._work(self._share(data, loop, how, own), own)
        if place.over:
            place.next_loop()

    def promised(self) -> None:
        """The script has asked for a shard, to loop over."""
        self._unread = not self._begun and self.worker.drawn == 0

    def _share(self, data: Any, loop: int, how: tuple[int | None, bool, bool], own: bool) -> Share | Hosting:
        """What of the data is this worker's."""
        worker = self.worker
        update, config = worker.update, worker.config
        if isinstance(update, FedAvg):
            return Hosting(update, data, *how, own, config.seed + (loop << 53), self._forget)
        data = data.together() if isinstance(data, Clients) else data
        return Share(data, *how, worker.index, worker.workers, self._common, own)

    def _forget(self) -> None:
        self._samples = 0

    def _work(self, shard: Share | Hosting, own: bool) -> Iterator[Any]:
        worker = self.worker
        worker.begin()
        if worker.workers > 1 and worker.mode.gradients and not own and not worker.place.begun:
            self._meet()
            if worker.control.stop:
                return
        self._where = Where.INSIDE
        batches = _deal(worker, shard)
        self._enter()
        for batch, count, samples in batches:
            worker.settle()
            if worker.control.stop:
                self._obey()
                return
            self._draw(count, samples)
            worker.digest, worker.drawn = shard.digest if isinstance(shard, Share) else 0, worker.drawn + 1
            worker.used += 1
            try:
                yield batch
            except GeneratorExit:
                worker.settle()  # whoever breaks out may look at the weights
                if self.inside:
                    self._where = Where.BROKE
                raise
            worker.pay()
            if worker.control.stop:
                self._obey()
                return
        worker.settle()
        self._obey()
        if not worker.control.stop:
            self._exhausted()

    def _meet(self) -> None:
        """Draw the order of this loop from where worker 0's streams are, if those are where one process's would be."""
        reply = self.worker.call_for(Call.BEGIN, {"told": self._common.tell() if self.worker.index == 0 else ""})
        self._obey()
        self._common.take(reply.get("told", ""))

    def _draw(self, count: int, samples: float | None) -> None:
        """A batch is drawn; those before it are forgotten if nothing is left of them."""
        if self._samples and not self.worker.replica.flat.any_gradient():
            self._samples = 0
        self._taken += count
        self._samples = None if samples is None or self._samples is None else self._samples + samples

    def _enter(self) -> None:
        """What the script draws from now on is drawn in the loop, and what a checkpoint then holds was captured there."""
        place = self.worker.place
        self._rewind(place.begun)
        place.inside = True

    def _rewind(self, here: bool) -> None:
        """If a resumed run goes on `here`, undo what the script and the skipping have drawn on the way."""
        if here and self._streams is not None:
            rng.restore(self._streams)
        self._streams = None if here else self._streams

    def _exhausted(self) -> None:
        """Wait with the others until every worker's shard is."""
        place = self.worker.place
        place.taken, self.worker.digest = place.taken + self._taken, 0
        self._taken, place.samples = 0, self._samples or 0
        self._where = Where.OUTSIDE
        if self.worker.index == 0:
            self._common.hand_over()
        self.worker.finish()
        control = self.worker.control
        place.over = not (control.active or (control.stop and isinstance(self.worker, Client)))
        self._obey()

    def drain(self) -> None:
        """End a loop that the script broke out of: for this rank its shard is exhausted."""
        self.obey()
        if self._where is Where.BROKE:
            self._where = Where.OUTSIDE
            if not self.worker.control.stop:
                self._exhausted()
            if self.worker.place.over:
                self.worker.place.next_loop()

    def check_between(self, call: str) -> None:
        """Raise RuntimeError for a call of all workers in the middle of a loop that has no common moment there."""
        self.drain()
        if self.inside and isinstance(self.worker, Client):
            raise RuntimeError(
                f"{call} inside a loop in mode {self.worker.config.mode}, where workers are never at the same batch; call it "
                f"after the loop (checkpoints inside: the setting checkpoint.every)"
            )

    def backward(self, loss: Tensor, samples: int | None) -> None:
        """The last backward before a step; see `Run.backward`."""
        self.drain()
        self.worker.backward(loss, self._count() if samples is None else samples)

    def step(self, loss: Tensor | float | None, samples: float | None, metrics: Mapping[str, float]) -> None:
        """The script has computed a gradient; see `Run.step`."""
        worker = self.worker
        if self._where is not Where.INSIDE or worker.control.stop:
            self.drain()
        self._check_place()
        named = worker.config.metrics
        if (metrics or (named and loss is not None)) and metrics.keys() != set(named):
            raise ValueError(f"step() was given the metrics {sorted(metrics)}, the `metrics` setting names {named}")
        count = self._count() if samples is None else samples
        if count < 0:
            raise ValueError(f"step() was given samples={count}; expected 0 or more")
        taken, self._taken, self._samples, worker.place.samples = self._taken, 0, 0, 0.0
        self._latest = count
        value = float("nan") if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        if isinstance(worker.update, FedAvg) and worker.update.measuring:
            worker.update.measure(value, count)
            return
        worker.step(value, count, [float(metrics.get(name, float("nan"))) for name in named], taken)
        if worker.control.stop:
            self._obey(later=self.inside)

    def _check_place(self) -> None:
        """Raise RuntimeError for a step at which the script does not do what it seems to."""
        worker = self.worker
        if self._unread:
            raise RuntimeError(
                "a step before any loop over a shard: ps.shard(loader) was called, expected a loop over the loader that it "
                "returned; a loop over the loader that it was given trains every worker on all data"
            )
        here = worker.begun, worker.drawn
        if here == self._stepped_at and self.inside and worker.config.checkpoint.every:
            raise RuntimeError(
                f"a second step on a batch with checkpoint.every: given {worker.config.checkpoint.every}, expected 0, as a "
                f"run cannot be resumed between the two; checkpoints are written at the ends of epochs, and by ps.save() "
                f"between batches"
            )
        self._stepped_at = here

    def average(self, loss: Tensor | float | None) -> float:
        """Bring the gradients of all workers together without a step; see `Worker.average`."""
        self.drain()
        value = 0.0 if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        return self.worker.average(value, self._count())

    def adopt(self, weights: Tensor, loss: float) -> None:
        """The script has taken a step by itself: the server takes the weights."""
        self.drain()
        count, taken = self._count(), self._taken
        self._taken, self._samples, self.worker.place.samples, self._latest = 0, 0, 0.0, count
        self.worker.adopt(weights, loss, count, taken)
        self._obey(later=self.inside)

    def _count(self) -> float:
        """The samples behind the gradient: of what was drawn since the last step; without a loop all steps count alike.

        Raises:
            ValueError: nobody knows.
        """
        samples = self._latest if self._samples == 0 and not self._taken else self._samples
        if samples is None:
            raise ValueError(
                "the samples of this step are not known: the batches are of a kind whose items cannot be counted; say "
                "ps.step(loss, samples=n)"
            )
        return samples

    def _obey(self, later: bool = False) -> None:
        """Do what the control says about ending; `later` if the script is to do first what follows a step in its loop."""
        if self.worker.control.stop:
            self.cut = True
            self._where = Where.OUTSIDE
        if not later:
            self.obey()

    def obey(self) -> None:
        """End here if the run does because a rank was told to."""
        if self.worker.control.stop == Stop.PREEMPTED:
            self.worker.settle()
            self._preempted()

    def leave(self) -> None:
        """The script ends: say so to the others if that is in the middle of a loop."""
        if self._where is not Where.OUTSIDE:
            self._where = Where.OUTSIDE
            self.worker.stop = 2


def _deal(worker: Worker, shard: Share | Hosting) -> Iterator[tuple[Any, int, float | None]]:
    """This worker's own batches; or, of a server that answers requests, those that it deals out."""
    place = worker.place
    total = shard.tickets(place.epoch, place.loop) if isinstance(worker, Client) and isinstance(shard, Share) else None
    if total is None or isinstance(shard, Hosting):
        return shard.batches(place)

    def ticket() -> int | None:
        assert isinstance(worker, Client)
        number = worker.next_ticket()
        return None if number is None or number >= total else number

    return shard.dealt(place.epoch, ticket)
