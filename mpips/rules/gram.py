"""Rules for which inner products of whole contributions suffice; unweighted, but for the geometric median.

With G the Gram matrix of vectors x_i, z = sum(c_i x_i) and e_i a unit vector, |z - x_i|^2 = (c - e_i)' G (c - e_i): nothing
else is needed to find the coefficients. Where the c sum to 1, G may be of vectors measured from any point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpips.rules.coordinate import ascending, average, by_coordinate, middle
from mpips.rules.protocol import Needs, Rule, RuleError

TIE = 1e-9  # scores that differ by a smaller part are equal: rounding must not choose between twins


def squares(gram: Tensor) -> Tensor:
    """`(n, n)` squared distances between the vectors of a Gram matrix; what rounding made negative is 0."""
    norms = gram.diagonal()
    return (norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * gram).clamp_(min=0)


def distances_to(gram: Tensor, c: Tensor) -> Tensor:
    """`(n,)` distances of the vectors of a Gram matrix to the one with coefficients `c`; see the module."""
    ways = c - torch.eye(len(c), dtype=c.dtype)  # squared after the subtraction: exact near a vector, where it matters most
    return ((ways @ gram) * ways).sum(dim=1).clamp_(min=0).sqrt_()


def lowest(scores: Tensor) -> int:
    """The index of the lowest score; of equal ones the first, which is the lowest rank."""
    least = scores.min()
    return int((scores <= least + TIE * least.abs()).nonzero()[0])


def krum_scores(squared: Tensor, bad: int) -> Tensor:
    """For each vector the sum of its n - bad - 2 smallest squared distances to others (arXiv 1703.02757, section 4)."""
    others = squared.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : max(1, len(squared) - bad - 2)].sum(dim=1)


class Krum(Rule):
    """The one contribution that is nearest to its neighbours (Blanchard et al. 2017, arXiv 1703.02757)."""

    needs = "gram"
    name = "krum"

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine

    def check(self, n: int) -> None:
        """See `Rule`."""
        bad = self.left(self.num_byzantine)
        if 1 < n <= 2 * bad + 2:
            raise RuleError(f"{self.name} with robust.num_byzantine={bad} needs {2 * bad + 3} contributions, {n} came")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """See `Rule`."""
        n, bad = len(gram), self.left(self.num_byzantine)
        self.check(n)
        scores = krum_scores(squares(gram), bad)
        chosen = torch.zeros(n, dtype=torch.float64)
        for _ in range(self.picks(n, bad)):
            best = lowest(scores)
            chosen[best], scores[best] = 1, torch.inf
        return chosen / chosen.sum()

    def picks(self, n: int, bad: int) -> int:
        """How many of `n` are chosen."""
        return 1


class MultiKrum(Krum):
    """The mean of the n - bad contributions with the best scores of Krum (arXiv 1703.02757, section 5)."""

    name = "multikrum"

    def picks(self, n: int, bad: int) -> int:
        """See `Krum`."""
        return max(1, n - bad)


class Bulyan(Rule):
    """Krum chooses n - 2 bad contributions, one after another; then, in each coordinate, the mean of the n - 4 bad values
    nearest to their median (El Mhamdi et al. 2018, arXiv 1802.07927, section 4).

    At least one neighbour counts in a score: the last picks are made among fewer contributions than Krum's sum has terms for.
    """

    needs = "gram"
    then: Needs = "rows"

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine
        self._near = 1  # values whose mean is taken in each coordinate

    def check(self, n: int) -> None:
        """See `Rule`."""
        bad = self.left(self.num_byzantine)
        if 1 < n < 4 * bad + 3:
            raise RuleError(f"bulyan with robust.num_byzantine={bad} needs {4 * bad + 3} contributions, {n} came")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """See `Rule`; 1 for a contribution that is chosen."""
        n, bad = len(gram), self.left(self.num_byzantine)
        self.check(n)
        squared, left = squares(gram), list(range(n))
        for _ in range(max(1, n - 2 * bad)):
            del left[lowest(krum_scores(squared[left][:, left], bad))]
        self._near = max(1, n - 4 * bad)
        chosen = torch.ones(n, dtype=torch.float64)
        chosen[left] = 0
        return chosen

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `Rule`; the rows and the coefficients of `coefficients`."""
        by_coordinate(rows, weights, out, self._nearest)

    def _nearest(self, values: Tensor) -> Tensor:
        """The mean of the values nearest to the median, of two equally far the smaller first.

        In ascending order they lie side by side. The window moves up as long as the value above it is nearer than its lowest,
        which is so less and less: of two windows with the same farthest value it ends at that whose other values are nearer.
        """
        rows, near = ascending(values), self._near
        median, result = middle(rows), average(rows[:near])
        for start in range(1, len(rows) - near + 1):
            above, below = rows[start + near - 1] - median, median - rows[start - 1]
            result = average(rows[start : start + near]).where(above < below, result)
        return result


class GeometricMedian(Rule):
    """The point with the least weighted sum of distances, by smoothed Weiszfeld steps (RFA: Pillutla et al. 2022, arXiv
    1912.13445, algorithm 2): beta_i = alpha_i / max(nu, |z - x_i|), z = sum(beta_i x_i) / sum(beta_i); alpha are the weights.

    The first z is the mean of those contributions nearest to the most central one that have more than half of the weight. From
    the mean of all, a single one of 1e30 would cost more steps than anybody takes.
    """

    needs = "gram"

    def __init__(self, iterations: int = 8, nu: float = 1e-6) -> None:
        self.iterations, self.nu = iterations, nu

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """See `Rule`."""
        alpha = weights / weights.sum()
        c = self._start(squares(gram).sqrt_(), alpha)
        for _ in range(self.iterations):
            beta = alpha / distances_to(gram, c).clamp_(min=self.nu)
            c = beta / beta.sum()
        return c

    def _start(self, distances: Tensor, alpha: Tensor) -> Tensor:
        central = lowest(distances @ alpha)
        order = distances[central].argsort(stable=True)
        count = int((alpha[order].cumsum(0) <= 0.5).sum()) + 1
        c = torch.zeros_like(alpha)
        c[order[:count]] = alpha[order[:count]]
        return c / c.sum()


class CentredClipping(Rule):
    """From the last round's result v: v + sum((x_i - v) min(1, radius / |x_i - v|)) / n, iterated (Karimireddy et al. 2021,
    arXiv 2012.10333, section 3.3). The first v of a run is 0.

    A single contribution keeps its bits if it is no farther than the radius. BatchNorm's statistics do not start at v: they
    are averaged with what each contribution counted in the end.
    """

    needs = "gram"

    def __init__(self, clip_radius: float = 1.0, iterations: int = 8) -> None:
        self.clip_radius, self.iterations = clip_radius, iterations
        self._last: Tensor | None = None

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """See `Rule`."""
        c = torch.zeros_like(weights)
        for _ in range(self.iterations):
            far = distances_to(gram, c)
            shares = torch.where(far > self.clip_radius, self.clip_radius / far, 1.0) / len(c)
            c = c + shares - c * shares.sum()
        return c

    def origin(self, like: Tensor) -> Tensor:
        """See `Rule`."""
        if self._last is None:
            self._last = torch.zeros_like(like)
        self._last = self._last.to(like)
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {} if self._last is None else {"origin": self._last}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """See `Rule`."""
        self._last = tree.get("origin")
