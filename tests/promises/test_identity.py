"""The promises about bits: one worker is plain PyTorch, n workers are one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import SERVER, Communicator
from mpips.comm.simulated import World
from tests.comm.test_mpi import on_mpi, on_one
from tests.helpers.programs import MODELS, OPTIMIZERS, cnn, data, dropout_mlp, in_order, mlp, plain, sha, train

EPOCHS = 10  # of 20 batches: 200 steps


def one_worker(communicator: Communicator, model: str, optimizer: str) -> str:
    net = MODELS[model]()
    train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), data(), epochs=EPOCHS)
    return sha(net)


def plainly(model: str, optimizer: str) -> str:
    net = MODELS[model]()
    return sha(plain(net, OPTIMIZERS[optimizer](net.parameters()), in_order(data(), 16, EPOCHS)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_one_process_is_plain_pytorch(model: str, optimizer: str) -> None:
    assert one_worker(World(1).ends[0], model, optimizer) == plainly(model, optimizer)


@pytest.mark.parametrize("model", MODELS)
def test_one_worker_beside_a_server_is_plain_pytorch(model: str) -> None:
    assert World(2).run(lambda e: one_worker(e, model, "adam")) == [plainly(model, "adam")]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_one_worker_over_mpi_is_plain_pytorch(model: str, optimizer: str) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("one worker is 2 ranks")
    assert on_mpi(lambda e: one_worker(e, model, optimizer)) == [plainly(model, optimizer)] * 2


def test_odd_batches_do_not_change_the_one_worker_identity() -> None:
    """(n g) / n is not g: the last batch here has 7 samples."""
    net = mlp()
    train(World(1).ends[0], net, OPTIMIZERS["sgd"](net.parameters()), data(103), batch_size=32, epochs=4)
    other = mlp()
    assert sha(net) == sha(plain(other, OPTIMIZERS["sgd"](other.parameters()), in_order(data(103), 32, 4)))


def test_dropout_and_shuffling_do_not_change_it_either() -> None:
    loader = DataLoader(TensorDataset(*data()), 16, shuffle=True)
    other = dropout_mlp()  # which seeds the one stream that both draw from
    batches = (batch for _ in range(3) for batch in loader)
    expected = sha(plain(other, OPTIMIZERS["adam"](other.parameters()), batches))
    net = dropout_mlp()
    train(World(1).ends[0], net, OPTIMIZERS["adam"](net.parameters()), data(), epochs=3, shuffle=True)
    assert sha(net) == expected


def script(optimizer: str, communicator: Communicator | None = None) -> str:
    """A script as it stands, but for two lines where there is a communicator."""
    net = dropout_mlp()
    made = OPTIMIZERS[optimizer](net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.95)
    loader = DataLoader(TensorDataset(*data(103)), 16, shuffle=True)
    if communicator:
        ps = mpips.connect(net, made, communicator=communicator, run_dir="run")
        loader = ps.shard(loader)
    for _ in range(4):
        for x, y in loader:
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
        scheduler.step()
    return sha(net)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_unchanged_script_is_plain_pytorch(optimizer: str, size: int) -> None:
    assert World(size).run(lambda e: script(optimizer, e)) == [script(optimizer)]


# Four workers with shards of their own sizes; batch i of the joined process is the four workers' batches i.
SHARDS = (16, 5, 11, 1)


def shares(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    x, y = data(33 * 10, dtype)
    starts = [sum(SHARDS[:k]) for k in range(4)]
    blocks = [(x.view(10, 33, 12)[:, s : s + n], y.view(10, 33)[:, s : s + n]) for s, n in zip(starts, SHARDS, strict=True)]
    return [(a.flatten(0, 1), b.flatten()) for a, b in blocks]


def joined(communicator: Communicator, optimizer: str, **settings: Any) -> list[Tensor]:
    net = mlp().double()
    ps_rank = communicator.rank - (not settings.get("server_trains"))
    own, size = (shares(torch.float64)[ps_rank], SHARDS[ps_rank]) if ps_rank >= 0 else ((), 1)
    made = OPTIMIZERS[optimizer](net.parameters())
    train(communicator, net, made, own, batch_size=size, epochs=5, shard=False, **settings)
    return [p.detach().clone() for p in net.parameters()]


def reference(optimizer: str) -> list[Tensor]:
    net = mlp().double()
    batches = in_order(data(33 * 10, torch.float64), 33, 5)
    return list(plain(net, OPTIMIZERS[optimizer](net.parameters()), batches).parameters())


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


@pytest.mark.parametrize("settings", [{}, {"server_trains": True}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unequal_workers_are_one_process_on_the_joined_batch(optimizer: str, settings: dict[str, Any]) -> None:
    size = 4 if settings.get("server_trains") else 5
    results = World(size).run(lambda e: joined(e, optimizer, **settings))
    assert len(results) == 4
    assert_close(results[0], reference(optimizer))
    assert all(torch.equal(a, b) for rank in results[1:] for a, b in zip(results[0], rank, strict=True))


@pytest.mark.mpi(min_size=5)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unequal_workers_over_mpi_are_one_process_on_the_joined_batch(optimizer: str) -> None:
    results = on_mpi(lambda e: joined(e, optimizer))
    assert_close(results[SERVER], reference(optimizer))


def uneven(communicator: Communicator, **settings: Any) -> str:
    """A model with buffers on shards that do not divide evenly, shuffled."""
    net = cnn()
    train(communicator, net, OPTIMIZERS["momentum"](net.parameters()), data(101), epochs=3, shuffle=True, **settings)
    return sha(net)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_rank_ends_with_the_same_bits(size: int) -> None:
    assert len(set(World(size, seed=1).run(uneven))) == 1


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_schedule_changes_the_bits(size: int) -> None:
    results = {World(size, seed=seed).run(uneven)[0] for seed in range(5)}
    assert len(results) == 1


@pytest.mark.mpi(min_size=2)
def test_deterministic_mode_gives_the_simulated_run_s_bits() -> None:
    """The simulated sum is a plain loop in rank order; MPI must give its bits whatever the library does."""
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size
    expected = on_one(lambda: World(size).run(lambda e: uneven(e, deterministic=True, run_dir="simulated")))
    assert on_mpi(lambda e: uneven(e, deterministic=True, run_dir="mpi"))[1:] == expected


def test_sum_and_rows_agree_to_rounding() -> None:
    def weights(communicator: Communicator, **settings: Any) -> Tensor:
        net = mlp()
        train(communicator, net, OPTIMIZERS["sgd"](net.parameters()), data(), epochs=2, **settings)
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    by_sum = World(4).run(weights)[0]
    by_rows = World(4, bucket=256).run(lambda e: weights(e, deterministic=True))[0]
    torch.testing.assert_close(by_sum, by_rows, rtol=1e-5, atol=1e-6)  # float32, 3 workers, 40 rounds
