"""The message from the server."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from mpips.model.buffers import Buffers
from mpips.model.flat import ALIGNMENT, Flat
from mpips.model.message.header import CONTROL_BYTES, WORDS, Control
from mpips.model.message.push import Allocate, wire_dtype

SAID = struct.Struct(f"{WORDS}d")


class Pull:
    """The message from the server.

    Attributes:
        message: the whole message, as bytes.
        weights: a view in the model's dtype.
        place: the slice of the message's bytes that holds the weights.
        second: a further view of the weights' length, in the push message's dtype; None if the mode has none.
        buffers: views, in the order of `Buffers.tensors`.
    """

    def __init__(self, flat: Flat, buffers: Buffers, allocate: Allocate, vectors: int = 1) -> None:
        wire = wire_dtype(flat.dtype)
        sizes = [flat.numel * flat.dtype.itemsize, (vectors - 1) * flat.numel * wire.itemsize]
        sizes += [t.numel() * t.element_size() for t in buffers.tensors]
        starts, end = [], CONTROL_BYTES
        for size in sizes:
            starts.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self.place = self._places[0]
        self._dtypes = [flat.dtype, wire if vectors > 1 else None]
        self._buffers = [(t.dtype, t.shape) for t in buffers.tensors]
        self.lay_out(allocate(end, torch.uint8, flat.device))

    def lay_out(self, memory: Tensor) -> None:
        """Make the views of the message, given its memory."""
        self.message, self._words = memory, memory[:CONTROL_BYTES].view(torch.float64)[:WORDS]
        self._numbers: Any = None if memory.is_cuda else self._words.numpy()
        spans = [memory[place] for place in self._places]
        weights, second = self._dtypes
        assert weights is not None
        self.weights, self.second = spans[0].view(weights), spans[1].view(second) if second else None
        self.buffers = [span.view(dtype).view(shape) for span, (dtype, shape) in zip(spans[2:], self._buffers, strict=True)]
        self._behind = memory[self._places[1].start :]

    def parts(self, span: slice) -> list[Tensor]:
        """Return the message in parts, with only the slice `span` of the weights."""
        return [part for part in (self.control_message, self.weights[span], self._behind) if part.numel()]

    @property
    def control_message(self) -> Tensor:
        """The bytes of the control, which are sent alone between rounds."""
        return self.message[:CONTROL_BYTES]

    @property
    def control(self) -> Control:
        """The server's latest control."""
        return Control(*(self._words if self._numbers is None else self._numbers).tolist())

    @control.setter
    def control(self, control: Control) -> None:
        if self._numbers is None:
            self._words.copy_(torch.tensor([*vars(control).values()], dtype=torch.float64))
        else:
            SAID.pack_into(self._numbers, 0, *vars(control).values())
