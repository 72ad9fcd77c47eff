"""A run, as the user's script sees it on a worker; on a rank that only serves, `connect` does not come back."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mpips.algorithms.modes import choose_mode
from mpips.comm import SERVER, Communicator, broadcast_bytes
from mpips.config import Config, ConfigError, no_folder
from mpips.data import Place
from mpips.data.loader import sharded
from mpips.model.message import Call, CallError, Control, Stop
from mpips.model.trainable import Trainable
from mpips.optim.flat_optimizer import FlatOptimizer, MakeOptimizer, evaluates, unhooked
from mpips.optim.joint import Joint
from mpips.process import lifecycle as process
from mpips.process import rng
from mpips.process.environment import environment
from mpips.report import run_report as report
from mpips.run import blueprint, clipping, failure
from mpips.run import run_folder as folder
from mpips.run import wrapped_optimizer as wrapped
from mpips.run.keeping import GROUPS, Keeping
from mpips.run.loop import Batches, Loop
from mpips.run.start import check_optimizer, check_rule, choose_trainable, configure, join, one_module, one_optimizer
from mpips.server.base import measured
from mpips.server.parameter_server import ParameterServer
from mpips.server.rank_state import RankState
from mpips.server.round_server import Server
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import Worker, place_of

Models = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
Optimizers = Optimizer | MakeOptimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


def connect(
    model: Models,
    optimizer: Optimizers,
    *,
    trainable: Trainable | None = None,
    validate: Callable[..., Any] | None = None,
    validation_data: Callable[[], Any] | None = None,
    communicator: Communicator | None = None,
    **settings: Any,
) -> Run:
    """Join the other ranks and begin a run; every rank calls this with the same model, optimizer and settings.

    A rank that only serves, rank 0 with others beside it, serves in here until every worker has left, and then ends the
    process with the run's status: no line of the script after `connect` is executed there but its `atexit` handlers. On a
    worker the optimizer is the same object afterwards, whose `step` is push, combine, step on the server, pull.

    Args:
        model: the model, on its device; or several, in a list or a dict. Their trainable parameters become views of one flat
            tensor.
        optimizer: any `torch.optim` optimizer of the model's parameters, or a function from a list of parameters to one. In
            modes with local steps it steps on the worker. Or several, in a list or a dict: each `step` is a round about its
            parameters alone, and all workers step them in the same order.
        trainable: which parameters to train, the others being frozen: a name pattern ("head.*"), several, or a predicate of
            name and parameter. Only these travel, and only they have optimizer state. Those with requires_grad if None.
        validate: measures the model on the server at the end of each epoch of `ps.epochs`, and where a worker calls
            `ps.validate()` without a function: called as its `measure` is.
        validation_data: makes the data for `validate`, once, where it is measured.
        communicator: one to use in place of MPI; for tests and simulations. A rank that only serves then
            raises SystemExit when it has served.
        settings: any field of `mpips.Config`; nested ones as dicts: `checkpoint={"every": 100}`. Flags, `MPIPS_*` variables
            and a YAML file come before these.

    Raises:
        SystemExit: with status 2 and one line on the screen, for a setting that is not allowed, or if the launcher started
            several separate jobs of one rank.
        ContractError: the ranks do not have the same model, settings or versions; names the first difference.
    """
    config, model = configure(**settings), one_module(model)
    if trainable is not None:
        choose_trainable(model, trainable)
    given = one_optimizer(optimizer, model, config)
    if communicator is not None:
        run = _begin(Start(communicator, config, model, given, validate, validation_data))
        if callable(at_end := getattr(communicator, "at_end", None)):  # of a simulated rank
            at_end(run.close)
        return run
    return _connect(config, model, given, validate, validation_data)


class _Process:
    """What this process has of mpips: one communicator for all its runs, and the run in progress.

    Attributes:
        communicator: this rank's end, once it has joined.
        run: the last run.
        count: runs begun.
        status: what the process is to end with; None if the script says.
    """

    communicator: Communicator | None = None
    run: Run | None = None
    count = 0
    status: int | None = None


def _connect(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    validate: Callable[..., Any] | None,
    validation_data: Callable[[], Any] | None,
) -> Run:
    """The run of a script; a rank that only serves ends the process in here."""
    communicator, again = _Process.communicator, _Process.count > 0
    if communicator is None:
        communicator = _Process.communicator = join(config)
        atexit.register(_leave, communicator, os.getpid())
    elif _Process.run:
        _Process.run.end_before_another()
    _Process.count += 1
    config = folder.of_run(config, _Process.count)
    if communicator.rank == SERVER:
        folder.check_new(config)
    serves = communicator.rank == SERVER and communicator.size > 1 and not config.server_trains
    if again and communicator.size > 1:
        _meet_again(communicator, blueprint.describe(config, model, optimizer))
    try:
        start = Start(communicator, config, model, optimizer, validate, validation_data)
        while serves:
            start = _serve(start)
    except BaseException:
        if not serves:
            raise
        _end_process(communicator)
    run = _Process.run = _begin(start)
    process.on_preemption(run.preempt)
    if run.worker == 0 and not again and torch.initial_seed() != run.seed:
        print(
            "mpips: torch is not seeded alike on all ranks, so what the script has drawn before connect (a split, targets) "
            "differs between workers; call torch.manual_seed first, or draw it from a seeded generator",
            file=sys.stderr,
            flush=True,
        )
    return run


def _serve(start: Start) -> Start:
    """Serve a run, and begin the next one if the workers do; else SystemExit."""
    server = start.server
    assert server
    process.on_preemption(partial(setattr, server, "signalled", True))
    server.serve()
    if server.control.stop == Stop.PREEMPTED:
        _preempted(server)
    blob = _meet_again(start.communicator, b"")
    if not blob:
        raise SystemExit(0)
    _Process.count += 1
    config, model, optimizer = blueprint.build(blob)
    folder.check_new(config)
    return Start(start.communicator, config, model, optimizer, None, None)


def _meet_again(communicator: Communicator, own: bytes) -> bytes:
    """Where a run has ended all ranks say whether the script begins another, or ends.

    Returns:
        What the first worker says of it; empty at the script's end.

    Raises:
        CallError: some begin another, some do not.
    """
    blobs = communicator.gather_bytes(own)
    said = [bool(blob) for blob in blobs[1 if communicator.size > 1 and not blobs[0] else 0 :]] if blobs else []
    word = b"apart" if len(set(said)) > 1 else b""
    if broadcast_bytes(communicator, word):
        raise CallError("the workers do not make the same calls: some connect again, some are at the end of their script")
    return next((blob for blob in blobs if blob), b"")


def _begin(start: Start) -> Run:
    """A worker's run; with a communicator of the caller's a rank that only serves does so, then raises SystemExit."""
    if start.worker is None:
        assert start.server
        start.server.serve()
        if start.server.control.stop == Stop.PREEMPTED:
            _preempted(start.server)
        raise SystemExit(0)
    return Run(start)


def _end_process(communicator: Communicator) -> NoReturn:
    """End this rank, which has served or failed: the script's `atexit` handlers run, and no other line of it."""
    kind, error, trace = sys.exc_info()
    atexit.unregister(_leave)
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if not isinstance(error, SystemExit):
        assert kind
        assert error
        sys.excepthook(kind, error, trace)
    elif status in (0, failure.PREEMPTED):
        communicator.barrier(patience=None)
        failure.tell_left(communicator.rank)
    atexit._run_exitfuncs()
    _exit(communicator, status)


def _exit(communicator: Communicator, status: int) -> NoReturn:
    """End the process now, with this status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # on a full disk
            stream.flush()
    communicator.finalize()
    process.end(status)


def _leave(communicator: Communicator, born: int) -> None:
    if os.getpid() != born:  # a child that the script has forked: the run is not its own
        return
    try:
        run = _Process.run
        if run:
            run.close()
        if not failure.happened():
            if run and not run.preempted:
                _meet_again(communicator, b"")
            communicator.barrier(patience=None)
            failure.tell_left(communicator.rank)
        if run and run.preempted and _Process.status is None:  # the script has ended by itself in the same moment
            _exit(communicator, failure.PREEMPTED)
    except Exception:  # at exit nobody else would end the other ranks
        sys.excepthook(*sys.exc_info())


def _preempted(server: Server | ParameterServer | None) -> NoReturn:
    if server:
        server.report.preempted(server.last_checkpoint)
    _Process.status = failure.PREEMPTED
    raise SystemExit(failure.PREEMPTED)


class Start:
    """How a run begins on one rank: its halves, with the server's weights in the model.

    Attributes:
        config, communicator, optimizer: as given.
        folder: the run's folder, the same on all ranks.
        id: the run's id.
        resumed: what the server says of the run that is gone on with: the values validated; empty if the run is new.
        kept: what the script kept.
        streams: the random streams to go on with.
        server, worker: this rank's halves.
    """

    def __init__(
        self,
        communicator: Communicator,
        config: Config,
        model: nn.Module,
        optimizer: Optimizer,
        validate: Callable[..., Any] | None,
        validation_data: Callable[[], Any] | None,
    ) -> None:
        self.communicator, self.config, self.optimizer, self.model = communicator, config, optimizer, model
        self.validation_data, self.measures = validation_data, validate is not None
        self._count = max(1, _Process.count)
        index, self.workers = place_of(communicator, config)
        check_rule(config, self.workers)
        check_optimizer(optimizer, self.workers)
        self._requests = choose_mode(config).requests
        self.server: Server | ParameterServer | None = None
        self.worker: Worker | None = None
        self.folder, resume, self.id = self._agree_on_folder()
        if communicator.rank != SERVER:
            with suppress(OSError):  # a folder that only the server's machine has
                report.log_to(self.folder, communicator.rank, self.id)
        if communicator.rank == SERVER:
            self._serve(validate, resume)
        if index >= 0:
            self._train()
        self.resumed: dict[str, Any] = (
            json.loads(broadcast_bytes(communicator, json.dumps(self._past()).encode())) if resume else {}
        )
        self.kept: dict[str, Any] = self._share_kept() if resume else {}
        self.streams = rng.capture() if resume else None

    def _past(self) -> dict[str, Any]:
        server = self.server
        return {"values": server.values} if server else {}

    def _share_kept(self) -> dict[str, Any]:
        blob = RankState(-1, Place(), {}, own=self.server.kept).pack() if self.server else b""
        return RankState.unpack(broadcast_bytes(self.communicator, blob)).own

    def _agree_on_folder(self) -> tuple[Path, Path | None, str]:
        """The run folder, the checkpoint to go on from and the run's id: the server looks and takes it, all take its word."""
        said = b""
        if self.communicator.rank == SERVER:
            where, start = folder.folders(self.config.run_dir, self.config.resume, self._count)
            run = report.run_id(where) if start and folder.holds_run(where) else report.new_id(self._count)
            try:
                report.log_to(where, SERVER, run)
                folder.hold(where)
            except OSError as error:
                raise no_folder(str(where), error) from error
            said = json.dumps([str(where), start and str(start), run]).encode()
        where, start, run = json.loads(broadcast_bytes(self.communicator, said))
        return Path(where), start and Path(start), run

    def _serve(self, validate: Callable[..., Any] | None, resume: Path | None) -> None:
        kind = ParameterServer if self._requests else Server
        server = self.server = kind(
            self.communicator,
            self.model,
            self.optimizer,
            config=self.config,
            folder=self.folder / "checkpoints",
            report=report.Report(self.folder, self.config.metrics, self.id),
            validation_data=self.validation_data,
            validate=validate,
            follows=True,
        )
        server.create_model()
        if resume is not None:
            server.resume(resume, self._count)
            server.kept[GROUPS]  # which is never missing
        server.report.start(
            self.config.yaml(),
            environment(),
            size=self.communicator.size,
            workers=self.workers,
            server_trains=server.trains,
            script=report.script_name(),
            mpi=self.communicator.name,
            torch=str(torch.__version__),
            device=str(server.replica.flat.weights.device),
            parameters=sum(slot.numel for slot in server.replica.flat.slots),
        )
        server.broadcast_initial_weights()

    def _train(self) -> None:
        kind = Client if self._requests and not self.server else Worker
        self.worker = kind(self.communicator, self.model, self.config, self.server, self.optimizer, tells=True)
        self.worker.receive_initial_weights()


class Seat:
    """The place of one optimizer in a run: what it calls where the script calls it.

    Args:
        run: the run.
        which: the optimizer's number among those given to `connect`.
    """

    def __init__(self, run: Run, which: int) -> None:
        self._run, self._which = run, which
        self._evaluates = {closure: evaluates(run.optimizers[which], closure) for closure in (False, True)}

    def optimizer_step(self, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """See `wrapped.Stepping`."""
        if self._evaluates[closure is not None]:
            return self._run.evaluate(self._which, closure)
        return self._run.step_once(self._which, closure, overflow)

    @property
    def skipped(self) -> bool:
        """See `wrapped.Stepping`."""
        return self._run.skipped

    def check_loadable(self) -> None:
        """See `wrapped.Stepping`."""
        self._run.check_loadable(self._which)

    def optimizer_loaded(self) -> None:
        """See `wrapped.Stepping`."""
        self._run.take_over_state(self._which)

    def optimizer_state(self) -> dict[int, Any] | None:
        """See `wrapped.Stepping`."""
        return self._run.state_of(self._which)


class Run:
    """One worker's part in a run. `connect` makes it.

    Attributes:
        config: the resolved settings.
        folder: the run's folder, the same on all ranks.
        worker, workers: this worker's number, from 0, and how many there are.
        optimizers: the script's.
    """

    def __init__(self, start: Start) -> None:
        assert start.worker
        self.config, self.folder, self._start = start.config, start.folder, start
        self.optimizers = start.optimizer.parts if isinstance(start.optimizer, Joint) else [start.optimizer]
        self._communicator, self._server, self._worker = start.communicator, start.server, start.worker
        self.worker, self.workers = self._worker.index, start.workers
        self._several = len(self.optimizers) > 1
        self._keeping = Keeping(start.kept, self.optimizers, self.print)
        self._worker.kept = self._keeping.state_dict
        self._values: dict[str, float] = start.resumed.get("values", {})
        self._worker.replica.flat.sparse = any(isinstance(o, torch.optim.SparseAdam) for o in self.optimizers)
        for which, optimizer in enumerate(self.optimizers):
            wrapped.wrap(optimizer, Seat(self, which))
        clipping.watch(self._worker.replica.flat, self.average)
        self._loop = Loop(self._worker, self._worker.common, start.streams, partial(_preempted, self._server))
        self._validations = 0  # in this epoch, those included that a resumed run has behind it
        self._ended = -1.0  # the round at the end of `epochs`
        self._data: Any = None  # to validate with
        self._said: tuple[float, float | None, Mapping[str, float]] | None = None  # of the step in progress

    @property
    def _place(self) -> Place:
        return self._worker.place

    @property
    def _control(self) -> Control:
        return self._worker.control

    @property
    def seed(self) -> int:
        """What torch's random stream was seeded with on the server at `connect`."""
        return self._worker.common.seed

    @property
    def round(self) -> int:
        """Rounds done."""
        return int(self._control.round)

    @property
    def loss(self) -> float:
        """The last round's mean loss over all workers' samples."""
        return self._control.loss

    @property
    def stopping(self) -> str:
        """Why the run ends: patience, target, requested, left, preempted; empty while it goes on."""
        stop = Stop(int(self._control.stop))
        return stop.name.lower() if stop else ""

    def epochs(self, count: int) -> Iterator[int]:
        """Epoch numbers from where the run is to `count`, fewer if it stops; with checkpoints at their ends."""
        place, self._worker.epochs = self._place, count
        if self._keeping.behind:
            self._keeping.catch_up()
        while place.epoch < count and not self.stopping:
            self._loop.next_epoch()
            self._validations = 0
            yield place.epoch
            self._end_epoch(count)
        self._finish()

    def shard(self, loader: Any) -> Any:
        """This worker's share of a DataLoader: the same loader, of which a loop gets this worker's batches only.

        Args:
            loader: a DataLoader. It keeps its class, workers, collation, sampler and every other property.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"ps.shard() given a {type(loader).__name__}; expected a DataLoader; for a dataset, tensors or an iterable of "
                f"batches loop over ps.batches(...)"
            )
        self._loop.promised()
        return sharded(loader, lambda own: self._loop.batches(own, (None, True, False), own=False), self.worker, self.workers)

    def keep(self, **objects: Any) -> None:
        """Keep objects of the script's in the checkpoint: averages, teachers, trackers, schedulers that are not torch's.

        A resumed run gives each its state back here; of one that the checkpoint does not have a line is printed.

        Args:
            objects: name=object; each has `state_dict` and `load_state_dict`.

        Raises:
            TypeError: one has not, or its state holds what a checkpoint cannot.
        """
        self._keeping.keep(objects)

    def batches(
        self, data: Any, batch_size: int | None = None, *, shuffle: bool = True, drop_last: bool = False, shard: bool = True
    ) -> Iterable[Any]:
        """This worker's share of the data, batch by batch; it can be looped over again, if the data can.

        Args:
            data: a map-style dataset, tensors or arrays (one, or a tuple or dict of them), a list of samples, a DataLoader
                (which then decides batch size and order), an iterable of batches, or `Clients`.
            batch_size: items in a worker's batch; None for data that is in batches already.
            shuffle: draw a new order in each epoch, from torch's random stream, as a DataLoader does.
            drop_last: leave out a worker's last batch if it is not full.
            shard: False for data that is this rank's own already.

        In federated modes a loop is one communication round: some of the clients train, this worker's share of them one after
        another, `clients.epochs` each. A dataset or a tuple of tensors is dealt out to one client on each worker; with
        `batch_size=None` a client's data is one batch. Modes that know no clients take all clients' data together.
        """
        return Batches(lambda: self._loop.batches(data, (batch_size, shuffle, drop_last), own=not shard))

    def backward(self, loss: Tensor, samples: int | None = None) -> None:
        """`loss.backward()`, the last one before `step`; with the `overlap` setting gradients may leave while it goes on.

        Then do not change gradients before `step`, and give that the same samples. Without the setting, and where nothing can
        leave (on one node, in other modes than sync), there is no difference to `loss.backward()`. To accumulate gradients
        over several batches call this for the last of them only.

        Args:
            loss: what to differentiate.
            samples: how many samples the gradient is the mean of; those of the batches since the last step if None.

        Raises:
            RuntimeError: a parameter got its gradient in two parts, as with reentrant checkpoints.
        """
        self._loop.backward(loss, samples)

    def step(self, loss: Tensor | float, samples: float | None = None, **metrics: float) -> None:
        """The round of `optimizer.step()`, with more said of it; gradients are then None, so that no `zero_grad` is needed.

        Args:
            loss: the mean loss over the samples, unscaled.
            samples: how many samples the gradient is the mean of; those of the batches since the last step if None.
            metrics: the mean over the samples of each metric named in the `metrics` setting.

        Raises:
            NonFiniteError: on all ranks, if some rank's gradient holds a NaN or Inf and `nonfinite` is "raise".
        """
        if self._several:
            raise RuntimeError("ps.step() in a run of several optimizers: call the step of the one that is meant")
        self._said = float(loss.detach() if isinstance(loss, Tensor) else loss), samples, metrics
        try:
            self.optimizers[0].step()
        finally:
            self._said = None
        self._worker.replica.flat.clear()

    def turn_to(self, which: int) -> None:
        """What follows is about this optimizer."""
        if self._keeping.behind:
            self._keeping.catch_up()
        self._worker.which = which
        if self._several:
            number = {p: n for n, p in enumerate(self._worker.replica.flat.parameters)}
            groups = self.optimizers[which].param_groups
            self._worker.update.members = frozenset(number[p] for group in groups for p in group["params"] if p in number)

    def step_once(self, which: int, closure: Callable[[], Any] | None, overflow: bool | None) -> Any:
        """What `optimizer.step()` does, of an optimizer that evaluates the loss at most once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if overflow is not None and not self._worker.mode.gradients:
            raise ConfigError(f"GradScaler: given one with mode {self.config.mode}, allowed: mode sync; bfloat16 needs none")
        self.turn_to(which)
        self._worker.overflow = bool(overflow)
        self._loop.step(*(self._said or (loss, None, {})))
        self._worker.overflow = False
        return loss

    def evaluate(self, which: int, closure: Callable[[], Any] | None) -> Any:
        """A step that may evaluate the loss several times: every worker takes it, alike, on weights of its own."""
        optimizer = self.optimizers[which]
        name = type(optimizer).__name__
        if not self._worker.mode.gradients:
            raise ConfigError(
                f"optimizer: given {name}, which steps on the workers, with mode {self.config.mode}, allowed: mode sync"
            )
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("optimizer: given LBFGS, whose step needs a closure, allowed: optimizer.step(closure)")
        self.turn_to(which)
        self._keeping.own_state.add(which)
        flat, pulled = self._worker.replica.flat, self._worker.replica.flat.weights
        losses: list[float] = []

        def together() -> Any:
            assert closure
            with torch.enable_grad():
                loss = closure()
            losses.append(self._loop.average(loss))
            return loss if self.workers == 1 else loss.detach().new_tensor(losses[-1])

        if closure is None:
            self._loop.average(None)
        flat.rehang_weights(pulled.clone())
        try:
            result = unhooked(optimizer)(optimizer, *([together] if closure else []))
            weights = flat.gathered()
        finally:
            flat.rehang_weights(pulled)
        said = self._said[0] if self._said else float("nan")
        self._loop.adopt(weights, losses[0] if losses else said)
        return result

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step, because a GradScaler had found an Inf or NaN."""
        return bool(self._control.skipped)

    def average(self) -> None:
        """Let `p.grad` be the gradient of all workers together, for whoever does the rest by hand; the next step takes it.

        Every worker calls this between backward and `optimizer.step()`. Torch's clipping functions do it themselves.
        """
        self._loop.average(None)

    def state_of(self, which: int) -> dict[int, Any] | None:
        """The state of an optimizer as its `state_dict` has it; None where it is its own already."""
        worker = self._worker
        if which in self._keeping.own_state:
            return None
        if worker.inner:
            return None if worker.replica.wire_is_grad else self._numbered(which, worker.inner.state_dict())
        if self._server and self._server.transport.steps_whole and worker.replica.wire_is_grad:
            return None
        if isinstance(worker, Client):
            raise RuntimeError(
                f"optimizer.state_dict() in mode {self.config.mode}, where the server answers one worker at a time; the state "
                f"is in the checkpoints (ps.save())"
            )
        tree = worker.optimizer_state()
        self._loop.obey()
        return self._numbered(which, tree)

    def _steps_with(self, which: int) -> FlatOptimizer | None:
        """What steps on this rank in the place of the script's optimizer; None if nothing does."""
        if which in self._keeping.own_state:
            return None
        worker, server = self._worker, self._server
        return worker.inner or (server.optimizer if server and self._communicator.size == 1 else None)

    def check_loadable(self, which: int) -> None:
        """Raise RuntimeError if the state of an optimizer lies with a server elsewhere."""
        if which not in self._keeping.own_state and self._steps_with(which) is None:
            raise RuntimeError(
                "optimizer.load_state_dict() after connect: the state lies with the server, expected to be loaded before "
                "connect; a run goes on from its checkpoint by --mpips.resume auto"
            )

    def take_over_state(self, which: int) -> None:
        """The script has loaded a state into an optimizer."""
        if stepping := self._steps_with(which):
            stepping.take_state(self.optimizers[which], which)

    def _numbered(self, which: int, tree: dict[str, Any]) -> dict[int, Any]:
        flat = self._worker.replica.flat
        names: dict[Tensor, str] = {p: slot.name for p, slot in zip(flat.parameters, flat.slots, strict=True)}
        return wrapped.by_number(tree["optimizer"]["state"], self.optimizers[which], names)

    def validate(self, measure: Callable[..., Any] | None = None, name: str = "validation") -> Any:
        """Measure the model on worker 0, with the server's weights, and decide on the server whether to stop.

        Every worker calls this.

        Args:
            measure: called on worker 0 alone, in eval mode and without grad, with the validation data if `connect` was given
                any. Returns a number, or a dict of several by name. None: the server measures, as `connect` said.
            name: what the number is. Numbers of different names are judged apart; `early_stopping.monitor` says which
                stops the run.

        Returns:
            The number, or the dict, the same on every worker; that of before if a resumed run has this validation behind it,
            or workers have left in the middle of a loop.

        Raises:
            TypeError: it returned anything else.
            CallError: the other workers do not make this call.
        """
        self._loop.check_between("validate()")
        self._validations += 1
        if measure is None:
            self._check_frozen()
        if self._validations > self._place.validations and self._control.stop not in (Stop.LEFT, Stop.ENDED):
            before = self._values
            reply = self._worker.call_for(Call.VALIDATE, lambda: self._measured(measure, name))
            self._loop.obey()
            self._place.validations = self._validations
            self._values = before | reply["values"]
            return {k: self._values[k] for k in reply["told"]} if reply["several"] else self._values[name]
        return self._values.get(name, self._values or float("nan"))

    def _check_frozen(self) -> None:
        """Raise RuntimeError if the server is to measure the model, and the script has moved a part of it that it has not."""
        if self._start.measures and self.worker == 0 and not self._server:
            for name in self._worker.replica.flat.changed_frozen():
                raise RuntimeError(
                    f"connect(..., validate=...) measures on the server, but the script has changed {name}, which is frozen, "
                    f"on the workers; expected ps.validate(measure), which measures on worker 0"
                )

    def _measured(self, measure: Callable[..., Any] | None, name: str) -> dict[str, Any]:
        if self.worker or measure is None:
            return {"name": name}
        if self._data is None and self._start.validation_data is not None:
            self._data = self._start.validation_data()
        with self._worker.unchanged():
            return {"name": name, "values": measured(self._start.model, measure, self._data, name)}

    def stop(self) -> None:
        """End the run on all ranks, in the same round: the next one."""
        self._worker.stop = 1

    def save(self) -> None:
        """Write a checkpoint now; every worker calls this at the same place."""
        self._loop.check_between("save()")
        self._worker.call_for(Call.SAVE)
        self._loop.obey()

    def preempt(self) -> None:
        """Write a checkpoint at the next round and end with status 75; SIGUSR1 does this."""
        self._worker.signalled = True

    def meet(self, text: str = "") -> str:
        """Wait for all workers, and get what worker 0 has to say."""
        reply = self._worker.call_for(Call.MEET, {"told": text if self.worker == 0 else ""})
        self._loop.obey()
        return str(reply.get("told", text))

    def print(self, *words: object) -> None:
        """Print on worker 0 alone."""
        if self.worker == 0:
            print(*words, flush=True)

    def _end_epoch(self, count: int) -> None:
        self._loop.drain()
        cut = self._loop.cut
        if not cut:
            self._place.next_epoch()
        self._check_frozen()
        self._worker.call_for(Call.EPOCH, {"cut": cut, "count": count})
        self._loop.obey()

    def _finish(self) -> None:
        self._worker.call_for(Call.FINISH)
        self._loop.obey()
        self._ended = self._control.round

    @property
    def active(self) -> bool:
        """Whether the optimizer's steps are rounds: from `connect` to `close`."""
        return isinstance(self.optimizers[0], wrapped.Wrapped)

    @property
    def preempted(self) -> bool:
        """Whether the run ends because a rank was told to."""
        return self._control.stop == Stop.PREEMPTED

    def end_before_another(self) -> None:
        """The script connects again: this run ends here, if it is at its end.

        Raises:
            RuntimeError: it is not.
        """
        if self.active and self._ended != self._control.round:
            raise RuntimeError(
                "mpips.connect() while a run goes on; end that by ps.close() first, or give several models and optimizers to "
                "one connect([a, b], [opt_a, opt_b])"
            )
        self.close()

    def close(self) -> None:
        """Leave; called when Python ends. A worker that left a loop early ends the run for all.

        What is not saved yet is saved here, and DONE written unless only some of the workers left: so ends a script that has
        its own loop over epochs, or returns from the middle of one.
        """
        if failure.happened() or not self.active:
            return
        for optimizer in self.optimizers:
            wrapped.unwrap(optimizer)
        clipping.unwatch(self._worker.replica.flat)
        self._loop.leave()
        if self.preempted:
            self._worker.settle()
            return
        said = {"ended": self._ended == self._control.round, "moved": self._worker.changed_in_place()}
        self._worker.call_for(Call.LEAVE, said)
        self._worker.replica.flat.attach_weights(self._worker.replica.flat.zeros())
