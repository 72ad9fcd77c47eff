"""Memory that all ranks of a node map: a file in /dev/shm, unlinked as soon as all ranks have opened it.

It is not an `MPI.Win`, as MPI promises nothing about windows after a failure. Nothing is left behind, however the ranks end.
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
    """Map zeroed memory that all ranks of the MPI communicator `node` share.

    Args:
        node: the MPI communicator of the node's ranks.
        nbytes: the size in bytes.
        own: the parts that this rank allocates, so that they lie in memory near its core. All ranks' parts together cover the
            whole.

    Returns:
        The mapping; None, on all ranks, if any rank fails to open or allocate it.
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
    node.Barrier()  # unlinked before the allocation, which may take seconds: a rank killed meanwhile leaves nothing behind
    if opened and _all(node, all(_allocate(file, part) for part in own)):
        memory = mmap.mmap(file, nbytes)
    if file >= 0:
        os.close(file)
    return memory


def _open(path: str, flags: int) -> int:
    """Return the file descriptor; -1 if the file cannot be opened."""
    try:
        return os.open(path, os.O_RDWR | flags, 0o600)
    except OSError:
        return -1


def _allocate(file: int, part: slice) -> bool:
    """Return whether the part could be allocated. Without this, a full /dev/shm would be a bus error at the first write."""
    try:
        if part.start < part.stop:
            os.posix_fallocate(file, part.start, part.stop - part.start)
    except OSError:
        return False
    return True


def _all(node: Any, own: bool) -> bool:
    """Return whether `own` is true on all ranks."""
    every = np.zeros(node.size, dtype=np.uint8)
    node.Allgather(np.array([own], dtype=np.uint8), every)
    return bool(every.all())


def tensor(memory: mmap.mmap, offset: int, nbytes: int) -> Tensor:
    """Return `nbytes` bytes of the memory from `offset`, as a uint8 tensor."""
    return (
        torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)
        if nbytes
        else torch.empty(0, dtype=torch.uint8)
    )
