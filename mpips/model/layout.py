"""Which rank serves which slice of the flat buffer, and in which steps slices travel between nodes.

root     rank 0 serves the whole buffer
sharded  every rank serves its own slice; on several nodes, its own slice of each bucket. The ranks of each node together serve
as many elements of a bucket as those of any other node, so that all links are busy from the first bucket to the last
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest

import torch

from mpips.model.flat import Slot

SMALL = 1 << 21  # bytes; rank 0 alone serves a smaller model, which saves two barriers
GRAIN = 1024  # elements: slices begin at multiples of this within a tensor, so kernels give the same bits as on the whole
PIECE = 1 << 18  # elements that are reduced and stepped at a time: with their momentum they fit into a core's cache
LARGE = 1 << 24  # the same on a GPU, where launches cost more than the cache saves; other GPUs' rows are copied in such pieces
BUCKET = 4 << 20  # the largest bucket in bytes: a node sends one while its ranks add up the next
STEPS = 24  # the least number of buckets in a round: the wire idles during the first and the last sum
SMALLEST = 1 << 18  # bytes: STEPS makes no bucket smaller than this, as each one costs a barrier
EARLY = 1 << 20  # the same if buckets travel during backward, which does not hide the last ones
FLIGHT = 3  # buckets under way at a time: while one is awaited, the others keep the line busy
LEAST = 1 << 14  # the least elements that a node sends another at a time: fewer would cost more in latency


def buckets(slots: Sequence[Slot], numel: int, nodes: Sequence[int], each: int, tensors: bool = False) -> list[list[slice]]:
    """Cut the flat buffer into buckets, and return for each bucket a slice for each rank, node by node.

    Args:
        slots: the tensors.
        numel: the length of the flat buffer.
        nodes: the number of serving ranks on each node.
        each: about the largest number of elements of a bucket for one node to serve.
        tensors: whether to cut between tensors only.
    """
    length = (
        max(1, each // GRAIN - 1) * GRAIN * len(nodes) if len(nodes) > 1 else numel
    )  # so that the nodes' slices are equal, and none exceeds `each`
    cuts = sorted({0, *(_cut(slots, at, tensors) for at in range(length, numel, length)), numel})
    return [divide(slots, stop, nodes, tensors, start) for start, stop in pairwise(cuts)]


def divide(slots: Sequence[Slot], numel: int, nodes: Sequence[int], tensors: bool = False, start: int = 0) -> list[slice]:
    """Return a slice of the flat buffer for each rank, node by node.

    Args:
        slots: the tensors.
        numel: where the last slice ends.
        nodes: the number of serving ranks on each node.
        tensors: whether to cut between tensors only.
        start: where the first slice begins.
    """
    parts = [(node * ranks + k, len(nodes) * ranks) for node, ranks in enumerate(nodes) for k in range(ranks)][1:]
    cuts = [_cut(slots, start + (numel - start) * part // whole, tensors) for part, whole in parts]
    inside = sorted(min(max(cut, start), numel) for cut in cuts)
    return [slice(*ends) for ends in pairwise([start, *inside, numel])]


def _cut(slots: Sequence[Slot], at: int, tensors: bool) -> int:
    """Return the place nearest to `at` where the flat buffer may be cut."""
    slot = next((s for s in reversed(slots) if s.offset <= at), slots[0])
    inside = at - slot.offset
    if not tensors and inside < slot.numel:
        return slot.offset + inside // GRAIN * GRAIN
    after = next((s.offset for s in slots if s.offset > slot.offset), slot.offset + slot.numel)
    return slot.offset if inside < after - at else after


def piece(device: torch.device) -> int:
    """Return how many elements are reduced and stepped at a time on this device."""
    return PIECE if device.type == "cpu" else LARGE


def pieces(span: slice, largest: int = PIECE) -> list[slice]:
    """Return the span cut into slices of at most `largest` elements."""
    return [slice(start, min(start + largest, span.stop)) for start in range(span.start, span.stop, largest)]


def both(one: slice, other: slice) -> slice:
    """Return the intersection of two slices."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def share(span: slice, place: int, count: int) -> slice:
    """Return the part of a span for number `place` of `count`."""
    numel = span.stop - span.start
    return slice(span.start + numel * place // count, span.start + numel * (place + 1) // count)


def steps(bucket: Sequence[slice], nodes: Sequence[int], largest: int) -> list[list[slice]]:
    """Return which slices of a bucket travel between nodes in the same step.

    Args:
        bucket: each rank's slice of the bucket, node by node.
        nodes: the number of serving ranks on each node.
        largest: the largest number of elements of a slice in a step.

    Returns:
        For each step, a slice for each node; empty for nodes that have nothing left.
    """
    ends = list(accumulate(nodes, initial=0))
    cut = [pieces(slice(bucket[first].start, bucket[end - 1].stop), largest) for first, end in pairwise(ends)]
    return [list(step) for step in zip_longest(*cut, fillvalue=slice(0, 0))]
