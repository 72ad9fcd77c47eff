"""The round as written with mpi4py alone: Reduce to rank 0, which also trains, the step there, Bcast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpi4py import MPI
from torch import nn


def make_round(comm: MPI.Comm, weights: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a round: Reduce, step, Bcast."""
    gradient, values = weights.grad, weights.detach()
    assert gradient is not None

    def run() -> None:
        if comm.rank:
            comm.Reduce(gradient.numpy(), None, root=0)
        else:
            comm.Reduce(MPI.IN_PLACE, gradient.numpy(), root=0)
            gradient.div_(comm.size)
            optimizer.step()
        comm.Bcast(values.numpy(), root=0)

    return run
