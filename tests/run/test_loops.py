"""Training loops of all kinds: on 1, 2 and 4 workers what one process does on the joined batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model.message import NonFiniteError
from mpips.run import loop
from tests.helpers.programs import Data, data, mlp

D = torch.float64
Mine = Callable[[int], Data]
# How many ranks, and whether they share memory: 1, 1, 2 and 4 workers.
PLACES = pytest.mark.parametrize(
    ("size", "shares"), [(1, False), (2, False), (2, True), (3, False), (3, True), (5, False), (5, True)]
)


def batch(number: int) -> Data:
    """The joined batch of a step: 32 of 64 items."""
    x, y = data(64, D)
    return (x[:32], y[:32]) if number % 2 == 0 else (x[32:], y[32:])


class SAM(torch.optim.Optimizer):
    """Foret et al. 2021 (arXiv 2010.01412), around momentum SGD, as it is commonly written: it evaluates the loss twice."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "needs a closure"
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        closure()
        for p in params:
            p.data = self.state[p]["old"]
        self.base.step()
        return loss


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")


def plain_loop(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    for step in range(6):
        x, y = mine(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield 0.0


def clip_norm(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    for step in range(6):
        x, y = mine(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        yield float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()


def clip_value(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    for step in range(6):
        x, y = mine(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.001)
        optimizer.step()
        yield 0.0


def closure(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    for step in range(6):
        x, y = mine(step)

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        yield float(optimizer.step(evaluate).detach())


def scaled(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    """One worker's gradient is infinite in the third step: no worker takes it, and all scales fall."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(6):
        x, y = mine(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        first = bool((x[0] == batch(step)[0][0]).all())  # whether this is the worker of the first item
        scaler.scale(loss * torch.inf if step == 2 and first else loss).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        if step == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale()


def by_hand(model: nn.Module, optimizer: Any, mine: Mine) -> Iterator[float]:
    """One cycle by hand, weight decay and betas too."""
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = 0.02 * (1 + step), (0.9 - 0.1 * step, 0.99)
        x, y = mine(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield optimizer.param_groups[0]["lr"]


class AscendingFirst(SAM):
    """SAM as in davda54/sam: it begins with the gradient that is there, and evaluates the loss once."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p in params:
            p.data = self.state[p]["old"]
        self.base.step()


def ascending(model: nn.Module, optimizer: Any, batch: Any) -> Iterator[float]:
    """A first backward by the script, a second by the optimizer."""
    for step in range(12):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        yield 0.0


class TwoSteps(SAM):
    """SAM as in davda54/sam, whose script takes the two halves of a step itself."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


def two_steps(model: nn.Module, optimizer: Any, batch: Any) -> Iterator[float]:
    """The two halves of a step by the script."""
    for step in range(12):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        yield 0.0


LOOPS: dict[str, tuple[Any, Any]] = {
    "plain": (plain_loop, adamw),
    "clip the norm": (clip_norm, adamw),
    "clip values": (clip_value, adamw),
    "a closure": (closure, adamw),
    "LBFGS": (closure, lbfgs),
    "SAM": (closure, SAM),
    "SAM, its first gradient the script's": (ascending, AscendingFirst),
    "SAM in two steps": (two_steps, TwoSteps),
    "SAM in two steps that its own step takes": (ascending, TwoSteps),
    "GradScaler": (scaled, adamw),
    "rates by hand": (by_hand, adamw),
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside of loops", "in a loop"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_step_in_two_halves_is_resumed(size: int, inside: bool) -> None:
    """The halves are the only ones that zero the gradients, and a resumed run does not execute those that are done."""

    def program(e: Communicator, folder: str, stop: int, **settings: Any) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = TwoSteps(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=folder, **settings)
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(64, D), 16 // ps.workers) if inside else [batch(n) for n in range(4)]:
                if ps.round == stop:
                    ps.preempt()
                F.cross_entropy(model(x), y).backward()
                optimizer.first_step(zero_grad=True)
                F.cross_entropy(model(x), y).backward()
                optimizer.second_step(zero_grad=True)
        return [p.detach().clone() for p in model.parameters()]

    whole = World(size).run(lambda e: program(e, "whole", -1))
    with pytest.raises(SystemExit, match="75"):
        World(size).run(lambda e: program(e, "parts", 5))
    parts = World(size).run(lambda e: program(e, "parts", -1, resume="auto"))
    for ours, theirs in zip(parts[-1], whole[-1], strict=True):
        assert torch.equal(ours, theirs)


def test_halves_of_a_step_out_of_order_are_refused() -> None:
    model = mlp().to(D)
    optimizer = TwoSteps(model.parameters())
    x, y = batch(0)
    mpips.connect(model, optimizer)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"second_step\(\): given no first_step\(\) before it"):
        optimizer.second_step()
    optimizer.first_step()
    for step in (optimizer.first_step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match=r"expected optimizer.second_step\(\)"):
            step()
    optimizer.second_step()


@PLACES
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_that_of_one_process(loop: str, size: int, shares: bool) -> None:
    steps, make = LOOPS[loop]

    def program(e: Communicator) -> tuple[list[float], list[Tensor]]:
        model = mlp().to(D)
        optimizer = make(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        told = list(steps(model, optimizer, lambda step: tuple(t[ps.worker :: ps.workers] for t in batch(step))))
        return told, [p.detach().clone() for p in model.parameters()]

    model = mlp().to(D)
    expected = list(steps(model, make(model.parameters()), batch))
    tolerance = 1e-10 if loop == "LBFGS" else 1e-13  # its line search multiplies what is rounded
    for told, weights in World(size, shares=shares).run(program):
        if loop != "a closure" or size < 3:  # whose loss is this worker's own
            assert told == pytest.approx(expected, abs=tolerance, rel=0)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            if size < 3:
                assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, theirs.detach(), atol=tolerance, rtol=0)


def gan() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(D)
    d = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    return g, d, torch.optim.Adam(g.parameters(), lr=1e-2), torch.optim.SGD(d.parameters(), lr=3e-2, momentum=0.9)


def adversarial(g: nn.Module, d: nn.Module, og: Any, od: Any, mine: Callable[[Tensor], Tensor]) -> None:
    """Steps of the critic, one or two, for each of the generator; its own backward leaves gradients in the other's."""
    for step in range(8):
        noise = torch.Generator().manual_seed(step)
        x, z = (mine(torch.randn(16, 2, generator=noise, dtype=D)) for _ in range(2))
        for _ in range(1 + step % 2):
            od.zero_grad()
            (F.softplus(-d(x)) + F.softplus(d(g(z)))).mean().backward()
            od.step()
        og.zero_grad()
        F.softplus(-d(g(z))).mean().backward()
        og.step()


@PLACES
@pytest.mark.parametrize("how", ["lists", "dicts"])
def test_several_models_and_optimizers_in_one_run(how: str, size: int, shares: bool) -> None:
    def program(e: Communicator) -> tuple[list[Tensor], Any]:
        g, d, og, od = gan()
        models, optimizers = ([g, d], [og, od]) if how == "lists" else ({"g": g, "d": d}, {"g": og, "d": od})
        ps = mpips.connect(models, optimizers, communicator=e, run_dir="run")
        adversarial(g, d, og, od, lambda t: t[ps.worker :: ps.workers])
        return [p.detach().clone() for p in [*g.parameters(), *d.parameters()]], og.state_dict()

    g, d, og, od = gan()
    adversarial(g, d, og, od, lambda t: t)
    for weights, state in World(size, shares=shares).run(program):
        for ours, theirs in zip(weights, [*g.parameters(), *d.parameters()], strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=1e-14 if size > 2 else 0, rtol=0)
        for number, kept in og.state_dict()["state"].items():
            torch.testing.assert_close(state["state"][number]["exp_avg"], kept["exp_avg"], atol=1e-14, rtol=0)


def clipped(g: nn.Module, d: nn.Module, og: Any, od: Any, mine: Callable[[Tensor], Tensor], how: str) -> None:
    """Steps of both, with gradients that are clipped; the generator's goes back through what was computed before a clipping."""
    for step in range(6):
        noise = torch.Generator().manual_seed(step)
        whole, z = (torch.randn(16, 2, generator=noise, dtype=D) for _ in range(2))
        x, z = mine(whole), mine(z)
        made = g(z)
        if how == "an Inf is in the other's" and bool((x[0] == whole[0]).all()):  # on the worker of the first item
            (g(z).sum() * torch.inf).backward()
        od.zero_grad()
        (F.softplus(-d(x)) + F.softplus(d(made.detach()))).mean().backward()
        if how != "both at once":
            nn.utils.clip_grad_norm_(d.parameters(), 0.02)
            od.step()
        og.zero_grad()
        F.softplus(-d(made)).mean().backward()
        if how == "both at once":
            nn.utils.clip_grad_norm_([*g.parameters(), *d.parameters()], 0.02)
            od.step()
        elif how == "each":
            nn.utils.clip_grad_value_(g.parameters(), 0.001)
        og.step()


@PLACES
@pytest.mark.parametrize("how", ["each", "one", "both at once", "an Inf is in the other's"])
def test_clipping_with_several_optimizers_is_that_of_one_process(how: str, size: int, shares: bool) -> None:
    def program(e: Communicator) -> list[Tensor]:
        g, d, og, od = gan()
        ps = mpips.connect([g, d], [og, od], communicator=e, run_dir="run")
        clipped(g, d, og, od, lambda t: t[ps.worker :: ps.workers], how)
        return [p.detach().clone() for p in [*g.parameters(), *d.parameters()]]

    g, d, og, od = gan()
    clipped(g, d, og, od, lambda t: t, how)
    for weights in World(size, shares=shares).run(program):
        for ours, theirs in zip(weights, [*g.parameters(), *d.parameters()], strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=1e-14 if size > 2 else 0, rtol=0)


class Branched(nn.Module):
    """A model of whose two branches each batch uses one or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(3, 2, dtype=D), nn.Linear(3, 2, dtype=D)

    def forward(self, x: Tensor, branches: str) -> Tensor:
        return sum((getattr(self, name)(x).square().mean() for name in branches), torch.zeros((), dtype=D))


@PLACES
@pytest.mark.parametrize("uses", [["a", "b", "ab"], ["b", "a", "ab"], ["", "ab", "b"]])
@pytest.mark.parametrize("how", ["norms", "values"])
def test_clipping_parts_of_a_model_that_not_every_worker_uses(how: str, uses: list[str], size: int, shares: bool) -> None:
    """Each part is clipped on all workers, also where the gradients of that part are None on this one."""

    def steps(model: Branched, optimizer: Any, loss_of: Callable[[int], Tensor]) -> list[float]:
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            if (loss := loss_of(step)).requires_grad:
                loss.backward()
            for part in (model.a, model.b):
                if how == "norms":
                    norms.append(float(nn.utils.clip_grad_norm_(part.parameters(), 0.05)))
                    continue
                with suppress(RuntimeError):  # torch's, in one process without any gradient
                    nn.utils.clip_grad_value_(list(part.parameters()), 0.01)
            optimizer.step()
        return norms

    x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1), dtype=D)
    workers = max(1, size - 1)

    def program(e: Communicator) -> Any:
        model = Branched()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        norms = steps(model, optimizer, lambda step: model(x[step] + ps.worker, uses[(ps.worker + step) % 3]))
        return norms, [p.detach().clone() for p in model.parameters()]

    plain = Branched()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)

    def joined(step: int) -> Tensor:
        return sum(plain(x[step] + w, uses[(w + step) % 3]) for w in range(workers)) / workers

    expected = steps(plain, optimizer, joined)
    for norms, weights in World(size, shares=shares).run(program):
        assert norms == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(weights, [p.detach() for p in plain.parameters()], atol=1e-12, rtol=0)


def test_a_script_that_waits_for_batches_of_a_run_that_has_ended_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 25 items worker 0 has 4 batches a loop and worker 1 has 3: worker 0 comes to its eighth step first."""
    monkeypatch.setattr(loop, "BARREN", 100)

    def endless(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        batches = endless(ps.shard(DataLoader(TensorDataset(*data(25)), 4)))
        for _ in range(8):
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"has begun 100 loops over its shard since.*while not ps\.stopping"):
        World(3).run(program)


@PLACES
def test_gradients_that_are_never_cleared_grow_from_loop_to_loop(size: int, shares: bool) -> None:
    def train(model: nn.Module, optimizer: Any, loader: Any) -> list[Tensor]:
        for _ in range(3):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def program(e: Communicator) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        return train(model, optimizer, ps.shard(DataLoader(TensorDataset(*data(48, D)), 24 // ps.workers)))

    model = mlp().to(D)
    expected = train(model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(TensorDataset(*data(48, D)), 24))
    for weights in World(size, shares=shares).run(program):
        for ours, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-14 if size > 2 else 0, rtol=0)


@pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])
@pytest.mark.parametrize("how", ["clipped", "averaged", "stepped"])
def test_gradients_of_a_last_window_stay_while_others_average(how: str, shares: bool) -> None:
    """Of seven batches worker 0 has four and worker 1 three: when that one has ended its loop, the other averages and steps."""

    def program(e: Communicator) -> tuple[int, Any]:
        model = nn.Linear(2, 1, bias=False).to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        items = torch.arange(14, dtype=D).view(7, 2)
        seen, last = 0, None
        for seen, (x,) in enumerate(ps.shard(DataLoader(TensorDataset(items), 1)), 1):
            model(x).sum().backward()
            last = x  # the gradient
            if seen % 2 == 0:
                if how == "clipped":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                elif how == "averaged":
                    ps.average()
                optimizer.step()
                optimizer.zero_grad()
        grad = model.weight.grad
        return seen, (grad is None if seen == 4 else grad is not None and torch.equal(grad, last))

    assert World(3, shares=shares).run(program) == [(4, True), (3, True)]


def test_workers_that_step_other_optimizers_are_told() -> None:
    def program(e: Communicator) -> None:
        g, d, og, od = gan()
        mpips.connect([g, d], [og, od], communicator=e, run_dir="run")
        d(g(torch.ones(2, 2, dtype=D))).mean().backward()
        (og if e.rank == 1 else od).step()

    with pytest.raises(RuntimeError, match=r"some with the optimizer number 0.*some with number 1"):
        World(3).run(program)


@PLACES
def test_workers_may_take_different_numbers_of_steps(size: int, shares: bool) -> None:
    """No dataset at all, as in reinforcement learning: the last steps are taken by fewer workers."""

    def program(e: Communicator) -> tuple[int, Tensor]:
        model = nn.Linear(2, 1, bias=False).to(D)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        for _ in range(3 + ps.worker):
            optimizer.zero_grad()
            model(torch.full((1, 2), 1.0 + ps.worker, dtype=D)).sum().backward()
            optimizer.step()
        return ps.workers, model.weight.detach().clone()

    results = World(size, shares=shares).run(program)
    workers = results[0][0]
    expected = 1.0
    for step in range(2 + workers):
        taking = [1.0 + k for k in range(workers) if step < 3 + k]
        expected -= 0.1 * sum(taking) / len(taking)
    torch.testing.assert_close(results[-1][1], torch.full((1, 2), expected, dtype=D), atol=1e-14, rtol=0)


def epochs(
    model: nn.Module, optimizer: Any, loader: Any, numbers: Any, scheduler: Any, validate: Callable[[Any], Any]
) -> list[float]:
    """A script as anybody writes it."""
    values = []
    for _ in numbers:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
        values.append(float(validate(lambda: float(model(data(97, D)[0])[0, 0].detach()))))
    return values


def parts(batch_size: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
    torch.manual_seed(5)
    model = mlp().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20)
    torch.manual_seed(7)
    return model, optimizer, scheduler, DataLoader(TensorDataset(*data(97, D)), batch_size=batch_size, shuffle=True)


@PLACES
@pytest.mark.parametrize("stops_at", [None, 3, 9])
def test_a_shuffled_loader_and_a_scheduler_and_resumed(stops_at: int | None, size: int, shares: bool) -> None:
    """The order is that of one process, drawn from the script's own random stream; resumed, every later bit is the same."""
    workers = max(1, size - 1)

    def program(e: Communicator, fails: bool = False, resume: str = "no") -> tuple[list[float], list[Tensor]]:
        model, optimizer, scheduler, loader = parts(8)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", resume=resume, checkpoint={"every": 2})
        steps = 0

        def counted() -> Iterator[Any]:
            nonlocal steps
            for found in ps.shard(loader):
                yield found
                steps += 1
                if fails and steps == stops_at:
                    raise KeyboardInterrupt

        class Batches:
            def __iter__(self) -> Iterator[Any]:
                return counted()

        values = epochs(model, optimizer, Batches(), ps.epochs(3), scheduler, ps.validate)
        return values, [p.detach().clone() for p in model.parameters()]

    if stops_at is not None:
        with pytest.raises(KeyboardInterrupt):
            World(size, shares=shares).run(lambda e: program(e, fails=True))
    model, optimizer, scheduler, loader = parts(8 * workers)
    expected = epochs(model, optimizer, loader, range(3), scheduler, lambda measure: measure())
    for values, weights in World(size, shares=shares).run(lambda e: program(e, resume="auto" if stops_at else "no")):
        assert values[-1] == pytest.approx(expected[-1], abs=1e-13, rel=0)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=1e-13 if workers > 1 else 0, rtol=0)


@pytest.mark.parametrize("window", [1, 3])
def test_samples_of_a_gradient_that_is_thrown_away_do_not_count(window: int) -> None:
    """A batch left out after backward, or an incomplete window, whose gradient the next `zero_grad` removes."""

    def program(e: Communicator) -> list[float]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        weighed = []
        for number, (x, y) in enumerate(ps.batches(data(60), 5, shuffle=False)):
            if number % window == 0:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if number % window < window - 1 or number in (4, 5):
                continue
            optimizer.step()
            weighed.append(ps._loop._latest)
        return weighed

    assert World(2).run(program)[-1] == [5.0 * window] * (10 if window == 1 else 3)


def test_a_shard_that_is_not_looped_over_is_refused() -> None:
    """The script loops over the loader that it had before: every worker would train on all data."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run")
    loader = DataLoader(TensorDataset(*data(16)), batch_size=8)
    ps.shard(loader)
    with pytest.raises(RuntimeError, match=r"a step before any loop over a shard: ps\.shard\(loader\) was called"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_two_steps_on_a_batch_between_which_a_checkpoint_may_come_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run", checkpoint={"every": 100})
    with pytest.raises(RuntimeError, match=r"a second step on a batch with checkpoint\.every: given 100"):
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(16), 8):
                for _ in range(2):
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()


def test_a_server_does_not_measure_with_an_old_teacher() -> None:
    def program(e: Communicator) -> None:
        model = nn.ModuleDict({"student": nn.Linear(2, 1), "teacher": nn.Linear(2, 1).requires_grad_(False)})
        optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", validate=lambda: 1.0)
        for _ in ps.epochs(1):
            model.student(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model.teacher.weight.lerp_(model.student.weight, 0.1)

    with pytest.raises(RuntimeError, match=r"measures on the server, but the script has changed teacher\.weight"):
        World(2).run(program)


@PLACES
@pytest.mark.parametrize("where", ["validate", "worker 0 alone"])
@pytest.mark.parametrize("stops", [False, True])
def test_what_is_drawn_between_loops_leaves_orders_those_of_one_process(
    stops: bool, where: str, size: int, shares: bool
) -> None:
    """A loader that is only looked through draws a seed, as does an evaluation at random; worker 0 does so as one process."""
    workers = max(1, size - 1)

    def script(batch_size: int, connect: Any, resume: str = "no", fails: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(*data(64, D)), batch_size=batch_size, shuffle=True)
        tests = DataLoader(TensorDataset(*data(10, D)), batch_size=4)
        ps = connect(model, optimizer, resume) if connect else None
        loader = ps.shard(loader) if ps else loader

        def evaluate() -> float:
            return sum(float(F.cross_entropy(model(x), y).detach()) for x, y in tests) + float(torch.rand(()))

        for epoch in ps.epochs(4) if ps else range(4):
            for number, (x, y) in enumerate(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if fails and epoch == 2 and number == 1:
                    raise KeyboardInterrupt
            if not ps or (where != "validate" and ps.worker == 0):
                evaluate()
            elif where == "validate":
                ps.validate(evaluate)
        return [p.detach().clone() for p in model.parameters()]

    def program(e: Communicator, **more: Any) -> list[Tensor]:
        def connect(model: nn.Module, optimizer: Any, resume: str) -> mpips.Run:
            return mpips.connect(model, optimizer, communicator=e, run_dir="run", resume=resume, checkpoint={"every": 1})

        return script(8, connect, **more)

    if stops:
        with pytest.raises(KeyboardInterrupt):
            World(size, shares=shares).run(lambda e: program(e, fails=True))
    for weights in World(size, shares=shares).run(lambda e: program(e, resume="auto" if stops else "no")):
        torch.testing.assert_close(weights, script(8 * workers, None), atol=1e-13 if workers > 1 else 0, rtol=0)


def test_what_batches_gives_can_be_looped_over_again_and_slices_draw_nothing() -> None:
    torch.manual_seed(0)
    drawn = torch.random.get_rng_state()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run")
    torch.random.set_rng_state(drawn)
    batches = ps.batches(data(16), 8, shuffle=False)
    for _ in range(3):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert ps.round == 6
    assert torch.equal(torch.random.get_rng_state(), drawn)


@PLACES
@pytest.mark.parametrize("how", ["plain", "the setting clip", "clipping by hand", "LBFGS"])
@pytest.mark.parametrize("plan", ["root", "sharded"])
def test_losses_that_are_sums(plan: str, how: str, size: int, shares: bool) -> None:
    """The last batches are of different sizes, and a worker may have none: the gradient is the joined batch's sum."""
    workers = max(1, size - 1)

    def trained(batch_size: int, connect: Callable[..., mpips.Run] | None) -> list[Tensor]:
        model = mlp().to(D)
        make = {"LBFGS": lbfgs, "plain": lambda p: torch.optim.SGD(p, lr=0.01)}.get(how, adamw)
        optimizer: Any = make(model.parameters())
        loader = DataLoader(TensorDataset(*data(35, D)), batch_size=batch_size)
        clips = how == "clipping by hand" or (how == "the setting clip" and not connect)
        if connect:
            loader = connect(model, optimizer).shard(loader)
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y, reduction="sum")
                loss.backward()
                return loss

            if how == "LBFGS":
                optimizer.step(closure)
                continue
            closure()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def program(e: Communicator) -> list[Tensor]:
        more: dict[str, Any] = {"clip": 0.5} if how == "the setting clip" else {}
        return trained(
            8, lambda *given: mpips.connect(*given, communicator=e, run_dir="run", reduction="sum", plan=plan, **more)
        )

    expected = trained(8 * workers, None)
    for weights in World(size, shares=shares).run(program):
        torch.testing.assert_close(weights, expected, atol=1e-10 if how == "LBFGS" else 1e-12, rtol=0)


@pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])
@pytest.mark.parametrize("nonfinite", ["raise", "drop", "skip"])
def test_a_nan_in_gradients_that_are_clipped_is_obeyed_and_named(nonfinite: str, shares: bool, tmp_path: Path) -> None:
    """`clip_grad_norm_` averages the gradients before the step: worker 1's are NaN in the second step of three."""

    def program(e: Communicator) -> Any:
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=str(tmp_path / "run"), nonfinite=nonfinite)
        x, y = data(8, torch.float64)
        for step in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x + ps.worker), y)
            (loss * float("nan") if (ps.worker, step) == (1, 1) else loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=r"rank 2 has a NaN or Inf in the gradient of 0\.weight"):
            World(4, shares=shares).run(program)
        return
    plain = mlp().double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = data(8, torch.float64)
    for step in range(3):
        optimizer.zero_grad()
        workers = [0, 2] if step == 1 else [0, 1, 2]
        if step == 1 and nonfinite == "skip":
            continue
        (sum(F.cross_entropy(plain(x + worker), y) for worker in workers) / len(workers)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    for weights in World(4, shares=shares).run(program):
        assert torch.allclose(weights, nn.utils.parameters_to_vector(plain.parameters()), rtol=0, atol=1e-12)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    told = [event["message"] for event in events if "NaN" in event.get("message", "")]
    assert told == ["rank 2: NaN or Inf in the gradient of 0.weight"]


def overflowing(connect: Callable[[Any, Any], Any]) -> list[Tensor]:
    """The scaled gradients of the first steps are infinite on every worker, until the scale has fallen."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = connect(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-3)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * 1000).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return [*(p.detach() for p in model.parameters()), torch.tensor(scaler.get_scale())]


def looked_at(connect: Callable[[Any, Any], Any]) -> list[Tensor]:
    """A batch whose gradient is not finite on every worker is skipped by the script, which looks at the norm."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (x, y) in enumerate(connect(model, optimizer)):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * (torch.nan if number == 1 else 1)).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 0.1).isfinite():
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])
@pytest.mark.parametrize("program", [overflowing, looked_at])
def test_clipping_what_is_not_finite_on_any_worker_ends_no_run(program: Any, shares: bool) -> None:
    """As in one process: what is not finite matters if a step is taken with it. The loss's mean was divided by 0 samples."""
    pairs = TensorDataset(*data(256))

    def on_rank(e: Communicator) -> list[Tensor]:
        def connect(model: Any, optimizer: Any) -> Any:
            ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
            return ps.shard(DataLoader(pairs, 16 // ps.workers))

        return program(connect)  # type: ignore[no-any-return]

    expected = program(lambda *_: DataLoader(pairs, 16))
    for found in World(3, shares=shares).run(on_rank):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])
def test_a_nan_in_a_closure_is_named_by_its_first_evaluation(shares: bool) -> None:
    """Later evaluations of the same step are NaN on every worker."""

    def program(e: Communicator) -> None:
        model = mlp().double()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        x, y = data(8, torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x + ps.worker), y)
            (loss * float("nan") if ps.worker == 1 else loss).backward()
            return loss

        optimizer.step(closure)

    with pytest.raises(NonFiniteError, match=r"rank 2 has a NaN or Inf in the gradient of 0\.weight"):
        World(4, shares=shares).run(program)


@pytest.mark.parametrize("said", [False, True])
def test_samples_that_are_said_after_clipping_must_be_those_of_the_average(said: bool) -> None:
    """Two workers with 1 and 3 samples: the clipped gradient is their weighted mean, or the step is refused."""

    def program(e: Communicator) -> Any:
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        x, y = data(4, torch.float64)
        mine = slice(0, 1) if ps.worker == 0 else slice(1, 4)
        loss = F.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        samples = mine.stop - mine.start
        if said:
            ps.average(samples=samples)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        ps.step(loss, samples=samples)
        return nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    if not said:
        with pytest.raises(
            ValueError, match=r"ps\.step\(samples=3\) after .* with 1 samples .* expected ps\.average\(samples=3\)"
        ):
            World(3).run(program)
        return
    plain = mlp().double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = data(4, torch.float64)
    F.cross_entropy(plain(x), y).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    optimizer.step()
    for weights in World(3).run(program):
        assert torch.allclose(weights, nn.utils.parameters_to_vector(plain.parameters()), rtol=0, atol=1e-12)


class Bank(nn.Module):
    """A model whose forward changes a bank of features, BatchNorm's statistics and a spectral norm's, and not `constant`."""

    def __init__(self, fills: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.register_buffer("constant", torch.ones(5))
        self.register_buffer("bank", torch.zeros(8, 5))
        self.fills = fills

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x) * self.constant
        if self.fills:
            self.bank[: len(x)] = features.detach()
        return self.head(features)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("fills", "settings", "lines"), [(True, {}, 1), (True, {"buffers": "local"}, 0), (False, {}, 0)])
@pytest.mark.parametrize("shares", [False, True])
def test_a_bank_of_features_that_would_be_averaged_is_said(
    shares: bool, fills: bool, settings: dict[str, Any], lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was averaged, in silence."""

    def program(e: Communicator) -> Tensor:
        torch.manual_seed(0)
        model = Bank(fills)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", **settings)
        for x, y in ps.shard(DataLoader(TensorDataset(*data(64)), 8)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.get_buffer("bank").clone()

    one, other = World(3, shares=shares).run(program)
    assert torch.equal(one, other) == (not settings)
    assert capsys.readouterr().out.count("the buffer bank, which each worker changes, is averaged") == lines
