"""The round written with mpi4py alone: Reduce to rank 0, the step there, Bcast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mpips.cli.bench.gradient import Gradient
from mpips.cli.bench.own import MakeStep

if TYPE_CHECKING:
    from mpi4py import MPI


class RawMpi:
    """The round on contiguous buffers, in which rank 0 is a worker, too.

    Args:
        comm: all ranks.
        weights: `(numel,)` float32, the initial weights, which the object takes over.
        scratch: `(numel,)` float32, for gradients; others may use it between rounds.
        make: makes the optimizer.
    """

    alone = False

    def __init__(self, comm: MPI.Comm, weights: Tensor, scratch: Tensor, make: MakeStep) -> None:
        from mpi4py import MPI

        self._comm, self._in_place = comm, MPI.IN_PLACE
        self._gradient = Gradient(comm.rank, [scratch.numel()])
        self._sum, self._weights = scratch, weights
        parameter = nn.Parameter(weights)
        parameter.grad = scratch
        self._optimizer = make([parameter])
        self.weights = [weights]

    def fill(self) -> None:
        """Write new gradients."""
        self._gradient.write([self._sum])

    def round(self) -> None:
        """Reduce, step, Bcast."""
        comm = self._comm
        if comm.rank:
            comm.Reduce(self._sum.numpy(), None, root=0)
        else:
            comm.Reduce(self._in_place, self._sum.numpy(), root=0)
            self._sum.div_(comm.size)
            self._optimizer.step()
        comm.Bcast(self._weights.numpy(), root=0)
