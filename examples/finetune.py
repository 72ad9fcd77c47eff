"""Fine-tuning: a network that knows the digits 0 to 4 learns 5 to 9 with LoRA adapters and a new head.

    python examples/finetune.py                      one process, no MPI
    mpirun -n 4 python examples/finetune.py          1 server, 3 workers

Only these are trained and travel in a round; frozen weights travel once, at the start. Every setting is a flag: see --help.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from digits import accuracy, digits
from torch import Tensor, nn

import mpips


class LoRALinear(nn.Module):
    """y = base(x) + scale (x A^T) B^T, of low rank; B is zero at first, so the layer begins as its base."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu())


def pretrained(x: Tensor, y: Tensor) -> Net:
    """Stands for a file that rank 0 loads: at connect the server's weights go to all."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in torch.randint(len(x), (100, 32)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    (low, high), (_, test) = ([(x[m], y[m] % 5) for m in (y < 5, y >= 5)] for x, y in digits())
    model = pretrained(*low)
    model.one, model.two, model.head = LoRALinear(model.one), LoRALinear(model.two), nn.Linear(256, 5)
    ps = mpips.connect(model, torch.optim.Adam(model.parameters(), lr=3e-3), trainable=["*.lora_*", "head.*"])
    for _ in ps.epochs(args.epochs):
        for x, y in ps.batches(high, 16):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        ps.validate(lambda: accuracy(model, test), "test accuracy")
    if ps.worker == 0:
        trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) for wanted in (True, False))
        done = json.loads((ps.folder / "DONE").read_text())
        print(f"trained {trained:,} of {trained + frozen:,} parameters; test accuracy {done['value']:.3f}")
        sent = done["bytes"] / done["rounds"] / done["ranks"]
        print(f"{sent:,.0f} bytes a round and rank, frozen weights at the start included")


if __name__ == "__main__":
    main()
