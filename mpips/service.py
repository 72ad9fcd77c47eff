"""What both servers are: the model and its optimizer, validation, stopping, checkpoints, the report.

`Server` runs rounds on it, `ParameterServer` answers requests; neither knows of the other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mpips
from mpips import checkpoint, contract, rng, snapshot
from mpips.config import Config
from mpips.data import Place
from mpips.exchange import Exchange, share
from mpips.message import COLUMNS, LOSS, Control, Stop, replicate
from mpips.mode import Mode, choose_mode, server_optimizer, summed
from mpips.optimizer import FlatOptimizer, MakeOptimizer, MakeScheduler, Scheduler
from mpips.report import Report
from mpips.rule import choose
from mpips.slices import Slices, settle
from mpips.state import RankState, pack_all
from mpips.stopping import LossScale, Patience


class Service:
    """The state of a server.

    Args:
        exchange: rank 0's end.
        model: the model to serve; its parameters are rank 0's copy of the weights.
        optimizer: an optimizer of the model's parameters, or a function from a list of parameters to one. In modes with steps
            of the workers' own it is theirs.
        scheduler: a learning-rate scheduler of that optimizer, or a function from an optimizer to one.
        config: the settings.
        folder: where checkpoints go; None writes none.
        report: where metrics and events go.
        validation_data: makes the validation data, called on the server alone.

    Attributes:
        mode: the row of MODES that this run is.
        replica: the model's flat buffers and messages.
        optimizer: the server's own step.
        inner: the workers' optimizer, where they take steps of their own: for its learning rate, and for a worker here.
        control: what is said to all ranks next.
        place: the place in the data of a worker on this rank, else the epoch alone.
        signalled: set to write a checkpoint and end the run at the next round.
        stop_asked: set to end the run with the next message to all ranks.
        states: the ranks' packed states of a resumed run, else empty.
        worker_state: what a worker on this rank has to add to a checkpoint.
        validation_data: what `load_validation_data` loaded.
        performances: rank -> its messages and bytes, after `receive_performances_from_nodes`.
    """

    def __init__(
        self,
        exchange: Exchange,
        model: nn.Module,
        optimizer: Optimizer | MakeOptimizer,
        scheduler: Scheduler | MakeScheduler | None = None,
        *,
        config: Config | None = None,
        folder: Path | None = None,
        report: Report | None = None,
        validation_data: Callable[[], Any] | None = None,
    ) -> None:
        self.exchange, self.model, self.config, self.folder = exchange, model, config or Config(), folder
        self.mode: Mode = choose_mode(self.config)
        self.rule, self.last = choose(self.config)
        self.report = report or Report(None, self.config.metrics)
        self.trains = exchange.size == 1 or self.config.server_trains
        self.first = 0 if self.trains else 1  # rank of the first worker
        self.workers = exchange.size - self.first
        self.control = Control(loss_scale=self.config.loss_scale or 1.0)
        self.patience = Patience()
        self.loss_scale = LossScale(self.control.loss_scale)
        self.place = Place()
        self.worker_state: Callable[[], RankState] | None = None
        self.validation_data: Any = None
        self.performances: dict[int, dict[str, int]] = {}
        self.last_checkpoint: Path | None = None
        self.signalled = self.stop_asked = False
        self._make = (optimizer, scheduler, validation_data)
        self.states = b""
        self.slices: Slices | None = None
        self.optimizer: FlatOptimizer | Slices
        self._columns = COLUMNS + self.config.metrics
        self._averaged = [LOSS, *range(len(COLUMNS), len(self._columns))]  # over samples: loss and metrics
        self._last = exchange.clock()

    def create_model(self) -> None:
        """Lay the model out flat and make the master weights, the optimizers and the scheduler."""
        optimizer, scheduler, _ = self._make
        rows = 1 if self.mode.requests else self.exchange.size
        self.replica = replicate(self.model, self.config, rows, self.exchange.allocate, self.mode.vectors)
        self.inner = FlatOptimizer(self.replica, optimizer, scheduler, own=True) if self.mode.local else None
        self.optimizer = server_optimizer(self.mode, self.config, self.workers, self.replica, optimizer, scheduler)
        self.control.lr = self.lr
        self.check_requires_grad()

    @property
    def lr(self) -> float:
        """The learning rate that the script's scheduler sets."""
        return (self.inner or self.optimizer).lr

    def check_requires_grad(self) -> None:
        """Take note of which parameters are trained: only these travel after the first Bcast."""
        flat = self.replica.flat
        trained = sum(slot.numel for slot in flat.slots)
        frozen = sum(p.numel() for p in flat.frozen.values())
        self.report.event("trainable", trained=trained, frozen=frozen, tensors=[slot.name for slot in flat.slots])

    def load_validation_data(self) -> None:
        """Load the validation data, once, on the server alone."""
        make = self._make[2]
        if make is not None and self.validation_data is None:
            self.validation_data = make()

    def broadcast_initial_weights(self) -> None:
        """Agree with all ranks on the contract, then give them the weights and, if resumed, their own states."""
        if not hasattr(self, "replica"):
            self.create_model()
        self.replica.pull.control = self.control
        self.digest = contract.begin(self.exchange, self.replica, self.config)
        share(self.exchange, self.states)
        optimizer = None if isinstance(self.optimizer, Slices) else self.optimizer
        update = summed(self.mode, self.config)
        self.slices = settle(self.exchange, self.replica, self.config, self.rule, optimizer, update, self.trains)
        if self.slices:
            self.optimizer = self.slices
        if self.inner:
            self.inner.rebind()
        if self.exchange.size > 1 and not self.mode.requests:
            self._say_plan()
        self._last = self.exchange.clock()

    def _say_plan(self) -> None:
        plan, how = (self.slices.plan, self.slices.how) if self.slices else ("root", "messages")
        self.report.event("plan", plan=plan, exchange=how)
        self.report.line(f"plan: {plan}, by {how}", always=True)
        if self.config.wire != "full" and self.config.wire not in how:
            self.report.event(
                "warning", message=f"wire: {self.config.wire} is for plan sharded on several nodes; not used here"
            )

    def step_with(self, scale: float = 1.0) -> None:
        """One server update with what is combined in the push message, the learning rate times `scale`."""
        push, pull = self.replica.push, self.replica.pull
        clip = None if self.mode.local else self.config.clip  # there each worker clips its own steps
        if self.inner and self.optimizer.torch:
            for group in self.optimizer.torch.param_groups:
                if "inner_lr" in group:  # SlowMo's gamma
                    group["inner_lr"] = self.inner.lr
        self.optimizer.step(push.heard.present(), clip, scale)
        self.replica.buffers.combine(push.floats, push.heard.limbs, pull.buffers)
        if push.second is not None and pull.second is not None:
            pull.second.add_(push.second)
        self.control.version += 1
        if self.config.loss_scale:
            self.loss_scale.fine()
        if self.config.schedule == "round":
            (self.inner or self.optimizer).schedule()

    def judge(self, bad: dict[int, int]) -> None:
        """Updates that are not finite, rank -> slot: end the run, or only take note."""
        rank, slot = next(iter(bad.items()))
        if self.config.loss_scale:
            self.loss_scale.overflow()
        hopeless = not self.config.loss_scale or self.loss_scale.scale < 1  # no scale will mend a NaN
        if hopeless and self.config.nonfinite == "raise":
            self.control.culprit, self.control.slot = rank, slot
        name = self.replica.flat.slots[slot].name
        self.report.event("warning", message=f"rank {rank}: NaN or Inf in the gradient of {name}", round=self.control.round)

    def obey_ranks(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """A rank that was told to end, has left, or asks to stop, ends the run for all in this round."""
        told = [rank for rank, row in rows.items() if row["signal"]] + [0] * self.signalled
        left = [rank for rank, row in rows.items() if row["stop"] == 2]
        asked = [rank for rank, row in rows.items() if row["stop"] == 1] + [0] * self.stop_asked
        gone = Stop.ENDED if len(left) == self.workers else Stop.LEFT
        for stop, ranks in ((Stop.PREEMPTED, told), (gone, left), (Stop.REQUESTED, asked)):
            if ranks:
                self.end(stop, ranks)
                return

    def end(self, why: Stop, ranks: list[int]) -> None:
        """End the run, as these ranks would have it."""
        self.control.stop = why
        self.report.stopped(why.name.lower(), int(self.control.round), ranks)

    def send_stop_signal(self) -> None:
        """Tell all ranks, between rounds, what the control says: whether to stop, and the validation's value."""
        if self.stop_asked and not self.control.stop:
            self.end(Stop.REQUESTED, [0])
        if self.slices:
            self.slices.publish(self.control)
            return
        self.replica.pull.control = self.control
        self.exchange.publish(self.replica.pull.control_message)

    def validate(self, measure: Callable[..., Any], name: str = "value") -> float:
        """Measure the model and decide whether to stop; the workers wait for the value.

        Args:
            measure: called with the validation data, if there are any, else without arguments; in eval mode, without grad.
            name: what the value is, for people.
        """
        self.load_validation_data()
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            value = float(measure() if self.validation_data is None else measure(self.validation_data))
        for module, training in modes.items():  # one by one: a script may keep a frozen part in eval mode
            module.training = training
        self.control.value = value
        self.check_improvement(value)
        self.report.validated(self.place.epoch, int(self.control.round), value, self.patience.best, name)
        return value

    def check_improvement(self, accuracy: float) -> bool:
        """Take note of a validation's value.

        Returns:
            True to stop: the target is reached, or there was no gain for `stop.patience` validations. False to go on.
        """
        verdict = self.patience.judge(accuracy, self.config.stop)
        if verdict and not self.control.stop:
            self.end(verdict, [0])
        return verdict != Stop.NO

    def end_epoch(self) -> None:
        """All ranks have ended an epoch: step the scheduler."""
        if self.config.schedule == "epoch":
            (self.inner or self.optimizer).schedule(None if math.isnan(self.control.value) else self.control.value)
        self.control.lr = self.lr

    def get_queue(self) -> Exchange:
        """Where the server receives: its end of the exchange."""
        return self.exchange

    def get_server_iterations(self) -> int:
        """Rounds done so far."""
        return int(self.control.round)

    def save_model(self, wandb_run: Any = None) -> Path | None:
        """Write a checkpoint together with all ranks, which give their own states.

        Args:
            wandb_run: anything with `save(path)`, such as a Weights & Biases run; it is given the file.
        """
        begun = time.perf_counter()
        own = self.worker_state() if self.worker_state else RankState(-1, self.place, rng.capture())
        blobs = self.exchange.collect(own.pack())
        if self.folder is None:
            return None
        states = [RankState.unpack(blob) for blob in blobs]
        self.report.flush()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint.save(self.folder, int(self.control.round), self.tree(states), self.config.checkpoint.keep)
        self.last_checkpoint = path
        seconds, size = time.perf_counter() - begun, path.stat().st_size
        self.report.event("checkpoint", round=self.control.round, path=str(path), seconds=seconds, bytes=size)
        if wandb_run is not None:
            wandb_run.save(str(path))
        return path

    def tree(self, states: list[RankState]) -> dict[str, Any]:
        """Everything a run needs to go on, as nested dicts."""
        report = self.report
        return {
            "round": int(self.control.round),
            "version": int(self.control.version),
            "epoch": self.place.epoch,
            "config": json.dumps(self.config.settings()),
            "contract": self.digest,
            "versions": {"mpips": mpips.__version__, "torch": str(torch.__version__)},
            "world": {"size": self.exchange.size, "workers": self.workers},
            **snapshot.take_model(self.replica),
            **self._optimizer_tree(states),
            "inner": self.inner.tree() | {"masters": {}} if self.inner else {},
            "rule": {"name": self.config.rule, **self.rule.tree()},
            "mode": {"name": self.config.mode, **self.own_tree()},
            "stopping": {"best": self.patience.best, "waited": self.patience.waited, "value": self.control.value},
            "loss_scale": {"scale": self.loss_scale.scale, "good": self.loss_scale.good},
            "metrics": snapshot.columns(report.columns, report.rows),
            "validation": snapshot.columns(("round", "epoch", "value"), report.values),
            "ranks": {str(rank): state.tree() for rank, state in enumerate(states)},
        }

    def _optimizer_tree(self, states: list[RankState]) -> dict[str, Any]:
        """The optimizer's part; it is the same, whichever ranks have served which slices."""
        return self.slices.tree([state.slices for state in states]) if self.slices else self.optimizer.tree()

    def own_tree(self) -> dict[str, Any]:
        """What this kind of server has to add to a checkpoint: what travels back beside the weights."""
        second = self.replica.pull.second
        return {} if second is None else {"second": dict(self.replica.flat.named(second))}

    def put_own(self, tree: dict[str, Any]) -> None:
        """Take back what `own_tree` gave."""
        if (second := self.replica.pull.second) is not None:
            for name, view in self.replica.flat.named(second):
                view.copy_(tree["second"][name])

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, before the initial weights are broadcast.

        The model has been created.

        Raises:
            CheckpointError: the file is damaged or not a checkpoint.
            SnapshotError: it is of another model, optimizer or scheduler.
        """
        tree = checkpoint.load(path)
        saved = tree["mode"]["name"]
        if saved != self.config.mode and (self.mode.local or tree["inner"]):
            raise snapshot.SnapshotError(
                f"the checkpoint is of mode {saved}, this run of {self.config.mode}; give --mode {saved}"
            )
        snapshot.put_model(tree, self.replica)
        if "optimizer" in tree:
            self.optimizer.put(tree)
        if self.inner:
            self.inner.put(tree["inner"])
        if tree["rule"].pop("name") == self.config.rule:
            self.rule.put(tree["rule"])
        if tree["mode"].pop("name") == self.config.mode:
            self.put_own(tree["mode"])
        self.patience = Patience(tree["stopping"]["best"], tree["stopping"]["waited"])
        if self.config.loss_scale and json.loads(tree["config"])["loss_scale"]:
            self.loss_scale = LossScale(**tree["loss_scale"])
        states = [RankState.from_tree(tree["ranks"][str(rank)]) for rank in range(len(tree["ranks"]))]
        self.states = pack_all(states)
        first, taken = states[0].place, max(state.place.taken for state in states)
        self.place = Place(first.epoch, first.loop, taken, first.over, validations=first.validations, inside=first.inside)
        rng.restore(states[0].streams)
        self.control = Control(tree["round"], tree["version"], active=0 if first.over else self.workers, lr=self.lr)
        self.control.loss_scale, self.control.value = self.loss_scale.scale, tree["stopping"]["value"]
        self.report.restore(snapshot.rows(tree["metrics"]), snapshot.rows(tree["validation"]))
        self.report.event("resume", round=self.control.round, path=str(path))
        self.last_checkpoint = path

    def receive_performances_from_nodes(self) -> tuple[int, int]:
        """Every rank's traffic, once, at the end of the run.

        Returns:
            Calls made and bytes handed over, summed over the ranks; `performances` has them by rank.
        """
        blobs = self.exchange.collect(json.dumps(self.exchange.traffic).encode())
        self.performances = {rank: json.loads(blob) for rank, blob in enumerate(blobs)}
        totals = [
            sum(n for traffic in self.performances.values() for call, n in traffic.items() if call.endswith(kind))
            for kind in ("calls", "bytes")
        ]
        return totals[0], totals[1]

    def write_results(self, accuracy_validation: list[float]) -> None:
        """Write the results of the run, the validations' values among them, into DONE."""
        messages, moved = self.receive_performances_from_nodes()
        value = accuracy_validation[-1] if accuracy_validation else None
        self.report.done(
            {
                "seconds": round(time.time() - self.report.begun, 3),
                "rounds": self.get_server_iterations(),
                "versions": int(self.control.version),
                "name": self.report.name,
                "value": value,
                "validation": accuracy_validation,
                "stop": Stop(int(self.control.stop)).name.lower(),
                "checkpoint": None if self.last_checkpoint is None else str(self.last_checkpoint),
                "messages": messages,
                "bytes": moved,
                **self.summary(),
            }
        )

    def summary(self) -> dict[str, Any]:
        """What this kind of server has to say of the run at its end."""
        return {}
