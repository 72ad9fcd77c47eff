"""Slices cover everything once, and begin where kernels do not notice."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpips.model import layout
from mpips.model.flat import ALIGNMENT, Slot, lay_out
from mpips.model.layout import GRAIN, LEAST, buckets, divide, pieces, share, steps

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
    assert layout.PIECE % layout.GRAIN == 0
    assert layout.GRAIN * torch.float32.itemsize % ALIGNMENT == 0


@pytest.mark.parametrize("ranks", [2, 3, 16, 1000])
def test_more_ranks_than_elements(ranks: int) -> None:
    slots, numel = slots_of([3])
    spans = divide(slots, numel, [ranks])
    holding = [span for span in spans if span.start < 3 and span.stop > span.start]
    assert holding[0].start == 0
    assert len(holding) == 1, "three elements are not worth a cut"


node_counts = st.lists(st.integers(1, 6), min_size=2, max_size=6)


@given(sizes, node_counts, st.booleans())
def test_every_element_is_served_once_on_several_nodes(numels: Sizes, nodes: list[int], tensors: bool) -> None:
    slots, numel = slots_of(numels)
    spans = divide(slots, numel, nodes, tensors)
    assert len(spans) == sum(nodes)
    assert (spans[0].start, spans[-1].stop) == (0, numel)
    assert all(0 <= span.start <= span.stop for span in spans)
    assert all(one.stop == other.start for one, other in pairwise(spans))


@given(sizes, node_counts)
def test_nodes_serve_as_much_as_each_other_and_so_do_their_ranks(numels: Sizes, nodes: list[int]) -> None:
    slots, numel = slots_of(numels)
    rest = iter(divide(slots, numel, nodes))
    for node, ranks in enumerate(nodes):
        spans = [next(rest) for _ in range(ranks)]
        for k, span in enumerate(spans):
            assert abs(span.start - numel * (node + k / ranks) / len(nodes)) <= GRAIN + ALIGNMENT


@given(sizes, node_counts)
def test_cuts_between_nodes_are_where_a_cut_may_be(numels: Sizes, nodes: list[int]) -> None:
    slots, numel = slots_of(numels)
    for span in divide(slots, numel, nodes):
        for slot in slots:
            if slot.offset < span.start < slot.offset + slot.numel:
                assert (span.start - slot.offset) % GRAIN == 0
    for span in divide(slots, numel, nodes, tensors=True):
        assert not any(slot.offset < span.start < slot.offset + slot.numel for slot in slots)


@given(sizes, st.integers(1, 12))
def test_nodes_of_one_rank_are_served_as_ranks_of_one_node(numels: Sizes, count: int) -> None:
    slots, numel = slots_of(numels)
    assert divide(slots, numel, [1] * count) == divide(slots, numel, [count])


def test_a_large_node_serves_no_more_than_a_small_one() -> None:
    slots, numel = slots_of([GRAIN * 12])
    lengths = [(span.stop - span.start) // GRAIN for span in divide(slots, numel, [1, 3])]
    assert lengths == [6, 2, 2, 2]
    assert divide(slots, numel, [3, 1])[-1] == slice(GRAIN * 6, GRAIN * 12)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 9))
def test_shares_cover_a_span_evenly(start: int, length: int, count: int) -> None:
    parts = [share(slice(start, start + length), place, count) for place in range(count)]
    assert (parts[0].start, parts[-1].stop) == (start, start + length)
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.stop - part.start in (length // count, -(-length // count)) for part in parts)


eaches = st.integers(1, 8 * GRAIN)


@given(sizes, st.lists(st.integers(1, 6), min_size=1, max_size=6), eaches, st.booleans())
def test_every_element_is_in_one_bucket_and_served_once(numels: Sizes, nodes: list[int], each: int, tensors: bool) -> None:
    slots, numel = slots_of(numels)
    dealt = buckets(slots, numel, nodes, each, tensors)
    assert all(len(bucket) == sum(nodes) for bucket in dealt)
    assert (dealt[0][0].start, dealt[-1][-1].stop) == (0, numel)
    assert all(0 <= span.start <= span.stop for bucket in dealt for span in bucket)
    assert all(one.stop == other.start for bucket in dealt for one, other in pairwise(bucket))
    assert all(one[-1].stop == other[0].start for one, other in pairwise(dealt))
    assert all(bucket[0].start < bucket[-1].stop for bucket in dealt), "no bucket is empty"


@given(sizes, node_counts, eaches, st.sampled_from([torch.float32, torch.float64]))
def test_buckets_are_cut_where_a_cut_may_be(numels: Sizes, nodes: list[int], each: int, dtype: torch.dtype) -> None:
    slots, numel = slots_of(numels, dtype)
    for span in (span for bucket in buckets(slots, numel, nodes, each) for span in bucket):
        for slot in slots:
            if slot.offset < span.start < slot.offset + slot.numel:
                assert (span.start - slot.offset) % GRAIN == 0
                assert span.start * dtype.itemsize % ALIGNMENT == 0


@given(sizes, node_counts, eaches)
def test_buckets_keep_whole_tensors_whole(numels: Sizes, nodes: list[int], each: int) -> None:
    slots, numel = slots_of(numels)
    for span in (span for bucket in buckets(slots, numel, nodes, each, tensors=True) for span in bucket):
        assert not any(slot.offset < span.start < slot.offset + slot.numel for slot in slots)


large = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 600_000)), min_size=1, max_size=8).filter(any)


@given(large, node_counts, st.integers(LEAST, 8 * LEAST))
def test_nodes_serve_as_much_of_each_bucket_and_no_more_than_may_travel(numels: Sizes, nodes: list[int], each: int) -> None:
    slots, numel = slots_of(numels)
    dealt = buckets(slots, numel, nodes, each)
    ends = list(accumulate(nodes, initial=0))
    for bucket in dealt:
        served = [bucket[end - 1].stop - bucket[first].start for first, end in pairwise(ends)]
        assert max(served) <= each, "it is one step"
        assert max(served) - min(served) <= 2 * (GRAIN + ALIGNMENT), "all links are as busy"
        assert len(steps(bucket, nodes, each)) == 1
    assert len(dealt) <= -(-numel // (len(nodes) * (each - 2 * GRAIN))), "as few as may be"


def test_one_node_has_one_bucket() -> None:
    slots, numel = slots_of([10_000, 7])
    assert buckets(slots, numel, [3], 1) == [divide(slots, numel, [3])]


def test_a_bucket_of_several_nodes_is_for_all_of_them() -> None:
    slots, numel = slots_of([GRAIN * 10])
    dealt = buckets(slots, numel, [1, 1], 3 * GRAIN)
    assert [[(span.start // GRAIN, span.stop // GRAIN) for span in bucket] for bucket in dealt] == [
        [(0, 2), (2, 4)],
        [(4, 6), (6, 8)],
        [(8, 9), (9, 10)],
    ]


@given(sizes, node_counts, st.booleans(), st.data())
def test_a_part_of_the_buffer_is_divided_as_the_whole(numels: Sizes, nodes: list[int], tensors: bool, draw: Any) -> None:
    slots, numel = slots_of(numels)
    start = draw.draw(st.sampled_from([0, *(span.start for span in divide(slots, numel, [7], tensors))]))
    spans = divide(slots, numel, nodes, tensors, start)
    assert len(spans) == sum(nodes)
    assert (spans[0].start, spans[-1].stop) == (start, numel)
    assert all(start <= span.start <= span.stop for span in spans)
    assert all(one.stop == other.start for one, other in pairwise(spans))


lengths_of_nodes = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=4), min_size=2, max_size=5)


@given(lengths_of_nodes, st.integers(0, 1000), st.integers(1, 100))
def test_steps_are_about_all_that_each_node_serves_in_order(lengths: list[list[int]], start: int, largest: int) -> None:
    ends = list(accumulate((length for node in lengths for length in node), initial=start))
    bucket = [slice(*pair) for pair in pairwise(ends)]
    found = steps(bucket, [len(node) for node in lengths], largest)
    assert all(len(step) == len(lengths) for step in found)
    rest = iter(bucket)
    for number, node in enumerate(lengths):
        spans, parts = [next(rest) for _ in node], [step[number] for step in found]
        assert all(part.stop - part.start <= largest for part in parts)
        given_out = [i for part in parts for i in range(part.start, part.stop)]
        assert given_out == [i for span in spans for i in range(span.start, span.stop)]
        ended = [part.start == part.stop for part in parts]
        assert ended == sorted(ended), "what is left comes without a gap"
    assert all(any(part.start < part.stop for part in step) for step in found), "no step is about nothing"
    assert len(found) == max(-(-sum(node) // largest) for node in lengths)


def test_a_node_with_nothing_left_waits_for_the_others() -> None:
    nothing = slice(0, 0)
    bucket = [slice(10, 12), slice(12, 15), slice(15, 18), slice(18, 18)]
    assert steps(bucket, [2, 1, 1], 2) == [
        [slice(10, 12), slice(15, 17), nothing],
        [slice(12, 14), slice(17, 18), nothing],
        [slice(14, 15), nothing, nothing],
    ]
    assert steps([slice(3, 3), slice(3, 3)], [1, 1], 3) == []
