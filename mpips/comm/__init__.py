"""How bytes move between the ranks: the seam that everything above is written against.

Rank 0 is the server's. Most calls are collective: all ranks make the same ones in the same order.

| call              | every rank gives             | arrives                                      | MPI              |
|-------------------|------------------------------|----------------------------------------------|------------------|
| reduce            | its contribution             | at the server, as a sum or as rows, to apply | Reduce or Gather |
| broadcast         | room; the server the content | at every rank                                | Bcast            |
| gather_bytes      | a few bytes of its own       | at the server, one by one                    | Send, Recv       |
| allgather_digests | a digest of 32 bytes         | at every rank, all digests                   | Allgather        |

Requests are for training without rounds: a rank sends one whenever it likes, the server answers one at a time.

| call         | who        | gives                                                | MPI          |
|--------------|------------|------------------------------------------------------|--------------|
| request      | not rank 0 | a request and room for its answer                    | Isend, Irecv |
| next_request | the server | room for the next request, from whichever rank       | Improbe      |
| respond      | the server | the answer to a request it holds, now or later       | Send         |

Three implementations pass one contract suite (`tests/helpers/contract_communicator.py`): `mpi`, `simulated`, and `local` of a
single process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpips.rules import Needs

if TYPE_CHECKING:
    from mpips.comm.node_group import BufferSpec, NodeGroup

SERVER = 0  # the server's rank

Apply = Callable[[slice, Tensor], None]


class CommunicatorError(RuntimeError):
    """Ranks that no longer agree on what comes next, or a rank that is gone: names the ranks and the calls."""


class Communicator(Protocol):
    """One rank's end.

    Attributes:
        rank: this rank, 0 being the server's.
        size: the number of ranks.
        name: which implementation and library this is, for people.
        traffic: calls made and bytes handed over by this rank, by kind of call.
    """

    rank: int
    size: int
    name: str
    traffic: Counter[str]

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A `(numel,)` tensor of zeros that this communicator moves without a further copy where it can."""

    def node_group(self, spec: BufferSpec) -> NodeGroup | None:
        """Memory that ranks share for the messages of a round, on each node; every rank calls this.

        Returns:
            None, on every rank, where ranks of a node do not share memory, or there is too little; and if there are several
            nodes, and the contents are not for these.
        """

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """Bring every rank's `(numel,)` float32 or float64 `message` together at the server.

        The tail `message[tail:]` arrives summed, in the server's own `message`, before `apply` is first called. Then
        `apply(part, rows)` is called there, slice by slice of `message[:tail]`: with `rows` of shape `(1, len)`, the sum
        over ranks, for needs="sum"; with shape `(size, len)`, in rank order, for needs="rows". `rows` may be memory of
        `message` itself and is only valid during the call.
        """

    def broadcast(self, message: Tensor) -> None:
        """The server's contiguous `message` of any dtype lands in every rank's."""

    def gather_bytes(self, blob: bytes) -> list[bytes]:
        """Every rank's blob, by rank, at the server; an empty list elsewhere."""

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """Every rank's digest (32 bytes), by rank, at every rank."""

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """At the server: wait for the next request.

        It lands whole in the contiguous `(numel,)` `message`, or, if the rank sent only its end, in `message[tail:]`.

        Returns:
            The rank, and whether its request is whole. It waits until `respond`; others may be received before that.

        Raises:
            CommunicatorError: the request has another length.
        """

    def respond(self, rank: int, message: Tensor) -> None:
        """At the server: answer that rank's request with the contiguous `message`, of any dtype.

        The memory may be changed as soon as this returns. That is after a millisecond of waiting for the rank at most,
        and the transfer: a rank that has asked attends to the communicator, see `request`.
        """

    def request(self, request: Tensor, answer: Tensor, short: int, overlap: bool = False) -> Callable[[], bool]:
        """Elsewhere: send the contiguous `request` to the server and let its answer land in the contiguous `answer`.

        The answer fills `answer` or, being a short one, `answer[:short]`. Until the returned function has come back, neither
        tensor may be touched and no other call be made on this communicator.

        Args:
            request: what the server receives.
            answer: where its answer lands.
            short: elements of a short answer.
            overlap: let all of it happen while this rank computes, on a thread beside it. Without, or where MPI was
                started without support for threads, the request may leave no earlier than the function is called.

        Returns:
            A function to call once. It waits for the answer and says whether all of `answer` came.

        Raises:
            CommunicatorError: there is a request already; or, from the function, the answer has another length.
        """

    def run_async(self, work: Callable[[], None]) -> Callable[[], None]:
        """Begin `work`, which may make calls on this communicator, while this rank computes and makes none itself.

        Returns:
            A function to call once: it waits for the end, and raises what `work` has raised. Where MPI was started without
            support for threads all of it happens there.
        """

    def clock(self) -> float:
        """Seconds since some moment; virtual ones where the time is simulated."""

    def finalize(self) -> None:
        """Nothing more is said: let go of MPI. All ranks have waited for each other."""

    def abort(self, status: int) -> None:
        """End every rank now, with this exit status."""

    def barrier(self, patience: float | None) -> None:
        """Wait until every rank waits here. With `patience` (seconds), end all ranks if one has not come by then."""


def pieces(numel: int, itemsize: int, largest: int) -> Iterator[slice]:
    """Slices of at most `largest` bytes that cover `numel` elements: no single MPI count then nears 2^31."""
    step = max(1, largest // itemsize)
    return (slice(start, min(start + step, numel)) for start in range(0, numel, step))


def landing(sender: int, length: int, whole: int, short: int) -> bool:
    """Whether a message of `length` is a whole one; CommunicatorError if it is no short one either. In bytes."""
    if length not in (whole, short):
        raise CommunicatorError(f"rank {sender} sent {length} bytes where {whole} or {short} are expected")
    return length == whole


def broadcast_bytes(communicator: Communicator, blob: bytes) -> bytes:
    """The server's bytes, at every rank; what the others give is not looked at."""
    length = torch.tensor([len(blob)])
    communicator.broadcast(length)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if communicator.rank == SERVER:
        data.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8)) if blob else None
    communicator.broadcast(data)
    return data.numpy().tobytes()
