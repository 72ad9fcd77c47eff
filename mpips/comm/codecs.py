"""The codecs: how gradients and weights are encoded while they travel between nodes.

A codec encodes each number by itself, so that any part of a bucket can be encoded and decoded alone. To add one, derive a class
from `Codec` and enter it in CODECS; its name there is the value of the setting `comm_dtype`.
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
        dtype: the dtype of what is encoded.
        exact: whether decoding gives back what was encoded.
    """

    dtype: torch.dtype
    exact: ClassVar[bool] = True

    @property
    def wire(self) -> torch.dtype:
        """The dtype of an encoded number."""
        return self.dtype

    def bytes(self, numel: int) -> int:
        """Return the bytes of so many encoded numbers."""
        return numel * self.wire.itemsize

    def encode(self, values: Tensor, out: Tensor) -> None:
        """Encode values of shape `(n,)` to `out`, `(n,)` of dtype `wire`, perhaps in pinned memory of the host."""
        out.copy_(values, non_blocking=True)

    def decode(self, encoded: Tensor, device: torch.device) -> Tensor:
        """Return the decoded values, `(n,)`, on a device.

        They are in a dtype that can be added to one of dtype `dtype`, and may be the encoded tensor's memory.
        """
        return encoded.to(device, non_blocking=True)


class BFloat16(Codec):
    """Rounding to bfloat16, which halves the bytes of float32 and keeps its range."""

    exact = False

    @property
    def wire(self) -> torch.dtype:
        """See `Codec`."""
        return torch.bfloat16


class ErrorFeedback:
    """Error feedback around any codec: what encoding has lost is part of what is encoded next.

    Sender and receivers hold the same `have`. The sender encodes the change from `have` to `want`, and all of them add what
    that decodes to. The difference that is left is the error, so it needs no memory of its own. See Karimireddy et al. 2019,
    arXiv 1901.09847, algorithm 2.

    Args:
        codec: the codec.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, want: Tensor, have: Tensor, out: Tensor) -> None:
        """Encode to `out` what leads from `have` to `want`, `(n,)` each, and add to `have` what receivers will add."""
        encoded = torch.empty(len(want), dtype=self._codec.wire, device=want.device)
        self._codec.encode(want - have, encoded)
        have.add_(self._codec.decode(encoded, have.device))
        out.copy_(encoded, non_blocking=True)

    def decode(self, encoded: Tensor, have: Tensor) -> None:
        """Add what has come to `have`."""
        have.add_(self._codec.decode(encoded, have.device))


CODECS: dict[str, Callable[[torch.dtype], Codec]] = {
    "full": Codec,
    "bfloat16": BFloat16,
}


def codec_of(name: str, dtype: torch.dtype) -> Codec:
    """Return the codec of that name for messages of `dtype`; those of float64, which are meant to be exact, are not rounded."""
    return CODECS[name](dtype) if dtype == torch.float32 else Codec(dtype)
