"""A long run in which a rank is killed again and again: `python benchmarks/soak_kills.py --rounds 100000 --every 500`.

The run is started twice, by `mpips run`: once as it is, and once with a death every so many rounds, of a worker or of rank 0 in
turn, from which it goes on by itself. Both must end with the same weights, bit for bit, and with the same metrics.csv. The
launcher, which lives through all of it, is looked at after each start: memory, descriptors, threads; and the machine:
mpips' names in shared memory, and the files in a TMPDIR of the run's own. Status 1 if anything has grown. Linux only.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

TRAIN = """
import os
import sys
import torch
import torch.nn.functional as F
import mpips

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x = torch.randn(4000, 8)
data = x, (x.sum(1) > 0).long()
ps = mpips.connect(model, optimizer, checkpoint={"every": 100, "epochs": 0, "keep": 2})
for _ in ps.epochs(int(sys.argv[1]) // 500):
    for batch, labels in ps.batches(data, 4):
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
"""


def look(launcher: int, temporary: Path) -> list[int]:
    """Return what the launcher holds, and how many names are in shared memory and in the temporary folder."""
    status = Path(f"/proc/{launcher}/status").read_text()
    memory, threads = (int(re.search(rf"{kind}:\s+(\d+)", status)[1]) for kind in ("RssAnon", "Threads"))  # type: ignore[index]
    shared = sum("mpips" in name for name in os.listdir("/dev/shm"))
    return [1024 * memory, threads, len(os.listdir(f"/proc/{launcher}/fd")), shared, len(list(temporary.rglob("*")))]


def run(folder: Path, rounds: int, deaths: list[int], ranks: int) -> list[list[int]]:
    """Run the script, with a death at each of these rounds; return what was seen after each start, and at the end."""
    script, temporary = folder / "train.py", folder / "tmp"
    temporary.mkdir(parents=True)
    script.write_text(TRAIN)
    chaos = ",".join(f"kill:rank={number % ranks}@round={at}" for number, at in enumerate(deaths))
    command = [sys.executable, "-m", "mpips.cli.main", "run", "-n", str(ranks), "--retries", str(len(deaths) + 1)]
    command += ["--set", f"run_dir={folder / 'run'}", *(["--set", f"chaos={chaos}"] if chaos else []), str(script), str(rounds)]
    seen: list[list[int]] = []
    with open(folder / "out.txt", "w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"TMPDIR": str(temporary)})
        events, starts = folder / "run" / "events.jsonl", 0
        while launcher.poll() is None:
            time.sleep(0.2)
            now = events.read_text().count('"event": "start"') if events.exists() else 0
            if now > starts:
                starts = now
                seen.append(look(launcher.pid, temporary))
    if launcher.returncode:
        sys.exit(f"status {launcher.returncode}: {(folder / 'out.txt').read_text()[-2000:]}")
    return seen


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the parameters in the newest checkpoint of a run."""
    with h5py.File(max((folder / "run" / "checkpoints").glob("*.h5"))) as file:
        return {name: values[()] for name, values in file["parameters"].items()}


def main() -> None:
    """Run both, compare them, and print what has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=500, help="rounds from one death to the next")
    parser.add_argument("-n", type=int, default=3, help="ranks")
    args = parser.parse_args()
    deaths = list(range(args.every, args.rounds, args.every))
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        run(whole, args.rounds, [], args.n)
        begun = time.monotonic()
        seen = run(killed, args.rounds, deaths, args.n)
        took, (one, other) = time.monotonic() - begun, (weights(whole), weights(killed))
        same = one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
        rows = filecmp.cmp(whole / "run" / "metrics.csv", killed / "run" / "metrics.csv", shallow=False)
    print(f"{args.rounds:,} rounds, {len(deaths)} deaths, {len(seen)} starts in {took:.0f} s on {args.n} ranks")
    print(f"weights {'of the same bits' if same else 'DIFFER'}, metrics.csv {'the same' if rows else 'DIFFERS'}")
    kinds = "memory of the launcher", "its threads", "its descriptors", "names in shared memory", "temporary files"
    warm = len(seen) // 10
    flat = True
    for kind, values in zip(kinds, zip(*seen[warm:], strict=True), strict=True):
        growth = 1000 * float(np.polyfit(np.arange(len(values)) * args.every, values, 1)[0])
        flat &= growth <= (1024 if kind.startswith("memory") else 0.01)
        print(f"{kind:>24}: {values[0]:,} after {warm} starts, {values[-1]:,} at the end, {growth:,.1f} per 1,000 rounds")
    sys.exit(0 if same and rows and flat else 1)


if __name__ == "__main__":
    main()
