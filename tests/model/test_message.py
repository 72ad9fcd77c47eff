"""The two messages: who writes where, and that all of it arrives exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mpips.comm.simulated import World
from mpips.config import Config
from mpips.model.buffers import LIMBS
from mpips.model.flat import ALIGNMENT
from mpips.model.message import COLUMNS, Control, NonFiniteError, Replica, WorkerStatus, replicate, wire_dtype
from tests.helpers.programs import cnn, mlp


def made(net: nn.Module | None = None, size: int = 3, **settings: object) -> Replica:
    return replicate(net or cnn(), Config(**settings), size, World(1).ends[0].allocate)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "wire"), [
    (torch.float64, torch.float64), (torch.float32, torch.float32),
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
])  # fmt: skip
def test_half_precision_travels_as_float32(model: torch.dtype, wire: torch.dtype) -> None:
    assert wire_dtype(model) == wire
    replica = made(mlp().to(model))
    assert replica.push.message.dtype == wire
    assert replica.pull.weights.dtype == model
    assert replica.wire_is_grad == (model == wire)


def test_the_parts_of_a_push_cover_it_and_do_not_overlap() -> None:
    push = made(metrics=("a", "b")).push
    parts = [push.gradients, push.floats, push.limbs, push.presence, push.rows]
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    lengths = [part.numel() for part in parts]
    assert push.message.tolist() == [float(n) for n, length in enumerate(lengths, 1) for _ in range(length)]
    assert push.body.tolist() == [1.0] * lengths[0] + [2.0] * lengths[1]
    assert push.body.numel() == push.tail_at
    assert push.limbs.data_ptr() == push.message[push.tail_at :].data_ptr()
    assert lengths[2:] == [LIMBS + 1, 6, 3 * (len(COLUMNS) + 2)]  # one integer buffer, six parameters, three ranks


def test_the_parts_of_a_pull_cover_it_and_are_aligned() -> None:
    net = cnn().bfloat16()
    replica = made(net)
    pull = replica.pull
    for view in [pull.weights, *pull.buffers]:
        assert (view.data_ptr() - pull.message.data_ptr()) % ALIGNMENT == 0
    pull.message.fill_(255)
    pull.control = Control()
    pull.weights.zero_()
    for view in pull.buffers:
        view.zero_()
    used = pull.message.count_nonzero().item()
    named = dict(net.named_buffers())
    assert [view.shape for view in pull.buffers] == [named[name].shape for name in replica.buffers.names]
    padding = sum(-view.numel() * view.element_size() % ALIGNMENT for view in [pull.weights, *pull.buffers])
    control = 8 * len(dataclasses.fields(Control))
    assert used <= padding + control + ALIGNMENT


def test_a_rank_s_row_arrives_exactly_through_the_sum() -> None:
    """Each rank writes its own row; the tails are added, as MPI does."""
    replicas = [made(size=3, metrics=("m",)) for _ in range(3)]
    rows = [
        WorkerStatus(2**24, 2**24 - 1, -0.1, 3, 1, 2, 1, 2**20 - 1, 0.25, 1e-7),
        WorkerStatus(),
        WorkerStatus(5, 5, 1e30, 0, 0, 1, 0, 7, 3, 4),
    ]
    for rank, (replica, row) in enumerate(zip(replicas, rows, strict=True)):
        replica.push.write(rank, row, [rank + 0.5])
    total = replicas[0].push.message + replicas[1].push.message + replicas[2].push.message
    replicas[0].push.message.copy_(total)
    for rank, row in enumerate(rows):
        expected = torch.tensor([*dataclasses.astuple(row), rank + 0.5], dtype=torch.float32)
        assert torch.equal(replicas[0].push.rows[rank], expected)


def test_the_control_arrives_as_it_was_said() -> None:
    pull = made().pull
    said = Control(*(10.0**i + 0.1 for i in range(len(dataclasses.fields(Control)))))
    pull.control = said
    copy = made().pull
    copy.control_message.copy_(pull.control_message)
    assert copy.control == said
    assert copy.weights.equal(made().pull.weights)  # the control alone has moved


def test_a_replica_s_model_lies_in_its_messages() -> None:
    net = cnn()
    before = [p.detach().clone() for p in net.parameters()]
    replica = made(net)

    def within(tensor: Tensor, message: Tensor) -> bool:
        start, end = message.data_ptr(), message.data_ptr() + message.numel() * message.element_size()
        return start <= tensor.data_ptr() < end

    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert within(p, replica.pull.message)
        p.sum().backward()
        assert within(p.grad, replica.push.message)
    assert all(torch.equal(a, b) for a, b in zip(replica.pull.buffers, replica.buffers.tensors, strict=True))


def test_clear_leaves_nothing_to_push() -> None:
    net = mlp()
    replica = made(net)
    net(torch.ones(2, 12)).sum().backward()
    replica.push.write(1, WorkerStatus(samples=3), [])
    assert replica.push.message.any()
    replica.clear()
    assert not replica.push.message.any()
    assert all(p.grad is None for p in net.parameters())
    assert not replica.flat.pending


def test_everything_that_must_be_alike_is_everything() -> None:
    net = cnn()
    net[1].requires_grad_(False)
    net.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
    replica = made(net)
    for tensor in replica.everything:
        tensor.detach().zero_()
    assert not any(p.any() for p in net.parameters())
    assert not any(b.any() for b in net.buffers())


def test_a_culprit_is_named() -> None:
    replica = made(mlp())
    replica.check_finite(Control(round=4))
    with pytest.raises(NonFiniteError, match=r"rank 2 has a NaN or Inf in the gradient of 2\.weight, round 4.*drop.*skip"):
        replica.check_finite(Control(round=4, culprit=2, slot=2))
