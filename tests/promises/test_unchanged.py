"""One worker and an unchanged script: after 200 steps every bit is that of plain PyTorch, in one process and with a server."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import data

STEPS = 200
Connect = Callable[[Any, Any], Any]
Found = tuple[list[float], list[Tensor], list[dict[str, Any]]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)
    )


def loader() -> Any:
    x, y = data(160)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)  # 20 steps an epoch


def train(make: Callable[[Any], torch.optim.Optimizer], connect: Connect) -> Found:
    """The script of the README."""
    model = net()
    optimizer = make(model.parameters())
    connect(model, optimizer)
    losses = []
    for _ in range(STEPS // 20):
        for x, y in loader():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, [*model.state_dict().values()], [optimizer.state_dict()]


def sgd(connect: Connect) -> Found:
    return train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True), connect)


def adamw(connect: Connect) -> Found:
    return train(lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True), connect)


def lbfgs(connect: Connect) -> Found:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4, history_size=5)
    connect(model, optimizer)
    losses = []
    for step in range(STEPS):
        x, y = data(160)
        x, y = x[step % 5 :: 5], y[step % 5 :: 5]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses, [*model.state_dict().values()], [optimizer.state_dict()]


def grad_scaler(connect: Connect) -> Found:
    """The scale grows until a step overflows, which nobody takes, several times."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**118, growth_interval=5)
    connect(model, optimizer)
    told = []
    for _ in range(STEPS // 20):
        for x, y in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = 256 * F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            told += [loss.item(), scaler.get_scale()]
    scales = told[1::2]
    assert sum(b < a for a, b in pairwise(scales)) > 1
    return told, [*model.state_dict().values()], [optimizer.state_dict()]


def one_cycle_by_hand(connect: Connect) -> Found:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    connect(model, optimizer)
    told, step = [], 0
    for _ in range(STEPS // 20):
        for x, y in loader():
            for group in optimizer.param_groups:
                group["lr"] = 0.3 * (1 - math.cos(2 * math.pi * (step + 1) / STEPS)) / 2
                group["momentum"] = 0.95 - 0.1 * math.sin(math.pi * step / STEPS)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            told.append(loss.item())
            step += 1
    return told, [*model.state_dict().values()], [optimizer.state_dict()]


def gan(connect: Connect) -> Found:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 2))
    d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1))
    og = torch.optim.Adam(g.parameters(), lr=2e-3, betas=(0.5, 0.999))
    od = torch.optim.RMSprop(d.parameters(), lr=1e-3)
    connect([g, d], [og, od])
    told = []
    for _ in range(STEPS):
        real = torch.randn(16, 2) + 2
        fake = g(torch.randn(16, 4))
        od.zero_grad()
        loss_d = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        loss_d.backward()
        od.step()
        og.zero_grad()
        loss_g = F.softplus(-d(fake)).mean()
        loss_g.backward()
        og.step()
        told += [loss_d.item(), loss_g.item()]
    return told, [*g.state_dict().values(), *d.state_dict().values()], [og.state_dict(), od.state_dict()]


def ema(connect: Connect) -> Found:
    """A weight average, whose losses are looked at in each epoch, and a cosine schedule."""
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    connect(model, optimizer)
    told = []
    for _ in range(STEPS // 20):
        for x, y in loader():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            told.append(loss.item())
        average.eval()
        x, y = data(160)
        told.append(F.cross_entropy(average(x), y).item())
    return told, [*model.state_dict().values(), *average.state_dict().values()], [optimizer.state_dict()]


SCRIPTS = [sgd, adamw, lbfgs, grad_scaler, one_cycle_by_hand, gan, ema]


@pytest.mark.parametrize(("size", "shares"), [(1, False), (2, False), (2, True)], ids=["alone", "messages", "shared memory"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_bit_is_that_of_plain_pytorch(script: Callable[[Connect], Found], size: int, shares: bool) -> None:
    told, weights, states = script(lambda models, optimizers: None)
    drawn = torch.random.get_rng_state()

    def program(e: Communicator) -> tuple[Found, Tensor]:
        return script(
            lambda models, optimizers: mpips.connect(models, optimizers, communicator=e, run_dir="run")
        ), torch.random.get_rng_state()

    ((our_told, our_weights, our_states), our_drawn) = World(size, shares=shares).run(program)[0]
    assert our_told == told
    assert len(our_weights) == len(weights)
    for ours, theirs in zip(our_weights, weights, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(our_drawn, drawn)
    for our_state, state in zip(our_states, states, strict=True):
        assert flat(our_state) == flat(state)


def flat(state: Any) -> Any:
    """A state_dict as comparable numbers: tensors as lists; where a step's count lies does not matter."""
    if isinstance(state, Tensor):
        return (state.dtype, state.tolist())
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    return [flat(value) for value in state] if isinstance(state, (list, tuple)) else state
