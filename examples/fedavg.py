"""FedAvg (McMahan et al., 2017) of MNIST, dealt out to many clients of whom a few train in each round.

    python examples/fedavg.py mnist.h5                                      one process, no MPI
    mpips run -n 4 examples/fedavg.py mnist.h5 --by-label                   1 server, 3 workers that host the clients
    mpirun -n 4 python examples/fedavg.py mnist.h5 --mode scaffold --lr 0.05

The file is that of examples/mnist.py; without one, scikit-learn's digits do. The share of the clients in a round and their
epochs are settings of mpips: --clients.fraction 0.1 --clients.epochs 5.
"""

import argparse

import torch
import torch.nn.functional as F
from digits import digits
from mnist import load, two_layers
from torch import nn

import mpips

Data = tuple[torch.Tensor, torch.Tensor]


def parts(file: str | None) -> tuple[Data, Data, nn.Module]:
    """Training and test items as floats, and a model of them."""
    if file is None:
        return *digits(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    (x, y), (test, labels) = load(file, "train"), load(file, "test")
    return (x / 255, y), (test / 255, labels), two_layers()


def accuracy(model: nn.Module, data: Data) -> float:
    guesses = [model(x).argmax(1) for x in data[0].split(1000)]
    return (torch.cat(guesses) == data[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--by-label", action="store_true", help="two shards of the items sorted by label for each client")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test, model = parts(args.file)
    if args.by_label:
        clients = mpips.Clients.by_label(train, train[1], args.clients)
    else:
        clients = mpips.Clients.split(train, args.clients)

    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    ps = mpips.connect(model, optimizer, mode="fedavg", clients={"fraction": 0.1}, checkpoint={"epochs": 10})
    for _ in ps.epochs(args.rounds):
        for x, y in ps.batches(clients, args.batch_size):  # one round: this worker's clients, one after another
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)  # a step of the client's own; the server is told at the end of the loop
        ps.validate(lambda: accuracy(model, test), "test accuracy")


if __name__ == "__main__":
    main()
