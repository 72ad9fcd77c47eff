"""Messages on GPUs: the ranks of a node map each other's messages by CUDA IPC, and combine and step on the device.

Each rank's push message lies on its own GPU. The pull message is there once on each GPU, for all ranks that share it; whoever
has stepped a slice writes it to the other GPUs, too. What ranks say to each other before that, a few numbers, stays in the
host's memory, where they also meet: a rank's stream is waited for before it arrives, so whoever is let go on finds everything
written, and nobody still reads.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from torch.storage import TypedStorage

from mpips.comm.node_group import Barrier, BufferSpec
from mpips.comm.peer_buffers import PeerBuffers, Rows
from mpips.model.layout import both

HANDLE = 7  # where among what `reduce_tensor` gives the handle of the memory begins; before it the number of the device
WORD = 2048  # bytes that a rank tells the others


class CudaPeerBuffers(PeerBuffers):
    """One rank's view.

    Args:
        rows, place: as of `PeerBuffers`.
        pulls: the pull message on each device, as bytes.
        places: for each rank, which of the devices it is on.
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
        """See `PeerBuffers`; on this device."""
        parts = [row[part] for row in self.rows]
        return Rows(p.to(self.row.device, copy=True) if number in self._far else p for number, p in enumerate(parts))

    def store(self, part: slice, total: Tensor) -> None:
        """See `PeerBuffers`; here that is the first push message on this device."""
        if self.combined is not self.rows[0]:
            self.combined[part].copy_(total)

    def assign(self, buckets: Sequence[Sequence[slice]]) -> None:
        """See `PeerBuffers`."""
        self._served = [(place, span) for bucket in buckets for place, span in zip(self._places, bucket, strict=False)]

    def gathered(self, part: slice) -> Tensor:
        """See `PeerBuffers`; what others serve is fetched from their devices."""
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
        """See `PeerBuffers`."""
        first, *others = self.rows_of(slice(-len(out), None))
        total = first.clone()
        for tail in others:
            total.add_(tail)
        out.copy_(total)

    def copy_to_peers(self, part: slice) -> None:
        """See `PeerBuffers`."""
        for pull in self._others:
            pull[part].copy_(self.pull[part])


class StreamSyncBarrier:
    """How ranks with work on a GPU wait for each other: each waits for its own work first.

    Args:
        meeting: how they wait on the host.
        wait: for this rank's stream.
    """

    def __init__(self, barrier: Barrier, wait: Callable[[], None]) -> None:
        self._barrier, self._wait = barrier, wait
        self.leads = barrier.leads

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """See `Barrier`."""
        self._wait()
        self._barrier.arrive(meanwhile)

    def release(self) -> None:
        """See `Barrier`."""
        if self.leads:
            self._wait()
        self._barrier.release()


def as_here(work: Callable[[], None]) -> Callable[[], None]:
    """Work for another thread, on the device and the stream of this one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return work
    stream = torch.cuda.current_stream()

    def there() -> None:
        with torch.cuda.stream(stream):
            work()

    return there


def mapped(node: Any, spec: BufferSpec) -> tuple[list[Tensor], list[Tensor], list[int]] | None:
    """The push messages of all ranks of the communicator `node`, the pull message on each of their devices, who is on which.

    None, on all of them, if some cannot map the others' memory: it sees only its own GPU, or its driver does not let it.
    """
    names = _names(node, spec.device)
    devices = list(dict.fromkeys(names))
    places = [devices.index(name) for name in names]
    rows = opened(node, spec.device, spec.row, list(range(node.size)))
    pulls = opened(node, spec.device, spec.pull, [places.index(number) for number in range(len(devices))])
    return (rows, pulls, places) if rows and pulls else None


def opened(node: Any, device: torch.device, nbytes: int, owners: list[int]) -> list[Tensor]:
    """Zeros on the devices of each of the `owners`, mapped by all ranks; nothing at all, on all, if that fails anywhere."""
    seen, names = _seen(), _names(node, device)
    own, handle = None, b""
    if node.rank in owners:
        try:
            own = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            handle = _handle(own)
        except RuntimeError:  # no room for it, or nothing that can be mapped
            handle = b""
    handles = _told(node, handle if len(handle) <= WORD - 8 else b"")
    found: list[Tensor] = []
    try:
        for rank in owners:
            found.append(own if own is not None and rank == node.rank else _open(handles[rank], seen.index(names[rank])))
    except (RuntimeError, ValueError):  # of a device that is not seen here, or has no handle
        found = []
    return found if all(_told(node, b"mapped" if found else b"")) else []


def pin(memory: Tensor, buffers: PeerBuffers) -> None:
    """Let the board's device read and write this memory of the host by itself; where it cannot be, copies take longer."""
    if not memory.numel():
        return
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        try:
            torch.zeros(1, device=buffers.row.device)  # the next kernel would be told of it
        except RuntimeError:
            return
    else:
        weakref.finalize(buffers, lambda: cuda.cudaHostUnregister(memory.data_ptr())).atexit = False


def _seen() -> list[bytes]:
    """The devices that this rank sees, by number."""
    return [_name(number) for number in range(torch.cuda.device_count())]


def _names(node: Any, device: torch.device) -> list[bytes]:
    """Which device each rank is on."""
    return _told(node, _seen()[torch.zeros(0, device=device).get_device()])


def _name(number: int) -> bytes:
    """What all processes call a device."""
    return str(torch.cuda.get_device_properties(number).uuid).encode()


def _handle(own: Tensor) -> bytes:
    """What others need to map a tensor of bytes."""
    _, given = reduce_tensor(own)  # type: ignore[no-untyped-call]
    told = [own.numel(), own.storage_offset(), *given[HANDLE:]]
    return json.dumps([one.hex() if isinstance(one, bytes) else one for one in told]).encode()


def _open(handle: bytes, device: int) -> Tensor:
    """Map another rank's tensor, which is on the device of this number, here."""
    told = json.loads(handle)
    numel, offset, *rest = [bytes.fromhex(one) if isinstance(one, str) else one for one in told]
    what = Tensor, (numel,), (1,), offset, TypedStorage, torch.uint8, device
    tensor: Tensor = rebuild_cuda_tensor(*what, *rest)  # type: ignore[no-untyped-call]
    return tensor


def _told(node: Any, word: bytes) -> list[bytes]:
    """What every rank says."""
    mine = np.zeros(WORD, dtype=np.uint8)
    mine[: 8 + len(word)] = np.frombuffer(len(word).to_bytes(8, "little") + word, dtype=np.uint8)
    every = np.empty((node.size, WORD), dtype=np.uint8)
    node.Allgather(mine, every)
    return [row[8 : 8 + int.from_bytes(row[:8].tobytes(), "little")].tobytes() for row in every]
