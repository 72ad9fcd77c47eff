"""The roles of one rank in a run: its server and its worker, as they begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpips import checkpoint
from mpips.algorithms.modes import choose_mode
from mpips.comm import SERVER, Communicator, broadcast_bytes
from mpips.comm.flight_recorder import FlightRecorder
from mpips.config import Config, ConfigError, no_folder
from mpips.data import Place
from mpips.process import rng
from mpips.process.environment import environment
from mpips.report import run_report as report
from mpips.run import run_folder as folder
from mpips.run.keeping import GROUPS
from mpips.run.start import (
    check_faults,
    check_min_workers,
    check_optimizer,
    check_rule,
    refused,
)
from mpips.server.parameter_server import ParameterServer
from mpips.server.rank_state import RankState
from mpips.server.round_server import Server
from mpips.worker.async_worker import Client
from mpips.worker.round_worker import Worker, place_of


class Roles:
    """Makes this rank's server and worker, with the server's weights in the model; a resumed run's, if it is one.

    Args:
        communicator, config, model, optimizer, validate, validation_data: as those of `connect`.
        count: the run's number among the runs of this process, from 1.

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
        count: int,
    ) -> None:
        self.communicator, self.config, self.optimizer, self.model = communicator, config, optimizer, model
        self.validation_data, self.measures = validation_data, validate is not None
        self._count = max(1, count)
        index, self.workers = place_of(communicator, config)
        check_rule(config, self.workers)
        check_optimizer(optimizer, self.workers, config)
        check_faults(config, communicator.size)
        check_min_workers(config, self.workers)
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
        if keep and not keep(recorder, deadline, self.config.min_workers > 0) and deadline:
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
            try:
                folder.hold(where)
                start = folder.newest_now(where, start, self.config.resume)
                run = report.run_id(where) if start and folder.holds_run(where) else report.new_id(self._count)
                report.log_to(where, SERVER, run)
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
