"""Modes: each a row of what workers compute, how the server steps, and whether it runs rounds or answers requests.

To add one, write the row (see CONTRIBUTING.md). The rule that combines, and most of a row's numbers, are settings of their own.

| mode                   | a worker pushes                       | the server steps with             |          |
|------------------------|---------------------------------------|-----------------------------------|----------|
| sync                   | the gradient of each batch            | the script's optimizer            | rounds   |
| sync, backup_workers b | the same; the last b of a round drop  | the same                          | requests |
| async                  | the same                              | the same, one by one              | requests |
| ssp                    | the same, at most `staleness.bound` clocks ahead | the same               | requests |
| fedbuff                | where its local steps led             | `staleness.buffer` of them        | requests |
| easgd, eamsgd          | what pulls the centre towards it      | their sum                         | requests |
| local_sgd              | its weights after `local.steps` steps | their mean                        | rounds   |
| slowmo, diloco         | how far its local steps led           | slow momentum; Nesterov           | rounds   |
| the same, `local.fragments` | a fragment of it            | the same, on the fragment         | rounds   |
| fedavg and its kin     | the same, of clients' local epochs    | mean; momentum, Adam, Yogi, Adagrad | rounds |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import SGD, Optimizer

from mpips.algorithms.easgd import EASGD, ElasticMomentum
from mpips.algorithms.federated import FedAvg, FedNova, FedProx, QFedAvg, Scaffold
from mpips.algorithms.streaming_diloco import Streaming, cycle
from mpips.algorithms.update import Gradient, LocalSteps
from mpips.config import Config, ConfigError, check_mode
from mpips.model.message import Replica
from mpips.optim.flat_optimizer import FlatOptimizer, MakeOptimizer
from mpips.optim.server_optimizer import FedAdagrad, FedAdam, FedYogi, SetWeights, SlowMo

Step = Callable[[Config, Any], Optimizer]


def average(config: Config, params: Any) -> Optimizer:
    """w <- w - lr * mean change, with momentum if `outer.momentum` says so; as it stands, the mean of the workers' weights."""
    return SGD(params, lr=config.outer.lr or 1.0, momentum=config.outer.momentum or 0.0)


def momentum(config: Config, params: Any) -> Optimizer:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335)."""
    return SGD(params, lr=config.outer.lr or 1.0, momentum=0.9 if config.outer.momentum is None else config.outer.momentum)


def slow_momentum(config: Config, params: Any) -> Optimizer:
    """SlowMo (Wang et al. 2019, arXiv 1910.00643)."""
    return SlowMo(params, lr=config.outer.lr or 1.0, momentum=0.5 if config.outer.momentum is None else config.outer.momentum)


def nesterov(config: Config, params: Any) -> Optimizer:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv 2311.08105)."""
    beta = 0.9 if config.outer.momentum is None else config.outer.momentum
    return SGD(params, lr=config.outer.lr or 0.7, momentum=beta, nesterov=beta > 0)


def adaptive(kind: type[FedAdam] | type[FedYogi] | type[FedAdagrad]) -> Step:
    """FedOpt (Reddi et al. 2020, arXiv 2003.00295): no bias correction, unlike `torch.optim.Adam`."""

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
    """One row.

    Attributes:
        update: what a worker computes between pull and push.
        step: makes the server's optimizer of its parameters; None: it is the script's.
        requests: whether the server answers requests; else it runs rounds.
        steps: local steps between two pushes, if `local.steps` does not say; 0: the clients' epochs.
        policy: what becomes of late contributions, if `staleness.policy` does not say.
        buffer: contributions that make one update, if `staleness.buffer` does not say.
        bounded: whether workers wait for those that are too far behind.
        vectors: vectors of the weights' length in a message.
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
        """Whether workers take steps of their own, with the script's optimizer."""
        return self.step is not None

    @property
    def gradients(self) -> bool:
        """Whether workers push gradients in rounds, with the model at the server's weights all the time."""
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
    """The configured mode.

    Raises:
        ConfigError: no mode of that name, or settings that do not go with it.
    """
    check_mode(config.mode, MODES)
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
        bound = config.staleness.bound  # while a push travels its worker is one clock further
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
    if not ok:
        raise ConfigError(f"{key}: given {given!r} with mode {config.mode}, allowed: {allowed}")


def judges_clients(mode: Mode, config: Config) -> bool:
    """Whether the rule's rows are clients, not ranks."""
    return mode.federated and config.rule != "mean"


def summed(mode: Mode, config: Config) -> type[Gradient] | None:
    """What workers push, if it is contributions to one sum, in rounds; else None."""
    return None if mode.requests or judges_clients(mode, config) else mode.update


def takes_weights(mode: Mode, config: Config, workers: int) -> bool:
    """Whether workers push their weights, and the server takes the mean as it is; else they push how far they came.

    The mean of one worker's weights has its bits, w - (w - own) has not. Robust rules need changes, and so does every server
    step but plain averaging, and a wire of 16 bits, on which a change keeps more of what it is than the weights would.
    """
    outer = config.outer
    full = config.rule == "mean" and config.comm_dtype == "full"
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
    """What the server steps with; without `masters` what another rank steps its slices with, see `FlatOptimizer`."""
    step = mode.step
    if step is None:
        return FlatOptimizer(replica, optimizer, masters)
    if takes_weights(mode, config, workers):
        return FlatOptimizer(replica, SetWeights, masters)
    return FlatOptimizer(replica, lambda params: step(config, params), masters)


def make_update(
    mode: Mode, config: Config, replica: Replica, rank: int, index: int, workers: int, inner: FlatOptimizer | None
) -> Gradient:
    """What worker `index` of `workers` pushes."""
    update = mode.update(replica, rank, index, workers, config, inner)
    if mode.requests:  # each contribution is taken by itself
        update.alone = update.first = True
    if isinstance(update, LocalSteps):
        update.steps = cycle(config, config.local.steps or mode.steps)
        update.takes_weights = takes_weights(mode, config, workers)
    return update
