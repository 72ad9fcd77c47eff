"""Rules that look at one coordinate of all contributions at a time, unweighted.

A value that is not finite counts as faulty in its coordinate, and there alone: with contributions coming slice by slice, the
result must not depend on where one slice ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mpips.rules.protocol import Rule, RuleError

WIDTH = 1 << 14  # coordinates at a time on a CPU: copies then stay in its cache, and small beside a bucket


def strips(rows: Tensor) -> Iterator[slice]:
    """Slices of the columns of `(n, len)`, in which work on it is best done."""
    width = WIDTH if rows.device.type == "cpu" else max(1, rows.shape[1])
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


def by_coordinate(rows: Tensor, weights: Tensor, out: Tensor, combine: Callable[[Tensor], Tensor]) -> None:
    """Let `combine` turn contributions, divided by their weights, into one: `(n, len)`, in memory of their own, to `(len,)`.

    The other arguments are those of `Rule.__call__`.
    """
    here = weights > 0
    some, shares = not bool(here.all()), weights[here].to(rows.dtype).unsqueeze(1)
    for strip in strips(rows):
        values = rows[:, strip]
        out[strip] = combine((values[here] if some else values) / shares)


def ascending(values: Tensor) -> list[Tensor]:
    """`(n, len)` without NaN as n rows, each coordinate in ascending order.

    Batcher's odd-even merge sort (1968): minima and maxima of whole rows, six times as fast as a sort per coordinate.
    """
    rows = list(values.unbind(0))
    for low, high in _comparisons(len(rows)):
        rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    return rows


@lru_cache
def _comparisons(n: int) -> list[tuple[int, int]]:
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
    """The mean of `(len,)` rows, added in their order."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total.div_(len(rows)) if len(rows) > 1 else total


def middle(rows: list[Tensor]) -> Tensor:
    """The median of ascending `(len,)` rows; of an even number the mean of the two in the middle."""
    n = len(rows)
    return torch.lerp(rows[n // 2 - 1], rows[n // 2], 0.5) if n % 2 == 0 else rows[n // 2]


class Coordinate(Rule):
    """What the rules of this module share."""

    needs = "rows"

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `Rule`."""
        self.check(int((weights > 0).sum()))
        by_coordinate(rows, weights, out, self._finite)

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """Combine finite `(n, len)` values to `(len,)`; so many are missing, in each coordinate, that were not finite."""
        raise NotImplementedError

    def _finite(self, values: Tensor) -> Tensor:
        finite = values.isfinite()
        if finite.all():
            return self.combine(values, 0)
        result = torch.full_like(values[0], float("nan"))  # stays where no value is finite
        last = torch.stack(ascending(values.where(finite, torch.inf)))
        counts = (~finite).sum(0)
        for missing in counts.bincount().nonzero().flatten().tolist():
            if left := len(values) - missing:
                result[counts == missing] = self.combine(last[:left, counts == missing], missing)
        return result


class Median(Coordinate):
    """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """See `Coordinate`."""
        return middle(ascending(values))


class TrimmedMean(Coordinate):
    """The mean without the `num_byzantine` smallest and largest values of a coordinate (arXiv 1803.01498, definition 2)."""

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine

    def check(self, n: int) -> None:
        """See `Rule`."""
        bad = self.left(self.num_byzantine)
        if n > 1 and n <= 2 * bad:
            raise RuleError(f"trimmed with robust.num_byzantine={bad} needs more than {2 * bad} contributions, {n} came")

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """See `Coordinate`."""
        bad = max(0, self.left(self.num_byzantine) - missing) if len(values) > 1 else 0
        rows = ascending(values) if bad else list(values)
        return average(rows[bad : len(rows) - bad])


class SignMajority(Coordinate):
    """The sign that most contributions have: 1, -1, or 0 where there are as many of each (arXiv 1810.05291, algorithm 1).

    A single contribution becomes its sign. BatchNorm's statistics, which have no use for one, are combined by their median.
    """

    def combine(self, values: Tensor, missing: int) -> Tensor:
        """See `Coordinate`."""
        return values.sign_().sum(0).sign_()

    def statistics(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `Rule`."""
        Median()(rows, weights, out)
