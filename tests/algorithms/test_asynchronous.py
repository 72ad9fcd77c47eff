"""The modes without rounds, through `connect`: identities, bounds, conservation, resume, deaths."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips import checkpoint
from mpips.comm import Communicator
from mpips.comm.simulated import Killed, World
from mpips.config import ConfigError
from tests.comm.test_mpi import as_simulated, on_mpi
from tests.helpers.programs import MODELS, OPTIMIZERS, data, in_order, metrics, mlp, plain, sha, train

EPOCHS = 10  # of 20 batches: 200 steps
INF = 10**9
ONE_WORKER: dict[str, dict[str, Any]] = {
    "async": {"mode": "async"},
    "inverse": {"mode": "async", "staleness": {"policy": "inverse"}},
    "dc": {"mode": "async", "staleness": {"policy": "dc"}},
    "dc-adaptive": {"mode": "async", "staleness": {"policy": "dc-adaptive"}},
    "ssp": {"mode": "ssp", "staleness": {"bound": 0}},
    "fedbuff": {"mode": "fedbuff", "local": {"steps": 4}, "staleness": {"buffer": 1}},
}
# --------------------------------------------------------------------------------------------- one worker is plain PyTorch


def one_worker(communicator: Communicator, model: str, optimizer: str, mode: str, epochs: int = EPOCHS) -> str:
    net = MODELS[model]()
    train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), data(), epochs=epochs, **ONE_WORKER[mode])
    return sha(net)


def plainly(model: str, optimizer: str, epochs: int = EPOCHS) -> str:
    net = MODELS[model]()
    return sha(plain(net, OPTIMIZERS[optimizer](net.parameters()), in_order(data(), 16, epochs)))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_worker_in_one_process_and_beside_a_server(model: str, optimizer: str) -> None:
    expected = plainly(model, optimizer)
    assert one_worker(World(1).ends[0], model, optimizer, "async") == expected
    assert World(2).run(lambda e: one_worker(e, model, optimizer, "async")) == [expected]


@pytest.mark.parametrize("mode", ONE_WORKER)
def test_one_worker_in_every_mode(mode: str) -> None:
    expected = plainly("cnn", "adam", 4)
    assert one_worker(World(1).ends[0], "cnn", "adam", mode, 4) == expected
    assert World(2).run(lambda e: one_worker(e, "cnn", "adam", mode, 4)) == [expected]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ONE_WORKER)
def test_one_worker_over_mpi(mode: str) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("one worker is 2 ranks")
    assert on_mpi(lambda e: one_worker(e, "cnn", "adam", mode, 4)) == [plainly("cnn", "adam", 4)] * 2


def test_a_worker_whose_updates_are_late_by_one_is_not_plain_but_itself() -> None:
    """With overlap gradient k is that at weights k - 2 steps: written down by hand."""

    def program(e: Communicator) -> str:
        net = mlp()
        train(e, net, OPTIMIZERS["sgd"](net.parameters()), data(), epochs=1, mode="async", overlap=True)
        return sha(net)

    net, stale = mlp(), mlp()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for x, y in in_order(data(), 16, 1):
        stale.zero_grad()
        F.cross_entropy(stale(x), y).backward()
        stale.load_state_dict(net.state_dict())
        for p, q in zip(net.parameters(), stale.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
    assert World(2).run(program) == [sha(net)]


def elastic(given: Any, tau: int, rate: float, epochs: int, momentum: float) -> tuple[list[Tensor], list[Tensor]]:
    """EASGD with one worker, algorithm 1, in plain torch; with momentum EAMSGD, where torch has x + delta v for x."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum, nesterov=momentum > 0)
    centre = [p.detach().clone() for p in net.parameters()]
    for step, (inputs, y) in enumerate(in_order(given, 16, epochs), 1):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), y).backward()
        ahead = [optimizer.state[p].get("momentum_buffer") for p in net.parameters()]  # of delta v, but for -lr delta
        both = zip((p.detach() for p in net.parameters()), ahead, strict=True)
        x = [p if b is None else p.add(b, alpha=0.05 * momentum) for p, b in both]
        pull = [(a - c) * rate for a, c in zip(x, centre, strict=True)]
        optimizer.step()
        if step % tau == 0:
            for p, c, d in zip(net.parameters(), centre, pull, strict=True):
                p.data -= d
                c += d
    return [p.detach() for p in net.parameters()], centre


def elastically(e: Communicator, mode: str, tau: int) -> list[Tensor]:
    """The centre, which a worker's model holds outside loops, and its own weights."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9 * (mode == "eamsgd"), nesterov=mode == "eamsgd")
    settings: dict[str, Any] = {"mode": mode, "local": {"steps": tau, "moving_rate": 0.3}}
    worker = train(e, net, optimizer, data(), epochs=EPOCHS, **settings)._worker
    own = [view.clone() for _, view in worker.replica.flat.named(worker.update._own)]
    return [*[p.detach().clone() for p in net.parameters()], *own]


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("mode", ["easgd", "eamsgd"])
def test_one_elastic_worker_is_the_algorithm_by_hand(mode: str, tau: int) -> None:
    own, centre = elastic(data(), tau, 0.3, EPOCHS, 0.9 * (mode == "eamsgd"))
    (worked,) = World(2).run(lambda e: elastically(e, mode, tau))
    for ours in (worked, elastically(World(1).ends[0], mode, tau)):
        assert all(torch.equal(a, b) for a, b in zip(ours, [*centre, *own], strict=True))


@pytest.mark.parametrize("tau", [1, 3])
def test_eamsgd_is_algorithm_2_of_the_paper(tau: int) -> None:
    """In its own words: v <- delta v - lr g(x + delta v), x <- x + v, and the spring pulls at x, not at x + delta v."""
    given, delta, lr, alpha = data(320, torch.float64), 0.9, 0.05, 0.3

    def program(e: Communicator) -> tuple[Tensor, Tensor]:
        net = mlp().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=delta, nesterov=True)
        ps = train(e, net, optimizer, given, epochs=3, mode="eamsgd", local={"steps": tau, "moving_rate": alpha})
        served = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        ps._worker.begin()
        return served, nn.utils.parameters_to_vector(net.parameters()).detach().clone()

    net = mlp().double()
    x = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    v, centre = torch.zeros_like(x), x.clone()
    for step, (inputs, labels) in enumerate(in_order(given, 16, 3), 1):
        nn.utils.vector_to_parameters(x + delta * v, net.parameters())
        net.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        pull = alpha * (x - centre) * (step % tau == 0)
        v = delta * v - lr * torch.cat([p.grad.flatten() for p in net.parameters()])
        x, centre = x + v - pull, centre + pull
    for ours, expected in zip(*World(2).run(program), (centre, x + delta * v), strict=True):
        assert torch.linalg.norm(ours - expected) <= 1e-12 * torch.linalg.norm(expected)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["easgd", "eamsgd"])
def test_one_elastic_worker_over_mpi(mode: str) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("one worker is 2 ranks")
    own, centre = elastic(data(), 3, 0.3, EPOCHS, 0.9 * (mode == "eamsgd"))
    _, worked = on_mpi(as_simulated(lambda e: elastically(e, mode, 3)))
    assert all(torch.equal(a, b) for a, b in zip(worked, [*centre, *own], strict=True))


# ------------------------------------------------------------------------------------------------------- several workers


def loop(e: Communicator, world: World, speeds: list[float], log: list[Any] | None = None, **settings: Any) -> Any:
    """A small float64 model on shards dealt out; virtual computing times differ. Returns the weights."""
    net, n = mlp().double(), settings.pop("n", 96)
    optimizer, step = settings.pop("optimizer", "sgd"), settings.pop("every", 1)
    x, y = data(n, torch.float64)
    ps = mpips.connect(net, OPTIMIZERS[optimizer](net.parameters()), communicator=e, **{"run_dir": "run", **settings})
    chance, number = random.Random(e.rank), 0
    for epoch in ps.epochs(settings.get("epochs", 2)):
        for a, b, which in ps.batches((x, y, torch.arange(n)), 4):
            world.sleep(e.rank, speeds[e.rank] * chance.uniform(0.5, 1.5))
            if log is not None:
                log.append((epoch, e.rank, which.tolist()))
            loss = F.cross_entropy(net(a), b)
            loss.backward()
            number += 1
            if number % step == 0:
                ps.step(loss)
        ps.validate(lambda: 0.0)
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def done() -> dict[str, Any]:
    """What the server says at the end of the run."""
    found: dict[str, Any] = json.loads(Path("run/DONE").read_text())
    return found


SPEEDS = [0.0, 1.0, 3.0, 0.2, 0.7]
SEVERAL: list[dict[str, Any]] = [
    {"mode": "async"},
    {"mode": "async", "overlap": True},
    {"mode": "async", "staleness": {"policy": "dc"}},
    {"mode": "async", "every": 3},
    {"mode": "ssp", "staleness": {"bound": 1}},
    {"mode": "ssp", "staleness": {"bound": 2}, "overlap": True},
    {"mode": "fedbuff", "staleness": {"buffer": 3}, "local": {"steps": 2}},
    {"mode": "easgd", "local": {"steps": 2}},
    {"backup_workers": 1},
]


@pytest.mark.parametrize("settings", SEVERAL, ids=str)
def test_each_batch_of_an_epoch_is_dealt_exactly_once(settings: dict[str, Any]) -> None:
    log: list[Any] = []
    world = World(5, seed=3)
    world.run(lambda e: loop(e, world, SPEEDS, log, **settings))
    for epoch in range(2):
        assert sorted(i for at, _, which in log if at == epoch for i in which) == list(range(96))
    if settings == {"mode": "async"}:
        shares = Counter(rank for _, rank, _ in log)
        assert shares[3] > 3 * shares[2], "a slow worker takes fewer"


def test_no_bound_is_async_and_no_compensation_is_none() -> None:
    def weights(**settings: Any) -> Tensor:
        world = World(5, seed=1)
        first, *others = world.run(lambda e: loop(e, world, SPEEDS, **settings))
        assert all(torch.equal(first, other) for other in others), "between loops the workers have the server's"
        return first

    expected = weights(mode="async")
    assert torch.equal(weights(mode="ssp", staleness={"bound": INF}), expected)
    assert torch.equal(weights(mode="async", staleness={"policy": "dc", "strength": 0.0}), expected)
    assert not torch.equal(weights(mode="async", staleness={"policy": "dc", "strength": 5.0}), expected)


@pytest.mark.parametrize("policy", ["dc", "dc-adaptive"])
def test_compensation_of_what_is_maximized_is_that_of_minus_it(policy: str) -> None:
    """Every gradient, every correction and every step is minus the other's: the same weights, bit for bit."""
    settings: dict[str, Any] = {"mode": "async", "staleness": {"policy": policy, "strength": 5.0}}

    def program(e: Communicator, sign: int, world: World) -> Tensor:
        net = mlp().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, maximize=sign < 0)
        ps = mpips.connect(net, optimizer, communicator=e, run_dir="run", **settings)
        for x, y in ps.batches(data(96, torch.float64), 4):
            world.sleep(e.rank, SPEEDS[e.rank])
            loss = sign * F.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss)
        ps.close()
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    worlds = {sign: World(5, seed=1) for sign in (1, -1)}
    down, up = (world.run(lambda e, s=sign, w=world: program(e, s, w))[0] for sign, world in worlds.items())
    assert torch.equal(down, up)


def test_compensation_that_would_have_two_signs_is_refused() -> None:
    net = mlp()
    first, *rest = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "maximize": True}, {"params": rest}], lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizer: given another with staleness\.policy dc, allowed: one whose groups all"):
        train(World(1).ends[0], net, optimizer, data(), mode="async", staleness={"policy": "dc"})


@pytest.mark.parametrize("seed", range(3))
def test_ssp_without_slack_is_a_round_of_all(seed: int) -> None:
    """n pushes of lr / n, one after another, are one step with the mean gradient."""
    workers, (x, y) = 3, data(96, torch.float64)
    world = World(1 + workers, seed=seed)

    def program(e: Communicator) -> Tensor:
        net = mlp().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3 / workers)
        ps = mpips.connect(net, optimizer, communicator=e, mode="ssp", staleness={"bound": 0}, run_dir="run")
        mine = tuple(t[ps.worker :: workers] for t in (x, y))
        for a, b in ps.batches(mine, 4, shuffle=False, shard=False):
            world.sleep(e.rank, SPEEDS[e.rank])
            loss = F.cross_entropy(net(a), b)
            loss.backward()
            ps.step(loss)
        ps.close()
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    net = mlp().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for step in range(8):
        optimizer.zero_grad()
        for k in range(workers):
            part = slice(4 * step, 4 * step + 4)
            (F.cross_entropy(net(x[k::workers][part]), y[k::workers][part]) / workers).backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(net.parameters()).detach()
    for result in world.run(program):
        assert torch.linalg.norm(result - expected) <= 1e-12 * torch.linalg.norm(expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_ssp(seed: int, overlap: bool) -> None:
    """Random speeds, and shards of different lengths, so that workers end early. Each push adds 1 to its worker's own weight:
    what a worker reads tells how many pushes of each other it contains."""
    chance = random.Random(seed)
    workers, bound = 4, chance.choice([1, 2, 4] if overlap else [0, 1, 3])
    lengths = [chance.randint(2, 25) for _ in range(workers)]
    world = World(1 + workers, seed=seed)
    clocks = [0] * workers  # updates begun by each; INF when it has ended
    widest = 0

    def program(e: Communicator) -> None:
        nonlocal widest
        net = nn.Linear(1, workers, bias=False)
        nn.init.zeros_(net.weight)
        settings: dict[str, Any] = {"mode": "ssp", "staleness": {"bound": bound}, "overlap": overlap}
        ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=1.0), communicator=e, run_dir="run", **settings)
        me = e.rank - 1
        mine = (torch.zeros(lengths[me], 1),)
        for number, _ in enumerate(ps.batches(mine, 1, shuffle=False, shard=False)):
            clocks[me] = number
            widest = max(widest, number - min(clocks))
            assert number - min(clocks) <= bound
            seen = net.weight.view(-1).tolist()
            for other in range(workers):
                assert seen[other] >= min(number - bound, lengths[other]), "a read contains all old updates"
            world.sleep(e.rank, chance.expovariate(1.0) * (1 + 5 * (me == 0)))
            (-net.weight[me]).sum().backward()
            clocks[me] = number + 1 if number + 1 < lengths[me] else INF
            ps.step(0.0, 1)
        ps.close()
        assert net.weight.view(-1).tolist() == lengths

    world.run(program)
    assert widest >= min(bound, 1), "somebody has been ahead"


def test_a_shorter_loop_leaves_no_worker_behind_in_the_next() -> None:
    """Clocks are level where a loop begins: else the one with fewer pushes would hold the others in the next."""

    def program(e: Communicator) -> Any:
        net = nn.Linear(1, 1)
        ps = mpips.connect(
            net, torch.optim.SGD(net.parameters(), lr=0.0), communicator=e, mode="ssp", staleness={"bound": 1}, run_dir="run"
        )
        order = []
        for length in (1, 20), (20, 20):
            for _ in ps.batches((torch.zeros(length[e.rank - 1], 1),), 1, shard=False):
                world.sleep(e.rank, 1.0)
                net(torch.zeros(1, 1)).sum().backward()
                ps.step(0.0, 1)
                order.append(e.clock())
        ps.close()
        return order

    world = World(3)
    first, second = world.run(program)
    assert second[22] - second[19] < 5, "the second worker is not held until the first has caught up"
    assert len(first) == 21


@pytest.mark.parametrize("backup", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_backup_workers(seed: int, backup: int) -> None:
    """The first n - b of each version count, as a mean weighted by samples; what comes later is discarded."""
    workers, steps = 4, 6
    world = World(1 + workers, seed=seed)
    speeds = [0.0, 1.0, 1.1, 1.2, 40.0]

    def program(e: Communicator) -> Any:
        net = nn.Linear(1, workers, bias=False).double()
        nn.init.zeros_(net.weight)
        settings: dict[str, Any] = {"backup_workers": backup} if backup else {"mode": "sync"}
        ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=1.0), communicator=e, run_dir="run", **settings)
        me = e.rank - 1
        for _ in ps.batches((torch.zeros(steps, 1),), 1, shard=False):
            world.sleep(e.rank, speeds[e.rank])
            (-net.weight[me]).sum().backward()
            ps.step(0.0, samples=e.rank)
        ps.close()
        return net.weight.view(-1).tolist()

    weights, said = world.run(program)[0], done()
    if not backup:
        assert weights == pytest.approx([steps * k / 10 for k in (1, 2, 3, 4)])
        return
    counted = [k for k in (1, 2, 3, 4) if k <= workers - backup]
    if backup == 1:  # three are nearly as fast as each other, the fourth is never in time but for the end, when it is alone
        share = [k / sum(counted) for k in counted]
        assert weights[:3] == pytest.approx([steps * s for s in share])
        assert said["rejected"] >= 1
    assert said["staleness"].keys() == {"0"}
    assert said["staleness"]["0"] + said["rejected"] == workers * steps


@pytest.mark.parametrize("seed", range(4))
def test_equal_speeds_with_a_backup_worker(seed: int) -> None:
    world = World(4, seed=seed, latency=0.0, bandwidth=float("inf"))
    results = world.run(lambda e: loop(e, world, [0.0] * 4, backup_workers=1))
    assert all(torch.isfinite(weights).all() for weights in results)
    assert done()["staleness"]["0"] + done()["rejected"] == 48


def test_fedbuff_steps_with_the_mean_of_k_scaled_changes() -> None:
    """Every local step adds 1 to the worker's own weight; three workers, two steps a push, K = 3."""
    world = World(4)

    def program(e: Communicator) -> Any:
        net = nn.Linear(1, 3, bias=False).double()
        nn.init.zeros_(net.weight)
        settings: dict[str, Any] = {"mode": "fedbuff", "staleness": {"buffer": 3}, "local": {"steps": 2}}
        ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=1.0), communicator=e, run_dir="run", **settings)
        for _ in ps.batches((torch.zeros(4, 1),), 1, shard=False):
            (-net.weight[e.rank - 1]).sum().backward()
            ps.step(0.0, 1)
        ps.close()
        return net.weight.view(-1).tolist()

    weights, said = world.run(program)[0], done()
    # a worker that pushes twice before the buffer is full has staleness 0 both times; the last of the round may have 1
    shares = sum(n / (1 + int(late)) ** 0.5 for late, n in said["staleness"].items())
    assert sum(weights) == pytest.approx(2 * shares / 3)
    assert said["versions"] == 2


def centre_and_own(alpha: float, lr: float, steps: int, workers: int = 1, tau: int = 1, seed: int = 0) -> list[list[float]]:
    """EASGD on F = x^2 / 2 from x = (1 + rank), the centre at 1: each worker's weight after every push, then the centre."""
    world = World(1 + workers, seed=seed)

    def program(e: Communicator) -> list[float]:
        net = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(net.weight)
        settings: dict[str, Any] = {"mode": "easgd", "local": {"steps": tau, "moving_rate": alpha}}
        ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=lr), communicator=e, run_dir="run", **settings)
        seen = []
        net.weight.data.fill_(1.0 + e.rank)
        for _ in ps.batches((torch.zeros(steps, 1),), 1, shard=False):
            world.sleep(e.rank, random.Random(e.rank).random())
            loss = net.weight.square().sum() / 2
            loss.backward()
            ps.step(loss, 1)
            seen.append(net.weight.item())
        ps.close()
        return [*seen, net.weight.item()]

    return world.run(program)


@pytest.mark.parametrize(("lr", "alpha"), [(0.5, 0.1), (1.0, 0.6), (1.9, 0.0), (0.1, 0.95), (1.5, 0.3), (1.5, 0.5), (1.9, 0.2)])
def test_the_stability_region_of_easgd(lr: float, alpha: float) -> None:
    """The iterates are powers of a matrix; they shrink where 0 <= alpha <= (4 - 2 lr) / (4 - lr), and grow elsewhere."""
    matrix = torch.tensor([[1 - lr - alpha, alpha], [alpha, 1 - alpha]], dtype=torch.float64)
    state, steps = torch.tensor([2.0, 1.0], dtype=torch.float64), 150
    ((*worked, served),) = centre_and_own(alpha, lr, steps)
    for own in worked:
        state = matrix @ state
        assert own == pytest.approx(float(state[0]), rel=1e-9, abs=1e-12)
    assert served == pytest.approx(float(state[1]), rel=1e-9, abs=1e-12)
    if alpha:  # else the centre stays
        assert (abs(worked[-1]) < 1) == (alpha < (4 - 2 * lr) / (4 - lr))


@pytest.mark.parametrize("seed", range(3))
def test_easgd_conserves_the_sum_of_all_weights(seed: int) -> None:
    results = centre_and_own(0.3, 0.0, 30, workers=3, tau=2, seed=seed)
    (centre,) = {served for *_, served in results}
    assert centre + sum(worked[-1] for *worked, _ in results) == pytest.approx(1 + 2 + 3 + 4, rel=1e-12)
    assert results[0][-2] != 2


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", ["easgd", "eamsgd"])
def test_between_loops_elastic_workers_have_the_centre(mode: str, size: int) -> None:
    """The server's weights and statistics are measured, seen and saved; a worker goes on from its own, however often."""
    settings: dict[str, Any] = {"mode": mode, "local": {"steps": 3}}

    def program(e: Communicator, calls: int) -> list[Any]:
        net, between = MODELS["cnn"](), []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9 * (mode == "eamsgd"), nesterov=mode == "eamsgd")
        ps = mpips.connect(net, optimizer, communicator=e, run_dir=f"run-{calls}", **settings)

        def measure() -> float:
            between.append(sha(net))
            return 0.0

        for _ in ps.epochs(3):
            x, y = (part[ps.worker :: ps.workers] for part in data(96))
            for a, b in ps.batches((x, y), 4, shard=False):
                loss = F.cross_entropy(net(a), b)
                loss.backward()
                ps.step(loss)
                inside = sha(net)
            seen = sha(net)
            assert seen != inside
            for _ in range(calls):
                ps.validate(measure)
                ps.save()
                assert sha(net) == seen
            assert all(measured == seen for measured in between)
            between.clear()
        served = {name: value.clone() for name, value in net.state_dict().items()}
        ps._worker.begin()
        return [served, sha(net)]

    first: list[str] = []
    for calls in (0, 2):
        world = World(size, seed=calls)
        results = world.run(lambda e, calls=calls: program(e, calls))
        newest = checkpoint.newest(Path(f"run-{calls}/checkpoints"))
        assert newest is not None
        tree = checkpoint.load(newest)
        for served, _ in results:
            assert all(torch.equal(value, (tree["parameters"] | tree["buffers"])[name]) for name, value in served.items())
        assert len({own for _, own in results}) == max(1, size - 1)
        first.append(results[0][1])
    assert size > 2 or first[0] == first[1]  # of several the order of arrival is the schedule's


# ------------------------------------------------------------------------------------------------------ resume and death


def spared(
    settings: dict[str, Any], folder: str, seed: int, size: int = 4, kill: tuple[int, int] | None = None, **more: Any
) -> Any:
    world = World(size, seed=seed)
    if kill:
        world.kill(*kill)
    return world.run(lambda e: loop(e, world, SPEEDS, **{"n": 64, "run_dir": folder, **settings, **more}))


@pytest.mark.parametrize("settings", SEVERAL, ids=str)
def test_killed_at_any_call_and_resumed(settings: dict[str, Any]) -> None:
    """A death leaves an error on every rank and never a hang. Resumed, the run ends with each batch of each epoch pushed once:
    samples in metrics.csv are those of the run that nobody killed."""
    given = settings | {"checkpoint": {"every": 7}}
    spared(given, "whole", 1)
    samples = Counter[int]()
    for row in metrics(Path("whole")):
        samples[int(row["epoch"])] += int(row["samples"])
    if "every" not in settings and settings.get("mode") != "easgd":  # which leave some for the next epoch
        assert set(samples.values()) == {64}
    for turn, call in enumerate(range(13, 120, 45)):
        folder = f"killed-{call}"
        try:
            spared(given, folder, turn, kill=(turn % 4, call))
        except Killed:
            spared(given, folder, turn + 50, resume="auto")
        again = Counter[int]()
        for row in metrics(Path(folder)):
            again[int(row["epoch"])] += int(row["samples"])
        if "every" not in settings and settings.get("mode") != "easgd":
            assert again == samples, f"killed at call {call}"


@pytest.mark.parametrize("settings", SEVERAL, ids=str)
@pytest.mark.parametrize("how", ["preempt", "stop"])
def test_interrupted_and_resumed_uses_each_batch_once(settings: dict[str, Any], how: str) -> None:
    """Also with gradients accumulated over several batches, local steps, and an update under way."""
    given = {k: v for k, v in settings.items() if k != "every"}
    every, used = settings.get("every", 1), []

    def program(e: Communicator, at: int, **more: Any) -> None:
        net = mlp()
        ps = mpips.connect(net, torch.optim.SGD(net.parameters(), lr=0.01), communicator=e, run_dir="run", **given, **more)
        x, y = data(64)
        pending: list[int] = []
        number = 0
        for _ in ps.epochs(1):
            for a, b, which in ps.batches((x, y, torch.arange(64)), 4):
                world.sleep(e.rank, SPEEDS[e.rank])
                loss = F.cross_entropy(net(a), b)
                loss.backward()
                number += 1
                pending += which.tolist()
                if number == at and e.rank == 3:
                    (ps.preempt if how == "preempt" else ps.stop)()
                if number % every == 0:
                    used.extend(pending)
                    pending.clear()
                    ps.step(loss)

    world = World(4, seed=2)
    try:
        world.run(lambda e: program(e, 2))
    except SystemExit as status:
        assert how == "preempt"
        assert status.code == 75
    newest = checkpoint.newest(Path("run/checkpoints"))
    assert newest is not None
    before = sum(row["samples"] for row in metrics(Path("run")))
    assert before < 64
    world = World(4, seed=5)
    world.run(lambda e: program(e, -1, resume="auto"))
    if every == 1 and settings.get("mode") != "easgd":  # which tells of its samples with the next pull on the spring
        assert sum(row["samples"] for row in metrics(Path("run"))) == 64
        if not settings.get("overlap"):
            assert sorted(used) == list(range(64))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("mode", ["async", "dc-adaptive", "fedbuff", "easgd"])
def test_resume_of_one_worker_is_exact(mode: str, size: int) -> None:
    """Nothing is under way when a checkpoint is written, and what follows a step is done, with the weights that came of it."""
    settings = {**ONE_WORKER, "easgd": {"mode": "easgd", "local": {"steps": 3}}}[mode]

    def run(folder: str, **more: Any) -> list[str]:
        def program(e: Communicator) -> str:
            net = MODELS["cnn"]()
            averaged = torch.optim.swa_utils.AveragedModel(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
            ps = mpips.connect(net, optimizer, communicator=e, run_dir=folder, **settings, **more)
            ps.keep(averaged=averaged)
            for _ in ps.epochs(2):
                for x, y in ps.batches(data(80), 8):
                    loss = F.cross_entropy(net(x), y)
                    loss.backward()
                    ps.step(loss)
                    scheduler.step()
                    averaged.update_parameters(net)
            return sha(net) + sha(averaged)

        return World(size).run(program)

    expected = run("whole", checkpoint={"every": 1, "keep": 99})
    assert run("seldom") == expected
    files = sorted(Path("whole/checkpoints").glob("*.h5"))
    assert len(files) >= 5
    for file in files[:: max(1, len(files) // 6)]:
        assert run(f"from-{file.stem}", resume=str(file)) == expected, file.stem


@pytest.mark.parametrize("shard", [True, False])
def test_resume_with_an_update_under_way_takes_each_batch_once(shard: bool) -> None:
    """What was computed beside a push is in the checkpoint; another number of workers computes it again."""

    def run(folder: str, workers: int = 1, **more: Any) -> float:
        def program(e: Communicator) -> float:
            net = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(net.weight)
            made = torch.optim.SGD(net.parameters(), lr=1.0)
            ps = mpips.connect(net, made, communicator=e, run_dir=folder, mode="async", overlap=True, **more)
            for _ in ps.epochs(1):
                for (x,) in ps.batches((torch.ones(12, 1),), 1, shard=shard):
                    (-net(x)).sum().backward()
                    ps.step(0.0)
            return net.weight.item()

        return World(1 + workers).run(program)[0]

    for workers in (1, 2) if shard else (1,):
        assert run(f"whole-{workers}", workers, checkpoint={"every": 1, "keep": 99}) == 12
        files = sorted(Path(f"whole-{workers}/checkpoints").glob("*.h5"))
        assert len(files) == 12 // workers
        for file in files:
            for now in (1, 2, 3) if shard else (1,):
                assert run(f"{workers}-{now}-{file.stem}", now, resume=str(file)) == 12, (workers, now, file.stem)


@pytest.mark.parametrize("policy", ["none", "dc-adaptive"])
@pytest.mark.parametrize(("shard", "every"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_resume_of_one_worker_with_overlap_is_exact(policy: str, shard: bool, every: int) -> None:
    """Late gradients stay as late as they were, and so do random streams, statistics and accumulated gradients."""
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = inputs, inputs.sum(1, keepdim=True), torch.arange(40)

    def run(folder: str, **more: Any) -> list[torch.Tensor]:
        def program(e: Communicator) -> list[torch.Tensor]:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
            made = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
            given = {"mode": "async", "overlap": True, "staleness": {"policy": policy}}
            ps = mpips.connect(net, made, communicator=e, run_dir=folder, **given, **more)
            for _ in ps.epochs(2):
                for x, y, item in ps.batches(everything, 4, shard=shard, shuffle=every == 1):
                    F.mse_loss(net(x), y).backward()
                    if (int(item[0]) // 4 + 1) % every == 0:
                        made.step()
                        made.zero_grad()
            return [value.detach().clone() for value in net.state_dict().values()]

        return World(2).run(program)[0]

    whole = run("whole", checkpoint={"every": 1, "keep": 99})
    seldom = run("seldom", checkpoint={"every": 0})
    assert all(map(torch.equal, whole, seldom)), "the checkpoints have changed the run"
    files = sorted(Path("whole/checkpoints").glob("*.h5"))
    assert len(files) == 20 // every
    for file in files[:: 6 // every]:
        assert all(map(torch.equal, whole, run(f"from-{file.stem}", resume=str(file)))), file.stem


def test_nothing_is_late_in_one_process() -> None:
    world = World(1)
    world.run(lambda e: loop(e, world, [0.0], mode="fedbuff", staleness={"buffer": 3}, local={"steps": 2}))
    assert done()["staleness"] == {"0": 24}


def test_the_histogram_of_staleness_is_reported() -> None:
    world = World(5, seed=3)
    world.run(lambda e: loop(e, world, SPEEDS, mode="async"))
    found = done()["staleness"]
    assert list(found) == sorted(found, key=int)
    assert sum(found.values()) == 48
    assert max(map(int, found)) > 1


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("settings", SEVERAL, ids=str)
def test_every_mode_over_mpi(settings: dict[str, Any]) -> None:
    """With checkpoints on the way and a stop by one worker: all ranks end."""

    def program(e: Communicator) -> str:
        given, net = dict(settings), MODELS["cnn"]()
        every = given.pop("every", 1)
        run = f"run-{SEVERAL.index(settings)}"
        ps = mpips.connect(
            net, torch.optim.SGD(net.parameters(), lr=0.01), communicator=e, run_dir=run, checkpoint={"every": 3}, **given
        )
        for epoch in ps.epochs(3):
            for number, (x, y) in enumerate(ps.batches(data(96), 4), 1):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if number % every == 0:
                    ps.step(loss)
                if epoch == 1 and e.rank == 1 and number == 3:
                    ps.stop()
            ps.validate(lambda: 0.5)
        return ps.stopping

    _, *results = on_mpi(as_simulated(program))
    assert set(results) in ({"requested"}, {""}), "all workers say the same"
