"""Random draws that follow from the given numbers only: the same on every rank, without touching the process's streams."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


def permutation(n: int, *parts: str | int) -> np.ndarray:
    """Return a permutation of range(n), seeded by a hash of `parts`."""
    generator = torch.Generator().manual_seed(seed_of(*parts))
    order: np.ndarray = torch.randperm(n, generator=generator).numpy()
    return order


def seed_of(*parts: str | int) -> int:
    """Return a seed that depends on all parts: a hash, so that the seeds of neighbouring numbers are unrelated."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def counted(name: str, value: Any) -> int:
    """Return `value` if it is a whole number of 1 or more; else raise ValueError."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} given; expected a whole number, 1 or more")
    return int(value)
