"""How a rank starts: its settings, its communicator, its device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

from mpips.algorithms.modes import choose_mode
from mpips.comm import Communicator, mpi
from mpips.comm import cuda_probe as proof
from mpips.comm.simulated import World
from mpips.config import BAD_CONFIGURATION, Config, ConfigError, Resolved, check_resume, check_run_dir, show, trace, whence
from mpips.model.trainable import Trainable, freeze
from mpips.optim.flat_optimizer import MakeOptimizer, made, step_once
from mpips.optim.joint import Joint
from mpips.process import lifecycle as process
from mpips.process.environment import launch
from mpips.report import stdout
from mpips.rules import RuleError, choose
from mpips.run import failure
from mpips.server.contract import settle

Joined = TypeVar("Joined")


def configure(**settings: Any) -> Config:
    """The settings of this process: flags, variables, the YAML file, then `settings`, then the defaults.

    Raises:
        SystemExit: with status 2 and one line on the screen, for a setting that is not allowed; with status 0 after
            `--print_config`.
    """
    origins: Mapping[str, str] = {}
    try:
        resolved = trace(settings)
        config, origins = resolved.config, resolved.origins
        choose(config)
        choose_mode(config)
        if _launched_rank() == 0:  # a worker may be on a machine without the server's paths
            check_resume(config.resume)
            check_run_dir(config.run_dir)
    except ConfigError as error:
        raise refused(whence(error, origins)) from None
    if resolved.print_config:
        if _joined(mpi.launched) > 1 and not process.is_guarded():
            _settle(_meet(config), config)
        if _launched_rank() == 0:
            _print_settings(resolved)
        raise SystemExit(0)
    return config


def _print_settings(resolved: Resolved) -> None:
    try:
        stdout.write(show(resolved).removesuffix("\n"))
    except stdout.OutputError as error:
        if str(error):
            print(f"mpips: print_config: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None


def choose_trainable(model: nn.Module, trainable: Trainable) -> None:
    """Freeze all parameters but those.

    Raises:
        SystemExit: with status 2 and one line on the screen, if a pattern matches nothing.
    """
    try:
        freeze(model, trainable)
    except ConfigError as error:
        raise refused(error) from None


def check_rule(config: Config, workers: int) -> None:
    """There are workers enough for the rule, where it combines them all; a round's clients are counted when they are known.

    Raises:
        SystemExit: with status 2 and one line on the screen.
    """
    mode = choose_mode(config)
    if not mode.requests and not mode.federated:
        try:
            choose(config)[0].check(workers)
        except RuleError as error:
            raise refused(ConfigError(f"rule: {error}")) from None


def one_module(model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> nn.Module:
    """The models of a run as one module, whose parts they are, by number or name."""
    if isinstance(model, nn.Module):
        return model
    return nn.ModuleDict(model) if isinstance(model, Mapping) else nn.ModuleList(model)


def one_optimizer(
    optimizer: Optimizer | MakeOptimizer | Sequence[Optimizer] | Mapping[str, Optimizer], model: nn.Module, config: Config
) -> Optimizer:
    """The optimizers of a run as one.

    Raises:
        SystemExit: with status 2 and one line on the screen: several in a mode in which each worker steps with its own.
    """
    if isinstance(optimizer, Optimizer) or callable(optimizer):
        return made(optimizer, model)
    parts = list(optimizer.values() if isinstance(optimizer, Mapping) else optimizer)
    if len(parts) == 1:
        return parts[0]
    if not choose_mode(config).gradients:
        raise refused(ConfigError(f"optimizer: given {len(parts)} with mode {config.mode}, allowed: one, or mode sync"))
    return Joint(parts, step_once)


def check_optimizer(optimizer: Optimizer, workers: int) -> None:
    """The optimizer can step with so many workers.

    Raises:
        SystemExit: with status 2 and one line on the screen.
    """
    if workers > 1 and isinstance(optimizer, SparseAdam):
        allowed = "torch.optim.Adam with nn.Embedding(sparse=False), as gradients are brought together dense"
        raise refused(ConfigError(f"optimizer: given SparseAdam with {workers} workers, allowed: {allowed}"))


def join(config: Config) -> Communicator:
    """Join the other ranks: this rank's communicator, a world of one without MPI if there are no others.

    From then on an exception that nobody catches ends all ranks.

    Raises:
        SystemExit: with status 2 and one line on the screen, if the launcher started several separate jobs of one rank.
    """
    communicator: Communicator
    if _joined(mpi.launched) == 1:
        communicator = World(1, clock=time.perf_counter).ends[0]
    else:
        communicator = _joined(partial(_meet, config))
        _settle(communicator, config)
    failure.end_all_on_exception(communicator)
    if config.cuda_aware:
        _prove(communicator)
    return communicator


def _meet(config: Config) -> Communicator:
    """This rank's end of MPI."""
    return mpi.connect(round(config.bucket_cap_mb * 1e6), config.cuda_aware, config.ranks_per_node)


def _settle(communicator: Communicator, settings: Config | str) -> None:
    """The first that is said: go on if all ranks do and have the same settings, else end all with one line.

    Raises:
        SystemExit: with status 2.
    """
    if line := settle(communicator, settings):
        if communicator.rank == 0:
            print(f"mpips: {line}", file=sys.stderr, flush=True)
        communicator.finalize()
        if communicator.rank != 0:  # once another has ended mpiexec may drop what rank 0 has said
            time.sleep(failure.PATIENCE)
        raise SystemExit(BAD_CONFIGURATION)


def _prove(communicator: Communicator) -> None:
    """Let each rank with a GPU see that MPI takes its memory; the first for which it does not says so, and all end."""
    why = proof.failure(torch.cuda.current_device()) if torch.cuda.is_available() else ""
    failed = [rank for rank, word in enumerate(communicator.allgather_digests(bytes([bool(why)]) + bytes(31))) if word[0]]
    if failed:
        if communicator.rank == failed[0]:
            print(
                f"mpips: cuda_aware: on rank {communicator.rank} {why}; expected an MPI that was built for CUDA. Without this "
                f"setting GPU memory is staged through pinned host memory",
                file=sys.stderr,
            )
        raise SystemExit(BAD_CONFIGURATION)


def refused(error: ConfigError) -> BaseException:
    """Say once, whichever ranks refuse a run, why; to be raised.

    Ranks that have not joined do so for this. Of those that have, an exception on one ends all.
    """
    if _joined(mpi.launched) > 1:
        if process.is_guarded():
            return error
        with suppress(ImportError, RuntimeError):  # no MPI to say it through
            _settle(_joined(partial(_meet, Config())), str(error))
    _say(error)
    process.ends_with(BAD_CONFIGURATION)
    return SystemExit(BAD_CONFIGURATION)


def _say(error: Exception, speaker: int = 0) -> None:
    if _launched_rank() == speaker:
        print(f"mpips: {error}", file=sys.stderr)


def device() -> torch.device:
    """This rank's device: the GPU of its number on this node, made current, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(_joined(mpi.local_rank) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def workers() -> int:
    """How many workers `connect` will find, by what the launcher and the settings say, but for those in its call.

    Raises:
        SystemExit: see `configure` and `join`.
    """
    return _joined(mpi.launched) - _serves_apart()


def worker_index() -> int:
    """This process's worker number, from 0, before `connect`; -1 on the rank that will only serve. See `workers`."""
    return _joined(mpi.rank) - _serves_apart()


def _serves_apart() -> bool:
    return _joined(mpi.launched) > 1 and not configure().server_trains


def _joined(ask: Callable[[], Joined]) -> Joined:
    """What joins the other ranks, or may do so to learn a number that the launcher does not give.

    Raises:
        SystemExit: see `join`.
    """
    try:
        return ask()
    except mpi.LaunchError as error:  # where nobody says how many there are, the first rank takes itself for the only one
        _say(error, speaker=0 if launch().size else 1)
        raise SystemExit(BAD_CONFIGURATION) from None


def _launched_rank() -> int:
    return launch().rank or 0
