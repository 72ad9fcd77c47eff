"""The script's loops over data on one worker: what each step has used up, and where a checkpoint finds the script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from threading import get_ident
from typing import Any, NoReturn

from torch import Tensor

from mpips.algorithms.federated import FedAvg
from mpips.data import Common, Share
from mpips.data.clients import Clients, Hosting
from mpips.model.message import Call, Stop
from mpips.process import rng
from mpips.run.replay import Replay
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import Worker

Said = tuple[Tensor | float | None, float | None, Mapping[str, float]]  # loss, samples and metrics of a step of the script


BARREN = 1_000_000  # loops without a batch, after the end of the run, by which a script is taken for one that never ends


def as_number(loss: Tensor | float) -> float:
    """Return a loss as a number."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


class Where(Enum):
    """Where the script is: outside a loop over its shard, inside one, or broken out of one."""

    OUTSIDE = 0
    INSIDE = 1
    BROKE = 2


class Batches:
    """The iterable that `ps.batches` returns: each `iter` begins a new loop.

    Args:
        loop: begins a loop and returns its iterator.
    """

    def __init__(self, loop: Callable[[], Iterator[Any]]) -> None:
        self._loop = loop

    def __iter__(self) -> Iterator[Any]:
        return self._loop()


class Loop:
    """The present loop over data, and the loops before it in the epoch.

    Args:
        worker: the worker that takes the steps.
        common: the random streams that the order of the data is drawn from, identical on all workers.
        replay: what a resumed run has done before its checkpoint.
        preempted: called when the run ends because a rank was preempted.
        tell: prints a line.

    Attributes:
        cut: whether a stop ended the epoch before its end.
        aware: whether the script has read that the run stops.
        framework: whether a framework has the loop, and counts its batches.
        rehearsing: whether the script executes the body of a loop whose steps are not taken.
    """

    def __init__(
        self, worker: Worker, common: Common, replay: Replay, preempted: Callable[[], NoReturn], tell: Callable[[str], object]
    ) -> None:
        self.worker, self._common, self._preempted, self._tell = worker, common, preempted, tell
        self.replay = replay
        self._where = Where.OUTSIDE
        self.rehearsing = self.aware = self.framework = self._told = False
        self._taken = 0  # items yielded since the last step
        self._samples: float | None = worker.place.samples  # behind gradients not yet pushed; None if unknown
        self._later: float = 0  # samples drawn since the last backward before a draw
        self._latest = worker.place.latest  # the samples of the last step, reused for a second step on a batch
        self._unread = False  # whether ps.shard() was called and no batch drawn since
        self._stepped_at = (0.0, 0.0)  # the loop and the batch of the last step
        self.cut = False
        self._told_of_part = self._doubted = False
        self._size: float | None = None  # items of the batch drawn last
        self._uneven = False  # whether batches differ in size
        self._passed = False  # whether a batch was drawn after another one without a backward between them
        self._drawn_by = 0  # the thread that has drawn the last batch
        self._barren = 0  # loops that the script has begun since the run has ended

    @property
    def inside(self) -> bool:
        """Whether the script is inside a loop over its shard."""
        return self._where is Where.INSIDE

    def batches(self, data: Any, how: tuple[int | None, bool, bool], own: bool) -> Iterator[Any]:
        """Yield this worker's batches of the next loop. Yields nothing if a resumed run has done the loop already.

        Args:
            data: all data, or this worker's own.
            how: batch size, whether to shuffle, whether to drop a last batch that is not full.
            own: whether the data belongs to this worker only.
        """
        self.drain()
        if self.inside:
            raise RuntimeError("a loop over a shard inside another; one loop at a time can be resumed")
        worker, place = self.worker, self.worker.place
        self._unread = False
        loop = self.replay.next_loop()
        if worker.control.stop:
            self._barren += 1
            if self._barren > BARREN:
                raise RuntimeError(
                    f"the run has ended after round {worker.control.round:.0f}, as another worker has left or it was to stop; "
                    f"the script has begun {BARREN} loops over its shard since, which have no batches: expected loops that end "
                    f"(while not ps.stopping)"
                )
            return
        if loop < place.loop or place.over or (place.broke and place.calling):
            try:
                yield from self._rehearse(self._share(data, loop, how, own))
            finally:  # the body may break out of the loop
                self._skipped(loop)
            return
        self.replay.go_on(not place.begun)
        yield from self._work(partial(self._share, data, loop, how, own), own)
        if place.over:
            place.next_loop()

    def _skipped(self, loop: int) -> None:
        """Note the end of a loop that was done before the checkpoint that the run is resumed from."""
        place = self.worker.place
        if loop < place.loop or place.over:
            self.replay.end_loop(loop)
        else:  # the script had broken out of it, and had begun a call
            self.worker.begin()
            self._where = Where.BROKE

    def promised(self) -> None:
        """Note that the script has asked for a shard to loop over."""
        self._unread = not self.replay.loops and self.worker.status.drawn == 0

    def _share(self, data: Any, loop: int, how: tuple[int | None, bool, bool], own: bool) -> Share | Hosting:
        """Return this worker's share of the data."""
        worker = self.worker
        update, config = worker.update, worker.config
        if isinstance(update, FedAvg):
            return Hosting(update, data, *how, own, config.seed + (loop << 53), self._forget)
        data = data.together() if isinstance(data, Clients) else data
        return Share(data, *how, worker.index, worker.workers, self._common, own)

    def _forget(self) -> None:
        """Reset the count of samples, at the beginning of a client."""
        self._samples = 0

    def _begins_together(self, own: bool) -> bool:
        """Return whether the loop begins with a call of all workers, for one order on all, and for who shares the data."""
        worker = self.worker
        meets = worker.mode.gradients or (worker.config.min_workers > 0 and not worker.mode.requests)
        return worker.workers > 1 and meets and not own and not worker.place.begun

    def _work(self, make_shard: Callable[[], Share | Hosting], own: bool) -> Iterator[Any]:
        """Yield this worker's batches, and wait for the other workers at the end."""
        worker, place = self.worker, self.worker.place
        worker.begin()
        if self._begins_together(own):
            place.calling = True
            self._meet()
            place.calling = False
            if worker.control.stop:
                return
        shard = make_shard()  # now that it is known which workers share the data
        self._where = Where.INSIDE
        resumed = self.replay.pending  # the run goes on in this loop
        if resumed:
            self.replay.put_back()
        self._recognise(shard, resumed)
        batches = iter(()) if place.broke else _deal(worker, shard)
        if resumed:
            self.replay.restore_streams()
        place.inside, place.calling = True, False
        for batch, count, samples in batches:
            if resumed:
                self.replay.forget()
                resumed = False
            worker.settle()
            if worker.control.stop:
                self._obey()
                return
            self._draw(count, samples)
            worker.status.digest, worker.status.drawn = shard.digest if isinstance(shard, Share) else 0, worker.status.drawn + 1
            worker.used += 1
            worker.status.more = worker.mode.gradients and not worker.mode.requests
            try:
                yield batch
            except GeneratorExit:  # a break, or an exception that may end the run
                if self.inside:
                    self._where = Where.BROKE
                place.broke = not self.aware
                worker.settle(pay=False)  # code after a break may read the weights
                raise
            worker.pay()
            if worker.control.preempting and worker.status.more:
                worker.barrier(Call.PAUSE)
            if worker.control.stop:
                self._obey()
                return
        if resumed:  # behind the last batch
            yield from self._rehearse_last(shard)
        worker.settle()
        self._obey()
        if not worker.control.stop:
            if isinstance(shard, Share) and not (own or self._told_of_part):
                self._look_for_step()
            self._exhausted()

    def _look_for_step(self) -> None:
        """Say once that the script has gone through a shard without a step, as to measure: it has seen one part of the data."""
        worker = self.worker
        if worker.workers > 1 and not (worker.status.stepped or worker.replica.flat.pending) and worker.status.drawn:
            self._told_of_part = True
            self._tell(
                "mpips: a loop over a shard has ended without a step: each worker has seen its own part of the data, and what "
                "it has measured is of that part; evaluate in ps.validate(), or over data that are not given to ps.shard()"
            )

    def _recognise(self, shard: Share | Hosting, resumed: bool) -> None:
        """Note which data the loop is over, and say so if they are not those of the checkpoint."""
        place, now = self.worker.place, shard.identity if isinstance(shard, Share) else 0
        if resumed and place.data and now and place.data != now:
            self._tell(
                "mpips: resume: the data or the batch size of this loop are not those of the checkpoint; the run goes on with "
                "what the script gives now, and is not the one that it would have been"
            )
        place.data = now

    def _meet(self) -> None:
        """Draw the order of this loop from worker 0's random streams, if those are where a single process's would be."""
        worker = self.worker
        reply = worker.call_for(
            Call.BEGIN, lambda: {"told": self._common.tell() if worker.is_chief and worker.mode.gradients else ""}
        )
        if lost := reply.get("lost"):
            self.worker.share_with(lost)
        self._obey()
        self._common.take(reply.get("told", ""))

    def _draw(self, count: int, samples: float | None) -> None:
        """Note a drawn batch. If nothing remains of the gradients of earlier batches, forget their samples."""
        flat = self.worker.replica.flat
        self._drawn_by = get_ident()
        if flat.dropped:
            self._heed_dropped()
        self._passed |= bool(self._samples) and not flat.accumulated
        if self._samples and not flat.any_gradient():
            self._samples = 0
        if samples != self._size and self._size is not None:
            self._uneven = True
            if self._samples:
                self._doubt(
                    f"gradients of batches of different sizes ({self._size:g} and {samples or 0:g} items on this worker) are "
                    f"accumulated for one step: one process takes the mean of the batches' means, workers weigh it by their "
                    f"samples; for the same give batches of one size (drop_last=True)"
                )
        self._size = samples
        if flat.accumulated:
            self._later, flat.accumulated = 0, False
        self._taken += count
        self._later += samples or 0
        self._samples = None if samples is None or self._samples is None else self._samples + samples

    def _doubt(self, what: str) -> None:
        """Say once, where workers weigh their gradients by samples, that the numbers may not be those of one process."""
        if self.worker.workers > 1 and self.worker.mode.gradients and not self._doubted:
            self._doubted = True
            self._tell(f"mpips: {what}")

    def _look_at_samples(self, inside: bool) -> None:
        """Say once that a step's samples may be those of another batch: batches differ in size, and the last one is counted."""
        flat = self.worker.replica.flat
        late = flat.pending and (self._passed or not flat.accumulated)
        if late or (not inside and self._samples == 0 and not self._taken):
            self._doubt(
                "batches differ in size, and a step's is taken to be the one that was drawn last; where it is another one, as "
                "with a batch drawn ahead, joined batches or a list of them, say ps.step(loss, samples=n)"
            )

    def _heed_dropped(self) -> None:
        """Forget the samples behind gradients that the script has removed itself, as `model.zero_grad()` does."""
        flat = self.worker.replica.flat
        if flat.dropped and self._samples and self.worker.update.members is None:  # several optimizers may have others still
            self._samples = min(self._samples, self._later)
        flat.dropped = False

    def drop_gradients(self) -> None:
        """Forget the samples behind gradients that the script has just zeroed, if they were not pushed."""
        if self.inside and self._samples and self.worker.replica.flat.pending:
            self._samples = min(self._samples, self._later)

    def _rehearse(self, shard: Share | Hosting) -> Iterator[Any]:
        """Yield one batch of a loop that a resumed run has done. No step is taken on it: it lets the body set its names."""
        batches = shard.first() if isinstance(shard, Share) and not self.framework else []
        if batches and not self._told:
            self._told = True
            self._tell("mpips: resume: a loop that is done executes its body once, without a step, for the names that it sets")
        self._where, self.rehearsing = Where.INSIDE, True
        try:
            yield from batches
        finally:
            self._where, self.rehearsing = Where.OUTSIDE, False

    def _rehearse_last(self, shard: Share | Hosting) -> Iterator[Any]:
        """Rehearse the body of a loop of which a resumed run has found no batch left, where the run has gone on already."""
        streams = rng.capture()
        self.worker.remember()
        try:
            yield from self._rehearse(shard)
        except GeneratorExit:
            self._where = Where.BROKE
            raise
        finally:
            self.replay.put_back()
            self.replay.forget()
            rng.restore(streams)

    def made(self) -> bool:
        """Begin a call. Return whether nothing is to be done: a resumed run has made it before, or rehearses a loop.

        Call `end_call` at the end of a call that is made.
        """
        if self._where is not Where.OUTSIDE:
            return self.rehearsing
        if self.replay.call():
            return True
        if self.worker.travels:
            self.worker.settle()  # a checkpoint that comes due in that round is within this call
        if self.worker.control.stop:
            self.obey()
        return False

    def end_call(self) -> None:
        """End a call. A checkpoint that came due in it is taken now, so that a resumed run goes on behind the call."""
        if self._where is not Where.OUTSIDE:
            return
        self.replay.end_call()
        if not (self.replay.pending or self.worker.travels):
            self.worker.settle()
        if self.worker.control.preempting:
            self.worker.barrier(Call.PAUSE)
            self.obey()

    def _exhausted(self) -> None:
        """Wait until every worker's shard is exhausted."""
        place = self.worker.place
        place.taken, self.worker.status.digest, self.worker.status.more = place.taken + self._taken, 0, False
        self._taken, place.samples = 0, self._samples or 0
        self._where = Where.OUTSIDE
        if self.worker.is_chief:
            self._common.hand_over()
        self.worker.finish()
        control = self.worker.control
        place.over = not (control.active or (control.stop and isinstance(self.worker, Client)))
        self._obey()

    def drain(self) -> None:
        """End a loop that the script broke out of. This worker's shard counts as exhausted."""
        place = self.worker.place
        place.calling |= place.broke  # a checkpoint that is taken here is within the call that follows
        self.obey()
        if self._where is Where.BROKE:
            self.replay.go_on(True)
            self._where = Where.OUTSIDE
            if not self.worker.control.stop:
                self._exhausted()
            if self.worker.place.over:
                self.worker.place.next_loop()

    def check_between(self, call: str) -> None:
        """Raise RuntimeError for a call of all workers inside a loop, in modes where workers never are at the same batch."""
        self.drain()
        if self.inside and isinstance(self.worker, Client):
            raise RuntimeError(
                f"{call} inside a loop in mode {self.worker.config.mode}, where workers are never at the same batch; call it "
                f"after the loop (checkpoints inside: the setting checkpoint.every)"
            )

    def backward(self, loss: Tensor, samples: int | None) -> None:
        """Do the last backward before a step; see `Run.backward`."""
        self.drain()
        if self.rehearsing or (not self.inside and self.replay.will_be_made()):
            loss.backward()  # type: ignore[no-untyped-call]
            return
        self.worker.backward(loss, self._count(samples))

    def step(self, loss: Tensor | float | None, samples: float | None, metrics: Mapping[str, float]) -> None:
        """Take a step with the gradient that the script has computed; see `Run.step`."""
        worker, inside = self.worker, self._where is Where.INSIDE
        if not inside or worker.control.stop:
            self.drain()
            inside = self.inside
        if self.rehearsing if inside else self.made():
            return
        if not inside and self.replay.lost:
            self._tell_lost()
        self._check_place(inside)
        if self._uneven and samples is None:
            self._look_at_samples(inside)
        means = self._means(loss, metrics) if metrics or worker.config.metrics else ()
        count = self._count(samples)
        taken, self._taken, self._samples, worker.place.samples = self._taken, 0, 0, 0.0
        self._note_call(count)
        value = float("nan") if loss is None else as_number(loss)
        if isinstance(worker.update, FedAvg) and worker.update.measuring:
            if loss is None:
                raise ValueError(f"mode {worker.config.mode} weighs a client by its loss: got none, expected ps.step(loss)")
            worker.update.measure(value, count)
            return
        worker.step(value, count, means, taken)
        if worker.control.stop:
            self._obey(later=inside)
        if not inside:
            self.end_call()

    def _tell_lost(self) -> None:
        """Say once that a resumed run cannot find its place."""
        if not self._told:
            self._told = True
            self._tell(
                f"mpips: resume: the script steps outside of ps.epochs() and of loops over a shard, where a resumed run cannot "
                f"find its place: round {self.worker.control.round:.0f} is followed by the first step of the script; count by "
                f"ps.round, as in: for step in range(ps.round, steps)"
            )

    def _means(self, loss: Tensor | float | None, metrics: Mapping[str, float]) -> Sequence[float]:
        """Return the metrics given with a step, in the order of the setting `metrics`; NaN if the script does not say any.

        Raises:
            ValueError: these are not the metrics that the setting names.
        """
        named = self.worker.config.metrics
        if (metrics or (named and loss is not None)) and metrics.keys() != set(named):
            raise ValueError(f"step() was given the metrics {sorted(metrics)}, the `metrics` setting names {named}")
        return [float(metrics.get(name, float("nan"))) for name in named]

    def _note_call(self, count: float) -> None:
        """Count this step, of `count` samples, as done in a checkpoint of its round."""
        self.worker.place.latest = self._latest = count
        if self._where is Where.OUTSIDE:
            self.replay.end_call()

    def _check_place(self, inside: bool) -> None:
        """Raise RuntimeError for a step that trains on unsharded data, or that a checkpoint could not resume at.

        Args:
            inside: whether the script is inside a loop over its shard.
        """
        worker = self.worker
        if self._unread:
            raise RuntimeError(
                "a step before any loop over a shard: ps.shard(loader) was called, expected a loop over the loader that it "
                "returned; a loop over the loader that it was given trains every worker on all data"
            )
        if inside and self._drawn_by != get_ident():
            raise RuntimeError(
                "a step on another thread than the loop over the shard, which that thread may end meanwhile: expected both on "
                "one; a DataLoader prefetches by num_workers"
            )
        position = worker.status.begun, worker.status.drawn
        if position == self._stepped_at and inside and worker.config.checkpoint.every:
            raise RuntimeError(
                f"a second step on a batch with checkpoint.every: given {worker.config.checkpoint.every}, expected 0, as a "
                f"run cannot be resumed between the two; checkpoints are written at the ends of epochs, and by ps.save() "
                f"between batches"
            )
        self._stepped_at = position

    def average(self, loss: Tensor | float | None, samples: float | None = None) -> float:
        """Average the gradients over all workers without a step; see `Worker.average`. `samples` is as in `step`."""
        self.drain()
        value = 0.0 if loss is None else as_number(loss)
        within = self.worker.place.calling and not self.replay.pending  # a step that evaluates the loss several times
        if not within and self.made():
            return value
        average = self.worker.average(value, self._count(samples))
        if not within:
            self.end_call()
        return average

    def adopt(self, weights: Tensor, loss: float, said: Said = (None, None, {}), steps: bool = True) -> None:
        """Let the server take weights that the script's optimizer has stepped on every worker.

        Args:
            weights: `(numel,)`, the weights.
            loss: the mean loss of this worker's samples.
            said: the arguments of the script's `ps.step`.
            steps: whether the batches since the last step are behind the weights.
        """
        self.drain()
        means = self._means(said[0], said[2])
        count, taken = (self._count(said[1]), self._taken) if steps else (0.0, 0)
        if steps:
            self._taken, self._samples, self.worker.place.samples = 0, 0, 0.0
            self._note_call(count)
        elif self._where is Where.OUTSIDE:
            self.replay.end_call()
        inside = self.inside
        self.worker.adopt(weights, loss, count, means, taken)
        self._obey(later=inside)
        if not inside:
            self.end_call()

    def _count(self, said: float | None = None) -> float:
        """Return the samples behind the gradient: `said`, or those drawn since the last step; without a loop steps count alike.

        Raises:
            ValueError: the number is unknown, or negative.
        """
        if said is not None:
            if said < 0:
                raise ValueError(f"step() was given samples={said}; expected 0 or more")
            return said
        if self.worker.replica.flat.dropped:
            self._heed_dropped()
        samples = self._latest if self._samples == 0 and not self._taken else self._samples
        if samples is None:
            raise ValueError(
                "the samples of this step are not known: the batches are of a kind whose items cannot be counted; say "
                "ps.step(loss, samples=n)"
            )
        return samples

    def _obey(self, later: bool = False) -> None:
        """React to a stop in the control. If `later`, the script first does what follows a step in its loop."""
        if self.worker.control.stop:
            self.cut = True
            self._where = Where.OUTSIDE
        if not later:
            self.obey()

    def obey(self) -> None:
        """End the process here if the run was preempted."""
        if self.worker.control.stop == Stop.PREEMPTED:
            self.worker.settle()
            self._preempted()

    def leave(self) -> None:
        """Note that the script ends in the middle of a loop, so that the server learns of it."""
        if self._where is not Where.OUTSIDE:
            self._where = Where.OUTSIDE
            self.worker.status.stop = 2


def _deal(worker: Worker, shard: Share | Hosting) -> Iterator[tuple[Any, int, float | None]]:
    """Return the iterator over this worker's own batches, or over those that an asynchronous server deals out."""
    place = worker.place
    total = shard.tickets(place.epoch, place.loop) if isinstance(worker, Client) and isinstance(shard, Share) else None
    if total is None or isinstance(shard, Hosting):
        return shard.batches(place)

    def ticket() -> int | None:
        assert isinstance(worker, Client)
        number = worker.next_ticket()
        return None if number is None or number >= total else number

    return shard.dealt(place.epoch, ticket)
