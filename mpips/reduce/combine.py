"""The combination of contributions slice by slice: the one place where a rule is called.

Slices come from messages or from shared memory, as a row for each rank or as one sum. The rule does not see the difference: it
is called with the contributions themselves, or with their weighted sum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.comm.peer_buffers import Rows
from mpips.model.finite import Values, all_finite, is_finite
from mpips.model.message import BAD, SAMPLES, WEIGHT, Push
from mpips.rules import Rule, RuleError

Terms = list[tuple[int, float]]  # the index and the factor of each row that counts

HUGE = 1e300  # larger squares count as infinite, as the sum of a few would be
STRIP = 1 << 14  # elements with which a rule is called on a CPU, so that its intermediate results stay in the cache
warnings.filterwarnings("ignore", category=RuntimeWarning, module=__name__.replace(".", r"\."))  # overflows are checked here


class Combiner:
    """Combines the contributions of a round, slice by slice; used for one round after another.

    Args:
        push: a push message; `push.heard` holds the sum of all tails before the first slice of a round is combined.
        rule: the rule.
        first: the rank of the first worker.
        rounded: whether the product of a contribution and its weight is rounded before it is added. A rank that multiplies its
            own contribution rounds it, so this gives the same bits.

    Attributes:
        faulty: the indices of the rows in which a rule that needs rows has met a NaN or Inf.
        refused: why the rule cannot combine the contributions of this round; else "".
    """

    def __init__(self, push: Push, rule: Rule, first: int, rounded: bool = False) -> None:
        self._push, self._rule, self._first, self._rounded = push, rule, first, rounded
        self._statistics = rule.statistics()
        self._behind_from = push.gradients.numel()
        self._seen: list[float] | None = None  # the weights of the present terms, if these may be reused
        self.begin()

    def begin(self, coefficients: Tensor | None = None, weights: Callable[[], list[float]] | None = None) -> None:
        """Begin a round, or the second pass of one.

        Args:
            coefficients: `(rows,)` float64, the factors that the rule has chosen for the contributions; None if it chooses
                none.
            weights: returns the weight of each row, called at the first slice; None if the rows are those of all ranks.
        """
        self.faulty: set[int] = set()
        self.refused = ""
        self._begun, self._coefficients, self._given = False, coefficients, weights

    def _begin(self) -> None:
        """Compute the factor of each row, at the first slice of a round."""
        self._begun = True
        weights = self._given() if self._given else self._push.heard.weights()
        if weights == self._seen:
            return
        push, coefficients = self._push, self._coefficients
        self._seen = weights if coefficients is None and not self._given else None
        self._weights = weights
        self._whole: float | None = None
        self._plain = False  # whether the sum is that of all rows as they are
        counted: Terms = [(k, weight) for k, weight in enumerate(weights) if weight]
        if coefficients is None:
            alike = push.raw and not self._rounded and not self._given and len({weight for _, weight in counted}) <= 1
            self._behind: Terms = [(k, 1.0) for k, _ in counted]  # statistics are multiplied by their weight already
            self._terms: Terms = counted if push.raw and not alike else self._behind
            self._divisor = float(len(counted)) if alike else None
            self._plain = self._terms == self._behind and 1 < len(counted) == len(weights)
            return
        chosen = [(k, c) for k, c in enumerate(coefficients.tolist()) if c and weights[k]]
        whole = sum(c for _, c in chosen) or 1.0
        self._terms = [(k, c if push.raw else c / weights[k]) for k, c in chosen]
        self._behind = [(k, c / whole / weights[k]) for k, c in chosen]

    def terms(self, part: slice) -> Terms:
        """Return the rows that count in one slice, of gradients or of statistics, with their factors."""
        return self._behind if part.start >= self._behind_from else self._terms

    def add(self, part: slice, rows: Sequence[Tensor]) -> Values:
        """Return the weighted sum of one slice's rows, in the memory of the first row."""
        if not self._begun:
            self._begin()
        if self._plain and isinstance(rows, Rows) and rows.arrays:
            return add_arrays(rows.arrays)
        return add_up(rows, self.terms(part), self._rounded)

    def sum(self, part: slice, total: Tensor, out: Tensor) -> None:
        """Combine one slice, of gradients or of statistics, given the weighted sum of all contributions.

        Args:
            part: the slice of the push message's body.
            total: `(len,)`, the sum.
            out: `(len,)`, the result; may be `total`.
        """
        if not self._begun:
            self._begin()
        if self._coefficients is not None:
            if out.data_ptr() != total.data_ptr():
                out.copy_(total)
            return
        behind = part.start >= self._behind_from
        if self._whole is None:  # summed in the order of a Reduce of rows, as weights need not be integers
            self._whole = float(self._push.heard.rows[self._first :, WEIGHT].sum())
        if divisor := self._whole if behind or self._divisor is None else self._divisor:
            (self._statistics if behind else self._rule)((total,), (divisor,), out)

    def rows(self, part: slice, rows: Sequence[Tensor], out: Tensor) -> bool:
        """Combine one slice, of gradients or of statistics, given a row for each rank.

        Args:
            part: the slice of the push message's body.
            rows: `(len,)` each, in rank order; rows of weight 0 may hold anything.
            out: `(len,)`, the result; may be one of the rows.

        Returns:
            Whether `out` has been written: not if no row counts, or the rule refuses.
        """
        if not self._begun:
            self._begin()
            if self._rule.needs != "sum":
                self._rule.faulty = reported(self._push)
        if self.refused:
            return False
        behind = part.start >= self._behind_from
        terms = self.terms(part)
        if not terms:
            return False
        if self._rule.needs == "sum" or (self._coefficients is not None and self._rule.then == "sum"):
            self.add(part, rows)
            self.sum(part, rows[0], out)
        else:
            self._by_rows(rows, [k for k, _ in terms], out, behind)
        return not self.refused

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
        """Set `refused`, on a rank that combines no slice of this round."""
        self.rows(slice(0, 0), [self._push.message[:0]] * len(self._push.heard.rows), self._push.message[:0])


class Gram:
    """The inner products of all contributions, in float64, summed slice by slice.

    The contributions are measured from the rule's origin. Without one, those of a slice are measured from the contribution of
    median norm. That one is honest, or as short as an honest one, so the products stay as small as the differences that matter.

    Args:
        push, rule: as in `Combiner`.
        size: the number of rows.

    Attributes:
        matrix: `(size, size)` float64; zero for rows that do not count.
        faulty: `(size,)`, whether the row's statistics hold a NaN or Inf.
        origin: the rule's origin; None if it has none, or before the first slice.
        called: whether a slice has been added.
    """

    def __init__(self, push: Push, rule: Rule, size: int) -> None:
        self._push, self._rule = push, rule
        self.matrix = push.message.new_zeros((size, size), dtype=torch.float64)
        self.faulty = torch.zeros(size, dtype=torch.bool)
        self.origin: Tensor | None = None
        self.called = False
        self._strip = self.matrix[:0]  # a buffer for a strip in float64

    def add(self, part: slice, rows: Sequence[Tensor]) -> None:
        """Add the products of one slice of gradients; of a slice of statistics, only check that it is finite."""
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
            values = self._strip_buffer(len(far), len(point))
            for value, k in zip(values, far, strict=True):
                torch.sub(self._plain(rows[k][strip], weights[k]), point, out=value)
            products.addmm_(values, values.T)
        index = torch.tensor(far, device=self.matrix.device, dtype=torch.int64)
        self.matrix[index.unsqueeze(1), index] += products

    def _strip_buffer(self, rows: int, length: int) -> Tensor:
        """Return a float64 buffer of shape `(rows, length)`."""
        if self._strip.shape[0] < rows or self._strip.shape[1] < length:
            self._strip = self.matrix.new_empty((rows, length))
        return self._strip[:rows, :length]

    def _plain(self, row: Tensor, weight: float) -> Tensor:
        """Return the contribution in a row, without its weight."""
        return row if self._push.raw else row.double() / weight

    def _medium(self, rows: Sequence[Tensor], here: list[int], weights: list[float]) -> int:
        """Return the index in `here` of the finite contribution of median norm."""
        lengths = [_square(rows[k]) / (1.0 if self._push.raw else weights[k] ** 2) for k in here]
        finite = sorted((length, number) for number, length in enumerate(lengths) if length < HUGE)
        if not finite:
            self.matrix[here[0], here[0]] = math.nan
        return finite[(len(finite) - 1) // 2][1] if finite else 0

    def usable(self) -> Tensor:
        """Return which contributions are finite, of shape `(size,)`; called after the last slice."""
        return ~self.faulty & (self.matrix.diagonal().cpu() <= HUGE)  # False for NaN


def coefficients(push: Push, rule: Rule, matrix: Tensor, usable: Tensor) -> tuple[Tensor, list[int], str]:
    """Let a rule that needs inner products choose the coefficients.

    Args:
        push: as in `Combiner`.
        rule: the rule.
        matrix: `(rows, rows)` float64 on the CPU, the Gram matrix.
        usable: `(rows,)`, which contributions are finite.

    Returns:
        The coefficients, `(rows,)` float64, all 0 if the rule refuses; the rows that are not finite; and why the rule refuses,
        else "".
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
    """Let the rule prepare this rank's contribution before it is combined with others; drop it if the rule rejects it."""
    if not rule.prepares:
        return
    weight = push.weight(rank)
    if weight > 0 and not rule.prepare(push.gradients, 1.0 if push.raw else weight):
        push.body.zero_()
        push.rows[rank, WEIGHT] = 0


def left_out(rows: Tensor, rule: Rule) -> set[int]:
    """Return the ranks whose contribution the rule has rejected in `prepare`, given the summed rows of the tail."""
    if not rule.prepares:
        return set()
    return set(((rows[:, SAMPLES] > 0) & (rows[:, WEIGHT] == 0)).nonzero().flatten().tolist())


def reported(push: Push) -> int:
    """Return how many ranks have reported that their contribution is not finite."""
    return int((push.heard.rows[:, BAD] > 0).sum())


def _square(row: Tensor) -> float:
    """Return the squared norm of a row."""
    square = float(torch.dot(row, row))
    return square if math.isfinite(square) else float(torch.linalg.vector_norm(row, dtype=torch.float64)) ** 2


def add_up(rows: Sequence[Tensor], terms: Terms, rounded: bool = False) -> Tensor:
    """Return the sum of the rows times their factors, in the order of the terms, in the memory of the first row.

    Args:
        rows: `(len,)` each.
        terms: the rows that count, with their factors.
        rounded: whether a product is rounded before it is added; else both may be one operation.
    """
    out = rows[0]
    if not terms:
        return out.zero_()
    (k, factor), *more = terms
    if factor != 1:
        torch.mul(rows[k], factor, out=out)
    elif k:
        out.copy_(rows[k])
    for k, factor in more:
        if rounded and factor != 1:
            out.add_(rows[k] * factor)
        else:
            out.add_(rows[k], alpha=factor)
    return out


def add_arrays(rows: Sequence[Any]) -> Any:
    """Return the sum of few elements of each row, numpy arrays, in the memory of the first row; the bits are those of `add_up`.

    numpy's calls begin in a tenth of the time of torch's.
    """
    first, *others = rows
    for other in others:
        np.add(first, other, out=first)
    return first


def strips(like: Tensor) -> Iterator[slice]:
    """Yield the slices of `(len,)` by which a rule is called."""
    width = STRIP if like.device.type == "cpu" else max(1, len(like))
    return (slice(start, start + width) for start in range(0, max(1, len(like)), width))
