"""The rules that combine each coordinate on its own, without sample weights.

A value that is not finite counts as faulty in its coordinate only. Contributions arrive slice by slice, and the result must not
depend on where a slice ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mpips.rules.protocol import Rule, RuleError


def ascending(rows: Sequence[Tensor], wanted: Sequence[int] | None = None) -> list[Tensor]:
    """Return n rows of `(len,)` values without NaN, each coordinate in ascending order.

    Uses Batcher's odd-even merge sort (1968): minima and maxima of whole rows are six times as fast as a sort per coordinate.

    Args:
        rows: the values; they stay as they are.
        wanted: the rows, by number, that are to be in their place; None for all. The others then hold any of the values.
    """
    rows = list(rows)
    for low, high, least, most in _exchanges(len(rows), tuple(range(len(rows)) if wanted is None else wanted)):
        pair = rows[low], rows[high]
        if least:
            rows[low] = torch.minimum(*pair)
        if most:
            rows[high] = torch.maximum(*pair)
    return rows


@lru_cache
def _exchanges(n: int, wanted: tuple[int, ...]) -> list[tuple[int, int, bool, bool]]:
    """Return the pairs of `_comparisons` that the wanted rows depend on, and which of a pair's minimum and maximum they do."""
    needed, found = set(wanted), []
    for low, high in reversed(_comparisons(n)):
        if (least := low in needed) | (most := high in needed):
            found.append((low, high, least, most))
            needed |= {low, high}
    return found[::-1]


@lru_cache
def _comparisons(n: int) -> list[tuple[int, int]]:
    """Return the compare-exchange pairs of Batcher's odd-even merge sort for n rows, in order."""
    found = []
    sizes = [1 << i for i in range(max(0, n - 1).bit_length())]
    for size in sizes:
        for step in [s for s in reversed(sizes) if s <= size]:
            for start in range(step % size, n - step, 2 * step):
                for low in range(start, min(start + step, n - step)):
                    if low // (2 * size) == (low + step) // (2 * size):
                        found.append((low, low + step))
    return found


def average(rows: list[Tensor]) -> Tensor:
    """Return the mean of `(len,)` rows, added in the order of the list."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total.div_(len(rows)) if len(rows) > 1 else total


def middle(rows: list[Tensor]) -> Tensor:
    """Return the median of `(len,)` rows in ascending order: for an even number of rows, the mean of the two middle rows."""
    n = len(rows)
    return torch.lerp(rows[n // 2 - 1], rows[n // 2], 0.5) if n % 2 == 0 else rows[n // 2]


class Coordinate(Rule):
    """The base class of rules that combine each coordinate on its own."""

    needs = "rows"

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine one slice of finite contributions, coordinate by coordinate; see `Rule`."""
        self.check(len(rows))
        out.copy_(self.combine(rows, 0))

    def nonfinite(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine one slice, in each coordinate the finite values; NaN where there is none. See `Rule`."""
        self.check(len(rows))
        out.copy_(self._finite(torch.stack(list(rows))))

    def combine(self, rows: Sequence[Tensor], missing: int) -> Tensor:
        """Combine n rows of finite values, `(len,)` each, to `(len,)`.

        Args:
            rows: the finite values; must not be changed.
            missing: the number of values that were left out of each coordinate because they were not finite.
        """
        raise NotImplementedError

    def _finite(self, values: Tensor) -> Tensor:
        """Combine `(n, len)` values to `(len,)`, leaving out what is not finite; NaN in a coordinate without finite values."""
        finite = values.isfinite()
        if finite.all():
            return self.combine(values.unbind(0), 0)
        result = torch.full_like(values[0], float("nan"))  # stays where no value is finite
        ordered = torch.stack(ascending(values.where(finite, torch.inf).unbind(0)))
        counts = (~finite).sum(0)
        for missing in counts.bincount().nonzero().flatten().tolist():
            if left := len(values) - missing:
                result[counts == missing] = self.combine(ordered[:left, counts == missing].unbind(0), missing)
        return result


class Median(Coordinate):
    """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

    def combine(self, rows: Sequence[Tensor], missing: int) -> Tensor:
        """Return the median of each coordinate; see `Coordinate`."""
        n = len(rows)
        return middle(ascending(rows, range((n - 1) // 2, n // 2 + 1)))


class TrimmedMean(Coordinate):
    """The coordinate-wise mean without the `num_byzantine` smallest and largest values (arXiv 1803.01498, definition 2)."""

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine

    def check(self, n: int) -> None:
        """Raise RuleError unless n is 1 or above 2 f, where f faulty contributions may be left; see `Rule`."""
        f = self.left(self.num_byzantine)
        if n > 1 and n <= 2 * f:
            raise RuleError(f"trimmed with robust.num_byzantine={f} needs more than {2 * f} contributions, {n} came")

    def combine(self, rows: Sequence[Tensor], missing: int) -> Tensor:
        """Return each coordinate's trimmed mean. Missing values count as trimmed. See `Coordinate`."""
        f = max(0, self.left(self.num_byzantine) - missing) if len(rows) > 1 else 0
        wanted = range(f, len(rows) - f)
        ordered = ascending(rows, wanted) if f else rows
        return average([ordered[k] for k in wanted])


class SignMajority(Coordinate):
    """The majority of the signs: 1, -1, or 0 if both are equally frequent (arXiv 1810.05291, algorithm 1).

    A single contribution becomes its sign. BatchNorm's statistics, whose signs are meaningless, are combined by the median.
    """

    def combine(self, rows: Sequence[Tensor], missing: int) -> Tensor:
        """Return the majority of the signs of each coordinate; see `Coordinate`."""
        return torch.stack([row.sign() for row in rows]).sum(0).sign_()

    def statistics(self) -> Rule:
        """Return the median: the signs of BatchNorm's statistics mean nothing. See `Rule`."""
        return Median()
