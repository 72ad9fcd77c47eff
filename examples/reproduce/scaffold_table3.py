"""SCAFFOLD's table 3 (Karimireddy et al., 2020) on MNIST in EMNIST's place: rounds of client drift.

    python examples/reproduce/scaffold_table3.py mnist.h5                        all of it, some minutes on one core
    python examples/reproduce/scaffold_table3.py mnist.h5 --similarity 0 --rounds 300

Logistic regression; 100 clients of whom 20 train in a round, 5 local epochs of 5 batches. A client has `similarity` percent of
its items at random, the rest sorted by label. The paper counts rounds until a test accuracy of 0.5 on 62 classes; here it is
--target on 10, so that only the order of the algorithms compares. Each has the best learning rate of a grid, as there.
"""

import argparse
import contextlib
import io
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

RATES = (0.01, 0.03, 0.1, 0.3)
ALGORITHMS: dict[str, dict[str, Any]] = {  # SGD is one step a round on all of a client's items
    "SGD": {"mode": "fedavg"},
    "FedAvg": {"mode": "fedavg", "clients": {"epochs": 5}},
    "FedProx": {"mode": "fedprox", "clients": {"epochs": 5, "mu": 1.0}},
    "SCAFFOLD": {"mode": "scaffold", "clients": {"epochs": 5}},
}


def partition(labels: Tensor, clients: int, similarity: int) -> list[Tensor]:
    """The items of each client, which all have the same number."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(labels) * similarity // 100
    alike, rest = order[:cut], order[cut:]
    by_label = rest[labels[rest].argsort(stable=True)]
    parts = zip(alike.tensor_split(clients), by_label.tensor_split(clients), strict=True)
    return [torch.cat(part) for part in parts]


def rounds(clients: mpips.Clients, test: tuple[Tensor, Tensor], name: str, rate: float, args: argparse.Namespace) -> int:
    """Rounds until the test accuracy is that of the target; one more than allowed if it is not reached."""
    torch.manual_seed(0)
    model = nn.Linear(784, 10)
    settings = dict(ALGORITHMS[name])
    settings["clients"] = settings.get("clients", {}) | {"fraction": 0.2}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ps = mpips.connect(
            model,
            lambda params: torch.optim.SGD(params, lr=rate),
            run_dir=folder,
            stop={"target": args.target},
            checkpoint={"epochs": 0},
            seed=args.seed,
            **settings,
        )
        size = None if name == "SGD" else len(clients[0]) // 5
        for _ in ps.epochs(args.rounds):
            for x, y in ps.batches(clients, size):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: (model(test[0]).argmax(1) == test[1]).float().mean(), "test accuracy")
    return ps.round if ps.stopping == "target" else args.rounds + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--similarity", type=int, nargs="+", default=[0, 10, 100])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.argv[1:] = []  # what follows is no setting of mpips

    (x, y), (test_x, test_y) = load(args.file, "train"), load(args.file, "test")
    train, test = (x.flatten(1) / 255, y), (test_x.flatten(1) / 255, test_y)
    print(f"rounds to {args.target:.0%}, and the best of the rates {RATES}", "", sep="\n")
    print("similarity  " + "".join(f"{name:>16}" for name in ALGORITHMS))
    for similarity in args.similarity:
        clients = mpips.Clients.by_index(train, [part.tolist() for part in partition(y, 100, similarity)])
        cells = []
        for name in ALGORITHMS:
            best, rate = min((rounds(clients, test, name, rate, args), rate) for rate in RATES)
            cells.append(f"{best} ({rate})" if best <= args.rounds else f"over {args.rounds}")
        print(f"{similarity:9d} %  " + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
