"""The memory that MPI reads and writes: a tensor's own, or a pinned host buffer for a CUDA tensor.

A message in pieces goes through two pinned buffers in turn. Copies are queued on a CUDA stream of their own, in order. An event
after each copy tells when its buffer may be used. So while MPI uses one buffer, the other is written back and filled again:

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
    """Copies between a device and the host, which are carried out in the order of the calls."""

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a host buffer for these copies."""

    def follow(self) -> None:
        """Let the next copies begin when the device has done all work that it has been given so far."""

    def copy(self, target: Tensor, source: Tensor) -> Wait:
        """Queue a copy; return a function that waits for its end."""

    def lead(self) -> None:
        """Let the work that the device is given from now on begin when all copies are done."""


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
    """Two pinned buffers for each device and dtype, as large as the largest tensor so far, and reused.

    Args:
        cuda_aware: whether MPI accepts device memory, so that nothing is staged.
        copies: makes the `Copies` of a device.
    """

    def __init__(self, cuda_aware: bool, copies: Callable[[torch.device], Copies] = Stream) -> None:
        self._cuda_aware, self._make = cuda_aware, copies
        self._copies: dict[torch.device, Copies] = {}
        self._buffers: dict[Key, Tensor] = {}
        self._free: dict[Key, Wait] = {}  # waits until a buffer's last copy is done

    def needed(self, tensor: Tensor) -> bool:
        """Return whether this tensor must be staged: it is on a device, and MPI does not accept device memory."""
        return tensor.is_cuda and not self._cuda_aware

    def through(self, parts: Sequence[Tensor], read: bool, written: bool) -> Iterator[Tensor]:
        """Yield for each of the parts, in turn, the memory to pass to MPI. The iterator must be exhausted.

        Args:
            parts: tensors of one dtype on one device.
            read: whether MPI reads the parts.
            written: whether MPI writes the parts.
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
        """Return the memory to pass to MPI for a whole message: its own, or a pinned buffer, filled if MPI is to read it."""
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
        """Copy what MPI has written in `buffer`, which `host` returned, to the message."""
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
            self._free.pop(key, _at_once)()  # no copy uses the old buffer any more
            self._buffers[key] = self._copies[part.device].pinned(part.numel(), part.dtype)
        return key, self._buffers[key][: part.numel()]


def finish(tensor: Tensor) -> None:
    """Wait until the tensor's device has done all work that this thread has given it; on the host, return at once."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def memory_of(tensor: Tensor) -> Any:
    """Return what mpi4py accepts as a buffer: the numpy array of a host tensor, a device tensor itself."""
    return tensor if tensor.is_cuda else tensor.numpy()


def _at_once() -> None:
    """Return at once: there is nothing to wait for."""
