"""What a worker writes into its push message."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpips.algorithms.update import Gradient
from mpips.comm.simulated import World
from mpips.config import Config
from mpips.model.message import Replica, WorkerStatus, replicate
from tests.helpers.programs import cnn, mlp


def worker(net: nn.Module, index: int = 0, workers: int = 2) -> tuple[Replica, Gradient]:
    replica = replicate(net, Config(metrics=("m",)), workers + 1, World(1).ends[0].allocate)
    replica.clear()
    return replica, Gradient(replica, index + 1, index, workers)


def backward(replica: Replica, value: float = 2.0) -> None:
    """Gradients of `value` in all but the last parameter."""
    sum(p.sum() * value for p in replica.flat.parameters[:-1]).backward()


@pytest.mark.parametrize(("workers", "samples", "weight"), [(2, 5, 5), (1, 5, 1), (1, 1, 1), (2, 1, 1), (2, 0, 0), (1, 0, 0)])
def test_the_contribution_is_the_gradient_times_the_weight(workers: int, samples: int, weight: float) -> None:
    replica, update = worker(mlp(), workers=workers)
    backward(replica)
    row = WorkerStatus(samples=samples, loss=7.0)
    update.write(row, [9.0])
    assert row.weight == weight
    views = [view for _, view in replica.flat.named(replica.push.gradients)]
    assert all((view == 2 * weight).all() for view in views[:-1])
    assert not views[-1].any()
    assert replica.push.presence.tolist() == ([1, 1, 1, 0] if weight else [0] * 4)
    assert replica.push.rows[1].tolist()[:3] == [samples, weight, 7.0]
    assert replica.push.rows[1][-1] == 9.0
    assert not replica.push.rows[0].any()
    assert replica.push.rows[2:].count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_for_nothing_and_is_named(value: float) -> None:
    replica, update = worker(cnn())
    backward(replica)
    replica.flat.parameters[3].grad[0] = value
    replica.push.floats.fill_(5)
    row = WorkerStatus(samples=4, loss=3)
    update.write(row, [1.0])
    assert (row.bad, row.weight) == (4, 0)
    assert not replica.push.body.any()
    assert not replica.push.presence.any()
    assert replica.push.message.isfinite().all()
    assert replica.push.rows[1, 3] == 4


def test_overflow_in_float16_is_seen() -> None:
    replica, update = worker(mlp().half(), workers=1)
    backward(replica, 1.0)
    replica.flat.parameters[0].grad.mul_(60000).mul_(2)
    row = WorkerStatus(samples=1)
    update.write(row, [0.0])
    assert row.bad == 1


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_first_worker_writes_integers(index: int) -> None:
    net = cnn()
    net[2].num_batches_tracked.fill_(70000)
    replica, update = worker(net, index)
    backward(replica)
    update.write(WorkerStatus(samples=3), [0.0])
    assert bool(replica.push.limbs.any()) == (index == 0)
    assert replica.push.floats.max() == 3  # the variance, 1, of 3 samples
    update.write_nothing(WorkerStatus(), 1)
    assert bool(replica.push.limbs.any()) == (index == 0)
    assert not replica.push.floats.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_without_data_pushes_only_its_row(dtype: torch.dtype) -> None:
    replica, update = worker(mlp().to(dtype))
    backward(replica)
    update.write_nothing(WorkerStatus(done=1, round=3), 1)
    assert not replica.push.body.any()
    assert replica.push.message.count_nonzero() == 2
    said = dict(zip(replica.push.columns, replica.push.rows[1].tolist(), strict=True))
    assert {column: value for column, value in said.items() if value} == {"done": 1, "round": 3}


def test_nothing_is_left_of_the_round_before() -> None:
    """The message holds the last round's combined values when the next one is written."""
    replica, update = worker(cnn())
    replica.push.message.fill_(3)
    replica.flat.clear()
    backward(replica)
    update.write(WorkerStatus(samples=2), [0.0])
    assert replica.push.rows[0].count_nonzero() == replica.push.rows[2].count_nonzero() == 0
    assert replica.push.presence.tolist() == [1, 1, 1, 1, 1, 0]
    assert max(float(view.max()) for _, view in replica.flat.named(replica.push.gradients)) == 4
