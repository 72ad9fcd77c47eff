"""MNIST from one HDF5 file: the 2NN of the FedAvg paper (McMahan et al., 2017), or a small CNN with BatchNorm.

    python examples/mnist.py mnist.h5                          one process, no MPI
    mpips run -n 5 examples/mnist.py mnist.h5                  1 server, 4 workers
    mpirun -n 5 python examples/mnist.py mnist.h5 --model cnn  the same without our launcher

The file holds train/images (n, 28, 28), train/labels (n,), test/images and test/labels, all uint8.
"""

import argparse

import h5py
import torch
import torch.nn.functional as F
from torch import nn

import mpips

Images = tuple[torch.Tensor, torch.Tensor]  # (n, 28, 28) uint8, (n,) int64


def load(file: str, part: str) -> Images:
    with h5py.File(file) as f:
        images, labels = (torch.from_numpy(f[part][name][:]) for name in ("images", "labels"))
    return images, labels.long()


def two_layers() -> nn.Module:
    sizes = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]
    model = nn.Sequential(nn.Flatten(), *sizes)
    assert sum(p.numel() for p in model.parameters()) == 199_210  # as in the paper
    return model


def convolutional() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(nn.Unflatten(1, (1, 28)), *block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(1568, 10))


def accuracy(model: nn.Module, data: Images) -> float:
    device = next(model.parameters()).device
    guesses = [model(x.to(device) / 255).argmax(1).cpu() for x in data[0].split(1000)]
    return (torch.cat(guesses) == data[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", choices=["2nn", "cnn"], default="2nn")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = mpips.device()
    model = (two_layers() if args.model == "2nn" else convolutional()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    ps = mpips.connect(model, optimizer, validation_data=lambda: load(args.file, "test"))
    train = load(args.file, "train")  # on the workers: a server that does not train stays in connect
    for _ in ps.epochs(args.epochs):
        for x, y in ps.batches(train, args.batch_size):
            loss = F.cross_entropy(model(x.to(device) / 255), y.to(device))
            loss.backward()
            ps.step(loss)
        scheduler.step()
        ps.validate(lambda test: accuracy(model, test), "test accuracy")


if __name__ == "__main__":
    main()
