"""The rules that combine each coordinate on its own, without sample weights.

A value that is not finite counts as faulty in its coordinate only. Contributions arrive slice by slice, and the result must not
depend on where a slice ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mpips.rules.protocol import Rule, RuleError

WIDTH = 1 << 14  # coordinates at a time on a CPU: copies stay in the cache and are small compared with a bucket


def strips(rows: Tensor) -> Iterator[slice]:
    """Yield slices of the columns of `rows`, `(n, len)`, of a width that keeps temporary copies small."""
    width = WIDTH if rows.device.type == "cpu" else max(1, rows.shape[1])
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


def by_coordinate(rows: Tensor, weights: Tensor, out: Tensor, combine: Callable[[Tensor], Tensor]) -> None:
    """Apply `combine` to the contributions divided by their weights, and write the result to `out`.

    Contributions of weight 0 are left out. `combine` receives `(n, len)` values, which it may change, and returns `(len,)`. The
    other arguments are those of `Rule.__call__`.
    """
    contributed = weights > 0
    partial, divisors = not bool(contributed.all()), weights[contributed].to(rows.dtype).unsqueeze(1)
    for strip in strips(rows):
        values = rows[:, strip]
        out[strip] = combine((values[contributed] if partial else values) / divisors)


def ascending(values: Tensor) -> list[Tensor]:
    """Return `(n, len)` values without NaN as n rows, each coordinate in ascending order.

    Uses Batcher's odd-even merge sort (1968): minima and maxima of whole rows are six times as fast as a sort per coordinate.
    """
    rows = list(values.unbind(0))
    for low, high in _comparisons(len(rows)):
        rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    return rows


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

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Combine one slice, coordinate by coordinate; see `Rule`."""
        self.check(int((weights > 0).sum()))
        by_coordinate(rows, weights, out, self._finite)

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """Combine finite values, `(n, len)`, to `(len,)`.

        Args:
            values: the finite values; may be changed.
            missing: the number of values that were left out of each coordinate because they were not finite.
        """
        raise NotImplementedError

    def _finite(self, values: Tensor) -> Tensor:
        """Combine `(n, len)` values to `(len,)`, leaving out what is not finite; NaN in a coordinate without finite values."""
        finite = values.isfinite()
        if finite.all():
            return self.combine(values, 0)
        result = torch.full_like(values[0], float("nan"))  # stays where no value is finite
        ordered = torch.stack(ascending(values.where(finite, torch.inf)))
        counts = (~finite).sum(0)
        for missing in counts.bincount().nonzero().flatten().tolist():
            if left := len(values) - missing:
                result[counts == missing] = self.combine(ordered[:left, counts == missing], missing)
        return result


class Median(Coordinate):
    """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """Return the median of each coordinate; see `Coordinate`."""
        return middle(ascending(values))


class TrimmedMean(Coordinate):
    """The coordinate-wise mean without the `num_byzantine` smallest and largest values (arXiv 1803.01498, definition 2)."""

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine

    def check(self, n: int) -> None:
        """Raise RuleError unless n is 1 or above 2 f, where f faulty contributions may be left; see `Rule`."""
        f = self.left(self.num_byzantine)
        if n > 1 and n <= 2 * f:
            raise RuleError(f"trimmed with robust.num_byzantine={f} needs more than {2 * f} contributions, {n} came")

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """Return each coordinate's trimmed mean. Missing values count as trimmed. See `Coordinate`."""
        f = max(0, self.left(self.num_byzantine) - missing) if len(values) > 1 else 0
        rows = ascending(values) if f else list(values)
        return average(rows[f : len(rows) - f])


class SignMajority(Coordinate):
    """The majority of the signs: 1, -1, or 0 if both are equally frequent (arXiv 1810.05291, algorithm 1).

    A single contribution becomes its sign. BatchNorm's statistics, whose signs are meaningless, are combined by the median.
    """

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """Return the majority of the signs of each coordinate; see `Coordinate`."""
        return values.sign_().sum(0).sign_()

    def statistics(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Combine BatchNorm's statistics by their median; see `Rule`."""
        Median()(rows, weights, out)
