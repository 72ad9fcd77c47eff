"""What every transport of a round must do: a class of tests that each implementation inherits.

An implementation supplies `run(program, config)`: make a transport on every rank for a model of the same weights, call
`program(end)` with it, and return the results by rank. Rank 0 only serves; the other ranks are workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpips.algorithms.modes import choose_mode, server_optimizer
from mpips.comm import Communicator
from mpips.config import Config, Robust
from mpips.model.message import SAMPLES, WEIGHT, Control, Replica, WorkerStatus, replicate
from mpips.reduce.choice import choose_transport
from mpips.reduce.transport import Decision, Transport
from mpips.rules import choose

SIZES = [(11, 7), (300,), (5,)]
NUMELS = [math.prod(size) for size in SIZES]
SAMPLED = [5.0, 11.0, 3.0, 7.0]  # the samples of each worker, of three or four
RATE, MOMENTUM = 0.5, 0.25


class Model(nn.Module):
    """Three parameters, and a buffer of either kind."""

    statistics: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES)
        self.register_buffer("statistics", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@dataclass
class End:
    """One rank's end: its copy of the model, and the transport."""

    communicator: Communicator
    replica: Replica
    transport: Transport

    @property
    def leads(self) -> bool:
        return self.communicator.rank == 0

    def give(self, number: int, missing: tuple[int, ...] = ()) -> None:
        """Write this worker's push message of round `number`; the server's is empty."""
        push, rank = self.replica.push, self.communicator.rank
        push.forget()
        row = WorkerStatus(round=number)
        if rank and rank not in missing:
            row.samples = row.weight = SAMPLED[rank - 1]
            self.put(contribution(rank, number))
            push.floats.fill_(float(rank)).mul_(row.weight)
            if rank == 1:
                push.limbs[0], push.limbs[-1] = number, 1
            push.presence.fill_(1)
            if not push.raw:
                push.gradients.mul_(row.weight)
        push.write(rank, row, ())
        self.transport.push()

    def decide(self, decision: Decision, number: int) -> None:
        """Carry out a decision, and pull the weights."""
        self.transport.decide(decision if self.leads else None)
        if self.leads and decision.action != "skip":
            push, pull = self.replica.push, self.replica.pull
            self.replica.buffers.combine(push.floats, push.heard.limbs, pull.buffers)
        self.transport.pull(Control(round=number + 1.0, loss=0.125) if self.leads else None)

    def put(self, values: Tensor) -> None:
        """Write values to the gradients of the push message, between whose tensors there may be room."""
        for slot, part in zip(self.replica.flat.slots, values.split(NUMELS), strict=True):
            self.replica.push.gradients[slot.span] = part

    def values(self, flat: Tensor) -> Tensor:
        """The elements of all tensors in a flat buffer."""
        return torch.cat([flat[slot.span] for slot in self.replica.flat.slots])

    def weights(self) -> Tensor:
        return self.values(self.replica.pull.weights)


Program = Callable[[End], Any]


def contribution(rank: int, number: int) -> Tensor:
    """The gradient of worker `rank` - 1 in round `number`."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(sum(NUMELS), generator=generator, dtype=torch.float64)


def mean(number: int, ranks: Iterable[int]) -> Tensor:
    """The samples-weighted mean of these ranks' contributions to a round."""
    here = {rank: SAMPLED[rank - 1] for rank in ranks}
    summed = sum((contribution(rank, number) * samples for rank, samples in here.items()), torch.zeros(()))
    return summed / sum(here.values())


def end_of(communicator: Communicator, config: Config) -> End:
    """Return this rank's end, with the transport that the settings and the communicator choose."""
    model, mode = Model(), choose_mode(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    replica = replicate(model, config, communicator.size, communicator.allocate)
    stepping = server_optimizer(mode, config, communicator.size - 1, replica, optimizer)
    given = replica, config, mode, stepping, *choose(config)
    transport = choose_transport(communicator, *given, serves=communicator.rank == 0)
    return End(communicator, replica, transport)


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-13)


class TransportContract:
    plan = "root"

    @property
    def workers(self) -> list[int]:
        """The workers' ranks."""
        return [1, 2, 3]

    run: Callable[[Any, Program, Config], list[Any]]

    def rounds(self, program: Program, **settings: Any) -> list[Any]:
        return self.run(program, Config(plan=self.plan, **settings))

    def test_it_is_the_one_that_is_meant(self) -> None:
        assert set(self.rounds(lambda end: end.transport.plan)) == {self.plan}

    @pytest.mark.parametrize("missing", [(), (2,)], ids=["of all", "without data on a worker"])
    def test_a_step_is_momentum_sgd_with_the_mean(self, missing: tuple[int, ...]) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            for number in (0, 1):
                end.give(number, missing)
                end.transport.reduce(number)
                end.decide(Decision("step"), number)
            return before, end.weights(), end.replica.pull.control, [b.clone() for b in end.replica.pull.buffers]

        ranks = [rank for rank in self.workers if rank not in missing]
        first, second = mean(0, ranks), mean(1, ranks)
        for before, after, control, (statistics, count) in self.rounds(program):
            assert near(after, before - RATE * first - RATE * (second + MOMENTUM * first))
            assert (control.round, control.loss) == (2, 0.125)
            here = {rank: SAMPLED[rank - 1] for rank in ranks}
            expected = sum(rank * samples for rank, samples in here.items()) / sum(here.values())
            assert near(statistics, torch.full_like(statistics, expected))
            assert count == 1

    def test_the_server_has_the_rows_of_all(self) -> None:
        def program(end: End) -> Any:
            end.give(0)
            end.transport.reduce(0)
            rows = [list(row) for row in end.replica.push.heard.table()] if end.leads else []
            present = end.replica.push.heard.present() if end.leads else []
            end.decide(Decision("skip"), 0)
            return rows, present

        rows, present = self.rounds(program)[0]
        assert [row[SAMPLES] for row in rows] == [0.0, *SAMPLED[: len(self.workers)]]
        assert [row[WEIGHT] for row in rows] == [0.0, *SAMPLED[: len(self.workers)]]
        assert present == [len(self.workers)] * len(SIZES)

    def test_a_round_that_is_skipped_moves_nothing_but_the_control(self) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            end.transport.reduce(0)
            end.decide(Decision("skip"), 0)
            same = torch.equal(end.weights(), before)
            end.give(1)
            end.transport.reduce(1)
            end.decide(Decision("step"), 1)
            return same, before, end.weights(), end.replica.pull.control.round

        for same, before, after, number in self.rounds(program):
            assert same
            assert near(after, before - RATE * mean(1, self.workers))
            assert number == 2

    def test_factors_of_rate_and_gradient(self) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            end.transport.reduce(0)
            end.decide(Decision("step", scale=0.5, times=3.0), 0)
            return before, end.weights()

        for before, after in self.rounds(program):
            assert near(after, before - RATE * 0.5 * 3.0 * mean(0, self.workers))

    def test_the_norm_is_that_of_the_whole_gradient(self) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            end.transport.reduce(0)
            end.decide(Decision("step"), 0)
            return before, end.weights()

        gradient = mean(0, self.workers)
        for before, after in self.rounds(program, clip=1.5):
            assert torch.allclose(after, before - RATE * gradient * (1.5 / (gradient.norm() + 1e-6)), rtol=0, atol=1e-12)

    def test_weights_are_adopted(self) -> None:
        """New weights, the same on all workers, of which one gives them."""

        def program(end: End) -> Any:
            end.give(0, missing=(2, 3, 4))
            end.transport.reduce(0)
            end.decide(Decision("adopt"), 0)
            return end.weights()

        for after in self.rounds(program):
            assert near(after, contribution(1, 0))

    def test_an_average_is_everywhere_and_moves_no_weight(self) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            end.transport.average()
            averaged, same = end.values(end.replica.push.gradients), torch.equal(end.weights(), before)
            end.give(1)
            end.transport.reduce(1)
            end.decide(Decision("step"), 1)
            return averaged, same, before, end.weights()

        for averaged, same, before, after in self.rounds(program):
            assert near(averaged, mean(0, self.workers))
            assert same
            assert near(after, before - RATE * mean(1, self.workers))

    def test_a_control_between_rounds(self) -> None:
        def program(end: End) -> Any:
            end.transport.tell(Control(round=7, stop=3) if end.leads else None)
            return end.replica.pull.control

        assert [(control.round, control.stop) for control in self.rounds(program)] == [(7, 3)] * (1 + len(self.workers))

    def test_the_state_is_the_whole_optimizer_s(self) -> None:
        from mpips.checkpoint import joined
        from mpips.data import Place
        from mpips.server.rank_state import RankState

        def program(end: End) -> Any:
            end.give(0)
            end.transport.reduce(0)
            end.decide(Decision("step"), 0)
            own = {} if end.leads else end.transport.optimizer_shard()
            blobs = end.communicator.gather_bytes(RankState(-1, Place(), {}, slices=own).pack())
            shards = [RankState.unpack(blob).slices for blob in blobs]
            return joined(end.transport.optimizer_state(shards)) if end.leads else None

        state = self.rounds(program)[0]["optimizer"]["state"]
        found = torch.cat([state[f"weights.{n}"]["momentum_buffer"].flatten() for n in range(len(SIZES))])
        assert near(found, mean(0, self.workers))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_value_that_is_not_finite_is_named_by_rank_and_tensor(self, value: float) -> None:
        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            if end.communicator.rank == 2:
                end.replica.push.gradients[end.replica.flat.slots[1].offset + 3] = value
            found = end.transport.reduce(0)
            rows = end.replica.push.heard.table() if end.leads else []
            end.decide(Decision("skip"), 0)
            return found.nonfinite, torch.equal(end.weights(), before), rows

        results = self.rounds(program)
        named, _, _ = results[0]
        assert set(named.values()) == {1}
        assert set(named) <= {0, 2}  # by messages the sum is known, and not whose it is
        assert all(same for _, same, _ in results)

    @pytest.mark.parametrize("rule", ["median", "krum"])
    def test_a_rule_has_each_worker_s_contribution(self, rule: str) -> None:
        """A contribution far from the others moves little."""

        def program(end: End) -> Any:
            before = end.weights()
            end.give(0)
            if end.communicator.rank == 3:
                end.replica.push.gradients.fill_(1e6)
            end.transport.reduce(0)
            end.decide(Decision("step"), 0)
            return before, end.weights()

        far = torch.full((sum(NUMELS),), 1e6, dtype=torch.float64)
        given = torch.stack([far if rank == 3 else contribution(rank, 0) for rank in self.workers])
        for before, after in self.rounds(program, rule=rule, robust=Robust(num_byzantine=0)):
            moved = (before - after) / RATE
            if rule == "median":
                assert near(moved, torch.from_numpy(np.median(given.numpy(), axis=0)))
            else:
                assert any(near(moved, one) for rank, one in zip(self.workers, given, strict=True) if rank != 3)
