"""Time a round of each aggregation rule on one node, beside the mean: `mpiexec -n 4 python benchmarks/rules.py`.

All ranks contribute, rank 0 too. Variants are interleaved: each repeat connects once for each variant and takes the least of
its rounds. Printed are the median over the repeats, in ms, and its ratio to the mean's. `--shared-memory false` sends messages.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

import mpips
from mpips.comm import Communicator, broadcast_bytes

VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "deterministic": {"deterministic": True},
    "median": {"rule": "median"},
    "trimmed": {"rule": "trimmed", "robust": {"num_byzantine": 1}},
    "krum": {"rule": "krum", "robust": {"num_byzantine": 0}},
    "multikrum": {"rule": "multikrum", "robust": {"num_byzantine": 0}},
    "rfa": {"rule": "rfa"},
}


class Model(nn.Module):
    """A model that is its parameters."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(numel // 16)) for _ in range(16))


def measure(communicator: Communicator, numel: int, rounds: int, settings: dict[str, Any]) -> float:
    """Return the seconds of the fastest of some rounds."""
    model = Model(numel)
    made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    folder = tempfile.mkdtemp() if communicator.rank == 0 else ""
    folder = broadcast_bytes(communicator, folder.encode()).decode()
    given = {"server_trains": True, "checkpoint": {"epochs": 0}, **settings}
    ps = mpips.connect(model, made, communicator=communicator, run_dir=f"{folder}/run", **given)
    torch.manual_seed(communicator.rank)
    values, taken = torch.randn(numel // 16), []
    for _ in range(rounds):
        for p in model.parameters():
            p.grad = values.clone()
        communicator.barrier(None)
        begun = time.perf_counter()
        ps.step(0.0, samples=64)
        communicator.barrier(None)
        taken.append(time.perf_counter() - begun)
    ps.close()
    return min(taken)


def main() -> None:
    """Measure all variants, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=64, help="the model's size, of 2^20 bytes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared-memory", choices=["true", "false"], default="true")
    args = parser.parse_args()
    communicator = mpips.join(mpips.configure(server_trains=True))
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, settings in VARIANTS.items():
            given = {**settings, "shared_memory": args.shared_memory == "true"}
            found[name].append(measure(communicator, int(args.mb * 2**18), args.rounds, given))
    if communicator.rank == 0:
        mean = statistics.median(found["mean"])
        for name, seconds in found.items():
            print(
                f"{name:14} {1e3 * statistics.median(seconds):8.1f} ms  {statistics.median(seconds) / mean:5.2f} x", flush=True
            )


if __name__ == "__main__":
    main()
