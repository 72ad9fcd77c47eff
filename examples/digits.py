"""scikit-learn's bundled handwritten digits and a small MLP: a first run in seconds, offline.

    python examples/digits.py                        one process, no MPI
    mpips run -n 4 examples/digits.py                1 server, 3 workers
    mpirun -n 4 python examples/digits.py --clip 1   the same without our launcher

Rank 0 of several serves inside `connect` and ends there; every line after it runs on the workers. Every setting of mpips is a
flag: see --help.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpips


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    train, test = order[:1437], order[1437:]
    return (x[train], y[train]), (x[test], y[test])


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    x, y = data
    return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits()
    loader = DataLoader(TensorDataset(*train), args.batch_size, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    ps = mpips.connect(model, optimizer)
    loader = ps.shard(loader)  # this worker's part of each batch
    for _ in ps.epochs(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)  # or optimizer.step(): the same round, which then says no loss to metrics.csv
        ps.validate(lambda: accuracy(model, test), "test accuracy")  # measured on worker 0, told to all
    if ps.worker == 0:
        torch.save(model.state_dict(), ps.folder / "model.pt")


if __name__ == "__main__":
    main()
