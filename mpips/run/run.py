"""`connect`, and a run as the script sees it on a worker. On a rank that only serves, `connect` does not return."""

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

from mpips import checkpoint
from mpips.algorithms.modes import choose_mode
from mpips.comm import SERVER, Communicator, broadcast_bytes
from mpips.comm.flight_recorder import FlightRecorder
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
from mpips.run.replay import Replay
from mpips.run.start import (
    check_faults,
    check_optimizer,
    check_rule,
    choose_trainable,
    configure,
    join,
    one_module,
    one_optimizer,
    refused,
)
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
    """Join the other ranks and begin a run. Every rank calls this with the same model, optimizer and settings.

    With several ranks, rank 0 only serves unless `server_trains` is set: it serves in this call until every worker has left,
    then ends the process with the run's status. No line of the script after `connect` runs there, except `atexit` handlers. On
    a worker the optimizer is the same object afterwards, but its `step` is a round: push, reduce, step on the server, pull.

    Args:
        model: the model, on its device; or several models, in a list or a dict. Their trainable parameters become views of one
            flat tensor.
        optimizer: any `torch.optim` optimizer of the model's parameters, or a function from a list of parameters to an
            optimizer. In modes with local steps it steps on the worker. Or several optimizers, in a list or a dict: each `step`
            is then a round about its parameters only, and all workers must step them in the same order.
        trainable: which parameters to train; all others are frozen. A name pattern ("head.*"), several patterns, or a predicate
            of name and parameter. Only trained parameters travel and have optimizer state. If None, the parameters with
            requires_grad are trained.
        validate: measures the model on the server, at the end of each epoch of `ps.epochs` and when workers call
            `ps.validate()` without a function. Called like `measure` of `Run.validate`.
        validation_data: makes the data for `validate`. Called once, where the model is measured.
        communicator: a communicator to use instead of MPI, for tests and simulations. A rank that only serves then raises
            SystemExit when it has served.
        settings: any field of `mpips.Config`; a nested group as a dict: `checkpoint={"every": 100}`. Flags, `MPIPS_*` variables
            and a YAML file take precedence over these.

    Returns:
        This worker's part in the run.

    Raises:
        SystemExit: with status 2 and one line on the screen, for a setting that is not allowed, or if the launcher has started
            several separate jobs of one rank.
        ContractError: the ranks do not have the same model, settings or versions. The message names the first difference.
    """
    config, model = configure(**settings), one_module(model)
    if trainable is not None:
        choose_trainable(model, trainable)
    given = one_optimizer(optimizer, model, config)
    if communicator is not None:
        run = _begin(Start(communicator, config, model, given, validate, validation_data))
        if callable(at_end := getattr(communicator, "at_end", None)):  # a simulated rank's communicator has this
            at_end(run.close)
        return run
    return _connect(config, model, given, validate, validation_data)


class _Process:
    """The state of mpips in this process: one communicator for all runs, and the present run.

    Attributes:
        communicator: this rank's communicator, once it has joined the other ranks.
        run: the latest run.
        count: the number of runs begun.
        status: the status that the process is to end with; None to leave it to the script.
        left: whether this rank has met the other ranks for the last time.
    """

    communicator: Communicator | None = None
    run: Run | None = None
    count = 0
    status: int | None = None
    left = False


def _connect(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    validate: Callable[..., Any] | None,
    validation_data: Callable[[], Any] | None,
) -> Run:
    """Begin a run of the script over MPI. A rank that only serves ends the process here."""
    communicator, again = _Process.communicator, _Process.count > 0
    if communicator is None:
        communicator = _Process.communicator = join(config)
        atexit.register(_leave, communicator, os.getpid())
        if callable(at_finalize := getattr(communicator, "at_finalize", None)):  # over MPI
            at_finalize(partial(_leave, communicator, os.getpid()))
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
    """Serve a run. Return the start of the next run, or raise SystemExit if the workers do not begin another."""
    server = start.server
    assert server
    process.on_preemption(partial(setattr, server, "signalled", True))
    server.serve()
    if server.control.stop == Stop.PREEMPTED:
        _preempted(server)
    folder.release(start.folder)
    blob = _meet_again(start.communicator, b"")
    if not blob:
        raise SystemExit(0)
    _Process.count += 1
    config, model, optimizer = blueprint.build(blob)
    folder.check_new(config)
    return Start(start.communicator, config, model, optimizer, None, None)


def _meet_again(communicator: Communicator, own: bytes) -> bytes:
    """After a run, let all ranks say whether the script begins another run or ends.

    `own` is this rank's description of the next run, empty at the end of the script. The server gets the first worker's
    description, or an empty one at the end of the script.

    Raises:
        CallError: some ranks begin another run, and some do not.
    """
    blobs = communicator.gather_bytes(own)
    continues = [bool(blob) for blob in blobs[1 if communicator.size > 1 and not blobs[0] else 0 :]] if blobs else []
    verdict = b"apart" if len(set(continues)) > 1 else b""
    if broadcast_bytes(communicator, verdict):
        raise CallError("the workers do not make the same calls: some connect again, some are at the end of their script")
    return next((blob for blob in blobs if blob), b"")


def _begin(start: Start) -> Run:
    """Return a worker's run. A rank that only serves, over the caller's communicator, serves and raises SystemExit."""
    if start.worker is None:
        assert start.server
        start.server.serve()
        if start.server.control.stop == Stop.PREEMPTED:
            _preempted(start.server)
        raise SystemExit(0)
    return Run(start)


def _end_process(communicator: Communicator) -> NoReturn:
    """End this rank, which has served or failed, with the exception's status. Only the script's `atexit` handlers run."""
    kind, error, trace = sys.exc_info()
    _Process.left = True
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
    """Close the run at exit, meet the other ranks for the last time, and keep the exit status of a preempted run.

    `born` is the process id at `connect`: a forked child has another one, and does nothing.
    """
    if os.getpid() != born or _Process.left:  # a forked child of the script: the run is its parent's
        return
    _Process.left = True
    try:
        run = _Process.run
        if run:
            run.close()
        if not failure.happened():
            if run and not run.preempted:
                _meet_again(communicator, b"")
            communicator.barrier(patience=None)
            failure.tell_left(communicator.rank)
        if run and run.preempted and _Process.status is None:  # the script came to its own end at the same time
            _exit(communicator, failure.PREEMPTED)
    except Exception:  # at exit nobody else would end the other ranks
        sys.excepthook(*sys.exc_info())


def _preempted(server: Server | ParameterServer | None) -> NoReturn:
    """Report the preemption, and raise SystemExit with its status."""
    if server:
        server.end_save()
        server.report.preempted(server.last_checkpoint)
    _Process.status = failure.PREEMPTED
    raise SystemExit(failure.PREEMPTED)


class Start:
    """The start of a run on one rank: makes this rank's server and worker, with the server's weights in the model.

    Attributes:
        config, communicator, optimizer: as given.
        folder: the run's folder, the same on all ranks.
        id: the run's id.
        resumed: what the server remembers of a resumed run, the validated values; empty for a new run.
        kept: the state of the objects that the script keeps in the checkpoint.
        streams: the random streams to continue with; None for a new run.
        server, worker: this rank's server and worker; None where it has none.
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
        check_faults(config, communicator.size)
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
        self._watch()
        if config.chaos:
            from mpips.run import chaos

            chaos.install(config.chaos, self.folder, communicator.rank, self.server, self.worker)

    def _watch(self) -> None:
        """Let this rank record what it does when another is waited for, and let the run end after the deadline.

        Raises:
            SystemExit: with status 2 and one line on the screen, if there is a deadline, and nobody notices who is waited for.
        """
        keep = getattr(self.communicator, "keep_stalls", None)  # over MPI
        recorder, deadline = FlightRecorder(self.folder, self.communicator.rank, self._facts), self.config.deadline
        if keep and not keep(recorder, deadline) and deadline:
            allowed = "0, as MPI was started without MPI_THREAD_MULTIPLE and nobody notices who is waited for"
            raise refused(ConfigError(f"deadline: given {deadline:g}, allowed: {allowed}"))

    def _facts(self) -> dict[str, Any]:
        """Return where this rank is, for a record of a stall."""
        whose = self.worker or self.server
        assert whose
        role = f"worker {self.worker.index}" if self.worker else "server"
        return {"run": self.id, "role": role, "round": int(whose.control.round), "epoch": whose.place.epoch}

    def _past(self) -> dict[str, Any]:
        """Return what the server remembers of the resumed run."""
        server = self.server
        return {"values": server.values} if server else {}

    def _share_kept(self) -> dict[str, Any]:
        """Broadcast the kept state from the server, and return it."""
        blob = RankState(-1, Place(), {}, own=self.server.kept).pack() if self.server else b""
        return RankState.unpack(broadcast_bytes(self.communicator, blob)).own

    def _agree_on_folder(self) -> tuple[Path, Path | None, str]:
        """Return the run folder, the checkpoint to resume from, and the run's id: the server chooses and broadcasts them."""
        agreed = b""
        if self.communicator.rank == SERVER:
            checkpoint.stop_writing()
            where, start = folder.folders(self.config.run_dir, self.config.resume, self._count)
            run = report.run_id(where) if start and folder.holds_run(where) else report.new_id(self._count)
            try:
                report.log_to(where, SERVER, run)
                folder.hold(where)
            except OSError as error:
                raise no_folder(str(where), error) from error
            agreed = json.dumps([str(where), start and str(start), run]).encode()
        where, start, run = json.loads(broadcast_bytes(self.communicator, agreed))
        return Path(where), start and Path(start), run

    def _serve(self, validate: Callable[..., Any] | None, resume: Path | None) -> None:
        """Make the server, resume from the checkpoint if there is one, and broadcast the initial weights."""
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
            server.kept[GROUPS]  # raises if the checkpoint lacks them; every one has them
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
        """Make the worker, and receive the initial weights."""
        kind = Client if self._requests and not self.server else Worker
        self.worker = kind(self.communicator, self.model, self.config, self.server, self.optimizer, tells=True)
        self.worker.receive_initial_weights()


class Seat:
    """One optimizer's interface to the run, see `wrapped.Stepping`.

    Args:
        run: the run.
        which: the index of the optimizer among those given to `connect`.
    """

    def __init__(self, run: Run, which: int) -> None:
        self._run, self._which = run, which
        self._evaluates = {closure: evaluates(run.optimizers[which], closure) for closure in (False, True)}

    def optimizer_step(self, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Take a step: on the workers for an optimizer that evaluates the loss itself, else by a round."""
        if self._evaluates[closure is not None]:
            return self._run.evaluate(self._which, closure)
        return self._run.step_once(self._which, closure, overflow)

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


class Run:
    """One worker's part in a run, as returned by `connect`.

    Attributes:
        config: the resolved settings.
        folder: the run's folder, the same on all ranks.
        worker, workers: this worker's number, from 0, and the number of workers.
        optimizers: the script's optimizers.
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
        preempted = partial(_preempted, self._server)
        self._replay = Replay(self._worker, self._keeping, start.streams)
        self._loop = Loop(self._worker, self._worker.common, self._replay, preempted, self.print)
        self._ended = -1.0  # the round at which `epochs` ended
        self._data: Any = None  # the validation data
        self._said: tuple[float, float | None, Mapping[str, float]] | None = (
            None  # loss, samples and metrics of the `step` in progress
        )

    @property
    def _place(self) -> Place:
        """The worker's place in its data."""
        return self._worker.place

    @property
    def _control(self) -> Control:
        """The server's latest control."""
        return self._worker.control

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
        place, self._worker.epochs = self._place, count
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
            TypeError: `loader` is no DataLoader.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"ps.shard() given a {type(loader).__name__}; expected a DataLoader; for a dataset, tensors or an iterable of "
                f"batches loop over ps.batches(...)"
            )
        self._loop.promised()
        return sharded(loader, lambda own: self._loop.batches(own, (None, True, False), own=False), self.worker, self.workers)

    def keep(self, **objects: Any) -> None:
        """Keep objects of the script in the checkpoint: averages, teachers, trackers, schedulers other than torch's.

        In a resumed run each object gets its state back in this call. If the checkpoint has no state for it, a line is printed.

        Args:
            objects: name=object; each has `state_dict` and `load_state_dict`.

        Raises:
            TypeError: an object lacks these methods, or its state holds something that a checkpoint cannot hold.
        """
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
            self._said = None
        self._worker.replica.flat.clear()

    def turn_to(self, which: int) -> None:
        """Let the following round be about the optimizer `which`."""
        if self._keeping.behind:
            self._keeping.catch_up()
        self._worker.which = which
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
        self.turn_to(which)
        self._worker.overflow = bool(overflow)
        self._loop.step(*(self._said or (loss, None, {})))
        self._worker.overflow = False
        return loss

    def evaluate(self, which: int, closure: Callable[[], Any] | None) -> Any:
        """Take a step of an optimizer that may evaluate the loss several times.

        Every worker takes the same step on weights of its own, with averaged losses and gradients. Then the server takes the
        new weights.
        """
        optimizer, loop = self.optimizers[which], self._loop
        name = type(optimizer).__name__
        if not self._worker.mode.gradients:
            raise ConfigError(
                f"optimizer: given {name}, which steps on the workers, with mode {self.config.mode}, allowed: mode sync"
            )
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("optimizer: given LBFGS, whose step needs a closure, allowed: optimizer.step(closure)")
        self.turn_to(which)
        self._keeping.own_state.add(which)
        loop.drain()
        if loop.made():
            return closure() if closure else None
        worker, flat, pulled = self._worker, self._worker.replica.flat, self._worker.replica.flat.weights
        losses: list[float] = []

        def averaged_closure() -> Any:
            assert closure
            with torch.enable_grad():
                loss = closure()
            losses.append(loop.average(loss))
            return loss if self.workers == 1 else loss.detach().new_tensor(losses[-1])

        more, worker.more = worker.more, True  # a run that is preempted takes the whole step
        if closure is None:
            loop.average(None)
        flat.rehang_weights(pulled.clone())
        try:
            result = unhooked(optimizer)(optimizer, *([averaged_closure] if closure else []))
            weights = flat.gathered()
        finally:
            flat.rehang_weights(pulled)
            worker.more = more
        loss_given = self._said[0] if self._said else float("nan")
        loop.adopt(weights, losses[0] if losses else loss_given)
        return result

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step because a GradScaler had found an Inf or NaN."""
        return bool(self._control.skipped)

    def average(self) -> None:
        """Set every `p.grad` to the average over all workers, for code that needs it before the step, which then uses it.

        Every worker calls this between backward and `optimizer.step()`. Torch's clipping functions call it themselves.
        """
        self._loop.average(None)

    def state_of(self, which: int) -> dict[int, Any] | None:
        """Return the state of the optimizer `which` as its `state_dict` has it; None if the optimizer has it already."""
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
        if self._start.measures and self.worker == 0 and not self._server:
            for name in self._worker.replica.flat.changed_frozen():
                raise RuntimeError(
                    f"connect(..., validate=...) measures on the server, but the script has changed {name}, which is frozen, "
                    f"on the workers; expected ps.validate(measure), which measures on worker 0"
                )

    def _measured(self, measure: Callable[..., Any] | None, name: str) -> dict[str, Any]:
        """Return what this worker contributes to a validation: the measured values on worker 0, only the name elsewhere."""
        if self.worker or measure is None:
            return {"name": name}
        if self._data is None and self._start.validation_data is not None:
            self._data = self._start.validation_data()
        with self._worker.unchanged():
            return {"name": name, "values": measured(self._start.model, measure, self._data, name)}

    def stop(self) -> None:
        """End the run on all ranks after the next round."""
        self._worker.stop = 1

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
        self._worker.signalled = True

    def meet(self, text: str = "") -> str:
        """Wait for all workers, and return the text that worker 0 has given."""
        self._loop.made()
        if self._loop.rehearsing:
            return text
        reply = self._worker.call_for(Call.MEET, {"told": text if self.worker == 0 else ""})
        self._loop.obey()
        self._loop.end_call()
        return str(reply.get("told", text))

    def print(self, *words: object) -> None:
        """Print, on worker 0 only."""
        if self.worker == 0:
            print(*words, flush=True)

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
        return isinstance(self.optimizers[0], wrapped.Wrapped)

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
        """Leave the run. Called when Python exits. A worker that has left its loop early ends the run for all.

        Whatever is not saved yet is saved now, and DONE is written unless only some of the workers have left. So a script may
        have its own loop over epochs, or return from the middle of one.
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
        farewell = {"ended": self._ended == self._control.round, "moved": self._worker.changed_in_place()}
        self._worker.call_for(Call.LEAVE, farewell)
        folder.release(self.folder)
        self._worker.replica.flat.attach_weights(self._worker.replica.flat.zeros())
