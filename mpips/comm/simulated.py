"""The communicator with all ranks in one process, which take turns in virtual time.

Each rank has a clock of its own, advanced by `World.sleep` and by the arrival of messages. The server receives a request only
when no other rank can run, as then no request with an earlier arrival can follow. So requests are received in the order of
their virtual times, whatever the schedule. The seed decides between requests that arrive at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from mpips.comm import SERVER, Apply, Blob, CommunicatorError, landing, multi_node, pieces, reduce_scatter
from mpips.comm.cuda_ipc import CudaPeerBuffers
from mpips.comm.mailbox import Letter, Mailbox, raw
from mpips.comm.node_group import BufferSpec, NodeGroup
from mpips.comm.peer_buffers import PeerBuffers
from mpips.comm.reduce_scatter import ReduceScatterGroup
from mpips.comm.root_reduce import RootReduceGroup
from mpips.comm.schedule import Killed as Killed
from mpips.comm.schedule import Schedule
from mpips.comm.simulated_group import SimulatedBarrier, SimulatedLeaderGroup
from mpips.rules import Needs

T = TypeVar("T")


class World(Schedule["SimulatedCommunicator"]):
    """Several ranks in one process.

    Args:
        size: the number of ranks.
        seed: the seed of the schedule.
        latency: the virtual seconds of each call.
        bandwidth: the virtual bytes per second.
        bucket: the largest slice that `reduce` passes as rows, and the largest message between nodes, in bytes.
        shares: whether the ranks of a node share memory.
        nodes: the number of ranks of each node; by default there is one node.
        devices: by rank, the number of its device, if ranks share the memory of devices; each device then has a pull message.
            Ranks of different nodes are on different devices.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        latency: float = 1e-5,
        bandwidth: float = 1e10,
        bucket: int = 1 << 24,
        shares: bool = False,
        nodes: Sequence[int] = (),
        devices: Sequence[int] = (),
    ) -> None:
        super().__init__([SimulatedCommunicator(self, rank, size) for rank in range(size)], seed)
        self.size, self.bucket, self.shares = size, bucket, shares
        self.nodes, self.devices = list(nodes) or [size], list(devices)
        self.arrived_here, self.released = [0] * size, [0] * len(self.nodes)  # barriers passed, by rank and by node
        self.latency, self.bandwidth = latency, bandwidth
        self.time = [0.0] * size
        self.mail = Mailbox()
        self._here: dict[int, tuple[str, object]] = {}  # rank -> its collective call in progress, and its contribution
        self._result: object = None

    def run(self, program: Callable[[SimulatedCommunicator], T]) -> list[T]:
        """Run `program` on every rank; see `Schedule`.

        Raises:
            CommunicatorError: a request is left that nobody has received: over MPI its rank would not end.
        """
        try:
            results = super().run(program)
        except SystemExit:
            self._check_received()
            raise
        self._check_received()
        return results

    def _check_received(self) -> None:
        if self.mail.requests:
            raise CommunicatorError(f"nobody has received the request of rank {', '.join(map(str, self.mail.requests))}")

    def sleep(self, rank: int, seconds: float) -> None:
        """Let virtual time pass for `rank` alone."""
        self.time[rank] += seconds

    def meet(
        self,
        rank: int,
        call: str,
        given: object,
        finish: Callable[[dict[int, object]], object],
        cost: int,
        count: int | None = None,
    ) -> object:
        """Wait until every rank, or `count` of them, has made this call; the last computes their result.

        Args:
            rank: this rank.
            call: the call with its arguments, which must be the same on all ranks.
            given: what this rank contributes.
            finish: computes the result from all contributions, by rank.
            cost: the bytes that are sent.
            count: the number of ranks; all by default.

        Returns:
            The result.

        Raises:
            CommunicatorError: another rank makes another call.
        """
        self.begin(rank, call)
        others = {name for name, _ in self._here.values()}
        if others - {call}:
            self.broken = f"rank {rank} is at {call}, ranks {sorted(self._here)} at {self._names()}"
        self.check()
        self._here[rank] = (call, given)
        if len(self._here) == (count or self.size):
            self._result = finish({r: value for r, (_, value) in sorted(self._here.items())})
            self.together(self._here, cost)
            self._here.clear()
        else:
            self.wait(rank, call, lambda: rank not in self._here)
        return self._result

    def together(self, ranks: Iterable[int], cost: int) -> None:
        """Set these ranks' clocks to the time at which all of them have waited for each other and for `cost` bytes."""
        now = max(self.time[rank] for rank in ranks) + self.latency + cost / self.bandwidth
        for rank in ranks:
            self.time[rank] = now

    def begin(self, rank: int, call: str) -> None:
        """Begin a call of `rank`: let the scheduler choose again, so that ranks arrive at a call in any order.

        Raises:
            CommunicatorError: the rank has not taken the answer to its last request yet.
        """
        if self.ends[rank].asking:
            raise CommunicatorError(f"rank {rank} calls {call} before it has taken the answer to its last request")
        self.pause(rank)

    def post(self, rank: int, message: Tensor) -> Letter:
        """Return a message that `rank` sends now; its memory may be changed at once."""
        data = raw(message).clone()
        return Letter(data, self.time[rank] + self.latency + data.numel() / self.bandwidth)

    def arrived(self, rank: int, letter: Letter) -> Tensor:
        """Advance the clock of `rank` to the message's arrival, and return the message's bytes."""
        self.time[rank] = max(self.time[rank], letter.arrival)
        return letter.data

    def next_request(self) -> tuple[int, Letter]:
        """Wait until no other rank can run, then return the rank and the bytes of the request that has arrived first."""
        others = range(1, self.size)
        self.wait(SERVER, "next_request", lambda: bool(self.mail.requests) and not any(map(self.can_run, others)))
        return self.mail.take(self.choose)

    def _names(self) -> str:
        return " and ".join(sorted({name for name, _ in self._here.values()}))


class SimulatedCommunicator:
    """One rank's end of a simulated world; see `mpips.comm.Communicator`."""

    lost: Set[int] = frozenset()

    def __init__(self, world: World, rank: int, size: int) -> None:
        self.world, self.rank, self.size = world, rank, size
        self.name = f"simulated, {size} rank{'s' * (size > 1)}"
        self.traffic: Counter[str] = Counter()
        self.asking = False

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Communicator`."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def node_group(self, spec: BufferSpec) -> NodeGroup | None:
        """See `Communicator`."""
        world = self.world
        several = len(world.nodes) > 1
        if not world.shares or (several and not spec.between):
            return None
        nodes = [list(range(*ends)) for ends in pairwise(accumulate(world.nodes, initial=0))]
        node = next(n for n, ranks in enumerate(nodes) if self.rank in ranks)

        def wanted(ranks: int) -> list[int]:
            if several and spec.sharded:
                return reduce_scatter.sizes(spec, ranks, len(nodes), world.bucket, bool(world.devices))
            return multi_node.sizes(spec, ranks) if several else spec.sizes(ranks)

        def made(given: dict[int, object]) -> list[list[Tensor]]:
            return [[torch.zeros(n, dtype=torch.uint8) for n in wanted(len(ranks))] for ranks in nodes]

        found = self._meet("node_group", f"node_group({spec})", None, made, 0)
        assert isinstance(found, list)
        rows, pull, *parts = found[node]
        members, barrier = nodes[node], SimulatedBarrier(world, node, nodes[node], self.rank)
        buffers = self._buffers(spec.messages(list(rows.view(len(members), -1))), pull, members)
        if not several:
            return NodeGroup(members, self.rank, buffers, parts, barrier, spec)
        leaders = SimulatedLeaderGroup(world, [ranks[0] for ranks in nodes], node) if barrier.leads else None
        kind = ReduceScatterGroup if spec.sharded else RootReduceGroup
        return kind(nodes, self.rank, buffers, parts, barrier, spec, leaders, world.bucket)

    def _buffers(self, rows: Sequence[Tensor], pull: Tensor, members: Sequence[int]) -> PeerBuffers:
        """Return the messages as this rank sees them; with devices, there is a pull message on each of the node's."""
        place = members.index(self.rank)
        if not self.world.devices:
            return PeerBuffers(rows, place, pull)

        def made(given: dict[int, object]) -> dict[int, Tensor]:
            return {device: pull.clone() for device in self.world.devices}

        pulls = self._meet("pulls", "pulls", None, made, 0)
        assert isinstance(pulls, dict)
        devices = [self.world.devices[rank] for rank in members]
        own = list(dict.fromkeys(devices))
        return CudaPeerBuffers(rows, place, [pulls[device] for device in own], [own.index(device) for device in devices])

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """See `Communicator`."""

        def finish(given: dict[int, object]) -> object:
            messages = [m for m in given.values() if isinstance(m, Tensor)]
            rows = [m[:tail].clone() for m in messages] if needs == "rows" else []
            for other in messages[1:]:
                messages[SERVER][tail if needs == "rows" else 0 :].add_(other[tail if needs == "rows" else 0 :])
            return rows

        call = f"reduce({needs}, {message.numel()} x {message.dtype}, tail at {tail})"
        rows = self._meet("reduce", call, message, finish, message.numel() * message.element_size())
        if self.rank != SERVER:
            return
        if needs == "sum":
            apply(slice(0, tail), message[:tail].unsqueeze(0))
            return
        assert isinstance(rows, list)
        for part in pieces(tail, message.element_size(), self.world.bucket):
            apply(part, torch.stack([row[part] for row in rows]))

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""

        def finish(given: dict[int, object]) -> None:
            messages = [m for m in given.values() if isinstance(m, Tensor)]
            for other in messages[1:]:
                other.copy_(messages[SERVER])

        cost = message.numel() * message.element_size()
        self._meet("broadcast", f"broadcast({message.numel()} x {message.dtype})", message, finish, cost)

    def gather_bytes(self, *parts: Blob) -> list[Blob]:
        """See `Communicator`."""
        blob = b"".join(parts)
        blobs = self._meet("gather_bytes", "gather_bytes", blob, lambda given: list(given.values()), len(blob))
        assert isinstance(blobs, list)
        return blobs if self.rank == SERVER else []

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """See `Communicator`."""
        digests = self._meet("allgather_digests", "allgather_digests", digest, lambda given: list(given.values()), len(digest))
        assert isinstance(digests, list)
        return digests

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """See `Communicator`."""
        self._role("next_request", server=True)
        self.world.begin(self.rank, "next_request")
        rank, letter = self.world.next_request()
        data, room = self.world.arrived(self.rank, letter), raw(message)
        whole = landing(rank, len(data), len(room), len(room) - tail * message.element_size())
        room[len(room) - len(data) :].copy_(data)
        return rank, whole

    def respond(self, rank: int, message: Tensor) -> None:
        """See `Communicator`."""
        self._role("respond", server=True)
        self.world.begin(self.rank, "respond")
        if rank not in self.world.mail.held:
            raise CommunicatorError(f"rank {rank} is answered, but no request of its was received")
        self.world.mail.held.remove(rank)
        self.world.mail.answers[rank] = self.world.post(self.rank, message)
        self._count("respond", message)

    def request(self, request: Tensor, answer: Tensor, short: int, overlap: bool = False) -> Callable[[], bool]:
        """Send the request at once, with or without `overlap`; see `Communicator`."""
        self._role("request", server=False)
        self.world.begin(self.rank, "request")
        self.asking = True
        self.world.mail.requests[self.rank] = self.world.post(self.rank, request)
        self._count("request", request)

        def finish() -> bool:
            self.asking = False
            self.world.begin(self.rank, "request")
            self.world.wait(self.rank, "request", lambda: self.rank in self.world.mail.answers)
            data, room = self.world.arrived(self.rank, self.world.mail.answers.pop(self.rank)), raw(answer)
            whole = landing(SERVER, len(data), len(room), short * answer.element_size())
            room[: len(data)].copy_(data)
            return whole

        return finish

    def _role(self, call: str, server: bool) -> None:
        if (self.rank == SERVER) != server or self.size == 1:
            raise CommunicatorError(
                f"rank {self.rank} of {self.size} calls {call}: rank 0 receives and replies, the others ask"
            )

    def _count(self, call: str, message: Tensor) -> None:
        self.traffic[f"{call} calls"] += 1
        self.traffic[f"{call} bytes"] += message.numel() * message.element_size()

    def run_async(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return `work` itself, as a simulated rank does one thing after another; see `Communicator`."""
        return work

    def clock(self) -> float:
        """See `Communicator`."""
        return self.world.time[self.rank]

    def at_end(self, leave: Callable[[], None]) -> None:
        """Call `leave` when this rank's program has ended."""
        self.world.at_end(self.rank, leave)

    def finalize(self) -> None:
        """See `Communicator`."""

    def abort(self, status: int) -> None:
        """Raise SystemExit in this rank, which ends the world; see `Communicator`."""
        raise SystemExit(status)

    def barrier(self, patience: float | None) -> None:
        """Wait for all ranks, without a deadline: real time does not pass for a rank that waits. See `Communicator`."""
        self._meet("barrier", "barrier", None, lambda given: None, 0)

    def _meet(self, kind: str, call: str, given: object, finish: Callable[[dict[int, object]], object], cost: int) -> object:
        if kind in ("reduce", "broadcast"):
            self.traffic[f"{kind} calls"] += 1
            self.traffic[f"{kind} bytes"] += cost
        return self.world.meet(self.rank, call, given, finish, cost)
