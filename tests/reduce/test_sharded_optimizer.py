"""An optimizer taken to pieces: its state is cut up and put together again, bit for bit, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from mpips.checkpoint import joined
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import Config
from mpips.data import Place
from mpips.model import layout
from mpips.model.layout import divide
from mpips.model.message import replicate
from mpips.optim import hyperparameters as hyper
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.optim.server_optimizer import FedAdam, SlowMo
from mpips.reduce.sharded_optimizer import Granularity, ShardedOptimizer, where
from mpips.server.rank_state import RankState
from tests.promises.test_resume import assert_same


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "GRAIN", 64)
    monkeypatch.setattr(layout, "PIECE", 256)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(5))
    net.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    net.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    net.register_parameter("turned", nn.Parameter(torch.rand(6, 7).T))
    return net


def flat_optimizer(make: Any, net: nn.Module | None = None) -> FlatOptimizer:
    return FlatOptimizer(replicate(net or model(), Config(), 1, World(1).ends[0].allocate), make)


def give_gradients(whole: FlatOptimizer, seed: int) -> list[float]:
    """The second tensor has none."""
    generator = torch.Generator().manual_seed(seed)
    push = whole.replica.push
    push.gradients.copy_(torch.randn(push.gradients.shape, generator=generator))
    return [float(number != 1) for number in range(len(whole.replica.flat.slots))]


MAKE: dict[str, Any] = {
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "fedadam": lambda p: FedAdam(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor([q for q in p if q.dim() > 1], lr=0.1),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("name", MAKE)
def test_state_is_cut_up_stepped_and_put_together(name: str, ranks: int) -> None:
    """Two steps whole; or one step whole, dealt out, and one in pieces, whose state travels as it does for a checkpoint."""
    expected = flat_optimizer(MAKE[name])
    for seed in (1, 2):
        expected.step(give_gradients(expected, seed), None)

    def program(e: Communicator) -> tuple[Tensor, Any]:
        whole = flat_optimizer(MAKE[name])
        if e.rank == 0:
            whole.step(give_gradients(whole, 1), None)
        e.broadcast(whole.replica.pull.weights)
        slots, numel = whole.replica.flat.slots, whole.replica.flat.numel
        span = divide(slots, numel, [ranks], where(whole.torch) == Granularity.TENSORS)[e.rank]
        own = ShardedOptimizer(whole, [span], whole.replica.push.gradients)
        own.spread(e, e.rank == 0)
        own.step(give_gradients(whole, 2), 1.0, 1.0)
        states = e.gather_bytes(RankState(e.rank, Place(), {}, slices=own.own()).pack() if e.rank else b"")
        found = own.state_dict([unpacked(blob) for blob in states[1:]]) if e.rank == 0 else {}
        return whole.replica.flat.weights[span].clone(), joined(found)

    results = World(ranks).run(program)
    torch.testing.assert_close(torch.cat([weights for weights, _ in results]), expected.replica.flat.weights, rtol=0, atol=0)
    assert_same(results[0][1], expected.state_dict())
    for ours, theirs in zip(by_tensor(results[0][1]), by_tensor(expected.state_dict()), strict=True):
        assert ours.dtype == theirs.dtype


def unpacked(blob: bytes) -> dict[str, Any]:
    return RankState.unpack(blob).slices


def by_tensor(tree: dict[str, Any]) -> list[Tensor]:
    return [
        v for _, kept in sorted(tree["optimizer"]["state"].items()) for _, v in sorted(kept.items()) if isinstance(v, Tensor)
    ]


def test_large_tensors_are_stepped_piece_by_piece() -> None:
    whole = flat_optimizer(MAKE["adam"])
    own = ShardedOptimizer(whole, [slice(0, whole.replica.flat.numel)], whole.replica.push.gradients)
    lengths = [p.numel() for p in own.torch.param_groups[0]["params"]]
    assert max(lengths) == 256
    assert sum(lengths) == sum(slot.numel for slot in whole.replica.flat.slots)


def test_what_may_be_cut_where() -> None:
    class Derived(optim.Adam):
        pass

    params = [nn.Parameter(torch.ones(2, 2))]
    assert [where(make(params)) for make in MAKE.values()] == [Granularity.ELEMENTS] * 6 + [Granularity.TENSORS]
    assert where(SlowMo(params, lr=1.0)) == Granularity.ELEMENTS
    assert where(Derived(params)) == Granularity.NOWHERE
    for hook in ("register_step_pre_hook", "register_step_post_hook"):
        watched = optim.SGD(params, lr=0.1)
        getattr(watched, hook)(lambda *_: None)
        assert where(watched) == Granularity.ELEMENTS, "a hook is run where the script calls step"


def test_settings_are_taken_over_from_another_rank() -> None:
    def made(**settings: Any) -> ShardedOptimizer:
        def make(params: Any) -> optim.Optimizer:
            return optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.5)}], **settings)

        whole = flat_optimizer(make)
        return ShardedOptimizer(whole, [slice(0, 64)], whole.replica.push.gradients)

    one, other = made(lr=0.1), made(lr=0.2, betas=(0.5, 0.6), weight_decay=0.3, amsgrad=True)
    other.torch.param_groups[1]["lr"].fill_(0.25)
    assert len(hyper.read(one.torch)) == len(hyper.read(other.torch))
    kept = one.torch.param_groups[1]["lr"]
    hyper.write(one.torch, hyper.read(other.torch))
    for ours, theirs in zip(one.torch.param_groups, other.torch.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert one.torch.param_groups[1]["lr"] is kept, "a tensor stays the one that others know"
    assert isinstance(one.torch.param_groups[0]["betas"], tuple)
    assert one.torch.param_groups[0]["amsgrad"] is True
    assert one.torch.param_groups[0]["foreach"] is None, "what is no number stays"


def test_a_rate_is_scaled_for_one_step_alone() -> None:
    whole, other = flat_optimizer(MAKE["momentum"]), flat_optimizer(MAKE["momentum"])
    own = ShardedOptimizer(whole, [slice(0, whole.replica.flat.numel)], whole.replica.push.gradients)
    own.step(give_gradients(whole, 1), 1.0, 0.5)
    other.step(give_gradients(other, 1), None, 0.5)
    assert torch.equal(whole.replica.flat.weights, other.replica.flat.weights)
    assert own.lr == 0.1
