"""The start of a rank: its settings, its communicator, its device."""

from __future__ import annotations

import gc
import sys
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
from mpips.comm.local import LocalCommunicator
from mpips.comm.star import StarCommunicator
from mpips.config import (
    BAD_CONFIGURATION,
    Config,
    ConfigError,
    Resolved,
    check_chaos,
    check_resume,
    check_run_dir,
    show,
    trace,
    whence,
)
from mpips.model.trainable import Trainable, freeze
from mpips.optim.flat_optimizer import MakeOptimizer, made
from mpips.optim.foreign import has_own_numbers, has_plain_state, kind, step_once, swaps, trial
from mpips.optim.joint import Joint
from mpips.process import lifecycle as process
from mpips.process.environment import launch
from mpips.report import stdout
from mpips.rules import RuleError, choose
from mpips.run import failure
from mpips.run.keeping import pack
from mpips.server.contract import agree_on_settings

Joined = TypeVar("Joined")


def configure(**settings: Any) -> Config:
    """Return the settings of this process. Flags come first, then variables, the YAML file, `settings` and the defaults.

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
        if _launched_rank() == 0:  # another rank's machine may lack the server's paths
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
    """Print the settings, with the source of each."""
    try:
        stdout.write(show(resolved).removesuffix("\n"))
    except stdout.OutputError as error:
        if str(error):
            print(f"mpips: print_config: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None


def choose_trainable(model: nn.Module, trainable: Trainable) -> None:
    """Train the parameters that `trainable` selects, and freeze all others.

    Raises:
        SystemExit: with status 2 and one line on the screen, if a pattern selects nothing.
    """
    try:
        freeze(model, trainable)
    except ConfigError as error:
        raise refused(error) from None


def check_rule(config: Config, workers: int) -> None:
    """Check that there are enough workers for the rule. In federated modes clients are checked later, once they are known.

    Raises:
        SystemExit: with status 2 and one line on the screen, if there are too few.
    """
    mode = choose_mode(config)
    if not mode.requests and not mode.federated:
        try:
            choose(config)[0].check(workers)
        except RuleError as error:
            raise refused(ConfigError(f"rule: {error}")) from None


def check_faults(config: Config, size: int) -> None:
    """Check that the run has the ranks that are to make faults on purpose.

    Raises:
        SystemExit: with status 2 and one line on the screen, if it has not.
    """
    if config.chaos:
        try:
            check_chaos(config.chaos, size)
        except ConfigError as error:
            raise refused(error) from None


def check_min_workers(config: Config, workers: int) -> None:
    """Check that the run can go on without workers that die, if it is to.

    Raises:
        SystemExit: with status 2 and one line on the screen, if it cannot.
    """
    given, allowed, mode = config.min_workers, "", choose_mode(config)
    if not given or workers == 1:
        return
    if given > workers:
        allowed = f"{given} with {workers} workers, allowed: {workers} at most"
    elif mode.federated and config.rule != "mean":
        allowed = f"{given} with mode {config.mode} and rule {config.rule}, which combines clients, allowed: rule mean"
    elif config.mode == "scaffold":
        allowed = f"{given} with mode scaffold, allowed: 0, as the control variates of a worker's clients would be gone with it"
    elif config.plan == "sharded":
        allowed = f"{given} with plan sharded, allowed: plan auto or root, as a slice's state would be gone with its rank"
    elif config.overlap:
        allowed = f"{given} with overlap, allowed: one of them"
    elif not mpi.survives_deaths():
        how = "start with mpips run --ft, by Open MPI 5"
        allowed = f"{given}, allowed: 0 under this mpiexec, which ends all ranks when one dies; {how}"
    if allowed:
        raise refused(ConfigError(f"min_workers: given {allowed}"))
    for number in range(given, workers):
        check_rule(config, number)


def one_module(model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> nn.Module:
    """Return the models of a run as one module, with the models as children by index or name."""
    if isinstance(model, nn.Module):
        return model
    return nn.ModuleDict(model) if isinstance(model, Mapping) else nn.ModuleList(model)


def one_optimizer(
    optimizer: Optimizer | MakeOptimizer | Sequence[Optimizer] | Mapping[str, Optimizer], model: nn.Module, config: Config
) -> Optimizer:
    """Return the optimizers of a run joined into one.

    Raises:
        SystemExit: with status 2 and one line on the screen, for several optimizers in a mode other than sync, or none.
    """
    if isinstance(optimizer, Optimizer) or callable(optimizer):
        return made(optimizer, model)
    if not isinstance(optimizer, (Mapping, Sequence)):
        allowed = "a torch.optim.Optimizer, or a list or dict of several; not an object around one"
        raise refused(ConfigError(f"optimizer: given a {type(optimizer).__name__}, allowed: {allowed}"))
    parts = list(optimizer.values() if isinstance(optimizer, Mapping) else optimizer)
    if len(parts) == 1:
        return parts[0]
    if not choose_mode(config).gradients:
        raise refused(ConfigError(f"optimizer: given {len(parts)} with mode {config.mode}, allowed: one, or mode sync"))
    return Joint(parts, step_once)


def check_optimizer(optimizer: Optimizer, workers: int, config: Config) -> None:
    """Check that the optimizer, or each of several, can step with this number of workers, in this mode.

    Raises:
        SystemExit: with status 2 and one line on the screen, if it cannot.
    """
    if isinstance(optimizer, Joint):
        for part in optimizer.parts:
            check_optimizer(part, workers, config)
        return
    if workers > 1 and isinstance(optimizer, SparseAdam):
        allowed = "torch.optim.Adam with nn.Embedding(sparse=False), as gradients are brought together dense"
        raise refused(ConfigError(f"optimizer: given SparseAdam with {workers} workers, allowed: {allowed}"))
    mode, given, allowed = choose_mode(config), f"a {kind(optimizer).__name__}", ""
    groups = getattr(kind(optimizer), "param_groups", None)
    if isinstance(groups, property) and groups.fset is None:
        given, allowed = f"{given}, whose param_groups are those of an optimizer that it wraps", "one with its own"
    elif not mode.gradients and (swaps(optimizer) or not has_plain_state(optimizer)):
        given, allowed = f"{given} with mode {config.mode}, which swaps weights or has a state that is not plain", "mode sync"
    elif not (mode.gradients or mode.local) and has_own_numbers(optimizer):
        given, allowed = f"{given} with mode {config.mode}, whose steps change numbers in its groups", "mode sync"
    elif why := _not_kept(optimizer):
        given, allowed = f"{given}, whose state cannot be written to a checkpoint: {why}", "another optimizer"
    if allowed:
        raise refused(ConfigError(f"optimizer: given {given}, allowed: {allowed}"))


def _not_kept(optimizer: Optimizer) -> str:
    """Return why the state of an optimizer of another library cannot be kept; else an empty string."""
    try:
        for state in trial(optimizer).states:
            pack(state, "a parameter")
    except TypeError as error:
        return str(error)
    return ""


def join(config: Config) -> Communicator:
    """Join the other ranks and return this rank's communicator; a single rank gets one without MPI.

    From then on an uncaught exception ends all ranks.

    Raises:
        SystemExit: with status 2 and one line on the screen, if the launcher has started several separate jobs of one rank.
    """
    communicator: Communicator
    if _joined(mpi.launched) == 1:
        communicator = LocalCommunicator()
    else:
        communicator = plain = _joined(partial(_meet, config))
        _settle(communicator, config)
        if config.min_workers and mpi.survives_deaths():
            communicator = StarCommunicator(plain)
    failure.end_all_on_exception(communicator)
    if config.cuda_aware:
        _prove(communicator)
    return communicator


def _meet(config: Config) -> mpi.MpiCommunicator:
    """Return this rank's MPI communicator, which is of one kind on all ranks, as their settings may differ."""
    return mpi.connect(round(config.bucket_cap_mb * 1e6), config.cuda_aware, config.ranks_per_node)


def _settle(communicator: Communicator, settings: Config | str) -> None:
    """Agree on the settings, before anything else is sent. If ranks differ or refuse, end all ranks with one line.

    `settings` is this rank's settings, or the line with which it refuses them.

    Raises:
        SystemExit: with status 2.
    """
    if line := agree_on_settings(communicator, settings):
        if communicator.rank == 0:
            print(f"mpips: {line}", file=sys.stderr, flush=True)
            process.drain()  # when a rank ends, mpiexec may drop what it has not read
        communicator.barrier(failure.TOGETHER_WITHIN)
        communicator.finalize()
        raise _end()


def _prove(communicator: Communicator) -> None:
    """Test on each rank with a GPU that MPI can read its memory. The first rank where it fails says so, and all end."""
    why = proof.failure(torch.cuda.current_device()) if torch.cuda.is_available() else ""
    failed = [rank for rank, digest in enumerate(communicator.allgather_digests(bytes([bool(why)]) + bytes(31))) if digest[0]]
    if failed:
        if communicator.rank == failed[0]:
            print(
                f"mpips: cuda_aware: on rank {communicator.rank} {why}; expected an MPI that was built for CUDA. Without this "
                f"setting GPU memory is staged through pinned host memory",
                file=sys.stderr,
            )
        raise _end()


def refused(error: ConfigError) -> BaseException:
    """Print the reason for refusing a run once, whichever ranks refuse it, and return the exception to raise.

    Ranks that have not joined the others do so for this. If they have joined, the exception of one rank ends all.
    """
    if _joined(mpi.launched) > 1:
        if process.is_guarded():
            return error
        with suppress(ImportError, RuntimeError):  # there is no MPI
            _settle(_joined(partial(_meet, Config())), str(error))
    _say(error)
    process.ends_with(BAD_CONFIGURATION)
    return _end()


def _end() -> SystemExit:
    """Return the exception that ends this process for a bad setting."""
    gc.freeze()  # else Python visits every object of torch before it ends, which takes longer than all the rest
    return SystemExit(BAD_CONFIGURATION)


def _say(error: Exception, speaker: int = 0) -> None:
    """Print the error on the rank `speaker`."""
    if _launched_rank() == speaker:
        print(f"mpips: {error}", file=sys.stderr)


def device() -> torch.device:
    """Return this rank's device: the GPU with its index on the node, made current, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(_joined(mpi.local_rank) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def workers() -> int:
    """Return how many workers `connect` will find, given the launcher and all settings except those in the call of `connect`.

    Raises:
        SystemExit: see `configure` and `join`.
    """
    return _joined(mpi.launched) - _serves_apart()


def worker_index() -> int:
    """Return this process's worker number, from 0, before `connect`; -1 on a rank that will only serve. See `workers`."""
    return _joined(mpi.rank) - _serves_apart()


def _serves_apart() -> bool:
    """Return whether rank 0 will only serve."""
    return _joined(mpi.launched) > 1 and not configure().server_trains


def _joined(ask: Callable[[], Joined]) -> Joined:
    """Return what `ask` returns. It may initialise MPI, if the launcher's variables do not say what it asks for.

    Raises:
        SystemExit: see `join`.
    """
    try:
        return ask()
    except mpi.LaunchError as error:  # if the launcher gives no size, rank 0 takes itself for the only rank
        _say(error, speaker=0 if launch().size else 1)
        raise _end() from None


def _launched_rank() -> int:
    """Return this process's rank as the launcher says it; 0 without a launcher."""
    return launch().rank or 0
