"""Buffers under each policy, against means computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model.buffers import Buffers
from mpips.model.flat import LayoutError
from tests.helpers.programs import OPTIMIZERS, cnn, data, train

POLICIES = ["mean", "server", "local"]
NUMBERS = {  # what worker k has in each buffer after its step
    torch.float32: lambda k: [0.5 * k, -1.25],
    torch.float16: lambda k: [60000.0, 2.0**-24 * k],  # times the samples: beyond float16's largest, below its smallest
    torch.bfloat16: lambda k: [1.0 * k, 1e30],
    torch.int64: lambda k: [2**24 + 1 + k, -(2**62) - k],
    torch.int32: lambda k: [-1 - k, 2**31 - 1 - k],
    torch.uint8: lambda k: [255 - k, k],
    torch.bool: lambda k: [k % 2 == 0, True],
}


def named(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "of_")


class Counting(nn.Module):
    """One weight, and buffers that each forward pass on worker k fills with that worker's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        for dtype in NUMBERS:
            self.register_buffer(named(dtype), torch.zeros(2, dtype=dtype))
        self.register_buffer("scalar", torch.tensor(0))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.worker = -1

    def forward(self, x: Tensor) -> Tensor:
        for dtype, numbers in NUMBERS.items():
            self.get_buffer(named(dtype)).copy_(torch.tensor(numbers(self.worker), dtype=dtype))
        self.hidden.fill_(self.worker)
        self.scalar.fill_(7 + self.worker)
        return self.weight * x.mean()


def on_all_ranks(size: int, model: Callable[[], nn.Module], work: Callable[[Communicator, nn.Module], None]) -> list[nn.Module]:
    """Each rank's model, made by `model`, after `work`; that of rank 0, which only serves, after all of it."""
    models: dict[int, nn.Module] = {}

    def program(communicator: Communicator) -> nn.Module:
        models[communicator.rank] = net = model()
        work(communicator, net)
        return copy.deepcopy(net)

    workers = World(size).run(program)
    return [models[0], *workers]


def step_once(samples: list[int], **settings: Any) -> list[dict[str, Tensor]]:
    """One round in which worker k has so many samples; what each rank's buffers hold afterwards."""

    def work(communicator: Communicator, net: nn.Module) -> None:
        ps = mpips.connect(net, OPTIMIZERS["sgd"](net.parameters()), communicator=communicator, run_dir="run", **settings)
        net.worker = ps.worker
        for _ in ps.epochs(1):
            for (x,) in ps.batches((torch.ones(samples[ps.worker], 1),), max(samples), shard=False):
                loss = net(x)
                loss.backward()
                ps.step(loss)

    return [dict(net.named_buffers()) for net in on_all_ranks(1 + len(samples), Counting, work)]


def expected(policy: str, rank: int, dtype: torch.dtype, samples: list[int]) -> Tensor:
    """By hand: what the rank holds after the round."""
    zero, numbers = torch.zeros(2, dtype=dtype), NUMBERS[dtype]
    own = torch.tensor(numbers(rank - 1), dtype=dtype) if rank else zero
    if policy == "local" or dtype == torch.bool:
        return own
    if policy == "server":
        return zero
    if not dtype.is_floating_point:
        return torch.tensor(numbers(0), dtype=dtype)
    rows = torch.stack([torch.tensor(numbers(k), dtype=dtype).float() * n for k, n in enumerate(samples)])
    return (rows.sum(0) / sum(samples)).to(dtype)


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}], ids=["sum", "rows"])
@pytest.mark.parametrize("samples", [[1], [2, 3], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_each_dtype_under_each_policy(policy: str, samples: list[int], settings: dict[str, Any]) -> None:
    for rank, buffers in enumerate(step_once(samples, buffers=policy, **settings)):
        idle = rank > 0 and not samples[rank - 1]  # it has filled no buffer
        for dtype in NUMBERS:
            if idle and (policy == "local" or dtype == torch.bool):
                continue
            got = buffers[named(dtype)]
            assert got.dtype == dtype
            assert torch.equal(got, expected(policy, rank, dtype, samples)), (rank, dtype, got)


def test_scalars_and_empty_ones_travel_too_and_hidden_ones_do_not() -> None:
    server, first, second = step_once([1, 1])
    assert server["scalar"].item() == first["scalar"].item() == second["scalar"].item() == 7
    assert server["nothing"].shape == (0, 3)
    assert [b["hidden"].tolist() for b in (server, first, second)] == [[0, 0], [0, 0], [1, 1]]


def test_the_first_worker_s_integers_count_even_when_it_has_no_samples() -> None:
    """Its counters are its last ones, not the zeros of an empty message."""
    net = Counting()
    net.of_int64.copy_(torch.tensor([-5, 2**40]))
    buffers = Buffers(net, "mean", torch.float32)
    floats, limbs = torch.ones(buffers.float_numel), torch.zeros(buffers.limb_numel)
    buffers.write(floats, limbs, weight=0, first=True)
    pull = dict(zip(buffers.names, (torch.ones_like(t) for t in buffers.tensors), strict=True))
    buffers.combine(floats, limbs, list(pull.values()))
    assert pull["of_int64"].tolist() == [-5, 2**40]
    assert pull["of_float32"].tolist() == [0, 0]


def test_integers_that_nobody_has_written_stay() -> None:
    """The worker that gives them has died."""
    net = Counting()
    net.of_int64.copy_(torch.tensor([3, 4]))
    buffers = Buffers(net, "mean", torch.float32)
    floats, limbs = torch.ones(buffers.float_numel), torch.zeros(buffers.limb_numel)
    buffers.write(floats, limbs, weight=2, first=False)
    pull = dict(zip(buffers.names, (torch.ones_like(t) for t in buffers.tensors), strict=True))
    buffers.combine(floats, limbs, list(pull.values()))
    assert pull["of_int64"].tolist() == [1, 1]


@pytest.mark.parametrize("value", [0, 1, -1, 2**24 + 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, -(2**63)])
def test_every_integer_survives_the_float32_tail(value: int) -> None:
    net = nn.Module()
    net.register_buffer("count", torch.tensor([[value], [~value]]))
    buffers = Buffers(net, "mean", torch.float32)
    message = torch.zeros(3, buffers.limb_numel)
    for rank in range(3):
        buffers.write(torch.zeros(0), message[rank], weight=rank, first=rank == 1)
    (pull,) = [torch.zeros_like(t) for t in buffers.tensors]
    buffers.combine(torch.zeros(0), message.sum(0), [pull])
    assert pull.tolist() == [[value], [~value]]


def batch_norm(policy: str, batches: int) -> list[dict[str, Tensor]]:
    """Each rank's BatchNorm state after a run of two workers, unshuffled, 8 samples each a round."""

    def work(communicator: Communicator, net: nn.Module) -> None:
        ps = train(communicator, net, lambda p: torch.optim.SGD(p, lr=0.0), data(16 * batches), 8, buffers=policy)
        assert ps.round == batches

    return [dict(net[2].named_buffers()) for net in on_all_ranks(3, cnn, work)]


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_norm_of_two_workers_by_hand(policy: str) -> None:
    """The weights stand still (lr = 0), so each worker's statistics can be followed on a model of its own."""
    x, _ = data(32)
    models = [cnn(), cnn()]
    for step in range(2):
        for k, net in enumerate(models):
            net(x[k::2][8 * step : 8 * step + 8])
        if policy != "local":
            start = cnn()[2]
            for name in ("running_mean", "running_var"):
                own = [net[2].get_buffer(name) for net in models]
                new = (own[0] * 8 + own[1] * 8) / 16 if policy == "mean" else start.get_buffer(name)
                for buffer in own:
                    buffer.copy_(new)
            for net in models:
                net[2].num_batches_tracked.fill_(models[0][2].num_batches_tracked if policy == "mean" else 0)
    hand = [dict(net[2].named_buffers()) for net in models]
    server, *workers = batch_norm(policy, 2)
    fresh = dict(cnn()[2].named_buffers())
    for name in fresh:
        assert torch.equal(server[name], hand[0][name] if policy == "mean" else fresh[name]), name
        for ours, theirs in zip(workers, hand, strict=True):
            assert torch.equal(ours[name], theirs[name]), name
    assert (hand[0]["num_batches_tracked"].item(), policy) in [(2, "mean"), (0, "server"), (2, "local")]


def test_a_buffer_that_the_script_replaces_is_followed() -> None:
    net = nn.Module()
    net.register_buffer("mean", torch.zeros(2))
    buffers = Buffers(net, "mean", torch.float32)
    net.mean = torch.ones(2)
    assert buffers.named["mean"] is net.mean
    buffers.load([torch.full((2,), 3.0)])
    assert net.mean.tolist() == [3, 3]


def test_names_are_without_the_prefix_of_a_compiled_module() -> None:
    net = nn.Sequential(torch.compile(nn.BatchNorm1d(2), backend="eager"))
    assert list(Buffers(net, "mean", torch.float32).named) == [
        "0.running_mean", "0.running_var", "0.num_batches_tracked",
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "policy", "fine"), [
    (torch.float64, "mean", False),
    (torch.float64, "server", True),
    (torch.float64, "local", True),
])  # fmt: skip
def test_what_the_message_cannot_carry_is_refused_by_name(dtype: torch.dtype, policy: str, fine: bool) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    net[0].running_var = torch.ones(2, dtype=dtype)
    if fine:
        assert "0.running_var" in Buffers(net, policy, torch.float32).named
        return
    with pytest.raises(LayoutError, match=rf'0\.running_var is {dtype}.*torch\.float32.*buffers="local"'):
        Buffers(net, policy, torch.float32)


def test_a_float64_message_carries_float64_buffers_exactly() -> None:
    net = nn.Module()
    net.register_buffer("b", torch.tensor([1 + 2.0**-52], dtype=torch.float64))
    buffers = Buffers(net, "mean", torch.float64)
    floats = torch.zeros(buffers.float_numel, dtype=torch.float64)
    buffers.write(floats, torch.zeros(0), weight=1, first=True)
    (pull,) = [torch.zeros(1, dtype=torch.float64)]
    buffers.combine(floats, torch.zeros(0), [pull])
    assert pull.item() == 1 + 2.0**-52


def test_a_buffer_that_the_script_asks_the_gradient_of_travels_as_any_other() -> None:
    net = nn.Module()
    net.register_buffer("b", torch.ones(2, requires_grad=True))
    buffers = Buffers(net, "mean", torch.float32)
    floats, pull = torch.zeros(buffers.float_numel), torch.zeros(2)
    buffers.write(floats, torch.zeros(0), weight=2, first=True)
    buffers.store([pull])
    assert (floats[:2].tolist(), pull.tolist(), pull.requires_grad) == ([2, 2], [1, 1], False)
