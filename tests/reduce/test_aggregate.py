"""Both sides of a round's combining, on simulated ranks and on MPI, against the rules on whole contributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpips.comm import SERVER, Apply, Communicator
from mpips.comm.simulated import World
from mpips.config import Config, Robust
from mpips.model.message import Push, WorkerStatus, replicate
from mpips.reduce.aggregate import aggregate
from mpips.rules import RULES, Needs, Rule, choose
from tests.comm.test_mpi import on_mpi
from tests.helpers.contract_communicator import Program
from tests.rules.test_rules import LEAST, each_rule, together

Run = Callable[[Program, int], list[Any]]
WIDE = Robust(clip_radius=1e9)  # nothing is clipped


class Model(nn.Module):
    """A parameter, and a statistic in a buffer."""

    statistics: Tensor

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel, dtype=dtype))
        self.register_buffer("statistics", torch.zeros(3, dtype=dtype))


class Came(NamedTuple):
    gradient: Tensor
    statistics: Tensor
    faulty: list[int]
    refused: str
    table: Tensor
    traffic: Counter[str]


def a_push(communicator: Communicator, numel: int, dtype: torch.dtype = torch.float32) -> Push:
    return replicate(Model(numel, dtype), Config(), communicator.size, communicator.allocate).push


def give(push: Push, rank: int, values: Tensor, weight: float, statistics: Tensor) -> None:
    """Write what a worker would."""
    push.message.zero_()
    if weight:
        push.gradients[: len(values)] = values * weight
        push.floats[:3] = statistics * weight
    push.write(rank, WorkerStatus(samples=weight, weight=weight), ())


def rounds(config: Config, values: Tensor, weights: Tensor, statistics: Tensor | None = None, times: int = 1) -> Program:
    """A program that combines `(n, len)` values of n workers, all ranks or all but the server, `times` times."""
    stats = torch.zeros(len(values), 3) if statistics is None else statistics

    def program(e: Communicator) -> list[Came]:
        rule, last = choose(config)
        first = e.size - len(values)
        push, came = a_push(e, values.shape[1], values.dtype), []
        for _ in range(times):
            push.message.zero_()
            if (mine := e.rank - first) >= 0:
                give(push, e.rank, values[mine], float(weights[mine]), stats[mine])
            found = aggregate(e, push, rule, last, first)
            if e.rank != SERVER:
                continue
            ends = push.gradients[: values.shape[1]].clone(), push.floats[:3].clone()
            assert not push.gradients[values.shape[1] :].any(), "the padding must stay 0"
            came.append(Came(*ends, found.faulty, found.refused, push.rows.clone(), e.traffic.copy()))
        return came

    return program


def simulated(bucket: int = 64) -> Run:
    return lambda program, size: World(size, bucket=bucket).run(program)


def once(config: Config, values: Tensor, weights: Tensor | None = None, statistics: Tensor | None = None, **how: Any) -> Came:
    """The server's result of one round on simulated ranks, the server training or not."""
    run, trains = how.get("run", simulated(how.get("bucket", 64))), how.get("trains", False)
    given = torch.ones(len(values)) if weights is None else weights
    came: Came = run(rounds(config, values, given, statistics), len(values) + (not trains))[SERVER][0]
    return came


def random_values(n: int, length: int = 37, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, length, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + 1.0


def close(a: Tensor, b: Tensor) -> bool:
    tight = 1e-5 if a.dtype == torch.float32 else 1e-12
    return torch.allclose(a.double(), b.double(), rtol=tight, atol=tight)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_slice_by_slice_is_as_good_as_whole(name: str, deterministic: bool, trains: bool) -> None:
    config = Config(rule=name, deterministic=deterministic, robust=Robust(clip_radius=3.0))
    values, weights = random_values(8), torch.arange(8.0)
    expected = together(choose(config)[0], values.clone(), weights)
    for bucket in (4, 64, 100, 10_000):
        came = once(config, values, weights, bucket=bucket, trains=trains)
        assert close(came.gradient, expected)
        assert (came.faulty, came.refused) == ([], "")


@pytest.mark.parametrize("name", [name for name in RULES if name != "rfa"])
def test_float64_is_kept(name: str) -> None:
    config = Config(rule=name, robust=WIDE)
    values, weights = random_values(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    assert close(once(config, values, weights).gradient, together(choose(config)[0], values.clone(), weights))


@each_rule
def test_the_tail_is_summed_once(name: str) -> None:
    came = once(Config(rule=name), random_values(7), torch.arange(1.0, 8.0))
    columns = came.table[1:, :2].tolist()  # samples, weight
    assert columns == [[w, w] for w in range(1, 8)]


@each_rule
def test_a_round_without_contributions_leaves_the_rule_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("__call__", "coefficients", "prepare"):
        monkeypatch.setattr(RULES[name], method, lambda *_: pytest.fail("was called"))
    came = once(Config(rule=name), random_values(7), torch.zeros(7))
    assert not came.gradient.any()
    assert (came.faulty, came.refused) == ([], "")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", [name for name in RULES if name != "sign"])
def test_one_contribution_keeps_every_bit(name: str, trains: bool, deterministic: bool) -> None:
    """Whether there is one worker, or one of several has data."""
    value = torch.tensor([[1e-45, 1 / 3, 3.4e38, 0.1]])
    config = Config(rule=name, deterministic=deterministic, robust=Robust(num_byzantine=2, clip_radius=1e39))
    assert torch.equal(once(config, value, trains=trains).gradient, value[0])
    among = torch.cat([torch.zeros(2, 4), value, torch.zeros(2, 4)])
    assert torch.equal(once(config, among, torch.tensor([0.0, 0, 1, 0, 0]), trains=trains).gradient, value[0])


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["trimmed", "krum", "multikrum", "bulyan"])
def test_too_few_contributions_are_refused_on_all_ranks_without_harm(name: str, deterministic: bool, trains: bool) -> None:
    n = LEAST[name]
    weights = torch.ones(n)
    weights[-1] = 0
    config = Config(rule=name, deterministic=deterministic)
    program = rounds(config, random_values(n), weights, torch.ones(n, 3), times=2)
    for came in World(n + (not trains), bucket=64).run(program)[SERVER]:
        assert f"{n - 1} came" in came.refused
        assert not came.gradient.any()
        assert not came.statistics.any()


# faulty workers

HONEST = random_values(6, 37, seed=5) * 0.1 + 4.0  # around 4.1, far from 0 and from their own reflection
ATTACKS = {
    "+1e30": torch.full((37,), 1e30),
    "-1e30": torch.full((37,), -1e30),
    "nan": torch.full((37,), math.nan),
    "one nan": torch.cat([HONEST[0, :-1], torch.tensor([math.nan])]),
    "one inf": torch.cat([torch.tensor([math.inf]), HONEST[0, 1:]]),
    "flipped": -HONEST.mean(0),
    "zero": torch.zeros(37),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS)


def attacked(config: Config, attack: str, rank: int, trains: bool = False, **how: Any) -> tuple[Came, int]:
    """One round of six honest workers and a faulty one, and the rank of that."""
    values = torch.cat([HONEST[:rank], ATTACKS[attack].unsqueeze(0), HONEST[rank:]])
    return once(config, values, trains=trains, **how), rank + (not trains)


def in_hull(gradient: Tensor) -> bool:
    slack = 1e-4
    return bool(((gradient >= HONEST.amin(0) - slack) & (gradient <= HONEST.amax(0) + slack)).all())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 6])
@each_attack
@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "multikrum", "bulyan"])
def test_one_faulty_worker_does_not_lead_out_of_the_honest_ones(name: str, attack: str, rank: int, deterministic: bool) -> None:
    for trains in (False, True):
        came, faulty = attacked(Config(rule=name, deterministic=deterministic), attack, rank, trains)
        assert in_hull(came.gradient)
        assert came.faulty == ([faulty] if "nan" in attack or "inf" in attack else [])
        if name == "krum":
            assert any(close(came.gradient, row) for row in HONEST)
        if name == "multikrum":
            assert close(came.gradient, HONEST.mean(0))


@pytest.mark.parametrize("rank", [0, 6])
@each_attack
def test_one_faulty_worker_moves_the_geometric_median_little(attack: str, rank: int) -> None:
    """By less than the honest ones are apart; the mean goes by a seventh of 8 times 37 ** 0.5 when one is flipped."""
    came, _ = attacked(Config(rule="rfa"), attack, rank)
    spread = (HONEST - HONEST.mean(0)).norm(dim=1).max()
    assert (came.gradient - HONEST.mean(0)).norm() < spread


@pytest.mark.parametrize("rank", [0, 6])
@each_attack
def test_one_faulty_worker_moves_centred_clipping_by_its_share_of_the_radius(attack: str, rank: int) -> None:
    config = Config(rule="cclip", robust=Robust(clip_radius=2.0, iterations=1))
    came, _ = attacked(config, attack, rank)
    assert came.gradient.norm() <= 2.0 + 1e-5
    without = once(config, HONEST).gradient
    assert (came.gradient - without).norm() <= 2 * 2.0 / 7 + 1e-5


@pytest.mark.parametrize("rank", [0, 6])
@each_attack
def test_one_faulty_worker_moves_clipped_norms_by_its_share_of_the_radius(attack: str, rank: int) -> None:
    config = Config(rule="normclip", robust=Robust(clip_radius=2.0))
    for trains in (False, True):
        came, faulty = attacked(config, attack, rank, trains)
        without = once(config, HONEST).gradient
        assert (came.gradient - without).norm() <= 2 * 2.0 / 7 + 1e-5
        assert came.faulty == ([faulty] if "nan" in attack or "inf" in attack else [])


@pytest.mark.parametrize("rank", [0, 6])
@each_attack
def test_one_faulty_worker_does_not_turn_the_vote(attack: str, rank: int) -> None:
    came, _ = attacked(Config(rule="sign"), attack, rank)
    assert torch.equal(came.gradient, torch.ones(37))


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan", "rfa", "cclip"])
def test_a_float64_too_large_to_square_counts_as_not_finite(name: str) -> None:
    values = torch.cat([HONEST, torch.zeros(1, 37)]).double()
    values[6] = 1e200
    came = once(Config(rule=name, robust=WIDE), values, torch.ones(7, dtype=torch.float64))
    assert came.faulty == [7]
    assert came.gradient.isfinite().all()


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan"])
def test_each_one_left_out_is_one_faulty_less_to_assume(name: str) -> None:
    """With num_byzantine=2 these take 7, 7 and 11; two are not finite, and what is left is combined as with num_byzantine=0."""
    n = 11 if name == "bulyan" else 7
    values = random_values(n)
    values[[1, 4]] = math.nan
    came = once(Config(rule=name, robust=Robust(num_byzantine=2)), values)
    good = [i for i in range(n) if i not in (1, 4)]
    assert came.faulty == [2, 5]
    assert close(
        came.gradient, together(choose(Config(rule=name, robust=Robust(num_byzantine=0)))[0], values[good], torch.ones(n - 2))
    )


@pytest.mark.parametrize("name", ["trimmed", "krum", "multikrum", "bulyan"])
def test_one_that_has_left_itself_out_is_one_faulty_less_as_well(name: str) -> None:
    """A worker that has found its own NaN reports it and pushes nothing."""
    n = LEAST[name]
    values = random_values(n)
    rule, last = choose(Config(rule=name))

    def program(e: Communicator) -> Any:
        push = a_push(e, 37)
        give(push, e.rank, values[e.rank], float(e.rank != 1), torch.zeros(3))
        if e.rank == 1:
            push.write(1, WorkerStatus(bad=1), ())
        return aggregate(e, push, rule, last, 0), push.gradients[:37]

    came, gradient = World(n, bucket=64).run(program)[SERVER]
    assert came[:2] == ([], "")
    good = torch.cat([values[:1], values[2:]])
    assert close(gradient, together(choose(Config(rule=name, robust=Robust(num_byzantine=0)))[0], good, torch.ones(n - 1)))


@each_rule
def test_nothing_finite_is_refused_or_passed_on_for_the_server_to_judge(name: str) -> None:
    came = once(Config(rule=name), torch.full((7, 5), math.nan))
    if RULES[name]().needs == "gram":
        assert came.refused == "no contribution is finite"
        assert not came.gradient.any()
    elif name == "normclip":
        assert came.faulty == list(range(1, 8))
        assert not came.gradient.any()
    else:
        assert came.gradient.isnan().all()


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan", "rfa"])
def test_small_differences_of_large_contributions_still_decide(name: str) -> None:
    """Contributions of 10^6 that differ by 0.001: their squares agree in 18 digits, and one stands off."""
    values = 1e6 + 0.001 * random_values(7, 200, 3, torch.float64)
    values[2] += 0.01
    came = once(Config(rule=name, robust=Robust(iterations=50)), values, torch.ones(7, dtype=torch.float64), bucket=512)
    honest = torch.cat([values[:2], values[3:]])
    assert (came.gradient - honest.mean(0)).abs().mean() < 0.002
    if name == "multikrum":
        assert close(came.gradient, honest.mean(0))


# statistics


def test_statistics_have_no_say_in_distances() -> None:
    values, statistics = random_values(5), torch.zeros(5, 3)
    expected = once(Config(rule="krum"), values)
    chosen = next(i for i in range(5) if close(values[i], expected.gradient))
    statistics[chosen] = 1e6
    came = once(Config(rule="krum"), values, statistics=statistics)
    assert torch.equal(came.gradient, expected.gradient)
    assert came.statistics.tolist() == [1e6] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mean", 5.0), ("median", 4.0), ("trimmed", 13 / 3), ("sign", 4.0), ("multikrum", 5.0), ("cclip", 5.0), ("normclip", 5.0)],
)
def test_statistics_by_hand(name: str, expected: float) -> None:
    """Equal gradients, much longer than the radius: clipping must not shrink a variance."""
    values = torch.full((5, 37), 10.0)
    statistics = torch.tensor([1.0, 4.0, 12.0, 5.0, 4.0]).unsqueeze(1).expand(5, 3)
    statistics = statistics - (0.2 if name in ("mean", "normclip", "cclip") else 0)
    if name == "multikrum":
        values[0] += 100  # left out: the mean of 4, 12, 5, 4 and a quarter
        expected = 6.25
    came = once(Config(rule=name, robust=Robust(clip_radius=0.5)), values, statistics=statistics)
    assert came.statistics.tolist() == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["krum", "rfa", "bulyan"])
def test_a_statistic_that_is_not_finite_leaves_its_rank_out(name: str) -> None:
    statistics = torch.zeros(7, 3)
    statistics[2, 1] = math.inf
    came = once(Config(rule=name), random_values(7), statistics=statistics)
    assert came.faulty == [3]
    assert came.statistics.tolist() == [0, 0, 0]


# from round to round


def test_centred_clipping_goes_on_from_the_last_result() -> None:
    """Far from 0 with a radius of 1, one iteration a round: each round comes nearer by one radius."""
    values = torch.full((3, 4), 5.0)  # 10 away from 0
    config = Config(rule="cclip", robust=Robust(clip_radius=1.0, iterations=1))
    came = World(4).run(rounds(config, values, torch.ones(3), times=12))[SERVER]
    assert [round(float(c.gradient.norm()), 4) for c in came] == [*map(float, range(1, 11)), 10.0, 10.0]


def test_a_refused_or_empty_round_does_not_move_the_origin() -> None:
    rule, last = choose(Config(rule="cclip", robust=WIDE))

    def program(e: Communicator) -> list[float]:
        push, results = a_push(e, 4), []
        for value, weight in ((5.0, 1.0), (0.0, 0.0), (math.nan, 1.0)):
            give(push, e.rank, torch.full((4,), value), weight, torch.zeros(3))
            aggregate(e, push, rule, last, 0)
            results.append(float(rule.state_dict()["origin"][0]))
        return results

    assert World(1).run(program) == [[5.0, 5.0, 5.0]]


# on MPI


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_mpi_gives_what_the_simulation_gives(name: str, deterministic: bool) -> None:
    from mpi4py import MPI

    size = int(MPI.COMM_WORLD.size)
    config = Config(rule=name, deterministic=deterministic, robust=Robust(num_byzantine=0, clip_radius=3.0))
    for trains in (False, True):
        values = random_values(size - (not trains), 1000)
        weights = torch.arange(1.0, len(values) + 1)
        program = rounds(config, values, weights, torch.ones(len(values), 3), times=2)
        here = on_mpi(program, bucket=700)[SERVER]
        for mine, there in zip(here, World(size, bucket=64).run(program)[SERVER], strict=True):
            assert (mine.faulty, mine.refused) == (there.faulty, there.refused)
            assert close(mine.gradient, there.gradient)
            assert close(mine.statistics, there.statistics)
            assert torch.equal(mine.table, there.table)


@pytest.mark.mpi(min_size=5)
@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "multikrum", "rfa", "cclip", "normclip", "sign"])
def test_mpi_with_a_faulty_rank(name: str) -> None:
    from mpi4py import MPI

    values = random_values(int(MPI.COMM_WORLD.size), 1000) + 5
    values[1] = math.nan
    came = on_mpi(rounds(Config(rule=name), values, torch.ones(len(values))), bucket=700)[SERVER][0]
    assert came.faulty == [1]
    assert came.gradient.isfinite().all()
    assert came.gradient.abs().max() < 12


# memory


class Largest(TorchDispatchMode):
    """Takes note of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            storage = made.untyped_storage()
            self.bytes = max(self.bytes, 0 if storage.data_ptr() in given else storage.nbytes())  # no view
        return made


class Generated:
    """A server's end whose other ranks' rows are made as they are gathered, so that nothing else is in memory."""

    rank, name = 0, "generated"

    lost: frozenset[int] = frozenset()

    def __init__(self, size: int, bucket: int) -> None:
        self.size, self.bucket, self.traffic, self.seen = size, bucket, Counter[str](), Largest()

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype)

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        for start in range(0, tail, self.bucket):
            part = slice(start, min(start + self.bucket, tail))
            if needs == "rows":
                rows = torch.randn(self.size, part.stop - part.start)
                rows[0] = message[part]
                with self.seen:
                    apply(part, rows)
        if needs == "sum":
            with self.seen:
                apply(slice(0, tail), message[:tail].unsqueeze(0))

    def broadcast(self, message: Tensor) -> None:
        pass


@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_the_server_makes_nothing_larger_than_a_bucket_of_each_rank(name: str, deterministic: bool) -> None:
    """16 ranks, 5 MB each, in buckets of 0.25 MB: one more copy of a contribution would be too much."""
    numel, bucket = 1_250_000, 62_500
    communicator: Any = Generated(16, bucket)
    rule, last = choose(Config(rule=name, deterministic=deterministic, robust=WIDE))
    push = a_push(communicator, numel)
    rule.origin(push.gradients)  # what a rule remembers from round to round is made once
    for rank in range(16):
        push.write(rank, WorkerStatus(samples=1, weight=1), ())
    came = aggregate(communicator, push, rule, last, 0)
    assert came.refused == ""
    assert communicator.seen.bytes <= 16 * bucket * 4
    if name == "median":
        assert communicator.seen.bytes >= 16 * 4, "or it measures nothing"


def test_a_rule_is_a_rule() -> None:
    assert all(isinstance(make(), Rule) for make in RULES.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_rule
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    config = Config(rule=name, robust=Robust(clip_radius=3.0))
    values, found = random_values(8), []
    values[2, 5] = math.nan
    for device in ("cpu", "cuda"):
        rule, last = choose(config)

        def program(e: Communicator, rule: Rule = rule, last: Needs = last, device: str = device) -> Any:
            push = replicate(Model(37).to(device), Config(), e.size, e.allocate).push
            give(push, e.rank, values[e.rank].to(device), 2.0, torch.ones(3, device=device))
            return aggregate(e, push, rule, last, 0), push.gradients.cpu()

        found.append(World(8, bucket=64).run(program)[SERVER])
    (on_cpu, expected), (on_gpu, got) = found
    assert on_cpu == on_gpu
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
