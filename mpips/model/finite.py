"""The check for NaN and Inf, in one pass over the memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ONE_THREAD = 1 << 13  # up to so many elements BLAS computes an inner product on one thread

Values = Any  # a tensor, or a numpy array of its memory


def is_finite(values: Values) -> bool:
    """Return whether all elements are finite; False also for finite elements so large that their squares or sum overflow."""
    if isinstance(values, Tensor):
        return math.isfinite(torch.dot(values, values).item())
    return math.isfinite(values.dot(values) if len(values) <= ONE_THREAD else values.sum())


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is a NaN or Inf."""
    return bool(tensor.isfinite().all())
