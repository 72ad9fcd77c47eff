"""Slices cover everything once, and begin where kernels do not notice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpips import plan
from mpips.flat import ALIGNMENT, Slot, lay_out
from mpips.plan import GRAIN, divide, pieces

Sizes = list[int]
sizes = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 20_000)), min_size=1, max_size=8).filter(any)


def slots_of(numels: Sizes, dtype: torch.dtype = torch.float32) -> tuple[list[Slot], int]:
    return lay_out((str(i), torch.empty(n, dtype=dtype, device="meta")) for i, n in enumerate(numels))


@given(sizes, st.integers(1, 40), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_every_element_is_served_once(numels: Sizes, ranks: int, tensors: bool, dtype: torch.dtype) -> None:
    slots, numel = slots_of(numels, dtype)
    spans = divide(slots, numel, [ranks], tensors)
    assert len(spans) == ranks
    assert (spans[0].start, spans[-1].stop) == (0, numel)
    assert all(0 <= span.start <= span.stop for span in spans)
    assert all(one.stop == other.start for one, other in pairwise(spans))
    assert sorted(spans, key=lambda span: (span.start, span.stop)) == spans


@given(sizes, st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]))
def test_a_cut_is_aligned_in_its_tensor(numels: Sizes, ranks: int, dtype: torch.dtype) -> None:
    slots, numel = slots_of(numels, dtype)
    for span in divide(slots, numel, [ranks]):
        for slot in slots:
            if slot.offset < span.start < slot.offset + slot.numel:
                assert (span.start - slot.offset) % GRAIN == 0
                assert span.start * dtype.itemsize % ALIGNMENT == 0


@given(sizes, st.integers(1, 40))
def test_whole_tensors_stay_whole(numels: Sizes, ranks: int) -> None:
    slots, numel = slots_of(numels)
    for span in divide(slots, numel, [ranks], tensors=True):
        assert not any(slot.offset < span.start < slot.offset + slot.numel for slot in slots)


@given(sizes, st.integers(1, 8))
def test_slices_are_about_as_long_as_each_other(numels: Sizes, ranks: int) -> None:
    slots, numel = slots_of(numels)
    for number, span in enumerate(divide(slots, numel, [ranks])):
        assert abs(span.start - numel * number / ranks) <= GRAIN + ALIGNMENT


def test_whole_tensors_are_dealt_out_where_that_is_nearest() -> None:
    slots, numel = slots_of([1600, 160, 1600, 1600])
    assert divide(slots, numel, [3], tensors=True) == [slice(0, 1600), slice(1600, 3360), slice(3360, 4960)]
    assert divide(slots, numel, [1], tensors=True) == [slice(0, 4960)]
    assert divide(*slots_of([7]), [3], tensors=True) == [slice(0, 7), slice(7, 7), slice(7, 16)]


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 3000))
def test_pieces_cover_a_span_in_order(start: int, length: int, largest: int) -> None:
    parts = pieces(slice(start, start + length), largest)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(start, start + length))
    assert all(0 < part.stop - part.start <= largest for part in parts)


def test_pieces_keep_the_grain() -> None:
    assert plan.PIECE % plan.GRAIN == 0
    assert plan.GRAIN * torch.float32.itemsize % ALIGNMENT == 0


@pytest.mark.parametrize("ranks", [2, 3, 16, 1000])
def test_more_ranks_than_elements(ranks: int) -> None:
    slots, numel = slots_of([3])
    spans = divide(slots, numel, [ranks])
    holding = [span for span in spans if span.start < 3 and span.stop > span.start]
    assert holding[0].start == 0
    assert len(holding) == 1, "three elements are not worth a cut"
