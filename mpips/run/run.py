"""A run as the script sees it on a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mpips.data import Place
from mpips.data.loader import sharded
from mpips.model.message import Call, Control, Stop
from mpips.optim.joint import Joint
from mpips.run import clipping, failure
from mpips.run import run_folder as folder
from mpips.run import wrapped_optimizer as wrapped
from mpips.run.keeping import Keeping
from mpips.run.loop import Batches, Loop
from mpips.run.replay import Replay
from mpips.run.roles import Roles
from mpips.run.steps import UNSAID, Steps
from mpips.server.base import measured
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import KEEPING


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
        self._worker = roles.worker
        self._keeping = Keeping(roles.kept, self.optimizers, self.print)
        self._worker.kept = self._keeping.state_dict
        self._values: dict[str, float] = roles.resumed.get("values", {})
        self._worker.replica.flat.sparse = any(isinstance(o, torch.optim.SparseAdam) for o in self.optimizers)
        clipping.watch(self._worker.replica.flat, self.average)
        self._replay = Replay(self._worker, self._keeping, roles.streams)
        self._loop = Loop(self._worker, self._worker.common, self._replay, preempted, self.print)
        self._steps = Steps(roles, self.optimizers, self._keeping, self._loop, self.print)
        for which, optimizer in enumerate(self.optimizers):
            wrapped.wrap(optimizer, self._steps, which)
        self._ended = -1.0  # the round at which `epochs` ended
        self._data: Any = None  # the validation data

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
        if len(self.optimizers) > 1:
            raise RuntimeError("ps.step() in a run of several optimizers: call the step of the one that is meant")
        self._steps.said, self._worker.clears = (loss, samples, metrics), True
        try:
            self.optimizers[0].step()
        finally:
            self._steps.said, self._worker.clears = UNSAID, False
        self._worker.replica.flat.clear()

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step because a GradScaler had found an Inf or NaN."""
        return self._steps.skipped

    def average(self, samples: float | None = None) -> None:
        """Set every `p.grad` to the average over all workers, for code that needs it before the step, which then uses it.

        Every worker calls this between backward and `optimizer.step()`. Torch's clipping functions call it themselves.

        Args:
            samples: as in `step`; give both the same.
        """
        self._loop.average(None, samples)

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
        if self._roles.measures and self.worker == 0 and not self._roles.server:
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
        given = [None if stays or self.preempted else self._steps.state_of(which) for which in range(len(self.optimizers))]
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
