"""SCAFFOLD's table 3 (Karimireddy et al., 2020) on MNIST in EMNIST's place: rounds of client drift.

    python examples/reproduce/scaffold_table3.py mnist.h5 --seeds 3              all of it, half an hour on one core
    python examples/reproduce/scaffold_table3.py mnist.h5 --similarity 0 --algorithms FedAvg SCAFFOLD --rates 0.1 0.3 1

Logistic regression; 100 clients of whom 20 train in a round, 5 local epochs of 5 batches. A client has `similarity` percent of
its items at random, the rest sorted by label. The paper counts rounds until a test accuracy of 0.5 on 62 classes; here it is
--target on 10, so that only the order of the algorithms compares. Each has the best learning rate of a grid, as there, with
each seed, which also deals out the items. A cell has the median of the seeds, the best and the worst, and their rates; a rate
at the grid's end is marked with !, for one beyond might be better.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips

sys.path.insert(0, str(Path(__file__).parent.parent))
from mnist import load

RATES = (0.3, 0.1, 1.0, 0.03, 3.0, 0.01, 10.0, 0.003)  # the likely ones first: what is slower than the best is cut short
ALGORITHMS: dict[str, dict[str, Any]] = {  # SGD is one step a round on all of a client's items
    "SGD": {"mode": "fedavg"},
    "FedAvg": {"mode": "fedavg", "clients": {"epochs": 5}},
    "FedProx": {"mode": "fedprox", "clients": {"epochs": 5, "mu": 1.0}},
    "SCAFFOLD": {"mode": "scaffold", "clients": {"epochs": 5}},
}


def partition(labels: Tensor, clients: int, similarity: int, seed: int) -> list[Tensor]:
    """The items of each client, which all have the same number."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * similarity // 100
    alike, rest = order[:cut], order[cut:]
    by_label = rest[labels[rest].argsort(stable=True)]
    parts = zip(alike.tensor_split(clients), by_label.tensor_split(clients), strict=True)
    return [torch.cat(part) for part in parts]


def rounds(
    clients: mpips.Clients, test: tuple[Tensor, Tensor], name: str, rate: float, seed: int, target: float, most: int
) -> int:
    """Rounds until the test accuracy is that of the target; one more than allowed if it is not reached."""
    torch.manual_seed(seed)
    model = nn.Linear(784, 10)
    settings = dict(ALGORITHMS[name])
    settings["clients"] = settings.get("clients", {}) | {"fraction": 0.2}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ps = mpips.connect(
            model,
            lambda params: torch.optim.SGD(params, lr=rate),
            run_dir=folder,
            early_stopping={"target": target},
            checkpoint={"epochs": 0},
            nonfinite="skip",  # a rate that is too large does not reach the target
            seed=seed,
            **settings,
        )
        size = None if name == "SGD" else len(clients[0]) // 5
        for _ in ps.epochs(most):
            for x, y in ps.batches(clients, size):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: (model(test[0]).argmax(1) == test[1]).float().mean(), "test accuracy")
    return ps.round if ps.stopping == "target" else most + 1


def best(
    clients: mpips.Clients, test: tuple[Tensor, Tensor], name: str, seed: int, args: argparse.Namespace
) -> tuple[int, float]:
    """The fewest rounds to the target, and the rate; no rate is followed for longer than the best before it took."""
    fewest, found = args.rounds + 1, math.nan
    for rate in args.rates:
        if fewest > 1 and (number := rounds(clients, test, name, rate, seed, args.target, fewest - 1)) < fewest:
            fewest, found = number, rate
    return fewest, found


def cell(results: list[tuple[int, float]], args: argparse.Namespace) -> str:
    """The results of all seeds for people."""

    def shown(number: float) -> str:
        return f"{number:g}" if number <= args.rounds else f">{args.rounds}"

    numbers, ends = [number for number, _ in results], (min(args.rates), max(args.rates))
    used = sorted({rate for number, rate in results if number <= args.rounds})
    rates = " ".join(f"{rate:g}{'!' * (rate in ends)}" for rate in used)
    return f"{shown(statistics.median(numbers))} ({shown(min(numbers))}-{shown(max(numbers))}; {rates or 'none'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--similarity", type=int, nargs="+", default=[0, 10, 100])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid of learning rates")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    args = parser.parse_args()
    sys.argv[1:] = []  # what follows is no setting of mpips

    (x, y), (test_x, test_y) = load(args.file, "train"), load(args.file, "test")
    train, test = (x.flatten(1) / 255, y), (test_x.flatten(1) / 255, test_y)
    print(f"rounds to {args.target:.0%}: median of {args.seeds} seed(s) (best-worst; best of the rates {sorted(args.rates)})\n")
    print("similarity  " + "".join(f"{name:>26}" for name in args.algorithms))
    for similarity in args.similarity:
        print(f"{similarity:9d} %  ", end="", flush=True)
        for name in args.algorithms:
            results = []
            for seed in range(args.seed, args.seed + args.seeds):
                parts = [part.tolist() for part in partition(y, 100, similarity, seed)]
                results.append(best(mpips.Clients.by_index(train, parts), test, name, seed, args))
            print(f"{cell(results, args):>26}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
