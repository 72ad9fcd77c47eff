"""Streaming DiLoCo against the algorithm written out by hand, its promises about traffic, and its checkpoints."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import mpips
from mpips import checkpoint
from mpips.algorithms import modes
from mpips.algorithms.modes import choose_mode, make_update
from mpips.algorithms.streaming_diloco import Streaming
from mpips.comm import Communicator
from mpips.comm.simulated import Killed, World
from mpips.config import ConfigError, resolve
from mpips.model.message import Control, NonFiniteError, Replica, replicate
from mpips.optim.flat_optimizer import FlatOptimizer
from tests.comm.test_mpi import as_simulated, on_mpi
from tests.helpers.programs import MODELS, Data, cnn, data, metrics, mlp, sha, train

Make = Callable[[Any], torch.optim.Optimizer]
BATCH, EPOCHS, STEPS = 16, 3, 4


def weights(net: nn.Module) -> Tensor:
    return parameters_to_vector(net.parameters()).detach().clone()


def momentum(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.05, momentum=0.9)


def adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=0.01)


def settings(fragments: int = 1, delay: int = 0, mix: float = 0.0, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    local = {"steps": steps, "fragments": fragments, "delay": delay, "mix": mix}
    return {"mode": "diloco", "local": local, **more}


# Identities.


@pytest.mark.parametrize("kind", ["diloco", "slowmo"])
@pytest.mark.parametrize(("size", "more"), [(1, {}), (2, {}), (4, {}), (3, {"server_trains": True})])
def test_one_fragment_taken_up_at_once_is_the_mode_itself(
    kind: str, size: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(communicator: Communicator) -> str:
        net = cnn()
        given = settings(**more) | {"mode": kind}
        ps = train(communicator, net, momentum(net.parameters()), data(107), 8, EPOCHS, **given)
        assert isinstance(ps._worker.update, Streaming) == streams
        return sha(net)

    streams = False
    expected = World(size).run(program)
    streams = True
    monkeypatch.setitem(modes.MODES, kind, dataclasses.replace(modes.MODES[kind], update=Streaming))
    assert World(size).run(program) == expected


# The algorithm by hand.


def split(params: list[nn.Parameter], count: int) -> list[slice]:
    """The parameters of each fragment: those of `mlp`, of 33 x 12, 33, 5 x 33 and 5 elements."""
    assert [p.numel() for p in params] == [396, 33, 165, 5]
    return {
        1: [slice(0, 4)],
        2: [slice(0, 1), slice(1, 4)],
        3: [slice(0, 1), slice(1, 2), slice(2, 4)],
        4: [slice(k, k + 1) for k in range(4)],
    }[count]


class ByHand:
    """The server and its workers in one process; a worker that has no batch left waits for the others, taking up results."""

    def __init__(
        self, make: Make, shards: list[list[Data]], fragments: int, delay: int, mix: float, steps: int, dtype: torch.dtype
    ) -> None:
        self.nets = [mlp().to(dtype) for _ in shards]
        self.inner = [make(net.parameters()) for net in self.nets]
        self.server = mlp().to(dtype)
        self.outer = torch.optim.SGD(self.server.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        self.shards, self.delay, self.mix = shards, delay, mix
        self.between = -(-steps // fragments)
        self.parts = split(list(self.server.parameters()), fragments)
        self.due: list[dict[int, int]] = [{} for _ in shards]  # of each worker: fragment -> steps
        self.unsent = [[0] * fragments for _ in shards]  # samples
        self.rounds = 0
        self.passed: list[Tensor] = []  # the server's weights after each round

    @torch.no_grad()
    def take_up(self, k: int) -> None:
        mine, theirs = list(self.nets[k].parameters()), list(self.server.parameters())
        for fragment in [f for f, steps in self.due[k].items() if steps == 0]:
            del self.due[k][fragment]
            for p, q in zip(mine[self.parts[fragment]], theirs[self.parts[fragment]], strict=True):
                p.copy_(self.mix * p + (1 - self.mix) * q)

    def step(self, k: int, batch: Data) -> None:
        self.inner[k].zero_grad()
        F.cross_entropy(self.nets[k](batch[0]), batch[1]).backward()
        self.inner[k].step()
        self.unsent[k] = [n + len(batch[0]) for n in self.unsent[k]]
        self.due[k] = {f: steps - 1 for f, steps in self.due[k].items()}
        self.take_up(k)

    @torch.no_grad()
    def round(self, active: list[int]) -> None:
        fragment = self.rounds % len(self.parts)
        part, self.rounds = self.parts[fragment], self.rounds + 1
        self.outer.zero_grad()
        shares = {k: self.unsent[k][fragment] for k in active}
        for k in active:
            self.unsent[k][fragment] = 0
        whole = sum(shares.values())
        for i, q in list(enumerate(self.server.parameters()))[part]:
            changes = [(n, q - list(self.nets[k].parameters())[i]) for k, n in shares.items()]
            one = changes[0][1] if len(self.nets) == 1 else sum((n * d for n, d in changes), torch.zeros_like(q)) / whole
            q.grad = one
        self.outer.step()
        self.passed.append(weights(self.server))
        for k in range(len(self.nets)):
            self.due[k].setdefault(fragment, self.delay)
            self.take_up(k)

    def run(self, epochs: int = EPOCHS) -> ByHand:
        for _ in range(epochs):
            left = [iter(shard) for shard in self.shards]
            while True:
                active = []
                for k, batches in enumerate(left):
                    taken = [self.step(k, batch) for _, batch in zip(range(self.between), batches, strict=False)]
                    active += [k] if taken else []
                if not active:
                    break
                self.round(active)
        return self


def shards(n: int, workers: int, dtype: torch.dtype) -> list[list[Data]]:
    """Each worker's batches of an epoch: worker k has items k, k + W, ..."""
    x, y = data(n, dtype)
    return [list(zip(x[k::workers].split(BATCH), y[k::workers].split(BATCH), strict=True)) for k in range(workers)]


class Seen:
    """What one rank had during a run: its anchor and the model after each round, its own weights at the end."""

    def __init__(self, communicator: Communicator, make: Make, n: int, dtype: torch.dtype, **given: Any) -> None:
        self.anchors: list[Tensor] = []
        net = mlp().to(dtype)
        ps = mpips.connect(net, make, communicator=communicator, **{"run_dir": "run", **given})
        worker, start = ps._worker, 0
        update = worker.update
        assert isinstance(update, Streaming)
        received = update.received

        def note() -> None:
            received()
            if update.replica.pull.control.round > len(self.anchors):  # not where all only wait
                self.anchors.append(flat(update.replica, update.anchor))

        update.received = note  # type: ignore[method-assign]
        for _ in ps.epochs(EPOCHS):
            for x, y in ps.batches(data(n, dtype), BATCH, shuffle=False):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss, samples=len(x))
            assert ps.round > start
            start = ps.round
            self.outside = weights(net)  # of the server, on all ranks
        worker.begin()
        self.own = weights(net)
        update.park()
        self.final = weights(net)


def flat(replica: Replica, whole: Tensor) -> Tensor:
    return torch.cat([view.reshape(-1) for _, view in replica.flat.named(whole)])


CASES = [(1, 2, 0.0), (2, 0, 0.0), (2, 2, 0.0), (2, 0, 0.5), (2, 2, 0.5), (3, 0, 0.0), (3, 2, 0.5), (3, 5, 0.0)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize(("fragments", "delay", "mix"), CASES)
def test_one_worker_is_the_algorithm_bit_for_bit(fragments: int, delay: int, mix: float, make: Make, size: int) -> None:
    """7 batches an epoch: its last round comes early. 3 fragments are sent every 2 steps: 4 / 3, rounded up."""
    hand = ByHand(make, shards(107, 1, torch.float32), fragments, delay, mix, STEPS, torch.float32).run()
    results = World(size).run(lambda e: Seen(e, make, 107, torch.float32, **settings(fragments, delay, mix)))
    worker = results[-1]
    assert len(worker.anchors) == hand.rounds
    for number, (ours, theirs) in enumerate(zip(worker.anchors, hand.passed, strict=True)):
        assert torch.equal(ours, theirs), f"round {number}"
    assert torch.equal(worker.own, weights(hand.nets[0]))
    for seen in results:
        assert torch.equal(seen.final, hand.passed[-1])
        assert torch.equal(seen.outside, hand.passed[-1])


def assert_near(a: Tensor, b: Tensor) -> None:
    assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


def assert_several(results: list[Seen], workers: int, n: int, fragments: int, delay: int, mix: float) -> None:
    hand = ByHand(momentum, shards(n, workers, torch.float64), fragments, delay, mix, STEPS, torch.float64).run()
    at_work = results[len(results) - workers :]
    for k, seen in enumerate(at_work):
        assert len(seen.anchors) == hand.rounds
        for ours, theirs in zip(seen.anchors, hand.passed, strict=True):
            assert_near(ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(seen.anchors, at_work[0].anchors, strict=True))
        assert_near(seen.own, weights(hand.nets[k]))
    for seen in results:
        assert torch.equal(seen.final, at_work[0].anchors[-1])
        assert torch.equal(seen.outside, seen.final)


@pytest.mark.parametrize(("fragments", "delay", "mix"), [(1, 2, 0.0), (2, 0, 0.0), (2, 3, 0.5), (3, 2, 0.5), (4, 0, 0.3)])
@pytest.mark.parametrize("n", [192, 194, 97])  # of 4 batches each; of 5, 5, 4; of 3, 2, 2: some wait for the others
@pytest.mark.parametrize("trains", [False, True])
def test_several_workers_are_the_algorithm(n: int, fragments: int, delay: int, mix: float, trains: bool) -> None:
    """Every rank's anchor is the server's weights, and a worker's own are those of the worker by hand."""
    given = settings(fragments, delay, mix, server_trains=trains)
    results = World(3 if trains else 4).run(lambda e: Seen(e, momentum, n, torch.float64, **given))
    assert_several(results, 3, n, fragments, delay, mix)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("trains", "fragments", "delay", "mix"), [(False, 3, 2, 0.5), (True, 2, 0, 0.0)])
def test_several_workers_over_mpi_are_the_algorithm(trains: bool, fragments: int, delay: int, mix: float) -> None:
    def program(communicator: Communicator) -> Seen:
        return Seen(communicator, momentum, 194, torch.float64, **settings(fragments, delay, mix, server_trains=trains))

    results = [seen for seen in on_mpi(as_simulated(program)) if seen is not None]
    assert_several(results, len(results), 194, fragments, delay, mix)


@pytest.mark.parametrize(("size", "trains"), [(1, False), (2, False), (3, True), (4, False)])
@pytest.mark.parametrize(("fragments", "delay", "mix"), [(2, 1, 0.0), (3, 2, 0.5), (1, 2, 0.0)])
def test_between_loops_all_ranks_have_the_server_s_weights(
    fragments: int, delay: int, mix: float, size: int, trains: bool
) -> None:
    """What is measured and seen is these, and however often all wait, each worker goes on from its own."""

    def program(communicator: Communicator, calls: int) -> list[Tensor]:
        net, between = mlp(), list[Tensor]()
        given = settings(fragments, delay, mix, server_trains=trains)
        ps = mpips.connect(net, momentum, communicator=communicator, run_dir="run", **given)

        def measure() -> float:
            between.append(weights(net))
            return 0.0

        for _ in ps.epochs(EPOCHS):
            for x, y in ps.batches(data(97), BATCH, shuffle=False):
                F.cross_entropy(net(x), y).backward()
                ps.step(0.0)
            seen = weights(net)
            for _ in range(calls):
                ps.validate(measure)
                ps.save()
                assert torch.equal(weights(net), seen)
            assert all(torch.equal(measured, seen) for measured in between[-calls:])
        ps._worker.begin()
        own = weights(net)
        ps._worker.update.park()
        return [own, seen]

    plainly = World(size).run(lambda e: program(e, 0))
    for ours, expected in zip(World(size, seed=1).run(lambda e: program(e, 3)), plainly, strict=True):
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], plainly[0][1])


@pytest.mark.parametrize("rule", ["median", "krum", "trimmed", "normclip"])
def test_rules_judge_fragments(rule: str) -> None:
    """The same data on all workers: whatever the rule, their common change."""
    own = data(64, torch.float64)

    def program(communicator: Communicator, **more: Any) -> Tensor:
        net = mlp().double()
        train(communicator, net, momentum(net.parameters()), own, BATCH, EPOCHS, shard=False, **settings(3, 2, 0.5, **more))
        return weights(net)

    expected = World(1).run(program)[0]
    assert_near(World(6).run(lambda e: program(e, rule=rule, robust={"clip_radius": 1e9}))[0], expected)


# Traffic.


def wide() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )


def moved(communicator: Communicator, **given: Any) -> tuple[list[Counter[str]], Replica]:
    """This rank's bytes by call in each round."""
    net, rounds = wide(), []
    ps = mpips.connect(net, momentum, communicator=communicator, **{"run_dir": "run", **given})
    before = communicator.traffic.copy()
    for _ in ps.epochs(1):
        for x, y in ps.batches(data(192), BATCH):
            F.cross_entropy(net(x), y).backward()
            round = ps.round
            ps.step(0.0)
            if ps.round > round:
                rounds.append(communicator.traffic - before)
                before = communicator.traffic.copy()
    return rounds, ps._worker.replica


def test_a_round_moves_a_fragment() -> None:
    ((whole, _),) = World(2).run(lambda e: moved(e, **settings(steps=2)))
    ((rounds, replica),) = World(2).run(lambda e: moved(e, **settings(2, steps=4)))
    assert len(rounds) == len(whole) == 6
    behind = replica.push.message.numel() - replica.flat.numel
    for number, (now, then) in enumerate(zip(rounds, whole, strict=True)):
        span = replica.fragments[number % 2].span
        numel = span.stop - span.start
        assert now["reduce bytes"] == 4 * (numel + behind)
        assert then["reduce bytes"] == 4 * (replica.flat.numel + behind)
        assert then["broadcast bytes"] - now["broadcast bytes"] == 4 * (replica.flat.numel - numel)
        assert now["reduce bytes"] < 0.6 * then["reduce bytes"]
        assert now["broadcast bytes"] < 0.6 * then["broadcast bytes"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_fragments_are_neighbours_of_like_size(model: str, count: int) -> None:
    net = MODELS[model]()
    replica = made(net, count)
    flat, ends = replica.flat, [0]
    for fragment in replica.fragments:
        assert fragment.span.start == ends[-1]
        ends.append(fragment.span.stop)
        assert fragment.message.numel() - replica.push.message.numel() == fragment.gradients.numel() - flat.numel
        assert fragment.gradients.numel() <= flat.numel / count + max(slot.numel for slot in flat.slots) + 16
    assert ends[-1] == flat.numel
    assert set(ends) <= {slot.offset for slot in flat.slots} | {flat.numel}
    assert len(set(ends)) == count + 1


def test_a_fragment_takes_its_part_and_gives_it_back() -> None:
    replica = made(cnn(), 3)
    for number, fragment in enumerate(replica.fragments):
        whole = replica.push.message
        whole.copy_(torch.arange(1.0, 1 + len(whole)))
        replica.push.presence.fill_(1)
        before = whole.clone()
        assert replica.fragment(number + 30) is fragment
        fragment.fill()
        assert torch.equal(fragment.gradients, before[fragment.span])
        for part in ("floats", "limbs", "rows"):
            assert torch.equal(getattr(fragment, part), getattr(replica.push, part))
        inside = [float(fragment.span.start <= slot.offset < fragment.span.stop) for slot in replica.flat.slots]
        assert fragment.presence.tolist() == inside
        fragment.message.mul_(2)
        fragment.spill()
        assert torch.equal(replica.push.gradients[fragment.span], 2 * before[fragment.span])
        assert replica.push.gradients.count_nonzero() == fragment.gradients.numel()
        assert torch.equal(replica.push.rows, fragment.rows)
        assert replica.push.presence.tolist() == [2 * seen for seen in inside]


def made(net: nn.Module, fragments: int) -> Replica:
    config = mpips.Config(local=mpips.config.Local(fragments=fragments))
    return replicate(net, config, 3, World(1).ends[0].allocate)


# Checkpoints.


def resumable(communicator: Communicator, given: dict[str, Any], **more: Any) -> tuple[str, Tensor]:
    net = cnn()
    ps = train(communicator, net, momentum(net.parameters()), data(107), 8, EPOCHS, True, **given, **more)
    worker = ps._worker
    worker.begin()
    own = weights(net)
    worker.update.park()
    return sha(net), own


def same(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]]) -> bool:
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in zip(a, b, strict=True))


@pytest.mark.parametrize(("size", "trains"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize(("fragments", "delay", "mix"), [(3, 4, 0.5), (2, 0, 0.25)])
def test_killed_and_resumed(fragments: int, delay: int, mix: float, size: int, trains: bool) -> None:
    """In the middle of a cycle, with results that have not been taken up: each worker's own weights are those it had."""
    given = settings(fragments, delay, mix, steps=6, server_trains=trains, checkpoint={"every": 2})
    expected = World(size).run(lambda e: resumable(e, given, run_dir="whole"))
    killed = 0
    for call in (17, 34, 51):
        world, folder = World(size, seed=call), f"killed-{call}"
        world.kill(call % size, call)
        try:
            world.run(lambda e, folder=folder: resumable(e, given, run_dir=folder))
        except Killed:
            killed += 1
            again = World(size).run(lambda e, folder=folder: resumable(e, given, run_dir=folder, resume="auto"))
            assert same(again, expected), f"killed at call {call}"
    assert killed > 1


@pytest.mark.parametrize(("size", "trains"), [(1, False), (2, False), (3, True)])
def test_a_checkpoint_holds_the_server_s_weights(size: int, trains: bool) -> None:
    given = settings(3, 2, 0.5, server_trains=trains, checkpoint={"every": 1, "keep": 100})
    results = World(size).run(lambda e: Seen(e, momentum, 107, torch.float32, **given))
    files = sorted(Path("run/checkpoints").glob("*.h5"))
    rounds = set()
    for file in files:
        tree = checkpoint.load(file)
        saved = torch.cat([tree["parameters"][name].reshape(-1) for name, _ in mlp().named_parameters()])
        assert torch.equal(saved, results[-1].anchors[tree["round"] - 1])
        rounds.add(tree["round"])
    assert len(rounds) == len(results[-1].anchors)


def stopped(communicator: Communicator, stop: int, given: dict[str, Any]) -> Tensor:
    """The model of a run that was stopped in the round after `stop`."""
    net = cnn()
    ps = mpips.connect(net, momentum(net.parameters()), communicator=communicator, run_dir="run", **given)
    for _ in ps.epochs(EPOCHS):
        for x, y in ps.batches(data(107), 8):
            F.cross_entropy(net(x), y).backward()
            if ps.round == stop:
                ps.stop()
            ps.step(0.0)
    return weights(net)


@pytest.mark.parametrize(("size", "trains"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_stopped_in_a_loop_and_resumed(stop: int, size: int, trains: bool) -> None:
    """The model is the server's as soon as the run has stopped."""
    given = settings(3, 4, 0.5, steps=6, server_trains=trains)
    expected = World(size).run(lambda e: resumable(e, given, run_dir="whole"))

    ends = World(size).run(lambda e: stopped(e, stop, given))
    assert all(torch.equal(ends[0], other) for other in ends)
    newest = checkpoint.newest(Path("run/checkpoints"))
    assert newest is not None
    tree = checkpoint.load(newest)
    saved = torch.cat([tree["parameters"][name].reshape(-1) for name, _ in cnn().named_parameters()])
    assert torch.equal(saved, ends[0])
    assert same(World(size).run(lambda e: resumable(e, given, resume="auto")), expected)


def test_a_script_that_leaves_its_loop_leaves_the_server_s_weights() -> None:
    net = mlp()
    ps = mpips.connect(net, momentum, communicator=World(1).ends[0], run_dir="run", **settings(2, 3, 0.5))
    for number, (x, y) in enumerate(ps.batches(data(107), BATCH)):
        F.cross_entropy(net(x), y).backward()
        ps.step(0.0)
        if number == 4:
            break
    ps.close()
    newest = checkpoint.newest(Path("run/checkpoints"))
    assert newest is not None
    saved = checkpoint.load(newest)["parameters"]
    update = ps._worker.update
    assert isinstance(update, Streaming)
    for name, view in update.replica.flat.named(update.anchor):
        assert torch.equal(saved[name], view)
    ps._worker.begin()
    assert not torch.equal(update.anchor, update.replica.flat.weights)


@pytest.mark.parametrize("after", [2, 5])
def test_another_number_of_workers_goes_on(after: int) -> None:
    given = settings(3, 2, 0.5, checkpoint={"every": 2})
    World(3).run(lambda e: stopped(e, 4, given))
    results = World(after).run(lambda e: resumable(e, given, resume="auto"))
    assert len({digest for digest, _ in results}) == 1
    assert sum(row["samples"] for row in metrics(Path("run"))) == 107 * EPOCHS


@pytest.mark.parametrize("fragments", [1, 3])
def test_a_run_goes_on_with_other_fragments(fragments: int) -> None:
    World(3).run(lambda e: stopped(e, 4, settings(2, 2, 0.5)))
    results = World(3).run(lambda e: resumable(e, settings(fragments, 2, 0.5), resume="auto"))
    assert len({digest for digest, _ in results}) == 1
    assert sum(row["samples"] for row in metrics(Path("run"))) == 107 * EPOCHS


# Dtypes and faults.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3])
def test_16_bit_models_stay_near_their_32_bit_twins(size: int, dtype: torch.dtype) -> None:
    def program(communicator: Communicator, dtype: torch.dtype) -> Tensor:
        net = mlp().to(dtype)
        given = settings(3, 2, 0.5, outer={"lr": 0.1})
        train(communicator, net, torch.optim.SGD(net.parameters(), lr=0.05), data(107, dtype), BATCH, EPOCHS, **given)
        return weights(net).float()

    close = World(size).run(lambda e: program(e, torch.float32))[0]
    results = World(size).run(lambda e: program(e, dtype))
    assert all(torch.equal(results[0], other) for other in results)
    assert (results[0] - close).norm() < 0.02 * close.norm()
    assert (results[0] - weights(mlp())).norm() > 0


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 2])
def test_a_16_bit_model_is_always_its_worker_s_own(size: int, mix: float) -> None:
    """Its float32 masters, rounded: after a local step, after a fragment was taken up, and after a round."""

    def program(communicator: Communicator) -> int:
        net, apart = mlp().bfloat16(), 0
        ps = mpips.connect(net, momentum, communicator=communicator, run_dir="run", **settings(2, 1, mix))
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(107, torch.bfloat16), BATCH):
                F.cross_entropy(net(x), y).backward()
                ps.step(0.0)
                update = ps._worker.update
                assert isinstance(update, Streaming)
                if not ps._worker.status.done:
                    assert torch.equal(update.inner.whole.bfloat16(), update.replica.flat.weights)
                    apart += not torch.equal(update.anchor, update.replica.flat.weights.float())
        return apart

    assert World(size).run(program)[-1] > 5


def test_a_step_without_samples_lets_no_time_pass() -> None:
    config = mpips.Config(mode="diloco", local=mpips.config.Local(steps=6, fragments=2, delay=3))
    replica = replicate(mlp(), config, 1, World(1).ends[0].allocate)
    update = make_update(choose_mode(config), config, replica, 0, 0, 1, FlatOptimizer(replica, momentum, None))
    assert isinstance(update, Streaming)
    update.received()
    update._due[1] = 2
    for samples, left in ((0.0, 2), (0.0, 2), (4.0, 1), (0.0, 1)):
        assert not update.step(0.0, samples, Control())
        assert update._due == {1: left}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_16_bit_worker_resumes_exactly(dtype: torch.dtype) -> None:
    def program(communicator: Communicator, **more: Any) -> Tensor:
        net = mlp().to(dtype)
        given = settings(2, 3, 0.5, checkpoint={"every": 3}, **more)
        train(communicator, net, momentum(net.parameters()), data(107, dtype), BATCH, EPOCHS, **given)
        return weights(net)

    for size in (1, 3):
        whole, world, folder = World(size), World(size), f"killed-{size}"
        expected = whole.run(lambda e, size=size: program(e, run_dir=f"whole-{size}"))[0]
        world.kill(0, whole.calls[0] // 2)
        with pytest.raises(Killed):
            world.run(lambda e, folder=folder: program(e, run_dir=folder))
        assert torch.equal(World(size).run(lambda e, folder=folder: program(e, run_dir=folder, resume="auto"))[0], expected)


def poisoned(communicator: Communicator, at: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Worker 0's gradient of its step `at` is not finite."""
    net, step = mlp().double(), 0
    ps = mpips.connect(net, momentum, communicator=communicator, **settings(3, 2, 0.5, **more))
    for _ in ps.epochs(2):
        for x, y in ps.batches(data(200, torch.float64), BATCH):
            loss = F.cross_entropy(net(x), y) * (float("nan") if step == at and ps.worker == 0 else 1.0)
            loss.backward()
            ps.step(loss)
            step += 1
    final = weights(net)
    ps._worker.begin()
    return final, weights(net)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_local_step_that_is_not_finite(at: int, size: int) -> None:
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        World(size).run(lambda e: poisoned(e, at, run_dir="raise"))
    for nonfinite in ("drop", "skip"):
        results = World(size).run(lambda e, how=nonfinite: poisoned(e, at, nonfinite=how, run_dir=how))
        assert all(torch.equal(results[0][0], other) for other, _ in results)
        assert all(own.isfinite().all() for _, own in results)
        assert (results[0][0] - weights(mlp().double())).norm() > 0
        assert Path(nonfinite, "events.jsonl").read_text().count("NaN or Inf") == 1


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_a_worker_whose_weights_are_not_finite_begins_at_the_server_s(mix: float) -> None:
    """Of all fragments, not only of that which was to be sent."""

    def program(communicator: Communicator) -> Tensor:
        net = mlp().double()
        given = settings(3, 2, mix, nonfinite="drop")
        ps = mpips.connect(net, momentum, communicator=communicator, run_dir="run", **given)
        for _ in ps.epochs(2):
            for number, (x, y) in enumerate(ps.batches(data(200, torch.float64), BATCH)):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if number == 2 and ps.worker == 1:
                    with torch.no_grad():
                        next(net.parameters()).fill_(float("inf"))
                ps.step(loss)
        final = weights(net)
        ps._worker.begin()
        return torch.cat([final, weights(net)])

    results = World(4).run(program)
    assert all(result.isfinite().all() for result in results)


# What is not allowed.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (settings(2) | {"mode": "local_sgd"}, r"local\.fragments.*given \[2, 0, 0\.0\] with mode local_sgd.*diloco or slowmo"),
        (settings(1, 1) | {"mode": "async"}, r"local\.fragments.*with mode async"),
        (settings(1, 0, 0.5) | {"mode": "fedavg"}, r"local\.fragments.*with mode fedavg"),
        (settings(2, 4), r"local\.delay: given 4, allowed: less than 4"),
        (settings(3, 6), r"local\.delay: given 6, allowed: less than 6"),
        (settings(2, rule="cclip"), r"rule: given 'cclip'.*local\.fragments"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_mode(resolve(given))


@pytest.mark.parametrize("size", [1, 3])
def test_more_fragments_than_tensors_are_refused(size: int) -> None:
    def program(communicator: Communicator) -> None:
        net = mlp()
        train(communicator, net, momentum(net.parameters()), data(107), **settings(5))

    with pytest.raises(ConfigError, match=r"local\.fragments: given 5, allowed: up to 4, the model's trained tensors"):
        World(size).run(program)


def test_a_round_every_share_of_the_steps() -> None:
    for fragments, between in ((1, 500), (2, 250), (3, 167), (4, 125)):
        config = mpips.Config(mode="diloco", local=mpips.config.Local(fragments=fragments, delay=1))
        replica = replicate(mlp(), config, 2, World(1).ends[0].allocate)
        update = make_update(choose_mode(config), config, replica, 1, 0, 1, FlatOptimizer(replica, momentum, None))
        assert isinstance(update, Streaming)
        assert update.steps == between
