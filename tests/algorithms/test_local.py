"""Modes in which workers take steps of their own, against plain loops written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import Killed, World
from mpips.model.message import NonFiniteError
from tests.comm.test_mpi import on_mpi
from tests.helpers.programs import MODELS, OPTIMIZERS, cnn, data, in_order, metrics, mlp, plain, sha, train

Make = Callable[[Any], torch.optim.Optimizer]
LR, BATCH, EPOCHS = 0.05, 16, 3


def weights(net: nn.Module) -> Tensor:
    return parameters_to_vector(net.parameters()).detach().clone()


def assert_near(a: Tensor, b: Tensor) -> None:
    assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=LR)


def momentum(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=LR, momentum=0.9)


# One worker.


def one(communicator: Communicator, optimizer: str, model: str = "mlp", **settings: Any) -> str:
    net = MODELS[model]()
    train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), data(107), BATCH, EPOCHS, **settings)
    return sha(net)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_local_sgd_of_one_worker_is_plain_pytorch(model: str, optimizer: str, size: int) -> None:
    net = MODELS[model]()
    expected = sha(plain(net, OPTIMIZERS[optimizer](net.parameters()), in_order(data(107), BATCH, EPOCHS)))
    settings = {"mode": "local_sgd", "local": {"steps": 3}}
    assert World(size).run(lambda e: one(e, optimizer, model, **settings)) == [expected]


def outer_by_hand(make: Make, mode: str, lr: float, beta: float) -> nn.Module:
    """3 local steps, then the outer step on how far they led; the end of an epoch ends the local steps."""
    net = mlp()
    inner, params = make(net.parameters()), list(net.parameters())
    outer = torch.optim.SGD([torch.zeros_like(p).requires_grad_() for p in params], lr=lr, momentum=beta, nesterov=True)
    slow = [torch.zeros_like(p) for p in params]
    start = [p.detach().clone() for p in params]
    for _ in range(EPOCHS):
        batches = list(in_order(data(107), BATCH, 1))
        for number, (x, y) in enumerate(batches, 1):
            inner.zero_grad()
            F.cross_entropy(net(x), y).backward()
            inner.step()
            if number % 3 and number < len(batches):
                continue
            with torch.no_grad():
                if mode == "diloco":
                    for master, x0, p in zip(outer.param_groups[0]["params"], start, params, strict=True):
                        master.copy_(x0)
                        master.grad = x0 - p
                    outer.step()
                    new = [p.clone() for p in outer.param_groups[0]["params"]]
                else:  # u <- beta u + (x0 - x) / gamma; x <- x0 - alpha gamma u
                    for u, x0, p in zip(slow, start, params, strict=True):
                        u.mul_(beta).add_(x0 - p, alpha=1 / LR)
                    new = [x0.add(u, alpha=-lr * LR) for u, x0 in zip(slow, start, strict=True)]
                for p, x1 in zip(params, new, strict=True):
                    p.copy_(x1)
                start = [p.detach().clone() for p in params]
    return net


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("make", [sgd, momentum])
@pytest.mark.parametrize(
    ("mode", "given", "lr", "beta"),
    [
        ("diloco", {}, 0.7, 0.9),
        ("diloco", {"lr": 0.5, "momentum": 0.3}, 0.5, 0.3),
        ("slowmo", {}, 1.0, 0.5),
        ("slowmo", {"lr": 0.7, "momentum": 0.8}, 0.7, 0.8),
    ],
)
def test_the_outer_step_of_one_worker_is_the_paper_s(
    mode: str, given: dict[str, float], lr: float, beta: float, make: Make, size: int
) -> None:
    def program(communicator: Communicator) -> str:
        net = mlp()
        settings = {"mode": mode, "local": {"steps": 3}, "outer": given}
        train(communicator, net, make(net.parameters()), data(107), BATCH, EPOCHS, **settings)
        return sha(net)

    assert World(size).run(program) == [sha(outer_by_hand(make, mode, lr, beta))]


# Several workers.


def shards(n: int, workers: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Each worker's batches of an epoch, in order: worker k has items k, k + W, ..."""
    x, y = data(n, torch.float64)
    return [list(zip(x[k::workers].split(BATCH), y[k::workers].split(BATCH), strict=True)) for k in range(workers)]


def by_hand(
    make: Make,
    n: int,
    workers: int,
    steps: int,
    after: int = 0,
    mode: str = "local_sgd",
    lr: float = 1.0,
    beta: float = 0.0,
    uniform: bool = False,
) -> tuple[Tensor, int]:
    """All workers' models in one process: weights that are a mean by samples, or of all who have any, and rounds."""
    nets = [mlp().double() for _ in range(workers)]
    inner = [make(net.parameters()) for net in nets]
    w = weights(nets[0])
    u, rounds = torch.zeros_like(w), 0
    for _ in range(EPOCHS):
        left = [iter(batches) for batches in shards(n, workers)]
        while True:
            local, samples = [], []
            for net, optimizer, batches in zip(nets, inner, left, strict=True):
                seen = 0
                vector_to_parameters(w.clone(), net.parameters())
                for _, (x, y) in zip(range(1 if rounds < after else steps), batches, strict=False):
                    optimizer.zero_grad()
                    F.cross_entropy(net(x), y).backward()
                    optimizer.step()
                    seen += len(x)
                local.append(weights(net))
                samples.append(min(seen, 1) if uniform else seen)
            if not sum(samples):
                break
            rounds += 1
            delta = sum((s * (w - v) for s, v in zip(samples, local, strict=True)), torch.zeros(())) / sum(samples)
            if mode == "local_sgd":
                w = w - lr * delta
            elif mode == "slowmo":
                u = beta * u + delta / LR
                w = w - lr * LR * u
            else:
                u = beta * u + delta
                w = w - lr * (delta + beta * u)
    return w, rounds


def ours(communicator: Communicator, n: int, make: Make = sgd, **settings: Any) -> Tensor:
    net = mlp().double()
    train(communicator, net, make(net.parameters()), data(n, torch.float64), BATCH, EPOCHS, **settings)
    return weights(net)


ALGORITHMS = [
    ({"mode": "local_sgd", "local": {"steps": 3}}, {"steps": 3}),
    ({"mode": "local_sgd", "local": {"steps": 3, "after": 4}}, {"steps": 3, "after": 4}),
    ({"mode": "slowmo", "local": {"steps": 2}}, {"mode": "slowmo", "steps": 2, "beta": 0.5}),
    ({"mode": "diloco", "local": {"steps": 4}}, {"mode": "diloco", "steps": 4, "lr": 0.7, "beta": 0.9}),
    ({"mode": "diloco"}, {"mode": "diloco", "steps": 500, "lr": 0.7, "beta": 0.9}),
    ({"mode": "local_sgd", "local": {"steps": 2, "weights": "uniform"}}, {"steps": 2, "uniform": True}),
    (
        {"mode": "slowmo", "local": {"steps": 2, "weights": "uniform"}},
        {"mode": "slowmo", "steps": 2, "beta": 0.5, "uniform": True},
    ),
    (
        {"mode": "diloco", "local": {"steps": 3, "weights": "uniform"}},
        {"mode": "diloco", "steps": 3, "lr": 0.7, "beta": 0.9, "uniform": True},
    ),
]


@pytest.mark.parametrize("make", [sgd, momentum])
@pytest.mark.parametrize(("settings", "how"), ALGORITHMS, ids=str)
@pytest.mark.parametrize("n", [192, 230, 33])  # even shards; of 77, 77, 76 items; and of fewer than a batch
def test_several_workers_are_the_plain_loop(settings: dict[str, Any], how: dict[str, Any], make: Make, n: int) -> None:
    """Each worker's momentum is its own, and is not averaged."""
    expected, rounds = by_hand(make, n, 3, **how)
    results = World(4).run(lambda e: ours(e, n, make, **settings))
    assert_near(results[0], expected)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert [row["version"] for row in metrics(Path("run")) if row["samples"]][-1] == rounds
    assert_near(World(3).run(lambda e: ours(e, n, make, server_trains=True, **settings))[0], expected)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("settings", "how"), ALGORITHMS, ids=str)
def test_several_workers_over_mpi_are_the_plain_loop(settings: dict[str, Any], how: dict[str, Any]) -> None:
    results = on_mpi(lambda e: ours(e, 230, momentum, **settings))
    assert_near(results[0], by_hand(momentum, 230, len(results) - 1, **how)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_local_sgd_with_one_step_is_sync() -> None:
    one_step = World(4).run(lambda e: ours(e, 230, mode="local_sgd", local={"steps": 1}))[0]
    assert_near(one_step, World(4).run(lambda e: ours(e, 230, mode="sync"))[0])


def test_diloco_without_its_outer_step_is_local_sgd() -> None:
    plain_outer = {"outer": {"lr": 1.0, "momentum": 0.0}, "local": {"steps": 3}}
    diloco = World(4).run(lambda e: ours(e, 230, momentum, mode="diloco", **plain_outer))[0]
    assert_near(diloco, World(4).run(lambda e: ours(e, 230, momentum, mode="local_sgd", local={"steps": 3}))[0])


@pytest.mark.parametrize("rule", ["median", "krum", "trimmed"])
def test_rules_other_than_the_mean_take_changes(rule: str) -> None:
    """The same data on all workers: whatever the rule, their common change."""
    own = data(64, torch.float64)

    def program(communicator: Communicator, **settings: Any) -> Tensor:
        net = mlp().double()
        train(communicator, net, sgd(net.parameters()), own, BATCH, EPOCHS, shard=False, mode="local_sgd", **settings)
        return weights(net)

    assert_near(World(6).run(lambda e: program(e, rule=rule))[0], World(1).run(program)[0])


def test_clipping_is_of_each_local_step() -> None:
    net = mlp()
    optimizer = momentum(net.parameters())
    for x, y in in_order(data(107), BATCH, EPOCHS):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
    settings = {"mode": "local_sgd", "local": {"steps": 3}, "clip": 0.3}
    other = mlp()
    train(World(1).ends[0], other, momentum(other.parameters()), data(107), BATCH, EPOCHS, **settings)
    assert sha(other) == sha(net)


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_scheduler_is_the_workers(every: str) -> None:
    def trained(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: Any, batches: Any, step: Any) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in epochs:
            for x, y in batches():
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                step(loss)
                if every == "step":
                    scheduler.step()
            if every == "epoch":
                scheduler.step()

    net = mlp()
    optimizer = sgd(net.parameters())
    trained(net, optimizer, range(EPOCHS), lambda: in_order(data(107), BATCH, 1), lambda loss: optimizer.step())  # 7 batches

    def program(communicator: Communicator, plainly: bool) -> tuple[str, float]:
        net = mlp()
        optimizer = sgd(net.parameters())
        ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", mode="local_sgd", local={"steps": 3})
        step = (lambda loss: optimizer.step()) if plainly else ps.step
        trained(net, optimizer, ps.epochs(EPOCHS), lambda: ps.batches(data(107), BATCH, shuffle=False), step)
        return sha(net), metrics(Path("run"))[-1]["lr"]

    for size in (1, 2):
        for plainly in (False, True):
            ((found, lr),) = World(size).run(lambda e, plainly=plainly: program(e, plainly))
            assert found == sha(net)
            assert lr == pytest.approx(LR * 0.9 ** (EPOCHS - 1 if every == "epoch" else 7 * EPOCHS - 1))


# Checkpoints.


def resumable(communicator: Communicator, settings: dict[str, Any], **more: Any) -> str:
    net = cnn()
    train(communicator, net, momentum(net.parameters()), data(107), 8, EPOCHS, True, **settings, **more)
    return sha(net)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "local_sgd", "local": {"steps": 3}},
        {"mode": "slowmo", "local": {"steps": 2}},
        {"mode": "diloco", "local": {"steps": 2}, "server_trains": True},
    ],
    ids=lambda s: s["mode"],
)
def test_killed_and_resumed(settings: dict[str, Any], size: int) -> None:
    """With the momentum of each worker's optimizer."""
    settings = {**settings, "checkpoint": {"every": 2}}
    expected = World(size).run(lambda e: resumable(e, settings, run_dir="whole"))
    for call in range(8, 50, 13):
        world, folder = World(size, seed=call), f"killed-{call}"
        world.kill(call % size, call)
        try:
            world.run(lambda e, folder=folder: resumable(e, settings, run_dir=folder))
        except Killed:
            again = World(size).run(lambda e, folder=folder: resumable(e, settings, run_dir=folder, resume="auto"))
            assert again == expected, f"killed at call {call}"


@pytest.mark.parametrize("after", [2, 5])
def test_another_number_of_workers_goes_on(after: int) -> None:
    settings = {"mode": "local_sgd", "local": {"steps": 3}, "checkpoint": {"every": 2}}

    def some(communicator: Communicator) -> None:
        net = cnn()
        ps = mpips.connect(net, momentum(net.parameters()), communicator=communicator, run_dir="run", **settings)
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(107), 8):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
                if ps.round == 2:
                    ps.stop()

    World(3).run(some)
    results = World(after).run(lambda e: resumable(e, settings, resume="auto"))
    assert len(set(results)) == 1
    assert sum(row["samples"] for row in metrics(Path("run"))) == 107 * EPOCHS


# Dtypes and faults.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["local_sgd", "slowmo", "diloco", "fedavg", "fedadam"])
def test_16_bit_models_stay_near_their_32_bit_twins(mode: str, dtype: torch.dtype) -> None:
    def program(communicator: Communicator, dtype: torch.dtype) -> Tensor:
        net = mlp().to(dtype)
        steps = {"local": {"steps": 3}}
        train(communicator, net, sgd(net.parameters()), data(107, dtype), BATCH, EPOCHS, mode=mode, **steps)
        return weights(net).float()

    for size in (1, 3):
        close = World(size).run(lambda e: program(e, torch.float32))[0]
        results = World(size).run(lambda e: program(e, dtype))
        assert all(torch.equal(results[0], other) for other in results)
        assert (results[0] - close).norm() < 0.1 * (close - weights(mlp())).norm()


def poisoned(communicator: Communicator, at: int, mode: str, nonfinite: str) -> tuple[Tensor, float]:
    """Worker 0's gradient of its step `at` is not finite."""
    net, step = mlp().double(), 0
    settings: dict[str, Any] = {"run_dir": nonfinite, "mode": mode, "nonfinite": nonfinite, "local": {"steps": 3}}
    ps = mpips.connect(net, sgd, communicator=communicator, **settings)
    for _ in ps.epochs(2):
        for x, y in ps.batches(data(200, torch.float64), BATCH):
            loss = F.cross_entropy(net(x), y) * (float("nan") if step == at and ps.worker == 0 else 1.0)
            loss.backward()
            ps.step(loss)
            step += 1
    ps.close()
    return weights(net), ps.loss


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("mode", ["local_sgd", "slowmo", "diloco"])
def test_a_local_step_that_is_not_finite(mode: str, at: int, size: int) -> None:
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        World(size).run(lambda e: poisoned(e, at, mode, "raise"))
    for nonfinite in ("drop", "skip"):
        results = World(size).run(lambda e, how=nonfinite: poisoned(e, at, mode, how))
        assert all(torch.equal(results[0][0], other) for other, _ in results)
        assert results[0][0].isfinite().all()
        rows = metrics(Path(nonfinite))
        assert all(row["loss"] == row["loss"] for row in rows if row["samples"])
        assert Path(nonfinite, "events.jsonl").read_text().count("NaN or Inf") == 1


def test_a_bad_round_that_is_skipped_changes_nothing() -> None:
    def program(communicator: Communicator) -> tuple[Tensor, Tensor]:
        net = mlp().double()
        ps = mpips.connect(
            net, sgd, communicator=communicator, run_dir="run", mode="local_sgd", local={"steps": 2}, nonfinite="skip"
        )
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(32, torch.float64), BATCH):
                loss = F.cross_entropy(net(x), y) * (float("inf") if ps.round == 0 else 1)
                loss.backward()
                ps.step(loss)
        return weights(net), weights(mlp().double())

    for size in (1, 2):
        for got, start in World(size).run(program):
            assert (got - start).norm() > 0  # round 1 is taken, round 0 is not
        assert [row["version"] for row in metrics(Path("run"))][:2] == [0, 1]


def batches_until(ps: mpips.Run, given: Any, stop: int) -> Iterator[Any]:
    for number, batch in enumerate(ps.batches(given, BATCH, shuffle=False)):
        if number == stop:
            return
        yield batch


def test_local_steps_before_a_break_are_pushed() -> None:
    """5 of 7 batches: a round of 3 and one of 2."""
    net = mlp()
    expected = sha(plain(net, sgd(net.parameters()), iter(list(in_order(data(107), BATCH, 1))[:5])))

    def program(communicator: Communicator) -> str:
        net = mlp()
        ps = mpips.connect(net, sgd, communicator=communicator, run_dir="run", mode="local_sgd", local={"steps": 3})
        for _ in ps.epochs(1):
            for x, y in batches_until(ps, data(107), 5):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
        return sha(net)

    for size in (1, 2):
        assert World(size).run(program) == [expected]
