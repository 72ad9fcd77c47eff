"""Which gradients a step uses, and the samples behind them: as plain PyTorch has them in `p.grad`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import data, mlp
from tests.run.test_foreign_optimizers import Growing

D = torch.float64
PLACES = pytest.mark.parametrize(
    ("size", "shares", "trains"),
    [(1, False, False), (3, False, False), (3, True, False), (5, True, False), (2, False, True), (2, True, True)],
)
Connect = Callable[..., Any]  # (model, optimizers) -> a function that shards a loader with the joined batch's size


class Branches(nn.Module):
    """Two layers, of which each batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, dtype=D), nn.Linear(3, 4, dtype=D)

    def forward(self, x: Tensor, number: int) -> Tensor:
        return self.a(x) if number % 2 else self.b(x)


def zeroed(connect: Connect, by: str) -> Any:
    """Gradients that are zeroed and not removed: torch steps on the zeros, with momentum and weight decay."""
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        for number, (x, y) in enumerate(connect(model, optimizer)(TensorDataset(*four(64)), 16)):
            if by == "hand":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.zero_()
            else:
                optimizer.zero_grad(set_to_none=by == "none")
            F.cross_entropy(model(x, number), y).backward()
            optimizer.step()
    return model


def thrown_away(connect: Connect, by: str) -> Any:
    """The half window that an epoch leaves is thrown away at the beginning of the next."""
    model = mlp().to(D)
    parts = [list(model.parameters())[:2], list(model.parameters())[2:]] if by == "two" else [list(model.parameters())]
    optimizers = [torch.optim.SGD(part, lr=0.5) for part in parts]
    for _ in range(3):
        for number, (x, y) in enumerate(connect(model, optimizers)(TensorDataset(*data(37, D)), 16)):
            if number % 2 == 0 and by == "model":
                model.zero_grad()
            elif number % 2 == 0 and by == "hand":
                for p in model.parameters():
                    p.grad = None
            elif number % 2 == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            (F.cross_entropy(model(x), y) / 2).backward()
            if number % 2:
                for optimizer in optimizers:
                    optimizer.step()
    return model


def hinge(connect: Connect, by: str) -> Any:
    """A batch whose gradient is zero counts in its window; worker 0's part of the first batch has no hinge loss."""
    model = nn.Linear(2, 1, bias=False, dtype=D)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(3), dtype=D)
    x[0:16:2, 0] = 5.0
    for _ in range(3):
        for number, (batch,) in enumerate(connect(model, optimizer)(TensorDataset(x), 16)):
            (F.relu(1 - model(batch)).mean() / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    return model


def own_step_first(connect: Connect, by: str) -> Any:
    """One backward for two optimizers, of which the first steps on the workers."""
    model = mlp().to(D)
    parameters = list(model.parameters())
    optimizers = [Growing(parameters[:2]), torch.optim.SGD(parameters[2:], lr=0.1)]
    for x, y in connect(model, optimizers)(TensorDataset(*data(64, D)), 16):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def assigned(connect: Connect, by: str) -> Any:
    """Gradients of `torch.autograd.grad`, which the script assigns: clipping clipped each worker's own."""
    model = mlp().to(D)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.5)
    for x, y in connect(model, optimizer)(TensorDataset(*data(64, D)), 16):
        for p, gradient in zip(parameters, torch.autograd.grad(F.cross_entropy(model(x), y), parameters), strict=True):
            p.grad = gradient
        if by == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif by == "value":
            nn.utils.clip_grad_value_(parameters, 0.01)
        elif by == "part":
            nn.utils.clip_grad_norm_(parameters[:2], 0.05)
        elif by == "halves":
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            nn.utils.clip_grads_with_norm_(parameters, 0.1, norm)
        optimizer.step()
    return model


def frozen_at_first(connect: Connect, by: str) -> Any:
    """As CycleGAN: the discriminator is frozen while the generator steps, in the first step too."""
    torch.manual_seed(0)
    g, d = nn.Linear(3, 3, dtype=D), nn.Linear(3, 1, dtype=D)
    og, od = torch.optim.Adam(g.parameters(), lr=1e-2), torch.optim.Adam(d.parameters(), lr=1e-2)
    for x, _ in connect([g, d], [og, od])(TensorDataset(*four(64)), 16):
        d.requires_grad_(False)
        og.zero_grad()
        F.softplus(-d(g(x))).mean().backward()
        og.step()
        d.requires_grad_(True)
        od.zero_grad()
        (F.softplus(-d(x)) + F.softplus(d(g(x).detach()))).mean().backward()
        od.step()
    return nn.ModuleList([g, d])


def four(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 3, generator=generator, dtype=D), torch.randint(0, 4, (n,), generator=generator)


IDIOMS = [
    *[(zeroed, by) for by in ("zeros", "hand", "none")],
    *[(thrown_away, by) for by in ("model", "hand", "optimizer", "two")],
    (hinge, ""),
    *[(assigned, by) for by in ("", "norm", "value", "part", "halves")],
    (own_step_first, ""),
    (frozen_at_first, ""),
]


@PLACES
@pytest.mark.parametrize(("program", "by"), IDIOMS)
def test_a_step_uses_the_gradients_of_one_process(program: Any, by: str, size: int, shares: bool, trains: bool) -> None:
    torch.manual_seed(5)
    expected = program(lambda *_: lambda dataset, batch: DataLoader(dataset, batch), by)

    def connected(e: Communicator) -> Connect:
        runs: list[mpips.Run] = []

        def connect(model: Any, optimizer: Any) -> Any:
            if not runs:
                runs.append(mpips.connect(model, optimizer, communicator=e, run_dir="run", server_trains=trains))
            return lambda dataset, batch: runs[0].shard(DataLoader(dataset, batch // runs[0].workers))

        return connect

    def on_rank(e: Communicator) -> list[Tensor]:
        torch.manual_seed(5)
        return [p.detach().clone() for p in program(connected(e), by).parameters()]

    for weights in World(size, shares=shares).run(on_rank):
        torch.testing.assert_close(weights, [p.detach() for p in expected.parameters()], atol=1e-13, rtol=0)


@pytest.mark.parametrize("cleared", [False, True])
def test_a_second_step_on_the_gradients_of_an_own_step_is_that_of_one_process(cleared: bool) -> None:
    """Its gradients stay after the step, as torch leaves them: they were gone, and the second step did nothing."""

    def train(model: nn.Module, optimizer: Optimizer, batches: Any) -> list[Tensor]:
        for x, y in batches:
            if cleared:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def program(e: Communicator) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = Growing(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        return train(model, optimizer, ps.shard(DataLoader(TensorDataset(*data(64, D)), 16 // ps.workers)))

    plain = mlp().to(D)
    expected = train(plain, Growing(plain.parameters()), DataLoader(TensorDataset(*data(64, D)), 16))
    for size in (1, 3):
        for weights in World(size).run(program):
            torch.testing.assert_close(weights, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_that_are_zeroed_are_there_after_a_resume(to_none: bool, shares: bool) -> None:
    """A parameter that the next batch does not use is stepped with zeros, if it had a gradient before the checkpoint."""

    def train(e: Communicator, folder: str, resume: str) -> list[Tensor]:
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        checkpoints = {"every": 1, "epochs": 0, "keep": 9}
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=folder, resume=resume, checkpoint=checkpoints)
        for _ in range(2):
            for x, y in ps.shard(DataLoader(TensorDataset(*four(64)), 16 // ps.workers)):
                optimizer.zero_grad(set_to_none=to_none)
                F.cross_entropy(model(x, ps.round // 2), y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    whole = World(3, shares=shares).run(lambda e: train(e, "whole", "no"))
    for at in range(1, 8):
        from_there = f"whole/checkpoints/round_{at:08d}.h5"
        again = World(3, shares=shares).run(lambda e, at=at, from_there=from_there: train(e, f"from-{at}", from_there))
        torch.testing.assert_close(again, whole, atol=0, rtol=0)


def ahead(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    """The next batch is drawn before the backward of this one."""
    batches = iter(loader)
    following = next(batches)
    while following is not None:
        (x, y), following = following, next(batches, None)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def late(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    """A step at the beginning of the next iteration."""
    for x, y in loader:
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    optimizer.step()


def listed(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in list(loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def window(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for number, (x, y) in enumerate(loader, 1):
        F.cross_entropy(model(x), y).backward()
        if number % 2 == 0 or number == len(loader):
            optimizer.step()
            optimizer.zero_grad()


def usual(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def functional(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        parameters = list(model.parameters())
        found = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        for p, gradient in zip(parameters, found, strict=True):
            p.grad = gradient
        optimizer.step()


def said(ps: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in list(loader):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        ps.step(loss, samples=len(x))


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (ahead, "batches differ in size"),
        (late, "batches differ in size"),
        (listed, "batches differ in size"),
        (window, "gradients of batches of different sizes (8 and 3 items on this worker)"),
        (usual, ""),
        (functional, ""),
        (said, ""),
    ],
)
@pytest.mark.parametrize("items", [53, 64])
def test_samples_that_may_be_of_another_step_are_said(
    program: Any, line: str, items: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 53 items the last batch has 3 and 2: workers weigh by them, and one process does not, or by other ones."""

    def on_rank(e: Communicator) -> None:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        for _ in range(2):
            program(ps, model, optimizer, ps.shard(DataLoader(TensorDataset(*data(items, D)), 16 // ps.workers)))

    World(3).run(on_rank)
    out = capsys.readouterr().out
    assert ("mpips: batches differ" in out or "mpips: gradients of batches" in out) == bool(line and items == 53)
    assert out.count(f"mpips: {line}") == 1 or not line or items == 64


def test_a_loop_on_another_thread_than_the_steps_is_refused() -> None:
    """A thread that fetches batches ahead comes to the end of the loop, and of the rounds, while the script steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run")
    fetched: queue.Queue[Any] = queue.Queue(2)
    batches = iter(ps.shard(DataLoader(TensorDataset(*data(32)), 4)))
    thread = threading.Thread(target=lambda: fetched.put(next(batches)))
    thread.start()
    x, y = fetched.get()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="a step on another thread than the loop over the shard"):
        optimizer.step()
    thread.join()


@PLACES
def test_the_server_s_own_clipping_averages_nothing(size: int, shares: bool, trains: bool) -> None:
    """Where rank 0 trains, too, the server steps the script's own parameters; seed 79 of the simulated faults."""
    plain = mlp().to(D)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for x, y in DataLoader(TensorDataset(*data(64, D)), 16):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()

    def program(e: Communicator) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", server_trains=trains, clip=0.1)
        for x, y in ps.shard(DataLoader(TensorDataset(*data(64, D)), 16 // ps.workers)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for weights in World(size, shares=shares).run(program):
        torch.testing.assert_close(weights, [p.detach() for p in plain.parameters()], atol=1e-13, rtol=0)
