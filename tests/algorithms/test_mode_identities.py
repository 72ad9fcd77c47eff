"""What one mode becomes in another's special case, each pair on simulated ranks and over MPI.

Every pair ends with the same float64 weights but for rounding (1e-12 of their norm), or bit for bit where it says `exact`. The
algorithms themselves are compared with plain PyTorch in the files beside this one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.comm.test_mpi import on_mpi
from tests.helpers.programs import OPTIMIZERS, data, mlp, train

FEDAVG: dict[str, Any] = {"mode": "fedavg"}
LOCAL: dict[str, Any] = {"mode": "local_sgd", "local": {"steps": 3}}


class Pair(NamedTuple):
    """Settings of two runs; with `shared` the first run's learning rate is divided by the workers."""

    one: dict[str, Any]
    other: dict[str, Any]
    exact: bool = False
    shared: bool = False


PAIRS = {
    "local SGD with one step is sync": Pair({"mode": "local_sgd", "local": {"steps": 1}}, {}),
    "DiLoCo with a plain outer step is local SGD": Pair(
        LOCAL | {"mode": "diloco", "outer": {"lr": 1.0, "momentum": 0.0}}, LOCAL
    ),
    "SlowMo without momentum is local SGD": Pair(LOCAL | {"mode": "slowmo", "outer": {"momentum": 0.0}}, LOCAL),
    "local SGD with an epoch of steps is FedAvg": Pair({"mode": "local_sgd", "local": {"steps": 1000}}, FEDAVG),
    "DiLoCo, plain, with an epoch of steps is FedAvg": Pair(
        {"mode": "diloco", "local": {"steps": 1000}, "outer": {"lr": 1.0, "momentum": 0.0}}, FEDAVG
    ),
    "FedProx without its term is FedAvg": Pair({"mode": "fedprox", "clients": {"mu": 0.0}}, FEDAVG, exact=True),
    "FedNova with equal steps is FedAvg": Pair({"mode": "fednova"}, FEDAVG),
    "q-FedAvg with q = 0 is FedAvg of equal clients": Pair({"mode": "qfedavg", "clients": {"q": 0.0}}, FEDAVG),
    "FedAvgM without momentum is FedAvg": Pair({"mode": "fedavgm", "outer": {"momentum": 0.0}}, FEDAVG),
    "SSP with bound 0 is sync": Pair({"mode": "ssp", "staleness": {"bound": 0}}, {}, shared=True),
    "a trimmed mean that trims nothing is the mean": Pair({"rule": "trimmed", "robust": {"num_byzantine": 0}}, {}),
    "rows in rank order are the sum": Pair({"deterministic": True}, {}),
}


def trained(communicator: Communicator, settings: dict[str, Any], rate: float, folder: str) -> Tensor:
    """The weights after two epochs of five batches of each worker's own 20 items."""
    net = mlp().double()
    worker = max(0, communicator.rank - 1)
    x, y = (t[20 * worker :][:20] for t in data(20 * communicator.size, torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    train(communicator, net, optimizer, (x, y), 4, epochs=2, shard=False, run_dir=folder, **settings)
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def one(communicator: Communicator, pair: Pair) -> Tensor:
    share = max(1, communicator.size - 1) if pair.shared else 1
    return trained(communicator, pair.one, 0.05 / share, "one")


def other(communicator: Communicator, pair: Pair) -> Tensor:
    return trained(communicator, pair.other, 0.05, "other")


def assert_same(ones: list[Tensor], others: list[Tensor], exact: bool) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.linalg.norm(one - other) <= (0.0 if exact else 1e-12) * torch.linalg.norm(other)
    start = nn.utils.parameters_to_vector(mlp().double().parameters())
    assert torch.linalg.norm(ones[0] - start) > 0.01  # they have trained


@pytest.mark.parametrize("name", PAIRS)
def test_on_simulated_ranks(name: str) -> None:
    pair = PAIRS[name]
    for size in (1, 2, 4):
        worlds = [World(size, seed=size).run(lambda e, run=run: run(e, pair)) for run in (one, other)]
        assert_same(*worlds, pair.exact)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", PAIRS)
def test_over_mpi(name: str) -> None:
    pair = PAIRS[name]
    assert_same(on_mpi(lambda e: one(e, pair)), on_mpi(lambda e: other(e, pair)), pair.exact)


def one_worker(communicator: Communicator, mode: dict[str, Any], optimizer: str) -> Tensor:
    net = mlp()
    train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), data(), **mode)
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


ALONE: dict[str, dict[str, Any]] = {  # these are plain PyTorch with one worker; the others are their own algorithm
    **{mode: {"mode": mode} for mode in ("sync", "async", "ssp", "local_sgd")},
    "DC-ASGD": {"mode": "async", "staleness": {"policy": "dc"}},
    "DC-ASGD, adaptive": {"mode": "async", "staleness": {"policy": "dc-adaptive"}},
    "fedbuff of one": {"mode": "fedbuff", "staleness": {"buffer": 1}},
    **{rule: {"rule": rule} for rule in ("median", "trimmed", "krum", "multikrum", "bulyan", "rfa")},
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ALONE)
def test_one_worker_over_mpi_has_plain_bits(mode: str) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("one worker is 2 ranks")
    expected = one_worker(World(1).ends[0], {"run_dir": f"plain-{MPI.COMM_WORLD.rank}"}, "adam")
    assert all(torch.equal(own, expected) for own in on_mpi(lambda e: one_worker(e, ALONE[mode], "adam")))
