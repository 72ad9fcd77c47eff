"""What every rule must do, hand-computed numbers, and the papers' formulas written out as loops."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mpips.config import Config, ConfigError, Robust
from mpips.rules import RULES, Rule, RuleError, choose
from mpips.rules.coordinate import ascending

numbers = st.floats(-1e3, 1e3, width=32)
LEAST = {"trimmed": 3, "krum": 5, "multikrum": 5, "bulyan": 7}  # contributions it takes with num_byzantine=1
GRAM = [name for name, rule in RULES.items() if rule().needs == "gram"]
each_rule = pytest.mark.parametrize("name", RULES)
each_rule_but_sign = pytest.mark.parametrize("name", [name for name in RULES if name != "sign"])


def rule_of(name: str, **settings: Any) -> Rule:
    """The rule with settings of the group `robust`; nothing is clipped unless they say so."""
    return choose(Config(rule=name, robust=Robust(**{"clip_radius": 1e9, **settings})))[0]


def together(rule: Rule, values: Tensor, weights: Tensor) -> Tensor:
    """The rule on whole `values` in one piece, from the protocol's words; `mpips.reduce.aggregate` is held against it."""
    here, out = weights > 0, torch.full_like(values[0], 7.0)
    if rule.needs != "gram":
        rows, given = [row.clone() for row in values[here]], weights[here].tolist()
        assert all(rule.prepare(row, 1.0) for row in rows)
        if rule.needs == "sum":
            total = sum(row * weight for row, weight in zip(rows, given, strict=True))
            rows, given = [torch.as_tensor(total)], [sum(given)]
        (rule if all(row.isfinite().all() for row in rows) else rule.nonfinite)(rows, given, out)
        return out
    given, origin = values[here], rule.origin(values[0])
    centred = (given - (given[0] if origin is None else origin)).double()
    c = rule.coefficients(centred @ centred.T, weights[here].double()).to(values)
    if rule.then == "rows":
        chosen = c != 0
        rule(list(given[chosen]), c[chosen].tolist(), out)
        return out
    return (c.unsqueeze(1) * given).sum(0) + (0 if origin is None else (1 - c.sum()) * origin)


def combine(name: str, values: Tensor, weights: Tensor, **settings: Any) -> Tensor:
    return together(rule_of(name, **settings), values, weights)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@st.composite
def contributions(draw: Any, name: str) -> tuple[Tensor, Tensor]:
    """Values (n, len) and weights (n,), enough of them not 0; none as near to each other as to be a tie by chance."""
    least = LEAST.get(name, 1)
    n, length = draw(st.integers(least, least + 5)), draw(st.integers(2, 5))
    if name in GRAM:
        values = torch.randn(n, length, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6)))).numpy() * 100
    else:
        values = draw(arrays.arrays(np.float32, (n, length), elements=numbers))
    enough = st.lists(st.integers(0, 20), min_size=n, max_size=n).filter(lambda w: sum(map(bool, w)) >= least)
    return torch.from_numpy(values).double(), torch.tensor(draw(enough), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in RULES if name != "bulyan"])  # its last picks are between mutual neighbours
@settings(deadline=None, max_examples=50)
@given(st.data(), st.randoms(use_true_random=False))
def test_the_order_of_the_ranks_does_not_count(name: str, data: Any, chance: Any) -> None:
    values, weights = data.draw(contributions(name))
    order = list(range(len(values)))
    chance.shuffle(order)
    assert_close(combine(name, values[order], weights[order]), combine(name, values, weights))


@each_rule_but_sign
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_equal_contributions_give_that_contribution(name: str, data: Any) -> None:
    values, weights = data.draw(contributions(name))
    assert_close(combine(name, values[:1].expand_as(values), weights), values[0])


@each_rule_but_sign
@settings(deadline=None, max_examples=50)
@given(st.data(), numbers, st.sampled_from([-8.0, -1.0, -0.5, 0.0, 0.3, 1.0, 7.7]))
def test_shifted_and_scaled_contributions_give_the_shifted_and_scaled_result(
    name: str, data: Any, shift: float, scale: float
) -> None:
    values, weights = data.draw(contributions(name))
    expected = combine(name, values, weights) * scale + shift
    smoothed = 1e-6 * (1 + abs(scale))  # nu moves a result that is one of the vectors by up to nu, whatever their scale
    assert_close(combine(name, values * scale + shift, weights), expected, smoothed if name == "rfa" else 1e-9)


@each_rule
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_ranks_of_weight_0_do_not_count(name: str, data: Any) -> None:
    values, weights = data.draw(contributions(name))
    assert_close(combine(name, values, weights), combine(name, values[weights > 0], weights[weights > 0]))


@pytest.mark.parametrize("name", [name for name in RULES if name not in GRAM])
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_result_may_take_the_first_row_s_place_and_no_other_row_changes(name: str, data: Any) -> None:
    values, weights = data.draw(contributions(name))
    values, weights = values[weights > 0], weights[weights > 0]
    rows, given, rule = list(values.clone()), weights.tolist(), rule_of(name)
    if rule.needs == "sum":
        rows, given = [(values * weights.unsqueeze(1)).sum(0)], [float(weights.sum())]
    rule(rows, given, rows[0])
    assert_close(rows[0], combine(name, values, weights))
    assert all(torch.equal(row, before) for row, before in zip(rows[1:], values[1:], strict=False))


@pytest.mark.parametrize("name", [*(name for name in RULES if name not in GRAM), "bulyan"])
def test_all_rows_stay_when_the_result_goes_elsewhere(name: str) -> None:
    rows = torch.arange(12.0).view(3, 4)
    rule = rule_of(name)
    rule(list(rows)[: 1 if rule.needs == "sum" else 3], [1.0, 2.0, 3.0][: 1 if rule.needs == "sum" else 3], torch.empty(4))
    assert torch.equal(rows, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("name", GRAM)
def test_the_gram_matrix_and_the_weights_stay_as_they_are(name: str) -> None:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram, weights = x @ x.T, torch.ones(9, dtype=torch.float64)
    before = gram.clone()
    rule_of(name).coefficients(gram, weights)
    assert torch.equal(gram, before)
    assert torch.equal(weights, torch.ones(9, dtype=torch.float64))


@each_rule_but_sign
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_single_contribution_of_weight_1_keeps_every_bit(name: str, bad: int) -> None:
    row = torch.tensor([[1e-45, 1 / 3, 3.4e38, -0.0]])
    rule, out = rule_of(name, num_byzantine=bad, clip_radius=1e39), torch.empty(4)
    rule.check(1)
    if rule.needs == "gram":
        gram = row.double() @ row.double().T
        c = rule.coefficients(gram, torch.ones(1, dtype=torch.float64))
        assert c.tolist() == [1.0]
        if rule.then == "sum":
            return
    assert rule.prepare(row[0], 1.0)
    rule([row[0]], [1.0], out)
    assert torch.equal(out.view(torch.int32), row[0].view(torch.int32))


def test_the_mean_is_the_samples_weighted_one() -> None:
    assert combine("mean", column(1, 5, 100), torch.tensor([3.0, 1.0, 0.0])).item() == 2.0


# coordinates


@pytest.mark.parametrize("n", range(1, 20))
def test_the_sorting_network_sorts(n: int) -> None:
    """By the 0-1 principle a network that sorts all rows of 0 and 1 sorts everything; large n by a sample of them."""
    if n <= 12:
        values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n))).T
    else:
        values = torch.randint(0, 2, (n, 5000), generator=torch.Generator().manual_seed(n)).float()
    assert torch.equal(torch.stack(ascending(list(values))), values.sort(0).values)


def test_the_median_by_hand() -> None:
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, -5.0]])
    assert combine("median", values, torch.tensor([1.0, 5.0, 2.0])).tolist() == [2.0, 10.0]
    assert combine("median", column(4, 1, 2, 100), torch.ones(4)).item() == 3.0


def test_the_trimmed_mean_by_hand() -> None:
    values = column(1, 100, 6, 2, -50)
    assert combine("trimmed", values, torch.ones(5)).item() == 3.0
    assert combine("trimmed", values, torch.ones(5), num_byzantine=2).item() == 2.0


@settings(deadline=None, max_examples=50)
@given(contributions("mean"))
def test_the_mean_trimmed_of_nothing_is_the_unweighted_mean_bit_for_bit(given: tuple[Tensor, Tensor]) -> None:
    values = given[0].float()
    ones = torch.ones(len(values))
    assert torch.equal(combine("trimmed", values, ones, num_byzantine=0), combine("mean", values, ones))


def test_the_sign_by_hand() -> None:
    values = torch.tensor([[3.0, -1.0, 0.0, 1.0], [1.0, -2.0, 5.0, -2.0], [-90.0, 3.0, 0.0, 0.0]])
    assert combine("sign", values, torch.tensor([1.0, 2.0, 9.0])).tolist() == [1.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize(("name", "expected"), [("median", [2.5, 3.0]), ("trimmed", [2.5, 3.0]), ("sign", [1.0, 1.0])])
def test_a_value_that_is_not_finite_is_faulty_in_its_coordinate(name: str, expected: list[float]) -> None:
    """Of 5 contributions and num_byzantine=1: 4 are left in the first coordinate, none to be trimmed; 2 in the second."""
    nan, inf = math.nan, math.inf
    values = torch.tensor([[1.0, nan], [2.0, 2.0], [3.0, -inf], [4.0, 4.0], [inf, nan]])
    rule = rule_of(name)
    out = torch.empty(2)
    rule.nonfinite(list(values), [1.0] * 5, out)
    assert out.tolist() == expected
    rule.nonfinite(list(torch.full((3, 2), nan)), [1.0] * 3, out)
    assert out.isnan().all()


def test_the_statistics_under_a_vote_of_signs_are_medians() -> None:
    out = torch.empty(1)
    rule_of("sign").statistics()(list(column(3, 9, 4).float()), [1.0] * 3, out)
    assert out.item() == 4.0


# inner products


def squared(a: Tensor, b: Tensor) -> float:
    return sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))


def krum_order(x: list[Tensor], bad: int) -> list[int]:
    """Indices from the best score of Krum to the worst."""
    n = len(x)
    scores = []
    for i in range(n):
        others = sorted(squared(x[i], x[j]) for j in range(n) if j != i)
        scores.append(sum(others[: max(1, n - bad - 2)]))
    return sorted(range(n), key=lambda i: (scores[i], i))


def naive_krum(x: Tensor, bad: int) -> Tensor:
    return x[krum_order(list(x), bad)[0]]


def naive_multikrum(x: Tensor, bad: int) -> Tensor:
    return x[krum_order(list(x), bad)[: len(x) - bad]].mean(0)


def naive_bulyan(x: Tensor, bad: int) -> Tensor:
    left, chosen = list(x), []
    for _ in range(len(x) - 2 * bad):
        chosen.append(left.pop(krum_order(left, bad)[0]))
    result = []
    for values in torch.stack(chosen).T.tolist():
        median = float(np.median(values))
        near = sorted(values, key=lambda v: (abs(v - median), v))[: len(x) - 4 * bad]
        result.append(sum(near) / len(near))
    return torch.tensor(result, dtype=torch.float64)


def naive_cclip(x: Tensor, last: Tensor, radius: float, iterations: int) -> Tensor:
    v = last.clone()
    for _ in range(iterations):
        moves = [(row - v) * min(1.0, radius / max(float((row - v).norm()), 1e-300)) for row in x]
        v = v + torch.stack(moves).sum(0) / len(x)
    return v


def naive_rfa(x: Tensor, alpha: Tensor, z: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        beta = torch.tensor([a / max(1e-6, float((z - row).norm())) for a, row in zip(alpha.tolist(), x, strict=True)])
        z = (beta.double().unsqueeze(1) * x).sum(0) / beta.double().sum()
    return z


def random_values(n: int, length: int, seed: int) -> Tensor:
    return torch.randn(n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3.0


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize(("name", "naive"), [("krum", naive_krum), ("multikrum", naive_multikrum), ("bulyan", naive_bulyan)])
def test_selections_are_those_of_the_papers(name: str, naive: Any, seed: int) -> None:
    bad = seed % 3
    values = random_values(4 * bad + 3 + seed % 4, 6, seed)
    assert_close(combine(name, values, torch.arange(1.0, len(values) + 1), num_byzantine=bad), naive(values, bad))


def nearest_one_by_one(values: list[int], count: int) -> float:
    """The mean of the values nearest to the median, taken one after another: the nearest left, of two the smaller."""
    left, taken = sorted(values), []
    median = (left[(len(left) - 1) // 2] + left[len(left) // 2]) / 2
    for _ in range(count):
        best = min(left, key=lambda v: (abs(v - median), v))
        left.remove(best)
        taken.append(best)
    return sum(taken) / count


@pytest.mark.parametrize("bad", [1, 2])
def test_bulyan_takes_the_values_nearest_to_the_median_where_many_are_alike(bad: int) -> None:
    """Of integers in a small range, so that windows of the same reach abound, as where attackers send the same; exactly."""
    chance = torch.Generator().manual_seed(bad)
    for n in range(4 * bad + 3, 4 * bad + 8):
        values = torch.randint(-6, 7, (n - 2 * bad, 500), generator=chance)
        rule, out = rule_of("bulyan", num_byzantine=bad), torch.empty(500, dtype=torch.float64)
        rule.coefficients(torch.eye(n, dtype=torch.float64), torch.ones(n))
        rule(list(values.double()), [1.0] * len(values), out)
        expected = [nearest_one_by_one(column, n - 4 * bad) for column in values.T.tolist()]
        assert_close(out, torch.tensor(expected, dtype=torch.float64), 1e-15)  # sums of integers are exact, a quotient rounds


def test_bulyan_keeps_no_farther_value_beside_one_of_the_same_reach() -> None:
    """Of -3, -3, -1, 0, 5 the three nearest to the median -1 are -1, 0 and one -3."""
    rule, out = rule_of("bulyan", num_byzantine=1), torch.empty(1, dtype=torch.float64)
    rule.coefficients(torch.eye(7, dtype=torch.float64), torch.ones(7))
    rule(list(column(-3, -3, -1, 0, 5)), [1.0] * 5, out)
    assert out.item() == pytest.approx(-4 / 3, rel=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_is_the_papers(seed: int) -> None:
    """Where the steps end does not depend on where they begin; here they begin at the mean."""
    values = random_values(7, 5, seed)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    expected = naive_rfa(values, weights / weights.sum(), values.mean(0), 400)
    assert_close(combine("rfa", values, weights, iterations=400), expected, 1e-6)


def test_a_step_of_weiszfeld_is_the_papers() -> None:
    """Three of equal weight: the most central and its nearest have two thirds of it, so the first z is their mean."""
    values = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 5.0]], dtype=torch.float64)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = naive_rfa(values, third, torch.tensor([0.5, 0.0], dtype=torch.float64), 2)
    assert_close(combine("rfa", values, torch.ones(3, dtype=torch.float64), iterations=2), expected, 1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [1, 3])
def test_centred_clipping_is_the_papers(seed: int, iterations: int) -> None:
    values, last = random_values(6, 4, seed), random_values(1, 4, 100 + seed)[0]
    rule = rule_of("cclip", clip_radius=1.5, iterations=iterations)
    rule.load_state_dict({"origin": last.clone()})
    assert_close(together(rule, values, torch.arange(1.0, 7.0)), naive_cclip(values, last, 1.5, iterations))


def test_krum_by_hand() -> None:
    """Scores of two neighbours each: 10, 5, 6.25, 14.5 and far more."""
    values = column(0, 1, 3, 4.5, 100)
    assert combine("krum", values, torch.ones(5)).item() == 1.0
    assert combine("multikrum", values, torch.ones(5)).item() == 2.125


def test_bulyan_by_hand() -> None:
    """It picks 3, 6, 1, then 10 (as near to 15 as that to it), then 0; the median is 3, and 0 of rank 0 as near to it as 6."""
    values = column(0, 1, 3, 6, 10, 15, 100)
    assert combine("bulyan", values, torch.ones(7)).item() == pytest.approx(4 / 3)


def test_the_geometric_median_by_hand() -> None:
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    centre = torch.tensor([0.5, math.sqrt(0.75) / 3], dtype=torch.float64)
    assert_close(combine("rfa", triangle, torch.ones(3, dtype=torch.float64), iterations=100), centre, 1e-6)
    heavier = combine("rfa", column(0, 10), torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert heavier.item() == pytest.approx(0, abs=1e-5)


def test_clipping_by_hand() -> None:
    values = column(3, 0.5)
    assert combine("cclip", values, torch.ones(2), clip_radius=1.0, iterations=1).item() == pytest.approx(0.75)
    values = torch.tensor([[3.0, 4.0], [30.0, -40.0]])
    assert combine("normclip", values, torch.tensor([1.0, 3.0]), clip_radius=5.0).tolist() == pytest.approx([3.0, -2.0])


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("n", [7, 8, 11])
def test_ties_go_to_the_lowest_ranks(n: int, bad: int) -> None:
    """Any two of the unit vectors are equally far apart: rounding must not choose."""
    gram = torch.eye(n, dtype=torch.float64) * 0.1
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 1e-13
    ones = torch.ones(n, dtype=torch.float64)

    def chosen(name: str) -> list[int]:
        return rule_of(name, num_byzantine=bad).coefficients(gram + noise + noise.T, ones).nonzero().flatten().tolist()

    assert chosen("krum") == [0]
    assert chosen("multikrum") == list(range(n - bad))
    assert chosen("bulyan") == list(range(n - 2 * bad))


@pytest.mark.parametrize("name", GRAM)
def test_a_contribution_of_1e30_leaves_the_other_coefficients_exact(name: str) -> None:
    """Squares of 1e60 stand beside differences of 1; the smallest of the others must still decide."""
    x = random_values(8, 20, 3)
    ones = torch.ones(8, dtype=torch.float64)
    rule = rule_of(name, num_byzantine=1, iterations=40, clip_radius=1e9)
    honest = x[:7] - x[0]
    spoilt = torch.cat([honest, torch.full((1, 20), 1e30, dtype=torch.float64)])
    c = rule.coefficients(spoilt @ spoilt.T, ones)
    assert c.isfinite().all()
    assert c[7] <= 1e-20
    if name in ("krum", "multikrum", "bulyan"):
        assert c[7] == 0
    if name == "rfa":
        pull = c[7] * 1e30 * math.sqrt(20)
        z = c[:7] @ honest
        assert pull < 10 and (z - honest.mean(0)).norm() < 10


@pytest.mark.parametrize("name", ["rfa", "cclip"])
def test_a_square_that_rounding_made_negative_is_no_distance(name: str) -> None:
    """Twins whose product came out larger than their squares."""
    gram = torch.tensor([[1.0, 1 + 1e-12, 0.5], [1 + 1e-12, 1.0, 0.5], [0.5, 0.5, 1.0]], dtype=torch.float64)
    for weights in ([1.0, 1.0, 1.0], [9.0, 9.0, 1e-9]):
        c = rule_of(name).coefficients(gram, torch.tensor(weights, dtype=torch.float64))
        assert c.isfinite().all()


def test_an_origin_is_remembered_and_put_back() -> None:
    rule, other = rule_of("cclip"), rule_of("cclip")
    origin = rule.origin(torch.zeros(3))
    assert origin is not None
    assert origin.tolist() == [0, 0, 0]
    origin.copy_(torch.tensor([1.0, 2.0, 3.0]))
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.origin(torch.zeros(3)), origin)  # type: ignore[arg-type]
    other.load_state_dict({})
    assert other.state_dict() == {}


@each_rule
def test_rules_remember_nothing_at_the_start(name: str) -> None:
    rule = rule_of(name)
    assert rule.state_dict() == {}
    rule.load_state_dict({})


# settings


@pytest.mark.parametrize(
    ("name", "bad", "least"),
    [
        ("krum", 0, 3),
        ("krum", 1, 5),
        ("multikrum", 2, 7),
        ("bulyan", 0, 3),
        ("bulyan", 1, 7),
        ("bulyan", 2, 11),
        ("trimmed", 2, 5),
    ],
)
def test_too_few_contributions_are_refused(name: str, bad: int, least: int) -> None:
    rule = rule_of(name, num_byzantine=bad)
    rule.check(1)
    rule.check(least)
    if bad:  # one that was left out is one less to look for
        rule.faulty = 1
        rule.check(least - (4 if name == "bulyan" else 2))
        rule.faulty = 0
    with pytest.raises(RuleError, match=rf"^{name} with robust.num_byzantine={bad} needs .*{least - 1} came$"):
        rule.check(least - 1)
    with pytest.raises(RuleError):
        together(rule, random_values(least - 1, 2, 0), torch.ones(least - 1))


@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_the_configured_rule_says_what_it_needs(name: str, deterministic: bool) -> None:
    rule, last = choose(Config(rule=name, deterministic=deterministic))
    assert type(rule) is RULES[name]
    expected = {"sum": "sum", "rows": "rows", "gram": rule.then}[rule.needs]
    assert last == ("rows" if deterministic else expected)


def test_a_rule_is_given_the_settings_that_it_has_parameters_for() -> None:
    settings = Robust(num_byzantine=3, clip_radius=2.5, iterations=11)
    bulyan, clip = (choose(Config(rule=name, robust=settings))[0] for name in ("bulyan", "cclip"))
    assert vars(bulyan)["num_byzantine"] == 3
    assert (vars(clip)["clip_radius"], vars(clip)["iterations"]) == (2.5, 11)


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"rule: given 'maen', allowed: mean, median, .*package.module:Class$"):
        choose(Config(rule="maen"))


class Own(Rule):
    needs = "rows"

    def __init__(self, num_byzantine: int) -> None:
        self.num_byzantine = num_byzantine

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        out.copy_(rows[0])


class Odd(Rule):
    needs = "columns"  # type: ignore[assignment]


class Leaving(Own):
    def __init__(self) -> None:
        sys.exit("no")


@pytest.mark.parametrize(("own", "bad"), [(f"{__name__}:Own", 2), (f"{__name__}.Own", 2)])
def test_a_rule_of_somebody_else_s_is_found_by_its_name(own: str, bad: int) -> None:
    rule, last = choose(Config(rule=own, robust=Robust(num_byzantine=2)))
    assert isinstance(rule, Own)
    assert (rule.num_byzantine, last) == (bad, "rows")


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ("no.such.module:Rule", "cannot be loaded .ModuleNotFoundError: No module named 'no'"),
        (f"{__name__}:Missing", "cannot be loaded .*no attribute 'Missing'"),
        (f"{__name__}:LEAST", "is no class derived from mpips.rules.Rule"),
        (f"{__name__}:naive_krum", "is no class derived"),
        (f"{__name__}:Leaving", "cannot be made .SystemExit: no"),
        ("collections:Counter", "is no class derived"),
        ("sys:exit", "is no class derived"),
        ("builtins:input", "is no class derived"),
        ("leaves:Rule", "cannot be loaded .SystemExit: 0"),
        ("breaks:Rule", "cannot be loaded .SyntaxError"),
        (f"{__name__}:Odd", "says needs or then as none may"),
        (":x", "allowed: mean"),
        ("..x", "cannot be loaded"),
    ],
)
def test_a_bad_name_is_an_error_of_one_line(own: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    Path("breaks.py").write_text("def (\n")
    monkeypatch.syspath_prepend(".")
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(Config(rule=own))
    assert "\n" not in str(caught.value)
