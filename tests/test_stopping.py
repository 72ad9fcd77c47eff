"""Early stopping and the fp16 loss scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import mpips
from mpips import checkpoint
from mpips.config import Stopping
from mpips.exchange import Exchange
from mpips.exchange.simulated import World
from mpips.message import Stop
from mpips.stopping import LossScale, Patience

NAN, INF = math.nan, math.inf


def verdicts(rule: Stopping, *values: float) -> list[Stop]:
    patience = Patience()
    return [patience.judge(value, rule) for value in values]


@pytest.mark.parametrize(("rule", "values", "stops_at"), [
    (Stopping(), [3, 2, 1, 0], None),
    (Stopping(patience=2), [1, 1, 1], 2),
    (Stopping(patience=2), [1, 0, 2, 0, 2], 4),
    (Stopping(patience=1, goal="min"), [3, 2, 1, 1], 3),
    (Stopping(patience=1, min_gain=0.5), [1, 1.6, 2.1], 2),
    (Stopping(patience=1, min_gain=0.5, goal="min"), [2, 1.4, 0.9], 2),
    (Stopping(patience=2, min_gain=0.5), [1, 1.4, 1.8], None),  # two small gains are one large one
    (Stopping(patience=3), [NAN, NAN, NAN], 2),
    (Stopping(patience=2), [NAN, 1, NAN, 2, NAN, NAN], 5),
    (Stopping(patience=2), [-INF, 0, INF, INF, INF], 4),
    (Stopping(patience=2, goal="min"), [INF, 5, 5, 5], 3),
], ids=str)  # fmt: skip
def test_patience(rule: Stopping, values: list[float], stops_at: int | None) -> None:
    expected = [Stop.PATIENCE if i == stops_at else Stop.NO for i in range(len(values))]
    assert verdicts(rule, *values) == expected


@pytest.mark.parametrize(("rule", "values", "expected"), [
    (Stopping(target=0.9), [0.8, 0.9], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.1, goal="min"), [0.2, 0.1], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.9), [NAN, INF], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.0, goal="min"), [1.0, 0.0], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.9, patience=1), [0.95, 0.95], [Stop.TARGET, Stop.TARGET]),
])  # fmt: skip
def test_target(rule: Stopping, values: list[float], expected: list[Stop]) -> None:
    assert verdicts(rule, *values) == expected


def test_the_best_value_is_remembered_and_a_resumed_judge_goes_on() -> None:
    rule, patience = Stopping(patience=3), Patience()
    for value in (1.0, 5.0, 4.0, 4.5):
        patience.judge(value, rule)
    assert patience == Patience(best=5.0, waited=2)
    assert Patience(patience.best, patience.waited).judge(5.0, rule) == Stop.PATIENCE


def test_the_loss_scale_is_halved_by_overflow_and_doubled_by_2000_good_rounds() -> None:
    """Against torch.amp.GradScaler, which needs no GPU for that."""
    ours, torch_s = LossScale(1024.0), torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=0.5)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for number in range(4100):
        bad = number in (0, 5, 1999, 2100)
        torch_s.scale(weight.sum())  # makes its tensors
        weight.grad = torch.full((1,), INF if bad else 1.0)
        torch_s.step(optimizer)
        torch_s.update()
        ours.overflow() if bad else ours.fine()
        assert ours.scale == torch_s.get_scale(), number


def scales(exchange: Exchange, rounds: int, overflow: dict[int, set[int]], epochs: int = 1, **settings: object) -> list[float]:
    """The loss scale that this worker saw before each round; worker k overflows in the rounds `overflow[k]`."""
    net = nn.Linear(1, 1, bias=False).half()
    nn.init.zeros_(net.weight)
    seen = []
    ps = mpips.connect(
        net, lambda p: torch.optim.SGD(p, lr=1.0), exchange=exchange, loss_scale=256.0, run_dir="run", **settings
    )
    for _ in ps.epochs(epochs):
        for (x,) in ps.batches((torch.ones(rounds * ps.workers, 1).half(),), 1):
            seen.append(ps.scale(torch.ones(())).item())
            loss = net(x).sum().float()
            ps.scale(loss).backward()
            if ps.round in overflow.get(ps.worker, ()):
                net.weight.grad.fill_(INF)
            ps.step(loss)
    return [*seen, net.weight.item()]


@pytest.mark.parametrize("size", [1, 3])
def test_one_rank_s_overflow_skips_the_round_and_halves_the_scale_on_all(size: int) -> None:
    overflow = {0: {1}, 1: {3}} if size > 1 else {0: {1, 3}}
    for seen in World(size).run(lambda e: scales(e, 6, overflow)):
        assert seen == [256, 256, 128, 128, 64, 64, -4]  # four of six steps were taken, each of 1


def test_the_scale_is_doubled_on_all_ranks_and_goes_on_after_a_resume() -> None:
    settings = {"checkpoint": {"every": 5}}
    World(2).run(lambda e: scales(e, 10, {0: {2}}, **settings))
    saved = checkpoint.load(checkpoint.newest(Path("run/checkpoints")))["loss_scale"]
    assert saved == {"scale": 128.0, "good": 7}
    again = World(2).run(lambda e: scales(e, 10, {}, epochs=2, resume="auto", **settings))
    assert again[0][:-1] == [128.0] * 10
    assert checkpoint.load(checkpoint.newest(Path("run/checkpoints")))["loss_scale"] == {"scale": 128.0, "good": 17}


def test_2000_good_rounds_double_the_scale_and_leave_the_step_alone() -> None:
    seen = scales(World(1).ends[0], 2002, {})
    assert seen[1998:2002] == [256.0, 256.0, 512.0, 512.0]
    assert seen[-1] == -2002.0  # exact in float16 up to 2048


def test_without_a_loss_scale_nothing_changes_after_2000_rounds() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=1.0), exchange=World(1).ends[0], run_dir="run")
    for _ in ps.epochs(1):
        for (x,) in ps.batches((torch.ones(2010, 1),), 1):
            loss = net(x).sum()
            loss.backward()
            ps.step(loss)
    assert net.weight.item() == -2010
