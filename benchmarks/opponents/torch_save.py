"""torch.save."""

from __future__ import annotations

from typing import BinaryIO

import torch
from torch import Tensor


def save(tensors: dict[str, Tensor], file: BinaryIO) -> None:
    """Write the tensors into a file that is open."""
    torch.save(tensors, file)
