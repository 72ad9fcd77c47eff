"""Rounds that go on while the script does: what leaves during backward, and comes while data is loaded, changes no bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpips
from mpips.comm import Communicator
from mpips.comm import reduce_scatter as sharded
from mpips.comm.simulated import World
from mpips.model import layout
from mpips.model.bucket_ready import BucketReadiness
from mpips.model.flat import lay_out
from tests.comm.test_mpi import as_simulated
from tests.helpers.programs import OPTIMIZERS, cnn, data, mlp, sha

BUCKET = 640  # bytes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models travel in many steps."""
    monkeypatch.setattr(layout, "GRAIN", 64)
    monkeypatch.setattr(sharded, "LEAST", 160)
    monkeypatch.setattr(layout, "PIECE", 256)
    monkeypatch.setattr(layout.pieces, "__defaults__", (256,))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 200), st.randoms())
def test_a_step_waits_for_the_tensors_it_has_a_part_of(numels: list[int], length: int, order: random.Random) -> None:
    slots, numel = lay_out((str(n), torch.empty(count, device="meta")) for n, count in enumerate(numels))
    steps = [
        [slice(start, start + length // 2), slice(start + length // 2, start + length)] for start in range(0, numel, length)
    ]
    ready = BucketReadiness([*steps, [slice(numel, numel + 5), slice(0, 0)]], slots)
    there: set[int] = set()
    numbers = list(range(len(slots)))
    order.shuffle(numbers)
    for number in numbers:
        for at, (one, other) in enumerate(steps):
            needs = {n for n, s in enumerate(slots) if s.offset < other.stop and one.start < s.offset + s.numel}
            assert ready._events[at].is_set() == (bool(needs) and needs <= there)
        ready.mark(number)
        there.add(number)
    assert not ready._events[len(steps) + 1].is_set()
    ready.end()
    for step in range(len(steps) + 2):
        ready.wait(step, None)
    ready.begin()
    assert not any(event.is_set() for event in ready._events)


def test_what_is_to_be_done_meanwhile_is_done_until_then() -> None:
    slots, numel = lay_out([("one", torch.empty(10, device="meta"))])
    ready = BucketReadiness([[slice(0, numel)]], slots)
    calls = []

    def meanwhile() -> None:
        calls.append(1)
        if len(calls) == 3:
            ready.mark(0)

    ready.wait(0, meanwhile)
    assert len(calls) == 3


def trained(e: Communicator, overlap: bool, backward: str = "ps", model: Any = cnn, **settings: Any) -> dict[str, Any]:
    """Weights, sums of what was seen, and how the run was made."""
    net = model()
    given = data(101, next(net.parameters()).dtype)
    settings = {"run_dir": f"run-{e.name}-{overlap}", "plan": "sharded", **settings}
    ps = mpips.connect(net, OPTIMIZERS["momentum"](net.parameters()), communicator=e, overlap=overlap, **settings)
    seen = []
    for _ in ps.epochs(2):
        for number, (x, y) in enumerate(ps.batches(given, 7)):
            loss = F.cross_entropy(net(x), y)
            if backward == "accumulated" and number % 2:
                loss.backward()  # type: ignore[no-untyped-call]
                continue
            if backward == "plain" or (backward == "by turns" and number % 2):
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                ps.backward(loss)
            ps.step(loss.detach())
            assert all(p.grad is None for p in net.parameters()), "of what is on its way nothing is left to the script"
            seen.append(float(loss.detach()))
    transport = ps._worker.server.transport
    return {
        "weights": sha(net),
        "losses": seen,
        "steps": len(getattr(getattr(transport, "group", None), "push_steps", ())),
        "rounds": ps.round,
    }


def half() -> nn.Module:
    return mlp().bfloat16()


def simulate(nodes: list[int], overlap: bool, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    world = World(sum(nodes), seed=seed, shares=True, nodes=nodes, bucket=BUCKET)
    return world.run(lambda e: trained(e, overlap, **settings))


@pytest.mark.parametrize("nodes", [[2, 2], [1, 3], [1, 1, 1]])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"server_trains": True},
        {"clip": 0.1},
        {"comm_dtype": "bfloat16"},
        {"backward": "accumulated"},
        {"backward": "plain"},
        {"backward": "by turns"},
        {"model": half, "backward": "by turns"},
        {"model": half, "backward": "accumulated", "server_trains": True},
    ],
    ids=lambda settings: str({key: getattr(value, "__name__", value) for key, value in settings.items()}),
)
def test_no_bit_changes(nodes: list[int], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = simulate(nodes, False, **{**settings, "backward": settings.get("backward", "plain")})
    assert expected[0]["steps"] > 1
    assert simulate(nodes, True, seed=1, **settings) == expected


class Sometimes(nn.Module):
    """A tensor without gradient on some batches, one never used, and layers that are called in another order than they lie."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.last = nn.Linear(30, 5)
        self.at_times = nn.Parameter(torch.ones(30))
        self.unused = nn.Parameter(torch.ones(200))
        self.first = nn.Linear(12, 30)
        self.again = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))
        if x[0, 0] > 0:
            hidden = hidden * self.at_times
        return self.last(hidden)


def test_tensors_without_gradients_do_not_hold_a_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(overlap: bool) -> list[dict[str, Any]]:
        world = World(4, shares=True, nodes=[2, 2], bucket=BUCKET)
        return world.run(lambda e: trained(e, overlap, model=Sometimes))

    assert run(True) == run(False)


def overlapping(
    program: Callable[[mpips.Run, nn.Module], Any], net: Callable[[], nn.Module] = mlp, **settings: Any
) -> list[Any]:
    def on_rank(e: Communicator) -> Any:
        model = net()
        made = OPTIMIZERS["sgd"](model.parameters())
        given = {"run_dir": "run", "plan": "sharded", "overlap": True, **settings}
        ps = mpips.connect(model, made, communicator=e, **given)
        return program(ps, model)

    return World(3, shares=True, nodes=[1, 2], bucket=BUCKET).run(on_rank)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_gradients_of_16_bits_are_in_the_push_message_before_they_may_leave(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> int:
        half = ps._worker
        ready = half.server.transport.ready
        assert ready
        push, flat, marked, mark = half.replica.push, half.replica.flat, 0, ready.mark

        def looked(number: int) -> None:
            nonlocal marked
            span = flat.slots[number].span
            assert torch.equal(push.gradients[span], flat.grad[span].float())
            marked += 1
            mark(number)

        ready.mark = looked  # type: ignore[method-assign]
        for x, y in ps.batches(data(105, torch.bfloat16), 7):
            loss = F.cross_entropy(net(x), y)
            ps.backward(loss)
            assert push.gradients.any() and torch.equal(push.gradients, flat.grad.float())
            ps.step(loss)
        return marked

    for model in (half, lambda: Sometimes().bfloat16()):
        assert all(overlapping(program, model, server_trains=True))


def test_the_samples_of_backward_and_step_are_the_same(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> None:
        for x, y in ps.batches(data(21), 7):
            loss = F.cross_entropy(net(x), y)
            ps.backward(loss, samples=7)
            ps.step(loss, samples=5)

    with pytest.raises(ValueError, match=r"samples=5 after ps.backward\(\) with samples=7"):
        overlapping(program)


class Reentrant(nn.Module):
    """Its layer is used twice, in parts that are recomputed by a backward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return self.last(x)


def test_gradients_that_have_left_are_not_accumulated_into(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> None:
        for x, y in ps.batches(data(60), 7):
            ps.backward(F.cross_entropy(net(x), y))

    with pytest.raises(RuntimeError, match=r"a second ps\.backward\(\) before ps\.step\(\)"):
        overlapping(program)


def test_a_script_that_breaks_out_of_a_loop_finds_the_new_weights(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> bool:
        same = False
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(60), 7):
                loss = F.cross_entropy(net(x), y)
                ps.backward(loss)
                ps.step(loss)
                break
            weights = [p.detach().clone() for p in net.parameters()]
            ps.validate(lambda: 0.0)
            same = all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
        return same

    assert all(overlapping(program))


def test_a_gradient_that_comes_twice_is_refused(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> None:
        for x, y in ps.batches(data(21), 7):
            loss = F.cross_entropy(net(x), y)
            ps.backward(loss)
            ps.step(loss)

    with pytest.raises(RuntimeError, match="a gradient twice"):
        overlapping(program, Reentrant)


def test_without_a_loop_over_a_shard_it_is_the_same(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> tuple[str, int]:
        for x, y in zip(*(part.split(7) for part in data(60)), strict=True):
            loss = F.cross_entropy(net(x[ps.worker :]), y[ps.worker :])
            ps.backward(loss, samples=7 - ps.worker)
            ps.step(loss, samples=7 - ps.worker)
        ps.save()
        return sha(net), ps.round

    results = overlapping(program)
    assert results == overlapping(program, overlap=False)
    assert results == [(results[0][0], 9)] * 2


@pytest.mark.parametrize("settings", [{"rule": "normclip"}, {"nonfinite": "drop"}, {"mode": "local_sgd"}], ids=str)
def test_what_must_see_all_gradients_first_does_not_overlap(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mpips.connect(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), overlap=True, **settings)
    assert capsys.readouterr().err.startswith("mpips: overlap: given True")


def test_a_model_that_is_used_before_the_next_batch_has_the_new_weights(here: None) -> None:
    def program(ps: mpips.Run, net: nn.Module) -> list[bool]:
        moved = []
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(60), 7):
                before = net(x).detach()
                for _ in range(1 + (not moved)):
                    loss = F.cross_entropy(net(x), y)
                    ps.backward(loss, samples=len(x))
                    ps.step(loss, samples=len(x))
                    after = net(x).detach()
                    moved.append(not torch.equal(after, before))
                    before = after
        return moved

    results = overlapping(program)
    assert all(moved and all(moved) for moved in results)


class Noisy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = data(60)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.rand(1) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), self.y[index]


def noisy(e: Communicator, epochs: int, stop_at: int = -1, **settings: Any) -> str:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    net = cnn()
    made = OPTIMIZERS["adam"](net.parameters())
    ps = mpips.connect(
        net, made, communicator=e, overlap=True, plan="sharded", checkpoint={"every": 1, "keep": 100}, **settings
    )
    for _ in ps.epochs(epochs):
        for x, y in ps.batches(Noisy(), 7):
            loss = F.cross_entropy(net(x), y)
            ps.backward(loss)
            ps.step(loss)
            if ps.round == stop_at:
                ps.stop()
    return sha(net)


@pytest.mark.parametrize("wire", ["full", "bfloat16"])
def test_resume_is_exact_though_the_next_batch_was_loaded_before_the_checkpoint(here: None, wire: str) -> None:
    def run(**settings: Any) -> list[str]:
        world = World(3, shares=True, nodes=[1, 2], bucket=BUCKET)
        return world.run(lambda e: noisy(e, 2, comm_dtype=wire, **settings))

    whole = run(run_dir="whole")
    rounds = sorted(Path("whole/checkpoints").glob("*.h5"))
    assert len(rounds) > 6
    for file in (rounds[1], rounds[4]):
        assert run(run_dir=f"again-{file.stem}", resume=str(file)) == whole


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    ("neighbours", "settings"),
    [
        (2, {"model": cnn}),
        (2, {"server_trains": True, "comm_dtype": "bfloat16"}),
        (1, {"backward": "accumulated"}),
        (2, {"model": Sometimes}),
        (2, {"model": half}),
    ],
    ids=["statistics", "bfloat16", "accumulated", "without gradients", "model of bfloat16"],
)
def test_over_mpi_the_bits_are_the_same(neighbours: int, settings: dict[str, Any]) -> None:
    from mpi4py import MPI

    from mpips.comm.mpi import MpiCommunicator

    comm = MPI.COMM_WORLD
    settings = {"model": mlp, **settings}
    nodes = [min(neighbours, comm.size - first) for first in range(0, comm.size, neighbours)]

    def ours(overlap: bool) -> list[dict[str, Any]]:
        communicator = MpiCommunicator(comm.Dup(), BUCKET, False, neighbours)
        found = comm.allgather(as_simulated(lambda e: trained(e, overlap, **settings))(communicator))
        return [result for result in found if result is not None]  # of a rank that only serves

    plain = ours(overlap=False)
    assert ours(overlap=True) == plain
    if settings["model"] is not cnn:  # of BatchNorm's statistics MPI adds up more than two in its own order
        expected = simulate(nodes, False, **settings, run_dir="simulated") if comm.rank == 0 else None
        assert plain == comm.bcast(expected)
