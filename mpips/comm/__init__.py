"""The communicator: the interface by which bytes move between ranks, without any knowledge of models or rules.

Rank 0 is the server's. Most calls are collective: all ranks make the same calls in the same order.

| call              | every rank gives                   | result                                       | MPI              |
|-------------------|------------------------------------|----------------------------------------------|------------------|
| reduce            | its contribution                   | at the server, as a sum or as rows, to apply | Reduce or Gather |
| broadcast         | a buffer; the server's is the data | at every rank                                | Bcast            |
| gather_bytes      | some bytes of its own              | at the server, a list by rank                | Send, Recv       |
| allgather_digests | a digest of 32 bytes               | at every rank, a list by rank                | Allgather        |

Requests are for training without rounds. A rank sends a request at any time. The server answers one request at a time.

| call         | who        | gives                                               | MPI          |
|--------------|------------|-----------------------------------------------------|--------------|
| request      | not rank 0 | a request and a buffer for its answer               | Isend, Irecv |
| next_request | the server | a buffer for the next request, from whichever rank  | Improbe      |
| respond      | the server | the answer to a request received before             | Send         |

Four implementations pass one contract suite (`tests/helpers/contract_communicator.py`): `mpi`, `star`, `simulated`, and `local`
for a single process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpips.rules import Needs

if TYPE_CHECKING:
    from mpips.comm.node_group import BufferSpec, NodeGroup

SERVER = 0  # the server's rank

Apply = Callable[[slice, Tensor], None]
Blob = bytes | bytearray | memoryview


class CommunicatorError(RuntimeError):
    """Ranks disagree on the next call, or a rank is gone. The message names the ranks and the calls."""


class RankLost(Exception):
    """A rank has died while the server waited for requests, in a run that goes on without it; see `Communicator.lost`."""


class Communicator(Protocol):
    """One rank's end of the communicator.

    Attributes:
        rank: this rank; the server's is 0.
        size: the number of ranks.
        name: the implementation and its library, to be shown to people.
        traffic: the number of calls that this rank has made and of bytes that it has handed over, by kind of call.
        lost: the ranks that have died, at the server of a run that goes on without them; else empty.
    """

    rank: int
    size: int
    name: str
    traffic: Counter[str]
    lost: Set[int]

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a `(numel,)` tensor of zeros, in memory that this communicator sends without a copy if it has such."""

    def node_group(self, spec: BufferSpec) -> NodeGroup | None:
        """Allocate memory that the ranks of each node share for the messages of a round; every rank calls this.

        Args:
            spec: the size and layout of the buffers.

        Returns:
            This rank's group. None, on every rank, if the ranks of a node cannot share memory or have too little of it, or if
            there are several nodes and `spec` does not allow that.
        """

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """Combine every rank's `(numel,)` float32 or float64 `message` at the server.

        The sum of the tails `message[tail:]` is written to the server's own `message` before `apply` is first called. The
        server then calls `apply(part, rows)` for slice after slice of `message[:tail]`. With needs="sum", `rows` has shape `(1,
        len)` and is the sum over ranks. With needs="rows", it has shape `(size, len)`, in rank order. `rows` may be memory of
        `message` itself and is valid only during the call.
        """

    def broadcast(self, message: Tensor) -> None:
        """Copy the server's contiguous `message`, of any dtype, to every rank's `message`."""

    def gather_bytes(self, *parts: Blob) -> list[Blob]:
        """Return every rank's bytes, those of all parts together, by rank, at the server; an empty list elsewhere."""

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """Return every rank's digest of 32 bytes, by rank."""

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """Wait for the next request, at the server.

        A whole request fills the contiguous `(numel,)` `message`. A short request fills `message[tail:]`.

        Returns:
            The rank, and whether its request is whole. The rank waits for its answer until `respond`; other requests may be
            received before that.

        Raises:
            CommunicatorError: the request has another length.
            RankLost: a rank has died, and is in `lost`.
        """

    def respond(self, rank: int, message: Tensor) -> None:
        """Answer the request of `rank` with the contiguous `message`, of any dtype, at the server.

        The memory of `message` may be changed as soon as the call returns. The call takes no longer than the transfer and one
        millisecond, as a rank that waits for an answer polls that often; see `request`.
        """

    def request(self, request: Tensor, answer: Tensor, short: int, overlap: bool = False) -> Callable[[], bool]:
        """Send the contiguous `request` to the server and receive the answer in the contiguous `answer`; not at the server.

        A whole answer fills `answer`, a short one `answer[:short]`. Until the returned function has returned, neither tensor
        may be touched, and this communicator must not be called.

        Args:
            request: the request.
            answer: the buffer for the answer.
            short: the number of elements of a short answer.
            overlap: send and receive on another thread while this rank computes. Without it, or without thread support in MPI,
                the request may not be sent before the returned function is called.

        Returns:
            A function to be called once. It waits for the answer and returns whether the answer is whole.

        Raises:
            CommunicatorError: the last request has not been answered yet; or, from the function, the answer has another length.
        """

    def run_async(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` on another thread. It may call this communicator; this rank must not until `work` has ended.

        Returns:
            A function to be called once. It waits for the end of `work` and raises what `work` has raised. Without thread
            support in MPI it runs `work` itself.
        """

    def clock(self) -> float:
        """Return the seconds since an arbitrary start; virtual seconds where the time is simulated."""

    def finalize(self) -> None:
        """Finalize MPI. All ranks have waited for each other before; no call may follow."""

    def abort(self, status: int) -> None:
        """End all ranks at once with this exit status."""

    def barrier(self, patience: float | None) -> None:
        """Wait until all ranks have called this.

        Args:
            patience: the seconds after which all ranks are ended if one has not come; None waits forever.
        """


def pieces(numel: int, itemsize: int, largest: int) -> Iterator[slice]:
    """Return slices of at most `largest` bytes that cover `numel` elements, so that no MPI count comes near 2^31."""
    step = max(1, largest // itemsize)
    return (slice(start, min(start + step, numel)) for start in range(0, numel, step))


def landing(sender: int, length: int, whole: int, short: int) -> bool:
    """Return whether a message of `length` bytes is a whole one.

    Raises:
        CommunicatorError: `length` is neither that of a `whole` message nor that of a `short` one.
    """
    if length not in (whole, short):
        raise CommunicatorError(f"rank {sender} sent {length} bytes where {whole} or {short} are expected")
    return length == whole


def broadcast_bytes(communicator: Communicator, blob: bytes) -> bytes:
    """Return the server's bytes on every rank; the other ranks' `blob` is ignored."""
    length = torch.tensor([len(blob)])
    communicator.broadcast(length)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if communicator.rank == SERVER:
        data.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8)) if blob else None
    communicator.broadcast(data)
    return data.numpy().tobytes()
