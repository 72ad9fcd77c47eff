"""The state of the script's optimizer on a worker, where the server, or an optimizer of master weights, steps in its place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer


class StateElsewhere(defaultdict[Tensor, Any]):
    """The state of an optimizer in whose place another one steps: empty, but for frozen parameters. Changes are refused."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        """Raise RuntimeError."""
        raise RuntimeError(
            "optimizer.state after connect: the state is where the steps are taken, with the server or with master weights, so "
            "changes here would be lost; expected reads by optimizer.state_dict(), which every worker calls; to begin with a "
            "new state, end the run by ps.close() and connect again"
        )

    clear = pop = popitem = setdefault = update = __missing__ = __setitem__ = __delitem__ = _refuse


def take_state_away(optimizer: Optimizer) -> None:
    """Refuse changes of the optimizer's state from now on."""
    own = vars(optimizer)
    own["state"] = StateElsewhere(dict, {p: entries for p, entries in own["state"].items() if not p.requires_grad})


def give_state_back(optimizer: Optimizer) -> None:
    """Let the optimizer have state of its own, where it steps itself or the run has ended."""
    own = vars(optimizer)
    if isinstance(own["state"], StateElsewhere):
        own["state"] = defaultdict(dict, own["state"])
