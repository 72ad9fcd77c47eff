"""The communicator of a single process, without MPI."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Set

import torch
from torch import Tensor

from mpips.comm import SERVER, Apply, Blob, CommunicatorError, pieces
from mpips.comm.node_group import BufferSpec
from mpips.rules import Needs

SLICE = 1 << 20  # bytes


class LocalCommunicator:
    """The only rank's communicator: what it gives is what arrives; see `mpips.comm.Communicator`."""

    rank, size = SERVER, 1
    name = "no MPI, one process"
    lost: Set[int] = frozenset()

    def __init__(self) -> None:
        self.traffic: Counter[str] = Counter()

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of zeros."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def node_group(self, spec: BufferSpec) -> None:
        """Return None: there is nobody to share memory with."""

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """Apply the only contribution; a rule is given its row in slices, for what it makes of one stays in a cache."""
        self._count("reduce", message)
        largest = SLICE if needs == "rows" else max(1, tail * message.element_size())
        for part in pieces(tail, message.element_size(), largest):
            apply(part, message[part].unsqueeze(0))

    def broadcast(self, message: Tensor) -> None:
        """Leave the message as it is."""
        self._count("broadcast", message)

    def gather_bytes(self, *parts: Blob) -> list[Blob]:
        """Return the only blob."""
        return [b"".join(parts)]

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """Return the only digest."""
        return [digest]

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """Raise CommunicatorError: no rank sends requests."""
        raise CommunicatorError("rank 0 of 1 waits for requests, which other ranks send; expected more ranks")

    def respond(self, rank: int, message: Tensor) -> None:
        """Raise CommunicatorError: no rank sends requests."""
        raise CommunicatorError("rank 0 of 1 responds to requests, which other ranks send; expected more ranks")

    def request(self, request: Tensor, answer: Tensor, short: int, overlap: bool = False) -> Callable[[], bool]:
        """Raise CommunicatorError: the server is this rank."""
        raise CommunicatorError("rank 0 of 1 requests something of the server, which is on this rank; expected more ranks")

    def run_async(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return `work`, to be done when it is called."""
        return work

    def clock(self) -> float:
        """Return seconds since some moment."""
        return time.perf_counter()

    def finalize(self) -> None:
        """Do nothing: there is no MPI."""

    def abort(self, status: int) -> None:
        """End the process with this status."""
        raise SystemExit(status)

    def barrier(self, patience: float | None) -> None:
        """Return at once."""

    def _count(self, call: str, message: Tensor) -> None:
        self.traffic[f"{call} calls"] += 1
        self.traffic[f"{call} bytes"] += message.numel() * message.element_size()
