"""Rounds on several nodes: what each step promises; the weights are those of a plain reference, whoever serves what."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import mpips
from mpips.algorithms.modes import choose_mode
from mpips.comm import Communicator, simulated
from mpips.comm import reduce_scatter as sharded
from mpips.comm.codecs import BFloat16, Codec
from mpips.comm.node_group import BufferSpec
from mpips.comm.reduce_scatter import ReduceScatterGroup, bucket_length
from mpips.comm.simulated import Killed, SimulatedCommunicator, World
from mpips.comm.simulated_group import SimulatedBarrier, SimulatedLeaderGroup
from mpips.config import Config, ConfigError, resolve
from mpips.model import layout
from mpips.model.layout import share
from mpips.model.message import NonFiniteError
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.comm.test_mpi import as_simulated, on_one
from tests.helpers.programs import OPTIMIZERS, cnn, data, metrics, mlp, sha, train
from tests.promises.test_resume import assert_same, last
from tests.reduce.test_shared_memory_transport import (
    SAMPLES,
    Odd,
    assert_alike,
    differ,
    grouped,
    is_sharded,
    is_shared,
    run_until_nonfinite,
    tree_of,
)

Shape = list[int]
SHAPES: list[Shape] = [[2, 2], [1, 3], [3, 1], [1, 1, 1], [2, 1, 2], [4, 4]]
WIRES = pytest.mark.parametrize("wire", ["full", "bfloat16"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are cut up, and travel, as large ones would."""
    monkeypatch.setattr(layout, "GRAIN", 64)
    monkeypatch.setattr(layout, "PIECE", 256)
    monkeypatch.setattr(layout.pieces, "__defaults__", (256,))
    monkeypatch.setattr(sharded, "LEAST", 1)


def on_nodes(shape: Shape, seed: int = 0, bucket: int = 3000) -> World:
    """A simulated world whose ranks share memory with those of their node; a bucket is less than a small model."""
    return World(sum(shape), seed=seed, shares=True, nodes=shape, bucket=bucket)


# What each step of a round promises

LENGTH, TAIL, WEIGHTS, LINES, ROUNDS = 40, 28, 24, 5, 2
BEHIND = slice(WEIGHTS, TAIL)


def contents(codec: Codec, overlap: bool = False) -> BufferSpec:
    pull = 4 * (2 + WEIGHTS + 3)  # two words before the weights, three behind
    where = slice(8, 8 + 4 * WEIGHTS)
    return BufferSpec(LENGTH, torch.float32, TAIL, pull, where, torch.float32, LINES, 2, True, True, codec, overlap)


def cut(shape: Shape, cuts: Sequence[float], count: int) -> list[list[slice]]:
    """What each rank serves of so many buckets: the nodes' parts end at those fractions of each."""
    found = []
    for number in range(count):
        bucket = share(slice(0, WEIGHTS), number, count)
        ends = [bucket.start + round((bucket.stop - bucket.start) * at) for at in (0, *cuts, 1)]
        parts = zip((slice(*pair) for pair in pairwise(ends)), shape, strict=True)
        found.append([share(part, k, ranks) for part, ranks in parts for k in range(ranks)])
    return found


class Log:
    """What all ranks see of a round: how often each element was added, on each node, joined, and finished."""

    def __init__(self, nodes: int) -> None:
        self.groups: dict[int, ReduceScatterGroup] = {}
        self.added, self.joined, self.finished = torch.zeros(nodes, TAIL), torch.zeros(TAIL), torch.zeros(TAIL)

    def check(self, done: float) -> None:
        """All was combined, once; whoever serves a slice has it."""
        once = torch.ones(TAIL)
        assert torch.equal(self.finished, once), "each element is finished once"
        once[BEHIND] = 0  # that travels with the tails
        assert torch.equal(self.added, once.expand_as(self.added)), "each node's share of each gradient, once"
        assert torch.equal(self.joined, once), "each gradient once"
        for group in self.groups.values():
            for span in group.spans:
                assert (group.combined[span] == done).all(), "a slice that is not combined"

    def clear(self) -> None:
        for counts in (self.added, self.joined, self.finished):
            counts.zero_()


def rounds(group: ReduceScatterGroup, buckets: list[list[slice]], log: Log | None, pause: Callable[[], None]) -> None:
    """Rounds in which everything is written bit by bit, others coming in between, and whoever reads looks at all there is."""
    nodes, overlap = group.nodes, group.spec.overlap
    size, node = sum(map(len, nodes)), group.nodes.index(list(group.members))
    if log:
        log.groups[group.rank] = group
    group.serve(buckets, BEHIND)
    heard, answer = torch.zeros(LENGTH - TAIL), torch.zeros(2, dtype=torch.float64)
    first, behind = (part.view(torch.float32) for part in (group.buffers.pull[:8], group.buffers.pull[8 + 4 * WEIGHTS :]))

    def slowly(target: Tensor, value: float | Tensor) -> None:
        values = torch.as_tensor(value, dtype=target.dtype).expand(len(target))
        for part, own in zip(*(t.split(max(1, -(-len(target) // 2))) for t in (target, values)), strict=True):
            pause()
            part.copy_(own)

    def push(rank: int) -> float:  # more than 8 bits
        return 20 * number + rank + 2.0**-10

    def sums(other: int, part: slice) -> Tensor:  # different from place to place, and 8 bits suffice
        return number + 10 * other + 32 * (torch.arange(part.start, part.stop) % 7)

    def weights(part: slice) -> Tensor:
        return number * (1 + torch.arange(part.start, part.stop) % 7)

    def all_pushes() -> float:
        return sum(push(rank) for rank in range(size))

    class Take:
        def reduce_local(self, part: slice, rows: Sequence[Tensor]) -> None:
            pause()
            assert group.sample_weights.tolist() == [number + rank / 8 for rank in group.members], "a weight that is not said"
            for rank, row in zip(group.members, rows, strict=True):
                assert (row == push(rank)).all(), "a push that is not whole, or of another round"
            if log:
                log.added[node, part] += 1
            slowly(rows[0], sums(node, part))

        def reduce_remote(self, part: slice, sums_of: Sequence[Tensor]) -> None:
            pause()
            assert len(sums_of) == len(nodes)
            for other, value in enumerate(sums_of):
                assert (value == sums(other, part)).all(), "a node's sum that is not whole, or of another place"
            if log:
                log.joined[part] += 1
            slowly(group.combined[part], -number)

        def finalize(self, part: slice, total: Tensor) -> None:
            pause()
            assert (heard == all_pushes()).all(), "a tail that is not whole"
            expected = all_pushes() if part.start >= WEIGHTS else -number
            assert (group.combined[part] == expected).all(), "a slice that is not whole"
            if log:
                log.finished[part] += 1
            slowly(group.combined[part], -number - 0.5)

    class Late:
        """Gradients, and then the tail, are written only when they are to be there."""

        def wait(self, step: int, meanwhile: Any) -> None:
            if step == len(group.push_steps):
                slowly(group.buffers.row[WEIGHTS:], push(group.rank))
            else:
                for span in group.push_steps[step]:
                    slowly(group.buffers.row[span], push(group.rank))

    def check_pull(control: float) -> None:
        for part, expected in ((group.weights, weights(slice(0, WEIGHTS))), (first, control), (behind, control)):
            pause()
            assert torch.equal(part, torch.as_tensor(expected).expand(len(part)).float()), "a pull message that is not whole"

    def fill(value: float) -> None:
        slowly(first, value)
        slowly(behind, value)

    for number in range(1, 1 + ROUNDS):
        if not overlap:
            slowly(group.buffers.row, push(group.rank))
        group.reduce(number + group.rank / 8, heard, Take(), Late() if overlap else None)
        assert (heard == all_pushes()).all(), "a tail that is not whole"
        values = torch.full((LINES,), 100.0 * number + group.rank, dtype=torch.float64)
        for again in (0, 1000):  # as when gradients are clipped
            op = "sum" if again else "min"
            reported = group.report(values + again, op)  # type: ignore[arg-type]
            pause()
            if group.leads and log:
                log.check(-number - 0.5)
                if again:
                    log.clear()
            if group.leads:
                every = [100 * number + k + again for k in range(size)]
                assert (reported == (sum(every) if again else min(every))).all(), "a report that is not whole"
            slowly(answer, number + again if group.leads else -1)
            group.decide(answer)
            pause()
            assert (answer == number + again).all(), "a verdict that is not whole"
        for span in group.spans:
            if span.stop <= WEIGHTS:
                slowly(group.stepped(span), weights(span))
        group.broadcast(lambda number=number: fill(number))
        check_pull(number)
        group.broadcast(lambda number=number: fill(number + 0.5), False)  # as after a validation
        check_pull(number + 0.5)


class Uneven(random.Random):
    """Chooses one rank only now and then if others can run."""

    slow = 0

    def choice(self, ready: Any) -> Any:
        """One of those."""
        others = [rank for rank in ready if rank != self.slow]
        return super().choice(others if others and self.random() < 0.97 else ready)


def simulate(shape: Shape, buckets: list[list[slice]], step: int, kind: str, seed: int) -> None:
    """Rounds in a simulated world, `step` elements at a time between each two nodes."""
    each = step * CODECS[kind].bytes(1) * (len(shape) - 1)
    world, log = on_nodes(shape, seed, each), Log(len(shape))
    if seed % 2:
        world.choose = Uneven(seed)
        world.choose.slow = seed // 2 % world.size

    def program(e: SimulatedCommunicator) -> None:
        group = e.node_group(contents(CODECS[kind], kind == "overlap"))
        assert isinstance(group, ReduceScatterGroup)
        rounds(group, buckets, log, lambda: world.pause(e.rank))

    world.run(program)


def even(shape: Shape) -> list[float]:
    return [n / len(shape) for n in range(1, len(shape))]


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.pieces, "__defaults__", (7,))


CODECS = {"full": Codec(torch.float32), "bfloat16": BFloat16(torch.float32), "overlap": Codec(torch.float32)}


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_keeps_its_promises_whatever_the_schedule(
    shape: Shape, kind: str, tiny_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = len(shape) - 2
    ways = [(even(shape), 1, 100), (even(shape), 3, 5), (even(shape), 2, 3)]  # a step for each bucket, one, two or more
    ways += [([0.0] * (rest + 1), 2, 9), ([1.0] * (rest + 1), 1, 9)]  # all is served by the last, or the first node
    ways += [([0.1] + [0.8] * rest, 2, 6)]  # some run out of it, or have nothing
    turn = SHAPES.index(shape) + list(CODECS).index(kind)
    for number in range(turn % 2, len(ways), 2 if sum(shape) < 5 else sum(shape)):
        cuts, count, step = ways[number]
        monkeypatch.setattr(sharded, "FLIGHT", 1 + (turn + number) % 3)  # buckets under way, each in its place
        simulate(shape, cut(shape, cuts, count), step, kind, 10 * number + number // 2)


STEPS = ["step 0", "step 1", "step 2", "step 3", "step 4", "tails", "report", "clip", "publish"]
CHANGES = ["change 0", "change 1", "change 2", "change 3", "change 4", "end"]
MEETINGS = {  # of a round whose slices travel in four steps, two of each bucket
    "full": ["said", *STEPS, "hear"],
    "bfloat16": ["said", *STEPS, *CHANGES, "hear"],
    "overlap": [*(f"{name} {n}" for n in range(4) for name in ("there", "step")), "step 4", *STEPS[5:], "hear"],
}
NEEDED = {  # the others are there because arriving and releasing go together, or are alike
    "full": {
        "arrive": ["said", "step 0", "step 3", "report", "clip", "publish", "hear"],
        "release": ["step 2", "step 4", "tails", "report", "publish", "hear"],
    },
    "bfloat16": {
        "arrive": ["step 1", "change 0", "change 3", "end"],
        "release": ["step 3", "change 1", "change 4", "end"],
    },
    "overlap": {"arrive": ["there 0", "there 2", "tails"], "release": ["there 1", "step 4"]},
}
HOLES = [(kind, call, hole) for kind, calls in NEEDED.items() for call, holes in calls.items() for hole in holes]


@pytest.mark.parametrize(("kind", "call", "hole"), HOLES)
def test_each_meeting_is_needed(kind: str, hole: str, call: str, tiny_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting there, some schedule breaks a promise; one bucket is under way while the next is added up."""

    class Loose(SimulatedBarrier):
        times = 0

        def arrive(self, *given: Any) -> None:
            if not (self.leads and self._without("arrive")):
                super().arrive(*given)

        def release(self) -> None:
            if self.leads or not self._without("release"):
                super().release()

        def _without(self, name: str) -> bool:
            world, rank = self.world, self.rank
            if name != call:
                return False
            self.times += 1
            if MEETINGS[kind][(self.times - 1) % len(MEETINGS[kind])] != hole:
                return False
            world.begin(rank, name)
            world.arrived_here[rank] += name == "arrive"
            return True

    monkeypatch.setattr(simulated, "SimulatedBarrier", Loose)
    monkeypatch.setattr(sharded, "FLIGHT", 1)
    with pytest.raises(AssertionError, match=r"not whole|not combined|not said|once"):
        for seed in range(1, 40):
            simulate([3, 1], cut([3, 1], [0.5], 2), 3, kind, seed)


# Training


def own_data(number: int, samples: int, rounds: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Worker `number`'s; every other has a batch less."""
    x, y = data(samples * (rounds - number % 2), dtype)
    return x.roll(number, 0), y.roll(number, 0)


def number_of(rank: int, settings: dict[str, Any]) -> int:
    """The worker on a rank; -1 where there is none."""
    return rank - (not settings.get("server_trains"))


def all_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*(p.detach().clone() for p in model.parameters()), *(b.detach().clone() for b in model.buffers())]


Make = Callable[[nn.Module], Any]


def uneven(
    world: World, build: Callable[[], nn.Module], make: Make, rounds: int = 4, samples: Sequence[int] = SAMPLES, **settings: Any
) -> list[list[Tensor]]:
    """Every rank's parameters and buffers after rounds with workers whose batches have sizes of their own."""
    settings = {"plan": "sharded", **settings}

    def program(e: Communicator) -> list[Tensor]:
        model, number = build(), max(number_of(e.rank, settings), 0)
        size = samples[number % len(samples)]
        given = own_data(number, size, rounds, next(model.parameters()).dtype)
        ps = train(e, model, make(model), given, size, shard=False, **settings)
        assert is_sharded(ps) == (settings["plan"] == "sharded")
        return all_of(model)

    return world.run(program)


def summed(nodes: list[list[int]], tensors: dict[int, Tensor], factors: dict[int, float]) -> Tensor:
    """In the order of workers on each node, then in that of nodes."""
    sums: list[Tensor] = []
    for node in nodes:
        some = [(tensors[n], factors[n]) for n in node if n in tensors]
        if some:
            total = some[0][0] * some[0][1]
            for tensor, factor in some[1:]:
                total.add_(tensor, alpha=factor)
            sums.append(total)
    return sum(sums[1:], sums[0])


def reference(
    shape: Shape, model: nn.Module, make: Make, rounds: int = 4, samples: Sequence[int] = SAMPLES, **settings: Any
) -> list[Tensor]:
    """Plain PyTorch: gradients times their samples, added by rank on each node, then by node, and divided by all samples."""
    optimizer, dtype = make(model), next(model.parameters()).dtype
    ranks, trained = iter(range(sum(shape))), [p for p in model.parameters() if p.requires_grad]
    nodes = [[number_of(next(ranks), settings) for _ in range(count)] for count in shape]
    for turn in range(rounds):
        kept = [b.clone() for b in model.buffers()]
        given: dict[int, tuple[int, list[Tensor | None], list[Tensor]]] = {}
        for number in sorted(n for node in nodes for n in node if n >= 0):
            size = samples[number % len(samples)]
            x, y = (part[turn * size : (turn + 1) * size].clone() for part in own_data(number, size, rounds, dtype))
            if len(x):
                for buffer, value in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(value)
                optimizer.zero_grad()
                for p in trained:
                    p.grad = None
                F.cross_entropy(model(x), y).backward()
                given[number] = len(x), [p.grad for p in trained], [b.clone() for b in model.buffers()]
        weights = {n: float(size) for n, (size, *_) in given.items()}
        whole = sum(weights.values())
        for i, p in enumerate(trained):
            own = {n: g for n, (_, grads, _) in given.items() if (g := grads[i]) is not None}
            p.grad = summed(nodes, own, weights) / whole if own else None
        if settings.get("clip"):
            nn.utils.clip_grad_norm_(trained, settings["clip"])
        optimizer.step()
        for i, buffer in enumerate(model.buffers()):
            own = {n: buffers[i] * weights[n] for n, (*_, buffers) in given.items()}
            floats = buffer.is_floating_point()
            buffer.copy_(summed(nodes, own, dict.fromkeys(own, 1.0)) / whole if floats else given[0][2][i])
    return all_of(model)


def assert_close(ours: list[list[Tensor]], expected: list[Tensor], near: float) -> None:
    """Alike on all ranks, bit for bit, and near what is expected."""
    assert_alike(ours, ours[:1])
    for number, (a, b) in enumerate(zip(ours[0], expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=near, atol=near, msg=lambda text, number=number: f"tensor {number}: {text}")


def frozen() -> nn.Module:
    """Odd, of which some is not trained."""
    model = Odd()
    model.conv.weight.requires_grad_(False)
    model.wide.bias.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "odd": Odd,
    "odd float64": lambda: Odd().double(),
    "frozen": frozen,
    "cnn": cnn,
}
MAKE: dict[str, Make] = {
    "momentum": lambda m: optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda m: optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.01),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_are_those_of_plain_pytorch_in_the_documented_order(kind: str, name: str) -> None:
    """Bit for bit, whoever serves what: batches of several sizes, shards that end earlier, absent gradients, statistics."""
    shapes: list[tuple[Shape, dict[str, Any]]] = [([1, 3], {"server_trains": True})]
    shapes += [([2, 2], {})] if name == "momentum" else []
    shapes += (
        [([2, 1, 2], {}), ([1, 1, 1], {"server_trains": True, "samples": (8, 8, 8)})]
        if (kind, name) == ("odd", "momentum")
        else []
    )
    for seed, (shape, settings) in enumerate(shapes):
        settings = {"samples": (4, 16, 8, 2), **settings}  # products with these are exact: kernels may round them, or not
        expected = reference(shape, MODELS[kind](), MAKE[name], **settings)
        assert all(tensor.isfinite().all() for tensor in expected)
        assert differ(expected, all_of(MODELS[kind]())), "something is learnt"
        assert_alike(uneven(on_nodes(shape, seed), MODELS[kind], MAKE[name], **settings), [expected])


@pytest.mark.parametrize(
    ("name", "make"),
    [("adam", MAKE["adam"]), ("groups", grouped(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-3))],
    ids=["adam", "groups"],
)
def test_only_rounding_differs_for_any_batches_and_clipped(name: str, make: Make) -> None:
    for seed, (shape, settings) in enumerate([([2, 2], {}), ([2, 1, 2], {"clip": 0.05}), ([1, 3], {"clip": 0.05})]):
        expected = reference(shape, Odd(), make, **settings)
        plain = reference(shape, Odd(), make)
        assert_close(uneven(on_nodes(shape, seed), Odd, make, **settings), expected, 1e-5)
        assert not settings or max(float((a - b).norm()) for a, b in zip(expected, plain, strict=True)) > 1e-3, "it clips"


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_an_optimizer_of_whole_tensors_is_cut_between_them(name: str) -> None:
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 33, bias=False), nn.Tanh(), nn.Linear(33, 40, bias=False), nn.Linear(40, 5, False))

    def make(model: nn.Module) -> optim.Optimizer:
        return getattr(optim, name)(model.parameters(), lr=0.01)  # type: ignore[no-any-return]

    for shape in ([2, 2], [1, 1, 2]):
        assert_close(uneven(on_nodes(shape, 2), build, make), reference(shape, build(), make), 1e-5)


class Single(nn.Module):
    """One tensor, and statistics: whatever is cut between tensors is served by one node."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.norm = nn.BatchNorm1d(12, affine=False)
        self.head = nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out


def test_statistics_are_averaged_whichever_node_serves_all_tensors() -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        return optim.Adafactor(model.parameters(), lr=0.01)

    for shape in ([1, 1], [2, 2]):
        settings: dict[str, Any] = {"server_trains": True}
        assert_close(uneven(on_nodes(shape), Single, make, **settings), reference(shape, Single(), make, **settings), 1e-5)


@WIRES
def test_more_ranks_than_there_is_to_serve(wire: str) -> None:
    """Whole nodes have nothing, and rank 0 judges all the same."""

    def program(e: Communicator, **settings: Any) -> list[float]:
        net = nn.Linear(1, 1)
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=e, run_dir="run", clip=3.0, **settings)
        for (x,) in ps.batches((torch.arange(40.0).view(-1, 1),), 3):
            loss = net(x).square().mean()
            loss.backward()
            ps.step(loss)
        assert "plan" not in settings or is_sharded(ps)
        return [net.weight.item(), net.bias.item(), ps.round]

    for shape in ([2, 2], [1, 1, 1, 1]):
        expected = World(4).run(program)[0]
        ours = on_nodes(shape).run(lambda e: program(e, plan="sharded", comm_dtype=wire))
        assert ours == ours[:1] * 3
        assert ours[0] == pytest.approx(expected, rel=1e-5 if wire == "full" else 2e-2)


def test_no_schedule_and_no_bucket_changes_a_bit() -> None:
    """On a wire of bfloat16 a bucket decides whose sums travel, and rounds others: with the same one there is no difference."""
    settings: dict[str, Any] = {"clip": 0.1, "samples": (4, 16, 8, 2), "rounds": 3}  # as above
    expected = uneven(on_nodes([2, 1, 2], 0, 1 << 24), Odd, MAKE["adam"], **settings)
    for seed, bucket in ((1, 1000), (2, 3000)):
        assert_alike(uneven(on_nodes([2, 1, 2], seed, bucket), Odd, MAKE["adam"], **settings), expected[:1])
    rounded = [uneven(on_nodes([2, 1, 2], seed), Odd, MAKE["adam"], comm_dtype="bfloat16", **settings) for seed in (3, 4)]
    assert_alike(rounded[1], rounded[0][:1])


def test_normclip_shortens_each_contribution() -> None:
    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        net = mlp()
        train(
            e, net, OPTIMIZERS["sgd"](net.parameters()), data(60), 7, rule="normclip", robust={"clip_radius": 0.1}, **settings
        )
        return all_of(net)

    expected = World(4).run(program)[0]
    assert_close(on_nodes([2, 2]).run(lambda e: program(e, plan="sharded")), expected, 1e-5)


def test_a_scheduler_and_the_workers_settings_reach_all_nodes() -> None:
    """Those of the server's optimizer do not count once the workers have told theirs."""

    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        model = mlp()
        own = bool(e.rank == 0 and settings)
        made = optim.SGD(model.parameters(), lr=0.5 if own else 0.1, momentum=0.9)
        scheduler = optim.lr_scheduler.StepLR(made, 1, 0.3)
        ps = mpips.connect(model, made, communicator=e, run_dir="run", **settings)
        for _ in ps.epochs(3):
            for x, y in ps.batches(data(32), 8):
                made.zero_grad()
                F.cross_entropy(model(x), y).backward()
                made.step()
            scheduler.step()
        return all_of(model)

    assert_close(on_nodes([1, 2]).run(lambda e: program(e, plan="sharded")), World(3).run(program)[0], 1e-5)


# Contributions that are not finite


Bad = dict[int, tuple[str, float]]  # rank -> tensor and value


def poisoned(world: World, bad: Bad, **settings: Any) -> list[tuple[str, float, list[Tensor]]]:
    """Those ranks have such a value in round 3 of 5: of each worker what is raised, the last version, and the weights."""
    found: dict[int, tuple[str, float, list[Tensor]]] = {}

    def program(e: Communicator) -> None:
        model, before = mlp(), list[Tensor]()
        ps = mpips.connect(model, OPTIMIZERS["momentum"](model.parameters()), communicator=e, **{"run_dir": "run", **settings})
        try:
            for x, y in ps.batches(data(8 * ps.workers * 5), 8, shuffle=False):
                before, version = all_of(model), ps._control.version
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if e.rank in bad and ps.round == 2:
                    name, value = bad[e.rank]
                    grad = model.get_parameter(name).grad
                    assert grad is not None
                    grad.view(-1)[3] = value
                ps.step(loss)
                assert ps._control.version > version or not differ(all_of(model), before), "no update, but a weight has moved"
        except NonFiniteError as error:
            assert not before or not differ(all_of(model), before), "a weight has moved"
            found[e.rank] = str(error), ps._control.version, all_of(model)
            raise
        found[e.rank] = "", ps._control.version, all_of(model)

    run_until_nonfinite(world, program)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(("wire", "value"), [("full", -math.inf), ("bfloat16", math.nan)])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"], ids=["served by the first node", "served by the last"])
def test_nonfinite_raise_names_rank_and_tensor_and_moves_nothing(name: str, value: float, wire: str) -> None:
    for shape, guilty, settings in (
        ([2, 2], 1, {}),
        ([2, 2], 3, {"clip": 0.1}),
        ([1, 2, 1], 2, {}),
        ([2, 2], 0, {"server_trains": True}),
        ([2, 2], 2, {"server_trains": True, "rule": "normclip"}),
    ):
        results = poisoned(on_nodes(shape, guilty), {guilty: (name, value)}, plan="sharded", comm_dtype=wire, **settings)
        for said, version, _ in results:
            assert f"rank {guilty} has a NaN or Inf in the gradient of {name}, round 3" in said, f"{shape}, {guilty}"
            assert version == 2


def test_of_several_guilty_ranks_one_is_named() -> None:
    for bad in ({1: ("2.bias", math.nan), 3: ("0.weight", math.inf)}, {2: ("0.bias", math.nan), 3: ("2.weight", math.nan)}):
        for said, version, _ in poisoned(on_nodes([2, 2]), bad, plan="sharded"):
            named = [f"rank {rank} has a NaN or Inf in the gradient of {name}, round 3" for rank, (name, _) in bad.items()]
            assert any(one in said for one in named)
            assert version == 2


@WIRES
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_nonfinite_skip_and_drop_are_as_by_messages(nonfinite: str, wire: str) -> None:
    for bad in ({2: ("2.weight", math.nan)}, {1: ("0.bias", math.nan), 3: ("2.weight", math.inf)}):
        expected = poisoned(World(4), bad, nonfinite=nonfinite, run_dir="mpi")
        ours = poisoned(on_nodes([2, 2]), bad, nonfinite=nonfinite, run_dir="nodes", plan="sharded", comm_dtype=wire)
        assert [version for _, version, _ in ours] == [version for _, version, _ in expected] == [4 + (nonfinite == "drop")] * 3
        assert_close([weights for *_, weights in ours], expected[0][2], 1e-5 if wire == "full" else 1e-2)
        for a, b in zip(metrics(Path("nodes")), metrics(Path("mpi")), strict=True):
            assert (a["samples"], a["version"]) == (b["samples"], b["version"])


@pytest.mark.parametrize("name", ["0.weight", "2.bias"], ids=["served by the first node", "served by the last"])
@pytest.mark.parametrize("shape", [[2, 2], [3, 1]], ids=["between nodes", "on the first node"])
def test_a_sum_that_overflows_is_the_server_s(shape: Shape, name: str) -> None:
    """No contribution is to blame: rank 0 is named, as it is by messages."""
    bad: Bad = dict.fromkeys((1, 2), (name, 2.5e37))
    for said, version, _ in poisoned(on_nodes(shape), bad, plan="sharded"):
        assert f"rank 0 has a NaN or Inf in the gradient of {name}, round 3" in said
        assert version == 2


@pytest.mark.parametrize(("nonfinite", "version"), [("raise", 2), ("skip", 4)])
def test_a_sum_that_is_infinite_once_it_is_rounded_is_not_taken(nonfinite: str, version: int) -> None:
    """Of 8 samples it is 3.4e38, which float32 holds and bfloat16 does not; nobody is to blame, so rank 0 is named."""
    bad: Bad = {3: ("0.weight", 4.25e37)}  # served by the first node
    settings: dict[str, Any] = {"plan": "sharded", "comm_dtype": "bfloat16", "nonfinite": nonfinite}
    for said, last_version, weights in poisoned(on_nodes([2, 2]), bad, **settings):
        assert said.startswith("rank 0 has a NaN or Inf in the gradient of 0.weight, round 3") == (nonfinite == "raise")
        assert last_version == version
        assert all(tensor.isfinite().all() for tensor in weights)


def test_large_gradients_are_finite() -> None:
    """Their squares are not, in float32."""
    for said, version, weights in poisoned(on_nodes([2, 2]), {2: ("2.bias", 1e25)}, plan="sharded", clip=0.1):
        assert (said, version) == ("", 5)
        assert all(tensor.isfinite().all() for tensor in weights)


# A wire of bfloat16


def test_weights_stay_within_one_rounding_of_the_masters() -> None:
    """Of the last change: what rounding left over is part of the next one."""
    apart: list[float] = []

    def program(e: Communicator) -> list[Tensor]:
        model = mlp()
        made = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ps = mpips.connect(model, made, communicator=e, run_dir="run", plan="sharded", comm_dtype="bfloat16")
        group = ps._worker.server.transport.group
        before = group.weights.clone()
        for x, y in ps.batches(data(160), 8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
            for span in group.spans:
                masters, weights = group.stepped(span), group.weights[span]
                change, left = (masters - before[span]).abs(), (masters - weights).abs()
                assert (left <= change * 2.0**-8 + weights.abs() * 2.0**-23).all(), "more than one rounding"
                apart.append(float(left.max()))
            before = group.weights.clone()
        return all_of(model)

    ours = on_nodes([2, 1, 2], 3).run(program)
    assert_alike(ours, ours[:1])
    assert max(apart) > 0, "something was rounded"


def test_training_reaches_what_it_reaches_in_full() -> None:
    """Sums are off by 2^-9 of themselves, so the weights by about as much of the way that they have come."""
    start = all_of(Odd())
    for name in MAKE:
        full = uneven(on_nodes([2, 2]), Odd, MAKE[name], rounds=8)[0]
        ours = uneven(on_nodes([2, 2], 1), Odd, MAKE[name], rounds=8, comm_dtype="bfloat16")
        assert_alike(ours, ours[:1])
        assert differ(ours[0], full), "16 bits are not 32"
        way, off = (
            math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(full, other, strict=True)))
            for other in (start, ours[0])
        )
        assert off < way * (0.01 if name == "momentum" else 0.05), name  # Adam divides by what may be as small as its error


def test_statistics_keep_up_on_a_wire_of_bfloat16() -> None:
    """They change by less than one part in 256 in a round: of sums rounded to that nothing would come."""

    def build() -> nn.Module:
        model = cnn()
        model.get_submodule("2").momentum = 0.01  # type: ignore[assignment]
        return model

    full = uneven(on_nodes([1, 3]), build, MAKE["momentum"], rounds=12)[0]
    ours = uneven(on_nodes([1, 3]), build, MAKE["momentum"], rounds=12, comm_dtype="bfloat16")
    names = [name for name, _ in build().named_parameters()] + [name for name, _ in build().named_buffers()]
    variance = names.index("2.running_var")
    start = torch.ones(7)
    moved = (full[variance] - start).abs().mean()
    assert moved > 0.01
    assert (ours[0][variance] - full[variance]).abs().mean() < moved * 0.05


def warnings(folder: str) -> list[str]:
    import json

    events = [json.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()]
    return [event["message"] for event in events if event["event"] == "warning" and "comm_dtype" in event["message"]]


def test_it_is_ignored_with_a_word_where_it_is_not_for() -> None:
    cases: list[tuple[World, Callable[[], nn.Module], dict[str, Any]]] = [
        (on_nodes([2, 2]), lambda: mlp().double(), {"plan": "sharded"}),
        (World(4, shares=True), mlp, {"plan": "sharded"}),
        (on_nodes([2, 2]), mlp, {"plan": "root"}),
        (on_nodes([2, 2]), mlp, {"plan": "auto"}),  # it is small
        (on_nodes([2, 2]), mlp, {"plan": "sharded", "deterministic": True}),
    ]
    for number, (world, build, settings) in enumerate(cases):

        def program(e: Communicator, build: Any = build, settings: Any = settings, folder: str = "") -> list[Tensor]:
            model = build()
            dtype = next(model.parameters()).dtype
            train(e, model, OPTIMIZERS["adam"](model.parameters()), data(60, dtype), 7, run_dir=folder, **settings)
            return all_of(model)

        nodes, size = world.nodes, world.size
        plain = World(size, shares=True, nodes=nodes, bucket=3000).run(lambda e: program(e, folder="full"))
        own = {"settings": {**settings, "comm_dtype": "bfloat16"}, "folder": f"run-{number}"}
        ours = world.run(lambda e, own=own: program(e, **own))
        assert_alike(ours, plain)
        assert warnings(f"run-{number}") == ["comm_dtype: bfloat16 is for plan sharded on several nodes; not used here"]
        assert not warnings("full")
    uneven(on_nodes([2, 2]), Odd, MAKE["adam"], 2, comm_dtype="bfloat16", run_dir="used")
    assert not warnings("used")
    said = Path("used", "events.jsonl").read_text()
    assert "shared memory, bfloat16 between 2 nodes" in said


# Checkpoints


def exact(world: World, folder: str, **settings: Any) -> dict[str, Any]:
    """A run whose numbers have few bits, so that no sum of them is rounded: its last checkpoint."""

    def program(e: Communicator) -> bool:
        net = nn.Linear(12, 60)
        with torch.no_grad():
            for n, p in enumerate(net.parameters()):
                p.copy_((torch.arange(p.numel()) % (5 + n) - 2).view(p.shape))
        x = torch.arange(12.0 * 64).view(64, 12) % 3 - 1
        made = optim.SGD(net.parameters(), lr=0.5, momentum=0.5)
        ps = mpips.connect(net, made, communicator=e, run_dir=folder, server_trains=True, **settings)
        for _ in ps.epochs(2):
            for (batch,) in ps.batches((x,), 4, shuffle=False):
                loss = (net(batch) * (torch.arange(60) % 2)).sum() / 4
                loss.backward()
                ps.step(0.0)
        return is_sharded(ps)

    sharded = world.run(program)
    assert all(sharded) == (settings.get("plan") == "sharded")
    return tree_of(folder)


def test_the_checkpoint_is_the_same_whatever_the_nodes() -> None:
    expected = exact(World(4), "messages")
    worlds = {"one node": World(4, shares=True)} | {str(shape): on_nodes(shape) for shape in ([2, 2], [1, 3])}
    for name, world in worlds.items():
        tree = exact(world, name, plan="sharded")
        assert not tree["masters"]
        assert_same(tree, expected)
    tree = exact(on_nodes([2, 2]), "bfloat16", plan="sharded", comm_dtype="bfloat16")
    assert_same(tree.pop("masters"), {name: expected["parameters"][name] for name in ("bias", "weight")})
    expected.pop("masters")
    assert_same(tree, expected)


def odd_run(world: World, epochs: int, folder: str, make: Make = MAKE["adam"], **settings: Any) -> list[str]:
    settings = {"plan": "sharded", **settings}

    def program(e: Communicator) -> str:
        net = Odd()
        train(e, net, make(net), data(47), 5, epochs, True, run_dir=folder, **settings)
        return sha(net)

    return world.run(program)


@pytest.mark.parametrize(("name", "wire"), [("momentum", "bfloat16"), ("adam", "bfloat16"), ("adam", "full")])
def test_a_run_resumes_on_the_same_nodes_bit_for_bit(name: str, wire: str) -> None:
    settings: dict[str, Any] = {"comm_dtype": wire, "make": MAKE[name]}
    expected = odd_run(on_nodes([2, 1]), 2, "whole", **settings)
    odd_run(on_nodes([2, 1], 1), 1, "cut", **settings)
    saved = last(Path("cut"))
    assert bool(saved["masters"]) == (wire == "bfloat16")
    if saved["masters"]:
        assert saved["masters"].keys() == {name for name, _ in Odd().named_parameters()}
        assert any(not torch.equal(saved["masters"][n], saved["parameters"][n]) for n in saved["masters"])
    assert odd_run(on_nodes([2, 1], 2), 2, "cut", resume="auto", **settings) == expected
    assert_same(tree_of("cut"), tree_of("whole"))


def drawing(folder: str, epochs: int, **settings: Any) -> tuple[list[str], list[Any]]:
    """Validations, and saves of the script's own, between rounds."""

    def program(e: Communicator) -> tuple[str, Any]:
        net = mlp()
        ps = mpips.connect(
            net, OPTIMIZERS["adam"](net.parameters()), communicator=e, run_dir=folder, plan="sharded", **settings
        )
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(30), 5):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: float(net(data(30)[0]).sum()))
            ps.save()
        return sha(net), ps._roles.server.report.values if ps._roles.server else None

    found = on_nodes([2, 1]).run(program)
    return [weights for weights, _ in found], found[0][1]


def test_resume_from_every_checkpoint_is_exact() -> None:
    settings: dict[str, Any] = {"comm_dtype": "bfloat16", "checkpoint": {"every": 1, "keep": 100}}
    expected = drawing("whole", 2, **settings)
    files = sorted(Path("whole", "checkpoints").glob("*.h5"))
    assert len(files) >= 6
    for file in (*files[:3], files[-2]):  # in the first epoch, at its end, where the next begins, and before the last round
        assert drawing(f"from-{file.stem}", 2, resume=str(file), **settings) == expected, file.stem


KINDS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "bfloat16": ([2, 1], {"comm_dtype": "bfloat16"}),
    "full": ([2, 1], {}),
    "root": ([2, 1], {"plan": "root"}),
    "other nodes": ([1, 1, 1], {"comm_dtype": "bfloat16"}),
    "fewer": ([1, 1], {"comm_dtype": "bfloat16"}),
    "one node": ([3], {"comm_dtype": "bfloat16"}),
}


def test_a_run_resumes_under_another_wire_plan_or_shape() -> None:

    def program(e: Communicator, epochs: int, kind: str, folder: str, **settings: Any) -> tuple[str, float]:
        net, given = mlp(), data(60)
        settings = {"plan": "sharded", "run_dir": folder, **KINDS[kind][1], **settings}
        train(e, net, MAKE["adam"](net), given, 9, epochs, True, **settings)
        return sha(net), F.cross_entropy(net(given[0]), given[1]).item()

    whole = on_nodes([2, 1]).run(lambda e: program(e, 2, "full", "whole"))
    ways = [("full", "root"), ("root", "bfloat16"), ("bfloat16", "full")]
    ways += [("bfloat16", other) for other in ("other nodes", "fewer", "one node")]
    for before, after in ways:
        folder = f"{before}-{after}"
        begin, go_on = partial(program, epochs=1, kind=before), partial(program, epochs=2, kind=after, resume="auto")
        on_nodes(KINDS[before][0]).run(partial(begin, folder=folder))
        ended = on_nodes(KINDS[after][0], 1).run(partial(go_on, folder=folder))
        assert ended == ended[:1] * len(ended), folder
        assert len({weights for weights, _ in ended}) == 1
        assert after == "fewer" or ended[0][1] == pytest.approx(whole[0][1], rel=0.01), folder
        assert bool(last(Path(folder))["masters"]) == (after in ("bfloat16", "other nodes", "fewer"))


def test_a_rank_that_dies_anywhere_ends_the_others_and_the_run_resumes() -> None:
    def run(world: World, folder: str, **settings: Any) -> tuple[list[str], list[str]]:
        ends: list[str] = []

        def program(e: Communicator) -> str:
            net = cnn()
            made = OPTIMIZERS["adam"](net.parameters())
            try:
                given = {"plan": "sharded", "checkpoint": {"every": 3}, **settings}
                train(e, net, made, data(30), 5, 2, True, run_dir=folder, **given).close()
            except BaseException as error:
                ends.append(type(error).__name__)
                raise
            return sha(net)

        try:
            return world.run(program), ends
        except Killed:
            return [], ends

    for wire in ("full", "bfloat16"):
        whole = on_nodes([2, 2], 3)
        expected, _ = run(whole, f"whole-{wire}", comm_dtype=wire)
        assert expected == expected[:1] * 3
        for number, call in enumerate(range(40 + 17 * (wire == "full"), min(whole.calls), 97)):
            world = on_nodes([2, 2], call)
            world.kill(number % 4, call)
            ended, how = run(world, f"killed-{wire}-{call}", comm_dtype=wire)
            assert not ended
            assert sorted(how) == ["CommunicatorError"] * 3 + ["Killed"], f"rank {number % 4} died at call {call}"
            again, _ = run(on_nodes([2, 2], call + 1), f"killed-{wire}-{call}", resume="auto", comm_dtype=wire)
            assert again == expected, f"rank {number % 4} died at call {call}"


# Where nodes do not share


@pytest.mark.parametrize(
    "settings",
    [{"plan": "sharded", "deterministic": True}, {"plan": "sharded", "shared_memory": False}],
    ids=["deterministic", "not to share"],
)
def test_by_messages_where_node_groups_are_not_for_it(settings: dict[str, Any]) -> None:
    """With the bits of any run by messages."""

    def program(e: Communicator, **given: Any) -> tuple[str, bool]:
        net = cnn()
        ps = train(e, net, OPTIMIZERS["adam"](net.parameters()), data(61), 7, 2, True, **given)
        waits = 2 * 4 + 1  # rounds in which all wait: at both ends of loops, the ends of epochs, validations, and the end
        assert e.traffic["reduce calls"] == ps.round + waits
        return sha(net), is_shared(ps)

    own = {key: value for key, value in settings.items() if key == "deterministic"}
    assert on_nodes([2, 2]).run(lambda e: program(e, **settings)) == World(4).run(lambda e: program(e, **own))


def test_auto_shares_between_nodes_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(e: Communicator) -> bool:
        net = mlp()
        return is_sharded(train(e, net, OPTIMIZERS["adam"](net.parameters()), data(30), 7))

    monkeypatch.setattr("mpips.reduce.choice.SMALL", 1000)
    assert on_nodes([2, 2]).run(program) == [True] * 3


# What is sent


class Spy(SimulatedLeaderGroup):
    """Counts."""

    bytes: Counter[tuple[int, int]] = Counter()
    calls: Counter[str] = Counter()

    def sendrecv(self, sent: Any, taken: Any) -> Any:
        """See `LeaderGroup`."""
        self.calls["swap"] += 1
        for node, part in sent:
            assert part.nbytes, "nothing is not sent"
            self.bytes[self.node, node] += part.nbytes
            self.calls["largest"] = max(self.calls["largest"], part.nbytes)
        return super().sendrecv(sent, taken)

    def _meet(self, call: str, values: Tensor, finish: Any) -> Tensor:
        self.calls[call] += 1
        self.calls["bytes"] += values.nbytes
        return super()._meet(call, values, finish)


@WIRES
@pytest.mark.parametrize("shape", [[2, 2], [1, 3], [1, 1, 1], [2, 1, 2]], ids=str)
def test_each_node_sends_its_share_of_the_model_twice(shape: Shape, wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (N - 1) / N of it in a round, the least there is; half of that in 16 bits. All else is the tail and 300 bytes.

    In a round without update no weights travel, nor at any other time.
    """
    monkeypatch.setattr(simulated, "SimulatedLeaderGroup", Spy)
    monkeypatch.setattr(Spy, "bytes", Counter())
    monkeypatch.setattr(Spy, "calls", Counter())
    bucket, nodes = 1500, len(shape)
    samples = data(80)
    samples[0][-8 * (sum(shape) - 1) :] = math.nan  # in the last round, which takes no update

    def program(e: SimulatedCommunicator) -> tuple[int, int, int, int]:
        model = mlp()
        settings: dict[str, Any] = {"plan": "sharded", "comm_dtype": wire, "nonfinite": "skip"}
        ps = mpips.connect(model, OPTIMIZERS["adam"](model.parameters()), communicator=e, run_dir="run", **settings)
        before: dict[str, int] = {}
        for x, y in ps.batches(samples, 8, shuffle=False):
            before = before or dict(e.traffic)  # all have met at the beginning of the loop
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        assert all(e.traffic[call] == before.get(call, 0) for call in e.traffic), "who does not lead sends nothing"
        half = ps._worker
        ps.validate(lambda: 1.0)
        push, numel = half.replica.push, half.replica.flat.numel
        return int(ps.round), int(ps._control.version), numel, push.message[numel:].nbytes

    rounds_done, updates, numel, tail = on_nodes(shape, bucket=bucket).run(program)[0]
    width = 4 if wire == "full" else 2
    assert 0 < updates < rounds_done
    rounds_done += 4  # in which all wait: at both ends of the loop, to validate, at the end of the script
    each = (nodes - 1) / nodes * numel * width * (rounds_done + updates)
    assert sum(Spy.bytes.values()) == pytest.approx(each * nodes, rel=1e-9)
    for node in range(nodes):
        assert sum(n for (sender, _), n in Spy.bytes.items() if sender == node) == pytest.approx(each, rel=0.15)
    largest = bucket // width // (nodes - 1)
    assert Spy.calls["largest"] <= largest * width
    least = nodes * (largest - 2 * layout.GRAIN + 1)  # elements of a bucket
    assert Spy.calls["swap"] <= nodes * (rounds_done + updates) * -(-numel // least)
    assert Spy.calls["bytes"] / rounds_done / nodes < tail + 300
    assert (Spy.calls["sum"], Spy.calls["min"]) == (rounds_done * nodes,) * 2
    assert Spy.calls["tell"] == 3 * rounds_done * nodes, "the verdict, and what lies around the weights"


# Parts, and settings


def test_a_bucket_is_for_all_other_nodes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "LEAST", 100)
    assert bucket_length(1200, contents(CODECS["full"]), 2) == 300
    assert bucket_length(1200, contents(CODECS["full"]), 4) == 100
    assert bucket_length(1200, contents(CODECS["bfloat16"]), 4) == 200
    assert bucket_length(12, contents(CODECS["full"]), 4) == 100, "fewer would cost more in latency"


@pytest.mark.parametrize(("wire", "nodes"), [("full", 2), ("full", 3), ("bfloat16", 2), ("bfloat16", 8)])
def test_a_round_has_many_buckets_none_of_them_tiny(wire: str, nodes: int) -> None:
    """What is done before the first bucket has left and after the last has come is not hidden by the others."""
    codec = CODECS[wire]
    for megabytes in (1, 4, 16, 25, 64, 100, 250, 1000, 4000):
        sent = megabytes * (1 << 20) // 4 * codec.bytes(1) * (nodes - 1) // nodes  # by a node, in either half of the round
        for overlap, largest in ((False, layout.BUCKET), (True, layout.EARLY)):
            given = replace(contents(codec, overlap), weights=slice(0, megabytes << 20))
            bucket = bucket_length(1 << 30, given, nodes) * codec.bytes(1) * (nodes - 1)
            assert bucket <= largest
            assert bucket > 0.99 * layout.SMALLEST, "ranks would wait for each other more than they save"
            assert sent // bucket >= layout.STEPS or bucket <= layout.SMALLEST
            assert bucket > 0.99 * largest or sent // bucket <= layout.STEPS * 1.01, "as large as may be"


@pytest.mark.parametrize(
    ("key", "given", "allowed"),
    [
        ("ranks_per_node", "-1", "a whole number, 0 or more"),
        ("ranks_per_node", "1.5", "a whole number"),
        ("ranks_per_node", "all", "a whole number"),
        ("comm_dtype", "float16", "full, bfloat16"),
        ("comm_dtype", "", "full, bfloat16"),
    ],
)
def test_one_line_says_which_setting_is_wrong(key: str, given: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_mode(resolve({}, [f"--{key}={given}"]))  # which looks for what a setting names in another module's table
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{key}: given ")
    assert given in said
    assert f"allowed: {allowed}" in said


def test_settings_have_their_defaults() -> None:
    assert (Config().ranks_per_node, Config().comm_dtype) == (0, "full")
    assert resolve({}, ["--ranks_per_node=2", "--comm_dtype=bfloat16"]).settings()["comm_dtype"] == "bfloat16"


# Over MPI


def on_mpi(program: Callable[[Any], Any], ranks_per_node: int, bucket: int = 3000) -> list[Any]:
    """Run a program on all ranks of this job, neighbours on nodes of their own; every rank gets all workers' results."""
    from mpi4py import MPI

    from mpips.comm.mpi import MpiCommunicator

    comm = MPI.COMM_WORLD.Dup()
    communicator = MpiCommunicator(comm, bucket, cuda_aware=False, ranks_per_node=ranks_per_node)
    results: list[Any] = comm.allgather(as_simulated(program)(communicator))
    comm.Free()
    return [result for result in results if result is not None]  # of a rank that only serves


def shape_of(size: int, ranks_per_node: int) -> Shape:
    return [min(ranks_per_node, size - first) for first in range(0, size, ranks_per_node)]


def trained(e: Any, **settings: Any) -> tuple[str, list[list[int]], str]:
    """What came of it: the weights, the nodes; where nothing but the tail was sent by all.

    Without BatchNorm's statistics: more than two of them MPI adds up in an order of its own.
    """
    net = cnn()
    made = OPTIMIZERS["adam"](net.parameters())
    ps = train(e, net, made, data(101), 7, 2, True, plan="sharded", clip=0.5, **settings)
    transport = ps._worker.server.transport
    assert isinstance(transport, SharedMemoryTransport)
    assert not e.traffic["reduce calls"]
    return sha(nn.ParameterList(net.parameters())), transport.group.nodes, transport.how


@pytest.mark.mpi(min_size=2)
@WIRES
@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("server_trains", [False, True])
def test_over_mpi_the_bits_are_those_of_the_simulated_run(ranks_per_node: int, wire: str, server_trains: bool) -> None:
    from mpi4py import MPI

    shape = shape_of(MPI.COMM_WORLD.size, ranks_per_node)
    settings: dict[str, Any] = {"server_trains": server_trains, "comm_dtype": wire}
    expected = on_one(lambda: on_nodes(shape).run(lambda e: trained(e, run_dir="simulated", **settings)))
    assert on_mpi(lambda e: trained(e, run_dir="mpi", **settings), ranks_per_node) == expected
    assert [len(node) for node in expected[0][1]] == shape
    assert len(shape) == 1 or f"{'float32' if wire == 'full' else wire} between {len(shape)} nodes" in expected[0][2]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", CODECS)
def test_over_mpi_a_round_keeps_its_promises(kind: str, tiny_pieces: None) -> None:
    """As it does in the simulated world, but for what other ranks' memory would tell."""
    from mpi4py import MPI

    shape = shape_of(MPI.COMM_WORLD.size, 2)
    if len(shape) == 1:
        pytest.skip("one node")
    codec = CODECS[kind]

    def program(e: Any) -> None:
        for cuts, count, step in ((even(shape), 2, 3), (even(shape), 1, 100), ([0.0] * (len(shape) - 1), 3, 6)):
            e._bucket = step * codec.bytes(1) * (len(shape) - 1)
            group = e.node_group(contents(codec, kind == "overlap"))
            assert isinstance(group, ReduceScatterGroup)
            for _ in range(3):
                rounds(group, cut(shape, cuts, count), None, lambda: None)

    on_mpi(program, 2)


def test_other_weights_than_those_stepped_are_refused_between_nodes() -> None:
    def program(e: SimulatedCommunicator) -> None:
        group = e.node_group(contents(CODECS["full"]))
        assert group
        with pytest.raises(ValueError, match="shared_memory=False"):
            group.broadcast(lambda: None, whole=True)

    on_nodes([2, 2]).run(program)
