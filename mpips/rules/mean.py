"""Rules for which the sum over ranks suffices."""

from __future__ import annotations

import torch
from torch import Tensor

from mpips.rules.protocol import Rule

STEP = 1 << 20  # elements whose float64 copies are made at a time


class Mean(Rule):
    """The samples-weighted mean, sum(n_k g_k) / sum(n_k).

    Rows are added in rank order, one after another, so that the bits do not depend on who gathered them.
    """

    needs = "sum"

    def __call__(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """See `Rule`."""
        total = out.copy_(rows[0]) if out.data_ptr() != rows.data_ptr() else out
        for row in rows[1:]:
            total.add_(row)
        if (whole := float(weights.sum())) != 1.0:
            total.div_(whole)


class NormClip(Mean):
    """The samples-weighted mean of contributions no longer than a radius: g min(1, radius / |g|) (arXiv 1911.07963, section 5).

    Each rank shortens its own, so that a sum suffices; one that is not finite is left out. A single contribution keeps its
    bits unless it is longer. BatchNorm's statistics are averaged as they are.
    """

    def __init__(self, clip_radius: float = 1.0) -> None:
        self.clip_radius = clip_radius

    def prepare(self, contribution: Tensor, weight: float) -> bool:
        """See `Rule`."""
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(contribution, STEP)]
        norm = float(torch.stack(parts).norm()) / weight
        if norm > self.clip_radius:
            contribution.mul_(self.clip_radius / norm)
        return norm < float("inf")
