"""The combination of contributions, slice by slice: the one place where a rule is called.

Slices come from messages or from shared memory, as a row for each rank or as one sum. A rule sees none of that: it is called
with the contributions themselves, or with their weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mpips.model.message import BAD, SAMPLES, WEIGHT, Push
from mpips.reduce.kernels import Terms, Total, add_up, is_finite
from mpips.rules import Rule, RuleError

HUGE = 1e300  # a larger square is as good as infinite: sums of a few of them would be
STRIP = 1 << 14  # elements that a rule is given at a time on a CPU: what it makes of them stays in the cache


class Combiner:
    """Combines the contributions of one round after another.

    Args:
        push: a push message; the sum of all tails is in `push.heard` before the first slice of a round is combined.
        rule: the rule.
        first: the rank of the first worker.
        rounded: whether each product of a contribution and its weight is rounded before it is added. A rank that multiplies
            its own contribution does that; so the bits are the same.

    Attributes:
        faulty: the rows, by number, in which a rule that needs rows has met a NaN or Inf.
        refused: why the rule cannot combine the contributions of this round; else "".
    """

    def __init__(self, push: Push, rule: Rule, first: int, rounded: bool = False) -> None:
        self._push, self._rule, self._first, self._rounded = push, rule, first, rounded
        self._statistics = rule.statistics()
        self._behind_from = push.gradients.numel()
        self._seen: list[float] | None = None  # the weights that the terms were made of, if they may be used again
        self.begin()

    def begin(self, coefficients: Tensor | None = None, weights: Callable[[], list[float]] | None = None) -> None:
        """Begin a round, or the second half of one.

        Args:
            coefficients: `(rows,)` float64, what the rule multiplies each contribution by; None where it has not said so.
            weights: gives the weight of each row, if these are not the rows of all ranks, when the first slice comes; None if
                they are.
        """
        self.faulty: set[int] = set()
        self.refused = ""
        self._begun, self._coefficients, self._given = False, coefficients, weights

    def _begin(self) -> None:
        """Choose the factor of each row, when the first slice of a round comes."""
        self._begun = True
        weights = self._given() if self._given else self._push.heard.weights()
        if weights == self._seen:
            return
        push, coefficients = self._push, self._coefficients
        self._seen = weights if coefficients is None and not self._given else None
        self._weights = weights
        self._whole: float | None = None
        counted: Terms = [(k, weight) for k, weight in enumerate(weights) if weight]
        if coefficients is None:
            alike = push.raw and not self._rounded and not self._given and len({weight for _, weight in counted}) <= 1
            self._behind: Terms = [(k, 1.0) for k, _ in counted]  # statistics are multiplied by their weight already
            self._terms: Terms = counted if push.raw and not alike else self._behind
            self._divisor = float(len(counted)) if alike else None
            return
        chosen = [(k, c) for k, c in enumerate(coefficients.tolist()) if c and weights[k]]
        whole = sum(c for _, c in chosen) or 1.0
        self._terms = [(k, c if push.raw else c / weights[k]) for k, c in chosen]
        self._behind = [(k, c / whole / weights[k]) for k, c in chosen]

    def terms(self, part: slice) -> Terms:
        """Return which rows count in one slice of gradients, or of statistics, and their factors."""
        return self._behind if part.start >= self._behind_from else self._terms

    def add(self, part: slice, rows: Sequence[Tensor]) -> Total:
        """Return the weighted sum of the rows of one slice, in the memory of the first row."""
        if not self._begun:
            self._begin()
        return add_up(rows, self.terms(part), self._rounded)

    def sum(self, part: slice, total: Tensor, out: Tensor) -> None:
        """Combine one slice of gradients, or one of statistics, given the weighted sum of all contributions.

        Args:
            part: the slice of the push message's body.
            total: `(len,)`, the sum.
            out: `(len,)`; may be `total`.
        """
        if not self._begun:
            self._begin()
        if self._coefficients is not None:
            if out.data_ptr() != total.data_ptr():
                out.copy_(total)
            return
        behind = part.start >= self._behind_from
        if self._whole is None:  # added up as a Reduce of rows does: weights may be no whole numbers
            self._whole = float(self._push.heard.rows[self._first :, WEIGHT].sum())
        if divisor := self._whole if behind or self._divisor is None else self._divisor:
            (self._statistics if behind else self._rule)((total,), (divisor,), out)

    def rows(self, part: slice, rows: Sequence[Tensor], out: Tensor) -> None:
        """Combine one slice of gradients, or one of statistics, given a row for each rank.

        Args:
            part: the slice of the push message's body.
            rows: `(len,)` each, in rank order; those of weight 0 may hold anything.
            out: `(len,)`; may be one of the rows.
        """
        if not self._begun:
            self._begin()
            self._rule.faulty = reported(self._push)
        if self.refused:
            return
        behind = part.start >= self._behind_from
        terms = self.terms(part)
        if not terms:
            return
        if self._rule.needs == "sum" or (self._coefficients is not None and self._rule.then == "sum"):
            self.add(part, rows)
            self.sum(part, rows[0], out)
        else:
            self._by_rows(rows, [k for k, _ in terms], out, behind)

    def _by_rows(self, rows: Sequence[Tensor], numbers: list[int], out: Tensor, behind: bool) -> None:
        rule, scaled = self._statistics if behind else self._rule, behind or not self._push.raw
        weights = [self._weights[k] for k in numbers]
        try:
            for strip in strips(out):
                given = [rows[k][strip] for k in numbers]
                if scaled:
                    given = [row / weight for row, weight in zip(given, weights, strict=True)]
                faulty = {k for k, row in zip(numbers, given, strict=True) if not (is_finite(row) or all_finite(row))}
                self.faulty |= faulty
                (rule.nonfinite if faulty else rule)(given, weights, out[strip])
        except RuleError as error:
            self.refused = str(error)

    def ask(self) -> None:
        """Find out whether the rule refuses this round's contributions, on a rank that combines no slice of them."""
        self.rows(slice(0, 0), [self._push.message[:0]] * len(self._push.heard.rows), self._push.message[:0])


class Gram:
    """The inner products of all contributions, in float64, slice by slice.

    They are measured from the rule's origin. Without one, those of a slice are measured from its contribution of medium length.
    That is an honest one, or as short as one, so the products stay as small as the differences that matter.

    Args:
        push, rule: as `Combiner` has them.
        size: the number of rows.

    Attributes:
        matrix: `(size, size)` float64; of rows that do not count, zero.
        faulty: `(size,)`, the rows whose statistics hold a NaN or Inf.
        origin: the rule's; None where it has none, or no slice has come.
        called: whether a slice has come.
    """

    def __init__(self, push: Push, rule: Rule, size: int) -> None:
        self._push, self._rule = push, rule
        self.matrix = push.message.new_zeros((size, size), dtype=torch.float64)
        self.faulty = torch.zeros(size, dtype=torch.bool)
        self.origin: Tensor | None = None
        self.called = False
        self._room = self.matrix[:0]  # for a strip in float64

    def add(self, part: slice, rows: Sequence[Tensor]) -> None:
        """Add the products of one slice of gradients; or look whether one of statistics is finite."""
        push = self._push
        if not self.called:
            self.called, self.origin = True, self._rule.origin(push.gradients)
        weights = push.heard.weights()
        here = [k for k, weight in enumerate(weights) if weight > 0]
        if part.start >= push.gradients.numel():
            self.faulty[[k for k in here if not all_finite(rows[k])]] = True
            return
        if not here:
            return
        origin = self.origin[part] if self.origin is not None else None
        centre = self._medium(rows, here, weights) if origin is None else -1
        far = [k for number, k in enumerate(here) if number != centre]  # the products with the centre are 0
        products = torch.zeros_like(self.matrix[: len(far), : len(far)])
        for strip in strips(rows[0]):
            point = self._plain(rows[here[centre]][strip], weights[here[centre]]) if origin is None else origin[strip]
            values = self._room_for(len(far), len(point))
            for value, k in zip(values, far, strict=True):
                torch.sub(self._plain(rows[k][strip], weights[k]), point, out=value)
            products.addmm_(values, values.T)
        index = torch.tensor(far, device=self.matrix.device, dtype=torch.int64)
        self.matrix[index.unsqueeze(1), index] += products

    def _room_for(self, rows: int, length: int) -> Tensor:
        """`(rows, length)` float64, to be overwritten."""
        if self._room.shape[0] < rows or self._room.shape[1] < length:
            self._room = self.matrix.new_empty((rows, length))
        return self._room[:rows, :length]

    def _plain(self, row: Tensor, weight: float) -> Tensor:
        """The contribution in a row."""
        return row if self._push.raw else row.double() / weight

    def _medium(self, rows: Sequence[Tensor], here: list[int], weights: list[float]) -> int:
        """Which of the contributions that count is of medium length among those that are finite."""
        lengths = [_square(rows[k]) / (1.0 if self._push.raw else weights[k] ** 2) for k in here]
        finite = sorted((length, number) for number, length in enumerate(lengths) if length < HUGE)
        if not finite:
            self.matrix[here[0], here[0]] = math.nan
        return finite[(len(finite) - 1) // 2][1] if finite else 0

    def usable(self) -> Tensor:
        """`(size,)`, which contributions are finite; call once all slices have come."""
        return ~self.faulty & (self.matrix.diagonal().cpu() <= HUGE)  # False for NaN


def coefficients(push: Push, rule: Rule, matrix: Tensor, usable: Tensor) -> tuple[Tensor, list[int], str]:
    """Let a rule that needs inner products choose the coefficients.

    Args:
        push, rule: as `Combiner` has them.
        matrix: `(rows, rows)` float64 on the CPU.
        usable: `(rows,)`, which contributions are finite.

    Returns:
        `(rows,)` float64, all 0 where the rule refuses; the rows that are not finite; and why it refuses, else "".
    """
    weights = push.heard.rows[:, WEIGHT].double().cpu()
    good, faulty = usable & (weights > 0), (~usable & (weights > 0)).nonzero().flatten().tolist()
    found = torch.zeros(len(weights), dtype=torch.float64)
    if not good.any():
        return found, faulty, "no contribution is finite" if faulty else ""
    rule.faulty = len(faulty) + reported(push)
    try:
        found[good] = rule.coefficients(matrix[good][:, good], weights[good])
    except RuleError as error:
        return found, faulty, str(error)
    return found, faulty, ""


def prepare(rank: int, push: Push, rule: Rule) -> None:
    """Let the rule see this rank's contribution before it is brought together with others."""
    weight = float(push.rows[rank, WEIGHT])
    if weight > 0 and not rule.prepare(push.gradients, 1.0 if push.raw else weight):
        push.body.zero_()
        push.rows[rank, WEIGHT] = 0


def left_out(rows: Tensor, rule: Rule) -> set[int]:
    """Return the ranks, by the summed rows of the tail, that the rule made leave themselves out when it prepared theirs."""
    if type(rule).prepare is Rule.prepare:
        return set()
    return set(((rows[:, SAMPLES] > 0) & (rows[:, WEIGHT] == 0)).nonzero().flatten().tolist())


def reported(push: Push) -> int:
    """Return how many ranks have left themselves out because their contribution is not finite."""
    return int((push.heard.rows[:, BAD] > 0).sum())


def _square(row: Tensor) -> float:
    """The square of a row's norm."""
    square = float(torch.dot(row, row))
    return square if math.isfinite(square) else float(torch.linalg.vector_norm(row, dtype=torch.float64)) ** 2


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is a NaN or Inf."""
    return bool(tensor.isfinite().all())


def strips(like: Tensor) -> Iterator[slice]:
    """Yield the slices of `(len,)` in which a rule is given rows."""
    width = STRIP if like.device.type == "cpu" else max(1, len(like))
    return (slice(start, start + width) for start in range(0, max(1, len(like)), width))
