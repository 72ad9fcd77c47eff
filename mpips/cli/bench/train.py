"""Training end to end, on the same batches for all: one process without mpips, opponents, and mpips.

The single process trains on the union of the workers' batches, so its arithmetic and its weights are the same. Meanwhile the
other ranks sleep. `plain` has one core; `plain_threads` has as many torch threads as the ranks have cores together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips.cli.bench.agreement import agree
from mpips.cli.bench.case import Case, case, rate
from mpips.cli.bench.clock import Variant, interleave
from mpips.cli.bench.facts import communicator, facts, leaders
from mpips.cli.bench.opponents import opponents
from mpips.cli.bench.own import connected, join, momentum_sgd
from mpips.process.environment import cores

Data = tuple[Tensor, Tensor]  # (n, 28, 28) uint8, (n,) int64
ROUNDING = 1e-4  # of 1 + |weight|: rounding accumulates over some hundred training steps


def train(options: argparse.Namespace) -> list[Case]:
    """Return one case. Called on every rank."""
    join()
    comm = communicator()
    hosts = leaders(comm)
    against = opponents(options.against, "wrap")
    if comm.rank == 0:
        print(f"mpips bench: {comm.size} ranks train", file=sys.stderr, flush=True)
    each, steps, make = options.batch_size, options.steps, momentum_sgd(fused=False)
    whole = load(options.data, steps * each * comm.size)
    own_data = tuple(
        torch.unflatten(part, 0, (steps, comm.size, each))[:, comm.rank].flatten(0, 1).contiguous() for part in whole
    )
    together = min(comm.size, cores()) if len(hosts) == 1 else cores()
    wrapped = {name: wrap(comm, network()) for name, wrap in against.items()}
    model = network()
    with connected(join(), model, make) as ps:
        plain = Plain(network(), whole, each * comm.size)
        threaded = Plain(network(), whole, each * comm.size, together)
        own = Mpips(ps, model, (own_data[0], own_data[1]), each, options.repeats)
        others = {"plain": plain, "plain_threads": threaded}
        others |= {name: Plain(theirs, (own_data[0], own_data[1]), each, alone=False) for name, theirs in wrapped.items()}
        variants: dict[str, Variant] = {"mpips": own, **others}
        seconds = interleave(comm, variants, options.repeats)
        weights = {name: them.weights if comm.rank == 0 or not them.alone else None for name, them in others.items()}
        with torch.no_grad():
            agreed = agree(comm, list(model.parameters()), weights, f"training on {comm.size} ranks", ROUNDING)
    found = case({"n": comm.size, "batch_size": each}, seconds, steps)
    found |= rate(found, "samples_per_s", each * comm.size)
    found["efficiency"] = found["plain_to_mpips"] / (together if len(hosts) == 1 else comm.size)
    details = {"repeats": options.repeats, "steps": steps, **agreed, "together": together}
    return [found | details | facts(len(hosts))]


def network() -> nn.Module:
    """Return a small CNN for MNIST. It has no BatchNorm, whose statistics would depend on each worker's own batches."""
    torch.manual_seed(0)

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(nn.Unflatten(1, (1, 28)), *block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(1568, 10))


def load(file: Path | None, count: int) -> Data:
    """Return `count` images and labels: from the file, repeated if necessary, or made up if there is none."""
    if file is None:
        return made_up(count)
    import h5py

    with h5py.File(file) as f:
        images, labels = (torch.from_numpy(f["train"][name][:count]) for name in ("images", "labels"))
    chosen = torch.arange(count) % len(images)
    return images[chosen], labels.long()[chosen]


def made_up(count: int) -> Data:
    """Return noise with a bright square whose position is the label, so that it can be learned."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 2 + 13 * (label // 5), 5 * (label % 5)
        image[row : row + 10, column : column + 5] += 180
    return images, labels


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(model(x / 255), y)


class Plain:
    """The ordinary loop: of one process on all batches, or of an opponent's worker on its own batches."""

    def __init__(self, model: nn.Module, data: Data, batch_size: int, threads: int = 1, alone: bool = True) -> None:
        self.model, self.alone = model, alone
        self._batches = list(zip(*(torch.split(part, batch_size) for part in data), strict=True))
        self._optimizer = momentum_sgd(fused=False)(list(model.parameters()))
        self._threads = threads

    @property
    def weights(self) -> list[Tensor]:
        """Return the parameters."""
        return list(self.model.parameters())

    def fill(self) -> None:
        """Set the number of threads."""
        torch.set_num_threads(self._threads)

    def round(self) -> None:
        """Train one epoch."""
        for x, y in self._batches:
            self._optimizer.zero_grad()
            torch.autograd.backward(loss_of(self.model, x, y))
            self._optimizer.step()


class Mpips:
    """The loop of a script that uses mpips."""

    alone = False

    def __init__(self, ps: mpips.Run, model: nn.Module, data: Data, batch_size: int, repeats: int) -> None:
        self._ps, self._model, self._data, self._batch_size = ps, model, data, batch_size
        self._epochs = iter(ps.epochs(1_000_000 + repeats))  # more than will run: the last one would write a checkpoint

    def fill(self) -> None:
        """Begin an epoch."""
        torch.set_num_threads(1)
        next(self._epochs)

    def round(self) -> None:
        """Train one epoch."""
        batches: Iterable[Data] = self._ps.batches(self._data, self._batch_size, shuffle=False, shard=False)
        for x, y in batches:
            loss = loss_of(self._model, x, y)
            torch.autograd.backward(loss)
            self._ps.step(loss)
