"""How the contributions of a round are brought together: both sides of it.

    needs "sum"    combine (Reduce)                                             the rule, on the sum
    needs "rows"   combine (Gather, slice by slice)                             the rule, slice by slice
    needs "gram"   combine (Gather, slice by slice)                             inner products, the rule's coefficients
                   publish (Bcast) the coefficients                             every rank multiplies its own contribution
                   combine the bodies (Reduce; Gather in deterministic mode)    their sum; or the rule, on those it has chosen

All ranks make the same calls: `combine` where the server is, `contribute` elsewhere. The server holds one slice of each rank,
never a second whole contribution. What lies behind the gradients in the body (BatchNorm's statistics) goes the same way, but
has no say in the inner products.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mpips.comm import Apply
from mpips.model.message import BAD, SAMPLES, WEIGHT, Push
from mpips.rules import Mean, Needs, Rule, RuleError, strips

HUGE = 1e300  # a larger square is as good as infinite: sums of a few of them would be


class Collectives(Protocol):
    """What is needed here of a communicator; one whose rows are clients is in `reduce/client_rows.py`."""

    rank: int
    size: int

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """See `Communicator`."""

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""


class AggregationResult(NamedTuple):
    """What came of it.

    Attributes:
        faulty: ranks whose contribution was left out for a NaN or Inf that they had not reported; by a rule that looks at one
            coordinate at a time, left out where it had one. The plain mean looks for none.
        refused: why the rule could not combine what came; the body is then zero and no update is to be taken. Else "".
        nonfinite: rank -> the index of a tensor, where the combined gradient is not finite: of the rank whose contribution was
            not, or the server's, if no rank's was.
    """

    faulty: list[int]
    refused: str = ""
    nonfinite: dict[int, int] = {}


def aggregate(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    """Combine the contributions of all ranks by the rule; every rank calls this.

    At the server the combination is left in the body of its push message, and the sum of all tails behind it. The body of every
    other rank is changed.

    Args:
        communicator: this rank's end.
        push: this rank's contribution and row; all zero if it has none.
        rule, last: what `choose` gives.
        first: the rank of the first worker.

    Returns:
        What came of it, at the server; elsewhere it means nothing.
    """
    prepare(communicator.rank, push, rule)
    return bring_together(communicator, push, rule, last, first)


def bring_together(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    """`aggregate`, of contributions that the rule has prepared."""
    if rule.needs == "gram":
        return _by_gram(communicator, push, rule, last, first)
    apply = _Slices(push, rule, first, communicator.size)
    communicator.reduce(push.message, push.tail_at, last, apply)
    if apply.refused:
        push.body.zero_()
    return AggregationResult(sorted(apply.faulty | left_out(push.rows, rule)), apply.refused)


def left_out(rows: Tensor, rule: Rule) -> set[int]:
    """Those ranks, by the summed rows of the tail, that the rule made leave themselves out when it prepared theirs."""
    if type(rule).prepare is Rule.prepare:
        return set()
    return set(((rows[:, SAMPLES] > 0) & (rows[:, WEIGHT] == 0)).nonzero().flatten().tolist())


def prepare(rank: int, push: Push, rule: Rule) -> None:
    """Let the rule see this rank's contribution before it is brought together with others."""
    weight = float(push.rows[rank, WEIGHT])
    if weight > 0 and not rule.prepare(push.gradients, 1.0 if push.raw else weight):
        push.body.zero_()
        push.rows[rank, WEIGHT] = 0


def _reported(push: Push) -> int:
    """How many ranks have left themselves out because theirs is not finite."""
    return int((push.rows[:, BAD] > 0).sum())


def _split(part: slice, at: int) -> tuple[slice, slice]:
    """A slice of the body in two: of the gradients, which end `at`, and of what lies behind."""
    middle = min(max(at, part.start), part.stop)
    return slice(part.start, middle), slice(middle, part.stop)


def _not_finite(rows: Tensor) -> Tensor:
    """`(n,)`, for each row of `(n, len)` whether it holds a NaN or Inf."""
    largest: Tensor = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    return ~largest.isfinite()


class _Slices:
    """Hands slices, as they come, to a rule that needs the sum or the rows."""

    def __init__(self, push: Push, rule: Rule, first: int, size: int) -> None:
        self._push, self._rule, self._first, self._size = push, rule, first, size
        self.faulty: set[int] = set()
        self.refused = ""

    def __call__(self, part: slice, rows: Tensor) -> None:
        weights = self._push.rows[self._first :, WEIGHT]
        if not weights.any() or self.refused:
            return
        if len(rows) == 1 < self._size:
            weights = weights.sum(0, keepdim=True)
        else:
            rows = rows[self._first :]
        if self._rule.needs == "rows" and rows.shape[1]:
            self.faulty |= {self._first + i for i in _not_finite(rows).nonzero().flatten().tolist()}
        self._rule.faulty = _reported(self._push)
        try:
            self._give(part, rows, weights)
        except RuleError as error:
            self.refused = str(error)

    def _give(self, part: slice, rows: Tensor, weights: Tensor) -> None:
        gradients, behind = _split(part, self._push.gradients.numel())
        cut, out = gradients.stop - part.start, self._push.message
        if cut:
            self._rule(rows[:, :cut], weights, out[gradients])
        if behind.start < behind.stop:
            self._rule.statistics(rows[:, cut:], weights, out[behind])


class _Gram:
    """The Gram matrix of all ranks' contributions, in float64, slice by slice.

    They are measured from the rule's origin; without one, from that contribution which is of medium length in the slice: it is
    an honest one, or as short, so the products stay as small as the differences that matter.
    """

    def __init__(self, push: Push, size: int, rule: Rule) -> None:
        self._push, self._rule = push, rule
        self.called = False  # it is at the server alone
        self.origin: Tensor | None = None
        self.matrix = push.message.new_zeros((size, size), dtype=torch.float64)
        self.faulty = torch.zeros(size, dtype=torch.bool, device=push.message.device)

    def __call__(self, part: slice, rows: Tensor) -> None:
        if not self.called:
            self.called, self.origin = True, self._rule.origin(self._push.gradients)
        weights = self._push.rows[:, WEIGHT]
        here = weights > 0
        gradients, behind = _split(part, self._push.gradients.numel())
        if behind.start < behind.stop:
            self.faulty |= _not_finite(rows[:, gradients.stop - part.start :]) & here
        shares = weights.double().where(here, 1.0).unsqueeze(1)
        products = rows[:, : gradients.stop - part.start]
        for strip in strips(products):
            values = products[:, strip].double().div_(shares)
            values -= self._centre(values, here) if self.origin is None else self.origin[gradients][strip]
            self.matrix += values @ values.T

    def _centre(self, values: Tensor, here: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(values, dim=1).where(here, torch.inf).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        medium = (lengths.isfinite().sum() - 1).clamp_(min=0) // 2
        return values[lengths.argsort(stable=True)[medium]].clone()

    def usable(self) -> Tensor:
        """`(size,)`, which contributions are finite; call once all slices are in."""
        return ~self.faulty & (self.matrix.diagonal() <= HUGE)  # False for NaN


def _by_gram(communicator: Collectives, push: Push, rule: Rule, last: Needs, first: int) -> AggregationResult:
    gram = _Gram(push, communicator.size, rule)
    communicator.reduce(push.message, push.tail_at, "rows", gram)
    coefficients, found = torch.zeros(communicator.size, dtype=torch.float64), AggregationResult([])
    if gram.called:
        coefficients, found = _coefficients(push, rule, gram)
        if not coefficients.any():
            push.body.zero_()
    _weigh(communicator, push, rule, last, coefficients, first)
    if gram.origin is not None and coefficients.any():
        _move(push.gradients, gram.origin, 1 - float(coefficients.sum()))
    return found


def _coefficients(push: Push, rule: Rule, gram: _Gram) -> tuple[Tensor, AggregationResult]:
    """`(size,)` float64: what each rank's contribution is multiplied by; all 0 where the rule refuses."""
    weights = push.rows[:, WEIGHT].double().cpu()
    usable, matrix = gram.usable().cpu(), gram.matrix.cpu()
    good, faulty = usable & (weights > 0), (~usable & (weights > 0)).nonzero().flatten().tolist()
    coefficients = torch.zeros(len(weights), dtype=torch.float64)
    if not good.any():
        return coefficients, AggregationResult(faulty, "no contribution is finite" if faulty else "")
    rule.faulty = len(faulty) + _reported(push)
    try:
        coefficients[good] = rule.coefficients(matrix[good][:, good], weights[good])
    except RuleError as error:
        return coefficients, AggregationResult(faulty, str(error))
    return coefficients, AggregationResult(faulty)


def _move(gradients: Tensor, origin: Tensor, share: float) -> None:
    """Add the origin's share to the sum, and make the result the next origin, unless it overflowed."""
    if share:
        gradients.add_(origin, alpha=share)
    if torch.isfinite(torch.dot(gradients, gradients)):
        origin.copy_(gradients)


def _weigh(communicator: Collectives, push: Push, rule: Rule, last: Needs, coefficients: Tensor, first: int) -> None:
    """Every rank learns the coefficients, multiplies its own by theirs, and all are brought together; none, if all are 0."""
    communicator.broadcast(coefficients)
    if not coefficients.any():
        return
    whole = float(coefficients.sum()) if rule.then == "sum" else 1.0
    for row, body in push.own(communicator.rank):
        own, weight = float(coefficients[row]), float(push.rows[row, WEIGHT])
        if own == 0 or weight <= 0:
            body.zero_()  # not multiplied: 0 times NaN is NaN
        else:
            _multiply(body[: push.gradients.numel()], own / weight)
            _multiply(body[push.gradients.numel() :], own / (whole or 1.0) / weight)
    communicator.reduce(push.body, push.tail_at, last, _Weighed(push, rule, coefficients, first))


def _multiply(part: Tensor, factor: float) -> None:
    if factor != 1:
        part.mul_(factor)


class _Weighed:
    """Adds slices of bodies that are multiplied by their coefficients, in rank order, or hands them to the rule."""

    def __init__(self, push: Push, rule: Rule, coefficients: Tensor, first: int) -> None:
        self._push, self._first = push, first
        self._rule = rule if rule.then == "rows" else Mean()
        self._weights = coefficients[first:] if rule.then == "rows" else torch.ones(1)
        self._size = len(coefficients)

    def __call__(self, part: slice, rows: Tensor) -> None:
        if part.start < part.stop:
            rows = rows if len(rows) == 1 < self._size else rows[self._first :]
            self._rule(rows, self._weights.to(rows), self._push.message[part])
