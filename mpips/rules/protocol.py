"""The interface of an aggregation rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

Needs = Literal["sum", "rows"]  # what a communicator can bring: the sum over ranks, or a row for each rank


class RuleError(ValueError):
    """Contributions that a rule cannot combine: there are too few to tolerate the assumed number of faulty ones."""


class Rule:
    """The base class of all aggregation rules. It has defaults for everything except the combination itself.

    A contribution of weight 0 does not count. A single contribution is returned bit for bit, unless the rule's docstring says
    otherwise.

    Attributes:
        needs: "sum" if the sum over ranks suffices, "rows" if the rule needs every rank's value of a coordinate. In both cases
            the rule itself is called. "gram" if inner products of whole contributions suffice: `coefficients` is called, and
            the result is the sum of the contributions multiplied by their coefficients.
        then: "rows" for a rule that needs "gram" and is afterwards called with the rows that `coefficients` has selected.
        faulty: the number of contributions of this round that were left out because of a NaN or Inf. Set before a rule that
            needs "rows" or "gram" is called.
    """

    needs: Literal["sum", "rows", "gram"]
    then: Needs = "sum"
    faulty: int = 0

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine one slice of the flat buffer.

        Args:
            rows: `(len,)` each, the contributions in rank order, which must not be changed; those of weight 0 are not among
                them. A rule that needs rows is given finite ones. A rule that needs only the sum is given one row, the sum of
                the contributions times their weights. After `coefficients`, the rows are those with a coefficient other than 0.
            weights: the weight of each row, above 0; the sum of the weights, if there is one row that is the sum.
            out: `(len,)`, receives the result; may be one of the rows.

        Raises:
            RuleError: see `check`.
        """
        raise NotImplementedError

    def nonfinite(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine one slice in which some row holds a NaN or Inf; see `__call__`."""
        self(rows, weights, out)

    def statistics(self) -> Rule:
        """Return the rule for BatchNorm's statistics, which lie behind the gradients."""
        return self

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficient of each contribution in the result.

        Args:
            gram: `(n, n)` float64 on the CPU, the inner products of the contributions, measured from `origin`. If `origin` is
                None, the products are measured from an unspecified point near the contributions, so only differences between
                contributions are meaningful.
            weights: `(n,)` float64, above 0.

        Returns:
            `(n,)` float64.

        Raises:
            RuleError: see `check`.
        """
        raise NotImplementedError

    def origin(self, like: Tensor) -> Tensor | None:
        """Return the point that contributions are measured from, `(len,)` like `like`, or None.

        The result is sum(c_i x_i) + (1 - sum(c_i)) origin. The tensor belongs to the rule. The caller sets it to the result of
        each round, unless that is not finite.
        """
        return None

    def prepare(self, contribution: Tensor, weight: float) -> bool:
        """Prepare this rank's contribution before anything is sent. Called on each rank that contributes.

        Args:
            contribution: `(len,)`, this rank's contribution, multiplied by `weight`. May be changed in place.
            weight: above 0.

        Returns:
            False to leave the contribution out.
        """
        return True

    @property
    def prepares(self) -> bool:
        """Whether the rule has a `prepare` of its own."""
        return type(self).prepare is not Rule.prepare

    def check(self, n: int) -> None:
        """Raise RuleError if the rule cannot combine `n` finite contributions. A single contribution is always accepted."""

    def left(self, bad: int) -> int:
        """Return how many of `bad` assumed faulty contributions may still be among those that were not left out."""
        return max(0, bad - self.faulty)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers from round to round, for a checkpoint."""
        return {}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. An empty `tree`, saved by another rule, keeps the initial state."""
