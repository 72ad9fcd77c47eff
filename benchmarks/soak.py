"""What a long run leaves growing: `mpiexec -n 3 python benchmarks/soak.py --rounds 50000 [--mode async]`.

A tiny model trains for so many rounds, with a checkpoint every so often and a validation an epoch. At each checkpoint worker 0
looks at all ranks: resident memory, descriptors, threads, mappings of shared memory; and at the files. Slopes are least squares
over what is seen after the warm-up, the first tenth. Status 1 if one is above 1 KB per 1,000 rounds, or any number has changed.
Memory is what is the process's own, anonymous or shared. Pages of the libraries' files are the kernel's, which maps them 64 KB
at a time when code is first run and takes them back when it needs room; they are shown, and not judged. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI

import mpips

EPOCH = 500  # rounds
WARM = 0.1  # of the run
FLAT = 1024  # bytes per 1,000 rounds
Sample = dict[str, float]


def look(pid: int) -> Sample:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    kinds = ("RssAnon", "RssShmem", "RssFile", "Threads")
    held = {kind: float(re.search(rf"{kind}:\s+(\d+)", status)[1]) for kind in kinds}  # type: ignore[index]
    mapped = Path(f"/proc/{pid}/maps").read_text()
    counts = {"descriptors": len(os.listdir(f"/proc/{pid}/fd")), "shared": mapped.count("/dev/shm/")}
    memory = {"memory": 1024 * (held["RssAnon"] + held["RssShmem"]), "library": 1024 * held["RssFile"]}
    return {**memory, "threads": held["Threads"], **counts}


def slope(rounds: Any, values: Any) -> float:
    """Least squares, per 1,000 rounds."""
    return float(1000 * np.polyfit(rounds, values, 1)[0])


class Watch:
    """What is seen of all ranks.

    Args:
        pids: their processes.
        folder: the run's.
        looks: the most times that `sample` is called. Memory for what it sees is taken before the first.
    """

    def __init__(self, pids: Sequence[int], folder: Path, looks: int) -> None:
        self._pids, self._folder = pids, folder
        self.names = [f"rank {rank} {kind}" for rank, pid in enumerate(pids) for kind in look(pid)] + ["checkpoint bytes"]
        self.looks, self._rounds, self._seen = 0, np.zeros(looks), np.zeros((len(self.names), looks))

    def sample(self, number: int) -> None:
        """Look at everything."""
        values = [value for pid in self._pids for value in look(pid).values()]
        newest = max(self._folder.glob("checkpoints/*.h5"), default=None)
        self._rounds[self.looks] = number
        self._seen[:, self.looks] = [*values, newest.stat().st_size if newest else 0]
        self.looks += 1

    def report(self) -> bool:
        """Print a table; whether all is flat."""
        rounds = self._rounds[: self.looks]
        warm = int((rounds < WARM * rounds[-1]).sum())
        flat = True
        print(f"{'':>20} {'after warm-up':>14} {'at the end':>14} {'most':>14} {'per 1,000 rounds':>17}")
        for name, values in zip(self.names, self._seen, strict=True):
            after = values[warm : self.looks]
            growth = slope(rounds[warm:], after)
            if not name.endswith("library"):
                flat &= growth <= FLAT if name.split()[-1] in ("memory", "bytes") else after[0] >= after[-1]
            print(f"{name:>20} {after[0]:14,.0f} {after[-1]:14,.0f} {max(after):14,.0f} {growth:17,.1f}")
        return flat


def main() -> None:
    """Train, and look every so often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=1000, help="rounds from one look, and checkpoint, to the next")
    parser.add_argument("--mode", default="sync", choices=["sync", "async", "ssp", "fedbuff", "easgd"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pids = MPI.COMM_WORLD.allgather(os.getpid())
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    where = MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if MPI.COMM_WORLD.rank == 0 else None)
    dealt = len(pids) - 1 if args.mode == "sync" else 1  # batches a round
    x = torch.randn(4 * EPOCH * dealt, 8)
    data = x, (x.sum(1) > 0).long()
    every = {"every": args.every, "epochs": 0, "keep": 2}
    ps = mpips.connect(model, optimizer, run_dir=where, checkpoint=every, mode=args.mode)
    watch, begun = Watch(pids, ps.folder, args.rounds // args.every + 1), time.time()
    for _ in ps.epochs(args.rounds // EPOCH):
        for batch, labels in ps.batches(data, 4):
            loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            ps.step(loss)
            if ps.worker == 0 and ps.round >= args.every * (watch.looks + 1):
                watch.sample(ps.round)
        ps.validate(lambda: float((model(x[:64]).argmax(1) == data[1][:64]).float().mean()))
    if ps.worker == 0:
        print(f"{args.mode}, {ps.round:,} rounds in {time.time() - begun:.0f} s, {len(pids)} ranks", flush=True)
        flat = watch.report()
        sys.exit(0 if flat else 1)


main()
