"""The aggregation of a round by messages; every rank makes the same calls.

    needs "sum"    reduce (Reduce)                    the rule is called with the sum
    needs "rows"   reduce (Gather, slice by slice)    the rule is called with the rows of each slice
    needs "gram"   reduce (Gather, slice by slice)    inner products are summed; the rule returns coefficients
                   broadcast (Bcast)                  every rank multiplies its contribution by its coefficient
                   reduce (Reduce)                    the sum is the result; a Gather in deterministic mode, or if the rule
                                                      is then called with the rows that it has chosen

The server holds one slice of each rank, never a second whole contribution. The part of the body behind the gradients
(BatchNorm's statistics) is aggregated in the same way, but does not count in the inner products.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mpips.comm import Apply
from mpips.model.finite import is_finite
from mpips.model.message import WEIGHT, Push
from mpips.reduce.combine import Combiner, Gram, coefficients, left_out, prepare
from mpips.rules import Needs, Rule


class Collectives(Protocol):
    """The calls of a communicator that are used here. `reduce/client_rows.py` has one whose rows are clients."""

    rank: int
    size: int
    lost: Set[int]

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """See `Communicator`."""

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""


class AggregationResult(NamedTuple):
    """The result of an aggregation, except for the combined contribution itself.

    Attributes:
        faulty: the ranks whose contribution was left out for a NaN or Inf that they had not reported. A rule that combines each
            coordinate by itself leaves out only the affected coordinates. The plain mean does not check.
        refused: why the rule could not combine the contributions; else "". The body is then zero and no update must be taken.
        nonfinite: rank -> the index of the first tensor in which the combined gradient is not finite. It is the rank whose
            contribution is not finite, or the server if there is no such rank.
    """

    faulty: list[int]
    refused: str = ""
    nonfinite: dict[int, int] = {}


NOTHING = AggregationResult([])  # the result of a round that has none of these


def aggregate(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    """Combine the contributions of all ranks by the rule; every rank calls this.

    At the server, the combination replaces the body of its push message, and the sum of all tails follows it. The bodies of
    other ranks are overwritten.

    Args:
        communicator: this rank's end.
        push: this rank's contribution and row; all zero if it has none.
        rule: the rule, from `mpips.rules.choose`.
        last: what the last collective delivers, from `mpips.rules.choose`.
        first: the rank of the first worker.

    Returns:
        The result, at the server; elsewhere it means nothing.
    """
    prepare(communicator.rank, push, rule)
    return bring_together(communicator, push, rule, last, first)


def bring_together(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    """Combine contributions that the rule has prepared; else as `aggregate`."""
    if rule.needs == "gram":
        return _by_gram(communicator, push, rule, last, first)
    combiner = Combiner(push, rule, first, rounded=True)
    communicator.reduce(push.message, push.tail_at, last, _Slices(push, combiner, communicator.size))
    if combiner.refused:
        push.body.zero_()
    return AggregationResult(sorted(combiner.faulty | left_out(push.rows, rule)), combiner.refused)


class _Slices:
    """The `apply` of a reduce that passes each slice, of gradients or of statistics, to a combiner."""

    def __init__(self, push: Push, combiner: Combiner, size: int) -> None:
        self._push, self._combiner, self._size = push, combiner, size

    def __call__(self, part: slice, rows: Tensor) -> None:
        middle = min(max(self._push.gradients.numel(), part.start), part.stop)
        for piece in (slice(part.start, middle), slice(middle, part.stop)):
            if piece.start < piece.stop:
                given, out = rows[:, piece.start - part.start : piece.stop - part.start], self._push.message[piece]
                if len(rows) == 1 < self._size:
                    self._combiner.sum(piece, given[0], out)
                else:
                    self._combiner.rows(piece, given.unbind(0), out)


class _Products:
    """The `apply` of a reduce that adds each slice, of gradients or of statistics, to a Gram matrix."""

    def __init__(self, push: Push, gram: Gram) -> None:
        self._push, self._gram = push, gram

    def __call__(self, part: slice, rows: Tensor) -> None:
        middle = min(max(self._push.gradients.numel(), part.start), part.stop)
        for piece in (slice(part.start, middle), slice(middle, part.stop)):
            if piece.start < piece.stop:
                self._gram.add(piece, rows[:, piece.start - part.start : piece.stop - part.start].unbind(0))


def _by_gram(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    gram = Gram(push, rule, communicator.size)
    communicator.reduce(push.message, push.tail_at, "rows", _Products(push, gram))
    lost = len(communicator.lost)
    factors, found = torch.zeros(communicator.size, dtype=torch.float64), AggregationResult([])
    if gram.called:
        factors, faulty, refused = coefficients(push, rule, gram.matrix.cpu(), gram.usable())
        found = AggregationResult(faulty, refused)
        if not factors.any():
            push.body.zero_()
    communicator.broadcast(factors)
    if not factors.any():
        return found
    combiner = Combiner(push, rule, first, rounded=True)
    combiner.begin(factors)
    if last == "sum":
        _multiply_own(communicator.rank, push, factors)
    communicator.reduce(push.body, push.tail_at, last, _Slices(push, combiner, communicator.size))
    if len(communicator.lost) > lost:
        push.body.zero_()
        return AggregationResult([], "a worker has died after the rule had chosen, and before its contribution came")
    if gram.origin is not None:
        _move(push.gradients, gram.origin, 1 - float(factors.sum()))
    return found


def _multiply_own(rank: int, push: Push, factors: Tensor) -> None:
    """Multiply this rank's contributions by their coefficients, before a Reduce adds them up."""
    whole = float(factors.sum())
    for row, body in push.own(rank):
        factor, weight = float(factors[row]), float(push.rows[row, WEIGHT])
        if factor == 0 or weight <= 0:
            body.zero_()  # not multiplied: 0 times NaN is NaN
        else:
            _multiply(body[: push.gradients.numel()], factor if push.raw else factor / weight)
            _multiply(body[push.gradients.numel() :], factor / (whole or 1.0) / weight)


def _multiply(part: Tensor, factor: float) -> None:
    if factor != 1:
        part.mul_(factor)


def _move(gradients: Tensor, origin: Tensor, share: float) -> None:
    """Add the origin's share to the combined gradients, which become the next origin unless they overflowed."""
    if share:
        gradients.add_(origin, alpha=share)
    if is_finite(gradients):
        origin.copy_(gradients)
