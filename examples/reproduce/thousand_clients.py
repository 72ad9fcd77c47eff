"""Logistic regression of MNIST on 1000 clients, 10 in each of 100 rounds, B = 10, lr 0.03: seconds of a run.

    mpips run -n 3 examples/reproduce/thousand_clients.py mnist.h5

After the logistic regression in FLUTE (Garcia et al., 2022, arXiv 2203.13789), with about 81 % accuracy: on GPUs FedML took
3:09 min over MPI and FLUTE 1:35, on CPUs Flower took 30:14 and FLUTE 3:20. Their machines and their data's partition were
others; here a client has two shards of 30 items. It is not said whether theirs have imports and loading in them: here the
rounds with their tests are timed, and the process from its start. What mpiexec takes before and after is in neither;
`time mpips run ...` has it.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mpips

sys.path.insert(0, str(Path(__file__).parent.parent))
from mnist import load


def age() -> float:
    """Seconds since this process began, as Linux knows them: Python's start and the imports included."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--rounds", type=int, default=100)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    settings = {"clients": {"fraction": 0.01}, "checkpoint": {"epochs": 0}}
    ps = mpips.connect(model, lambda params: torch.optim.SGD(params, lr=0.03), mode="fedavg", **settings)
    (x, y), (test_x, test_y) = load(args.file, "train"), load(args.file, "test")
    deal, test = mpips.Clients.by_label((x / 255, y), y, 1000), test_x / 255

    begun = time.perf_counter()
    for _ in ps.epochs(args.rounds):
        for images, labels in ps.batches(deal, 10):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            ps.step(loss)
        ps.validate(lambda: (model(test).argmax(1) == test_y).float().mean(), "test accuracy")
    took = time.perf_counter() - begun
    ps.print(f"{ps.round} rounds of 10 of 1000 clients: {took:.1f} s; with imports and loading {age():.1f} s")


if __name__ == "__main__":
    main()
