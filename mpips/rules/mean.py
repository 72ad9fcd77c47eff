"""The rules that need only the sum over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from mpips.rules.protocol import Rule

STEP = 1 << 20  # elements that are converted to float64 at a time


class Mean(Rule):
    """The samples-weighted mean, sum(n_k g_k) / sum(n_k).

    Rows are added one after another in rank order, so the bits do not depend on the MPI library's algorithm.
    """

    needs = "sum"

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Write the sum of the rows, divided by the sum of the weights, to `out`; see `Rule`."""
        total = out.copy_(rows[0]) if out.data_ptr() != rows.data_ptr() else out
        for row in rows[1:]:
            total.add_(row)
        if (total_weight := float(weights.sum())) != 1.0:
            total.div_(total_weight)


class NormClip(Mean):
    """The samples-weighted mean of contributions clipped to a norm: g min(1, radius / |g|) (arXiv 1911.07963, section 5).

    Each rank clips its own contribution, so the sum suffices. A contribution that is not finite is left out. A single
    contribution keeps its bits unless its norm exceeds the radius. BatchNorm's statistics are averaged without clipping.
    """

    def __init__(self, clip_radius: float = 1.0) -> None:
        self.clip_radius = clip_radius

    def prepare(self, contribution: Tensor, weight: float) -> bool:
        """Clip the contribution to the radius in place; return False if its norm is not finite. See `Rule`."""
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(contribution, STEP)]
        norm = float(torch.stack(parts).norm()) / weight
        if norm > self.clip_radius:
            contribution.mul_(self.clip_radius / norm)
        return norm < float("inf")
