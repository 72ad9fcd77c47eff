"""Several optimizers of one run, as one: each round is about one of them, and steps its parameters alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch.optim import Optimizer


class Joint(Optimizer):
    """The groups of several optimizers, one after another; a step is that of the one that it is about.

    Args:
        parts: the optimizers.
        take: steps one of them.

    Attributes:
        parts: see above.
        which: the one that a step is about.
    """

    def __init__(self, parts: Sequence[Optimizer], take: Callable[[Optimizer], None]) -> None:
        self.parts, self.which, self._take = list(parts), 0, take
        self.defaults = {key: None for part in parts for key in part.defaults}
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all, the optimizers' own."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """The state of all, together."""
        return defaultdict(dict, {p: kept for part in self.parts for p, kept in part.state.items()})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the one that it is about."""
        self._take(self.parts[self.which])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its part; parameters are numbered through all groups."""
        ends = accumulate((len(part.param_groups) for part in self.parts), initial=0)
        start = 0
        for part, (first, end) in zip(self.parts, pairwise(ends), strict=True):
            groups = [dict(group) for group in state_dict["param_groups"][first:end]]
            count = sum(len(group["params"]) for group in groups)
            state = {n - start: kept for n, kept in state_dict["state"].items() if start <= n < start + count}
            for group in groups:
                group["params"] = [n - start for n in group["params"]]
            part.load_state_dict({"state": state, "param_groups": groups})
            start += count
