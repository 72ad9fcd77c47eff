"""Rounds on several nodes with all slices served by rank 0: what each step promises, what is sent, and the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import mpips
from mpips.comm import Communicator, simulated
from mpips.comm.codecs import Codec
from mpips.comm.node_group import BufferSpec
from mpips.comm.root_reduce import RootReduceGroup
from mpips.comm.simulated import Killed, SimulatedCommunicator, World
from mpips.comm.simulated_group import SimulatedBarrier, SimulatedLeaderGroup
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.comm import test_multi_node
from tests.comm.test_mpi import on_one
from tests.comm.test_multi_node import (
    LENGTH,
    LINES,
    MAKE,
    MODELS,
    SHAPES,
    TAIL,
    WEIGHTS,
    Shape,
    Uneven,
    all_of,
    assert_close,
    exact,
    on_mpi,
    on_nodes,
    poisoned,
    reference,
    shape_of,
    uneven,
)
from tests.helpers.programs import OPTIMIZERS, cnn, data, metrics, mlp, sha, train
from tests.promises.test_resume import assert_same, last
from tests.reduce.test_shared_memory_transport import Odd, assert_alike, differ, is_shared

small_pieces = test_multi_node.small_pieces
BUCKETS = pytest.mark.parametrize("bucket", [3000, 1 << 24], ids=["several buckets", "one bucket"])
ROUNDS = 3


def contents() -> BufferSpec:
    pull, where = 4 * (2 + WEIGHTS + 3), slice(8, 8 + 4 * WEIGHTS)
    return BufferSpec(LENGTH, torch.float32, TAIL, pull, where, torch.float32, LINES, 2, False, True, Codec(torch.float32))


def rounds(group: RootReduceGroup, pause: Callable[[], None]) -> None:
    """Rounds in which everything is written bit by bit, others coming in between, and whoever reads looks at all there is."""
    size, nodes = sum(map(len, group.nodes)), group.nodes
    node = nodes.index(list(group.members))
    group.serve([[slice(0, WEIGHTS), *[slice(WEIGHTS, WEIGHTS)] * (size - 1)]], slice(WEIGHTS, TAIL))
    heard, pull = torch.zeros(LENGTH - TAIL), group.buffers.pull.view(torch.float32)
    row = group.buffers.row
    faults = torch.full((LINES,), math.inf, dtype=torch.float64)

    def slowly(target: Tensor, value: float) -> None:
        for part in target.split(max(1, -(-len(target) // 2))):
            pause()
            part.fill_(value)

    class Take:
        def __init__(self) -> None:
            self.faults, self.added, self.finished, self.said = faults, torch.zeros(TAIL), torch.zeros(TAIL), 0

        def reduce_local(self, part: slice, rows: Sequence[Tensor]) -> None:
            pause()
            assert group.sample_weights.tolist() == [number + rank / 8 for rank in group.members], "a weight that is not said"
            for rank, other in zip(group.members, rows, strict=True):
                assert (other == 10 * number + rank).all(), "a push that is not whole, or of another round"
            self.added[part] += 1
            if part.stop == WEIGHTS:
                faults[group.rank % LINES] = number
            slowly(rows[0], -number - node)

        def report_nonfinite(self, found: Tensor) -> None:
            self.said += 1
            assert (found == number).any(), "faults that have not come"
            row[TAIL] += 1000  # in the tail, which is to leave with it

        def reduce_remote(self, part: slice, sums: Sequence[Tensor]) -> None:
            raise AssertionError("they are reduced")

        def finalize(self, part: slice, total: Tensor) -> None:
            assert group.leads
            pause()
            behind, gradients = (sum(10 * number + r for r in range(size)), -sum(number + n for n in range(len(nodes))))
            expected = behind if part.start >= WEIGHTS else gradients
            assert (total == expected).all(), "a sum that is not whole"
            self.finished[part] += 1

    for number in range(1, 1 + ROUNDS):
        slowly(row, 10 * number + group.rank)
        work = Take()
        group.reduce(number + group.rank / 8, heard, work)
        assert work.said == (group.rank == group.members[0]), "a leader speaks for its node, once"
        if group.leads:
            whole = sum(10 * number + r for r in range(size))
            assert heard.tolist() == [whole + 1000 * len(nodes), *[whole] * (LENGTH - TAIL - 1)], "a tail that is not whole"
            assert torch.equal(work.finished, torch.ones(TAIL)), "each element once"
            slowly(group.weights, number)
        group.report(torch.zeros(LINES, dtype=torch.float64), "min")
        group.decide(torch.zeros(2, dtype=torch.float64))
        for told in (number, number + 0.5):  # the second as after a validation

            def fill(told: float = told) -> None:
                slowly(pull[:2], told)
                slowly(pull[2 + WEIGHTS :], told)

            group.broadcast(fill, moved=group.leads and told == number)
            for part, value in ((group.weights, number), (pull[:2], told), (pull[2 + WEIGHTS :], told)):
                pause()
                assert (part == value).all(), "a pull message that is not whole"


def simulate(shape: Shape, bucket: int, seed: int) -> None:
    world = on_nodes(shape, seed, bucket)
    if seed % 2:
        world.choose = Uneven(seed)
        world.choose.slow = seed // 2 % world.size

    def program(e: SimulatedCommunicator) -> None:
        group = e.node_group(contents())
        assert isinstance(group, RootReduceGroup)
        rounds(group, lambda: world.pause(e.rank))

    world.run(program)


@pytest.mark.parametrize("bucket", [28, 1000], ids=["several buckets", "one bucket"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_keeps_its_promises_whatever_the_schedule(shape: Shape, bucket: int) -> None:
    for seed in range(8):
        simulate(shape, bucket, seed)


MEETINGS = {28: ["said", *(f"bucket {n}" for n in range(4)), "word"], 1000: ["push", "word"]}
NEEDED = [
    *((28, call, hole) for call in ("arrive", "release") for hole in ("said", "bucket 3", "word")),
    *((1000, call, hole) for call in ("arrive", "release") for hole in ("push", "word")),
]


@pytest.mark.parametrize(("bucket", "call", "hole"), NEEDED)
def test_each_meeting_is_needed(bucket: int, call: str, hole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting there, some schedule breaks a promise."""

    class Loose(SimulatedBarrier):
        times = 0

        def arrive(self, *given: Any) -> None:
            if not (self.leads and self._without("arrive")):
                super().arrive(*given)

        def release(self) -> None:
            if self.leads or not self._without("release"):
                super().release()

        def _without(self, name: str) -> bool:
            if name != call:
                return False
            self.times += 1
            if MEETINGS[bucket][(self.times - 1) % len(MEETINGS[bucket])] != hole:
                return False
            self.world.begin(self.rank, name)
            self.world.arrived_here[self.rank] += name == "arrive"
            return True

    monkeypatch.setattr(simulated, "SimulatedBarrier", Loose)
    with pytest.raises(AssertionError, match=r"not whole|not said|not come"):
        for seed in range(40):
            simulate([3, 1], bucket, seed)


# Training


@BUCKETS
@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_are_those_of_plain_pytorch_in_the_documented_order(kind: str, bucket: int) -> None:
    """Bit for bit: batches of several sizes, shards that end earlier, absent gradients, statistics."""
    for shape, settings in (([2, 2], {"clip": 0.5}), ([1, 3], {"server_trains": True})):
        settings = {"samples": (4, 16, 8, 2), **settings}  # products with these are exact
        expected = reference(shape, MODELS[kind](), MAKE["adam"], **settings)
        assert differ(expected, all_of(MODELS[kind]())), "something is learnt"
        ours = uneven(on_nodes(shape, 1, bucket), MODELS[kind], MAKE["adam"], plan="root", **settings)
        assert_alike(ours, [expected])


class GlobalNorm(optim.SGD):
    """A class of the script's own, which may look at everything."""


@BUCKETS
def test_an_optimizer_that_may_look_at_everything_is_the_server_s(bucket: int) -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        return GlobalNorm(model.parameters(), lr=0.05, momentum=0.9)

    settings: dict[str, Any] = {"samples": (4, 16, 8, 2)}
    expected = reference([2, 1, 2], Odd(), make, **settings)

    def program(e: Communicator) -> bool:
        net = mlp()
        return is_shared(train(e, net, make(net), data(20), 5, plan="sharded"))

    assert on_nodes([2, 1, 2]).run(program) == [True] * 4
    found = uneven(on_nodes([2, 1, 2], 3, bucket), Odd, make, plan="root", **settings)
    assert_close(found, expected, 1e-6)


@BUCKETS
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_nonfinite_raise_names_rank_and_tensor_and_moves_nothing(name: str, bucket: int) -> None:
    for shape, guilty, settings in (
        ([2, 2], 3, {}),
        ([1, 2, 1], 2, {}),
        ([2, 2], 0, {"server_trains": True}),
        ([1, 3], 3, {"server_trains": True, "rule": "normclip"}),
    ):
        for said, version, _ in poisoned(on_nodes(shape, 1, bucket), {guilty: (name, math.nan)}, plan="root", **settings):
            assert f"rank {guilty} has a NaN or Inf in the gradient of {name}, round 3" in said, f"{shape}, {guilty}"
            assert version == 2


@BUCKETS
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_nonfinite_skip_and_drop_are_as_by_messages(nonfinite: str, bucket: int) -> None:
    bad = {1: ("0.bias", math.nan), 3: ("2.weight", math.inf)}
    expected = poisoned(World(4), bad, nonfinite=nonfinite, run_dir="mpi")
    ours = poisoned(on_nodes([2, 2], 1, bucket), bad, nonfinite=nonfinite, run_dir="nodes", plan="root")
    assert [version for _, version, _ in ours] == [version for _, version, _ in expected]
    assert_close([weights for *_, weights in ours], expected[0][2], 1e-5)
    for a, b in zip(metrics(Path("nodes")), metrics(Path("mpi")), strict=True):
        assert (a["samples"], a["version"]) == (b["samples"], b["version"])


@BUCKETS
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
def test_a_sum_that_overflows_between_nodes_is_not_taken(nonfinite: str, bucket: int) -> None:
    bad = dict.fromkeys((1, 2), ("0.weight", 2.5e37))
    for said, version, weights in poisoned(on_nodes([2, 2], 1, bucket), bad, plan="root", nonfinite=nonfinite):
        if nonfinite == "raise":
            assert "rank 0 has a NaN or Inf in the gradient of 0.weight, round 3" in said
        assert version == (2 if nonfinite == "raise" else 4)
        assert all(tensor.isfinite().all() for tensor in weights)


def test_the_checkpoint_is_the_same_whatever_the_nodes() -> None:
    expected = exact(World(4), "messages")
    for number, (shape, bucket) in enumerate((([2, 2], 100), ([1, 3], 1 << 20))):
        assert_same(exact(on_nodes(shape, 1, bucket), f"nodes-{number}", plan="root"), expected)


def test_a_rank_that_dies_anywhere_ends_the_others_and_the_run_resumes() -> None:
    def run(world: World, folder: str, **settings: Any) -> list[str]:
        def program(e: Communicator) -> str:
            net = mlp()
            made = OPTIMIZERS["adam"](net.parameters())
            train(e, net, made, data(30), 5, 2, True, run_dir=folder, plan="root", checkpoint={"every": 3}, **settings)
            return sha(net)

        try:
            return world.run(program)
        except Killed:
            return []

    whole = on_nodes([2, 2], 3)
    expected = run(whole, "whole")
    assert expected == expected[:1] * 3
    for number, call in enumerate(range(40, min(whole.calls), 53)):
        world = on_nodes([2, 2], call)
        world.kill(number % 4, call)
        assert not run(world, f"killed-{call}")
        assert run(on_nodes([2, 2], call + 1), f"killed-{call}", resume="auto") == expected, f"died at call {call}"
    assert last(Path("whole"))["round"]


# What is sent


class Spy(SimulatedLeaderGroup):
    """Counts."""

    calls: Counter[str] = Counter()

    def sendrecv(self, sent: Any, taken: Any) -> Any:
        raise AssertionError("nothing is served elsewhere")

    def _meet(self, call: str, values: Tensor, finish: Any) -> Tensor:
        self.calls[call] += 1
        self.calls[f"{call} bytes"] += values.nbytes
        return super()._meet(call, values, finish)


@pytest.mark.parametrize(("bucket", "merges"), [(1 << 24, 1), (700, 4 + 1)])
def test_a_round_is_a_reduce_and_a_bcast_of_the_leaders(bucket: int, merges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model one of each, also where all wait. Who does not lead sends nothing."""
    monkeypatch.setattr(simulated, "SimulatedLeaderGroup", Spy)
    monkeypatch.setattr(Spy, "calls", Counter())

    def program(e: SimulatedCommunicator) -> tuple[int, int, int, int]:
        net = mlp()
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=e, run_dir="run", plan="root")
        before: dict[str, int] = {}
        for x, y in ps.batches(data(60), 5):
            before = before or dict(e.traffic)  # all have met at the beginning of the loop
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss)
        assert all(e.traffic[call] == before.get(call, 0) for call in e.traffic)
        ps.validate(lambda: 1.0)
        replica = ps._worker.replica
        return ps.round, replica.flat.numel, replica.push.message.nbytes, replica.pull.message.nbytes

    done, numel, push, pull = on_nodes([2, 1, 2], bucket=bucket).run(program)[0]
    assert -(-4 * numel // 700) == 4
    waits = 4  # rounds in which all wait: at both ends of the loop, to validate, at the end of the script
    assert Spy.calls["sum"] == 3 * merges * (done + waits)
    assert Spy.calls["sum bytes"] == 3 * push * (done + waits)
    assert Spy.calls["tell"] == 3 * (done + waits)
    assert Spy.calls["tell bytes"] == 3 * pull * (done + waits)


# Over MPI


@pytest.mark.mpi(min_size=2)
@BUCKETS
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_over_mpi_the_weights_are_those_of_the_simulated_run(ranks_per_node: int, bucket: int) -> None:
    """Bit for bit on two nodes; of more MPI adds up the sums in an order of its own."""
    from mpi4py import MPI

    shape = shape_of(MPI.COMM_WORLD.size, ranks_per_node)

    def program(e: Any, folder: str) -> list[Tensor]:
        net = cnn()
        ps = train(e, net, OPTIMIZERS["momentum"](net.parameters()), data(101), 7, 2, True, plan="root", run_dir=folder)
        transport = ps._worker.server.transport
        assert isinstance(transport, SharedMemoryTransport)
        assert not e.traffic["reduce calls"]
        assert [len(node) for node in transport.group.nodes] == shape
        return all_of(net)

    expected = on_one(lambda: on_nodes(shape, bucket=bucket).run(lambda e: program(e, "simulated")))
    ours = on_mpi(lambda e: program(e, "mpi"), ranks_per_node, bucket)
    assert_alike(ours, ours[:1])
    if len(shape) <= 2:
        assert_alike(ours, expected)
    else:
        assert_close(ours, expected[0], 1e-5)


@pytest.mark.mpi(min_size=2)
def test_over_mpi_a_round_keeps_its_promises() -> None:
    """As it does in the simulated world, but for what other ranks' memory would tell."""
    from mpi4py import MPI

    if len(shape_of(MPI.COMM_WORLD.size, 2)) == 1:
        pytest.skip("one node")

    def program(e: Any) -> None:
        for bucket in (28, 1000):
            e._bucket = bucket
            group = e.node_group(contents())
            assert isinstance(group, RootReduceGroup)
            for _ in range(3):
                rounds(group, lambda: None)

    on_mpi(program, 2)
