"""Rounds in shared memory: whoever serves which slice, the weights and the checkpoints are those of a run without it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model import layout
from mpips.model.message import CallError, NonFiniteError
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from mpips.server.contract import ContractError
from tests.helpers.programs import OPTIMIZERS, cnn, data, in_order, metrics, mlp, plain, sha, train
from tests.promises.test_resume import assert_same, last

Make = Callable[[Any], optim.Optimizer]
SAMPLES = (5, 11, 7, 3)  # of each worker's batches: weights that are no powers of two


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are cut up as large ones would be."""
    monkeypatch.setattr(layout, "GRAIN", 64)
    monkeypatch.setattr(layout, "PIECE", 256)
    monkeypatch.setattr(layout.pieces, "__defaults__", (256,))


class Odd(nn.Module):
    """Tied weights, channels-last, no dimension, no element, without a gradient always, or on some workers at times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.wide = nn.Linear(12, 100)
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.again = nn.Linear(12, 100, bias=False)
        self.again.weight = self.wide.weight
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(70))
        self.at_times = nn.Parameter(torch.ones(100))
        self.last = nn.Linear(36, 5)
        self.no_more = nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(x)) * self.scale
        if x[0, 0] > 0:
            hidden = hidden * self.at_times
        picture = self.conv(hidden[:, :64].reshape(-1, 4, 4, 4)).flatten(1)
        return self.last(torch.cat([picture, hidden @ self.again.weight], 1))


def grouped(make: Callable[..., optim.Optimizer], **settings: Any) -> Callable[[nn.Module], optim.Optimizer]:
    """In two groups with rates of their own; some ranks serve nothing of the second."""

    def build(model: nn.Module) -> optim.Optimizer:
        named = dict(model.named_parameters())
        skipped = {"wide.bias"} | ({"at_times"} if settings.get("momentum") and settings.get("fused") else set())  # torch fails
        first = [p for n, p in named.items() if n not in skipped]
        groups = [{"params": first}, {"params": [named["wide.bias"]], "lr": 0.02}]
        return make(groups, **settings)

    return build


ELEMENTWISE: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "sgd": grouped(optim.SGD, lr=0.05),
    "momentum": grouped(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-3),
    "nesterov": grouped(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "maximize": grouped(optim.SGD, lr=0.01, maximize=True, momentum=0.5),
    "sgd foreach": grouped(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": grouped(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": grouped(optim.Adam, lr=0.01),
    "adam amsgrad": grouped(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adam foreach": grouped(optim.Adam, lr=0.01, foreach=True),
    "adam fused": grouped(optim.Adam, lr=0.01, fused=True),
    "adam tensor": grouped(optim.Adam, lr=torch.tensor(0.01)),
    "adamw": grouped(optim.AdamW, lr=0.01),
    "adamw fused": grouped(optim.AdamW, lr=0.01, fused=True, amsgrad=True),
    "nadam": grouped(optim.NAdam, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True),
    "radam": grouped(optim.RAdam, lr=0.01),
    "adamax": grouped(optim.Adamax, lr=0.01),
    "adagrad": grouped(optim.Adagrad, lr=0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "adagrad fused": grouped(optim.Adagrad, lr=0.01, fused=True),
    "adadelta": grouped(optim.Adadelta, lr=0.5),
    "rmsprop": grouped(optim.RMSprop, lr=0.01),
    "rmsprop centred": grouped(optim.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "rprop": grouped(optim.Rprop, lr=0.01),
    "asgd": grouped(optim.ASGD, lr=0.01, t0=2),
}


def sharing(size: int, seed: int = 0) -> World:
    return World(size, seed=seed, shares=True)


def is_shared(ps: mpips.Run) -> bool:
    return isinstance(ps._worker.server.transport, SharedMemoryTransport)


def is_sharded(ps: mpips.Run) -> bool:
    return is_shared(ps) and ps._worker.server.transport.plan == "sharded"


def odd(
    world: World,
    make: Callable[[nn.Module], optim.Optimizer],
    dtype: torch.dtype,
    expected: tuple[bool, bool] | None = None,
    rounds: int = 4,
    **settings: Any,
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Every rank's weights after some rounds with workers whose batches have sizes of their own, and the checkpoint."""

    def program(communicator: Communicator) -> list[Tensor]:
        model = Odd().to(dtype)
        number = communicator.rank - (not settings.get("server_trains"))
        samples = SAMPLES[max(number, 0)]
        x, y = data(samples * (rounds - number % 2), dtype)  # some shards are shorter
        shifted = (x.roll(number, 0), y.roll(number, 0))
        ps = train(communicator, model, make(model), shifted, samples, shard=False, **settings)
        assert expected is None or (is_shared(ps), is_sharded(ps)) == expected
        return [p.detach().clone() for p in model.parameters()]

    weights = world.run(program)
    return weights, tree_of(settings.get("run_dir", "run"))


def tree_of(folder: str) -> dict[str, Any]:
    """The last checkpoint, but for what names the setting `plan`."""
    tree = last(Path(folder))
    del tree["config"], tree["contract"], tree["run"]
    return tree


def assert_alike(ours: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """Bit for bit, on every rank."""
    for rank, tensors in enumerate(ours):
        for number, (a, b) in enumerate(zip(tensors, expected[0], strict=True)):
            assert torch.equal(a, b), f"rank {rank}, tensor {number}"


def differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    ("dtype", "size", "settings"),
    [(torch.float32, 4, {}), (torch.float64, 2, {"clip": 0.05, "server_trains": True})],
    ids=["float32", "float64 clipped, rank 0 trains"],
)
def test_the_plan_changes_no_bit(name: str, dtype: torch.dtype, size: int, settings: dict[str, Any]) -> None:
    settings = {**settings, "deterministic": True}
    expected, tree = odd(World(size), ELEMENTWISE[name], dtype, (False, False), **settings)
    assert all(tensor.isfinite().all() for tensor in expected[0])
    assert differ(expected[0], list(Odd().to(dtype).parameters())), "something is learnt"
    seed = len(name)
    for chosen in ("root", "sharded") if name in ("momentum", "adam") else ("sharded",):
        shared = (True, chosen == "sharded")
        ours, own = odd(sharing(size, seed), ELEMENTWISE[name], dtype, shared, plan=chosen, run_dir=chosen, **settings)
        assert_alike(ours, expected)
        assert_same(own, tree)


@pytest.mark.parametrize("chosen", ["root", "sharded"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_only_rounding_differs_where_bits_are_not_asked_for(chosen: str, dtype: torch.dtype, near: float) -> None:
    for name in ("adagrad",):
        for settings in ({}, {"clip": 0.05}):
            expected, _ = odd(World(4), ELEMENTWISE[name], dtype, **settings)
            ours, _ = odd(sharing(4), ELEMENTWISE[name], dtype, (True, chosen == "sharded"), plan=chosen, **settings)
            for rank in ours:
                for a, b in zip(rank, expected[0], strict=True):
                    torch.testing.assert_close(a, b, rtol=near, atol=near)


@pytest.mark.parametrize("chosen", ["root", "sharded"])
def test_batches_of_one_size_are_averaged_without_being_multiplied(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SAMPLES", (7, 7, 7, 7))
    expected, _ = odd(World(4), ELEMENTWISE["momentum"], torch.float64)
    ours, _ = odd(sharing(4), ELEMENTWISE["momentum"], torch.float64, (True, chosen == "sharded"), plan=chosen)
    for rank in ours:
        for a, b in zip(rank, expected[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_schedule_changes_a_bit(size: int) -> None:
    expected, tree = odd(World(size), ELEMENTWISE["adam"], torch.float32, deterministic=True, clip=0.1)
    for seed in range(3):
        settings = {"plan": "sharded", "run_dir": f"run-{seed}", "deterministic": True, "clip": 0.1}
        ours, own = odd(sharing(size, seed), ELEMENTWISE["adam"], torch.float32, (True, True), **settings)
        assert_alike(ours, expected)
        assert_same(own, tree)


def test_auto_shards_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for small, sharded in ((layout.SMALL, False), (1000, True)):
        monkeypatch.setattr("mpips.reduce.choice.SMALL", small)
        odd(sharing(3), ELEMENTWISE["sgd"], torch.float32, (True, sharded))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_more_ranks_than_there_is_to_serve(size: int) -> None:
    """Rank 0 may have nothing to serve, and yet it judges."""

    def program(e: Communicator, **settings: Any) -> list[float]:
        net = nn.Linear(1, 1)
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=e, run_dir="run", **settings)
        for (x,) in ps.batches((torch.arange(40.0).view(-1, 1),), 3):
            loss = net(x).square().mean()
            loss.backward()
            ps.step(loss)
        return [net.weight.item(), net.bias.item(), ps.round]

    expected = World(size).run(lambda e: program(e, deterministic=True, clip=3.0))
    assert sharing(size).run(lambda e: program(e, deterministic=True, clip=3.0, plan="sharded")) == expected


class GlobalNorm(optim.Optimizer):
    """Divides by the norm of all gradients together: on a slice it would be another."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in given]).norm()
        for p in given:
            p.sub_(p.grad / norm, alpha=0.1)


class Derived(optim.SGD):
    """A class of the script's own, which may do anything."""


@pytest.mark.parametrize(
    "make",
    [lambda m: GlobalNorm(m.parameters()), lambda m: Derived(m.parameters(), lr=0.1)],
    ids=["global norm", "derived"],
)
def test_an_optimizer_that_may_look_at_everything_is_served_by_rank_0(make: Any) -> None:
    expected, tree = odd(World(3), make, torch.float32, deterministic=True)
    settings = {"plan": "sharded", "deterministic": True, "run_dir": "other"}
    ours, own = odd(sharing(3), make, torch.float32, (True, False), **settings)
    assert_alike(ours, expected)
    assert_same(own, tree)


def test_hooks_of_the_script_s_optimizer_run_where_it_steps_and_hinder_no_plan() -> None:
    """They look at all weights after each step, on every worker; what serves slices has none."""

    def program(communicator: Communicator, **settings: Any) -> list[list[Tensor]]:
        net, seen = mlp(), list[list[Tensor]]()
        made = optim.SGD(net.parameters(), lr=0.1)
        made.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in net.parameters()]))
        ps = mpips.connect(net, made, communicator=communicator, run_dir="run", deterministic=True, **settings)
        assert is_sharded(ps) == ("plan" in settings)
        for x, y in ps.batches(data(60), 7, shuffle=False):
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
        assert ps.round == len(seen) == 5
        return seen

    expected = World(3).run(program)
    ours = sharing(3).run(lambda e: program(e, plan="sharded"))
    for own, other in zip(ours, expected, strict=True):
        assert not any(differ(a, b) for a, b in zip(own, other, strict=True))
    assert differ(ours[0][0], ours[0][-1])


def matrices(m: nn.Module) -> Any:
    return [p for p in m.parameters() if p.dim() == 2]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_an_optimizer_of_whole_tensors_is_cut_between_them(name: str, clip: float | None) -> None:
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")

    def run(world: World, **settings: Any) -> tuple[list[list[Tensor]], dict[str, Any]]:
        def program(communicator: Communicator) -> list[Tensor]:
            torch.manual_seed(1)
            model = nn.Sequential(
                nn.Linear(12, 33, bias=False), nn.Tanh(), nn.Linear(33, 40, bias=False), nn.Linear(40, 5, False)
            )
            ps = train(communicator, model, getattr(optim, name)(model.parameters(), lr=0.01), data(60), 7, **settings)
            if "plan" in settings:
                assert is_sharded(ps)
                transport: Any = ps._worker.server.transport
                whole = {(33, 12), (40, 33), (5, 40)}
                assert all(
                    tuple(p.shape) in whole for group in transport._optimizer.torch.param_groups for p in group["params"]
                )
            return [p.detach().clone() for p in model.parameters()]

        return world.run(program), tree_of(settings["run_dir"])

    expected, tree = run(World(3), run_dir="a", deterministic=True, clip=clip)
    ours, own = run(sharing(3), run_dir="b", deterministic=True, clip=clip, plan="sharded")
    assert_alike(ours, expected)
    assert_same(own, tree)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_is_plain_pytorch(optimizer: str, clip: float | None) -> None:
    reference = mlp()
    made = OPTIMIZERS[optimizer](reference.parameters())
    if clip is not None:
        made.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(reference.parameters(), clip) and None)
    plain(reference, made, in_order(data(103), 16, 3))
    for settings in ({"plan": "root"}, {"plan": "sharded"}, {"plan": "sharded", "deterministic": True}):

        def program(communicator: Communicator, settings: dict[str, Any] = settings) -> str:
            net = mlp()
            ps = train(communicator, net, OPTIMIZERS[optimizer](net.parameters()), data(103), epochs=3, clip=clip, **settings)
            assert (is_shared(ps), is_sharded(ps)) == (True, settings["plan"] == "sharded")
            return sha(net)

        assert sharing(2).run(program) == [sha(reference)]


def learnt(
    communicator: Communicator, make: Any, scheduler: Any, values: list[float], every: str = "epoch", **settings: Any
) -> list[Tensor]:
    """A model's weights after three epochs with a scheduler of the script's."""
    model = Odd()
    made = make(model.parameters())
    of_lr = scheduler(made)
    ps = mpips.connect(model, made, communicator=communicator, **{"run_dir": "run", "deterministic": True, **settings})
    assert "plan" not in settings or is_sharded(ps)
    for epoch in ps.epochs(3):
        for x, y in ps.batches(data(47), 8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
            if every == "round" and of_lr:
                of_lr.step()
        value = ps.validate(lambda epoch=epoch: values[epoch])
        if every == "epoch" and of_lr:
            of_lr.step(*[value] * isinstance(of_lr, optim.lr_scheduler.ReduceLROnPlateau))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "scheduler", "settings"),
    [
        (lambda p: optim.SGD(p, lr=0.1), lambda o: optim.lr_scheduler.StepLR(o, 1, 0.3), {}),
        (
            lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
            lambda o: optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=30),
            {"every": "round"},
        ),
        (
            lambda p: optim.Adam(p, lr=0.1),
            lambda o: optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=30),
            {"every": "round", "clip": 0.1},
        ),
        (lambda p: optim.SGD(p, lr=0.1), lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1), {}),
    ],
    ids=["StepLR", "OneCycleLR of SGD", "OneCycleLR of Adam", "ReduceLROnPlateau"],
)
def test_a_scheduler_reaches_all_slices(make: Any, scheduler: Any, settings: dict[str, Any]) -> None:
    values = [1.0, 2.0, 3.0]
    (expected, *_) = World(3).run(lambda e: learnt(e, make, scheduler, values, **settings))
    ours = sharing(3, 2).run(lambda e: learnt(e, make, scheduler, values, plan="sharded", run_dir="other", **settings))
    assert_alike(ours, [expected])
    steady = World(3).run(lambda e: learnt(e, make, lambda o: None, values, run_dir="steady"))
    assert differ(steady[0], expected), "the scheduler does something"
    one, other = last(Path("run")), last(Path("other"))
    assert len(one["kept"].keys() - {"param_groups"}) == 1, "torch's schedulers are kept unasked"
    assert_same(other["kept"], one["kept"])


RESUMED: dict[str, Any] = {
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "asgd": lambda p: optim.ASGD(p, lr=0.01, t0=2),
}
WORLDS: dict[str, Any] = {  # a way to run 3 ranks
    "mpi": lambda: (World(3), {}),
    "root": lambda: (sharing(3, 1), {"plan": "root"}),
    "sharded": lambda: (sharing(3, 2), {"plan": "sharded"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_under_another_plan(name: str) -> None:
    def run(kind: str, epochs: int, **settings: Any) -> list[str]:
        world, own = WORLDS[kind]()

        def program(communicator: Communicator) -> str:
            net = Odd()
            train(
                communicator,
                net,
                RESUMED[name](net.parameters()),
                data(47),
                5,
                epochs,
                True,
                deterministic=True,
                **own,
                **settings,
            )
            return sha(net)

        return world.run(program)

    expected = run("mpi", 3, run_dir="whole")
    whole = last(Path("whole"))
    for before, after in (("mpi", "sharded"), ("sharded", "mpi"), ("sharded", "root")):
        folder = f"{before}-{after}"
        run(before, 1, run_dir=folder)
        assert run(after, 3, run_dir=folder, resume="auto") == expected, folder
        again = last(Path(folder))
        assert_same(again["optimizer"], whole["optimizer"], folder)
        assert_same(again["parameters"], whole["parameters"], folder)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("before", "after"), [(2, 4), (3, 1)])
def test_a_run_resumes_on_another_number_of_ranks(name: str, before: int, after: int) -> None:
    """As it would without shared memory."""

    def run(world: World, epochs: int, **settings: Any) -> list[str]:
        def program(communicator: Communicator) -> str:
            net = Odd()
            train(communicator, net, RESUMED[name](net.parameters()), data(47), 5, epochs, deterministic=True, **settings)
            return sha(net)

        return world.run(program)

    run(World(before), 1, run_dir="mpi")
    run(sharing(before), 1, run_dir="shared", plan="sharded")
    expected = run(World(after), 2, run_dir="mpi", resume="auto")
    assert run(sharing(after), 2, run_dir="shared", plan="sharded", resume="auto") == expected


def test_killed_anywhere_and_resumed() -> None:
    from mpips.comm.simulated import Killed

    def run(world: World, folder: str, **settings: Any) -> list[str]:
        def program(communicator: Communicator) -> str:
            net = cnn()
            settings.setdefault("checkpoint", {"every": 3})
            made = OPTIMIZERS["adam"](net.parameters())
            train(communicator, net, made, data(47), 5, 2, True, run_dir=folder, plan="sharded", **settings)
            return sha(net)

        return world.run(program)

    whole = sharing(3, 3)
    expected = run(whole, "whole")
    for call in range(10, whole.calls[0], 23):
        world = sharing(3, call)
        world.kill(call % 3, call)
        with pytest.raises(Killed):
            run(world, f"killed-{call}")
        assert run(sharing(3, call + 1), f"killed-{call}", resume="auto") == expected, f"killed at call {call}"


PLANS = pytest.mark.parametrize("chosen", ["root", "sharded"])


def run_until_nonfinite(world: World, program: Callable[[Communicator], None]) -> None:
    """Whichever rank raises NonFiniteError, all do, the server included, in the same words."""
    said: list[str] = []

    def noted(e: Communicator) -> None:
        try:
            program(e)
        except NonFiniteError as error:
            said.append(str(error))
            raise

    try:
        world.run(noted)
    except NonFiniteError:
        assert said == said[:1] * world.size


def poisoned(world: World, nonfinite: str, guilty: int, value: float = math.nan, **settings: Any) -> list[Any]:
    """Rank `guilty` has a NaN in round 3 of 5: of each worker its weights, or what is raised, and the version."""
    found: dict[int, Any] = {}

    def program(e: Communicator) -> None:
        model = mlp()
        ps = mpips.connect(model, OPTIMIZERS["momentum"](model.parameters()), communicator=e, nonfinite=nonfinite, **settings)
        before: list[Tensor] = []
        try:
            for x, y in ps.batches(data(8 * ps.workers * 5), 8, shuffle=False):
                before = [p.detach().clone() for p in model.parameters()]
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if e.rank == guilty and ps.round == 2:
                    model[2].bias.grad[3] = value
                    model[2].weight.grad[1, 1] = value
                ps.step(loss)
        except NonFiniteError as error:
            after = [p.detach().clone() for p in model.parameters()]
            assert not before or all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a weight has moved"
            found[e.rank] = str(error), ps._control.version
            raise
        found[e.rank] = [p.detach().clone() for p in model.parameters()], ps._control.version

    run_until_nonfinite(world, program)
    return [found[rank] for rank in sorted(found)]


@PLANS
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"server_trains": True}, {"clip": 0.1}], ids=str)
def test_nonfinite_raise_names_rank_and_tensor_and_moves_nothing(chosen: str, value: float, settings: dict[str, Any]) -> None:
    for guilty in (0, 1, 2) if settings.get("server_trains") else (1, 2):
        for message, version in poisoned(sharing(3), "raise", guilty, value, plan=chosen, run_dir="run", **settings):
            assert f"rank {guilty} has a NaN or Inf in the gradient of 2.weight, round 3" in message
            assert version == 2


@PLANS
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_nonfinite_skip_and_drop_are_as_without_shared_memory(chosen: str, nonfinite: str) -> None:
    expected = poisoned(World(4), nonfinite, 2, run_dir="mpi", deterministic=True)
    ours = poisoned(sharing(4), nonfinite, 2, run_dir="shared", deterministic=True, plan=chosen)
    assert [version for _, version in ours] == [version for _, version in expected] == [4 + (nonfinite == "drop")] * 3
    assert_alike([weights for weights, _ in ours], [expected[0][0]])
    for a, b in zip(metrics(Path("shared")), metrics(Path("mpi")), strict=True):
        assert a == b or any(value != value for value in a.values())


@PLANS
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
def test_a_sum_that_overflows_is_the_servers(chosen: str, nonfinite: str) -> None:
    """In shared memory and deterministic mode it is seen which rank's gradient, times its samples, overflowed."""

    def run(world: World, **settings: Any) -> list[Any]:
        found: dict[int, Any] = {}

        def program(e: Communicator) -> None:
            model = mlp()
            ps = mpips.connect(model, OPTIMIZERS["sgd"](model.parameters()), communicator=e, nonfinite=nonfinite, **settings)
            try:
                for x, y in ps.batches(data(16 * 3), 8, shuffle=False):
                    F.cross_entropy(model(x), y).backward()
                    if ps.round == 1:
                        model[0].weight.grad[2, 5] = 3e38  # times 8 samples
                    ps.step(0.0)
            except NonFiniteError as error:
                found[e.rank] = str(error), ps._control.version
                raise
            found[e.rank] = [p.detach().clone() for p in model.parameters()], ps._control.version

        run_until_nonfinite(world, program)
        return [found[rank] for rank in sorted(found)]

    expected, ours = (
        run(World(3), run_dir="mpi", deterministic=True),
        run(sharing(3), plan=chosen, run_dir="shared", deterministic=True),
    )
    for (a, version), (b, other) in zip(ours, expected, strict=True):
        assert version == other == (1 if nonfinite == "raise" else 2)
        if nonfinite == "raise":
            assert a.replace("rank 1", "rank 0") == b
            assert "rank 1 has a NaN or Inf in the gradient of 0.weight, round 2" in a
        else:
            assert_alike([a], [b])


@PLANS
def test_large_gradients_are_finite(chosen: str) -> None:
    """Their squares are not, in float32."""

    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        model = mlp()
        ps = mpips.connect(model, lambda p: optim.SGD(p, lr=1e-20), communicator=e, deterministic=True, **settings)
        for x, y in ps.batches(data(48), 8, shuffle=False):
            (F.cross_entropy(model(x), y) * 1e21).backward()
            ps.step(0.0)
        return [p.detach().clone() for p in model.parameters()]

    expected = World(3).run(lambda e: program(e, run_dir="mpi"))
    assert differ(expected[0], list(mlp().parameters()))
    assert_alike(sharing(3).run(lambda e: program(e, run_dir="shared", plan=chosen)), expected)


@PLANS
@pytest.mark.parametrize("policy", ["mean", "server", "local"])
def test_buffers_are_as_without_shared_memory(chosen: str, policy: str) -> None:
    def run(world: World, **settings: Any) -> list[dict[str, Tensor]]:
        def program(e: Communicator) -> dict[str, Tensor]:
            net = cnn()
            made = OPTIMIZERS["momentum"](net.parameters())
            train(e, net, made, data(101), 7, 2, True, buffers=policy, deterministic=True, **settings)
            return {name: value.clone() for name, value in net.state_dict().items()}

        return world.run(program)

    for settings in ({}, {"server_trains": True}):
        expected = run(World(3), **settings)
        for ours, other in zip(run(sharing(3, 4), plan=chosen, **settings), expected, strict=True):
            assert ours.keys() == other.keys()
            assert all(torch.equal(ours[name], other[name]) for name in ours)


@PLANS
def test_gradients_left_over_from_an_interrupted_loop_are_pushed_with_the_next(chosen: str) -> None:
    """Rank 1 breaks out after a backward; the idle rounds until all are through must neither push nor lose it."""

    def run(world: World, **settings: Any) -> list[list[Tensor]]:
        def program(e: Communicator) -> list[Tensor]:
            model = Odd()
            ps = mpips.connect(
                model, OPTIMIZERS["momentum"](model.parameters()), communicator=e, deterministic=True, **settings
            )
            for epoch in ps.epochs(3):
                for number, (x, y) in enumerate(ps.batches(data(47), 5, shuffle=False)):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    if epoch == 1 and number == 1 and e.rank == e.size - 1:
                        break
                    ps.step(loss)
            return [p.detach().clone() for p in model.parameters()]

        return world.run(program)

    for settings in ({}, {"server_trains": True}):
        expected = run(World(3), run_dir="mpi", **settings)
        ours = run(sharing(3, 7), run_dir="shared", plan=chosen, **settings)
        assert_alike(ours, expected)
        assert metrics(Path("mpi")) == metrics(Path("shared")) or settings is None


@PLANS
def test_the_server_s_word_ends_a_run(chosen: str) -> None:
    def program(e: Communicator, how: str, **settings: Any) -> tuple[int, str, str]:
        net = mlp()
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=e, run_dir=how, plan=chosen, **settings)
        for epoch in ps.epochs(4):
            for x, y in ps.batches(data(60), 5):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if how == "stop" and ps.round == 8 and e.rank == 2:
                    ps.stop()
                if how == "preempt" and ps.round == 8 and e.rank == 1:
                    ps.preempt()
                ps.step(loss)
            value = ps.validate(lambda epoch=epoch: [0.5, 0.7, 0.7, 0.7][epoch])
            assert value == [0.5, 0.7, 0.7, 0.7][epoch] or ps.stopping
            ps.save()
        return ps.round, ps.stopping, sha(net)

    for how, settings, rounds, why in (
        ("stop", {}, 9, "requested"),
        ("target", {"early_stopping": {"target": 0.6}}, 12, "target"),
        ("patience", {"early_stopping": {"patience": 1}}, 18, "patience"),
    ):
        results = sharing(3, 5).run(lambda e, how=how, settings=settings: program(e, how, **settings))
        assert results == [(rounds, why, results[0][2])] * 2
        assert Path(how, "DONE").exists()
        assert last(Path(how))["round"] == rounds
    with pytest.raises(SystemExit, match="75"):
        sharing(3).run(lambda e: program(e, "preempt"))
    assert last(Path("preempt"))["round"] == 9
    whole = World(3).run(lambda e: program(e, "whole", deterministic=True))
    with pytest.raises(SystemExit, match="75"):
        sharing(3).run(lambda e: program(e, "preempt", deterministic=True))
    assert sharing(3, 9).run(lambda e: program(e, "preempt-2", resume="preempt", deterministic=True)) == whole


@pytest.mark.parametrize("mode", ["sync", "local_sgd"])
def test_weights_that_others_change_are_not_shared(mode: str) -> None:
    """An embedding renormalises in forward, also where a server that does not train validates."""

    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.embed = nn.Embedding(5, 6, max_norm=0.5)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed((x.abs() * 3).long() % 5).mean(1))

    def program(e: Communicator, trains: bool, shared: bool) -> str:
        net, (x, y) = Renormed(), data(47)
        made = OPTIMIZERS["adam"](net.parameters())
        ps = mpips.connect(net, made, communicator=e, plan="sharded", mode=mode, server_trains=trains, deterministic=True)
        for _ in ps.epochs(2):
            for batch, labels in ps.batches((x, y), 7):
                loss = F.cross_entropy(net(batch), labels)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: float(net(x).sum()))
        assert is_shared(ps) == shared
        return sha(net)

    for trains in (False, True):
        shared = trains and mode == "local_sgd"  # there each rank trains weights of its own
        assert sharing(3).run(partial(program, trains=trains, shared=shared)) == World(3).run(
            partial(program, trains=trains, shared=False)
        )


def test_other_modes_and_settings_are_not_shared() -> None:
    for settings in (
        {"shared_memory": False},
        {"mode": "async"},
        {"mode": "fedavg", "rule": "median"},
        {"rule": "cclip"},
        {"rule": "krum", "robust": {"num_byzantine": 0}, "deterministic": True},
    ):

        def program(e: Communicator, settings: dict[str, Any] = settings) -> bool:
            net = mlp()
            return is_shared(train(e, net, OPTIMIZERS["sgd"](net.parameters()), data(60), 7, **settings))

        assert sharing(4).run(program) == [False] * 3


@pytest.mark.parametrize("deterministic", [False, True])
@PLANS
def test_normclip_shortens_each_contribution(chosen: str, deterministic: bool) -> None:
    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        net = mlp()
        train(
            e, net, OPTIMIZERS["sgd"](net.parameters()), data(60), 7, rule="normclip", robust={"clip_radius": 0.1}, **settings
        )
        return [p.detach().clone() for p in net.parameters()]

    expected = World(3).run(lambda e: program(e, deterministic=deterministic))
    ours = sharing(3).run(lambda e: program(e, deterministic=deterministic, plan=chosen))
    for tensors in ours:
        torch.testing.assert_close(tensors, expected[0])


@PLANS
def test_normclip_does_not_hide_a_nan(chosen: str) -> None:
    for message, version in poisoned(sharing(3), "raise", 2, plan=chosen, run_dir="run", rule="normclip"):
        assert "rank 2 has a NaN or Inf in the gradient of 2.weight, round 3" in message
        assert version == 2


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_with_optimizers_of_different_classes_are_refused(shared: bool) -> None:
    def program(e: Communicator) -> None:
        net = mlp()
        train(e, net, OPTIMIZERS["adam" if e.rank == 0 else "momentum"](net.parameters()), data(60), 7, plan="sharded")

    with pytest.raises(ContractError, match="rank 0 has `optimizer = Adam`, rank 1 has `optimizer = SGD`"):
        World(3, shares=shared).run(program)


def test_the_settings_of_the_workers_optimizers_reach_all_slices() -> None:
    """Those of the server's own do not count once the workers have told theirs."""

    def program(e: Communicator, **settings: Any) -> str:
        net = mlp()
        own = e.rank == 0 and "plan" in settings
        made = optim.SGD(net.parameters(), lr=0.5 if own else 0.1, momentum=0.1 if own else 0.9, nesterov=not own)
        train(e, net, made, data(60), 7, deterministic=True, **settings)
        return sha(net)

    assert sharing(3).run(lambda e: program(e, plan="sharded")) == World(3).run(program)


@PLANS
def test_workers_that_do_not_agree_on_a_setting_end_the_run(chosen: str) -> None:
    said: list[str] = []

    def program(e: Communicator) -> None:
        net = mlp()
        made = OPTIMIZERS["momentum"](net.parameters())
        try:
            ps = mpips.connect(net, made, communicator=e, run_dir="run", plan=chosen)
            for x, y in ps.batches(data(60), 7):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                if ps.round == 2 and ps.worker == 1:
                    made.param_groups[0]["lr"] *= 2
                ps.step(loss)
        except CallError as error:
            said.append(str(error))
            raise

    with pytest.raises(
        CallError, match=r"worker 0 \(rank 1\) has param_groups\[0\]\['lr'\] = 0.05, worker 1 \(rank 2\) has 0.1"
    ):
        sharing(3).run(program)
    assert said == said[:1] * 3


@PLANS
@pytest.mark.parametrize("size", [2, 5])
def test_a_round_sends_nothing(chosen: str, size: int) -> None:
    def program(e: Communicator) -> dict[str, int]:
        model = mlp()
        ps = mpips.connect(model, OPTIMIZERS["adam"](model.parameters()), communicator=e, run_dir="run", plan=chosen, clip=0.1)
        before: dict[str, int] = {}
        for x, y in ps.batches(data(48), 8):
            before = before or dict(e.traffic)  # all have met at the beginning of the loop
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        return {call: e.traffic[call] - before.get(call, 0) for call in e.traffic}

    for traffic in sharing(size).run(program):
        assert not any(traffic.values())


def test_large_counts_of_samples_keep_a_float64_model_s_precision() -> None:
    """2^24 + 1 is not a float32."""

    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        net = mlp().double()
        ps = mpips.connect(net, lambda p: optim.SGD(p, lr=0.1), communicator=e, run_dir="run", deterministic=True, **settings)
        for x, y in ps.batches(data(48, torch.float64), 8, shuffle=False):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss, samples=2**24 if e.rank == 1 else 1)
        return [p.detach().clone() for p in net.parameters()]

    assert_alike(sharing(3).run(lambda e: program(e, plan="sharded")), World(3).run(program))


@PLANS
def test_gradients_are_averaged_as_by_messages(chosen: str) -> None:
    """In torch's clipping, and where a loss is evaluated again; with other numbers of samples on each worker."""

    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        model = mlp()
        made = OPTIMIZERS["momentum"](model.parameters())
        ps = mpips.connect(model, made, communicator=e, **settings)
        x, y = data(60)
        for step in range(4):
            size = 4 + 3 * ps.worker + step
            made.zero_grad()
            F.cross_entropy(model(x[step : step + size]), y[step : step + size]).backward()
            ps.average(samples=size)
            if step != 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            ps.step(0.0, samples=size)
        assert is_shared(ps) == ("plan" in settings)
        return [p.detach().clone() for p in model.parameters()]

    expected = World(4).run(lambda e: program(e, run_dir="mpi"))
    ours = sharing(4).run(lambda e: program(e, plan=chosen, run_dir="shared"))
    for mine, theirs in zip(ours, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
