"""Which weights each worker computes its gradients at, for delay compensation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpips.algorithms.staleness import compensation

if TYPE_CHECKING:
    from mpips.config import Staleness


class SentWeights:
    """The weights sent to each worker last; nothing where the policy corrects nothing.

    A worker that overlaps computes at the weights before the last: two copies are kept of it.

    Attributes:
        compensation: what corrects gradients, if anything does.
    """

    def __init__(self, policy: str, settings: Staleness, overlap: bool) -> None:
        self.compensation = compensation(policy, settings)
        self._copies = 1 + overlap
        self._keys: dict[int, dict[int, int]] = {}  # rank -> version -> the copy's number

    def remember(self, rank: int, version: int, weights: Tensor) -> None:
        """These weights are sent to `rank`; they are copied."""
        keys = self._keys.setdefault(rank, {})
        if self.compensation is None or version in keys:
            return
        own = range(rank * self._copies, (rank + 1) * self._copies)
        oldest = keys.pop(min(keys)) if len(keys) == self._copies else None
        keys[version] = oldest if oldest is not None else next(key for key in own if key not in keys.values())
        self.compensation.remember(keys[version], weights)

    def correct(self, rank: int, version: int, gradient: Tensor, weights: Tensor) -> None:
        """Correct, in place, a gradient that `rank` computed at its weights of that version."""
        if self.compensation:
            keys = self._keys[rank]
            self.compensation.correct(keys.get(version, keys[max(keys)]), gradient, weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what the adaptive compensation follows, and at which weights workers compute that are ahead.

        Others are sent the weights anew after it.
        """
        compensation = self.compensation
        if compensation is None:
            return {}
        ranks = self._keys.items() if self._copies > 1 else ()
        ahead = {str(rank): {str(v): compensation.sent(key) for v, key in keys.items()} for rank, keys in ranks}
        return compensation.state_dict() | {"ahead": ahead}

    def load_state_dict(self, tree: dict[str, Any], same_ranks: bool) -> None:
        """Take back what `state_dict` gave, on the same ranks or on others."""
        if self.compensation:
            self.compensation.load_state_dict(tree)
            self._keys.clear()
            for rank, versions in tree.get("ahead", {}).items() if same_ranks else ():
                for version in sorted(map(int, versions)):
                    self.remember(int(rank), version, versions[str(version)])
