"""The gradients that are pushed: cheap to compute, with values that depend on rank, round and position.

So a variant that leaves out or confuses a rank, a round or a slice ends with other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDTH = 1024  # elements; sizes are multiples of this


def numel(nbytes: float) -> int:
    """Return the number of float32 elements in about `nbytes` bytes."""
    return WIDTH * max(1, round(nbytes / (4 * WIDTH)))


class Gradient:
    """One rank's gradients.

    Args:
        rank: the rank.
        lengths: the lengths of the gradient's parts, each a multiple of WIDTH elements.
    """

    def __init__(self, rank: int, lengths: Sequence[int]) -> None:
        column = (0.37 * torch.arange(sum(lengths) // WIDTH) + rank).sin().unsqueeze(1)
        self._columns = list(torch.split(column, [length // WIDTH for length in lengths]))
        self._angles = torch.arange(WIDTH) * (1.0 + rank)
        self.number = 0

    def write(self, parts: Sequence[Tensor]) -> None:
        """Write the next round's gradient to the parts."""
        row = (self._angles + self.number).cos()
        for part, column in zip(parts, self._columns, strict=True):
            torch.add(row, column, out=part.view(-1, WIDTH))
        self.number += 1


class Loss(torch.autograd.Function):
    """A zero loss whose backward returns the next values of a `Gradient` in new tensors, as layers do."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, *parts: Tensor) -> Tensor:
        """Return zero."""
        ctx.gradient, ctx.lengths = gradient, [part.numel() for part in parts]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the next round's gradient."""
        found = [torch.empty(length) for length in ctx.lengths]
        ctx.gradient.write(found)
        return None, *found


def initial(count: int) -> Tensor:
    """Return the weights that every variant begins with."""
    return (torch.arange(WIDTH) * 0.01).sin().repeat(count // WIDTH)


def parts_of(count: int, most: int = 4) -> list[int]:
    """Return the lengths of up to `most` parameters that the model consists of."""
    rows = count // WIDTH
    each = -(-rows // most)
    return [WIDTH * min(each, rows - begun) for begun in range(0, rows, each)]
