"""The table of modes. A mode says what workers push, how the server steps, and whether it runs rounds or answers requests.

To add a mode, add a row (see CONTRIBUTING.md). The aggregation rule, and most of the numbers in a row, have settings of their
own.

| mode | a worker pushes | the server | its settings |
|---|---|---|---|
| sync | each batch's gradient | steps with the mean | `backup_workers` b: each update drops the last b |
| async | the same | steps with each at once | `staleness.policy`, `.bound`, `.strength`; `overlap` |
| ssp | the same, at most `staleness.bound` clocks ahead | the same | `staleness.bound`, `.policy`; `overlap` |
| fedbuff | the change by `local.steps` steps | steps with the mean of `staleness.buffer` of them | `outer.lr` |
| easgd, eamsgd | the elastic force, every `local.steps` steps | moves the centre | `local.moving_rate` |
| local_sgd | its weights after `local.steps` steps | takes their mean | `local.after`: post-local SGD |
| slowmo | the change by `local.steps` steps | slow momentum | `outer.lr`, `.momentum` |
| diloco | the same | Nesterov momentum | the same; streaming: `local.fragments`, `.delay`, `.mix` |
| fedavg, fedprox | the change by its clients' local epochs | takes their mean | `clients.fraction`, `.epochs`, `.mu` |
| scaffold, fednova, qfedavg | the same | as published | `clients.fraction`, `.epochs`, `.q` |
| fedavgm | the same | momentum | `outer.lr`, `.momentum` |
| fedadam, fedyogi | the same | as published, without bias correction | `outer.lr`, `.momentum`, `.beta2`, `.tau` |
| fedadagrad | the same | as published | `outer.lr`, `.momentum`, `.tau` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from mpips.algorithms.easgd import EASGD, ElasticMomentum
from mpips.algorithms.federated import FedAvg, FedNova, FedProx, QFedAvg, Scaffold
from mpips.algorithms.streaming_diloco import Streaming, cycle
from mpips.algorithms.update import Gradient, LocalSteps
from mpips.comm.codecs import CODECS
from mpips.config import Config, ConfigError, check_codec, check_mode
from mpips.model.message import Replica
from mpips.optim.flat_optimizer import FlatOptimizer, MakeOptimizer
from mpips.optim.server_optimizer import FedAdagrad, FedAdam, FedYogi, SetWeights, SlowMo

Step = Callable[[Config, Any], Optimizer]


def average(config: Config, params: Any) -> Optimizer:
    """Return SGD for w <- w - lr * mean change, with momentum if `outer.momentum` is set; by default, the workers' mean."""
    return SGD(params, lr=config.outer.lr or 1.0, momentum=config.outer.momentum or 0.0)


def momentum(config: Config, params: Any) -> Optimizer:
    """Return the server optimizer of FedAvgM (Hsu et al. 2019, arXiv 1909.06335)."""
    return SGD(params, lr=config.outer.lr or 1.0, momentum=0.9 if config.outer.momentum is None else config.outer.momentum)


def slow_momentum(config: Config, params: Any) -> Optimizer:
    """Return the server optimizer of SlowMo (Wang et al. 2019, arXiv 1910.00643)."""
    return SlowMo(params, lr=config.outer.lr or 1.0, momentum=0.5 if config.outer.momentum is None else config.outer.momentum)


def nesterov(config: Config, params: Any) -> Optimizer:
    """Return DiLoCo's outer optimizer, Nesterov SGD (Douillard et al. 2023, arXiv 2311.08105)."""
    beta = 0.9 if config.outer.momentum is None else config.outer.momentum
    return SGD(params, lr=config.outer.lr or 0.7, momentum=beta, nesterov=beta > 0)


def adaptive(kind: type[FedAdam] | type[FedYogi] | type[FedAdagrad]) -> Step:
    """Return the maker of a FedOpt optimizer (Reddi et al. 2020, arXiv 2003.00295), which has no bias correction."""

    def make(config: Config, params: Any) -> Optimizer:
        given: dict[str, Any] = {"lr": config.outer.lr or 0.1, "tau": config.outer.tau}
        if config.outer.momentum is not None:
            given["momentum"] = config.outer.momentum
        if kind is not FedAdagrad:
            given["beta2"] = config.outer.beta2
        return kind(params, **given)

    return make


@dataclass(frozen=True)
class Mode:
    """One row of the table of modes.

    Attributes:
        update: the class of what a worker computes between pull and push.
        step: makes the server's optimizer from settings and parameters; None if the server uses the script's optimizer.
        requests: whether the server answers requests instead of running rounds.
        steps: the default of `local.steps`, the local steps between two pushes; unused in federated modes.
        policy: the default of `staleness.policy`, what happens to late contributions.
        buffer: the default of `staleness.buffer`, the number of contributions in one update.
        bounded: whether a worker waits for others that are more than `staleness.bound` behind.
        vectors: the number of vectors of the weights' length in a message.
        normalised: whether the server's step is multiplied by the mean number of local steps.
    """

    update: type[Gradient] = Gradient
    step: Step | None = None
    requests: bool = False
    steps: int = 1
    policy: str = "none"
    buffer: int = 1
    bounded: bool = False
    vectors: int = 1
    normalised: bool = False

    @property
    def local(self) -> bool:
        """Whether workers take local steps with the script's optimizer."""
        return self.step is not None

    @property
    def gradients(self) -> bool:
        """Whether workers push gradients in rounds, so that the model always has the server's weights."""
        return not (self.requests or self.update.apart)

    @property
    def federated(self) -> bool:
        """Whether the workers host clients."""
        return issubclass(self.update, FedAvg)


MODES: dict[str, Mode] = {
    "sync": Mode(),
    "async": Mode(requests=True),
    "ssp": Mode(requests=True, bounded=True),
    "fedbuff": Mode(LocalSteps, average, requests=True, steps=8, policy="poly", buffer=10),
    "easgd": Mode(EASGD, average, requests=True, steps=10),
    "eamsgd": Mode(ElasticMomentum, average, requests=True, steps=10),
    "local_sgd": Mode(LocalSteps, average, steps=8),
    "slowmo": Mode(LocalSteps, slow_momentum, steps=12),
    "diloco": Mode(LocalSteps, nesterov, steps=500),
    "fedavg": Mode(FedAvg, average),
    "fedprox": Mode(FedProx, average),
    "fednova": Mode(FedNova, average, normalised=True),
    "qfedavg": Mode(QFedAvg, average),
    "scaffold": Mode(Scaffold, average, vectors=2),
    "fedavgm": Mode(FedAvg, momentum),
    "fedadam": Mode(FedAvg, adaptive(FedAdam)),
    "fedyogi": Mode(FedAvg, adaptive(FedYogi)),
    "fedadagrad": Mode(FedAvg, adaptive(FedAdagrad)),
}


def choose_mode(config: Config) -> Mode:
    """Return the configured mode.

    Raises:
        ConfigError: there is no mode of that name, or other settings do not go with the mode.
    """
    check_mode(config.mode, MODES)
    check_codec(config.comm_dtype, CODECS)
    mode = MODES[config.mode]
    if config.backup_workers:
        _allow("backup_workers", config, config.backup_workers, "0, or mode sync", config.mode == "sync")
        mode = Mode(requests=True)
    local = config.local
    if local.fragments > 1 or local.delay or local.mix:
        key, given = "local.fragments, local.delay, local.mix", [local.fragments, local.delay, local.mix]
        _allow(key, config, given, "1, 0, 0, or mode diloco or slowmo", config.mode in ("diloco", "slowmo"))
        mode = replace(mode, update=Streaming)
        cycle(config, local.steps or mode.steps)
        ok = local.fragments == 1 or config.rule != "cclip"
        _allow("rule", config, config.rule, "others with local.fragments: it compares with the last round", ok)
    ok = config.reduction == "mean" or (mode.gradients and config.rule == "mean")
    _allow("reduction", config, config.reduction, "mean, or mode sync with rule mean", ok)
    if config.overlap:
        ok = mode.gradients or (mode.requests and not mode.local)
        _allow("overlap", config, True, "modes sync, async and ssp", ok)
        early = config.rule == "mean" and config.nonfinite != "drop"
        allowed = "false with a rule but mean or nonfinite=drop: gradients leave before all are there"
        _allow("overlap", config, True, allowed, early or mode.requests)
        bound = config.staleness.bound  # a worker is one clock ahead of a push that is still under way
        ok = not config.backup_workers and (bound > 0 or not mode.bounded)
        _allow("overlap", config, True, "false with backup_workers, and with ssp at staleness.bound 0", ok)
    if mode.requests:
        _allow("rule", config, config.rule, "mean, as contributions are not taken together", config.rule == "mean")
        _allow("server_trains", config, True, "false: the server answers the workers' requests", not config.server_trains)
        _allow("deterministic", config, True, "false, as the order is that of arrival", not config.deterministic)
    ok = mode.local and config.mode != "fednova"
    uniform = config.local.weights == "uniform"
    _allow("local.weights", config, "uniform", "samples, which weight gradients, and fednova's clients", ok or not uniform)
    if config.mode in ("fednova", "qfedavg", "scaffold"):
        _allow("rule", config, config.rule, "mean", config.rule == "mean")
    outer = config.outer.momentum
    _allow("outer.momentum", config, outer, "null or 0: each round scales the rate", config.mode != "fednova" or not outer)
    return mode


def _allow(key: str, config: Config, given: object, allowed: str, ok: bool) -> None:
    """Raise ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}: given {given!r} with mode {config.mode}, allowed: {allowed}")


def judges_clients(mode: Mode, config: Config) -> bool:
    """Return whether the rule's rows are clients instead of ranks."""
    return mode.federated and config.rule != "mean"


def summed(mode: Mode, config: Config) -> type[Gradient] | None:
    """Return the mode's update class if workers contribute to one sum in rounds, else None."""
    return None if mode.requests or judges_clients(mode, config) else mode.update


def takes_weights(mode: Mode, config: Config, workers: int) -> bool:
    """Return whether workers push their weights and the server takes the mean as it is; else they push changes.

    With one worker the mean of weights is exact, while w - (w - w_k) is not w_k in floating point. Changes are needed by robust
    rules, by every server step other than plain averaging, and with a 16-bit `comm_dtype`, which rounds a change less than it
    would round the weights.
    """
    outer = config.outer
    full = config.rule == "mean" and CODECS[config.comm_dtype](torch.float32).exact
    plain = mode.step is average and (outer.lr or 1.0) == 1.0 and not outer.momentum and full
    if not plain or issubclass(mode.update, EASGD):
        return False
    if mode.requests:
        return workers == 1 and (config.staleness.buffer or mode.buffer) == 1
    return mode.update not in (FedNova, QFedAvg) or (mode.update is QFedAvg and config.clients.q == 0)


def server_optimizer(
    mode: Mode,
    config: Config,
    workers: int,
    replica: Replica,
    optimizer: Optimizer | MakeOptimizer,
    masters: bool = True,
) -> FlatOptimizer:
    """Return the optimizer of the server's step.

    `masters` is False on a rank that only steps slices of the server's weights, see `FlatOptimizer`.
    """
    step = mode.step
    if step is None:
        return FlatOptimizer(replica, optimizer, masters)
    if takes_weights(mode, config, workers):
        return FlatOptimizer(replica, SetWeights, masters)
    return FlatOptimizer(replica, lambda params: step(config, params), masters)


def make_update(
    mode: Mode, config: Config, replica: Replica, rank: int, index: int, workers: int, inner: FlatOptimizer | None
) -> Gradient:
    """Return the update of worker `index` of `workers`."""
    update = mode.update(replica, rank, index, workers, config, inner)
    if mode.requests:  # each contribution is taken by itself
        update.alone = update.first = True
    if isinstance(update, LocalSteps):
        update.steps = cycle(config, config.local.steps or mode.steps)
        update.takes_weights = takes_weights(mode, config, workers)
    return update
