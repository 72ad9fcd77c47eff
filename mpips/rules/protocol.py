"""What a rule is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Needs = Literal["sum", "rows"]  # what a communicator can bring


class RuleError(ValueError):
    """Contributions that a rule cannot combine: fewer than it takes to withstand the faulty ones that are assumed."""


class Rule:
    """How contributions are combined. A rule derives from this class, which has defaults for all but the combining itself.

    A contribution of weight 0 is none. One contribution alone is the result, bit for bit, unless the rule says otherwise.

    Attributes:
        needs: "sum" if the sum over ranks suffices and "rows" if every rank's own values of a coordinate are needed: then
            the rule is called with them. "gram" if inner products of whole contributions suffice: then `coefficients` is
            called, and the result is the sum of the contributions, each times its coefficient.
        then: "rows", of a rule that needs "gram", if it is to be called with the rows after `coefficients` has chosen
            among them.
        faulty: how many contributions of this round were left out for a NaN or Inf; set before the rule is called.
    """

    needs: Literal["sum", "rows", "gram"]
    then: Needs = "sum"
    faulty: int = 0

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Combine one slice.

        Args:
            rows: `(n, len)`, contributions already multiplied by their weights, in rank order; `(1, len)`, their sum, for
                a rule that needs only the sum. A rank with weight 0 contributed zeros.
            weights: `(n,)` or, with their sum, `(1,)`; their sum is above 0. After `coefficients`, these.
            out: `(len,)`; may be `rows[0]`.

        Raises:
            RuleError: see `check`.
        """
        raise NotImplementedError

    def statistics(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Combine a slice of what lies behind the gradients (BatchNorm's statistics); see `__call__`."""
        self(rows, weights, out)

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """What to multiply each contribution by.

        Args:
            gram: `(n, n)` float64 on the CPU, inner products of the contributions, measured from `origin`; without one,
                from a point that is near them and otherwise unknown, so that only their differences mean anything.
            weights: `(n,)` float64, above 0.

        Returns:
            `(n,)` float64.

        Raises:
            RuleError: see `check`.
        """
        raise NotImplementedError

    def origin(self, like: Tensor) -> Tensor | None:
        """What contributions are measured from, `(len,)` as `like`, and what takes the place of coefficients that lack to 1.

        It is the rule's own, and is set to each round's result.
        """
        return None

    def prepare(self, contribution: Tensor, weight: float) -> bool:
        """Called on each rank that contributes, before anything is sent.

        Args:
            contribution: `(len,)`, this rank's, multiplied by `weight`; may be changed in place.
            weight: above 0.

        Returns:
            False to leave it out.
        """
        return True

    def check(self, n: int) -> None:
        """Raise RuleError if the rule cannot combine `n` finite contributions; 1 alone it can."""

    def left(self, bad: int) -> int:
        """How many of `bad` faulty contributions may still be among those that were not left out."""
        return max(0, bad - self.faulty)

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers from round to round, for a checkpoint."""
        return {}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; an empty one, of another rule, means to begin anew."""
