"""The memory that MPI reads and writes: a tensor's own, or pinned host memory beside a CUDA tensor.

A message that travels in pieces goes through two pinned buffers in turn. Copies are queued on a stream of their own, which
keeps their order; an event behind each says when its buffer may be used. So while MPI has one the other is put back and filled:

    stream   fetch 0  fetch 1  back 0   fetch 2  back 1   fetch 3  back 2 ...
    MPI              (0      ) (1              ) (2              ) ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Wait = Callable[[], None]
Key = tuple[torch.device, torch.dtype, int]


class Copies(Protocol):
    """Copies between a device and the host, each begun when those before it are done."""

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer for them."""

    def follow(self) -> None:
        """The next ones begin when the device has done all that it was given to do."""

    def copy(self, target: Tensor, source: Tensor) -> Wait:
        """Queue one; what is returned waits for its end."""

    def lead(self) -> None:
        """What the device is given to do from now on begins when all copies are done."""


class Stream:
    """`Copies` on a CUDA stream of their own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See `Copies`."""
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def follow(self) -> None:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> Wait:
        """See `Copies`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        wait: Wait = self._stream.record_event().synchronize
        return wait

    def lead(self) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Staging:
    """Two pinned buffers for each device and dtype, as large as the largest tensor so far and used again and again.

    Args:
        cuda_aware: MPI takes device memory itself, nothing is staged.
        copies: makes what copies to and from a device.
    """

    def __init__(self, cuda_aware: bool, copies: Callable[[torch.device], Copies] = Stream) -> None:
        self._cuda_aware, self._make = cuda_aware, copies
        self._copies: dict[torch.device, Copies] = {}
        self._buffers: dict[Key, Tensor] = {}
        self._free: dict[Key, Wait] = {}  # waits until a buffer's last copy is done

    def needed(self, tensor: Tensor) -> bool:
        """Whether MPI cannot take this tensor's own memory."""
        return tensor.is_cuda and not self._cuda_aware

    def through(self, parts: Sequence[Tensor], read: bool, written: bool) -> Iterator[Tensor]:
        """For each of the parts, in turn, the memory to give to MPI; to be taken to the end.

        Args:
            parts: of one dtype, on one device.
            read: whether MPI reads them.
            written: whether it writes them.
        """
        if not parts or not self.needed(parts[0]):
            if parts:
                finish(parts[0])
            yield from parts
            return
        copies = self._following(parts[0].device)
        for number, part in enumerate(parts):
            if read:
                for ahead in range(number + (number > 0), min(number + 2, len(parts))):
                    self._copy(ahead, parts[ahead], fetch=True)
            key, buffer = self._buffer(number, part)
            self._free.get(key, _at_once)()
            yield buffer
            if written:
                self._copy(number, part, fetch=False)
        copies.lead()

    def host(self, message: Tensor, read: bool) -> Tensor:
        """The memory to give to MPI for all of a message: its own, or a pinned buffer, filled if MPI is to read it."""
        if not self.needed(message):
            finish(message)
            return message
        self._following(message.device)
        if read:
            self._copy(0, message, fetch=True)
        key, buffer = self._buffer(0, message)
        self._free.get(key, _at_once)()
        return buffer

    def back(self, buffer: Tensor, message: Tensor) -> None:
        """What MPI has written comes to the message."""
        if buffer is not message:
            self._copies[message.device].copy(message, buffer)()

    def _following(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = self._make(device)
        self._copies[device].follow()
        return self._copies[device]

    def _copy(self, number: int, part: Tensor, fetch: bool) -> None:
        key, buffer = self._buffer(number, part)
        copies = self._copies[part.device]
        self._free[key] = copies.copy(buffer, part) if fetch else copies.copy(part, buffer)

    def _buffer(self, number: int, part: Tensor) -> tuple[Key, Tensor]:
        key = part.device, part.dtype, number % 2
        if key not in self._buffers or self._buffers[key].numel() < part.numel():
            self._free.pop(key, _at_once)()  # nothing is on its way through the one that goes
            self._buffers[key] = self._copies[part.device].pinned(part.numel(), part.dtype)
        return key, self._buffers[key][: part.numel()]


def finish(tensor: Tensor) -> None:
    """Wait until the device, if it is on one, has done all that this thread has given it to do."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def memory_of(tensor: Tensor) -> Any:
    """What mpi4py takes as a buffer: the array of a host tensor, the device tensor itself."""
    return tensor if tensor.is_cuda else tensor.numpy()


def _at_once() -> None:
    """Nothing to wait for."""
