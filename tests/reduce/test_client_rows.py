"""Clients as a rule's rows, several on a rank, on simulated ranks and on MPI, against the rules on whole contributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mpips.comm import SERVER, Communicator
from mpips.comm.simulated import World
from mpips.config import Config, Robust
from mpips.model.message import Contribution, Push, WorkerStatus
from mpips.reduce.aggregate import WEIGHT
from mpips.reduce.client_rows import aggregate_clients
from mpips.rules import choose
from tests.comm.test_mpi import on_mpi
from tests.helpers.contract_communicator import Program
from tests.reduce.test_aggregate import ATTACKS, HONEST, WIDE, Came, a_push, in_hull, random_values, rounds
from tests.rules.test_rules import LEAST, each_rule, together

Hosted = Sequence[Sequence[int]]  # for each rank the rows of its clients
HOSTED: dict[str, Hosted] = {
    "one rank": [[3, 0, 5, 1, 7, 2, 6, 4]],
    "a server and one": [[], [*range(8)]],
    "two": [[1, 3, 5, 7], [0, 2, 4, 6]],
    "three, uneven": [[], [7], [0, 1, 2, 4, 6], [5, 3]],
    "one has none": [[], [6, 7], [], [0, 1, 2, 3, 4, 5]],
    "one each": [[], *([k] for k in range(8))],
    "one each, in another order": [[], *([k] for k in (7, 1, 0, 3, 2, 6, 5, 4))],
}
SMALL = 1e-4  # MB; the simulated communicator cuts these 100 bytes once more
each_hosting = pytest.mark.parametrize("hosted", HOSTED)


def give(push: Push, rank: int, numbers: Sequence[int], values: Tensor, weights: Tensor, statistics: Tensor) -> None:
    """Write what a worker with these clients would; client k is called 10 k."""
    push.message.zero_()
    for k in numbers:
        body, weight = torch.zeros_like(push.body), float(weights[k])
        body[: values.shape[1]] = values[k] * weight
        body[push.gradients.numel() :][:3] = statistics[k] * weight
        push.clients.append(Contribution(10 * k, body, weight, weight))
    here = float(weights[list(numbers)].sum())
    push.write(rank, WorkerStatus(samples=here, weight=here), ())


def hosting(
    config: Config, hosted: Hosted, values: Tensor, weights: Tensor, statistics: Tensor | None = None, times: int = 1
) -> Program:
    """A program that combines `(n, len)` values of clients, hosted so, `times` times."""
    stats = torch.zeros(len(values), 3, dtype=values.dtype) if statistics is None else statistics

    def program(e: Communicator) -> list[Came]:
        rule, last = choose(config)
        push, came = a_push(e, values.shape[1], values.dtype), []
        for _ in range(times):
            give(push, e.rank, hosted[e.rank], values, weights, stats)
            found = aggregate_clients(e, push, rule, last, int(not hosted[0]), SMALL)
            if e.rank == SERVER:
                ends = push.gradients[: values.shape[1]].clone(), push.floats[:3].clone()
                came.append(Came(*ends, found.faulty, found.refused, push.rows.clone(), e.traffic.copy()))
            assert not push.clients
        return came

    return program


def once(config: Config, hosted: Hosted, values: Tensor, weights: Tensor | None = None, **how: Any) -> Came:
    """The server's result of one round on simulated ranks."""
    given = torch.ones(len(values), dtype=values.dtype) if weights is None else weights
    came: Came = World(len(hosted), bucket=64).run(hosting(config, hosted, values, given, **how))[SERVER][0]
    return came


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
@each_hosting
@each_rule
def test_wherever_clients_are_hosted_the_rule_is_that_of_clients(name: str, hosted: str, deterministic: bool) -> None:
    config = Config(rule=name, deterministic=deterministic, robust=Robust(clip_radius=3.0))
    values, weights = random_values(8, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64)
    expected = together(choose(config)[0], values.clone(), weights)
    came = once(config, HOSTED[hosted], values, weights)
    assert close(came.gradient, expected)
    assert (came.faulty, came.refused) == ([], "")
    assert came.table[:, WEIGHT].tolist() == [sum(map(float, numbers)) for numbers in HOSTED[hosted]]


@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_one_client_each_has_the_bits_of_ranks(name: str, deterministic: bool) -> None:
    config = Config(rule=name, deterministic=deterministic, robust=Robust(clip_radius=3.0))
    values, weights, statistics = random_values(8), torch.arange(8.0), random_values(8, 3, seed=1)
    ranks = World(9, bucket=64).run(rounds(config, values, weights, statistics, times=3))[SERVER]
    clients = World(9, bucket=64).run(hosting(config, HOSTED["one each"], values, weights, statistics, times=3))[SERVER]
    for mine, theirs in zip(clients, ranks, strict=True):
        assert torch.equal(mine.gradient, theirs.gradient)
        assert torch.equal(mine.statistics, theirs.statistics)
        assert torch.equal(mine.table, theirs.table)


@pytest.mark.parametrize("name", ["krum", "bulyan"])
@each_hosting
def test_ties_are_broken_by_the_order_of_clients(name: str, hosted: str) -> None:
    """Two groups of equal clients, equally far from the rest: the first client's group is chosen."""
    values = torch.eye(8, dtype=torch.float64) * 5
    expected = together(choose(Config(rule=name))[0], values.clone(), torch.ones(8, dtype=torch.float64))
    assert close(once(Config(rule=name), HOSTED[hosted], values).gradient, expected)
    if name == "krum":
        assert close(expected, values[0])


@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "multikrum", "bulyan"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("hosted", [[[], [0, 1, 2, 3], [4, 5, 6]], [[0, 1, 2, 3, 4, 5, 6]], [[], [3], [0, 1, 2, 4, 5, 6]]])
def test_a_faulty_client_does_not_lead_out_of_the_honest_ones_beside_it(name: str, attack: str, hosted: Hosted) -> None:
    values = torch.cat([HONEST[:3], ATTACKS[attack].unsqueeze(0), HONEST[3:]])
    came = once(Config(rule=name), hosted, values)
    assert in_hull(came.gradient)
    assert came.faulty == ([30] if "nan" in attack or "inf" in attack else [])


@each_rule
def test_clients_that_are_not_finite_are_named(name: str) -> None:
    values = random_values(9, dtype=torch.float64)
    values[[2, 5]] = math.nan
    hosted = [[], [0, 2, 4, 6], [8, 7, 5], [1, 3]]
    config = Config(rule=name, robust=Robust(num_byzantine=2, clip_radius=3.0))
    came = once(config, hosted, values)
    if name == "mean":
        assert came.gradient.isnan().all()
        return
    good = [k for k in range(9) if k not in (2, 5)]
    rest = Config(rule=name, robust=Robust(num_byzantine=0, clip_radius=3.0))  # two of two have been found
    assert came.faulty == [20, 50]
    assert close(came.gradient, together(choose(rest)[0], values[good], torch.ones(7, dtype=torch.float64)))


def test_clients_that_were_reported_count_as_faulty_and_are_named() -> None:
    """Krum with f = 1 takes 5; one of 5 is reported, and 4 are enough with f = 0, where with f = 1 they are not."""
    values = random_values(5, dtype=torch.float64)
    expected = together(
        choose(Config(rule="krum", robust=Robust(num_byzantine=0)))[0], values[1:], torch.ones(4, dtype=torch.float64)
    )

    def program(e: Communicator, reports: bool) -> Any:
        rule, last = choose(Config(rule="krum"))
        push = a_push(e, 37, torch.float64)
        weights = torch.ones(5, dtype=torch.float64)
        weights[0] = 0
        give(push, e.rank, [[], [0, 1, 2], [3, 4]][e.rank], values, weights, torch.zeros(5, 3))
        if e.rank == 1 and reports:
            push.clients[0].bad = 1
        return aggregate_clients(e, push, rule, last, 1, SMALL), push.gradients[:37]

    came, gradient = World(3).run(lambda e: program(e, True))[SERVER]
    assert (came.faulty, came.refused) == ([0], "")
    assert close(gradient, expected)
    assert "4 came" in World(3).run(lambda e: program(e, False))[SERVER][0].refused


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["trimmed", "krum", "multikrum", "bulyan"])
def test_too_few_clients_are_refused_without_harm(name: str, deterministic: bool) -> None:
    n = LEAST[name]
    weights = torch.ones(n)
    weights[-1] = 0
    program = hosting(
        Config(rule=name, deterministic=deterministic), [[], [*range(n)]], random_values(n), weights, torch.ones(n, 3), 2
    )
    for came in World(2, bucket=64).run(program)[SERVER]:
        assert f"{n - 1} came" in came.refused
        assert not came.gradient.any()
        assert not came.statistics.any()


@each_rule
def test_rounds_without_clients_and_with_one(name: str) -> None:
    config = Config(rule=name, robust=Robust(clip_radius=1e39))
    came = once(config, [[], [], []], torch.zeros(1, 5))
    assert not came.gradient.any()
    assert (came.faulty, came.refused) == ([], "")
    value = torch.tensor([[1e-45, 1 / 3, 3.4e38, 0.1]])
    if name != "sign":
        assert torch.equal(once(config, [[], [], [0]], value).gradient, value[0])


@pytest.mark.parametrize("hosted", ["one rank", "three, uneven", "one each"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("median", 4.0), ("trimmed", 26 / 6), ("sign", 4.0), ("multikrum", 4.75), ("cclip", 5.0), ("normclip", 5.0)],
)
def test_statistics_by_hand(name: str, expected: float, hosted: str) -> None:
    """What lies behind the gradients is judged by client too; clipping does not shrink it."""
    values = torch.full((8, 37), 10.0, dtype=torch.float64)
    statistics = torch.tensor([1.0, 4, 12, 5, 4, 4, 6, 4]).double().unsqueeze(1).expand(8, 3)
    numbers = sorted(statistics[:, 0].tolist())
    if name == "trimmed":
        expected = sum(numbers[1:-1]) / 6
    if name == "multikrum":
        values[2] += 100  # left out
        expected = (sum(numbers) - 12) / 7
    came = once(Config(rule=name, robust=Robust(clip_radius=0.5)), HOSTED[hosted], values, statistics=statistics)
    assert came.statistics.tolist() == pytest.approx([expected] * 3, rel=1e-12)


@each_hosting
def test_centred_clipping_goes_on_from_the_last_result(hosted: str) -> None:
    values = torch.full((8, 4), 5.0, dtype=torch.float64)  # 10 away from 0
    config = Config(rule="cclip", robust=Robust(clip_radius=1.0, iterations=1))
    program = hosting(config, HOSTED[hosted], values, torch.ones(8, dtype=torch.float64), times=12)
    came = World(len(HOSTED[hosted])).run(program)[SERVER]
    assert [round(float(c.gradient.norm()), 4) for c in came] == [*map(float, range(1, 11)), 10.0, 10.0]


def test_a_rank_that_does_not_count_has_no_clients_that_do() -> None:
    """One whose row says that the round is not to be taken."""
    values = random_values(6, dtype=torch.float64)

    def program(e: Communicator) -> Any:
        rule, last = choose(Config(rule="median"))
        push = a_push(e, 37, torch.float64)
        give(push, e.rank, [[], [0, 1, 2], [3, 4, 5]][e.rank], values, torch.ones(6), torch.zeros(6, 3))
        if e.rank == 1:
            push.write(1, WorkerStatus(bad=1), ())
        return aggregate_clients(e, push, rule, last, 1, SMALL), push.gradients[:37]

    assert close(World(3).run(program)[SERVER][1], values[3:].median(0).values)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["median", "bulyan", "rfa"])
def test_no_message_is_larger_than_a_bucket(name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so the server gathers no more than a bucket of each rank, however many clients it has."""
    world, largest = World(3), 0
    plainly = type(world.ends[0]).reduce

    def noted(e: Any, message: Tensor, tail: int, needs: Any, apply: Any) -> None:
        nonlocal largest
        largest = max(largest, message.nbytes if needs == "rows" else 0)
        plainly(e, message, tail, needs, apply)

    monkeypatch.setattr(type(world.ends[0]), "reduce", noted)
    config = Config(rule=name, deterministic=deterministic, robust=WIDE)
    world.run(hosting(config, [[], [*range(9)], [*range(9, 12)]], random_values(12, 500), torch.ones(12)))
    assert 9 * 4 <= largest <= SMALL * 1e6


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_mpi_gives_what_whole_contributions_give(name: str, deterministic: bool) -> None:
    from mpi4py import MPI

    size = int(MPI.COMM_WORLD.size)
    config = Config(rule=name, deterministic=deterministic, robust=Robust(clip_radius=3.0))
    values, weights = random_values(8, 1000, dtype=torch.float64), torch.arange(1.0, 9.0, dtype=torch.float64)
    expected = together(choose(config)[0], values.clone(), weights)
    for first in (0, 1):
        hosted: list[list[int]] = [[] for _ in range(size)]
        for k in range(8):
            hosted[first + k * k % (size - first)].append(k)
        came = on_mpi(hosting(config, hosted, values, weights), bucket=70)[SERVER][0]
        assert close(came.gradient, expected)
        assert (came.faulty, came.refused) == ([], "")
