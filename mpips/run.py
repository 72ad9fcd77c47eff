"""A run, as the user's script sees it: one object, the same calls on every rank.

This is the only place that asks whether this rank is the server. A server that does not train gets no batches: its `batches`
loop serves until every worker's shard is exhausted.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips import failure, folder, report, rng
from mpips.client import Client
from mpips.config import Config
from mpips.data import Place
from mpips.environment import environment
from mpips.exchange import SERVER, Exchange, share
from mpips.loop import Loop
from mpips.message import Control, Stop
from mpips.mode import choose_mode
from mpips.optimizer import MakeOptimizer, MakeScheduler, Scheduler
from mpips.parameter_server import ParameterServer
from mpips.server import Server
from mpips.start import check_rule, choose_trainable, configure, join
from mpips.trainable import Trainable
from mpips.worker import Worker, place_of


def connect(
    model: nn.Module,
    optimizer: Optimizer | MakeOptimizer,
    scheduler: Scheduler | MakeScheduler | None = None,
    *,
    trainable: Trainable | None = None,
    validation_data: Callable[[], Any] | None = None,
    exchange: Exchange | None = None,
    **settings: Any,
) -> Run:
    """Join the other ranks and begin a run; every rank calls this with the same model and settings.

    Args:
        model: the model, on its device. Its trainable parameters become views of one flat tensor.
        optimizer: any `torch.optim` optimizer of the model's parameters, or a function from a list of parameters to one. It
            steps on the server, which on one node may be all ranks, each on its slice of the weights; in modes with local steps
            it is the workers'.
        scheduler: a learning-rate scheduler of that optimizer, or a function from an optimizer to one.
        trainable: which parameters to train, the others being frozen: a name pattern ("head.*"), several, or a predicate of
            name and parameter. Only these travel, and only they have optimizer state. Those with requires_grad if None.
        validation_data: makes the data for `validate`, called on the server alone.
        exchange: one end of an exchange to use in place of MPI; for tests and simulations.
        settings: any field of `mpips.Config`; nested ones as dicts: `checkpoint={"every": 100}`. Flags (`--clip 1.0`,
            `--checkpoint.every 100`), `MPIPS_*` variables and a YAML file (`--config`) come before these.

    Raises:
        SystemExit: with status 2 and one line on the screen, for a setting that is not allowed, or if the launcher started
            several separate jobs of one rank.
        ContractError: the ranks do not have the same model, settings or versions; names the first difference.
    """
    config = configure(**settings)
    if trainable is not None:
        choose_trainable(model, trainable)
    if exchange is not None:
        return Run(exchange, config, model, optimizer, scheduler, validation_data)
    exchange = join(config)
    run = Run(exchange, config, model, optimizer, scheduler, validation_data)
    failure.on_preemption(run.preempt)
    atexit.register(_leave, run, exchange)
    return run


def _leave(run: Run, exchange: Exchange) -> None:
    try:
        run.close()
        exchange.wait(patience=None)
    except Exception:  # at exit nobody else would end the other ranks
        sys.excepthook(*sys.exc_info())


def _preempted(server: Server | ParameterServer | None) -> NoReturn:
    if server:
        server.report.preempted(server.last_checkpoint)
    raise SystemExit(failure.PREEMPTED)


class Run:
    """One rank's part in a run. `connect` makes it.

    Attributes:
        config: the resolved settings.
        folder: the run's folder, the same on all ranks.
        serves, trains: what this rank does.
        worker, workers: this worker's number, from 0 (-1 on a rank that only serves), and how many there are.
    """

    def __init__(
        self,
        exchange: Exchange,
        config: Config,
        model: nn.Module,
        optimizer: Optimizer | MakeOptimizer,
        scheduler: Scheduler | MakeScheduler | None,
        validation_data: Callable[[], Any] | None,
    ) -> None:
        self.config, self._exchange = config, exchange
        self.worker, self.workers = place_of(exchange, config)
        self.serves, self.trains = exchange.rank == SERVER, self.worker >= 0
        check_rule(config, self.workers)
        self._mode = choose_mode(config)
        self._server: Server | ParameterServer | None = None
        self._worker: Worker | None = None
        self.folder, resume = self._agree_on_folder()
        report.log_to(self.folder, exchange.rank)
        if self.serves:
            self._serve(model, optimizer, scheduler, validation_data, resume)
        if self.trains:
            self._train(model, optimizer, scheduler)
        self._loop = Loop(self._half, rng.capture() if resume else None, partial(_preempted, self._server))
        self._validations = 0  # in this epoch, those included that a resumed run has behind it
        self._begun = self._ended = False  # whether `epochs` has begun, and the run has been finished

    def _agree_on_folder(self) -> tuple[Path, Path | None]:
        """The run folder and the checkpoint to go on from: the server looks, all ranks take its word."""
        said = b""
        if self.serves:
            where, start = folder.folders(self.config.run_dir, self.config.resume)
            said = json.dumps([str(where), start and str(start)]).encode()
        where, start = json.loads(share(self._exchange, said))
        return Path(where), start and Path(start)

    def _serve(
        self,
        model: nn.Module,
        optimizer: Optimizer | MakeOptimizer,
        scheduler: Scheduler | MakeScheduler | None,
        validation_data: Callable[[], Any] | None,
        resume: Path | None,
    ) -> None:
        kind = ParameterServer if self._mode.requests else Server
        server = self._server = kind(
            self._exchange,
            model,
            optimizer,
            scheduler,
            config=self.config,
            folder=self.folder / "checkpoints",
            report=report.Report(self.folder, self.config.metrics),
            validation_data=validation_data,
        )
        server.create_model()
        if resume is not None:
            server.resume(resume)
        server.report.start(
            self.config.yaml(),
            environment(),
            size=self._exchange.size,
            workers=self.workers,
            server_trains=self.trains,
            script=report.script_name(),
            mpi=self._exchange.name,
            torch=str(torch.__version__),
            device=str(server.replica.flat.weights.device),
            parameters=sum(slot.numel for slot in server.replica.flat.slots),
        )
        server.broadcast_initial_weights()

    def _train(
        self, model: nn.Module, optimizer: Optimizer | MakeOptimizer, scheduler: Scheduler | MakeScheduler | None
    ) -> None:
        server = self._server
        kind = Client if self._mode.requests and not server else Worker
        self._worker = kind(self._exchange, model, self.config, server, optimizer, scheduler)
        self._worker.receive_initial_weights()

    @property
    def _half(self) -> Worker | Server | ParameterServer:
        """What this rank does in a loop: the worker's half if it trains."""
        half = self._worker or self._server
        assert half
        return half

    @property
    def _place(self) -> Place:
        return self._half.place

    @property
    def _control(self) -> Control:
        return self._half.control

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
        place = self._place
        if self._server:
            self._server.report.epochs = count
        self._begun = True
        while place.epoch < count and not self.stopping:
            self._loop.next_epoch()
            self._validations = 0
            yield place.epoch
            self._end_epoch(count)
        if not self._left:
            self._finish()

    def batches(
        self, data: Any, batch_size: int | None = None, *, shuffle: bool = True, drop_last: bool = False, shard: bool = True
    ) -> Iterator[Any]:
        """This worker's share of the data, batch by batch; nothing on a rank that only serves, which serves meanwhile.

        Args:
            data: a map-style dataset, a tuple of tensors, a DataLoader (which then decides batch size and order), an
                iterable of batches, or `Clients`. A rank that only serves does not look at it.
            batch_size: items in a worker's batch.
            shuffle: draw a new order, from the seed, in each epoch.
            drop_last: leave out a worker's last batch if it is not full.
            shard: False for data that is this rank's own already.

        In federated modes a loop is one communication round: some of the clients train, this worker's share of them one after
        another, `clients.epochs` each. A dataset or a tuple of tensors is dealt out to one client on each worker; with
        `batch_size=None` a client's data is one batch. Modes that know no clients take all clients' data together.
        """
        return self._loop.batches(data, (batch_size, shuffle, drop_last), own=not shard)

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

    def step(self, loss: Tensor | float, samples: int | None = None, **metrics: float) -> None:
        """Push the gradient that backward left, let the server step, and pull the new weights; gradients are then None.

        Args:
            loss: the mean loss over the samples, unscaled.
            samples: how many samples the gradient is the mean of; those of the batches since the last step if None.
            metrics: the mean over the samples of each metric named in the `metrics` setting.

        Raises:
            NonFiniteError: on all ranks, if some rank's gradient holds a NaN or Inf and `nonfinite` is "raise".
        """
        self._loop.step(loss, samples, metrics)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on in fp16 training: times the loss scale that the server decided."""
        return loss * self._control.loss_scale if self.config.loss_scale else loss

    def validate(self, measure: Callable[..., Any], name: str = "validation") -> float:
        """Measure the model on the server and decide there whether to stop; every rank calls this.

        Args:
            measure: called on the server alone, in eval mode and without grad, with the validation data if `connect` was
                given any. Returns a number.
            name: what the number is, for people.

        Returns:
            The number, on every rank; the last one if a resumed run has this validation behind it, or a rank has left.
        """
        self._loop.check_outside("validate()")
        self._validations += 1
        if self._left or self._validations <= self._place.validations:
            return self._control.value
        self._place.validations = self._validations
        if self._server:
            self._server.validate(measure, name)
            self._server.send_stop_signal()
        if self._worker:
            self._worker.hear()
        return self._control.value

    def stop(self) -> None:
        """End the run on all ranks, in the same round: the next one, or at the validation in progress."""
        if self._worker:
            self._worker.stop = 1
        if self._server:
            self._server.stop_server()

    def save(self) -> None:
        """Write a checkpoint now; every rank calls this at the same place, outside a `batches` loop."""
        self._loop.check_outside("save()")
        if not self._left:
            self._save()

    def _save(self) -> None:
        if self._worker:
            self._worker.save()
        elif self._server:
            self._server.save_model()

    @property
    def _left(self) -> bool:
        """Whether ranks have left their loops, so that the others can call nothing together but `close`."""
        return self._control.stop in (Stop.LEFT, Stop.ENDED)

    def preempt(self) -> None:
        """Write a checkpoint at the next round and end with status 75; SIGUSR1 does this."""
        if self._worker:
            self._worker.signalled = True
        elif self._server:
            self._server.signalled = True

    def print(self, *words: object) -> None:
        """Print on the server alone."""
        if self.serves:
            print(*words, flush=True)

    def _end_epoch(self, count: int) -> None:
        self._loop.drain()
        if self._left:
            return
        if not self._loop.cut:
            self._place.next_epoch()
            if self._server:
                self._server.end_epoch()
            if self._worker:
                self._worker.end_epoch()
        every, done = self.config.checkpoint.epochs, self._place.epoch
        if self.stopping or done >= count or (every and done % every == 0):
            self._save()

    def _finish(self) -> None:
        self._ended = True
        if self._server:
            self._server.write_results([value for _, _, value in self._server.report.values])
        elif self._worker:
            self._worker.give_performance()

    def close(self) -> None:
        """Leave; called when Python ends. A worker that left a loop early ends the run for all.

        What is not saved yet is saved here, and DONE written unless only some of the workers left: so ends a script that has
        its own loop over epochs, or returns from the middle of one.
        """
        if failure.happened() or self._ended:
            return
        self._loop.leave()
        if self._control.stop == Stop.PREEMPTED:
            return
        together = self._left or not self._begun
        self._exchange.wait(patience=300.0 if together else 5.0)
        self._save()
        if self._control.stop != Stop.LEFT:
            self._finish()
