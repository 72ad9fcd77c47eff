"""Who serves which slice of the flat buffer, and in which steps slices travel between nodes.

root     rank 0 all of it
sharded  every rank its own slice; on several nodes a slice of each bucket, of which the ranks of each node together serve as
         much as those of any other, so that all links are busy from the first bucket to the last
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest

import torch

from mpips.model.flat import Slot

SMALL = 1 << 21  # bytes; a smaller model is served by rank 0 alone, which spares two meetings
GRAIN = 1024  # elements: a slice begins at such a multiple in its tensor, so kernels treat its elements as in the whole one
PIECE = 1 << 18  # elements that are combined, and stepped, at a time: with their momentum they fit a core's cache
LARGE = 1 << 24  # the same on a GPU, where to begin costs more than its cache saves; other GPUs' rows are copied piece by piece
BUCKET = 4 << 20  # the most bytes that a node sends at a time while its ranks add up the next
STEPS = 24  # buckets of a round at least: the wire has nothing to do before the first and after the last
SMALLEST = 1 << 18  # bytes of a bucket that are not cut up for that: ranks wait for each other each time
EARLY = 1 << 20  # the same where they travel during backward, which does not hide the last ones
FLIGHT = 3  # buckets that are under way at a time: one is waited for while the next ones keep the line busy
LEAST = 1 << 14  # elements that a node sends another at a time, however many nodes there are: fewer would cost more in latency


def buckets(slots: Sequence[Slot], numel: int, nodes: Sequence[int], each: int, tensors: bool = False) -> list[list[slice]]:
    """For each bucket of the flat buffer a slice for each rank, node by node; see `divide`.

    Args:
        each: about how many elements of a bucket a node is to serve at most.
    """
    length = (
        max(1, each // GRAIN - 1) * GRAIN * len(nodes) if len(nodes) > 1 else numel
    )  # so that slices are even, and none longer
    cuts = sorted({0, *(_cut(slots, at, tensors) for at in range(length, numel, length)), numel})
    return [divide(slots, stop, nodes, tensors, start) for start, stop in pairwise(cuts)]


def divide(slots: Sequence[Slot], numel: int, nodes: Sequence[int], tensors: bool = False, start: int = 0) -> list[slice]:
    """A slice of the flat buffer for each rank, node by node.

    Args:
        slots: the tensors.
        numel: where the flat buffer ends.
        nodes: how many ranks serve on each node.
        tensors: cut between tensors only.
        start: where it begins.
    """
    parts = [(node * ranks + k, len(nodes) * ranks) for node, ranks in enumerate(nodes) for k in range(ranks)][1:]
    cuts = [_cut(slots, start + (numel - start) * part // whole, tensors) for part, whole in parts]
    inside = sorted(min(max(cut, start), numel) for cut in cuts)
    return [slice(*ends) for ends in pairwise([start, *inside, numel])]


def _cut(slots: Sequence[Slot], at: int, tensors: bool) -> int:
    """The place nearest to `at` where the buffer may be cut."""
    slot = next((s for s in reversed(slots) if s.offset <= at), slots[0])
    inside = at - slot.offset
    if not tensors and inside < slot.numel:
        return slot.offset + inside // GRAIN * GRAIN
    after = next((s.offset for s in slots if s.offset > slot.offset), slot.offset + slot.numel)
    return slot.offset if inside < after - at else after


def piece(device: torch.device) -> int:
    """How many elements are combined, and stepped, at a time."""
    return PIECE if device.type == "cpu" else LARGE


def pieces(span: slice, largest: int = PIECE) -> list[slice]:
    """The span in parts of at most `largest` elements."""
    return [slice(start, min(start + largest, span.stop)) for start in range(span.start, span.stop, largest)]


def both(one: slice, other: slice) -> slice:
    """What is in both."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def share(span: slice, place: int, count: int) -> slice:
    """The part of a span for one of `count`."""
    numel = span.stop - span.start
    return slice(span.start + numel * place // count, span.start + numel * (place + 1) // count)


def steps(bucket: Sequence[slice], nodes: Sequence[int], largest: int) -> list[list[slice]]:
    """What of a bucket travels together between nodes.

    Args:
        bucket: what each rank serves of it, node by node.
        nodes: how many ranks serve on each node.
        largest: the most elements of a slice at a time.

    Returns:
        For each step what of each node's it is about; empty slices where there is nothing left.
    """
    ends = list(accumulate(nodes, initial=0))
    cut = [pieces(slice(bucket[first].start, bucket[end - 1].stop), largest) for first, end in pairwise(ends)]
    return [list(step) for step in zip_longest(*cut, fillvalue=slice(0, 0))]
