"""The sums over the rows of one slice: by numpy for few elements, else by torch, with the same bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.comm.peer_buffers import Rows

Terms = list[tuple[int, float]]  # the index and the factor of each row that counts
Total = Any  # a tensor, or a numpy array of its memory
ONE_THREAD = 1 << 13  # up to so many elements BLAS computes an inner product on one thread
warnings.filterwarnings("ignore", category=RuntimeWarning, module=__name__.replace(".", r"\."))  # overflows are checked here


def add_up(rows: Sequence[Tensor], terms: Terms, rounded: bool = False) -> Total:
    """Return the sum of the rows times their factors, in the order of the terms, in the memory of the first row.

    Args:
        rows: `(len,)` each.
        terms: the rows that count, with their factors.
        rounded: whether a product is rounded before it is added; else both may be one operation.
    """
    arrays = rows.arrays if isinstance(rows, Rows) else None
    if arrays is not None and len(terms) == len(rows) > 1 and all(factor == 1 for _, factor in terms):
        first, *others = arrays
        for other in others:
            np.add(first, other, out=first)
        return first
    out = rows[0]
    if not terms:
        return out.zero_()
    (k, factor), *more = terms
    if factor != 1:
        torch.mul(rows[k], factor, out=out)
    elif k:
        out.copy_(rows[k])
    for k, factor in more:
        if rounded and factor != 1:
            out.add_(rows[k] * factor)
        else:
            out.add_(rows[k], alpha=factor)
    return out


def is_finite(total: Total) -> bool:
    """Return whether all elements are finite; False also for finite elements so large that their squares or sum overflow."""
    if isinstance(total, Tensor):
        return math.isfinite(torch.dot(total, total).item())
    return math.isfinite(total.dot(total) if len(total) <= ONE_THREAD else total.sum())
