"""A run as the script sees it on a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mpips.config import ConfigError
from mpips.data import Place
from mpips.data.loader import sharded
from mpips.model.message import Call, Control, Stop
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.optim.foreign import evaluates, needs_its_own_step, unhooked
from mpips.optim.joint import Joint
from mpips.run import clipping, failure
from mpips.run import run_folder as folder
from mpips.run import wrapped_optimizer as wrapped
from mpips.run.keeping import Keeping
from mpips.run.loop import Batches, Loop, Said
from mpips.run.replay import Replay
from mpips.run.roles import Roles
from mpips.server.base import measured
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import KEEPING

UNSAID: Said = (None, None, {})


class Seat:
    """One optimizer's interface to the run, see `wrapped.Stepping`.

    Args:
        run: the run.
        which: the index of the optimizer among those given to `connect`.
    """

    def __init__(self, run: Run, which: int) -> None:
        self._run, self._which = run, which
        optimizer = run.optimizers[which]
        own = run.steps_in_rounds and needs_its_own_step(optimizer)
        self._evaluates = {closure: own or evaluates(optimizer, closure) for closure in (False, True)}

    def optimizer_step(self, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Take a step: on the workers for an optimizer that evaluates the loss itself, else by a round."""
        if self._evaluates[closure is not None]:
            return self._run.evaluate(self._which, closure, overflow)
        return self._run.step_once(self._which, closure, overflow)

    def first_step(self, step: Callable[[], Any]) -> Any:
        """Take the first half of a step that evaluates the loss twice, as SAM's: `step` moves the weights."""
        return self._run.first_step(self._which, step)

    def second_step(self, step: Callable[[], Any]) -> Any:
        """Take the second half of a step that evaluates the loss twice."""
        return self._run.second_step(self._which, step)

    def swap(self, swap: Callable[[], Any]) -> Any:
        """Let the optimizer swap the weights in place, as a schedule-free one's `train` and `eval` do."""
        return self._run.swap(self._which, swap)

    def gradients_zeroed(self) -> None:
        """Note that the script has zeroed the gradients of this optimizer's parameters."""
        self._run.gradients_zeroed()

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step because a GradScaler had found an Inf or NaN."""
        return self._run.skipped

    def check_loadable(self) -> None:
        """Raise RuntimeError if the state that steps this optimizer is on another rank."""
        self._run.check_loadable(self._which)

    def optimizer_loaded(self) -> None:
        """Take over the state that the script has loaded."""
        self._run.take_over_state(self._which)

    def optimizer_state(self) -> dict[int, Any] | None:
        """Return the optimizer's state by parameter index; None if the optimizer has it already."""
        return self._run.state_of(self._which)


@dataclass(frozen=True)
class OwnStep:
    """A step that every worker takes itself, on weights of its own, as the optimizer evaluates the loss in the middle.

    Attributes:
        which: the index of the optimizer.
        pulled: `(numel,)`, the server's weights.
        more: what the worker's status has said before.
        taken: False if a resumed run has taken the step before, so that nothing is to be done.
    """

    which: int
    pulled: Tensor
    more: float
    taken: bool = True


class Run:
    """One worker's part in a run, as returned by `connect`.

    Attributes:
        config: the resolved settings.
        folder: the run's folder, the same on all ranks.
        optimizers: the script's optimizers.
    """

    def __init__(self, roles: Roles, preempted: Callable[[], NoReturn]) -> None:
        assert roles.worker
        self.config, self.folder, self._roles = roles.config, roles.folder, roles
        self.optimizers = roles.optimizer.parts if isinstance(roles.optimizer, Joint) else [roles.optimizer]
        self._communicator, self._server, self._worker = roles.communicator, roles.server, roles.worker
        self._several = len(self.optimizers) > 1
        self._keeping = Keeping(roles.kept, self.optimizers, self.print)
        self._worker.kept = self._keeping.state_dict
        self._values: dict[str, float] = roles.resumed.get("values", {})
        self._worker.replica.flat.sparse = any(isinstance(o, torch.optim.SparseAdam) for o in self.optimizers)
        for which, optimizer in enumerate(self.optimizers):
            wrapped.wrap(optimizer, Seat(self, which))
        clipping.watch(self._worker.replica.flat, self.average)
        self._replay = Replay(self._worker, self._keeping, roles.streams)
        self._told_of_gradients = False
        self._loop = Loop(self._worker, self._worker.common, self._replay, preempted, self.print)
        self._own_step: OwnStep | None = None  # the step in progress that the optimizer takes on this worker
        self._inside_step = False  # whether its code runs
        self._ended = -1.0  # the round at which `epochs` ended
        self._data: Any = None  # the validation data
        self._said = UNSAID  # of the `step` in progress

    @property
    def steps_in_rounds(self) -> bool:
        """Whether `optimizer.step()` is a round, in which all workers have the same weights."""
        return self._worker.mode.gradients

    @property
    def _place(self) -> Place:
        """The worker's place in its data."""
        return self._worker.place

    @property
    def _control(self) -> Control:
        """The server's latest control."""
        return self._worker.control

    @property
    def worker(self) -> int:
        """This worker's number, from 0: 0 for the first worker that lives, and from the next loop on one less for each dead."""
        return 0 if self._worker.is_chief else self._worker.index

    @property
    def workers(self) -> int:
        """The number of workers that share the data of the present loop."""
        return self._worker.workers

    @property
    def seed(self) -> int:
        """The seed of torch's random stream on the server at `connect`."""
        return self._worker.common.seed

    @property
    def round(self) -> int:
        """The number of rounds done."""
        return int(self._control.round)

    @property
    def loss(self) -> float:
        """The mean loss of the last round, over all workers' samples."""
        return self._control.loss

    @property
    def stopping(self) -> str:
        """Why the run ends, as "patience", "target", "requested", "left", "preempted" or "ended"; empty while it goes on."""
        stop = Stop(int(self._control.stop))
        self._loop.aware = bool(stop)
        return stop.name.lower() if stop else ""

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epoch numbers up to `count`, from where a resumed run was. Ends early if the run stops.

        Validations and checkpoints that are due take place at the end of each epoch.
        """
        place, self._worker.status.epochs = self._place, count
        if self._keeping.behind:
            self._keeping.catch_up()
        while place.epoch < count and not self.stopping:
            self._replay.next_epoch()
            yield place.epoch
            self._end_epoch(count)
        if not self.stopping:
            self._replay.next_epoch()  # the checkpoint of a run that goes on behind its epochs has no further one
        self._finish()

    def shard(self, loader: Any) -> Any:
        """Return a copy of a DataLoader whose iteration yields only this worker's batches.

        Args:
            loader: a DataLoader. The copy has its class, workers, collation, sampler and every other property.

        Raises:
            TypeError: `loader` is no DataLoader, or the mode is a federated one.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"ps.shard() given a {type(loader).__name__}; expected a DataLoader; for a dataset, tensors or an iterable of "
                f"batches loop over ps.batches(...)"
            )
        if self._worker.mode.federated:
            raise TypeError(
                f"ps.shard() in mode {self.config.mode}: given a DataLoader, expected the data by clients; loop over "
                f"ps.batches(mpips.Clients(...), batch_size), or ps.batches(dataset, batch_size) with a client a worker"
            )
        self._loop.promised()
        return sharded(loader, lambda own: self._loop.batches(own, (None, True, False), own=False), self._worker.part)

    def keep(self, **objects: Any) -> None:
        """Keep objects of the script in the checkpoint: averages, teachers, trackers, schedulers other than torch's.

        In a resumed run each object gets its state back in this call. If the checkpoint has no state for it, a line is printed.

        Args:
            objects: name=object; each has `state_dict` and `load_state_dict`.

        Raises:
            TypeError: an object lacks these methods, or its state holds something that a checkpoint cannot hold.
            RuntimeError: its `state_dict` calls what all ranks do together, such as the optimizer's.
        """
        with self._worker.alone(*KEEPING):
            self._keeping.keep(objects)

    def batches(
        self, data: Any, batch_size: int | None = None, *, shuffle: bool = True, drop_last: bool = False, shard: bool = True
    ) -> Iterable[Any]:
        """Return an iterable over this worker's share of the data, in batches. It can be iterated again if the data can.

        In federated modes one iteration is one communication round: some of the clients train, this worker's share of them one
        after another, each for `clients.epochs` local epochs. A dataset or a tuple of tensors is then split into one client per
        worker, and `batch_size=None` makes one batch of a client's data. Modes without clients join the data of all `Clients`.

        Args:
            data: a map-style dataset, tensors or arrays (one, or a tuple or dict of them), a list of samples, a DataLoader
                (which then decides batch size and order), an iterable of batches, or `Clients`.
            batch_size: the items in a worker's batch; None for data that is in batches already.
            shuffle: whether to draw a new order in each epoch, from torch's random stream, as a DataLoader does.
            drop_last: whether to leave out a worker's last batch if it is not full.
            shard: False for data that belongs to this worker only.
        """
        return Batches(lambda: self._loop.batches(data, (batch_size, shuffle, drop_last), own=not shard))

    def backward(self, loss: Tensor, samples: int | None = None) -> None:
        """Call `loss.backward()`, for the last time before `step`. With `overlap`, gradients may be sent while it runs.

        Do not change gradients between this call and `step`, and give both the same number of samples. To accumulate gradients
        over several batches, call this for the last batch only. Without `overlap`, and where gradients cannot be sent early (on
        one node, and in modes other than sync), this is `loss.backward()`.

        Args:
            loss: the loss to differentiate.
            samples: the number of samples that the gradient is the mean over; if None, the samples of the batches since the
                last step.

        Raises:
            RuntimeError: a parameter got its gradient in two parts, as with reentrant checkpoints.
        """
        self._loop.backward(loss, samples)

    def step(self, loss: Tensor | float, samples: float | None = None, **metrics: float) -> None:
        """Take the round of `optimizer.step()` with loss, samples and metrics given. Gradients are None afterwards.

        Args:
            loss: the mean loss over the samples, unscaled.
            samples: the number of samples that the gradient is the mean over; if None, the samples of the batches since the
                last step.
            metrics: the mean over the samples of each metric that the `metrics` setting names.

        Raises:
            NonFiniteError: on all ranks, if some rank's gradient holds a NaN or Inf and `nonfinite` is "raise".
            RuntimeError: the run has several optimizers; call the `step` of one of them.
        """
        if self._several:
            raise RuntimeError("ps.step() in a run of several optimizers: call the step of the one that is meant")
        self._said = float(loss.detach() if isinstance(loss, Tensor) else loss), samples, metrics
        try:
            self.optimizers[0].step()
        finally:
            self._said = UNSAID
        self._worker.replica.flat.clear()

    def gradients_zeroed(self) -> None:
        """Count no samples for gradients that the script throws away; with several optimizers, those of others may stay."""
        if not self._several:
            self._loop.drop_gradients()

    def turn_to(self, which: int) -> None:
        """Let the following round be about the optimizer `which`."""
        if self._keeping.behind:
            self._keeping.catch_up()
        self._worker.status.which = which
        if self._several:
            number = {p: n for n, p in enumerate(self._worker.replica.flat.parameters)}
            groups = self.optimizers[which].param_groups
            self._worker.update.members = frozenset(number[p] for group in groups for p in group["params"] if p in number)

    def step_once(self, which: int, closure: Callable[[], Any] | None, overflow: bool | None) -> Any:
        """Take a round for `optimizer.step()`, with an optimizer that evaluates the loss at most once; return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if overflow is not None and not self._worker.mode.gradients:
            raise ConfigError(f"GradScaler: given one with mode {self.config.mode}, allowed: mode sync; bfloat16 needs none")
        if self._several or self._keeping.behind:
            self.turn_to(which)
        if self._worker.replica.flat.examined and not (self._loop.rehearsing or self._replay.pending):
            self._look_at_gradients(scaled=overflow is not None)
        if overflow:
            self._worker.status.overflow = True
        self._loop.step(*(self._said if self._said is not UNSAID else (loss, None, {})))
        if overflow:
            self._worker.status.overflow = False
        return loss

    def _look_at_gradients(self, scaled: bool) -> None:
        """Say once that the script has changed its own gradients, where it may mean the average of all workers'.

        Args:
            scaled: whether a GradScaler has changed them.
        """
        flat = self._worker.replica.flat
        changed = flat.changed_gradient()
        if changed is None or scaled or self.workers == 1 or self._told_of_gradients:
            return
        self._told_of_gradients = True
        self.print(
            f"mpips: the script changes the gradient of {flat.slots[changed].name} between backward and the step, or in a "
            f"hook, on each worker its own, before they are averaged. That is right for masks, noise and factors; for "
            f"clipping, signs and norms call ps.average() after backward, and change p.grad then"
        )

    def evaluate(self, which: int, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Take a step of an optimizer that may evaluate the loss several times, or that the script looks into.

        Every worker takes the same step on weights of its own, with averaged losses and gradients. Then the server takes the
        new weights.
        """
        optimizer, flat, status = self.optimizers[which], self._worker.replica.flat, self._worker.status
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("optimizer: given LBFGS, whose step needs a closure, allowed: optimizer.step(closure)")
        losses: list[float] = []

        def averaged_closure() -> Any:
            assert closure
            with torch.enable_grad():
                loss = closure()
            losses.append(self._combine(loss))
            return loss if self.workers == 1 else loss.detach().new_tensor(losses[-1])

        def step() -> Any:
            return None if status.overflow else unhooked(optimizer)(optimizer, *([averaged_closure] if closure else []))

        status.overflow = bool(overflow)
        try:
            if not self._begin_own_step(which):
                self._own_step = None
                return closure() if closure else None
            status.overflow = overflow is not None and flat.first_nonfinite(flat.grad) is not None  # the same on all workers
            return self._end_own_step(step, losses)
        finally:
            status.overflow = False

    def _combine(self, loss: Tensor | float | None) -> float:
        """Average the gradients and the loss over all workers, and clip the gradients; return the loss."""
        mean = self._loop.average(loss, self._said[1])
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._worker.replica.flat.parameters, self.config.clip)
        return mean

    def first_step(self, which: int, step: Callable[[], Any]) -> Any:
        """Take the first half of a step as `evaluate` does; the script evaluates the loss itself, before `second_step`."""
        if self._inside_step:  # called by the optimizer's own step(closure)
            return step()
        return step() if self._begin_own_step(which) else None

    def second_step(self, which: int, step: Callable[[], Any]) -> Any:
        """Take the second half of a step, with the gradients averaged over all workers; the server takes the new weights."""
        if self._inside_step:
            return step()
        if not self._own_step or self._own_step.which != which:
            raise RuntimeError("optimizer.second_step(): given no first_step() before it, expected one")
        if not self._own_step.taken:
            self._own_step = None
            self._worker.replica.flat.clear()  # as the two halves may, which are not executed
            return None
        self._combine(None)
        return self._end_own_step(step, [])

    def swap(self, which: int, swap: Callable[[], Any]) -> Any:
        """Let the optimizer swap the weights on every worker alike; the server takes new ones, in a round without samples."""
        if self._inside_step:
            return swap()
        if not self._begin_own_step(which, averages=False):
            self._own_step = None
            return None
        self._worker.lead()
        return self._end_own_step(swap, [], steps=False)

    def _begin_own_step(self, which: int, averages: bool = True) -> bool:
        """Let the model have weights of its own; return whether the step is to be taken.

        Args:
            which: the index of the optimizer.
            averages: whether the step may begin with the gradient that is there.
        """
        optimizer, loop, worker = self.optimizers[which], self._loop, self._worker
        if self._own_step:
            raise RuntimeError("a step after optimizer.first_step(): given another one, expected optimizer.second_step()")
        if not worker.mode.gradients:
            raise ConfigError(
                f"optimizer: given {type(optimizer).__name__}, which steps on the workers, with mode {self.config.mode}, "
                f"allowed: mode sync"
            )
        if worker.missed_steps and isinstance(optimizer, torch.optim.LBFGS):
            raise RuntimeError(
                "optimizer.step(closure): given LBFGS on a worker that has taken fewer steps than others, so that its history "
                "is another; expected as many steps on all workers, as with drop_last=True and equal shares of the data"
            )
        self.turn_to(which)
        self._keeping.own_state.add(which)
        loop.drain()
        flat, taken = worker.replica.flat, not loop.made()
        self._own_step = OwnStep(which, flat.weights, worker.status.more, taken)
        if taken:
            worker.status.more = True  # a run that is preempted takes the whole step
            if averages and not isinstance(optimizer, torch.optim.LBFGS):  # which evaluates it itself
                self._combine(None)
            flat.rehang_weights(flat.weights.clone())
        return taken

    def _end_own_step(self, step: Callable[[], Any], losses: list[float], steps: bool = True) -> Any:
        """Take the step, and let the server take the new weights.

        Args:
            step: steps the model's weights.
            losses: the losses that the step has evaluated, the first one at the weights before; it may append to them.
            steps: whether the batches since the last step are behind the new weights.
        """
        own, flat = self._own_step, self._worker.replica.flat
        assert own
        self._inside_step = True
        try:
            result = step()
            weights = flat.gathered()
        finally:
            flat.rehang_weights(own.pulled)
            self._worker.status.more, self._own_step, self._inside_step = own.more, None, False
        if not steps and torch.equal(weights, own.pulled):  # on all workers: frameworks call `train` before each step
            self._loop.end_call()
            return result
        given = self._said[0]
        loss = losses[0] if losses else float("nan") if given is None else float(given)
        self._loop.adopt(weights, loss, self._said, steps)
        return result

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step because a GradScaler had found an Inf or NaN."""
        return bool(self._control.skipped)

    def average(self, samples: float | None = None) -> None:
        """Set every `p.grad` to the average over all workers, for code that needs it before the step, which then uses it.

        Every worker calls this between backward and `optimizer.step()`. Torch's clipping functions call it themselves.

        Args:
            samples: as in `step`; give both the same.
        """
        self._loop.average(None, samples)

    def state_of(self, which: int) -> dict[int, Any] | None:
        """Return the state of the optimizer `which` as its `state_dict` has it; None if the optimizer has it already."""
        worker = self._worker
        if which in self._keeping.own_state:
            return None
        if worker.inner:
            return None if worker.replica.wire_is_grad else self._numbered(which, worker.inner.state_dict())
        if self._communicator.size == 1:
            return None
        if isinstance(worker, Client):
            raise RuntimeError(
                f"optimizer.state_dict() in mode {self.config.mode}, where the server answers one worker at a time; the state "
                f"is in the checkpoints (ps.save())"
            )
        self._loop.made()
        tree = worker.optimizer_state()
        self._loop.obey()
        self._loop.end_call()
        return self._numbered(which, tree)

    def _steps_with(self, which: int) -> FlatOptimizer | None:
        """Return the optimizer that steps on this rank in place of the script's; None if there is none."""
        if which in self._keeping.own_state:
            return None
        worker, server = self._worker, self._server
        return worker.inner or (server.optimizer if server and self._communicator.size == 1 else None)

    def check_loadable(self, which: int) -> None:
        """Raise RuntimeError if the state of the optimizer `which` is on another rank's server."""
        if which not in self._keeping.own_state and self._steps_with(which) is None:
            raise RuntimeError(
                "optimizer.load_state_dict() after connect: the state lies with the server, expected to be loaded before "
                "connect; a run goes on from its checkpoint by --mpips.resume auto"
            )

    def take_over_state(self, which: int) -> None:
        """Give the state that the script has loaded into the optimizer `which` to the optimizer that steps in its place."""
        if stepping := self._steps_with(which):
            stepping.take_state(self.optimizers[which], which)

    def _numbered(self, which: int, tree: dict[str, Any]) -> dict[int, Any]:
        """Return an optimizer's state by parameter index, given its tree by name."""
        flat = self._worker.replica.flat
        names: dict[Tensor, str] = {p: slot.name for p, slot in zip(flat.parameters, flat.slots, strict=True)}
        return wrapped.by_number(tree["optimizer"]["state"], self.optimizers[which], names)

    def validate(self, measure: Callable[..., Any] | None = None, name: str = "validation") -> Any:
        """Measure the model on worker 0 with the server's weights, and let the server decide whether to stop.

        Every worker calls this.

        Args:
            measure: called on worker 0 only, in eval mode and without grad; with the validation data as argument, if `connect`
                was given any. Returns a number, or a dict of numbers by name. If None, the server measures with the `validate`
                of `connect`.
            name: the name of the number. Numbers of different names are judged separately; `early_stopping.monitor` selects the
                one that stops the run.

        Returns:
            The number, or the dict, the same on every worker. If a resumed run has done this validation before, or workers have
            left in the middle of a loop, the previous value.

        Raises:
            TypeError: `measure` returned anything else.
            CallError: the other workers do not make this call.
        """
        self._loop.check_between("validate()")
        if measure is None:
            self._check_frozen()
        if self._loop.made() or self._control.stop in (Stop.LEFT, Stop.ENDED):
            return self._values.get(name, self._values or float("nan"))
        before = self._values
        reply = self._worker.call_for(Call.VALIDATE, lambda: self._measured(measure, name))
        self._loop.obey()
        self._values = before | reply["values"]
        self._loop.end_call()
        return {k: self._values[k] for k in reply["told"]} if reply["several"] else self._values[name]

    def _check_frozen(self) -> None:
        """Raise RuntimeError if the server would measure a model whose frozen parameters the workers have changed."""
        if self._roles.measures and self.worker == 0 and not self._server:
            for name in self._worker.replica.flat.changed_frozen():
                raise RuntimeError(
                    f"connect(..., validate=...) measures on the server, but the script has changed {name}, which is frozen, "
                    f"on the workers; expected ps.validate(measure), which measures on worker 0"
                )

    def _measured(self, measure: Callable[..., Any] | None, name: str) -> dict[str, Any]:
        """Return what this worker contributes to a validation: the measured values on worker 0, only the name elsewhere."""
        if self.worker or measure is None:
            return {"name": name}
        if self._data is None and self._roles.validation_data is not None:
            self._data = self._roles.validation_data()
        with self._worker.unchanged():
            return {"name": name, "values": measured(self._roles.model, measure, self._data, name)}

    def stop(self) -> None:
        """End the run on all ranks after the next round."""
        self._worker.status.stop = 1

    def save(self) -> None:
        """Write a checkpoint now. Every worker calls this at the same place."""
        self._loop.check_between("save()")
        if self._loop.made():
            return
        self._worker.call_for(Call.SAVE)
        self._loop.obey()
        self._loop.end_call()

    def preempt(self) -> None:
        """Write a checkpoint at the next round and end with status 75, as on SIGUSR1."""
        self._worker.status.signal = True

    def meet(self, text: str = "") -> str:
        """Wait for all workers, and return the text that worker 0 has given."""
        self._loop.made()
        if self._loop.rehearsing:
            return text
        reply = self._worker.call_for(Call.MEET, lambda: {"told": text if self.worker == 0 else ""})
        self._loop.obey()
        self._loop.end_call()
        return str(reply.get("told", text))

    def print(self, *words: object, **how: Any) -> None:
        """Print, on worker 0 only; `how` is as for Python's `print`, and `flush` is True by default."""
        if self.worker == 0:
            print(*words, **{"flush": True} | how)

    def _end_epoch(self, count: int) -> None:
        """End an epoch together with all workers."""
        self._loop.drain()
        cut = self._loop.cut
        if not cut:
            self._place.next_epoch()
        self._check_frozen()
        self._worker.call_for(Call.EPOCH, {"cut": cut, "count": count})
        self._loop.obey()

    def _finish(self) -> None:
        """End the last epoch together with all workers."""
        self._worker.call_for(Call.FINISH)
        self._loop.obey()
        self._ended = self._control.round

    @property
    def active(self) -> bool:
        """Whether the optimizer's steps are rounds, which they are from `connect` to `close`."""
        return wrapped.is_wrapped(self.optimizers[0])

    @property
    def preempted(self) -> bool:
        """Whether the run ends because a rank was preempted."""
        return self._control.stop == Stop.PREEMPTED

    def end_before_another(self) -> None:
        """Close this run, because the script connects again.

        Raises:
            RuntimeError: the run is not at its end.
        """
        if self.active and self._ended != self._control.round:
            raise RuntimeError(
                "mpips.connect() while a run goes on; end that by ps.close() first, or give several models and optimizers to "
                "one connect([a, b], [opt_a, opt_b])"
            )
        self.close()

    def close(self) -> None:
        """Leave the run, for a script that goes on without it. A worker that is in a loop ends the run for all.

        Whatever is not saved yet is saved now, and DONE is written unless only some of the workers have left. The optimizers
        are plain ones afterwards, with the state that they have stepped with; in the asynchronous modes, where that is on the
        server, they cannot be used any more.
        """
        if failure.happened() or not self.active:
            return
        stays = isinstance(self._worker, Client) and not self._worker.inner
        given = [None if stays or self.preempted else self.state_of(which) for which in range(len(self.optimizers))]
        self.leave()
        for optimizer, state in zip(self.optimizers, given, strict=True):
            if stays:
                wrapped.bar(optimizer, self.config.mode)
            elif state is not None:
                whole = optimizer.state_dict()
                optimizer.load_state_dict(whole | {"state": whole["state"] | state})

    def leave(self) -> None:
        """Leave the run, as `close` does, without the optimizers' state. Called when Python exits."""
        if failure.happened():
            return
        self._worker.check_whole()
        if not self.active:
            return
        for optimizer in self.optimizers:
            wrapped.unwrap(optimizer)
        clipping.unwatch(self._worker.replica.flat)
        self._loop.leave()
        if self.preempted:
            self._worker.settle()
            return
        farewell = {"ended": self._ended == self._control.round, "moved": self._worker.changed_in_place()}
        self._worker.call_for(Call.LEAVE, farewell)
        folder.release(self.folder)
        self._worker.replica.flat.attach_weights(self._worker.replica.flat.zeros())
