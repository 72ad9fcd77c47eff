"""What DDP does on CPUs: gloo's all-reduce of the gradients, and the same step on every rank."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mpips.cli.bench.gradient import Gradient
from mpips.cli.bench.own import MakeStep

if TYPE_CHECKING:
    from mpi4py import MPI

GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR


class Gloo:
    """The round with torch.distributed. The arguments are those of `RawMpi`."""

    alone = False

    def __init__(self, comm: MPI.Comm, weights: Tensor, scratch: Tensor, make: MakeStep) -> None:
        self._size, self._sum = comm.size, scratch
        self._gradient = Gradient(comm.rank, [scratch.numel()])
        parameter = nn.Parameter(weights)
        parameter.grad = scratch
        self._optimizer = make([parameter])
        self.weights = [weights]

    def fill(self) -> None:
        """Write new gradients."""
        self._gradient.write([self._sum])

    def round(self) -> None:
        """All-reduce, then step."""
        dist.all_reduce(self._sum)
        self._sum.div_(self._size)
        self._optimizer.step()


def join_gloo(comm: MPI.Comm, hosts: int) -> None:
    """Initialise torch.distributed among the ranks of `comm`, once."""
    if dist.is_initialized():
        return
    if hosts == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = np.zeros(256, dtype=np.uint8)
    address = _address(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0])
    store = TCPStore(address, 0, comm.size, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    if store is not None:
        endpoint = f"{address}:{store.port}".encode()
        where[: len(endpoint)] = np.frombuffer(endpoint, dtype=np.uint8)
    comm.Bcast(where, root=0)
    host, _, port = where.tobytes().rstrip(b"\0").decode().rpartition(":")
    store = store or TCPStore(host, int(port), comm.size, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def _address(interface: str) -> str:
    """Return the address of this host for others: the IPv4 address of the interface if one is named, else the host's name."""
    if not interface:
        return socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def leave_gloo() -> None:
    """Destroy the process group, to avoid a warning at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
