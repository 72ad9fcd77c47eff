"""Optimizers of other libraries: what they keep in their groups, what they derive from, what they do besides stepping."""

from __future__ import annotations

from abc import ABC
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model.message import CallError
from mpips.optim import hyperparameters as hyper
from mpips.optim.foreign import has_own_numbers, has_plain_state
from tests.helpers.programs import data

SHARED = pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])
SERVER = pytest.mark.parametrize("server_trains", [False, True], ids=["rank 0 serves", "rank 0 trains"])


class Growing(Optimizer):
    """SGD whose own factor `d` grows with each step, as Prodigy's and D-Adaptation's do, and is kept in the group, as there."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "d": 0.5, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.0 + 1.0 / group["k"]
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["d"])


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024, arXiv 2405.15682, algorithm 1): gradients at y, evaluation at the average x."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "training": False})

    def _lerp(self, weight: Callable[[float], float], training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["training"] = training

    def train(self) -> None:
        self._lerp(lambda beta: 1 - beta, training=True)

    def eval(self) -> None:
        self._lerp(lambda beta: 1 - 1 / beta, training=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["training"], "call optimizer.train() before"
            group["k"] += 1
            average = 1.0 / group["k"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    p.lerp_(z, average)
                    p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - average) - 1))
                    z.sub_(p.grad, alpha=group["lr"])


class Queues(Optimizer):
    """Keeps its last gradients in a queue, and averages in a list: no other object can hold that state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    queue = state.setdefault("queue", deque())
                    queue.append(p.grad.clone())
                    if len(queue) > 3:
                        queue.popleft()
                    averages = state.setdefault("averages", [torch.zeros_like(p), torch.zeros_like(p)])
                    averages[0].lerp_(queue[0], 0.5)
                    averages[1].lerp_(averages[0], 0.5)
                    p.sub_(averages[1], alpha=group["lr"])


class Base(ABC, Optimizer):
    """A base class such as that of a large library of optimizers."""


class Sign(Base):
    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train(model: nn.Module, optimizer: Any, worker: int = 0, workers: int = 1, clip: float | None = None) -> list[float]:
    """Train on batches of 12, of which each worker has its share; return losses that are evaluated between."""
    scheduler = lr_scheduler.StepLR(optimizer, 3, 0.5)
    x, y = data(120, torch.float64)
    swaps, losses = hasattr(optimizer, "eval"), []
    for number, (bx, by) in enumerate(zip(x.split(12), y.split(12), strict=True)):
        if swaps:
            optimizer.train()
        optimizer.zero_grad()
        F.cross_entropy(model(bx[worker::workers]), by[worker::workers]).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        if swaps and number % 4 == 3:
            optimizer.eval()
            losses.append(F.cross_entropy(model(x), y).item())
    return losses


@SHARED
@SERVER
@pytest.mark.parametrize("make", [Growing, ScheduleFree, Queues, Sign])
def test_weights_numbers_and_evaluations_are_those_of_one_process(make: Any, shares: bool, server_trains: bool) -> None:
    def program(e: Communicator) -> Any:
        model = net()
        optimizer = make(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", server_trains=server_trains)
        losses = train(model, optimizer, ps.worker, ps.workers)
        own = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k != "params"}
        return vector(model), losses, own

    plain = net()
    optimizer = make(plain.parameters())
    losses = train(plain, optimizer)
    own = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for weights, evaluated, numbers in World(4, shares=shares).run(program):
        assert torch.allclose(weights, vector(plain), rtol=0, atol=1e-12)
        assert evaluated == pytest.approx(losses, abs=1e-12)
        assert numbers == own


def test_samples_and_metrics_are_those_that_the_script_says(tmp_path: Path) -> None:
    """Two workers with 1 and 3 samples, by `ps.step`: the step is that of all four, and metrics.csv has their mean."""

    def program(e: Communicator) -> Any:
        model = net()
        optimizer = Growing(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=str(tmp_path / "run"), metrics=["accuracy"])
        x, y = data(4, torch.float64)
        mine = slice(0, 1) if ps.worker == 0 else slice(1, 4)
        loss = F.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        ps.step(loss, samples=mine.stop - mine.start, accuracy=float(ps.worker))
        return vector(model), loss.item()

    plain = net()
    optimizer = Growing(plain.parameters())
    x, y = data(4, torch.float64)
    F.cross_entropy(plain(x), y).backward()
    optimizer.step()
    (first, one), (second, three) = World(3).run(program)
    assert torch.allclose(first, vector(plain), rtol=0, atol=1e-12)
    assert torch.equal(first, second)
    names, row = (line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[:2])
    told = dict(zip(names, map(float, row), strict=True))
    assert (told["samples"], told["accuracy"]) == (4, 0.75)
    assert told["loss"] == pytest.approx((one + 3 * three) / 4, rel=1e-6)


@SHARED
def test_the_setting_clip_clips_what_the_workers_step_with(shares: bool) -> None:
    def program(e: Communicator) -> Any:
        model = net()
        optimizer = Growing(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", clip=0.05)
        train(model, optimizer, ps.worker, ps.workers)
        return vector(model)

    plain = net()
    train(plain, Growing(plain.parameters()), clip=0.05)
    for weights in World(4, shares=shares).run(program):
        assert torch.allclose(weights, vector(plain), rtol=0, atol=1e-12)


@SHARED
def test_an_overflow_on_one_worker_skips_the_step_and_its_numbers_on_all(shares: bool) -> None:
    def program(e: Communicator) -> Any:
        model = net()
        optimizer = Growing(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for number in range(3):
            x, y = (t[ps.worker :: ps.workers] for t in data(12, torch.float64))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (float("inf") if number == 1 and ps.worker == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return vector(model), optimizer.param_groups[0]["k"], scaler.get_scale()

    plain = net()
    optimizer = Growing(plain.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        x, y = data(12, torch.float64)
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for weights, steps, scale in World(3, shares=shares).run(program):
        assert torch.allclose(weights, vector(plain), rtol=0, atol=1e-12)
        assert (steps, scale) == (2, 8.0)


@pytest.mark.parametrize("make", [Growing, ScheduleFree, Queues])
def test_resumed_it_goes_on_with_what_it_keeps(make: Any, tmp_path: Any) -> None:
    def program(e: Communicator, name: str, epochs: int, **more: Any) -> Any:
        model = net()
        optimizer = make(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=str(tmp_path / name), **more)
        for _ in ps.epochs(epochs):
            if make is ScheduleFree:
                optimizer.train()
            for x, y in ps.batches(data(48, torch.float64), 4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if make is ScheduleFree:
                optimizer.eval()
        return vector(model), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}

    whole = World(3).run(lambda e: program(e, "whole", 4))[1]
    World(3).run(lambda e: program(e, "half", 2))
    resumed = World(3).run(lambda e: program(e, "rest", 4, resume=str(tmp_path / "half")))[1]
    assert torch.equal(resumed[0], whole[0])
    assert resumed[1] == whole[1]


def test_a_swap_that_changes_nothing_is_no_round() -> None:
    """As `train` before each step, which the Hugging Face Trainer calls."""

    def program(e: Communicator) -> int:
        model = net()
        optimizer = ScheduleFree(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        train(model, optimizer, ps.worker, ps.workers)
        return ps.round

    steps, swapped_there_and_back = 10, 2 * 2
    assert World(3).run(program) == [steps + swapped_there_and_back] * 2


def test_a_trial_tells_what_an_optimizer_keeps_and_changes_nothing() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    assert has_own_numbers(Growing(parameters))
    assert not has_own_numbers(Sign(parameters))
    assert not has_own_numbers(torch.optim.Adam(parameters))
    assert not has_plain_state(Queues(parameters))
    assert has_plain_state(Sign(parameters))
    streams = torch.get_rng_state()
    optimizer = Growing(parameters)
    has_own_numbers(optimizer)
    optimizer.param_groups[0]["lr"] = 0.2  # no reason to try it again
    assert has_own_numbers(optimizer)
    assert torch.equal(streams, torch.get_rng_state())
    assert optimizer.param_groups[0]["k"] == 0
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "mode"), [(Growing, "async"), (ScheduleFree, "async"), (ScheduleFree, "local_sgd"), (Queues, "local_sgd")]
)
def test_where_it_cannot_be_exact_it_is_refused_at_connect(make: Any, mode: str, capsys: Any) -> None:
    def program(e: Communicator) -> None:
        model = net()
        mpips.connect(model, make(model.parameters()), communicator=e, run_dir="run", mode=mode)

    with pytest.raises(SystemExit):
        World(2).run(program)
    line = capsys.readouterr().err.splitlines()[0]
    assert f"optimizer: given a {make.__name__} with mode {mode}, wh" in line
    assert "allowed: mode sync" in line


def test_numbers_that_were_not_changed_elsewhere_are_not_written_over() -> None:
    """A scheduler has changed the rate on the workers; `d` has grown here."""
    optimizer = Growing([nn.Parameter(torch.ones(3))], lr=0.1)
    before = hyper.read(optimizer)
    optimizer.param_groups[0]["d"] = 0.7
    told = [0.05 if number == 0.1 else number for number in before]
    hyper.write(optimizer, told, before)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["d"]) == (0.05, 0.7)
    hyper.write(optimizer, told)
    assert optimizer.param_groups[0]["d"] == 0.5


class Around(Optimizer):
    """Wraps an optimizer, whose groups it shows."""

    param_groups: Any = property(lambda self: self.inside.param_groups)

    def __init__(self, inside: Optimizer) -> None:
        self.inside, self.state, self.defaults = inside, inside.state, inside.defaults


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (Around, "optimizer: given a Around, whose param_groups are those of an optimizer that it wraps"),
        (lambda inside: object(), "optimizer: given a object, allowed: a torch.optim.Optimizer"),
    ],
)
def test_what_is_no_optimizer_of_its_own_is_refused_in_a_line(wrap: Any, line: str, capsys: Any) -> None:
    model = net()
    with pytest.raises(SystemExit):
        mpips.connect(model, wrap(Sign(model.parameters())), communicator=World(1).ends[0], run_dir="run")
    assert line in capsys.readouterr().err


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_connect(capsys: Any) -> None:
    class Projector:
        """Anything but tensors, numbers and texts."""

    class Projecting(Sign):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["projector"] = Projector()

    model = net()
    with pytest.raises(SystemExit):
        mpips.connect(model, Projecting(model.parameters()), communicator=World(1).ends[0], run_dir="run")
    assert "given a Projecting, whose state cannot be written to a checkpoint" in capsys.readouterr().err


def steps_on(make: Any, counts: list[int]) -> Any:
    """Return each worker's weights and first group after `counts[worker]` steps, then a further one of all."""

    def program(e: Communicator) -> Any:
        model = net()
        optimizer = make(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        x, y = data(8, torch.float64)
        lbfgs = isinstance(optimizer, torch.optim.LBFGS)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for items in (range(counts[ps.worker]), range(1)):
            for _ in ps.batches(items, 1, shard=False):
                if lbfgs:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        return vector(model)

    return World(3).run(program)


def test_worker_0_may_take_more_steps_than_others() -> None:
    plain = net()
    optimizer = Growing(plain.parameters())
    x, y = data(8, torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for weights in steps_on(Growing, [3, 2]):
        assert torch.allclose(weights, vector(plain), rtol=0, atol=1e-12)


def test_steps_that_worker_0_would_lack_are_refused() -> None:
    with pytest.raises(CallError, match="worker 0 does not take a step that worker 1 takes"):
        steps_on(Growing, [2, 3])


def test_lbfgs_is_refused_where_a_worker_lacks_steps() -> None:
    with pytest.raises(RuntimeError, match="given LBFGS on a worker that has taken fewer steps"):
        steps_on(torch.optim.LBFGS, [3, 2])
