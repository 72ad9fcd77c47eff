"""Bounded staleness (Ho et al. 2013): how far a worker is ever ahead, and what the bound costs in time. Virtual time: the same
numbers on any machine, in a minute.

    python examples/reproduce/ssp_bound.py

4 workers, a step takes 10 ms, a slow one 50. Either worker 0 is always slow, or each step of any worker with probability 1/10.
A worker may begin a step while it is at most `staleness.bound` steps ahead of the slowest. What theory says of steps a second:

    bound 0 is synchronous   one slow: 4 / 50 ms = 80     any: 4 / E(slowest of 4) = 4 / (10 + 40 (1 - 0.9^4)) ms = 168
    no bound (async)         one slow: 3 / 10 + 1 / 50 ms = 320    any: 4 / (10 + 40 / 10) ms = 286

A bound hides slow steps that come by chance; behind a worker that is always slow the others end up waiting, whatever the bound.
"""

import contextlib
import io
import random
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mpips
from mpips.comm.simulated import World

WORKERS, STEPS = 4, 2000
BOUNDS: list[int | None] = [0, 1, 2, 4, 8, 16, None]


def run(bound: int | None, slow: str, steps: int = STEPS) -> tuple[float, int]:
    """Steps a second, all workers together, and the largest lead that a worker had when it began a step."""
    clocks, leads = [0] * WORKERS, [0]
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(steps, 4, generator=generator), torch.randn(steps, 1, generator=generator)

    def rank(end: Any) -> float:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        mode: dict[str, Any] = {"mode": "async"} if bound is None else {"mode": "ssp", "staleness": {"bound": bound}}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        ps = mpips.connect(model, optimizer, communicator=end, run_dir=folder, checkpoint={"epochs": 0}, **mode)
        dice, begun = random.Random(ps.worker), end.clock()
        for _ in ps.epochs(1):
            for x, y in ps.batches(data, 1):
                leads.append(clocks[ps.worker] - min(clocks))
                F.mse_loss(model(x), y).backward()
                late = ps.worker == 0 if slow == "one" else dice.random() < 0.1
                end.world.sleep(end.rank, 0.05 if late else 0.01)
                clocks[ps.worker] += 1
                ps.step(0.0)
        return end.clock() - begun

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seconds = max(World(WORKERS + 1).run(rank))
    return steps / seconds, max(leads)


def main() -> None:
    print(f"{'bound':>8}{'one slow: steps/s':>20}{'largest lead':>14}{'any: steps/s':>16}{'largest lead':>14}")
    for bound in BOUNDS:
        (one, first), (some, second) = run(bound, "one"), run(bound, "any")
        print(f"{'none' if bound is None else bound:>8}{one:>20.0f}{first:>14}{some:>16.0f}{second:>14}")


if __name__ == "__main__":
    main()
