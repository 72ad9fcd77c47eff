"""How much memory the server needs for a rule, and how long a round takes: `mpiexec -n 17 python benchmarks/rule_memory.py`.

Each rank but the first pushes a model of 50 MB (or of as many MB as the argument says). For each rule rank 0 prints how far
its peak resident memory (VmHWM) rose above what it held before, and the second of two rounds' seconds. Linux only.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

from mpips.comm.mpi import connect
from mpips.config import Config, Robust
from mpips.model.message import Push, WorkerStatus, replicate
from mpips.reduce.aggregate import aggregate
from mpips.rules import RULES, choose

BUCKET = 16_000_000  # bytes, as `bucket_cap_mb` has it


def resident(what: str) -> float:
    """A line of /proc/self/status in MB."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def fill(push: Push, rank: int, numel: int) -> None:
    """What a worker would push."""
    push.message.zero_()
    if rank:
        push.gradients[:numel].normal_()
        push.write(rank, WorkerStatus(samples=1, weight=1), ())


def main() -> None:
    """All rules, one after another, each on a communicator of its own: buffers of the one before are gone."""
    numel = int(float(sys.argv[1]) * 250_000) if len(sys.argv) > 1 else 12_500_000
    push: Push | None = None
    for name in RULES:
        communicator = connect(BUCKET, cuda_aware=False)
        model = nn.ParameterDict({"weight": torch.zeros(numel)}) if push is None else None
        if model is not None:
            push = replicate(model, Config(), communicator.size, communicator.allocate).push
        assert push is not None
        config = Config(rule=name, robust=Robust(num_byzantine=1))
        rule, last = choose(config)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, seconds = resident("VmRSS"), 0.0
        for _ in range(2):
            fill(push, communicator.rank, numel)
            communicator.barrier(None)
            begun = time.perf_counter()
            aggregate(communicator, push, rule, last, 1)
            communicator.barrier(None)
            seconds = time.perf_counter() - begun
        if communicator.rank == 0:
            grown = resident("VmHWM") - before
            print(
                f"{name:10} {communicator.size - 1} workers of {numel * 4 / 1e6:.0f} MB: "
                f"peak +{grown:6.0f} MB, {seconds:5.2f} s",
                flush=True,
            )
        communicator.comm.Free()


main()
