"""Rules in shared memory: what comes of a round is what comes of it by messages, whoever serves which slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.rules import RULES, Rule
from tests.helpers.programs import data
from tests.reduce.test_shared_memory_transport import is_shared, sharing

BAD = {"trimmed": 1, "krum": 1, "multikrum": 1, "bulyan": 1}
LEAST = {"trimmed": 3, "krum": 5, "multikrum": 5, "bulyan": 7}
SHARED = [name for name in RULES if name != "cclip"]  # which is measured from a point as large as the model
PLANS = pytest.mark.parametrize("plan", ["root", "sharded"])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Net(nn.Sequential):
    """With BatchNorm, so that statistics travel, too."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Tanh(), nn.Linear(33, 5))


def trained(e: Communicator, rule: str, shared: bool, spoil: Any = None, **settings: Any) -> tuple[list[Tensor], list[str]]:
    """Weights and buffers after 5 rounds with other batch sizes on each worker."""
    net, said = Net(), []
    made = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    robust = {"num_byzantine": BAD.get(rule, 0), "clip_radius": 0.5}
    ps = mpips.connect(net, made, communicator=e, rule=rule, robust=robust, buffers="mean", **settings)
    assert is_shared(ps) == shared
    x, y = data(400)
    for step in range(5):
        size = 4 + (ps.worker + step) % 3
        start = (ps.worker * 40 + step * 7) % 300
        made.zero_grad()
        loss = F.cross_entropy(net(x[start : start + size]), y[start : start + size])
        loss.backward()
        if spoil:
            spoil(ps.worker, step, net)
        ps.step(loss, samples=size)
    return [t.detach().clone() for t in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point()))], said


def both(rule: str, plan: str, workers: int = 0, spoil: Any = None, **settings: Any) -> tuple[list[Any], list[Any]]:
    size = 1 + (workers or LEAST.get(rule, 4))
    run = partial(trained, rule=rule, spoil=spoil, **settings)
    ours = sharing(size).run(lambda e: run(e, shared=True, plan=plan, run_dir="shared"))
    return ours, World(size).run(lambda e: run(e, shared=False, run_dir="messages"))


@PLANS
@pytest.mark.parametrize("rule", SHARED)
def test_every_rule_gives_what_it_gives_by_messages(rule: str, plan: str) -> None:
    ours, expected = both(rule, plan)
    for (mine, _), (theirs, _) in zip(ours, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@PLANS
@pytest.mark.parametrize("rule", [name for name in SHARED if RULES[name]().needs != "gram"])
def test_the_bits_are_the_same_in_deterministic_mode(rule: str, plan: str) -> None:
    ours, expected = both(rule, plan, deterministic=True)
    for (mine, _), (theirs, _) in zip(ours, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def lie(worker: int, step: int, net: nn.Module, value: float) -> None:
    if worker == 1 and step == 2:
        for p in net.parameters():
            assert p.grad is not None
            p.grad.fill_(value)


@PLANS
@pytest.mark.parametrize("value", [1e30, -1e30])
@pytest.mark.parametrize("rule", [name for name in SHARED if name not in ("mean", "normclip", "sign")])
def test_one_huge_contribution_changes_little(rule: str, plan: str, value: float) -> None:
    """As by messages; and the weights stay where honest workers would have them."""
    ours, expected = both(rule, plan, spoil=partial(lie, value=value))
    for (mine, _), (theirs, _) in zip(ours, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
            assert a.abs().max() < 10


@PLANS
@pytest.mark.parametrize("rule", ["median", "krum"])
def test_a_contribution_that_is_not_finite_is_left_out(rule: str, plan: str) -> None:
    ours, expected = both(rule, plan, spoil=partial(lie, value=math.nan), nonfinite="drop")
    for (mine, _), (theirs, _) in zip(ours, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@PLANS
@pytest.mark.parametrize("rule", ["trimmed", "krum", "bulyan"])
def test_too_few_contributions_are_refused_on_every_rank(rule: str, plan: str) -> None:
    """The weights stay as they were, and the server says why."""
    found = sharing(LEAST[rule] + 1).run(lambda e: refused(e, rule, plan))
    assert found == [[True, True]] * LEAST[rule]
    assert "no update: " + rule in Path("run/events.jsonl").read_text()


def refused(e: Communicator, rule: str, plan: str) -> list[bool]:
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    made = torch.optim.SGD(net.parameters(), lr=0.05)
    settings: Any = {"rule": rule, "robust": {"num_byzantine": 1}, "plan": plan, "run_dir": "run"}
    ps = mpips.connect(net, made, communicator=e, **settings)
    x, y = data(8)
    F.cross_entropy(net(x), y).backward()
    ps.step(0.0, samples=8 * (ps.worker > 0))
    return [is_shared(ps), all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))]


@PLANS
@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
def test_what_an_idle_rank_has_in_its_memory_is_no_contribution(nonfinite: str, plan: str) -> None:
    """A script computes a gradient with a NaN and does not step with it; then workers wait for each other."""

    def program(e: Communicator, **settings: Any) -> tuple[list[Tensor], float]:
        net = Net()
        made = torch.optim.SGD(net.parameters(), lr=0.05)
        ps = mpips.connect(
            net, made, communicator=e, rule="median", server_trains=True, nonfinite=nonfinite, buffers="mean", **settings
        )
        x, y = data(60)
        for step in range(3):
            F.cross_entropy(net(x[step : step + 8]), y[step : step + 8]).backward()
            ps.step(0.0, samples=8)
        (net(x[:8]).sum() * math.nan).backward()
        ps.validate(lambda: 1.0)
        return [p.detach().clone() for p in net.parameters()], ps._control.version

    ours = sharing(3).run(lambda e: program(e, plan=plan, run_dir="shared"))
    expected = World(3).run(lambda e: program(e, run_dir="messages"))
    for (mine, version), (theirs, other) in zip(ours, expected, strict=True):
        assert version == other == 3
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert "NaN" not in Path("shared/events.jsonl").read_text()


class Remembers(Rule):
    """A mean that grows with each call."""

    needs = "rows"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        self.calls += 1
        out.copy_(torch.stack(list(rows)).mean(0).mul_(1 + 0.1 * self.calls))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.calls = state_dict["calls"]


def test_a_rule_that_remembers_is_called_on_one_rank_and_resumed_with_what_it_knows() -> None:
    """In slices each rank would call its own, of which the checkpoint has rank 0's."""

    def program(e: Communicator, folder: str, epochs: int, **settings: Any) -> list[Tensor]:
        net = Net()
        made = torch.optim.SGD(net.parameters(), lr=0.05)
        rule = f"{__name__}:Remembers"
        ps = mpips.connect(net, made, communicator=e, rule=rule, plan="sharded", run_dir=folder, **settings)
        assert not is_shared(ps)
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(48), 16):
                F.cross_entropy(net(x), y).backward()
                made.step()
                made.zero_grad()
        return [p.detach().clone() for p in net.parameters()]

    whole = sharing(4).run(partial(program, folder="whole", epochs=4))
    sharing(4).run(partial(program, folder="parts", epochs=2))
    parts = sharing(4).run(partial(program, folder="parts", epochs=4, resume="auto"))
    for ours, theirs in zip(parts[1], whole[1], strict=True):
        assert torch.equal(ours, theirs)
