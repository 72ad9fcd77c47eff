"""FedProx's figure 2 (Li et al., 2020) on its synthetic data: does the proximal term steady FedAvg where clients differ?

    python examples/reproduce/fedprox_synthetic.py                       four data sets, some minutes on one core
    python examples/reproduce/fedprox_synthetic.py --rounds 200          as long as the paper's

Logistic regression, 30 clients of whom 10 train in a round, 20 local epochs, batches of 10, lr 0.01, mu = 1. Synthetic (a, b):
a is how much the clients' models differ, b how much their data do (section 5.1 of the paper). The paper's figure has the
training loss: where clients differ FedAvg's is higher and wavers. Its +22 % accuracy is with stragglers that FedAvg leaves
out, which are not simulated here.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips

Data = tuple[Tensor, Tensor]
SETS: dict[str, tuple[float, float] | None] = {"IID": None, "(0, 0)": (0, 0), "(0.5, 0.5)": (0.5, 0.5), "(1, 1)": (1, 1)}
MODES: dict[str, Any] = {"FedAvg": {"mode": "fedavg"}, "FedProx": {"mode": "fedprox", "clients": {"mu": 1.0}}}


def synthetic(spread: tuple[float, float] | None, clients: int = 30) -> list[Data]:
    """Each client's items: y = argmax(W x + b), x of 60 features with variances j^-1.2; sizes follow a power law."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    scale = torch.arange(1.0, 61).pow(-1.2).sqrt()
    sizes = (normal(clients) * 2 + 4).exp().int().clamp(max=2000) + 50  # the paper's has a longer tail
    same = normal(10, 60), normal(10)
    parts = []
    for size in sizes.tolist():
        alpha, beta = spread or (0.0, 0.0)
        model, data = normal(1) * alpha**0.5, normal(1) * beta**0.5
        w, b = (normal(10, 60) + model, normal(10) + model) if spread else same
        x = normal(size, 60) * scale + (normal(60) + data if spread else 0.0)
        parts.append((x, (x @ w.T + b).argmax(1)))
    return parts


def curve(parts: list[Data], settings: dict[str, Any], rounds: int) -> tuple[list[float], float]:
    """The training loss after each round, and the test accuracy, of a fifth of the items, at the end."""
    cuts = [len(y) * 4 // 5 for _, y in parts]
    train = [(x[:cut], y[:cut]) for (x, y), cut in zip(parts, cuts, strict=True)]
    x, y = (torch.cat(t) for t in zip(*train, strict=True))
    test_x, test_y = (torch.cat([part[i][cut:] for part, cut in zip(parts, cuts, strict=True)]) for i in (0, 1))
    torch.manual_seed(0)
    model = nn.Linear(60, 10)
    losses: list[float] = []
    settings = settings | {"clients": settings.get("clients", {}) | {"fraction": 1 / 3, "epochs": 20}}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, run_dir=folder, checkpoint={"epochs": 0}, **settings)
        clients = mpips.Clients(train)
        for _ in ps.epochs(rounds):
            for images, labels in ps.batches(clients, 10):
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                ps.step(loss)
            losses.append(ps.validate(lambda: F.cross_entropy(model(x), y), "training loss"))
    with torch.no_grad():
        return losses, (model(test_x).argmax(1) == test_y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    sys.argv[1:] = []  # what follows is no setting of mpips

    print("the last third of the rounds: mean training loss, its standard deviation; at the end: test accuracy\n")
    print("synthetic   " + "".join(f"{name:>26}" for name in MODES))
    for name, spread in SETS.items():
        cells = []
        for settings in MODES.values():
            losses, accuracy = curve(synthetic(spread), settings, args.rounds)
            last = torch.tensor(losses[-max(2, args.rounds // 3) :])
            cells.append(f"{last.mean():.3f} +- {last.std():.3f}, {accuracy:.1%}")
        print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
