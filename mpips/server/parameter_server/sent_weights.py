"""The weights at which each worker computes its gradients, for delay compensation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpips.algorithms.staleness import compensation

if TYPE_CHECKING:
    from mpips.config import Staleness


class SentWeights:
    """The weights last sent to each worker; nothing if the policy needs no compensation.

    A worker that overlaps computes at the weights before the last ones, so two copies are kept for each worker.

    Attributes:
        compensation: corrects gradients; None if the policy needs none.
    """

    def __init__(self, policy: str, settings: Staleness, overlap: bool) -> None:
        self.compensation = compensation(policy, settings)
        self._copies = 1 + overlap
        self._keys: dict[int, dict[int, int]] = {}  # rank -> version -> the index of the copy

    def remember(self, rank: int, version: int, weights: Tensor) -> None:
        """Copy the weights of this version, which are sent to `rank`."""
        keys = self._keys.setdefault(rank, {})
        if self.compensation is None or version in keys:
            return
        own = range(rank * self._copies, (rank + 1) * self._copies)
        oldest = keys.pop(min(keys)) if len(keys) == self._copies else None
        keys[version] = oldest if oldest is not None else next(key for key in own if key not in keys.values())
        self.compensation.remember(keys[version], weights)

    def correct(self, rank: int, version: int, gradient: Tensor, weights: Tensor) -> None:
        """Correct in place a gradient that `rank` computed at its weights of that version."""
        if self.compensation:
            keys = self._keys[rank]
            self.compensation.correct(keys.get(version, keys[max(keys)]), gradient, weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the compensation's state, for a checkpoint, and with overlap the weights at which workers compute.

        Without overlap a worker is sent the weights anew after a checkpoint.
        """
        compensation = self.compensation
        if compensation is None:
            return {}
        ranks = self._keys.items() if self._copies > 1 else ()
        ahead = {str(rank): {str(v): compensation.sent(key) for v, key in keys.items()} for rank, keys in ranks}
        return compensation.state_dict() | {"ahead": ahead}

    def load_state_dict(self, tree: dict[str, Any], same_ranks: bool) -> None:
        """Restore what `state_dict` returned.

        Args:
            tree: what it returned.
            same_ranks: whether the workers are on the same ranks as then.
        """
        if self.compensation:
            self.compensation.load_state_dict(tree)
            self._keys.clear()
            for rank, versions in tree.get("ahead", {}).items() if same_ranks else ():
                for version in sorted(map(int, versions)):
                    self.remember(int(rank), version, versions[str(version)])
