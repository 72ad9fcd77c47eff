"""Node groups whose messages lie on GPUs: ranks map each other's messages by CUDA IPC, and reduce and step on the device.

Each rank's push message lies on its own GPU. There is one pull message on each GPU, shared by the ranks on that GPU. A rank
that has stepped a slice of the weights copies it to the other GPUs. Reports and decisions, a few numbers, stay in host memory,
as does the barrier. A rank synchronises its stream before it arrives at the barrier, so that after the release all writes are
complete and nobody reads any more.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from torch.storage import TypedStorage

from mpips.comm.node_group import Barrier, BufferSpec
from mpips.comm.peer_buffers import PeerBuffers, Rows
from mpips.model.layout import both

HANDLE = 7  # index in the result of `reduce_tensor` at which the memory's handle begins, behind the device's number
WORD = 2048  # bytes of an Allgather of handles or names


class CudaPeerBuffers(PeerBuffers):
    """The messages of a node's ranks on GPUs, as one rank sees them.

    Args:
        rows, place: as in `PeerBuffers`.
        pulls: the pull message on each device, as bytes.
        places: for each rank, the index of its device in `pulls`.
    """

    staged = True

    def __init__(self, rows: Sequence[Tensor], place: int, pulls: Sequence[Tensor], places: Sequence[int]) -> None:
        own = places[place]
        super().__init__(rows, place, pulls[own])
        self._places, self._others = places, [pull for n, pull in enumerate(pulls) if n != own]
        self._far = [n for n, device in enumerate(places) if device != own]  # ranks on other devices
        first = places.index(own)
        self.combined, self.fills = rows[first], first == place

    def rows_of(self, part: slice) -> Rows:
        """Return a part of every push message, copied to this rank's device where it lies on another; see `PeerBuffers`."""
        parts = [row[part] for row in self.rows]
        return Rows(p.to(self.row.device, copy=True) if number in self._far else p for number, p in enumerate(parts))

    def store(self, part: slice, total: Tensor) -> None:
        """Copy the result for a part to the first push message on this rank's device; see `PeerBuffers`."""
        if self.combined is not self.rows[0]:
            self.combined[part].copy_(total)

    def assign(self, buckets: Sequence[Sequence[slice]]) -> None:
        """Note the device that holds the result for each slice; see `PeerBuffers`."""
        self._served = [(place, span) for bucket in buckets for place, span in zip(self._places, bucket, strict=False)]

    def gathered(self, part: slice) -> Tensor:
        """Return the combined part, with the slices of other devices copied from there; see `PeerBuffers`."""
        if not self._far:
            return super().gathered(part)
        found = torch.empty_like(self.row[part])
        for place, span in self._served:
            inside = both(part, span)
            if inside.start < inside.stop:
                there = self.rows[self._places.index(place)][inside]
                found[inside.start - part.start : inside.stop - part.start].copy_(there)
        return found

    def sum_tails(self, out: Tensor) -> None:
        """Sum the tails on this rank's device; see `PeerBuffers`."""
        first, *others = self.rows_of(slice(-len(out), None))
        total = first.clone()
        for tail in others:
            total.add_(tail)
        out.copy_(total)

    def copy_to_peers(self, part: slice) -> None:
        """Copy the part to the pull message on every other device; see `PeerBuffers`."""
        for pull in self._others:
            pull[part].copy_(self.pull[part])


class StreamSyncBarrier:
    """A barrier for ranks with work on a GPU: a rank synchronises its stream before it arrives or releases.

    Args:
        barrier: the barrier on the host.
        wait: synchronises this rank's stream.
    """

    absent: Set[int] = frozenset()

    def __init__(self, barrier: Barrier, wait: Callable[[], None]) -> None:
        self._barrier, self._wait = barrier, wait
        self.leads = barrier.leads

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Synchronise the stream, then arrive; see `Barrier`."""
        self._wait()
        self._barrier.arrive(meanwhile)

    def release(self) -> None:
        """Synchronise the leader's stream, then release; see `Barrier`."""
        if self.leads:
            self._wait()
        self._barrier.release()


def as_here(work: Callable[[], None]) -> Callable[[], None]:
    """Return `work` bound to this thread's CUDA stream and device, to be called on another thread."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return work
    stream = torch.cuda.current_stream()

    def there() -> None:
        with torch.cuda.stream(stream):
            work()

    return there


def mapped(node: Any, spec: BufferSpec) -> tuple[list[Tensor], list[Tensor], list[int]] | None:
    """Allocate the messages on GPUs and map them on all ranks of the MPI communicator `node`.

    Returns:
        The push messages of all ranks, the pull message on each device, and for each rank the index of its device. None, on all
        ranks, if a rank cannot map the others' memory: it sees only its own GPU, or the driver does not allow it.
    """
    names = _names(node, spec.device)
    devices = list(dict.fromkeys(names))
    places = [devices.index(name) for name in names]
    rows = opened(node, spec.device, spec.row, list(range(node.size)))
    pulls = opened(node, spec.device, spec.pull, [places.index(number) for number in range(len(devices))])
    return (rows, pulls, places) if rows and pulls else None


def opened(node: Any, device: torch.device, nbytes: int, owners: list[int]) -> list[Tensor]:
    """Allocate `nbytes` zero bytes on the device of each rank in `owners`, and map them on all ranks of `node`.

    Returns:
        The uint8 tensors in the order of `owners`; an empty list, on all ranks, if that fails on any rank.
    """
    seen, names = _seen(), _names(node, device)
    own, handle = None, b""
    if node.rank in owners:
        try:
            own = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            handle = _handle(own)
        except RuntimeError:  # too little memory, or memory that cannot be mapped
            handle = b""
    handles = _allgather(node, handle if len(handle) <= WORD - 8 else b"")
    found: list[Tensor] = []
    try:
        for rank in owners:
            found.append(own if own is not None and rank == node.rank else _open(handles[rank], seen.index(names[rank])))
    except (RuntimeError, ValueError):  # the device is not visible here, or there is no handle
        found = []
    return found if all(_allgather(node, b"mapped" if found else b"")) else []


def pin(memory: Tensor, buffers: PeerBuffers) -> None:
    """Pin host memory, so that the buffers' device can access it directly. If that fails, copies merely take longer."""
    if not memory.numel():
        return
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        try:
            torch.zeros(1, device=buffers.row.device)  # clears the error, which the next kernel would report
        except RuntimeError:
            return
    else:
        weakref.finalize(buffers, lambda: cuda.cudaHostUnregister(memory.data_ptr())).atexit = False


def _seen() -> list[bytes]:
    """Return the names of the devices that this rank sees, in the order of their numbers."""
    return [_name(number) for number in range(torch.cuda.device_count())]


def _names(node: Any, device: torch.device) -> list[bytes]:
    """Return the name of each rank's device."""
    return _allgather(node, _seen()[torch.zeros(0, device=device).get_device()])


def _name(number: int) -> bytes:
    """Return a device's UUID, which is the same in all processes."""
    return str(torch.cuda.get_device_properties(number).uuid).encode()


def _handle(own: Tensor) -> bytes:
    """Return what other processes need to map a uint8 tensor, as JSON."""
    _, given = reduce_tensor(own)  # type: ignore[no-untyped-call]
    fields = [own.numel(), own.storage_offset(), *given[HANDLE:]]
    return json.dumps([one.hex() if isinstance(one, bytes) else one for one in fields]).encode()


def _open(handle: bytes, device: int) -> Tensor:
    """Map another rank's tensor, given its handle and its device's number in this process."""
    fields = json.loads(handle)
    numel, offset, *rest = [bytes.fromhex(one) if isinstance(one, str) else one for one in fields]
    what = Tensor, (numel,), (1,), offset, TypedStorage, torch.uint8, device
    tensor: Tensor = rebuild_cuda_tensor(*what, *rest)  # type: ignore[no-untyped-call]
    return tensor


def _allgather(node: Any, word: bytes) -> list[bytes]:
    """Return every rank's bytes, of which there may be at most WORD - 8."""
    mine = np.zeros(WORD, dtype=np.uint8)
    mine[: 8 + len(word)] = np.frombuffer(len(word).to_bytes(8, "little") + word, dtype=np.uint8)
    every = np.empty((node.size, WORD), dtype=np.uint8)
    node.Allgather(mine, every)
    return [row[8 : 8 + int.from_bytes(row[:8].tobytes(), "little")].tobytes() for row in every]
