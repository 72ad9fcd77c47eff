"""What every rule must do, and the mean's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from mpips.config import Config, ConfigError
from mpips.rule import RULES, Mean, choose

each_rule = pytest.mark.parametrize("name", RULES)
numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def contributions(draw: Any) -> tuple[Tensor, Tensor]:
    """Values (n, len) and weights (n,) of which at least one is not 0."""
    n, length = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    values = draw(arrays.arrays(np.float32, (n, length), elements=numbers))
    weights = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n).filter(any))
    return torch.from_numpy(values).double(), torch.tensor(weights, dtype=torch.float64)


def combine(name: str, values: Tensor, weights: Tensor) -> Tensor:
    """The rule on `values`, into memory of its own."""
    rows = values * weights.unsqueeze(1)
    out = torch.full_like(rows[0], 7.0)
    RULES[name]()(rows, weights, out)
    return out


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_rule
@settings(deadline=None, max_examples=50)
@given(contributions(), st.randoms(use_true_random=False))
def test_the_order_of_the_ranks_does_not_count(name: str, given: tuple[Tensor, Tensor], chance: Any) -> None:
    values, weights = given
    order = list(range(len(values)))
    chance.shuffle(order)
    assert_close(combine(name, values[order], weights[order]), combine(name, values, weights))


@each_rule
@settings(deadline=None, max_examples=50)
@given(contributions())
def test_equal_contributions_give_that_contribution(name: str, given: tuple[Tensor, Tensor]) -> None:
    values, weights = given
    assert_close(combine(name, values[:1].expand_as(values), weights), values[0])


@each_rule
@settings(deadline=None, max_examples=50)
@given(contributions(), numbers, st.floats(-8, 8, width=32))
def test_shifted_and_scaled_contributions_give_the_shifted_and_scaled_result(
    name: str, given: tuple[Tensor, Tensor], shift: float, scale: float
) -> None:
    values, weights = given
    assert_close(combine(name, values * scale + shift, weights), combine(name, values, weights) * scale + shift)


@each_rule
@settings(deadline=None, max_examples=50)
@given(contributions())
def test_ranks_of_weight_0_do_not_count(name: str, given: tuple[Tensor, Tensor]) -> None:
    values, weights = given
    assert_close(combine(name, values, weights), combine(name, values[weights > 0], weights[weights > 0]))


@each_rule
@settings(deadline=None, max_examples=50)
@given(contributions())
def test_the_result_may_take_the_first_row_s_place_and_no_other_row_changes(name: str, given: tuple[Tensor, Tensor]) -> None:
    values, weights = given
    rows = values * weights.unsqueeze(1)
    before, weights_before = rows.clone(), weights.clone()
    RULES[name]()(rows, weights, rows[0])
    assert torch.equal(rows[0], combine(name, values, weights))
    assert torch.equal(rows[1:], before[1:])
    assert torch.equal(weights, weights_before)


@each_rule
def test_all_rows_stay_when_the_result_goes_elsewhere(name: str) -> None:
    rows = torch.arange(12.0).view(3, 4)
    RULES[name]()(rows, torch.tensor([1.0, 2.0, 3.0]), torch.empty(4))
    assert torch.equal(rows, torch.arange(12.0).view(3, 4))


@each_rule
def test_a_rule_of_the_sum_takes_the_sum(name: str) -> None:
    rule = RULES[name]()
    if rule.needs != "sum":
        pytest.skip("needs rows")
    rows, weights = torch.tensor([[1.0, 2.0], [6.0, 4.0]]), torch.tensor([1.0, 3.0])
    total = rows.sum(0, keepdim=True)
    rule(total, weights.sum(0, keepdim=True), total[0])
    out = torch.empty(2)
    rule(rows, weights, out)
    assert torch.equal(total[0], out)


def test_the_mean_is_the_samples_weighted_one() -> None:
    out = combine("mean", torch.tensor([[1.0], [5.0], [100.0]]), torch.tensor([3.0, 1.0, 0.0]))
    assert out.item() == 2.0


def test_the_mean_adds_in_rank_order() -> None:
    """Another order of these numbers would give other bits."""
    rows = torch.tensor([[1.0], [2.0**24], [1.0], [-(2.0**24)]])
    weights = torch.tensor([2.0, 0.0, 0.0, 0.0])
    by_hand = np.float32(0)
    for row in rows:
        by_hand = np.float32(by_hand + np.float32(row.item()))
    out = torch.empty(1)
    Mean()(rows, weights, out)
    assert out.item() == by_hand / 2
    assert out.item() != rows.double().sum().item() / 2


def test_a_single_contribution_of_weight_1_keeps_every_bit() -> None:
    row = torch.tensor([[1e-45, 1 / 3, 3.4e38, -0.0]])
    out = torch.empty(4)
    Mean()(row, torch.ones(1), out)
    assert torch.equal(out.view(torch.int32), row[0].view(torch.int32))


@pytest.mark.parametrize("deterministic", [False, True])
@each_rule
def test_the_configured_rule_says_what_it_needs(name: str, deterministic: bool) -> None:
    rule, needs = choose(Config(rule=name, deterministic=deterministic))
    assert type(rule) is RULES[name]
    assert needs == ("rows" if deterministic else rule.needs)


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="rule: given 'maen', allowed: mean"):
        choose(Config(rule="maen"))
