"""Contributions that are kept until there are enough of them for one update."""

from __future__ import annotations

from typing import Any

import torch

from mpips.model.message import Push


class UpdateBuffer:
    """Their sum, each multiplied by its share.

    Attributes:
        count: how many they are.
    """

    def __init__(self, push: Push) -> None:
        self.count = 0
        self._push, self._share = push, 0.0
        self._body = len(push.body)
        self._limbs = self._body + len(push.limbs)
        self._sum = torch.zeros_like(push.message[: self._limbs + len(push.presence)])

    def add(self, share: float) -> None:
        """The contribution in the push message, whose integers replace those before."""
        if not self.count:
            self._sum.zero_()
        self._sum.add_(self._push.message[: len(self._sum)], alpha=share)
        self._sum[self._body : self._limbs].copy_(self._push.limbs)
        self.count, self._share = self.count + 1, self._share + share

    def take(self, by_share: bool) -> None:
        """Leave their mean in the push message, and keep none.

        Args:
            by_share: divide by the sum of their shares, which are their weights. Else by their number, and a small share makes
                a small step; buffers, which are no steps, are always averaged by share.
        """
        push = self._push
        push.message[: len(self._sum)].copy_(self._sum)
        push.gradients.div_(self._share if by_share else self.count)
        push.floats.div_(self._share)
        self.count, self._share = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "share": self._share} | ({"sum": self._sum} if self.count else {})

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.count, self._share = int(tree["count"]), float(tree["share"])
        if self.count:
            self._sum.copy_(tree["sum"])
