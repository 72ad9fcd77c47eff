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
LAUNCHER = "MPIPS_LAUNCH_DIR"  # names the launcher's folder, which must not learn of benchmark runs
SAMPLES = 64  # samples of a step, for the weighted mean
SETTINGS: dict[str, Any] = {"server_trains": True, "checkpoint": {"every": 0, "epochs": 0, "keep": 1}}


def momentum_sgd(fused: bool) -> MakeStep:
    """Return the maker of the optimizer that all variants use."""
    return lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=fused or None)


def join() -> Communicator:
    """Return this rank's communicator for mpips."""
    return mpips.join(mpips.configure(**SETTINGS))


@contextmanager
def connected(
    communicator: Communicator, model: nn.Module, make: MakeStep, parent: Path | None = None, every: int = 0
) -> Iterator[mpips.Run]:
    """Yield a run with a temporary folder, created in `parent` if that is given, and a checkpoint after `every` rounds."""
    name = tempfile.mkdtemp(prefix="mpips-bench-", dir=parent) if communicator.rank == 0 else ""
    folder = broadcast_bytes(communicator, name.encode()).decode()
    launcher = os.environ.pop(LAUNCHER, None)
    try:
        settings = SETTINGS | {"checkpoint": SETTINGS["checkpoint"] | {"every": every}}
        yield mpips.connect(model, make, communicator=communicator, run_dir=folder, **settings)
        communicator.barrier(patience=None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if launcher is not None:
            os.environ[LAUNCHER] = launcher


class Parts(nn.Module):
    """A model that consists of its parameters only."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        lengths = parts_of(weights.numel())
        self.parts = nn.ParameterList(nn.Parameter(part.clone()) for part in torch.split(weights, lengths))


class Endless:
    """An endless sequence of batches whose contents do not matter."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the same batch forever."""
        batch = torch.zeros(SAMPLES)
        while True:
            yield batch


class Own:
    """The round of `ps.step`, in which rank 0 is a worker, too.

    Args:
        ps: the run.
        rank: this rank.
        model: the model.
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
        """Take the next batch and do its backward: gradients reach the push message as those of a script do."""
        next(self._batches)
        loss = Loss.apply(self._gradient, *self._model.parts)  # type: ignore[no-untyped-call]
        torch.autograd.backward(loss)

    def round(self) -> None:
        """Push, reduce, step, pull."""
        self._ps.step(0.0, samples=SAMPLES)

    def leave(self) -> None:
        """Break out of the loop, as a script may."""
        self._batches.close()
