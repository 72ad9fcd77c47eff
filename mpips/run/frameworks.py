"""Frameworks that own the loop: transformers' Trainer, scripts with accelerate's Accelerator, Lightning's Trainer.

One line for each:

    from mpips import frameworks                                          # before the framework's objects are made
    ps = frameworks.transformers(trainer)                                 # then trainer.train()
    ps = frameworks.accelerate(accelerator, model, optimizer, loader)     # then accelerator.prepare(model, optimizer, loader)
    trainer = lightning.Trainer(strategy=frameworks.lightning())          # then trainer.fit(module, ...)

On each worker the framework runs as in a single process. Under mpirun accelerate would mistake the launcher's variables for a
launch of its own; importing this module hides the variables from accelerate. Only worker 0 writes and prints what the framework
writes and prints.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from mpips.config import ConfigError
from mpips.data import Part
from mpips.data.loader import sharded
from mpips.data.samples import samples_in
from mpips.process import lifecycle as process
from mpips.run import start
from mpips.run.connect import connect
from mpips.run.run import Run

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # variables by which accelerate detects a launch


class Sharing:
    """This worker's share of a loader, for a framework that counts its batches and never asks for one more.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        run._loop.framework = True
        self._running: Iterator[Any] | None = None

    def share(self, make: Callable[[], Any], window: int = 0) -> Any:
        """Return this worker's share of a loader.

        Args:
            make: makes the loader. It may draw from the random streams, which are identical on all workers meanwhile.
            window: the number of batches in a step, if all workers must count the same number of steps; else 0. The length is
                worker 0's if that has one step more.
        """
        run = self.run
        with run._worker.common:
            loader = make()
        shards = [sharded(loader, self._iterate, part) for part in (run._worker.part, lambda: Part(0, run.workers))]
        if window and has_length(loader):
            own, first = (-(-len(shard) // window) for shard in shards)
            return shards[own != first]
        return shards[0]

    def _iterate(self, loader: Any) -> Iterator[Any]:
        """Begin a loop over the loader, after ending the previous one."""
        self.end()
        self._running = self.run._loop.batches(loader, (None, True, False), own=False)
        return self._running

    def end(self) -> None:
        """End the framework's loop, if one is running, and wait for the other workers."""
        running, self._running = self._running, None
        if running:
            running.close()  # type: ignore[attr-defined]  # a generator
        self.run._loop.drain()


def has_length(loader: Any) -> bool:
    """Return whether the batches of a loader can be counted before iteration."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


def transformers(trainer: Any, **settings: Any) -> Run:
    """Let a `transformers.Trainer` train on all workers: each gets its share of the batches; worker 0 writes and logs.

    Call this after the trainer is made and before `train()`. A rank that only serves does so in this call, as in `connect`. The
    optimizer is the trainer's own; it is created here if the trainer has none yet.

    Args:
        trainer: the trainer.
        settings: as those of `connect`.

    Returns:
        This worker's part in the run.

    Raises:
        SystemExit: with status 2 and one line on the screen, for a trainer that cannot be reproduced exactly.
    """
    _refuse(trainer)
    _on_one_device(trainer)
    trainer.create_optimizer()
    run = connect(trainer.model, trainer.optimizer, **settings)
    _begin_anew(run, "transformers.Trainer")
    _be_process(run.worker)
    _leave_state(trainer.accelerator)
    _tell_skipped(trainer.accelerator, run)
    sharing = Sharing(run)
    given_loader, given_batches = trainer.get_train_dataloader, trainer.get_batch_samples

    def get_batch_samples(*given: Any) -> Any:
        batches, items = given_batches(*given)
        counts = [samples_in(batch) for batch in batches] if items is None else [float(items)]
        if batches and None not in counts:
            run._loop._samples = float(sum(count for count in counts if count))  # the number that the loss is the mean over
        if not batches and has_length(trainer.callback_handler.train_dataloader) and not run.stopping:
            _pass_step(trainer)
        return batches, items

    trainer.get_train_dataloader = lambda: sharing.share(given_loader, trainer.args.gradient_accumulation_steps)
    trainer.get_batch_samples = get_batch_samples
    trainer._load_from_checkpoint = _refuse_resume
    trainer.add_callback(_following(sharing))
    if run.worker:
        trainer.args.save_only_model = True  # else every process would write its random states
    load_best = trainer._load_best_model

    def load_best_model() -> None:
        run._finish()  # at the last round's weights; waits for worker 0's files
        load_best()

    trainer._load_best_model = load_best_model
    return run


def _pass_step(trainer: Any) -> None:
    """Count a step for which only other workers have a batch, for the learning rate and the end of training."""
    trainer.state.global_step += 1
    if type(trainer.lr_scheduler).__name__ not in ("ReduceLROnPlateau", "GreedyLR"):
        trainer.lr_scheduler.step()


def _refuse(trainer: Any) -> None:
    """Print the reason and raise SystemExit for a trainer that cannot be shared."""
    args = trainer.args
    why = ""
    if trainer.model_init is not None:
        why = "given one with model_init, which makes another model and optimizer in train(); allowed: one with a model"
    elif args.auto_find_batch_size:
        why = "given auto_find_batch_size, by which workers may come to different sizes; allowed: a size that fits"
    elif trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        why = "given one with DeepSpeed or FSDP, which divide the model themselves; allowed: neither"
    if why:
        raise start.refused(ConfigError(f"transformers.Trainer: {why}"))


def _begin_anew(run: Run, loop: str) -> None:
    """Raise RuntimeError for a resumed run: these frameworks' loops would begin with the first step again."""
    if run.round:
        raise RuntimeError(f"resume: given with a {loop}, whose loop would begin anew, expected no")


def _refuse_resume(*_: Any) -> None:
    """Raise RuntimeError for `trainer.train(resume_from_checkpoint=...)`."""
    raise RuntimeError(
        "trainer.train(resume_from_checkpoint=...) after frameworks.transformers(trainer): given a checkpoint, expected none; "
        "its weights and optimizer would be loaded here, where no server sees them"
    )


def _on_one_device(trainer: Any) -> None:
    """Let the trainer use this rank's GPU only; where it sees several, it would use all of them in each process."""
    args = trainer.args
    if args.n_gpu <= 1:
        return
    device = start.device()
    args._n_gpu = 1
    vars(args)["_setup_devices"] = device
    for state in _states():
        state._shared_state["device"] = device
    trainer._train_batch_size = args.train_batch_size
    trainer.model.to(device)


def _following(sharing: Sharing) -> Any:
    """Return the Trainer's callback that ends its loops together with those of the other workers."""

    class Following(import_module("transformers").TrainerCallback):  # type: ignore[misc]
        """Ends loops over data where the Trainer ends them, and the Trainer where the run ends."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Stop the Trainer if the run stops."""
            control.should_training_stop |= bool(sharing.run.stopping)

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            """Set the path of the best checkpoint: worker 0 writes it, and other workers may look before it exists."""
            if best := getattr(state, "best_global_step", None):
                state.best_model_checkpoint = os.path.join(args.output_dir, f"checkpoint-{best}")

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            """Wait for all workers at the end of an epoch."""
            sharing.end()

    return Following()


def accelerate(accelerator: Any, model: nn.Module, optimizer: Optimizer, loader: Any, **settings: Any) -> Run:
    """Let a script with an `accelerate.Accelerator` train on all workers. Call this before `accelerator.prepare`.

    When the script prepares `loader`, that yields this worker's share. Everything else is prepared as in one process: a loader
    for evaluation yields all data on each worker. `accelerator.is_main_process` is true on worker 0 only.

    Args:
        accelerator: the accelerator.
        model: the model, not prepared.
        optimizer: the model's optimizer, not prepared.
        loader: the DataLoader with the training data, not prepared.
        settings: as those of `connect`.

    Returns:
        This worker's part in the run.
    """
    if accelerator.device_placement:
        model.to(accelerator.device)
    run = connect(model, optimizer, **settings)
    _be_process(run.worker)
    _leave_state(accelerator)
    sharing = Sharing(run)
    prepare = accelerator.prepare_data_loader

    def prepare_data_loader(given: Any, *args: Any, **kwargs: Any) -> Any:
        if given is not loader:
            return prepare(given, *args, **kwargs)
        return sharing.share(lambda: prepare(given, *args, **kwargs))

    accelerator.prepare_data_loader = prepare_data_loader
    _tell_skipped(accelerator, run)
    return run


def _tell_skipped(accelerator: Any, run: Run) -> None:
    """Let the accelerator know whether the last round took no step, by a GradScaler of any worker: schedulers wait then."""
    prepare = accelerator.prepare_optimizer

    def prepare_optimizer(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        if prepared.optimizer in run.optimizers:
            given = type(prepared)
            prepared.__class__ = type(given.__name__, (given,), {"step_was_skipped": property(lambda _: run.skipped)})
        return prepared

    accelerator.prepare_optimizer = prepare_optimizer


def lightning(**settings: Any) -> Any:
    """Return a strategy for Lightning's Trainer: each worker is a process with one device that trains on its share.

    A rank that only serves does so inside `trainer.fit`, and ends there. On a worker, the strategy's attribute `run` is the run
    from then on.

    Args:
        settings: as those of `connect`.
    """
    home = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
    strategies, environments = import_module(f"{home}.strategies"), import_module(f"{home}.plugins.environments")

    class Strategy(strategies.SingleDeviceStrategy):  # type: ignore[misc,name-defined]
        """A strategy with one device for each worker."""

        strategy_name = "mpips"
        optimizers: Any
        global_rank: int

        def __init__(self) -> None:
            super().__init__("cpu")
            self.cluster_environment = environments.LightningEnvironment()  # else it would detect a launch
            self.run: Run | None = None
            self._sharing: Sharing | None = None
            self._workers = _workers()
            worker = start.worker_index()
            self._be(worker if worker >= 0 else start.workers())  # any number but 0: a server writes nothing

        def _be(self, worker: int) -> None:
            """Set the rank that Lightning sees."""
            self.global_rank = self.local_rank = worker
            self.cluster_environment.set_global_rank(worker)

        def broadcast(self, value: Any, src: int = 0) -> Any:
            """Return worker 0's value on all workers; mostly the name of a folder."""
            text = json.dumps(value, default=os.fspath)
            if self.run and self.run.active:
                return json.loads(self.run.meet(text))
            return json.loads(_told(self._workers, text)) if self._workers else value

        def barrier(self, name: str | None = None) -> None:
            """Wait for the other workers, taking part in their rounds meanwhile."""
            self.broadcast(None)

        @property
        def is_global_zero(self) -> bool:
            """Whether this process writes and prints."""
            return bool(self.global_rank == 0)

        def setup_environment(self) -> None:
            """Use this rank's device."""
            if type(self.accelerator).__name__ == "CUDAAccelerator":
                self._root_device = start.device()
            super().setup_environment()

        def setup_optimizers(self, trainer: Any) -> None:
            """Make the optimizer, and connect with it."""
            super().setup_optimizers(trainer)
            if len(self.optimizers) != 1:
                given = f"given {len(self.optimizers)} optimizers"
                raise start.refused(ConfigError(f"configure_optimizers: {given}, allowed: one, of all parameters"))
            self._resume(trainer)
            if self.run:
                self.run.close()
            self.run = connect(self.model, self.optimizers[0], **settings)
            _begin_anew(self.run, "Lightning Trainer (which resumes by its own ckpt_path)")
            self._sharing = Sharing(self.run)
            self.optimizers = self.optimizers  # makes Lightning wrap the optimizer in its new class

        def _resume(self, trainer: Any) -> None:
            """Load the optimizer's state from a Lightning checkpoint, so that the server begins with it."""
            states = (trainer._checkpoint_connector._loaded_checkpoint or {}).get("optimizer_states")
            if states:
                self.optimizers[0].load_state_dict(states[0])

        def load_optimizer_state_dict(self, checkpoint: Any) -> None:
            """Do nothing; `_resume` has loaded the state."""

        def optimizer_state(self, optimizer: Any) -> Any:
            """Return the optimizer's whole state on worker 0, which writes it, and an empty dict elsewhere."""
            return super().optimizer_state(optimizer) if self.is_global_zero else {}

        def process_dataloader(self, loader: Any) -> Any:
            """Return this worker's share of a training loader, and any other loader as it is."""
            if not self._sharing or not self.lightning_module.trainer.training:
                return loader
            return self._sharing.share(lambda: loader)

        def on_train_end(self) -> None:
            """Wait for all workers at the end of training."""
            assert self._sharing
            self._sharing.end()
            self._sharing.run._finish()  # weights loaded from now on, such as the best ones, are not trained

    return Strategy()


def _workers() -> Any:
    """Return an MPI communicator of the workers; None without MPI. Every rank calls this."""
    if start.workers() == 1:
        return None
    mpi = import_module("mpi4py.MPI")
    process.join()
    return mpi.COMM_WORLD.Split(start.worker_index() >= 0, mpi.COMM_WORLD.rank)


def _told(workers: Any, text: str) -> str:
    """Broadcast the first worker's text, and return it."""
    length = np.array([len(text.encode())])
    workers.Bcast(length)
    received = np.frombuffer(text.encode().ljust(int(length[0]))[: int(length[0])], np.uint8).copy()
    workers.Bcast(received)
    return bytes(received).decode()


class _Process:
    """The worker number of this process, for accelerate, whose state may be made before or after it is known."""

    worker = 0


def _be_process(worker: int) -> None:
    """Tell accelerate which worker this is, so that worker 0 is the main process."""
    _Process.worker = worker
    for state in _states():
        if state._shared_state:
            state._shared_state.update(_number())


def _leave_state(accelerator: Any) -> None:
    """Let the accelerator prepare an optimizer without moving its state to a device: the state is where the steps are taken."""
    prepare = accelerator.prepare_optimizer
    accelerator.prepare_optimizer = lambda optimizer, device_placement=None: prepare(optimizer, device_placement=False)


def _states() -> tuple[Any, Any]:
    """Return the classes in which accelerate keeps the shared state of all its objects."""
    module = import_module("accelerate.state")
    return module.PartialState, module.AcceleratorState


def _number() -> dict[str, int]:
    """Return accelerate's process indices for this worker."""
    return {"process_index": _Process.worker, "local_process_index": _Process.worker}


def _hide_launcher() -> None:
    """Hide the launcher's variables from accelerate, which would take them for a launch of its own."""
    state, _ = _states()
    given = state.__init__

    @wraps(given)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
        try:
            new = not self._shared_state
            given(self, *args, **kwargs)
            if new and _Process.worker:
                self._shared_state.update(_number())
        finally:
            os.environ.update(hidden)

    state.__init__ = init


if find_spec("accelerate"):
    _hide_launcher()
