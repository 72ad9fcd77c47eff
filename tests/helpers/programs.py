"""Models, data and small training programs that the tests run on every communicator and compare with plain PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips.comm import Communicator

Data = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 5))


def dropout_mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 33), nn.Dropout(0.3), nn.ReLU(), nn.Linear(33, 5))


def cnn() -> nn.Module:
    """With BatchNorm: float and integer buffers."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(84, 5),
    )


class Transformer(nn.Module):
    """Embedding and output weights tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(5, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 3).long() % 5
        return self.head(self.layer(self.embed(tokens)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def data(n: int = 320, dtype: torch.dtype = torch.float32) -> Data:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 12, generator=generator).to(dtype)
    return x, torch.randint(0, 5, (n,), generator=generator)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Data]) -> nn.Module:
    """The ordinary loop."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def in_order(given: Data, batch_size: int, epochs: int) -> Iterator[Data]:
    """The batches of unshuffled epochs."""
    for _ in range(epochs):
        yield from zip(*(t.split(batch_size) for t in given), strict=True)


def train(
    communicator: Communicator,
    model: nn.Module,
    optimizer: Any,
    given: Any,
    batch_size: int | None = 16,
    epochs: int = 1,
    shuffle: bool = False,
    shard: bool = True,
    counts: bool = True,
    **settings: Any,
) -> Any:
    """The mpips loop, as a user writes it; the run. If it `counts`, it says how many samples there are in a step.

    Over MPI a rank that only serves returns None when it has served, and the others leave here.
    """
    simulated = hasattr(communicator, "at_end")
    try:
        ps = mpips.connect(model, optimizer, communicator=communicator, **{"run_dir": "run", **settings})
    except SystemExit as end:
        if simulated or end.code:
            raise
        return None
    for _ in ps.epochs(epochs):
        for x, y in ps.batches(given, batch_size, shuffle=shuffle, shard=shard):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss, **({"samples": len(x)} if counts else {}))
        ps.validate(lambda: float(model(given[0])[0, 0]) if isinstance(given, tuple) and given and len(given[0]) else 0.0)
    if not simulated:
        ps.close()
    return ps


def sha(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.csv as dicts."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines[1:]]
