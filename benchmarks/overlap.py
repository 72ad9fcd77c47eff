"""What share of communication `overlap` hides: `mpirun -n 4 --host one:2,two:2 python benchmarks/overlap.py --mb 25`.

Every rank trains on a model of equal layers. Loading a batch and its backward take as long as a round does: half of that each,
asleep, as when a GPU computes. Rounds with and without overlap take turns, some steps each; all must end with the same weights.
The share is (plain - overlapped) / (plain - compute), in seconds a step, of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import mpips

LAYERS, SAMPLES = 20, 4


class Layer(torch.autograd.Function):
    """Passes its input on; its backward takes a while, then there is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, seconds: list[float], value: float) -> Tensor:
        """The input."""
        ctx.numel, ctx.seconds, ctx.value = weights.numel(), seconds, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The same number everywhere."""
        time.sleep(ctx.seconds[0] / LAYERS)
        return upstream[0], torch.full((ctx.numel,), ctx.value), None, None


class Model(nn.Module):
    """Layers, one after another.

    Args:
        numel: of all of them.
        seconds: what a whole backward takes, to be changed from outside.
    """

    def __init__(self, numel: int, seconds: list[float]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(numel // LAYERS)) for _ in range(LAYERS))
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Nothing in particular."""
        for number, weights in enumerate(self.layers):
            x = Layer.apply(x, weights, self._seconds, 1.0 + number)  # type: ignore[no-untyped-call]
        return x.sum()


def batches(count: int, seconds: list[float]) -> Iterator[Tensor]:
    """So many, each of which takes a while to load."""
    for _ in range(count):
        time.sleep(seconds[0])
        yield torch.zeros(SAMPLES, requires_grad=True)


def steps(communicator: Any, numel: int, overlap: bool, compute: float, count: int) -> tuple[float, Tensor]:
    """The median seconds of a step on the server, and its weights."""
    half = [compute / 2]
    model = Model(numel, half)
    made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        ps = mpips.connect(
            model,
            made,
            communicator=communicator,
            run_dir=f"{folder}/run",
            overlap=overlap,
            server_trains=True,
            checkpoint={"every": 0, "epochs": 0, "keep": 1},
        )
        begun = []
        for x in ps.batches(batches(count, half), shard=False):
            begun.append(time.perf_counter())
            loss = model(x)
            ps.backward(loss, samples=SAMPLES)
            ps.step(0.0, samples=SAMPLES)
        weights = torch.cat([p.detach().clone() for p in model.parameters()])
        communicator.barrier(patience=None)
    return statistics.median(b - a for a, b in pairwise(begun[2:])), weights


def main() -> None:
    """Measure and print, on the server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=float, default=25, help="the model's size, of 2^20 bytes (25)")
    parser.add_argument("--steps", type=int, default=12, help="a turn (12)")
    parser.add_argument("--turns", type=int, default=3, help="of each (3)")
    options = parser.parse_args()
    communicator = mpips.join(mpips.configure())
    numel = int(options.mb * (1 << 18)) // LAYERS * LAYERS

    def tell(seconds: float) -> float:
        message = torch.tensor([seconds], dtype=torch.float64)
        communicator.broadcast(message)
        return float(message)

    alone = tell(steps(communicator, numel, False, 0.0, options.steps)[0])
    plain, overlapped = [], []
    for _ in range(options.turns):
        one, expected = steps(communicator, numel, False, alone, options.steps)
        other, weights = steps(communicator, numel, True, alone, options.steps)
        plain.append(one)
        overlapped.append(other)
        if not torch.equal(weights, expected):
            raise SystemExit(f"rank {communicator.rank}: other weights with overlap")
    if communicator.rank == 0:
        one, other = statistics.median(plain), statistics.median(overlapped)
        hidden = (one - other) / (one - alone)
        print(f"{communicator.size} ranks, {options.mb:g} MB: a round {alone * 1e3:.0f} ms, to compute takes as long")
        print(
            f"a step {one * 1e3:.0f} ms, with overlap {other * 1e3:.0f} ms: {hidden:.0%} of communication hidden, same weights"
        )


if __name__ == "__main__":
    main()
