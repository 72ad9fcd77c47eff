"""What "together" means: a rule turns the contributions of a round into one.

A rule says what it `needs`, and that alone picks the collective: "sum" a Reduce, "rows" a Gather, slice by slice. To add
one, write a class with `needs` and `__call__` and enter it in RULES (see CONTRIBUTING.md).
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from mpips.config import Config, ConfigError

Needs = Literal["sum", "rows"]


class Rule(Protocol):
    """How contributions are combined, coordinate by coordinate.

    Attributes:
        needs: "sum" if the sum over ranks suffices, "rows" if every rank's own values are needed.
    """

    needs: Needs

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Combine one slice.

        Args:
            rows: `(n, len)`, contributions already multiplied by their weights, in rank order; `(1, len)`, their sum, for
                a rule that needs only the sum. A rank with weight 0 contributed zeros.
            weights: `(n,)` or, with their sum, `(1,)`; their sum is above 0.
            out: `(len,)`; may be `rows[0]`.
        """


class Mean:
    """The samples-weighted mean, sum(n_k g_k) / sum(n_k).

    Rows are added in rank order, one after another, so that the bits do not depend on who gathered them.
    """

    needs: Needs = "sum"

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `Rule`."""
        total = out.copy_(rows[0]) if out.data_ptr() != rows.data_ptr() else out
        for row in rows[1:]:
            total.add_(row)
        if (whole := float(weights.sum())) != 1.0:
            total.div_(whole)


RULES: dict[str, type[Rule]] = {"mean": Mean}


def choose(config: Config) -> tuple[Rule, Needs]:
    """The configured rule, and what the exchange must bring: rows, in deterministic mode, for any rule.

    Raises:
        ConfigError: no rule of that name.
    """
    if config.rule not in RULES:
        raise ConfigError(f"rule: given {config.rule!r}, allowed: {', '.join(RULES)}")
    rule = RULES[config.rule]()
    return rule, "rows" if config.deterministic else rule.needs
