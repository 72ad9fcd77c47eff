"""What is computed on a slice has the same bits, whether numpy or torch does it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpips.comm.peer_buffers import FEW, PeerBuffers, Rows
from mpips.model.finite import ONE_THREAD, is_finite
from mpips.reduce.combine import Terms, add_arrays, add_up
from mpips.rules import Mean
from tests.helpers.deadlines import patient

DTYPES = st.sampled_from([torch.float32, torch.float64])


def random_rows(seed: int, count: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator, dtype=dtype) * 10.0 ** (k - 1) for k in range(count)]


def rows_of(given: list[Tensor], arrays: bool) -> Rows:
    rows = Rows(row.clone() for row in given)
    rows.arrays = [row.numpy() for row in rows] if arrays else None
    return rows


def mean(given: list[Tensor], terms: Terms, whole: float, arrays: bool) -> tuple[Tensor, bool]:
    rows = rows_of(given, arrays)
    total = add_arrays(rows.arrays) if rows.arrays and terms == [(k, 1.0) for k in range(len(given))] else add_up(rows, terms)
    finite = is_finite(total)
    Mean()((rows[0],), (whole,), rows[0])
    return rows[0], finite


@given(st.integers(0, 99), st.integers(1, 5), st.sampled_from([0, 1, 7, 1000, ONE_THREAD + 9]), DTYPES, st.floats(0.1, 99))
def test_numpy_and_torch_give_the_same_bits(seed: int, count: int, length: int, dtype: torch.dtype, whole: float) -> None:
    values, terms = random_rows(seed, count, length, dtype), [(k, 1.0) for k in range(count)]
    ours, expected = mean(values, terms, whole, True), mean(values, terms, whole, False)
    assert torch.equal(ours[0], expected[0])
    assert ours[1] and expected[1]
    plain = values[0].clone()
    for value in values[1:]:
        plain += value
    assert torch.equal(ours[0], plain / whole if whole != 1 else plain)


@given(st.integers(0, 99), st.booleans(), st.lists(st.sampled_from([0.0, 1.0, 4.0]), min_size=1, max_size=4))
def test_rows_without_a_weight_may_hold_anything(seed: int, arrays: bool, weights: list[float]) -> None:
    values = random_rows(seed, len(weights), 65, torch.float64)
    expected = sum(
        (weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros(65, dtype=torch.float64)
    )
    values = [value if weight else torch.full_like(value, math.nan) for weight, value in zip(weights, values, strict=True)]
    terms = [(k, weight) for k, weight in enumerate(weights) if weight]
    assert torch.equal(mean(values, terms, 1, arrays)[0], expected)


@pytest.mark.parametrize("length", [100, ONE_THREAD + 1])
@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_wherever_it_is(bad: float, arrays: bool, length: int) -> None:
    for at in (0, length // 2, length - 1):
        values = [torch.zeros(length), torch.zeros(length)]
        values[1][at] = bad
        assert not mean(values, [(0, 1.0), (1, 1.0)], 2, arrays)[1]


def test_a_sum_is_added_up_in_rank_order() -> None:
    """Another order of these numbers would give other bits."""
    rows = torch.tensor([[1.0], [2.0**24], [1.0], [-(2.0**24)]])
    exact = rows.double().sum().item()
    by_hand = np.float32(0)
    for row in rows:
        by_hand = np.float32(by_hand + np.float32(row.item()))
    assert add_up(list(rows), [(k, 1.0) for k in range(4)]).item() == by_hand != exact


def test_a_product_may_be_rounded_before_it_is_added() -> None:
    rows = list(torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)))
    expected = rows[0] * 3 + rows[1] * 0.1
    assert torch.equal(add_up([row.clone() for row in rows], [(0, 3.0), (1, 0.1)], rounded=True), expected)
    assert not torch.equal(add_up([row.clone() for row in rows], [(0, 3.0), (1, 0.1)]), expected), "or the flag does nothing"


OVERFLOW = """
import numpy as np
from mpips.model.finite import is_finite
from mpips.reduce.combine import add_arrays
for values in ((3e38, 3e38), (np.inf, -np.inf)):
    print(is_finite(add_arrays([np.full(100, value, np.float32) for value in values])))
"""


def test_a_sum_that_overflows_is_no_warning_beside() -> None:
    """It is named where it is judged."""
    done = subprocess.run([sys.executable, "-c", OVERFLOW], capture_output=True, text=True, timeout=patient(60), check=True)
    assert done.stdout.split() == ["False", "False"]
    assert not done.stderr


def test_a_board_gives_numpy_what_is_few() -> None:
    rows: list[Any] = [torch.zeros(2 * FEW) for _ in range(2)]
    buffers = PeerBuffers(rows, 0, torch.zeros(8, dtype=torch.uint8))
    few = buffers.rows_of(slice(5, 5 + FEW))
    assert few.arrays is not None
    few.arrays[1][:] = 1
    assert rows[1][5 : 5 + FEW].all() and not rows[1][5 + FEW :].any()
    assert buffers.rows_of(slice(5, 5 + FEW)) is few
    assert buffers.rows_of(slice(0, FEW + 1)).arrays is None
