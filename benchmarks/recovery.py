"""Deaths at random times in runs that go on: `python benchmarks/recovery.py --runs 20 --deaths 2 -n 5`.

Each run is started by `mpips run --ft` with min_workers 1. Its workers write down which items they step on in which round, and
when a step ends. From outside, workers are killed at random times. Then the run must have ended with status 0, and its weights
must be those of one process that takes the recorded steps, of those workers whose samples the round counted (metrics.csv), to
1e-12 in float64. Printed: the deaths, the runs, the largest difference, and how long the others waited longer for a round than
for the median one. Status 1 if a run was lost, or its weights are others. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import h5py
import torch

COMMON = """
import torch
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, y = torch.randn(480, 6), torch.randn(480, 3)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
def loss_of(items):
    return ((model(x[items]) - y[items]) ** 2).mean()
"""
TRAIN = """
import json, os, sys, time
import mpips
torch.set_num_threads(1)
ps = mpips.connect(model, optimizer, validate=lambda: 0.0)
log = open(f"steps_{os.getpid()}.jsonl", "w", buffering=1)
for epoch in ps.epochs(int(sys.argv[1])):
    for (items,) in ps.batches(torch.utils.data.TensorDataset(torch.arange(len(x))), 4):
        loss = loss_of(items)
        loss.backward()
        time.sleep(0.002)
        log.write(json.dumps([ps.round, items.tolist()]) + "\\n")
        ps.step(loss)
        log.write(json.dumps(time.time()) + "\\n")
"""


class Run:
    """One run in a folder, and what its workers have written down."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        (folder / "train.py").write_text(COMMON + TRAIN)
        command = [sys.executable, "-m", "mpips.cli.main", "run", "-n", str(args.n), "--ft", "--timeout", "120"]
        for setting in ("run_dir=run", "min_workers=1", *args.set):
            command += ["--set", setting]
        self._out = os.open(folder / "out.txt", os.O_WRONLY | os.O_CREAT)
        self._launcher = subprocess.Popen(
            [*command, "train.py", str(args.epochs)], cwd=folder, stdout=self._out, stderr=self._out
        )

    def logs(self) -> dict[int, Path]:
        """Return the workers' logs by process id, of those that have begun."""
        return {int(p.stem[6:]): p for p in self.folder.glob("steps_*.jsonl") if p.stat().st_size}

    def kill(self, deaths: int, within: float) -> list[float]:
        """Kill so many workers, each within so many seconds of the one before; return the times."""
        until, times = time.monotonic() + 60, []
        while len(alive := self.logs()) <= deaths and time.monotonic() < until:
            time.sleep(0.01)
        for pid in random.sample(sorted(alive), deaths):
            time.sleep(random.uniform(0, within))
            if self._launcher.poll() is None:
                times.append(time.time())
                os.kill(pid, signal.SIGKILL)
        return times

    def end(self) -> int:
        """Wait for the end of the run, and return its status."""
        status = self._launcher.wait(130)
        os.close(self._out)
        return status

    def steps(self) -> tuple[dict[int, list[list[int]]], list[list[float]]]:
        """Return the items of each step by round, and the times at which each worker's steps ended."""
        steps, ends = defaultdict(list), []
        for path in self.logs().values():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line]
            ends.append([line for line in lines if isinstance(line, float)])
            for at, items in (line for line in lines if isinstance(line, list)):
                steps[at].append(items)
        return steps, ends

    def difference(self) -> float:
        """Return the largest difference of a weight from one process that takes the steps that counted."""
        steps, _ = self.steps()
        names: dict[str, object] = {}
        exec(COMMON, names)
        model, optimizer, loss_of = names["model"], names["optimizer"], names["loss_of"]
        for row in csv.DictReader((self.folder / "run" / "metrics.csv").open()):
            tried, counted = steps[int(row["round"]) - 1], int(float(row["samples"]))
            sets = (some for n in range(len(tried), 0, -1) for some in itertools.combinations(tried, n))
            fitting = (some for some in sets if sum(map(len, some)) == counted and self._fits(row, some, loss_of))
            if (chosen := next(fitting, None)) is None:
                sys.exit(f"round {row['round']}: no set of the steps {tried} has its samples and loss, {row}")
            optimizer.zero_grad()  # type: ignore[attr-defined]
            loss_of(list(itertools.chain(*chosen))).backward()  # type: ignore[operator]
            optimizer.step()  # type: ignore[attr-defined]
        with h5py.File(max((self.folder / "run" / "checkpoints").glob("*.h5"))) as file:
            saved = {name: torch.from_numpy(values[()]) for name, values in file["parameters"].items()}
        state = model.state_dict()  # type: ignore[attr-defined]
        return max(float((saved[name] - state[name]).abs().max()) for name in state)

    @staticmethod
    def _fits(row: dict[str, str], chosen: tuple[list[int], ...], loss_of: object) -> bool:
        """Return whether the round's loss is that of these items."""
        with torch.no_grad():
            loss = float(loss_of(list(itertools.chain(*chosen))))  # type: ignore[operator]
        return abs(loss - float(row["loss"])) < 1e-4 * abs(loss)

    def delays(self, times: list[float]) -> list[float]:
        """Return how much longer than the median round the longest one was that ended within a second of each death."""
        found = []
        for when in times:
            gaps = [(b - a, b) for ends in self.steps()[1] for a, b in itertools.pairwise(ends) if ends[-1] > when + 0.05]
            near = [gap for gap, end in gaps if when < end < when + 2]
            if near:
                found.append(max(near) - statistics.median(gap for gap, _ in gaps))
        return found


def main() -> None:
    """Make the runs, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--deaths", type=int, default=2, help="in each run")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--within", type=float, default=0.5, help="seconds from one death to the next, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="a setting of the runs")
    parser.add_argument("-n", type=int, default=5, help="ranks")
    args = parser.parse_args()
    random.seed(args.seed)
    lost, deaths, worst, delays = 0, 0, 0.0, []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as name:
            run = Run(Path(name), args)
            times = run.kill(args.deaths, args.within)
            if status := run.end():
                lost += 1
                print(f"status {status}:\n{(Path(name) / 'out.txt').read_text(errors='replace')[-1500:]}", flush=True)
                continue
            deaths += len(times)
            worst = max(worst, run.difference())
            delays += run.delays(times)
    line = f"{args.runs} runs of {args.n} ranks, {deaths} workers killed, {lost} runs lost, largest difference {worst:.1e}"
    if delays:
        line += (
            f", a round was longer by {1e3 * statistics.median(delays):.0f} ms in the median, {1e3 * max(delays):.0f} at most"
        )
    print(line)
    sys.exit(bool(lost) or worst > 1e-12)


if __name__ == "__main__":
    main()
