"""Several optimizers of one run joined into one; each round steps the parameters of one of them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch.optim import Optimizer


class Joint(Optimizer):
    """An optimizer whose parameter groups are those of several optimizers, in order. A step is a step of one of them.

    Args:
        parts: the optimizers.
        take: a function that steps an optimizer.

    Attributes:
        parts: the optimizers.
        which: the index of the optimizer that `step` steps.
    """

    def __init__(self, parts: Sequence[Optimizer], take: Callable[[Optimizer], None]) -> None:
        self.parts, self.which, self._take = list(parts), 0, take
        self.defaults = {key: None for part in parts for key in part.defaults}
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of all optimizers, the optimizers' own dicts."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """The states of all optimizers in one new dict."""
        return defaultdict(dict, {p: entries for part in self.parts for p, entries in part.state.items()})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the optimizer with the index `which`. `closure` is not used."""
        self._take(self.parts[self.which])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each optimizer its part of the state dict, in which parameters are numbered through all groups."""
        ends = accumulate((len(part.param_groups) for part in self.parts), initial=0)
        start = 0
        for part, (first, end) in zip(self.parts, pairwise(ends), strict=True):
            groups = [dict(group) for group in state_dict["param_groups"][first:end]]
            count = sum(len(group["params"]) for group in groups)
            state = {n - start: entries for n, entries in state_dict["state"].items() if start <= n < start + count}
            for group in groups:
                group["params"] = [n - start for n in group["params"]]
            part.load_state_dict({"state": state, "param_groups": groups})
            start += count
