"""`connect`: this process joins the other ranks and begins a run. A rank that only serves does so here, and does not return."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from mpips.comm import SERVER, Communicator, broadcast_bytes
from mpips.config import Config
from mpips.model.message import CallError, Stop, WorkersLostError
from mpips.model.trainable import Trainable
from mpips.optim.flat_optimizer import MakeOptimizer
from mpips.process import lifecycle as process
from mpips.run import blueprint, failure
from mpips.run import run_folder as folder
from mpips.run.roles import Roles
from mpips.run.run import Run
from mpips.run.start import (
    choose_trainable,
    configure,
    join,
    one_module,
    one_optimizer,
)
from mpips.server.parameter_server import ParameterServer
from mpips.server.round_server import Server

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
        run = _begin(Roles(communicator, config, model, given, validate, validation_data, _Process.count))
        if callable(at_end := getattr(communicator, "at_end", None)):  # a simulated rank's communicator has this
            at_end(run.leave)
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
        told = b"another" if config.server_trains else blueprint.describe(config, model, optimizer)
        _meet_again(communicator, told)
    try:
        roles = Roles(communicator, config, model, optimizer, validate, validation_data, _Process.count)
        while serves:
            roles = _serve(roles)
    except BaseException:
        if not serves:
            raise
        _end_process(communicator)
    run = _Process.run = _begin(roles)
    process.on_preemption(run.preempt)
    if run.worker == 0 and not again and torch.initial_seed() != run.seed:
        print(
            "mpips: torch is not seeded alike on all ranks, so what the script has drawn before connect (a split, targets) "
            "differs between workers; call torch.manual_seed first, or draw it from a seeded generator",
            file=sys.stderr,
            flush=True,
        )
    return run


def _serve(roles: Roles) -> Roles:
    """Serve a run. Return this rank's roles in the next run, or raise SystemExit if the workers do not begin another."""
    server = roles.server
    assert server
    process.on_preemption(partial(setattr, server, "signalled", True))
    server.serve()
    if server.control.stop == Stop.PREEMPTED:
        _preempted(server)
    folder.release(roles.folder)
    blob = _meet_again(roles.communicator, b"")
    if not blob:
        raise SystemExit(0)
    _Process.count += 1
    config, model, optimizer = blueprint.build(blob)
    folder.check_new(config)
    return Roles(roles.communicator, config, model, optimizer, None, None, _Process.count)


def _meet_again(communicator: Communicator, own: bytes) -> bytes:
    """After a run, let all ranks say whether the script begins another run or ends.

    `own` is this rank's description of the next run, empty at the end of the script. The server gets the first worker's
    description, or an empty one at the end of the script.

    Raises:
        CallError: some ranks begin another run, and some do not.
        WorkersLostError: they begin another run, and a worker has died in this one.
    """
    blobs = communicator.gather_bytes(own)
    lost, first = sorted(communicator.lost), 1 if blobs and communicator.size > 1 and not blobs[0] else 0
    continues = {bool(blob) for rank, blob in enumerate(blobs) if rank >= first and rank not in lost}
    verdict = b"apart" if len(continues) > 1 else b"lost" if lost and True in continues else b""
    told = broadcast_bytes(communicator, verdict)
    if told == b"apart":
        raise CallError("the workers do not make the same calls: some connect again, some are at the end of their script")
    if told:
        raise WorkersLostError("workers have died in the run before, and a further run begins with all; start the script again")
    return next((bytes(blob) for blob in blobs if blob), b"")


def _begin(roles: Roles) -> Run:
    """Return a worker's run. A rank that only serves, over the caller's communicator, serves and raises SystemExit."""
    if roles.worker is None:
        assert roles.server
        roles.server.serve()
        if roles.server.control.stop == Stop.PREEMPTED:
            _preempted(roles.server)
        raise SystemExit(0)
    return Run(roles, partial(_preempted, roles.server))


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
        process.tell_left(communicator.rank)
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
            run.leave()
        if not failure.happened():
            if run and not run.preempted:
                _meet_again(communicator, b"")
            communicator.barrier(patience=None)
            process.tell_left(communicator.rank)
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
