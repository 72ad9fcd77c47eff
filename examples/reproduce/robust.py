"""Rules against faulty workers: MNIST and the one hidden layer of Baruch et al. (2019); 2 of 11 workers are bad.

    python examples/reproduce/robust.py mnist.h5                                all of them, 12 minutes on one core
    python examples/reproduce/robust.py mnist.h5 --rules krum rfa --attacks none flip --epochs 3 --seeds 3
    python examples/reproduce/robust.py mnist.h5 --attacks none alie alie-0.7 --at-workers          against ALIE

All ranks run in this process, so that the bad workers can act together. An attack is what they do to their gradient between
backward and ps.step; server and rules are those of any run. A cell is the test accuracy in percent, the mean over the seeds; !
marks one that is over 2 points below the same rule's without an attack.

ALIE hides in the spread of the honest gradients. With --at-workers each worker keeps the momentum itself and pushes that, a
mean over many batches, whose spread is smaller: El Mhamdi et al. (2021, arXiv 2003.00010), Karimireddy et al. (2021). Under
the mean that is the same algorithm, step by step.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import h5py
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips.comm.simulated import World

WORKERS, BAD, BATCH = 11, 2, 32  # Bulyan needs 4 * 2 + 3 workers
MOMENTUM = 0.9  # of the server, or of every worker
RULES: dict[str, tuple[float, dict[str, float], str]] = {  # learning rate, settings, what the literature says
    "mean": (0.1, {}, "one faulty worker breaks it (Blanchard et al. 2017)"),
    "median": (0.1, {}, "withstands less than half (Yin et al. 2018), but not ALIE (Baruch et al. 2019)"),
    "trimmed": (0.1, {}, "withstands 2 (Yin et al. 2018), but not ALIE"),
    "krum": (0.1, {}, "withstands 2 (Blanchard et al. 2017), but may choose an ALIE attacker; noisy: one gradient of 11"),
    "multikrum": (0.1, {}, "withstands 2, but not ALIE"),
    "bulyan": (0.1, {}, "withstands 2 (El Mhamdi et al. 2018), but not ALIE"),
    "rfa": (0.1, {}, "withstands less than half of the weight (Pillutla et al. 2022)"),
    "cclip": (
        0.1,
        {"radius": 1.0},
        "each moves the result by radius / 11 at most (Karimireddy et al. 2021)",
    ),
    "normclip": (0.1, {"radius": 1.0}, "bounds what large ones do (Sun et al. 2019)"),
    "sign": (0.001, {}, "withstands less than half; another optimizer, slower (Bernstein et al. 2019)"),
}
Honest = Callable[[], tuple[Tensor, Tensor]]  # mean and standard deviation of honest gradients, by the attackers' own data
Attack = Callable[[Tensor, Honest], Tensor]  # from a worker's own gradient to what it pushes, both (d,)


def little(z: float) -> Attack:
    """A little is enough (Baruch et al. 2019, arXiv 1902.06156, algorithm 3): all attackers push mean - z std."""
    return lambda own, honest: torch.add(*honest(), alpha=-z)


def smallest_z() -> float:
    """The paper's z, with which enough honest workers lie beyond the attackers to make a majority: 0.14 for 2 of 11."""
    needed = WORKERS // 2 + 1 - BAD
    return statistics.NormalDist().inv_cdf((WORKERS - BAD - needed) / (WORKERS - BAD))


ATTACKS: dict[str, Attack] = {
    "none": lambda own, _: own,
    "flip": lambda own, _: -own,
    "flip10": lambda own, _: -10 * own,
    "x1000": lambda own, _: 1000 * own,
    "alie": little(smallest_z()),
    "alie-0.7": little(0.7),
    "alie-1.5": little(1.5),
    "nan": lambda own, _: own * torch.nan,  # which the worker itself finds and reports
    "nan-late": lambda own, _: own,  # written when the message leaves, as by a broken network card
}


class Broken:
    """A worker's communicator that writes NaN into contributions on their way."""

    def __init__(self, end: Any) -> None:
        self.end = end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.end, name)

    def reduce(self, message: Tensor, tail: int, needs: Any, apply: Any) -> None:
        if len(message) > tail:  # a contribution, not what a rule asks for afterwards
            message[:10] = torch.nan
        self.end.reduce(message, tail, needs, apply)


def load(file: str, part: str) -> tuple[Tensor, Tensor]:
    with h5py.File(file) as f:
        images, labels = (torch.from_numpy(f[part][name][:]) for name in ("images", "labels"))
    return images.float() / 255, labels.long()


def train(
    rule: str, attack: str, at_workers: bool, epochs: int, seed: int, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """The test accuracy in the end."""
    lr, settings, _ = RULES[rule]
    known: dict[int, tuple[Tensor, Tensor]] = {}  # round -> what the attackers found
    of_workers = MOMENTUM if at_workers else 0.0
    of_server = 0.0 if at_workers or rule == "sign" else MOMENTUM
    guessed: list[Tensor] = []  # what the attackers think that honest workers keep

    def honest(model: nn.Module, number: int) -> tuple[Tensor, Tensor]:
        if number not in known:
            some = torch.randint(len(data[0]), (WORKERS - BAD, BATCH), generator=torch.Generator().manual_seed(number))
            losses = (F.cross_entropy(model(data[0][i]), data[1][i]) for i in some)
            rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) for loss in losses]
            guessed.append(torch.stack(rows) + (of_workers * guessed.pop() if guessed else 0.0))
            known[number] = guessed[0].mean(0), guessed[0].std(0)
            known.pop(number - 1, None)
        return known[number]

    def rank(end: Any) -> float:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=of_server)
        kept = torch.zeros(sum(p.numel() for p in model.parameters()))
        bad = end.rank > WORKERS - BAD
        options: dict[str, Any] = {
            "rule": rule,
            "robust": {"num_byzantine": BAD, **settings},
            "nonfinite": "drop",
            "seed": seed,
        }
        communicator = Broken(end) if bad and attack == "nan-late" else end
        ps = mpips.connect(model, optimizer, communicator=communicator, run_dir=folder, checkpoint={"epochs": 0}, **options)
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data, BATCH, drop_last=True):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if bad or of_workers:
                    kept = of_workers * kept + torch.cat([p.grad.flatten() for p in model.parameters()])
                    pushed = ATTACKS[attack](kept, lambda: honest(model, ps.round)) if bad else kept
                    for p, part in zip(model.parameters(), pushed.split([p.numel() for p in model.parameters()]), strict=True):
                        p.grad.copy_(part.view_as(p))
                ps.step(loss)
        return (model(test[0]).argmax(1) == test[1]).float().mean().item()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return World(WORKERS + 1, seed).run(rank)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--at-workers", action="store_true", help="workers keep the momentum, not the server")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, test = load(args.file, "train"), load(args.file, "test")
    print(f"{WORKERS} workers, {BAD} bad, batches of {BATCH}, {args.epochs} epoch(s), {args.seeds} seed(s)")
    print(f"{'rule':<10}" + "".join(f"{name:>10}" for name in args.attacks) + "   seconds  the literature")
    for rule in args.rules:
        clean, cells, begun = 0.0, "", time.perf_counter()
        for attack in args.attacks:
            how = rule, attack, args.at_workers, args.epochs
            value = statistics.mean(100 * train(*how, seed, data, test) for seed in range(args.seeds))
            clean = value if attack == "none" else clean
            cells += f"{value:9.1f}" + ("!" if value < clean - 2 else " ")
        print(f"{rule:<10}{cells}   {time.perf_counter() - begun:7.0f}  {RULES[rule][2]}", flush=True)


if __name__ == "__main__":
    main()
