"""A small character-level transformer on a text file; without one, on this repository's licence.

    python examples/charlm.py                                   one process, no MPI
    mpips run -n 4 examples/charlm.py book.txt --epochs 50      1 server, 3 workers
    mpirun -n 4 python examples/charlm.py --accumulate 2        two batches behind each push

Every worker draws random windows of its own, so an epoch is a number of rounds here. The server clips.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class CharLM(nn.Module):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, letters, bias=False)
        self.head.weight = self.embed.weight  # tied: it travels once
        nn.init.normal_(self.embed.weight, std=0.05)
        nn.init.normal_(self.place.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) -> (batch, time, letters)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.layers(self.embed(x) + self.place.weight[: x.shape[1]], mask, is_causal=True))

    def loss(self, windows: Tensor) -> Tensor:  # (batch, time + 1)
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / "LICENSE")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=100, help="in each epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches behind each push")
    parser.add_argument("--lr", type=float, default=3e-3)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    device, text = mpips.device(), args.file.read_text()
    letters = sorted(set(text))
    windows = torch.tensor([letters.index(c) for c in text]).unfold(0, CONTEXT + 1, 1)  # (n, CONTEXT + 1), a view
    train, test = windows[: len(text) * 9 // 10 - CONTEXT], windows[len(text) * 9 // 10 :: CONTEXT].to(device)
    model = CharLM(len(letters)).to(device)
    decay, rest = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * args.rounds, pct_start=0.1)
    ps = mpips.connect(model, optimizer, clip=1.0, early_stopping={"mode": "min", "patience": 3})
    for _ in ps.epochs(args.epochs):
        draws = (train[torch.randint(len(train), (args.batch_size,))] for _ in range(args.rounds * args.accumulate))
        for number, batch in enumerate(ps.batches(draws, shard=False), 1):
            loss = model.loss(batch.to(device))
            (loss / args.accumulate).backward()
            if number % args.accumulate == 0:
                ps.step(loss, samples=args.accumulate * args.batch_size)
                scheduler.step()
        ps.validate(lambda: model.loss(test), "validation loss")
    if ps.worker == 0:
        sample = test[:1]
        for _ in range(300):
            sample = torch.cat([sample, model(sample[:, -CONTEXT:])[:, -1].softmax(1).multinomial(1)], 1)
        print("".join(letters[i] for i in sample[0]))


if __name__ == "__main__":
    main()
