"""Draws that follow from the numbers given alone: the same on every rank, and no stream of the process is read or moved."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


def permutation(n: int, *parts: str | int) -> np.ndarray:
    """Numbers below n in an order that the parts alone decide."""
    generator = torch.Generator().manual_seed(seed_of(*parts))
    order: np.ndarray = torch.randperm(n, generator=generator).numpy()
    return order


def seed_of(*parts: str | int) -> int:
    """A seed from all that it may depend on; neighbours have nothing in common, as they would if numbers were added."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def counted(name: str, value: Any) -> int:
    """A whole number of 1 or more, or one clear line."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} given; expected a whole number, 1 or more")
    return int(value)
