"""Federated modes against the papers' formulas: whole models as vectors, a plain loop over the clients, one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import mpips
from mpips import Clients
from mpips.algorithms.modes import choose_mode
from mpips.comm import Communicator
from mpips.comm.simulated import Killed, World
from mpips.config import Config, ConfigError, Outer
from mpips.config import Local as LocalSettings
from mpips.data.clients import chosen
from mpips.model.message import NonFiniteError
from tests.comm.test_mpi import on_mpi, on_one
from tests.helpers.programs import OPTIMIZERS, cnn, data, metrics, mlp, sha, train
from tests.promises.test_resume import last

SIZES = (30, 7, 22, 1, 40, 12, 3)
ROUNDS, BATCH, LR, SEED = 4, 8, 0.1, 5
MODES = ("fedavg", "fedprox", "fednova", "qfedavg", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
SOME = {"fraction": 0.5, "epochs": 2}  # 4 of 7 clients (3.5 is rounded to even), 2 epochs each


def clients(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> Clients:
    x, y = data(sum(sizes), dtype)
    return Clients(list(zip(x.split(sizes), y.split(sizes), strict=True)))


def ours(
    communicator: Communicator, given: Any = None, rounds: int = ROUNDS, batch: int | None = BATCH, **settings: Any
) -> Tensor:
    net = settings.pop("net", mlp)().double()
    inner = settings.pop("inner", lambda p: torch.optim.SGD(p, lr=LR))
    train(communicator, net, inner, clients() if given is None else given, batch, rounds, True, **{"seed": SEED, **settings})
    return parameters_to_vector(net.parameters()).detach().clone()


def gradient(net: nn.Module, at: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    vector_to_parameters(at.clone(), net.parameters())
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]), loss.item()


def mean(vectors: list[Tensor], weights: list[float]) -> Tensor:
    return sum((w * v for w, v in zip(weights, vectors, strict=True)), torch.zeros(())) / sum(weights)


def formulas(
    mode: str,
    given: Clients | None = None,
    rounds: int = ROUNDS,
    batch: int | None = BATCH,
    fraction: float = 1.0,
    epochs: int = 1,
    mu: float = 0.01,
    q: float = 1.0,
    lr: float = 1.0,
    beta: float = 0.9,
    uniform: bool = False,
) -> Tensor:
    """Algorithms as their papers state them; `lr` and `beta` are the server's."""
    given = given or clients()
    net = mlp().double()
    w = parameters_to_vector(net.parameters()).detach().clone()
    c, variates = torch.zeros_like(w), [torch.zeros_like(w) for _ in given]
    m, v = torch.zeros_like(w), torch.full_like(w, 1e-3**2)
    for t in range(rounds):
        some = [k for k in chosen(SEED, t, len(given), fraction) if given.sizes[k]]
        n = [1.0 if uniform else float(given.sizes[k]) for k in some]
        local, taken, losses, moved = [], [], [], []
        for k in some:
            losses.append(gradient(net, w, *given[k][:])[1])
            y, steps = w.clone(), 0
            for (xs, ys), _, _ in given.batches(k, t, epochs, batch, SEED):
                g, _ = gradient(net, y, xs, ys)
                if mode == "fedprox":
                    g = g + mu * (y - w)
                if mode == "scaffold":
                    g = g - variates[k] + c
                y, steps = y - LR * g, steps + 1
            if mode == "scaffold":
                new = variates[k] - c + (w - y) / (steps * LR)
                moved.append(new - variates[k])
                variates[k] = new
            local.append(y)
            taken.append(steps)
        if mode in ("fedavg", "fedprox"):
            w = w - lr * (w - mean(local, n))
        elif mode == "fednova":
            p = [a / sum(n) for a in n]
            tau = sum(a * s for a, s in zip(p, taken, strict=True))
            w = w - lr * tau * sum((a * (w - y) / s for a, y, s in zip(p, local, taken, strict=True)), torch.zeros(()))
        elif mode == "qfedavg":
            big = 1 / LR
            deltas = [big * (w - y) for y in local]
            h = [q * f ** (q - 1) * d.square().sum() + big * f**q for f, d in zip(losses, deltas, strict=True)]
            w = w - lr * sum((f**q * d for f, d in zip(losses, deltas, strict=True)), torch.zeros(())) / sum(h)
        elif mode == "scaffold":
            w = w + lr * mean([y - w for y in local], [1.0] * len(some))
            c = c + len(some) / len(given) * mean(moved, [1.0] * len(some))
        elif mode == "fedavgm":
            m = beta * m + (w - mean(local, n))
            w = w - lr * m
        else:
            delta = mean(local, n) - w
            m = beta * m + (1 - beta) * delta
            if mode == "fedadagrad":
                v = v + delta**2
            elif mode == "fedyogi":
                v = v - 0.01 * delta**2 * torch.sign(v - delta**2)
            else:
                v = 0.99 * v + 0.01 * delta**2
            w = w + lr * m / (v.sqrt() + 1e-3)
    return w


def outer(mode: str) -> dict[str, float]:
    """The server's rate and momentum that a mode has if none are given."""
    if mode in ("fedadam", "fedyogi", "fedadagrad"):
        return {"lr": 0.1, "beta": 0.0 if mode == "fedadagrad" else 0.9}
    return {}


def coefficients(tau: int, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0) -> list[float]:
    """FedNova's a: how often each of tau gradients counts in the sum of the steps, unrolled.

    Of gradient j, step k >= j has momentum^(k - j), and with Nesterov's 1 or 0 more and that a step older. Torch does not damp
    the first gradient.
    """

    def in_step(k: int, j: int) -> float:
        plain = momentum ** (k - j) * (1 - dampening if j else 1)
        return float(k == j) + momentum * plain if nesterov else plain

    return [sum(in_step(k, j) for k in range(j, tau)) for j in range(tau)]


def fednova(given: Clients, momentum: float, nesterov: bool, dampening: float, decay: float) -> Tensor:
    """Wang et al., equation 4, of local objectives f_i + decay/2 |w|^2: d_i = G_i a_i / |a_i|_1, tau_eff = sum(p_i |a_i|_1)."""
    net = mlp().double()
    w = parameters_to_vector(net.parameters()).detach().clone()
    for t in range(ROUNDS):
        some = chosen(SEED, t, len(given), 0.5)
        p = [given.sizes[k] / sum(given.sizes[j] for j in some) for k in some]
        norms, moves = [], []
        for k in some:
            y, v, gradients = w.clone(), torch.zeros_like(w), []
            for (xs, ys), _, _ in given.batches(k, t, 2, BATCH, SEED):
                g = gradient(net, y, xs, ys)[0] + decay * y
                v = momentum * v + (1 - dampening if gradients else 1) * g
                y = y - LR * (g + momentum * v if nesterov else v)
                gradients.append(g)
            a = coefficients(len(gradients), momentum, nesterov, dampening)
            assert_near(w - LR * mean(gradients, a) * sum(a), y)  # a is what it is said to be
            norms.append(sum(a))
            moves.append(mean(gradients, a))
        tau = sum(share * norm for share, norm in zip(p, norms, strict=True))
        w = w - tau * LR * mean(moves, p)
    return w


def climbing(communicator: Communicator, mode: str, **settings: Any) -> Tensor:
    """The same as `ours`, by an optimizer that maximizes minus the loss."""
    net = mlp().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, maximize=True)
    ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", seed=SEED, mode=mode, **settings)
    for _ in ps.epochs(ROUNDS):
        for x, y in ps.batches(clients(), BATCH, shuffle=True):
            gain = -F.cross_entropy(net(x), y)
            gain.backward()
            ps.step(gain, samples=len(x))
    return parameters_to_vector(net.parameters()).detach().clone()


def assert_near(a: Tensor, b: Tensor) -> None:
    assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_some_clients_and_epochs_are_the_formulas(mode: str, size: int) -> None:
    results = World(size).run(lambda e: ours(e, mode=mode, clients=SOME))
    assert_near(results[0], formulas(mode, fraction=0.5, epochs=2, **outer(mode)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mode", MODES)
def test_all_clients_on_a_server_that_trains_are_the_formulas(mode: str) -> None:
    results = World(3).run(lambda e: ours(e, mode=mode, server_trains=True))
    assert_near(results[0], formulas(mode, **outer(mode)))


@pytest.mark.parametrize(
    ("mode", "settings", "how"),
    [
        ("fedprox", {"clients": {"mu": 0.5, "epochs": 3}}, {"mu": 0.5, "epochs": 3}),
        ("qfedavg", {"clients": {"q": 0.3}}, {"q": 0.3}),
        ("qfedavg", {"clients": {"q": 3.0}}, {"q": 3.0}),
        ("qfedavg", {"clients": {"q": 0.0}, "outer": {"lr": 0.5}}, {"q": 0.0, "lr": 0.5}),
        ("fedavg", {"outer": {"lr": 0.5}}, {"lr": 0.5}),
        ("scaffold", {"outer": {"lr": 0.5}, "clients": {"fraction": 0.3}}, {"lr": 0.5, "fraction": 0.3}),
        ("fednova", {"outer": {"lr": 0.5}}, {"lr": 0.5}),
        ("fedavgm", {"outer": {"lr": 0.5, "momentum": 0.5}}, {"lr": 0.5, "beta": 0.5}),
        ("fedadam", {"outer": {"lr": 0.01, "momentum": 0.5}}, {"lr": 0.01, "beta": 0.5}),
        ("fedavg", {"local": {"weights": "uniform"}}, {"uniform": True}),
        ("fedprox", {"local": {"weights": "uniform"}}, {"uniform": True}),
        ("fedavgm", {"local": {"weights": "uniform"}}, {"uniform": True}),
        ("scaffold", {"local": {"weights": "uniform"}}, {}),  # as without
        ("qfedavg", {"local": {"weights": "uniform"}}, {}),
    ],
    ids=str,
)
def test_their_settings_are_the_papers(mode: str, settings: dict[str, Any], how: dict[str, Any]) -> None:
    assert_near(World(3).run(lambda e: ours(e, mode=mode, **settings))[0], formulas(mode, **how))


@pytest.mark.parametrize(("tau", "rho"), [(1, 0.9), (7, 0.9), (20, 0.5)])
def test_the_coefficients_of_momentum_are_the_paper_s(tau: int, rho: float) -> None:
    """Section 4.2: |a|_1 = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)."""
    assert sum(coefficients(tau, rho)) == pytest.approx((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho), rel=1e-14)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening", "decay"),
    [(0, False, 0, 0.1), (0.9, False, 0, 0), (0.9, True, 0, 0), (0.9, False, 0.3, 0), (0.5, False, 0, 0.1)],
)
def test_fednova_normalises_by_what_gradients_count(
    momentum: float, nesterov: bool, dampening: float, decay: float, size: int
) -> None:
    def made(p: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, LR, momentum, dampening, decay, nesterov)

    results = World(size).run(lambda e: ours(e, mode="fednova", clients=SOME, inner=made))
    assert_near(results[0], fednova(clients(), momentum, nesterov, dampening, decay))


def test_fednova_counts_a_rate_that_changes_on_the_way_as_it_is() -> None:
    """Two clients of 2 and 3 batches; the rate of a second step is a quarter, of a third an eighth: |a| is 1.25 and 1.375."""
    given = clients(sizes=(16, 24))
    net = mlp().double()
    w = parameters_to_vector(net.parameters()).detach().clone()
    moves, norms, rates = [], [], (1.0, 0.25, 0.125)
    for k in range(2):
        y = w.clone()
        for ((xs, ys), _, _), rate in zip(given.batches(k, 0, 1, BATCH, SEED), rates, strict=False):
            y = y - LR * rate * gradient(net, y, xs, ys)[0]
        norms.append(sum(rates[: 2 + k]))
        moves.append((w - y) / norms[-1])
    expected = w - mean(moves, [16.0, 24.0]) * (16 * norms[0] + 24 * norms[1]) / 40

    net = mlp().double()
    ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=LR), communicator=World(1).ends[0], mode="fednova", seed=SEED)
    worker = ps._worker
    assert worker is not None
    assert worker.inner is not None
    for _ in ps.epochs(1):
        for (xs, ys), rate in zip(ps.batches(given, BATCH, shuffle=True), [*rates[:2], *rates], strict=True):
            loss = F.cross_entropy(net(xs), ys)
            loss.backward()
            worker.inner.torch.param_groups[0]["lr"] = LR * rate
            ps.step(loss)
    assert_near(parameters_to_vector(net.parameters()).detach(), expected)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3])
def test_scaffold_is_the_paper_s_on_an_objective_with_weight_decay(size: int, decay: float) -> None:
    """c_i is the mean of the client's gradients, of f_i + decay/2 |y|^2: what (x - y) / (K lr) is made to say."""
    given, net = clients(), mlp().double()
    w = parameters_to_vector(net.parameters()).detach().clone()
    c, variates = torch.zeros_like(w), [torch.zeros_like(w) for _ in given]
    for t in range(ROUNDS):
        some = chosen(SEED, t, len(given), 0.5)
        ends, moved = [], []
        for k in some:
            y, gradients = w.clone(), []
            for (xs, ys), _, _ in given.batches(k, t, 2, BATCH, SEED):
                gradients.append(gradient(net, y, xs, ys)[0] + decay * y)
                y = y - LR * (gradients[-1] - variates[k] + c)
            new = mean(gradients, [1.0] * len(gradients))
            moved.append(new - variates[k])
            variates[k] = new
            ends.append(y)
        w = mean(ends, [1.0] * len(some))
        c = c + len(some) / len(given) * mean(moved, [1.0] * len(some))
    made = {"clients": SOME, "inner": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=decay)}
    assert_near(World(size).run(lambda e: ours(e, mode="scaffold", **made))[0], w)


@pytest.mark.parametrize(("mode", "mu"), [("fedavg", 0.0), ("fedprox", 0.5), ("fednova", 0.0), ("scaffold", 0.0)])
def test_an_optimizer_that_maximizes_minus_the_loss_is_the_formulas(mode: str, mu: float) -> None:
    results = World(3).run(lambda e: climbing(e, mode, clients={**SOME, "mu": mu}))
    assert_near(results[0], formulas(mode, fraction=0.5, epochs=2, mu=mu))


def test_a_client_s_data_as_one_batch() -> None:
    assert_near(World(3).run(lambda e: ours(e, batch=None, mode="fedavg"))[0], formulas("fedavg", batch=None))


@pytest.mark.parametrize("mode", MODES)
def test_no_number_of_ranks_changes_the_result(mode: str) -> None:
    given = clients(sizes=(5, 0, 17, 2, 9, 30))  # one has nothing
    one, *others = [World(size).run(lambda e: ours(e, given, mode=mode, clients=SOME))[0] for size in (1, 2, 8)]
    assert_near(one, formulas(mode, given, fraction=0.5, epochs=2, **outer(mode)))
    for other in others:
        assert_near(other, one)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", MODES)
def test_over_mpi_they_are_the_formulas(mode: str) -> None:
    results = on_mpi(lambda e: ours(e, mode=mode, clients=SOME))
    assert_near(results[0], on_one(lambda: formulas(mode, fraction=0.5, epochs=2, **outer(mode))))
    assert all(torch.equal(results[0], other) for other in results[1:])


# One client alone: plain PyTorch, bit for bit.


def alone(communicator: Communicator, optimizer: str, **settings: Any) -> str:
    net = mlp()
    given = clients(torch.float32, (103,))
    train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), given, 16, 5, True, seed=SEED, **settings)
    return sha(net)


def plainly(optimizer: str, epochs: int) -> str:
    net, given = mlp(), clients(torch.float32, (103,))
    for t in range(5):
        made = OPTIMIZERS[optimizer](net.parameters())  # a client keeps nothing between rounds
        for (x, y), _, _ in given.batches(0, t, epochs, 16, SEED):
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
    return sha(net)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["fedavg", "fedprox"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_client_is_plain_pytorch(optimizer: str, mode: str, size: int) -> None:
    results = World(size).run(lambda e: alone(e, optimizer, mode=mode, clients={"epochs": 2, "mu": 0.0}))
    assert results == [plainly(optimizer, 2)] * max(1, size - 1)


@pytest.mark.mpi(min_size=2)
def test_one_client_over_mpi_is_plain_pytorch() -> None:
    results = on_mpi(lambda e: alone(e, "momentum", mode="fedavg"))
    assert set(results) == {plainly("momentum", 1)}


def test_optimizers_that_begin_with_state_begin_with_it_for_each_client() -> None:
    def made(p: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1)

    given, net = clients(sizes=(20,)), mlp().double()
    for t in range(ROUNDS):
        optimizer = made(net.parameters())
        for (x, y), _, _ in given.batches(0, t, 1, BATCH, SEED):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert torch.equal(ours(World(1).ends[0], given, mode="fedavg", inner=made), parameters_to_vector(net.parameters()))


# Identities.


def run(size: int = 3, given: Any = None, **settings: Any) -> Tensor:
    return World(size).run(lambda e: ours(e, given, **settings))[0]


def equal_weights() -> Clients:
    """FedAvg of clients of equal sizes: their uniform mean."""
    return clients(sizes=(16,) * 5)


def test_fedprox_without_its_term_is_fedavg() -> None:
    assert torch.equal(run(mode="fedprox", clients={**SOME, "mu": 0.0}), run(mode="fedavg", clients=SOME))


def test_scaffold_without_variates_is_fedavg() -> None:
    given = equal_weights()
    first = {"given": given, "rounds": 1, "clients": {"epochs": 3}}  # in the first round they are 0
    assert_near(run(mode="scaffold", **first), run(mode="fedavg", **first))
    later = {"given": given, "clients": {"epochs": 3}}
    assert (run(mode="scaffold", **later) - run(mode="fedavg", **later)).abs().max() > 1e-6


def test_qfedavg_with_q_0_is_the_plain_mean() -> None:
    given = equal_weights()
    assert_near(run(given=given, mode="qfedavg", clients={**SOME, "q": 0.0}), run(given=given, mode="fedavg", clients=SOME))


def test_fednova_with_equal_steps_is_fedavg() -> None:
    given = clients(sizes=(15, 16, 14, 9))  # 2 steps of 8 each, of different weights
    assert_near(run(given=given, mode="fednova", clients=SOME), run(given=given, mode="fedavg", clients=SOME))


def test_fedavgm_without_momentum_is_fedavg() -> None:
    assert_near(run(mode="fedavgm", outer={"momentum": 0.0}), run(mode="fedavg"))


def test_clients_on_workers_of_their_own_are_local_sgd_and_diloco() -> None:
    """3 workers, each with the same data, in the same order, in all modes: 4 steps an epoch."""
    x, y = data(96, torch.float64)

    def program(communicator: Communicator, **settings: Any) -> Tensor:
        k = communicator.rank - 1
        own = (x[k * 32 :][:32], y[k * 32 :][:32]) if k >= 0 else ()
        net = mlp().double()
        train(communicator, net, lambda p: torch.optim.SGD(p, lr=LR), own, BATCH, ROUNDS, False, shard=False, **settings)
        return parameters_to_vector(net.parameters()).detach().clone()

    fedavg = World(4).run(lambda e: program(e, mode="fedavg"))[0]
    local = World(4).run(lambda e: program(e, mode="local_sgd", local={"steps": 4}))[0]
    diloco = World(4).run(lambda e: program(e, mode="diloco", local={"steps": 4}, outer={"lr": 1.0, "momentum": 0.0}))[0]
    assert_near(local, fedavg)
    assert_near(diloco, fedavg)


# Data.


def test_other_data_is_dealt_out_to_a_client_on_each_worker() -> None:
    given = data(50, torch.float64)
    results = run(4, given, mode="fedavg")
    assert_near(results, run(1, Clients.split(given, 3, SEED), mode="fedavg"))


def test_data_of_a_rank_s_own_is_that_of_the_client_of_its_number() -> None:
    given = clients(sizes=(30, 7, 22))

    def program(communicator: Communicator) -> Tensor:
        own = given[communicator.rank - 1] if communicator.rank else None
        net = mlp().double()
        ps = mpips.connect(
            net,
            lambda p: torch.optim.SGD(p, lr=LR),
            communicator=communicator,
            run_dir="run",
            mode="scaffold",
            seed=SEED,
            clients={"fraction": 0.67},
        )
        for _ in ps.epochs(ROUNDS):
            for x, y in ps.batches(own, BATCH, shard=False):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
        return parameters_to_vector(net.parameters()).detach().clone()

    results = World(4).run(program)
    whole = [World(2).run(lambda e: ours(e, given, mode="scaffold", clients={"fraction": 0.67}))[0]][0]
    # the orders of the batches are those of the same clients
    assert_near(results[0], whole)


@pytest.mark.parametrize(("given", "says"), [([1, 2], "map-style"), (iter(()), "map-style")])
def test_data_that_cannot_be_dealt_out_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ours(World(1).ends[0], given, mode="fedavg")


def test_clients_of_all_ranks_are_not_one_rank_s_own() -> None:
    with pytest.raises(ValueError, match="shard=False"):
        train(World(1).ends[0], mlp(), lambda p: torch.optim.SGD(p, lr=0.1), clients(), 8, 1, shard=False, mode="fedavg")


def test_modes_without_clients_take_their_data_together() -> None:
    given = clients()
    assert torch.equal(run(3, given, mode="sync"), run(3, given.together(), mode="sync"))


def seen(communicator: Communicator, given: Any, loops: int = 1, rounds: int = 2, **how: Any) -> list[list[int]]:
    """The items of each batch, by their number in column 0, whoever has them."""
    net = nn.Linear(1, 1)
    ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=0.1), communicator=communicator, run_dir="run", mode="fedavg")
    found = []
    for _ in ps.epochs(rounds):
        for _ in range(loops):
            for (x,) in ps.batches(given, 4, **how):
                found.append(x[:, 0].int().tolist())
                loss = net(x).mean() * 0
                loss.backward()
                ps.step(loss)
    assert ps.round == rounds * loops
    return found


def numbered() -> Clients:
    return Clients.by_index((torch.arange(25.0)[:, None],), [range(9), range(9, 10), [], range(10, 25)])


def test_batches_in_order_and_without_what_does_not_fill_one() -> None:
    results = seen(World(1).ends[0], numbered(), rounds=1, shuffle=False, drop_last=True)
    assert results == [[0, 1, 2, 3], [4, 5, 6, 7], *[list(range(n, n + 4)) for n in (10, 14, 18)]]


def test_each_loop_of_an_epoch_is_a_round_with_orders_of_its_own() -> None:
    results = seen(World(1).ends[0], numbered(), loops=2, rounds=2)
    a_round = len(results) // 4
    rounds = [results[i * a_round :][:a_round] for i in range(4)]
    assert len({str(r) for r in rounds}) == 4
    assert all(sorted(i for batch in r for i in batch) == list(range(25)) for r in rounds)


def test_more_workers_than_clients() -> None:
    by_rank = World(7).run(lambda e: seen(e, numbered()))
    items = sorted(i for rank in by_rank for batch in rank for i in batch)
    assert items == sorted([*range(25)] * 2)
    assert [] in by_rank[1:]  # one hosts nobody


# The loop.


def stepping(
    communicator: Communicator, leave: Any, mode: str = "fedavg", rounds: int = 3, **settings: Any
) -> tuple[Tensor, int]:
    """Loops in which `leave(ps, step)` decides to break."""
    net = mlp().double()
    ps = mpips.connect(
        net, lambda p: torch.optim.SGD(p, lr=LR), communicator=communicator, run_dir="run", mode=mode, seed=SEED, **settings
    )
    step = 0
    for _ in ps.epochs(rounds):
        for x, y in ps.batches(clients(), BATCH):
            if leave(ps, step):
                break
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss)
            step += 1
    ps.close()
    return parameters_to_vector(net.parameters()).detach().clone(), ps.round


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_loop_that_is_broken_out_of_counts_what_was_trained(mode: str, size: int) -> None:
    results = World(size).run(lambda e: stepping(e, lambda ps, step: step == 9, mode))
    assert len({rounds for _, rounds in results}) == 1  # in which nobody trains is none
    assert all(torch.equal(results[0][0], other) for other, _ in results)
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize("mode", ["fedavg", "fedadam"])
def test_a_client_that_is_broken_off_counts_with_its_steps(mode: str) -> None:
    """One client of 40 items, left after 3 of 5 steps in each round."""

    def program(communicator: Communicator) -> Tensor:
        net = mlp().double()
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=LR), communicator=communicator, run_dir="run", mode=mode)
        for _ in ps.epochs(2):
            for step, (x, y) in enumerate(ps.batches(clients(sizes=(40,)), BATCH, shuffle=False)):
                if step == 3:
                    F.cross_entropy(net(x), y).backward()  # a gradient that is not stepped with
                    break
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
        return parameters_to_vector(net.parameters()).detach().clone()

    def whole(communicator: Communicator) -> Tensor:
        settings = {"mode": mode, "seed": 0}
        net, (x, y) = mlp().double(), clients(sizes=(40,))[0][:24]
        train(communicator, net, lambda p: torch.optim.SGD(p, lr=LR), Clients([(x, y)]), BATCH, 2, False, **settings)
        return parameters_to_vector(net.parameters()).detach().clone()

    expected = World(1).run(whole)[0]
    for size in (1, 2, 3):
        assert torch.equal(World(size).run(lambda e: program(e))[0], expected)


def test_a_client_that_is_left_before_its_first_step_leaves_no_gradient_behind() -> None:
    def program(communicator: Communicator, first: int) -> Tensor:
        net = mlp().double()
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=LR), communicator=communicator, run_dir="run", mode="fedavg")
        for epoch in range(first, 2):
            for x, y in ps.batches(clients(sizes=(40,)), BATCH, shuffle=False):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if epoch == 0:
                    break
                ps.step(loss)
        return parameters_to_vector(net.parameters()).detach().clone()

    for size in (1, 2):
        expected = World(size).run(lambda e: program(e, 1))[0]
        assert torch.equal(World(size).run(lambda e: program(e, 0))[0], expected)


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_ends_the_run_with_the_round(size: int) -> None:
    def ask(ps: mpips.Run, step: int) -> bool:
        if step == 2 and ps.worker == 0:
            ps.stop()
        return False

    results = World(size).run(lambda e: stepping(e, ask))
    assert [rounds for _, rounds in results] == [1] * max(1, size - 1)
    assert all(torch.equal(result, results[0][0]) for result, _ in results)
    assert_near(results[0][0], formulas("fedavg", rounds=1))
    again = World(size).run(lambda e: stepping(e, lambda ps, step: False, resume="auto"))  # the round is behind it
    assert again[0][1] == 3
    assert_near(again[0][0], formulas("fedavg", rounds=3))


def test_a_worker_that_returns_from_its_loop_ends_the_run() -> None:
    def program(communicator: Communicator) -> str:
        net = mlp()
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=LR), communicator=communicator, run_dir="run", mode="fedavg")

        def script() -> None:
            for _ in ps.epochs(3):
                for step, (x, y) in enumerate(ps.batches(clients(torch.float32), BATCH)):
                    if ps.worker == 1 and step == 3:
                        return
                    loss = F.cross_entropy(net(x), y)
                    loss.backward()
                    ps.step(loss)

        script()
        ps.close()
        return ps.stopping

    assert set(World(3).run(program)) == {"left"}


def test_gradients_that_a_script_does_not_step_with_do_not_reach_the_next_client() -> None:
    def program(communicator: Communicator, extra: bool) -> Tensor:
        net = mlp().double()
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=LR), communicator=communicator, run_dir="run", mode="fedavg")
        for _ in ps.epochs(2):
            for x, y in ps.batches(clients(sizes=(16, 5, 24)), BATCH, shuffle=False):
                if extra or len(x) == BATCH:
                    loss = F.cross_entropy(net(x), y)
                    loss.backward()
                if len(x) == BATCH:
                    ps.step(loss)
        return parameters_to_vector(net.parameters()).detach().clone()

    assert torch.equal(World(1).run(lambda e: program(e, True))[0], World(1).run(lambda e: program(e, False))[0])


def test_a_sharded_loader_is_refused_where_it_is_asked_for() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run", mode="fedavg")
    with pytest.raises(TypeError, match=r"ps\.shard\(\) in mode fedavg: given a DataLoader, expected the data by clients"):
        ps.shard(torch.utils.data.DataLoader(torch.ones(8, 4)))


def test_qfedavg_without_a_loss_is_refused() -> None:
    def program(communicator: Communicator) -> None:
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", mode="qfedavg")
        for x, y in ps.batches(clients(torch.float32), BATCH):
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    with pytest.raises(ValueError, match=r"mode qfedavg weighs a client by its loss: got none, expected ps\.step\(loss\)"):
        World(1).run(program)


@pytest.mark.parametrize("mode", ["fedavg", "qfedavg"])
def test_the_samples_of_a_batch_are_its_items_unless_the_script_says(mode: str) -> None:
    """q-FedAvg weighs a client by its mean loss over items, whose last batch is smaller; the metrics weigh all alike."""
    told = [run(mode=mode, counts=counts, run_dir=f"{mode}-{counts}") for counts in (True, False)]
    assert torch.equal(*told)
    rows = [metrics(Path(f"{mode}-{counts}")) for counts in (True, False)]
    assert [(row["samples"], row["loss"]) for row in rows[0]] == [(row["samples"], row["loss"]) for row in rows[1]]


def test_a_round_reports_each_sample_once() -> None:
    for mode, epochs in (("fedavg", 2), ("qfedavg", 2)):
        World(3).run(lambda e, mode=mode, epochs=epochs: ours(e, mode=mode, clients={"epochs": epochs}, run_dir=mode))
        rows = metrics(Path(mode))
        assert [row["samples"] for row in rows] == [sum(SIZES) * epochs] * ROUNDS
        assert [row["version"] for row in rows] == [1, 2, 3, 4]


# Checkpoints.


def resumable(communicator: Communicator, mode: str, rounds: int = 6, **settings: Any) -> str:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    ps = mpips.connect(net, optimizer, communicator=communicator, mode=mode, seed=SEED, **{"clients": SOME, **settings})
    for _ in ps.epochs(rounds):
        for x, y in ps.batches(clients(torch.float32), BATCH):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss)
        scheduler.step()
        ps.validate(lambda: 1.0)
    return sha(net)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", ["fedavg", "scaffold", "fedadam"])
def test_killed_at_any_call_and_resumed(mode: str, size: int) -> None:
    whole = World(size, seed=3)
    expected = whole.run(lambda e: resumable(e, mode, run_dir="whole"))
    for call in range(6, min(whole.calls), 7):
        world, folder = World(size, seed=call), f"killed-{call}"
        world.kill(call % size, call)
        with pytest.raises(Killed):
            world.run(lambda e, folder=folder: resumable(e, mode, run_dir=folder))
        again = World(size).run(lambda e, folder=folder: resumable(e, mode, run_dir=folder, resume="auto"))
        assert again == expected, f"killed at call {call}"


def test_variates_are_those_of_the_round_in_a_checkpoint_that_the_server_asks_for() -> None:
    """It is written while the answer that ends the round is still being taken."""
    how: dict[str, Any] = {"mode": "scaffold", "checkpoint": {"every": 1, "epochs": 0}}
    whole = World(3)
    expected = whole.run(lambda e: resumable(e, run_dir="whole", **how))
    for call in range(6, min(whole.calls), 9):
        world, folder = World(3, seed=call), f"killed-{call}"
        world.kill(1, call)
        with pytest.raises(Killed):
            world.run(lambda e, folder=folder: resumable(e, run_dir=folder, **how))
        assert World(3).run(lambda e, folder=folder: resumable(e, run_dir=folder, resume="auto", **how)) == expected


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (3, 1), (4, 6)])
def test_variates_follow_their_clients_to_another_number_of_workers(before: int, after: int) -> None:
    expected = formulas("scaffold", rounds=6, fraction=0.5, epochs=2)
    World(before).run(lambda e: ours(e, mode="scaffold", rounds=3, clients=SOME))
    result = World(after).run(lambda e: ours(e, mode="scaffold", rounds=6, clients=SOME, resume="auto"))
    assert_near(result[0], expected)


def test_clients_other_than_scaffold_s_keep_nothing() -> None:
    World(3).run(lambda e: ours(e, mode="fedavg", inner=lambda p: torch.optim.Adam(p), rounds=2))
    for state in last(Path("run"))["ranks"].values():
        assert not state["own"].get("clients")
        assert not state["own"].get("inner", {}).get("optimizer", {}).get("state")


@pytest.mark.parametrize(("epochs", "kept"), [(1, [3, 4, 5, 6, 7]), (3, [3, 6, 7]), (0, [7])])
def test_checkpoints_after_some_epochs_and_the_last(epochs: int, kept: list[int]) -> None:
    settings = {"checkpoint": {"epochs": epochs, "keep": 5}}
    World(3).run(lambda e: ours(e, mode="fedavg", rounds=7, **settings))
    names = sorted(Path("run/checkpoints").glob("*.h5"))
    assert [int("".join(filter(str.isdigit, name.stem))) for name in names] == kept


def test_a_stop_is_saved_whatever_the_epoch() -> None:
    def stop(ps: mpips.Run, step: int) -> bool:
        if step == 20 and ps.worker == 0:
            ps.stop()
        return False

    World(2).run(lambda e: stepping(e, stop, checkpoint={"epochs": 0}, rounds=9))
    assert last(Path("run"))["round"] == 2


# Models, rules, faults.


def normalised(communicator: Communicator, **settings: Any) -> dict[str, Tensor]:
    net = cnn().double()
    train(
        communicator,
        net,
        lambda p: torch.optim.SGD(p, lr=LR),
        clients(sizes=(20, 8, 13, 30)),
        BATCH,
        2,
        True,
        seed=SEED,
        **settings,
    )
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("mode", ["fedavg", "qfedavg", "scaffold"])
def test_batchnorm_s_statistics_are_the_clients_mean(mode: str) -> None:
    by_size = [World(size).run(lambda e: normalised(e, mode=mode)) for size in (1, 2, 3, 6)]
    for results in by_size:
        assert all(torch.equal(results[0][name], rank[name]) for rank in results for name in rank)
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, by_size[0][0][name], rtol=1e-11, atol=1e-13)
    first = [-(-n // BATCH) for n in (20,)]  # client 0's batches, in both rounds
    assert by_size[0][0]["2.num_batches_tracked"] == 2 * first[0]


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_batchnorm_s_statistics_by_hand(rule: str) -> None:
    given, net = clients(sizes=(20, 8, 13, 30)), cnn().double()
    start, after = copy.deepcopy(net.state_dict()), []
    for k in range(4):
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for (x, y), _, _ in given.batches(k, 0, 1, BATCH, SEED):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        after.append(copy.deepcopy(net.state_dict()))
    found = [a["2.running_var"] for a in after]
    middle = torch.stack(found).sort(0).values[1:3].mean(0)
    expected = mean(found, [20.0, 8.0, 13.0, 30.0]) if rule == "mean" else middle

    def program(communicator: Communicator) -> Tensor:
        net = cnn().double()
        train(
            communicator, net, lambda p: torch.optim.SGD(p, lr=LR), given, BATCH, 1, True, seed=SEED, mode="fedavg", rule=rule
        )
        assert net[2].num_batches_tracked == 3  # client 0's
        return net[2].running_var.clone()

    torch.testing.assert_close(World(3).run(program)[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_a_robust_rule_withstands_a_client_that_lies(rule: str) -> None:
    x, y = data(5 * 16, torch.float64)
    honest = [(x[k * 16 :][:16], y[k * 16 :][:16]) for k in range(5)]
    liar = (honest[2][0] * -1e3, honest[2][1])
    given = Clients([*honest[:2], liar, *honest[3:]])
    fair = run(6, Clients(honest), mode="fedavg", rule=rule)
    lied = run(6, given, mode="fedavg", rule=rule)
    naive = run(6, given, mode="fedavg")
    assert (lied - fair).norm() < 1 < (naive - fair).norm()


ROBUST: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed": {},
    "krum": {},
    "multikrum": {},
    "bulyan": {"robust": {"num_byzantine": 0}},
    "rfa": {},
    "cclip": {"robust": {"clip_radius": 0.05}},
    "normclip": {"robust": {"clip_radius": 0.05}},
    "sign": {"outer": {"lr": 0.01}},
}
UNEVEN = (19, 2, 40, 12, 3, 8)  # hosted by size: on 2 workers 1 and 5, on 3 workers 1, 1 and 4


def judged(rule: str, size: int, given: Any = None, **settings: Any) -> Tensor:
    """What 6 clients, of whom a rule judges each, make of the weights."""
    given = clients(sizes=UNEVEN) if given is None else given
    return run(size, given, **{"mode": "fedavg", "rule": rule, **ROBUST[rule], **settings})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rule", ROBUST)
def test_a_rule_judges_clients_on_any_number_of_workers(rule: str, deterministic: bool) -> None:
    how: dict[str, Any] = {"deterministic": deterministic, "clients": {"epochs": 2}}
    each = judged(rule, 7, **how)  # a worker each
    for size in (2, 3, 4):
        assert_near(judged(rule, size, **how), each)
        assert_near(judged(rule, size - 1, server_trains=True, **how), each)


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_a_rule_of_clients_is_the_rule_on_what_each_pushes(rule: str) -> None:
    """By hand, in one round."""
    given, net = clients(sizes=UNEVEN), mlp().double()
    w, ways = parameters_to_vector(net.parameters()).detach().clone(), []
    for k in range(6):
        y = w.clone()
        for (xs, ys), _, _ in given.batches(k, 0, 1, BATCH, SEED):
            y = y - LR * gradient(net, y, xs, ys)[0]
        ways.append(y - w)
    rows = torch.stack(ways)
    if rule == "median":
        expected = w + (rows.sort(0).values[2] + rows.sort(0).values[3]) / 2
    else:
        scores = torch.cdist(rows, rows).square().sort(1).values[:, 1:4].sum(1)  # 6 - 1 - 2 nearest others
        expected = w + rows[scores.argmin()]
    assert_near(judged(rule, 3, given, rounds=1), expected)


@pytest.mark.parametrize("mode", ["fedprox", "fedavgm", "fedadam"])
def test_other_modes_have_their_clients_judged_as_well(mode: str) -> None:
    """Half of 12 clients, others in each round."""
    some = {"fraction": 0.5, "epochs": 2}
    given = clients(sizes=UNEVEN * 2)
    one, *others = [judged("trimmed", size, given, mode=mode, clients=some) for size in (7, 1, 3, 4)]
    for other in others:
        assert_near(other, one)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("rule", ["median", "bulyan", "cclip"])
def test_over_mpi_a_rule_judges_clients(rule: str) -> None:
    results = on_mpi(lambda e: ours(e, clients(sizes=UNEVEN), mode="fedavg", rule=rule, **ROBUST[rule]))
    assert_near(results[0], on_one(lambda: judged(rule, 7)))


@pytest.mark.parametrize("rule", [rule for rule in ROBUST if rule != "normclip"])
@pytest.mark.parametrize("lie", [-1e3, float("nan")])
def test_clients_that_lie_beside_honest_ones_are_withstood(rule: str, lie: float) -> None:
    """Client 2 of 7 shares its worker with others; the weights stay near those of the honest six."""
    x, y = data(7 * 16, torch.float64)
    honest = list(zip(x.split(16), y.split(16), strict=True))
    given = Clients([(xs * lie if k == 2 else xs, ys) for k, (xs, ys) in enumerate(honest)])
    fair = judged(rule, 3, Clients([*honest[:2], *honest[3:]]))
    how = {"nonfinite": "drop", "rounds": ROUNDS, **({"robust": {"num_byzantine": 1}} if rule == "bulyan" else {})}
    for size in (1, 2, 3):
        lied = judged(rule, size, given, **how, run_dir=f"{rule}-{size}")
        assert (lied - fair).norm() < 0.7
        left_out = (Path(f"{rule}-{size}") / "events.jsonl").read_text().count("client 2: left out by the rule")
        assert left_out == (ROUNDS if lie != lie else 0)
    if lie == lie:
        assert (run(3, given, mode="fedavg", **how) - fair).norm() > 1


def test_a_client_that_is_left_out_is_one_faulty_less_to_assume() -> None:
    """Krum takes 5 of 5 clients with bad=1; the one that is not finite is the bad one, and 4 are enough."""
    x, y = data(5 * 16, torch.float64)
    parts = list(zip(x.split(16), y.split(16), strict=True))
    finite = Clients([parts[0], (x[:0], y[:0]), *parts[2:]])
    given = Clients([(xs * (float("nan") if k == 1 else 1), ys) for k, (xs, ys) in enumerate(parts)])
    expected = judged("krum", 5, finite, robust={"num_byzantine": 0}, rounds=1)
    for size in (1, 3, 6):
        assert_near(judged("krum", size, given, rounds=1, nonfinite="drop"), expected)
        with pytest.raises(NonFiniteError):
            judged("krum", size, given)


@pytest.mark.parametrize("rule", ["median", "multikrum", "cclip"])
def test_batchnorm_s_statistics_are_judged_by_client(rule: str) -> None:
    how: dict[str, Any] = {"mode": "fedavg", "rule": rule, "robust": {"num_byzantine": 0, "clip_radius": 0.05}}
    each, *others = [World(size).run(lambda e: normalised(e, **how)) for size in (5, 1, 2, 3)]
    for results in others:
        assert all(torch.equal(results[0][name], rank[name]) for rank in results for name in rank)
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, each[0][name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [1, 3])
def test_a_loop_that_is_broken_out_of_has_its_clients_judged(size: int) -> None:
    results = World(size).run(lambda e: stepping(e, lambda ps, step: step == 9, rule="median"))
    assert all(torch.equal(results[0][0], other) for other, _ in results)
    assert results[0][0].isfinite().all()


def test_a_rule_of_clients_that_remembers_is_resumed() -> None:
    """Killed at any call, on 3 ranks."""
    how: dict[str, Any] = {"rule": "cclip", "robust": {"clip_radius": 0.05}}
    whole = World(3, seed=3)
    expected = whole.run(lambda e: resumable(e, "fedavg", run_dir="whole", **how))
    for call in range(6, min(whole.calls), 17):
        world, folder = World(3, seed=call), f"killed-{call}"
        world.kill(call % 3, call)
        with pytest.raises(Killed):
            world.run(lambda e, folder=folder: resumable(e, "fedavg", run_dir=folder, **how))
        again = World(3).run(lambda e, folder=folder: resumable(e, "fedavg", run_dir=folder, resume="auto", **how))
        assert again == expected, f"killed at call {call}"


def faulty(communicator: Communicator, bad: int, mode: str = "fedavg", **settings: Any) -> Tensor:
    """The data of one client are not finite."""
    x, y = data(sum(SIZES), torch.float64)
    parts = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
    parts[bad][0].mul_(float("nan"))
    return ours(communicator, Clients(parts), mode=mode, **settings)


@pytest.mark.parametrize("mode", ["fedavg", "scaffold", "qfedavg", "fedadam"])
def test_a_client_that_is_not_finite_ends_the_run_or_is_left_out(mode: str) -> None:
    for size in (1, 3):
        with pytest.raises(NonFiniteError, match=r"gradient of 0\.weight"):
            World(size).run(lambda e: faulty(e, 4, mode))
    dropped = World(3).run(lambda e: faulty(e, 4, mode, nonfinite="drop", run_dir="drop"))[0]
    assert dropped.isfinite().all()
    assert (Path("drop") / "events.jsonl").read_text().count("NaN or Inf") == ROUNDS
    assert all(row["loss"] == row["loss"] for row in metrics(Path("drop")))
    skipped = World(3).run(lambda e: faulty(e, 4, mode, nonfinite="skip"))[0]
    assert torch.equal(skipped, parameters_to_vector(mlp().double().parameters()))


@pytest.mark.parametrize("size", [1, 3])
def test_scaffold_s_variates_stay_where_a_round_is_not_taken(size: int) -> None:
    """Neither the weights nor any c_i have moved; with a round that is taken, they do."""
    World(size).run(lambda e: faulty(e, 4, "scaffold", nonfinite="skip"))
    saved = last(Path("run"))
    own = [state["own"]["clients"] for state in saved["ranks"].values() if state["own"]]
    assert saved["round"] == ROUNDS
    assert not any(tensor.any() for hosted in own for named in hosted.values() for tensor in named.values())
    World(size).run(lambda e: faulty(e, 4, "scaffold", nonfinite="drop", run_dir="drop"))
    own = [state["own"]["clients"] for state in last(Path("drop"))["ranks"].values() if state["own"]]
    assert {int(k) for hosted in own for k, named in hosted.items() if named["0.bias"].any()} == {0, 1, 2, 3, 5, 6}


def test_a_client_that_is_left_out_is_as_one_without_data() -> None:
    x, y = data(sum(SIZES), torch.float64)
    parts = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
    parts[4] = (parts[4][0][:0], parts[4][1][:0])
    for size in (1, 3):
        dropped = World(size).run(lambda e: faulty(e, 4, nonfinite="drop"))[0]
        assert_near(dropped, run(size, Clients(parts), mode="fedavg"))


def test_weights_that_overflow_are_seen_without_a_gradient_that_does() -> None:
    with pytest.raises(NonFiniteError):
        ours(World(1).ends[0], clients(), mode="fedavg", inner=lambda p: torch.optim.SGD(p, lr=1e308))


def groups(p: Any, **unlike: Any) -> list[dict[str, Any]]:
    return [{"params": p[:1], **unlike}, {"params": p[1:]}]


PLAIN = "torch.optim.SGD without momentum"
REFUSED: list[tuple[str, str, Any]] = [
    ("scaffold", PLAIN, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ("scaffold", PLAIN, torch.optim.Adam),
    ("scaffold", PLAIN, lambda p: torch.optim.SGD(groups(p, lr=0.2), lr=0.1)),
    ("scaffold", PLAIN, lambda p: torch.optim.SGD(groups(p, maximize=True), lr=0.1)),
    ("qfedavg", PLAIN, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ("qfedavg", PLAIN, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
    ("qfedavg", PLAIN, lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)),
    ("qfedavg", PLAIN, torch.optim.Adam),
    ("qfedavg", PLAIN, lambda p: torch.optim.SGD(groups(p, lr=0.2), lr=0.1)),
    ("fednova", "torch.optim.SGD, with one momentum for all parameters", torch.optim.Adam),
    ("fednova", "torch.optim.SGD, with one momentum for all parameters", torch.optim.AdamW),
    ("fednova", "torch.optim.SGD, with one momentum", lambda p: torch.optim.SGD(groups(p, momentum=0.9), lr=0.1)),
    ("fedprox", "one whose groups all have maximize, or none", lambda p: torch.optim.Adam(groups(p, maximize=True))),
]


@pytest.mark.parametrize(("mode", "allowed", "inner"), REFUSED)
def test_optimizers_that_a_mode_is_not_defined_for_are_refused(mode: str, allowed: str, inner: Any) -> None:
    with pytest.raises(ConfigError, match=f"optimizer: given another with mode {mode}, allowed: {allowed}"):
        ours(World(1).ends[0], mode=mode, inner=inner)


def test_an_optimizer_is_refused_when_it_becomes_one() -> None:
    """As by a scheduler that moves the momentum, which begins after `connect`."""
    net = mlp()
    ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=0.1), communicator=World(1).ends[0], mode="scaffold")
    assert ps._worker is not None
    assert ps._worker.inner is not None
    ps._worker.inner.torch.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=PLAIN):
        next(iter(ps.batches(clients(torch.float32), BATCH)))


def test_qfedavg_with_q_0_takes_any_optimizer() -> None:
    """L cancels out: the plain mean of where the clients' steps have led."""
    given, adam = equal_weights(), {"inner": torch.optim.Adam}
    plain = run(given=given, mode="fedavg", clients=SOME, **adam)
    assert_near(run(given=given, mode="qfedavg", clients={**SOME, "q": 0.0}, **adam), plain)


@pytest.mark.parametrize("mode", ["fednova", "sync", "async"])
def test_weights_that_are_samples_always_are_not_set_uniform(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"local\.weights: given 'uniform' with mode {mode}, allowed: samples"):
        choose_mode(Config(mode=mode, local=LocalSettings(weights="uniform")))


def test_fednova_has_no_momentum_of_the_server_s() -> None:
    with pytest.raises(ConfigError, match=r"outer\.momentum: given 0\.9 with mode fednova, allowed: null or 0"):
        choose_mode(Config(mode="fednova", outer=Outer(momentum=0.9)))
    assert_near(run(mode="fednova", outer={"momentum": 0.0}), run(mode="fednova"))
