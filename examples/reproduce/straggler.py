"""Convergence per second with a slow worker: a server and 4 workers, of which one takes 5 times as long for a step, in 6 modes.

    mpirun -n 5 python examples/reproduce/straggler.py                       all modes, about 6 minutes
    mpirun -n 5 python examples/reproduce/straggler.py --modes sync async    these; the others stay as they were measured last
    mpirun -n 5 python examples/reproduce/straggler.py --slow any            any step of any worker is slow, 1 in 10

scikit-learn's digits, a small MLP, plain SGD, batches of 16. A step is made to take 10 ms, a slow one 50, so that neither the
machine nor its load matters much. Each mode has the learning rate of a common grid with which it reaches the target first
(seed 0); more seeds with that one follow. Worker 0 measures the test accuracy after a step of its own, at most every 20 ms,
which takes 0.1 ms; it is the slow one, unless any is. The target is reached when 3 measurements in a row are as good.
"""

import argparse
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mpips

STEP, SLOWER = 0.010, 5  # seconds; times
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "sync, 1 backup": {"backup_workers": 1},
    "async": {"mode": "async"},
    "ssp, bound 4": {"mode": "ssp", "staleness": {"bound": 4}},
    "fedbuff, 4 x 4": {"mode": "fedbuff", "local": {"steps": 4}, "staleness": {"buffer": 4}},
    "local_sgd, 4": {"mode": "local_sgd", "local": {"steps": 4}},
}
Pair = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Pair, Pair]:
    """The training set many times over, so that no epoch ends while the clock runs, and the test set."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    train, test = order[:1437], order[1437:]
    return (x[train].repeat(70, 1), y[train].repeat(70)), (x[test], y[test])


def train(name: str, lr: float, seed: int, args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """One run: on all ranks the seconds to the target, more than 1000 if it was not reached; what the server saw."""
    torch.manual_seed(seed)
    data, (x_test, y_test) = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    curve: list[tuple[float, float]] = []  # seconds, test accuracy
    reached: list[float] = []

    def look() -> None:
        """After a step of worker 0, whose model then has the server's weights: how far it is."""
        now = time.perf_counter() - begun
        if now - (curve[-1][0] if curve else 0) >= 0.02:
            with torch.no_grad():
                curve.append((now, (model(x_test).argmax(1) == y_test).float().mean().item()))
            if not reached and len(curve) > 2 and min(value for _, value in curve[-3:]) >= args.target:
                reached.append(now)
            if now > (1.2 * reached[0] if reached else args.seconds):
                ps.stop()

    begun = time.perf_counter()
    ps = mpips.connect(model, optimizer, checkpoint={"epochs": 0}, **MODES[name])
    dice, seconds = random.Random(100 * seed + ps.worker), 1000.0
    begun = time.perf_counter()
    for _ in ps.epochs(1):
        for x, y in ps.batches(data, 16):
            start = time.perf_counter()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            slow = ps.worker == 0 if args.slow == "one" else dice.random() < 0.1
            time.sleep(max(0.0, STEP * (SLOWER if slow else 1) - (time.perf_counter() - start)))
            ps.step(loss)
            if ps.worker == 0:
                look()
        seconds = ps.validate(lambda: reached[0] if reached else 1001 - curve[-1][1], "seconds to the target")
    if ps.worker:
        return seconds, {}
    done = json.loads((ps.folder / "DONE").read_text())
    late = done.get("staleness", {})
    updates = done["versions"] / curve[-1][0]
    return seconds, {"lr": lr, "seconds": seconds, "updates a second": updates, "staleness": late, "curve": curve}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of several seeds with the best learning rate."""
    tried = [(*train(name, lr, 0, args), lr) for lr in args.rates]
    _, first, lr = min(tried, key=lambda run: run[0])
    return [first, *(train(name, lr, seed, args)[1] for seed in range(1, args.seeds))]


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'mode':<16}{'seconds to the target':>30}{'of sync':>9}{'lr':>6}{'updates/s':>11}{'mean staleness':>16}")
    for name, runs in found.items():
        times, late = [run["seconds"] for run in runs], [run["staleness"] for run in runs if run["staleness"]]
        each = " ".join("   --" if seconds > 1000 else f"{seconds:5.2f}" for seconds in times)
        middle = statistics.median(times)
        ratio = middle / statistics.median(run["seconds"] for run in found["sync"]) if "sync" in found else float("nan")
        mean = sum(int(k) * n for counts in late for k, n in counts.items()) / max(1, sum(sum(c.values()) for c in late))
        rate = statistics.mean(run["updates a second"] for run in runs)
        print(f"{name:<16}{each:>22}  ({middle:4.2f}){ratio:>9.2f}{runs[0]['lr']:>6}{rate:>11.0f}{mean:>16.2f}")


def picture(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    late = {name: sum((Counter({int(k): n for k, n in run["staleness"].items()}) for run in runs), Counter())
            for name, runs in found.items()}  # fmt: skip
    late = {name: counts for name, counts in late.items() if max(counts, default=0) > 0}
    for i, (name, runs) in enumerate(found.items()):
        seen = [(when, 100 * value) for run in runs for when, value in run["curve"]]
        times = [0.1 * k for k in range(2, int(10 * min(run["curve"][-1][0] for run in runs)))]
        near = [[value for when, value in seen if abs(when - time) <= 0.25] for time in times]
        left.plot(times, [statistics.median(values) for values in near], color=f"C{i}", label=f"{name} (lr {runs[0]['lr']})")
        if name in late:
            width, heights = 0.8 / len(late), [100 * n / late[name].total() for n in late[name].values()]
            places = [k + (list(late).index(name) - (len(late) - 1) / 2) * width for k in late[name]]
            right.bar(places, heights, width, color=f"C{i}", label=name)
    left.axhline(100 * args.target, color="black", lw=0.8, ls=":", label="target")
    left.set(xlabel="seconds", ylabel="test accuracy, % (median within 0.25 s)", ylim=(80, 98), xlim=(0, None))
    right.set(xlabel="staleness (updates between pull and push)", ylabel="contributions, %")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="lower right", fontsize=8)
    right.legend(*right.get_legend_handles_labels(), fontsize=8)
    who = "one of 4 workers 5 times slower" if args.slow == "one" else "1 in 10 steps of 4 workers 5 times slower"
    figure.suptitle(f"digits, MLP 64-64-10, SGD: {who} (10 ms, 50 ms); {args.seeds} seeds")
    figure.tight_layout()
    figure.savefig(args.out / f"straggler-{args.slow}.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--slow", choices=["one", "any"], default="one")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="the longest that a run may take")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=Path("runs/straggler"))
    args = parser.parse_args()
    args.out = args.out.absolute()
    results = args.out / f"straggler-{args.slow}.json"
    measured = {name: measure(name, args) for name in args.modes}
    if not all(measured[args.modes[0]]):
        return  # not worker 0
    found = json.loads(results.read_text()) if results.exists() else {}
    found |= json.loads(json.dumps(measured))
    args.out.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(found))
    found = {name: found[name] for name in MODES if name in found}
    table(found)
    picture(found, args)


if __name__ == "__main__":
    main()
