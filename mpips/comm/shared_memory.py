"""Memory that all ranks of a node map: one file in /dev/shm, unlinked as soon as all have it.

Not `MPI.Win`: windows are outside what MPI promises after a failure. Nothing is left behind, however the ranks end.
"""

from __future__ import annotations

import mmap
import os
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = "/dev/shm"
PAGE = mmap.PAGESIZE


def mapped(node: Any, nbytes: int, own: list[slice]) -> mmap.mmap | None:
    """Zeros that every rank of the communicator `node` maps; None, on all of them, where that cannot be.

    Args:
        node: the ranks.
        nbytes: how many.
        own: bytes that this rank will work on: they are taken from the memory next to it. All ranks' together are all.
    """
    path = f"{FOLDER}/mpips-{secrets.token_hex(8)}" if node.rank == 0 else ""
    file = _open(path, os.O_CREAT | os.O_EXCL) if path else -1
    name = np.zeros(256, dtype=np.uint8)
    name[: len(path)] = np.frombuffer(path.encode(), dtype=np.uint8)
    node.Bcast(name, root=0)
    if node.rank:
        file = _open(name.tobytes().rstrip(b"\0").decode(), 0)  # containers may have a /dev/shm each
    memory = None
    opened = _all(node, file >= 0)
    if node.rank == 0 and file >= 0:
        os.unlink(path)
    node.Barrier()  # taking the memory may take seconds: a rank killed meanwhile leaves nothing behind
    if opened and _all(node, all(_allocate(file, part) for part in own)):
        memory = mmap.mmap(file, nbytes)
    if file >= 0:
        os.close(file)
    return memory


def _open(path: str, flags: int) -> int:
    """Its descriptor; -1 if that fails."""
    try:
        return os.open(path, os.O_RDWR | flags, 0o600)
    except OSError:
        return -1


def _allocate(file: int, part: slice) -> bool:
    """Whether there is room; a full /dev/shm would else be a bus error at the first write."""
    try:
        if part.start < part.stop:
            os.posix_fallocate(file, part.start, part.stop - part.start)
    except OSError:
        return False
    return True


def _all(node: Any, own: bool) -> bool:
    """Whether all ranks say so."""
    said = np.zeros(node.size, dtype=np.uint8)
    node.Allgather(np.array([own], dtype=np.uint8), said)
    return bool(said.all())


def tensor(memory: mmap.mmap, offset: int, nbytes: int) -> Tensor:
    """So many bytes of the memory."""
    return (
        torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)
        if nbytes
        else torch.empty(0, dtype=torch.uint8)
    )
