"""Gradients that a script uses again after a step: those of one process, or refused where the memory holds something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import data, mlp

D = torch.float64
LINE = "expected optimizer.zero_grad"
KEPT, USED = [(1, False, False), (3, False, False), (3, True, False)], [(2, True, True), (2, False, True)]
Shard = Callable[[TensorDataset, int], Any]
Program = Callable[[Callable[[Any, Any], Shard]], list[Tensor]]


def never_zeroed(connect: Callable[[Any, Any], Shard]) -> list[Tensor]:
    model = mlp().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in connect(model, optimizer)(TensorDataset(*data(64, D)), 16):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def stepped_twice(connect: Callable[[Any, Any], Shard]) -> list[Tensor]:
    model = mlp().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in connect(model, optimizer)(TensorDataset(*data(64, D)), 16):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def partly_zeroed(connect: Callable[[Any, Any], Shard]) -> list[Tensor]:
    """The last layer's gradients are never zeroed."""
    model = mlp().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in connect(model, optimizer)(TensorDataset(*data(64, D)), 16):
        for p in list(model.parameters())[:2]:
            p.grad = None
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def one_process(program: Program) -> list[Tensor]:
    return program(lambda *_: lambda dataset, batch: DataLoader(dataset, batch))


def in_a_run(program: Program, size: int, shares: bool, **settings: Any) -> list[list[Tensor]]:
    def on_rank(e: Communicator) -> list[Tensor]:
        def connect(model: Any, optimizer: Any) -> Shard:
            ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", **settings)
            return lambda dataset, batch: ps.shard(DataLoader(dataset, batch // ps.workers))

        return program(connect)

    return World(size, shares=shares).run(on_rank)


@pytest.mark.parametrize("program", [never_zeroed, stepped_twice, partly_zeroed])
@pytest.mark.parametrize(("size", "shares", "trains"), [*KEPT, *USED])
def test_gradients_are_used_again_as_in_one_process_or_not_at_all(program: Any, size: int, shares: bool, trains: bool) -> None:
    if trains:
        with pytest.raises(RuntimeError, match=LINE):
            in_a_run(program, size, shares, server_trains=True)
        return
    for weights in in_a_run(program, size, shares):
        torch.testing.assert_close(weights, one_process(program), atol=1e-13, rtol=0)


@pytest.mark.parametrize("program", [never_zeroed, stepped_twice])
@pytest.mark.parametrize("mode", ["local_sgd", "easgd"])
@pytest.mark.parametrize("size", [1, 3])
def test_local_steps_use_up_their_gradients(program: Any, mode: str, size: int) -> None:
    with pytest.raises(RuntimeError, match=LINE):
        in_a_run(program, size, True, mode=mode)


@pytest.mark.parametrize(("size", "shares", "trains"), [(3, False, False), *USED])
def test_clipping_gradients_of_before_a_step_is_refused(size: int, shares: bool, trains: bool) -> None:
    """By messages a step after clipping leaves its gradients on the worker alone that has contributed for all."""

    def program(connect: Callable[[Any, Any], Shard]) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in connect(model, optimizer)(TensorDataset(*data(64, D)), 16):
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    with pytest.raises(RuntimeError, match=LINE):
        in_a_run(program, size, shares, server_trains=trains)


@pytest.mark.parametrize(("size", "shares", "trains"), [*KEPT, *USED])
@pytest.mark.parametrize("clips", [False, True])
def test_another_optimizers_gradients_may_be_anything(clips: bool, size: int, shares: bool, trains: bool) -> None:
    """The generator's backward adds to the discriminator's gradients of the last step; they are zeroed before they are used."""

    def program(connect: Callable[[Any, Any], Shard]) -> list[Tensor]:
        torch.manual_seed(0)
        g, d = nn.Linear(12, 3, dtype=D), nn.Linear(3, 1, dtype=D)
        og, od = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
        shard = connect([g, d], [og, od])
        for x, _ in shard(TensorDataset(*data(64, D)), 16):
            od.zero_grad()
            (F.softplus(-d(x[:, :3])) + F.softplus(d(g(x).detach()))).mean().backward()
            od.step()
            og.zero_grad()
            F.softplus(-d(g(x))).mean().backward()
            if clips:
                nn.utils.clip_grad_norm_(g.parameters(), 0.01)
            else:
                d.weight.grad[0, 2] = torch.inf  # type: ignore[index]
            og.step()
        return [p.detach() for p in (*g.parameters(), *d.parameters())]

    for weights in in_a_run(program, size, shares, server_trains=trains):
        torch.testing.assert_close(weights, one_process(program), atol=1e-13, rtol=0)


@pytest.mark.parametrize("shares", [False, True])
def test_a_resume_does_not_add_to_gradients_that_a_checkpoint_lacks(shares: bool) -> None:
    """It began anew with no gradient, and a run that never zeroes became another one."""

    def train(e: Communicator, folder: str, resume: str) -> list[Tensor]:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=folder, resume=resume, checkpoint={"every": 1, "keep": 9})
        for x, y in ps.shard(DataLoader(TensorDataset(*data(64, D)), 16 // ps.workers)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    World(3, shares=shares).run(lambda e: train(e, "whole", "no"))
    with pytest.raises(RuntimeError, match=LINE):
        World(3, shares=shares).run(lambda e: train(e, "again", "whole/checkpoints/round_00000002.h5"))
