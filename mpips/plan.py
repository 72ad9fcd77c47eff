"""Who serves which slice of the flat buffer.

root     rank 0 all of it
sharded  every rank its own slice, about as long as the others'
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mpips.flat import Slot

SMALL = 1 << 21  # bytes; a smaller model is served by rank 0 alone, which spares two meetings
GRAIN = 1024  # elements: a slice begins at such a multiple in its tensor, so kernels treat its elements as in the whole one
PIECE = 1 << 18  # elements that are combined, and stepped, at a time: with their momentum they fit a core's cache


def divide(slots: Sequence[Slot], numel: int, ranks: int, tensors: bool = False) -> list[slice]:
    """A slice of the flat buffer for each rank, in rank order.

    Args:
        slots: the tensors.
        numel: the flat buffer's length.
        ranks: how many serve.
        tensors: cut between tensors only.
    """
    cuts = [0, *(_cut(slots, numel * rank // ranks, tensors) for rank in range(1, ranks)), numel]
    return [slice(start, max(start, stop)) for start, stop in pairwise(sorted(cuts))]


def _cut(slots: Sequence[Slot], at: int, tensors: bool) -> int:
    """The place nearest to `at` where the buffer may be cut."""
    slot = next((s for s in reversed(slots) if s.offset <= at), slots[0])
    inside = at - slot.offset
    if not tensors and inside < slot.numel:
        return slot.offset + inside // GRAIN * GRAIN
    after = next((s.offset for s in slots if s.offset > slot.offset), slot.offset + slot.numel)
    return slot.offset if inside < after - at else after


def pieces(span: slice, largest: int = PIECE) -> list[slice]:
    """The span in parts of at most `largest` elements."""
    return [slice(start, min(start + largest, span.stop)) for start in range(span.start, span.stop, largest)]
