"""Peak memory of a rank in synchronous training, in models: `mpiexec -n 8 python benchmarks/memory.py`, for several n.

The peak resident memory (VmHWM, shared pages included) of each rank, from `connect` over three rounds with momentum SGD, less
that of a run with next to no model, by the model's size. All ranks train. `MALLOC_MMAP_THRESHOLD_=65536` before it: without
what glibc keeps of freed gradients. `--shared_memory false`: MPI carries the messages.
Linux only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch
from torch import nn

import mpips
from mpips.config import add_arguments

ROUNDS = 3


def resident(what: str) -> float:
    """A line of /proc/self/status in MB."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def peak(mb: float) -> float:
    """The peak in MB of a run with a model of so many MB, at rank 0 and elsewhere."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    model = nn.ParameterList([torch.zeros(round(mb * 1e6 / 4 / 25)) for _ in range(25)])
    with tempfile.TemporaryDirectory() as folder:
        ps = mpips.connect(
            model,
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
            server_trains=True,
            checkpoint={"epochs": 0},
            run_dir=folder,
        )
        for _ in ps.batches((torch.zeros(ROUNDS, 1),), 1, shard=False):
            for p in model:
                p.sum().backward()  # one by one, so that autograd's own memory is small
            ps.step(0.0, 1)
        found = resident("VmHWM")
        ps.close()
    return found


def main() -> None:
    """A run with next to no model, then one with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=50.0, help="the model's size in MB")
    add_arguments(parser)
    mb = parser.parse_args().mb
    constant = peak(0.01)
    models = (peak(mb) - constant) / mb
    print(f"{models:.2f} models of {mb:.0f} MB, and {constant:.0f} MB whatever the model", flush=True)


main()
