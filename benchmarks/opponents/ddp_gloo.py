"""What DDP does on CPUs: gloo's all-reduce of the gradients, and the same step on every rank."""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import struct
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.distributed import TCPStore

GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR


def make_round(comm: MPI.Comm, weights: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a round: all-reduce, then step."""
    join(comm)
    gradient = weights.grad
    assert gradient is not None

    def run() -> None:
        dist.all_reduce(gradient)
        gradient.div_(comm.size)
        optimizer.step()

    return run


def wrap(comm: MPI.Comm, model: nn.Module) -> nn.Module:
    """Return the model in DDP."""
    join(comm)
    return nn.parallel.DistributedDataParallel(model)


def join(comm: MPI.Comm) -> None:
    """Initialise torch.distributed among the ranks of `comm`, once. Destroy it at exit, to avoid a warning."""
    if dist.is_initialized():
        return
    if on_one_host(comm):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = np.zeros(256, dtype=np.uint8)
    address = address_of(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0])
    store = TCPStore(address, 0, comm.size, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    if store is not None:
        endpoint = f"{address}:{store.port}".encode()
        where[: len(endpoint)] = np.frombuffer(endpoint, dtype=np.uint8)
    comm.Bcast(where, root=0)
    host, _, port = where.tobytes().rstrip(b"\0").decode().rpartition(":")
    store = store or TCPStore(host, int(port), comm.size, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    atexit.register(dist.destroy_process_group)


def on_one_host(comm: MPI.Comm) -> bool:
    """Return whether all ranks are on this host."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = node.size
    node.Free()
    return bool(size == comm.size)


def address_of(interface: str) -> str:
    """Return the address of this host for others: the IPv4 address of the interface if one is named, else the host's name."""
    if not interface:
        return socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])
