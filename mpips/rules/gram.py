"""The rules that need only inner products of whole contributions; unweighted, except for the geometric median.

With G the Gram matrix of vectors x_i, z = sum(c_i x_i) and e_i a unit vector, |z - x_i|^2 = (c - e_i)' G (c - e_i). So G
suffices to compute the coefficients c. If the c sum to 1, the x_i in G may be measured from any point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpips.rules.coordinate import ascending, average, middle
from mpips.rules.protocol import Needs, Rule, RuleError

TIE = 1e-9  # relative difference below which scores are equal: rounding must not choose between equal contributions


def squares(gram: Tensor) -> Tensor:
    """Return the `(n, n)` squared distances between the vectors of a Gram matrix; negative rounding errors become 0."""
    norms = gram.diagonal()
    return (norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * gram).clamp_(min=0)


def distances_to(gram: Tensor, c: Tensor) -> Tensor:
    """Return the `(n,)` distances of the vectors of a Gram matrix to sum(c_i x_i), by the module's formula."""
    differences = c - torch.eye(len(c), dtype=c.dtype)  # subtract, then square: exact near a vector, where it matters most
    return ((differences @ gram) * differences).sum(dim=1).clamp_(min=0).sqrt_()


def lowest(scores: Tensor) -> int:
    """Return the index of the lowest score; of equal scores the first, which is the lowest rank."""
    least = scores.min()
    return int((scores <= least + TIE * least.abs()).nonzero()[0])


def krum_scores(squared: Tensor, f: int) -> Tensor:
    """Return for each vector the sum of its n - f - 2 smallest squared distances to others (arXiv 1703.02757, section 4)."""
    others = squared.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : max(1, len(squared) - f - 2)].sum(dim=1)


class Krum(Rule):
    """The single contribution that is nearest to its neighbours (Blanchard et al. 2017, arXiv 1703.02757)."""

    needs = "gram"
    name = "krum"

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine

    def check(self, n: int) -> None:
        """Raise RuleError unless n is 1 or above 2 f + 2, where f faulty contributions may be left; see `Rule`."""
        f = self.left(self.num_byzantine)
        if 1 < n <= 2 * f + 2:
            raise RuleError(f"{self.name} with robust.num_byzantine={f} needs {2 * f + 3} contributions, {n} came")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return 1 / m for the m contributions with the best scores, and 0 for the others; see `Rule`."""
        n, f = len(gram), self.left(self.num_byzantine)
        self.check(n)
        scores = krum_scores(squares(gram), f)
        chosen = torch.zeros(n, dtype=torch.float64)
        for _ in range(self.picks(n, f)):
            best = lowest(scores)
            chosen[best], scores[best] = 1, torch.inf
        return chosen / chosen.sum()

    def picks(self, n: int, f: int) -> int:
        """Return how many of `n` contributions are chosen, with `f` faulty ones assumed."""
        return 1


class MultiKrum(Krum):
    """The mean of the n - f contributions with the best Krum scores (arXiv 1703.02757, section 5)."""

    name = "multikrum"

    def picks(self, n: int, f: int) -> int:
        """Return n - f; see `Krum`."""
        return max(1, n - f)


class Bulyan(Rule):
    """Krum's selection, averaged around the median (El Mhamdi et al. 2018, arXiv 1802.07927, section 4).

    Krum selects n - 2 f contributions, one after another. The result in each coordinate is the mean of the n - 4 f selected
    values nearest to their median. A score counts at least one neighbour: the last selections are made among fewer
    contributions than the number of terms in Krum's sum.
    """

    needs = "gram"
    then: Needs = "rows"

    def __init__(self, num_byzantine: int = 1) -> None:
        self.num_byzantine = num_byzantine
        self._near = 1  # how many values are averaged in each coordinate

    def check(self, n: int) -> None:
        """Raise RuleError unless n is 1 or at least 4 f + 3, where f faulty contributions may be left; see `Rule`."""
        f = self.left(self.num_byzantine)
        if 1 < n < 4 * f + 3:
            raise RuleError(f"bulyan with robust.num_byzantine={f} needs {4 * f + 3} contributions, {n} came")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return 1 for each contribution that Krum selects, else 0; see `Rule`."""
        n, f = len(gram), self.left(self.num_byzantine)
        self.check(n)
        squared, left = squares(gram), list(range(n))
        for _ in range(max(1, n - 2 * f)):
            del left[lowest(krum_scores(squared[left][:, left], f))]
        self._near = max(1, n - 4 * f)
        chosen = torch.ones(n, dtype=torch.float64)
        chosen[left] = 0
        return chosen

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine the selected rows around their median; see `Rule`."""
        out.copy_(self._nearest(rows))

    def _nearest(self, given: Sequence[Tensor]) -> Tensor:
        """Return the mean of the `self._near` values nearest to the median; of two equally distant values the smaller is taken.

        These values are adjacent in ascending order, so a window of that width moves up while the value above it is nearer to
        the median than its lowest value. Once that fails it fails for all later windows. If two windows share their most
        distant value, the last accepted window has the nearer other values.
        """
        rows, near = ascending(given), self._near
        median, result = middle(rows), average(rows[:near])
        for start in range(1, len(rows) - near + 1):
            above, below = rows[start + near - 1] - median, median - rows[start - 1]
            result = average(rows[start : start + near]).where(above < below, result)
        return result


class GeometricMedian(Rule):
    """The geometric median, by smoothed Weiszfeld iterations (RFA: Pillutla et al. 2022, arXiv 1912.13445, algorithm 2).

    beta_i = alpha_i / max(nu, |z - x_i|), z = sum(beta_i x_i) / sum(beta_i), where alpha are the normalised weights. The first
    z is the weighted mean of the contributions nearest to the most central one, as many as hold more than half of the weight.
    Starting from the mean of all, one contribution of size 1e30 would need more iterations than are done.
    """

    needs = "gram"

    def __init__(self, iterations: int = 8, nu: float = 1e-6) -> None:
        self.iterations, self.nu = iterations, nu

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return beta after the last iteration, normalised to sum 1; see `Rule`."""
        alpha = weights / weights.sum()
        c = self._start(squares(gram).sqrt_(), alpha)
        for _ in range(self.iterations):
            beta = alpha / distances_to(gram, c).clamp_(min=self.nu)
            c = beta / beta.sum()
        return c

    def _start(self, distances: Tensor, alpha: Tensor) -> Tensor:
        """Return the coefficients of the first z; see the class."""
        central = lowest(distances @ alpha)
        order = distances[central].argsort(stable=True)
        count = int((alpha[order].cumsum(0) <= 0.5).sum()) + 1
        c = torch.zeros_like(alpha)
        c[order[:count]] = alpha[order[:count]]
        return c / c.sum()


class CentredClipping(Rule):
    """The previous result v, moved by clipped differences (Karimireddy et al. 2021, arXiv 2012.10333, section 3.3).

    v <- v + sum((x_i - v) min(1, radius / |x_i - v|)) / n, iterated. The first v of a run is 0. A single contribution within
    the radius of v keeps its bits. BatchNorm's statistics do not start at v: their mean is weighted by the final coefficients.
    """

    needs = "gram"

    def __init__(self, clip_radius: float = 1.0, iterations: int = 8) -> None:
        self.clip_radius, self.iterations = clip_radius, iterations
        self._last: Tensor | None = None

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return each contribution's coefficient after the last iteration; v itself has the remaining 1 - sum. See `Rule`."""
        c = torch.zeros_like(weights)
        for _ in range(self.iterations):
            distances = distances_to(gram, c)
            shares = torch.where(distances > self.clip_radius, self.clip_radius / distances, 1.0) / len(c)
            c = c + shares - c * shares.sum()
        return c

    def origin(self, like: Tensor) -> Tensor:
        """Return v, the previous result; zeros at first. See `Rule`."""
        if self._last is None:
            self._last = torch.zeros_like(like)
        self._last = self._last.to(like)
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """Return v, if there is one; see `Rule`."""
        return {} if self._last is None else {"origin": self._last}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Restore v; see `Rule`."""
        self._last = tree.get("origin")
