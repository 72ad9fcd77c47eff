"""The buffer of contributions that wait until there are enough for one update."""

from __future__ import annotations

from typing import Any

import torch

from mpips.model.message import Push


class UpdateBuffer:
    """The sum of the buffered contributions, each multiplied by its share.

    Attributes:
        count: the number of buffered contributions.
    """

    def __init__(self, push: Push) -> None:
        self.count = 0
        self._push, self._share = push, 0.0
        self._body = len(push.body)
        self._limbs = self._body + len(push.limbs)
        self._sum = torch.zeros_like(push.message[: self._limbs + len(push.presence)])

    def add(self, share: float) -> None:
        """Add the contribution in the push message, times `share`; its integer buffers replace earlier ones."""
        if not self.count:
            self._sum.zero_()
        self._sum.add_(self._push.message[: len(self._sum)], alpha=share)
        self._sum[self._body : self._limbs].copy_(self._push.limbs)
        self.count, self._share = self.count + 1, self._share + share

    def take(self, by_share: bool) -> None:
        """Write the mean to the push message, and empty the buffer.

        Args:
            by_share: whether to divide gradients by the sum of the shares, which are then weights. Else they are divided by the
                number of contributions, so that a small share makes a small step. Buffers are always divided by the sum of the
                shares.
        """
        push = self._push
        push.message[: len(self._sum)].copy_(self._sum)
        push.gradients.div_(self._share if by_share else self.count)
        push.floats.div_(self._share)
        self.count, self._share = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the counts, for a checkpoint."""
        return {"count": self.count, "share": self._share} | ({"sum": self._sum} if self.count else {})

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.count, self._share = int(tree["count"]), float(tree["share"])
        if self.count:
            self._sum.copy_(tree["sum"])
