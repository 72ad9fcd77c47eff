"""mpips as a script uses it: `connect`, a `batches` loop, `step`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import mpips
from mpips.cli.bench.gradient import Gradient, Loss, parts_of
from mpips.comm import Communicator, broadcast_bytes

MakeStep = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LAUNCHER = "MPIPS_LAUNCH_DIR"  # names where the launcher looks for a run; these are none of its business
SAMPLES = 64  # a step's, as far as the weighted mean is concerned
SETTINGS: dict[str, Any] = {"server_trains": True, "checkpoint": {"every": 0, "epochs": 0, "keep": 1}}


def momentum_sgd(fused: bool) -> MakeStep:
    """The optimizer of all variants."""
    return lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=fused or None)


def join() -> Communicator:
    """This rank's communicator of its own."""
    return mpips.join(mpips.configure(**SETTINGS))


@contextmanager
def connected(communicator: Communicator, model: nn.Module, make: MakeStep, beside: Path | None = None) -> Iterator[mpips.Run]:
    """A run whose folder is temporary, in `beside` if that is given."""
    name = tempfile.mkdtemp(prefix="mpips-bench-", dir=beside) if communicator.rank == 0 else ""
    folder = broadcast_bytes(communicator, name.encode()).decode()
    launcher = os.environ.pop(LAUNCHER, None)
    try:
        yield mpips.connect(model, make, communicator=communicator, run_dir=folder, **SETTINGS)
        communicator.barrier(patience=None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if launcher is not None:
            os.environ[LAUNCHER] = launcher


class Parts(nn.Module):
    """A model that is its parameters."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        lengths = parts_of(weights.numel())
        self.parts = nn.ParameterList(nn.Parameter(part.clone()) for part in torch.split(weights, lengths))


class Endless:
    """Batches without end: what they hold is not looked at."""

    def __iter__(self) -> Iterator[Tensor]:
        """The same one for ever."""
        batch = torch.zeros(SAMPLES)
        while True:
            yield batch


class Own:
    """The round of `ps.step`, with rank 0 a worker, too.

    Args:
        ps: the run.
        rank: this rank.
        model: its model.
    """

    alone = False

    def __init__(self, ps: mpips.Run, rank: int, model: Parts) -> None:
        self._ps, self._model = ps, model
        self._batches = cast("Generator[Tensor, None, None]", iter(ps.batches(Endless(), shard=False)))
        self._gradient = Gradient(rank, [part.numel() for part in model.parts])

    @property
    def weights(self) -> list[Tensor]:
        """The parameters."""
        return [p.detach() for p in self._model.parts]

    def fill(self) -> None:
        """The next batch, and its backward: gradients come to where they are pushed from as those of a script do."""
        next(self._batches)
        loss = Loss.apply(self._gradient, *self._model.parts)  # type: ignore[no-untyped-call]
        torch.autograd.backward(loss)

    def round(self) -> None:
        """Push, combine, step, pull."""
        self._ps.step(0.0, samples=SAMPLES)

    def leave(self) -> None:
        """Break out of the loop, as a script may."""
        self._batches.close()
