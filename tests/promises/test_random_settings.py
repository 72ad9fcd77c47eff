"""Random settings, models and optimizers: a run in shared memory, on one node or two, is the run by messages.

In deterministic runs the bits are the same, except with `clip` and `reduction=sum`, whose factors are multiplied in another
order in shared memory. Otherwise contributions are added in another order, so the last bits may differ.

`python -m tests.promises.test_random_settings SEED` says what a seed chooses and plays it.
"""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpips
from mpips.comm.simulated import World
from tests.helpers.programs import metrics

SEEDS, CHUNK = int(os.environ.get("RANDOM_SETTINGS", "80")), 20
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
}
LOCAL = ["local_sgd", "slowmo", "diloco"]
FEDERATED = ["fedavg", "fedprox", "scaffold", "fednova", "qfedavg", "fedadam"]
Chosen = tuple[int, dict[str, Any], dict[str, Any]]  # the number of ranks, the settings, what the script does


def choose(seed: int) -> Chosen:
    """What a seed chooses."""
    draw = random.Random(seed)
    size = draw.choice([2, 3, 4, 5])
    mode = draw.choice(["sync"] * 8 + LOCAL + FEDERATED)
    settings: dict[str, Any] = {"mode": mode, "deterministic": draw.random() < 0.6, "seed": draw.randrange(5)}
    settings |= {"server_trains": draw.random() < 0.3, "buffers": draw.choice(["mean", "mean", "server", "local"])}
    if mode in LOCAL:
        settings["local"] = {"steps": draw.choice([1, 2, 3])}
    workers = size - (not settings["server_trains"])
    if mode == "sync" and workers > 2 and draw.random() < 0.4:
        rule = draw.choice(["median", "trimmed", "krum", "multikrum", "rfa", "cclip", "normclip", "sign"])
        settings["rule"] = rule
        if rule in ("cclip", "normclip"):
            settings["robust"] = {"clip_radius": draw.choice([0.1, 1.0])}
        if rule in ("krum", "multikrum"):
            settings["robust"] = {"num_byzantine": 0}
    elif mode == "sync":
        settings["reduction"] = draw.choice(["mean", "mean", "sum"])
    if draw.random() < 0.4:
        settings["clip"] = draw.choice([0.05, 0.5, 5.0])
    if draw.random() < 0.4:
        settings["nonfinite"] = draw.choice(["drop", "skip"])
    if draw.random() < 0.3:
        settings["bucket_cap_mb"] = 0.001
    names = "frozen", "tied", "groups", "skips", "accumulates", "statistics"
    script: dict[str, Any] = {name: draw.random() < 0.3 for name in names}
    script["nan"] = "nonfinite" in settings and mode == "sync" and draw.random() < 0.5
    script["optimizer"] = "sgd" if mode in ("scaffold", "fednova", "qfedavg") else draw.choice(list(OPTIMIZERS))
    script["groups"] &= mode not in ("scaffold", "qfedavg")
    script["dtype"] = draw.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16])
    script |= {"items": draw.choice([13, 16, 24, 29]), "batch": draw.choice([1, 2, 3, 4])}
    return size, settings, script


class Statistics(nn.Module):
    """Buffers of three kinds, which each forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(7, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
            self.count += 1
        return x - self.mean * self.mask


class Net(nn.Module):
    """Tied or frozen layers, a scalar, and a parameter without a gradient."""

    def __init__(self, frozen: bool, tied: bool, statistics: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)
        self.c = self.a if tied else nn.Linear(5, 7)
        self.statistics = Statistics() if statistics else nn.Identity()
        self.unused, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.5))
        if frozen and not tied:
            self.c.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.statistics(self.a(x) + self.c(x)))) * self.scale
        return found


def program(communicator: Any, settings: dict[str, Any], script: dict[str, Any], folder: str) -> tuple[dict[str, Tensor], str]:
    torch.manual_seed(1)
    net = Net(script["frozen"], script["tied"], script["statistics"]).to(script["dtype"])
    given: Any = list(net.parameters())
    if script["groups"]:
        given = [{"params": given[:2], "lr": 0.003}, {"params": given[2:]}]
    optimizer = OPTIMIZERS[script["optimizer"]](given)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ps = mpips.connect(net, optimizer, communicator=communicator, run_dir=folder, **settings)
    source = torch.Generator().manual_seed(3)
    data = tuple(torch.randn(script["items"], width, generator=source).to(script["dtype"]) for width in (5, 3))
    number = 0
    for _ in ps.epochs(2):
        for x, y in ps.batches(data, script["batch"]):
            number += 1
            if not script["accumulates"] or number % 2:
                optimizer.zero_grad()
            errors = (net(x) - y).pow(2)
            loss = errors.sum() / 20 if settings.get("reduction") == "sum" else errors.mean()
            if script["nan"] and number == 2 and ps.worker == 0:
                loss = loss * float("nan")
            loss.backward()
            skipped = script["skips"] and number % 3 == 0 and ps.worker == 1
            if not skipped and (not script["accumulates"] or number % 2 == 0):
                ps.step(loss)
        scheduler.step()
    rows = [tuple(row.values()) for row in metrics(Path(folder))] if ps._roles.server else []
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}, repr(rows)


def worlds(size: int, seed: int) -> dict[str, World]:
    """By the plan that runs there, worlds whose ranks share memory."""
    found = {"root": World(size, seed=seed, shares=True), "sharded": World(size, seed=seed, shares=True)}
    if size > 3:
        found |= {"root, nodes": World(size, seed=seed, shares=True, nodes=(2, size - 2))}
        found |= {"sharded, nodes": World(size, seed=seed, shares=True, nodes=(size - 2, 2))}
    return found


def play(seed: int) -> None:
    """Compare the runs of one seed."""
    size, settings, script = choose(seed)
    expected = World(size, seed=seed).run(lambda e: program(e, settings, script, f"{seed}-messages"))
    bits = settings["deterministic"] and not (settings.get("clip") and settings.get("reduction") == "sum")
    near = 0.0 if bits else 1e-10 if script["dtype"] == torch.float64 else math.inf  # of fewer bits, a sign may be another one
    for name, world in worlds(size, seed).items():
        plan = settings | {"plan": name.split(",")[0]}
        found = world.run(lambda e, name=name, plan=plan: program(e, plan, script, f"{seed}-{name}"))
        for (state, rows), (other, others) in zip(expected, found, strict=True):
            for key, tensor in state.items():
                torch.testing.assert_close(other[key], tensor, rtol=near, atol=near, equal_nan=True, msg=f"{name}: {key}")
            assert not bits or others == rows, name


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_a_run_in_shared_memory_is_the_run_by_messages(first: int, record_property: Any) -> None:
    record_property("faults", CHUNK)
    for seed in range(first, first + CHUNK):
        try:
            play(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {choose(seed)}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    print(choose(int(sys.argv[1])))
    play(int(sys.argv[1]))
