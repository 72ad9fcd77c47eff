"""Facts about the machine and software of a measurement."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpips.process.environment import cores

if TYPE_CHECKING:
    from mpi4py import MPI


def communicator() -> MPI.Comm:
    """Return a communicator of all ranks, separate from other communication."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.Dup()


def leaders(comm: MPI.Comm) -> list[int]:
    """Return the first rank of each host."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(np.array([int(node.rank == 0)], dtype=np.int64), first)
    node.Free()
    return [int(rank) for rank in np.flatnonzero(first)]


def facts(hosts: int = 1, library: bool = True) -> dict[str, object]:
    """Return cores, hosts, load, library versions and settings, as included in each case."""
    found: dict[str, object] = {"cores": cores(), "hosts": hosts}
    if library:
        from mpi4py import MPI

        found["mpi"] = MPI.Get_library_version().splitlines()[0].rstrip("\0").split(",")[0].strip()
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MPIPS_") and "LAUNCH" not in name}
    found["load"] = round(os.getloadavg()[0], 1)  # of the last minute
    return found | {"torch": torch.__version__, "threads": torch.get_num_threads(), "settings": given}
