"""Random training scripts: on any number of workers what one process does on the joined batch, or refused in a line.

A seed writes a script: a model, one optimizer or two, and for each step what scripts do around `optimizer.step()` (zeroing,
accumulation, clipping, closures, rates and momenta by hand, schedulers, a second backward, states taken and put back, frozen
layers, averages). The same function trains in one process without mpips.

`python -m tests.promises.test_random_scripts SEED` says what a seed chooses and plays it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpips
from mpips.comm import CommunicatorError
from mpips.comm.simulated import World

SEEDS, CHUNK = int(os.environ.get("RANDOM_SCRIPTS", "150")), 25
D = torch.float64
TOLERANCE = 1e-10
Make = Callable[[Any], torch.optim.Optimizer]
# None whose step is a sign or a quotient of small numbers: what is rounded would be another step.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, 0.001, momentum=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, eps=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.02, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, eps=1e-3, momentum=0.3),
    "asgd": lambda p: torch.optim.ASGD(p, 0.02),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=40, cycle_momentum=False),
}
BACKWARDS = ["plain"] * 6 + ["accumulate", "accumulate", "closure", "scaled", "scaled", "inf", "twice", "assigned", "penalty"]
BACKWARDS += ["joint", "joint", "frozen", "hooked"]
AROUND = ["nothing"] * 8 + ["clip_norm", "clip_norm", "clip_value", "clip_part", "norm_only", "average", "rates", "momenta"]
AROUND += ["no_grad", "decay", "zero_by_hand", "twice_clipped", "clip_all"]
AFTER = ["nothing"] * 10 + ["step_again", "validate", "save", "evaluate", "skip", "skip", "second_batch", "other_zeroed"]
REFUSED_AFTER = ["round_trip", "fresh_state", "unzeroed"]  # with a server
Action = tuple[str, str, str]


@dataclass
class Chosen:
    """What a seed chooses."""

    size: int
    world: dict[str, Any]
    settings: dict[str, Any]
    optimizers: list[str]
    scheduler: str
    zeroing: str
    hidden: int
    model: str
    actions: list[Action]
    loops: bool
    seed: int
    stop: int = -1  # the step in which the run is preempted, and resumed


def choose(seed: int) -> Chosen:
    draw = random.Random(seed)
    worlds: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {}), (2, {"shares": True}), (3, {}), (3, {"shares": True})]
    worlds += [(4, {"shares": True}), (5, {"shares": True, "nodes": (2, 3)}), (5, {})]
    size, world = draw.choice(worlds)
    settings: dict[str, Any] = {"server_trains": draw.random() < 0.5}
    if size > 2 and world and draw.random() < 0.5:
        settings["plan"] = draw.choice(["root", "sharded"])
    if draw.random() < 0.15:
        settings["deterministic"] = True
    several = draw.random() < 0.3
    optimizers = [draw.choice(list(OPTIMIZERS)) for _ in range(2 if several else 1)]
    after = AFTER + REFUSED_AFTER * (draw.random() < 0.15)
    actions = [(draw.choice(BACKWARDS), draw.choice(AROUND), draw.choice(after)) for _ in range(draw.choice([4, 6, 8]))]
    loops = draw.random() < 0.6
    model = draw.choice(["mlp", "groups", "tied", "branches"])
    resumes = loops and model != "branches" and draw.random() < 0.5  # that model counts its calls
    stop = draw.randrange(len(actions)) if resumes else -1
    return Chosen(
        size,
        world,
        settings,
        optimizers,
        draw.choice(list(SCHEDULERS)),
        draw.choice(["none", "zeros", "model", "before", "after"]),
        draw.choice([1, 3, 8]),
        model,
        actions,
        loops,
        draw.randrange(1 << 30),
        stop,
    )


class Tied(nn.Module):
    """The same weights twice."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, hidden), nn.Linear(4, hidden)
        self.b.weight = self.a.weight
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.a(x)) * self.b(x))
        return out


class Branches(nn.Module):
    """A layer that only some of the steps use."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        head = self.left if self.calls % 3 else self.right
        out: Tensor = head(torch.tanh(self.trunk(x)))
        return out


def make_model(chosen: Chosen) -> nn.Module:
    torch.default_generator.manual_seed(chosen.seed)
    kinds: dict[str, Callable[[int], nn.Module]] = {"tied": Tied, "branches": Branches}
    default = lambda hidden: nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.LayerNorm(hidden), nn.Linear(hidden, 1))  # noqa: E731
    return kinds.get(chosen.model, default)(chosen.hidden).to(D)


def parameters(chosen: Chosen, model: nn.Module) -> Any:
    if chosen.model != "groups":
        return model.parameters()
    first, *others = model.parameters()
    return [{"params": [first], "lr": 0.003}, {"params": others}]


Mine = Callable[[Tensor], Tensor]


class Script:
    """The script: the same with and without mpips, of which it knows what `Alone` has, too."""

    def __init__(self, chosen: Chosen, models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        self.chosen, self.models, self.optimizers = chosen, models, optimizers
        make = SCHEDULERS[chosen.scheduler]
        self.schedulers = [make(optimizer) for optimizer in optimizers] if make else []
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.ema = [p.detach().clone() for model in models for p in model.parameters()]
        self.ps: Any = Alone()
        self.told: list[float] = []

    def loss(self, which: int, batch: Tensor) -> Tensor:
        x = batch[:, :4]
        if which:  # an adversary: the other model's output goes in, and its gradient back
            x = x + 0.1 * self.models[0](x)
        return (self.models[which](x).squeeze(-1) - batch[:, 4]).pow(2).mean()

    def zero(self, which: int) -> None:
        kind = self.chosen.zeroing
        if kind == "model":
            self.models[which].zero_grad()
        else:
            self.optimizers[which].zero_grad(set_to_none=kind != "zeros")

    def step(self, number: int, action: Action, batches: list[Tensor]) -> None:
        which = number % len(self.optimizers)
        backward, around, after = action
        if self.chosen.zeroing != "after":
            self.zero(which)
        params = list(self.models[which].parameters())
        stepped = self.backward(backward, around, which, batches, params)
        if not stepped and after == "skip":
            self.zero(which)
            return
        if not stepped:
            self.around(around, which, params)
            self.optimizers[which].step()
        if backward == "joint" and len(self.optimizers) > 1:
            self.optimizers[1 - which].step()
        self.after(after, which, batches)
        if self.chosen.zeroing == "after":
            for every in range(len(self.optimizers)):
                self.zero(every)
        if self.schedulers:
            self.schedulers[which].step()
        live = (p for model in self.models for p in model.parameters())
        for mean, p in zip(self.ema, live, strict=True):
            mean.lerp_(p.detach(), 0.1)

    def backward(self, kind: str, around: str, which: int, batches: list[Tensor], params: list[nn.Parameter]) -> bool:
        """Compute the gradient in one of the ways of scripts; return whether that has taken the step, too."""
        first, optimizer = batches[0], self.optimizers[which]
        if kind == "closure":

            def closure() -> Tensor:
                self.zero(which)
                loss = self.loss(which, first)
                loss.backward()
                return loss

            optimizer.step(closure)
            return True
        if kind in ("scaled", "inf"):
            loss = self.loss(which, first)
            worst = bool((first[0] == self.ps.item).all())  # only the worker of this item has an infinite gradient
            self.scaler.scale(loss * torch.inf if kind == "inf" and worst else loss).backward()
            if around != "nothing":
                self.scaler.unscale_(optimizer)
                self.around("clip_norm" if around.startswith("clip") and kind != "inf" else "nothing", which, params)
            self.scaler.step(optimizer)
            self.scaler.update()
            self.told.append(self.scaler.get_scale())
            return True
        if kind == "accumulate":
            for batch in batches:
                (self.loss(which, batch) / len(batches)).backward()
        elif kind == "twice":
            loss = self.loss(which, first)
            loss.backward(retain_graph=True)
            (0.5 * loss).backward()
        elif kind == "penalty":
            loss = self.loss(which, first)
            for p in params:
                loss = loss + 0.01 * p.pow(2).sum()
            loss.backward()
        elif kind == "assigned":
            gradients = torch.autograd.grad(self.loss(which, first), params, allow_unused=True)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
        elif kind == "joint":
            sum((self.loss(number, first) for number in range(len(self.models))), torch.zeros((), dtype=D)).backward()
        elif kind == "frozen":
            params[0].requires_grad_(False)
            self.loss(which, first).backward()
            params[0].requires_grad_(True)
        elif kind == "hooked":
            hooks = [p.register_hook(lambda gradient: gradient * 0.5) for p in params[:2]]
            self.loss(which, first).backward()
            for hook in hooks:
                hook.remove()
        else:
            self.loss(which, first).backward()
        return False

    def around(self, action: str, which: int, params: list[nn.Parameter]) -> None:
        """What scripts do between backward and the step."""
        groups = self.optimizers[which].param_groups
        if action in ("clip_norm", "twice_clipped"):
            self.told.append(float(nn.utils.clip_grad_norm_(params, 0.2)))
        if action == "twice_clipped":
            nn.utils.clip_grad_value_(params, 0.05)
        if action == "clip_all":
            every = [p for model in self.models for p in model.parameters()]
            nn.utils.clip_grad_norm_(every, 0.3)
        if action == "norm_only":
            self.told.append(float(nn.utils.clip_grad_norm_(params, float("inf"))))
        if action == "clip_value":
            nn.utils.clip_grad_value_(params, 0.05)
        if action == "clip_part":
            nn.utils.clip_grad_norm_(params[:2], 0.1)
        if action == "average":
            self.ps.average()
            for p in params:
                if p.grad is not None:
                    p.grad.clamp_(-0.1, 0.1)
        if action == "no_grad":
            params[-1].grad = None
        if action == "zero_by_hand" and params[-1].grad is not None:
            params[-1].grad.zero_()
        if action == "decay":
            for p in params:
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=0.1)
        for group in groups if action == "rates" else []:
            group["lr"] = group["lr"] * 0.7
        for group in groups if action == "momenta" else []:
            if group.get("momentum"):
                group["momentum"] = 0.6
            if "betas" in group:
                group["betas"] = (0.8, 0.95)
            group["weight_decay"] = 0.02

    def after(self, action: str, which: int, batches: list[Tensor]) -> None:
        """What scripts do after a step."""
        optimizer = self.optimizers[which]
        if action == "step_again":
            self.zero(which)
            self.loss(which, batches[1]).backward()
            optimizer.step()
        if action == "second_batch":
            self.zero(which)
            self.loss(which, batches[1]).backward()
            nn.utils.clip_grad_norm_(list(self.models[which].parameters()), 0.2)
            optimizer.step()
        if action == "other_zeroed":
            self.zero(len(self.optimizers) - 1 - which)
        if action == "evaluate":
            with torch.no_grad():
                self.loss(which, batches[0])
        if action == "validate":
            self.told.append(self.ps.validate(lambda: float(sum(p.sum() for p in self.models[which].parameters()).detach())))
        if action == "save":
            self.ps.save()
        if action == "round_trip":
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        if action == "fresh_state":
            optimizer.state.clear()
        if action == "unzeroed":
            optimizer.step()

    def result(self) -> list[Tensor]:
        """Weights, rates; if the run was not resumed, averages and what the script has printed, too."""
        weights = [p.detach().clone() for model in self.models for p in model.parameters()]
        rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        found = [*weights, torch.tensor(rates, dtype=D)]
        return found if self.chosen.stop >= 0 else [*found, *self.ema, torch.tensor(self.told, dtype=D)]


class Alone:
    """What the script does with a run, in one process without one."""

    item = torch.zeros(5, dtype=D)

    def average(self) -> None:
        """The average over one worker."""

    def save(self) -> None:
        """No checkpoint."""

    def validate(self, measure: Callable[[], float]) -> float:
        """Measure."""
        return measure()


def made(chosen: Chosen) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    models = [make_model(chosen) for _ in chosen.optimizers]
    return models, [OPTIMIZERS[name](parameters(chosen, model)) for name, model in zip(chosen.optimizers, models, strict=True)]


def items(chosen: Chosen) -> Tensor:
    """All items: for each step and each of two batches, 60 for all workers together."""
    generator = torch.Generator().manual_seed(chosen.seed)
    return torch.randn(len(chosen.actions), 2, 60, 5, dtype=D, generator=generator)


def alone(chosen: Chosen) -> list[Tensor]:
    """One process, without mpips, on the joined batches."""
    script, whole = Script(chosen, *made(chosen)), items(chosen)
    for number, (action, batches) in enumerate(zip(chosen.actions, whole, strict=True)):
        script.ps.item = whole[number, 0, 0]
        script.step(number, action, list(batches))
    return script.result()


def on_ranks(chosen: Chosen, folder: str = "run", **settings: Any) -> list[list[Tensor]]:
    """What each worker has."""

    def program(e: Any) -> list[Tensor]:
        models, optimizers = made(chosen)
        given = (models[0], optimizers[0]) if len(models) == 1 else (models, optimizers)
        ps = mpips.connect(*given, communicator=e, run_dir=folder, **chosen.settings, **settings)
        script, whole = Script(chosen, models, optimizers), items(chosen)
        script.ps = OnRanks(ps)
        ps.keep(scaler=script.scaler, **{f"scheduler{n}": scheduler for n, scheduler in enumerate(script.schedulers)})
        for number in numbers(ps):
            if number == chosen.stop and "resume" not in settings:
                ps.preempt()
            script.ps.item = whole[number, 0, 0]
            script.step(number, chosen.actions[number], [batch[ps.worker :: ps.workers] for batch in whole[number]])
        return script.result()

    def numbers(ps: Any) -> Iterator[int]:
        """The steps: of a loop over a shard of a stream with one item for each worker and step, or without data."""
        if not chosen.loops:
            yield from range(len(chosen.actions))
            return
        for _ in ps.epochs(1):
            for batch in ps.batches(torch.arange(len(chosen.actions) * ps.workers), 1, shuffle=False):
                yield int(batch) // ps.workers

    return World(chosen.size, seed=chosen.seed % 1000, **chosen.world).run(program)


class OnRanks:
    """The same with a run."""

    item = Alone.item

    def __init__(self, ps: Any) -> None:
        self.average, self.save, self.validate = ps.average, ps.save, ps.validate


def in_parts(chosen: Chosen) -> list[list[Tensor]]:
    """What each worker has; if the run is to be preempted, after a resume."""
    if chosen.stop < 0:
        return on_ranks(chosen)
    try:
        return on_ranks(chosen)
    except SystemExit as end:
        assert end.code == 75, end.code
    return on_ranks(chosen, resume="auto")


REFUSED = (RuntimeError, ValueError, TypeError, CommunicatorError)  # the last one is what other ranks raise


def play(seed: int) -> str:
    """Play one seed; return why its script is refused, or ""."""
    chosen = choose(seed)
    try:
        expected = alone(chosen)
    except (RuntimeError, AssertionError, ZeroDivisionError) as error:
        return f"in one process: {error}"
    try:
        found = in_parts(chosen)
    except REFUSED as error:
        return f"{type(error).__name__}: {error}"
    for worker, result in enumerate(found):
        for number, (ours, theirs) in enumerate(zip(result, expected, strict=True)):
            off = float((ours - theirs).abs().max()) if ours.numel() else 0.0
            assert off <= TOLERANCE, f"worker {worker}, tensor {number}: {off:.1e} off; {chosen}"
    return ""


@pytest.mark.filterwarnings("ignore:Detected call of")  # of schedulers before a step, where a GradScaler has skipped it
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_a_script_is_that_of_one_process_or_refused(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    refused = {}
    for seed in range(first, first + CHUNK):
        (tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(tmp_path / str(seed))
        try:
            why = play(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        refused |= {seed: why} if why else {}
    record_property("refused", refused)
    assert len(refused) <= CHUNK / 2, refused


if __name__ == "__main__":
    print(choose(int(sys.argv[1])))
    print(play(int(sys.argv[1])) or "as in one process")
