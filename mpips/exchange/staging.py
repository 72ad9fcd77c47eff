"""The memory that MPI reads and writes: a tensor's own, or pinned host memory beside a CUDA tensor."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """One pinned buffer for each dtype, as large as the largest tensor so far and used again and again.

    Args:
        cuda_aware: MPI takes device memory itself, nothing is staged.
    """

    def __init__(self, cuda_aware: bool) -> None:
        self._cuda_aware = cuda_aware
        self._pinned: dict[torch.dtype, Tensor] = {}

    def needed(self, tensor: Tensor) -> bool:
        """Whether MPI cannot take this tensor's own memory."""
        return tensor.is_cuda and not self._cuda_aware

    def host(self, piece: Tensor, read: bool) -> Tensor:
        """The memory to give to MPI: the tensor's own, or the pinned buffer, filled if MPI is to read it."""
        if not piece.is_cuda:
            return piece
        torch.cuda.current_stream(piece.device).synchronize()
        if self._cuda_aware:
            return piece
        pinned = self._pinned.get(piece.dtype)
        if pinned is None or pinned.numel() < piece.numel():
            pinned = self._pinned[piece.dtype] = torch.empty(piece.numel(), dtype=piece.dtype, pin_memory=True)
        buffer = pinned[: piece.numel()]
        if read:
            buffer.copy_(piece)
        return buffer

    def back(self, buffer: Tensor, piece: Tensor, written: bool = True) -> None:
        """What MPI has written comes to the tensor."""
        if written and buffer is not piece:
            piece.copy_(buffer)  # synchronous, so the pinned buffer is free again
