"""A room on GPUs: the ranks of a node map each other's messages by CUDA IPC, and combine and step on the device.

Each rank's push message lies on its own GPU. The pull message is there once on each GPU, for all ranks that share it; whoever
has stepped a slice writes it to the other GPUs, too. What ranks say to each other before that, a few numbers, stays in the
host's memory, where they also meet: a rank's stream is waited for before it arrives, so whoever is let go on finds everything
written, and nobody still reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from torch.storage import TypedStorage

from mpips.exchange.room import Contents, Meeting, Room, Work

HANDLE = 7  # where among what `reduce_tensor` gives the handle of the memory begins; before it the number of the device
WORD = 2048  # bytes that a rank tells the others


class DeviceRoom(Room):
    """One rank's place in it.

    Args:
        members, rank, rows, meeting, contents: as of `Room`.
        pulls: the pull message on each device, as bytes.
        places: for each rank, which of the devices it is on.
        parts: the reports and the answer, on the host.
    """

    def __init__(
        self,
        members: Sequence[int],
        rank: int,
        rows: Sequence[Tensor],
        pulls: Sequence[Tensor],
        places: Sequence[int],
        parts: Sequence[Tensor],
        meeting: Meeting,
        contents: Contents,
    ) -> None:
        place = members.index(rank)
        own, self._places = places[place], places
        super().__init__(members, rank, rows, [pulls[own], *parts], meeting, contents)
        self._far = [n for n, device in enumerate(places) if device != own]  # ranks on other devices
        self._first = places.index(own)
        self._pulls = [pull for n, pull in enumerate(pulls) if n != own]
        self.fills = self._first == place

    @property
    def combined(self) -> Tensor:
        """See `Room`; here the first push message on this device."""
        return self.rows[self._first]

    def serve(self, buckets: Sequence[Sequence[slice]], behind: slice) -> None:
        """See `Room`."""
        super().serve(buckets, behind)
        self._served = [(place, span) for bucket in buckets for place, span in zip(self._places, bucket, strict=True)]

    def whole(self, part: slice) -> Tensor:
        """See `Room`; what others serve is fetched from their devices."""
        if not self._far:
            return super().whole(part)
        found = torch.empty_like(self.row[part])
        for place, span in self._served:
            start, stop = max(part.start, span.start), min(part.stop, span.stop)
            if start < stop:
                found[start - part.start : stop - part.start].copy_(self.rows[self._places.index(place)][start:stop])
        return found

    def _hear(self, out: Tensor) -> None:
        first, *others = (self._near(number, slice(-len(out), None)) for number in range(len(self.rows)))
        out.copy_(first)
        for tail in others:
            out.add_(tail)

    def _bring(self, span: slice, work: Work) -> None:
        rows = [self._near(number, span) for number in range(len(self.rows))]
        work.add(span, rows)
        work.finish(span, rows[0])
        if self._first:
            self.combined[span].copy_(rows[0])

    def _near(self, number: int, part: slice) -> Tensor:
        """A part of a rank's push message, on this device."""
        row = self.rows[number][part]
        return row.to(self.row.device, copy=True) if number in self._far else row

    def publish(self, fill: Callable[[], None], moved: bool = True, whole: bool = False) -> None:
        """See `Room`."""
        where, size = self.contents.weights, self.contents.dtype.itemsize
        for span in self.slices if moved else []:
            self._copy(slice(where.start + span.start * size, where.start + span.stop * size))

        def everywhere() -> None:
            fill()
            for part in [slice(None)] if whole else [slice(0, where.start), slice(where.stop, None)]:
                self._copy(part)

        super().publish(everywhere, moved)

    def _copy(self, part: slice) -> None:
        for pull in self._pulls:
            pull[part].copy_(self.pull[part])


class Fenced:
    """How ranks with work on a GPU wait for each other: each waits for its own work first.

    Args:
        meeting: how they wait on the host.
        wait: for this rank's stream.
    """

    def __init__(self, meeting: Meeting, wait: Callable[[], None]) -> None:
        self._meeting, self._wait = meeting, wait
        self.leads = meeting.leads

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """See `Meeting`."""
        self._wait()
        self._meeting.arrive(meanwhile)

    def release(self) -> None:
        """See `Meeting`."""
        if self.leads:
            self._wait()
        self._meeting.release()


def mapped(node: Any, contents: Contents) -> tuple[list[Tensor], list[Tensor], list[int]] | None:
    """The push messages of all ranks of the communicator `node`, the pull message on each of their devices, who is on which.

    None, on all of them, if some cannot map the others' memory: it sees only its own GPU, or its driver does not let it.
    """
    device, seen = contents.device, [_name(number) for number in range(torch.cuda.device_count())]
    names = _told(node, seen[torch.zeros(0, device=device).get_device()])
    devices = list(dict.fromkeys(names))
    places = [devices.index(name) for name in names]
    owner = [places.index(number) for number in range(len(devices))]
    rows = _opened(node, contents.row, list(range(node.size)), device, names, seen)
    pulls = _opened(node, contents.pull, owner, device, names, seen)
    return (rows, pulls, places) if rows and pulls else None


def _opened(
    node: Any, nbytes: int, owners: list[int], device: torch.device, names: list[bytes], seen: list[bytes]
) -> list[Tensor]:
    """Zeros of each of the `owners`, mapped by all ranks; nothing at all, on all of them, if that fails anywhere."""
    own, handle = None, b""
    if node.rank in owners:
        try:
            own = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            handle = _handle(own)
        except RuntimeError:  # no room for it, or nothing that can be mapped
            handle = b""
    handles = _told(node, handle if len(handle) <= WORD - 8 else b"")
    opened: list[Tensor] = []
    try:
        for rank in owners:
            opened.append(own if own is not None and rank == node.rank else _open(handles[rank], seen.index(names[rank])))
    except (RuntimeError, ValueError):  # of a device that is not seen here, or has no handle
        opened = []
    return opened if all(_told(node, b"mapped" if opened else b"")) else []


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
