"""How an asynchronous server treats a stale contribution.

The staleness of a contribution is the number of server updates between its pull and its push; 0 is fresh. A policy scales or
rejects the contribution. Delay compensation corrects a gradient for the movement of the weights since its pull.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpips.config import Staleness

EPSILON = 1e-7  # of the adaptive compensation, from the paper
STRENGTH = {"dc": 0.04, "dc-adaptive": 2.0}  # the paper's lambda and lambda_0 for CIFAR-10


def whole(staleness: int, settings: Staleness) -> float:
    """Return 1 for any staleness."""
    return 1.0


def reject(staleness: int, settings: Staleness) -> float:
    """Return 1 up to the bound, then 0."""
    return 1.0 if staleness <= settings.bound else 0.0


def inverse(staleness: int, settings: Staleness) -> float:
    """Return 1 / max(1, staleness) (Zhang et al. 2016, arXiv 1511.05950)."""
    return 1 / max(1, staleness)


def poly(staleness: int, settings: Staleness) -> float:
    """Return (staleness + 1)^-a (Xie et al. 2019, arXiv 1903.03934); FedBuff's 1 / sqrt(1 + staleness) is a = 0.5."""
    return float((staleness + 1) ** -settings.power)


def hinge(staleness: int, settings: Staleness) -> float:
    """Return 1 up to the bound b, then 1 / (a (staleness - b) + 1) (Xie et al. 2019, arXiv 1903.03934)."""
    return 1 / (settings.power * max(0, staleness - settings.bound) + 1)


# name -> the factor on a contribution: from 1 down to 0 (rejected), never growing with the staleness
POLICIES: dict[str, Callable[[int, Staleness], float]] = {
    "none": whole,
    "reject": reject,
    "inverse": inverse,
    "poly": poly,
    "hinge": hinge,
    "dc": whole,
    "dc-adaptive": whole,
}


class Compensation:
    """Delay compensation: DC-ASGD (Zheng et al. 2017, arXiv 1609.08326).

        g <- g + lambda g g (w - w_k)                           coordinate by coordinate; w_k: the weights g was computed at
        s <- m s + (1 - m) g g,  lambda = lambda_0 / sqrt(s + 1e-7)        adaptive; s starts at 0 and is shared by all ranks

    A coordinate whose weight has not moved keeps its gradient's bits. The algorithm needs one copy of the weights for each
    rank, in the weights' dtype.

    Args:
        adaptive: whether lambda follows the gradients' size, for each coordinate.
        strength: lambda, or lambda_0; 0 changes nothing.
        decay: m.
    """

    def __init__(self, adaptive: bool, strength: float, decay: float = 0.95) -> None:
        self.adaptive, self.strength, self.decay = adaptive, strength, decay
        self._sent: dict[int, Tensor] = {}
        self._mean_square: Tensor | None = None

    def remember(self, rank: int, weights: Tensor) -> None:
        """Copy the weights that are sent to `rank`: `(numel,)`, of any floating dtype."""
        copy = self._sent.get(rank)
        if copy is None or copy.device != weights.device:
            copy = self._sent[rank] = torch.empty_like(weights)
        copy.copy_(weights)

    def sent(self, rank: int) -> Tensor:
        """Return the weights that were last sent to `rank`."""
        return self._sent[rank]

    def correct(self, rank: int, gradient: Tensor, weights: Tensor) -> None:
        """Correct a gradient in place.

        Args:
            rank: the rank that computed it, at the weights last remembered for that rank.
            gradient: `(numel,)`, float32 or float64, finite. A mean, not multiplied by samples or a loss scale, since its
                square matters.
            weights: `(numel,)`, the server's present weights, in the dtype of the remembered ones.
        """
        factor = (weights.to(gradient) - self._sent[rank].to(gradient)).mul_(self.strength)
        if self.adaptive:
            factor.div_(self._update_mean_square(gradient).add(EPSILON).sqrt_())
        # g (1 + lambda g d), d = w - w_k: this order neither overflows in g g nor changes a bit where d = 0
        gradient.mul_(factor.mul_(gradient).add_(1))

    def _update_mean_square(self, gradient: Tensor) -> Tensor:
        """Update the mean square s with a gradient, and return it."""
        mean_square = torch.zeros_like(gradient) if self._mean_square is None else self._mean_square.to(gradient)
        self._mean_square = mean_square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        return self._mean_square

    def state_dict(self) -> dict[str, Any]:
        """Return the mean square, if there is one, for a checkpoint. After a resume the weights are sent to all ranks anew."""
        return {} if self._mean_square is None else {"mean_square": self._mean_square}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, and forget the weights that were sent."""
        self._sent = {}
        mean_square = tree.get("mean_square")
        self._mean_square = None if mean_square is None else mean_square.clone()


def compensation(policy: str, settings: Staleness) -> Compensation | None:
    """Return the delay compensation of a policy; None if the policy has none."""
    if policy not in STRENGTH:
        return None
    strength = STRENGTH[policy] if settings.strength is None else settings.strength
    return Compensation(policy == "dc-adaptive", strength)
