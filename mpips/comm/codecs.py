"""The codecs: how gradients and weights are encoded while they travel between nodes.

A codec encodes each number by itself, so any part of a bucket can be encoded and decoded alone. To add a codec, derive a class
from `Codec` and enter it in CODECS. Its name there is the value of the setting `comm_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """The identity: numbers travel as they are.

    Attributes:
        dtype: the dtype of the values before they are encoded.
        exact: whether decoding restores the encoded values exactly.
    """

    dtype: torch.dtype
    exact: ClassVar[bool] = True

    @property
    def wire(self) -> torch.dtype:
        """The dtype of an encoded number."""
        return self.dtype

    def bytes(self, numel: int) -> int:
        """Return the number of bytes of `numel` encoded numbers."""
        return numel * self.wire.itemsize

    def encode(self, values: Tensor, out: Tensor) -> None:
        """Encode `values`, of shape `(n,)`, to `out`, of shape `(n,)` and dtype `wire`, possibly in pinned host memory."""
        out.copy_(values, non_blocking=True)

    def decode(self, encoded: Tensor, device: torch.device) -> Tensor:
        """Return the decoded values, of shape `(n,)`, on a device.

        They can be added to a tensor of `dtype`, and may share the memory of `encoded`.
        """
        return encoded.to(device, non_blocking=True)


class BFloat16(Codec):
    """Rounding to bfloat16, which halves the bytes of float32 and keeps its range."""

    exact = False

    @property
    def wire(self) -> torch.dtype:
        """The dtype of an encoded number, bfloat16."""
        return torch.bfloat16


class ErrorFeedback:
    """Error feedback around a codec: what one encoding loses is part of what the next one encodes.

    Sender and receivers hold the same `have`. The sender encodes the difference between `want` and `have`, and all of them add
    the decoded difference to `have`. What then still separates `have` from `want` is the error, so it needs no memory of its
    own. See Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2.

    Args:
        codec: the codec.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, want: Tensor, have: Tensor, out: Tensor) -> None:
        """Encode `want` - `have`, of shape `(n,)`, to `out`; add the decoded difference to `have`, as the receivers will."""
        encoded = torch.empty(len(want), dtype=self._codec.wire, device=want.device)
        self._codec.encode(want - have, encoded)
        have.add_(self._codec.decode(encoded, have.device))
        out.copy_(encoded, non_blocking=True)

    def decode(self, encoded: Tensor, have: Tensor) -> None:
        """Add the decoded difference to `have`, of shape `(n,)`."""
        have.add_(self._codec.decode(encoded, have.device))


CODECS: dict[str, Callable[[torch.dtype], Codec]] = {
    "full": Codec,
    "bfloat16": BFloat16,
}


def codec_of(name: str, dtype: torch.dtype) -> Codec:
    """Return the codec called `name` for messages of `dtype`; for float64, which is meant to be exact, always the identity."""
    return CODECS[name](dtype) if dtype == torch.float32 else Codec(dtype)
