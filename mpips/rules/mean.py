"""The rules that need only the sum over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.rules.protocol import Rule

FEW = 1 << 15  # elements that numpy, which begins in a tenth of torch's time, divides as fast; the bits are the same
STEP = 1 << 20  # elements that are converted to float64 at a time


class Mean(Rule):
    """The samples-weighted mean, sum(n_k g_k) / sum(n_k).

    In deterministic mode contributions are added in rank order, so the bits do not depend on the MPI library.
    """

    needs = "sum"
    _out: Tensor | None = None  # the same in every round
    _array: Any = None  # the same memory, if it is so small that numpy is faster

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Write the sum, divided by the sum of the weights, to `out`; see `Rule`."""
        (total,), (weight,) = rows, weights
        if out is not total and out.data_ptr() != total.data_ptr():
            out.copy_(total)
        if weight == 1:
            return
        if out is not self._out:
            self._out, self._array = out, None if out.is_cuda or out.numel() > FEW else out.numpy()
        if self._array is None:
            out.div_(weight)
        else:
            np.divide(self._array, weight, out=self._array)


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
