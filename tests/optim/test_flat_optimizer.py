"""Any torch optimizer on the server and any scheduler in the script, against plain PyTorch, also across a checkpoint."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import mpips
from mpips import checkpoint
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import Config, ConfigError
from mpips.model.message import CallError, Replica, replicate
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.optim.snapshot import SnapshotError, put_model, take_model
from tests.helpers.programs import data, mlp

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
OPTIM = torch.optim
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: OPTIM.SGD(p, lr=0.05),
    "nesterov": lambda p: OPTIM.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: OPTIM.Adam(p, lr=0.01, amsgrad=True),
    "adam, lr a tensor": lambda p: OPTIM.Adam(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "adamw, fused": lambda p: OPTIM.AdamW(p, lr=0.01, fused=True),
    "adamw, foreach": lambda p: OPTIM.AdamW(p, lr=0.01, foreach=True),
    "adamax": lambda p: OPTIM.Adamax(p, lr=0.01),
    "nadam": lambda p: OPTIM.NAdam(p, lr=0.01),
    "radam": lambda p: OPTIM.RAdam(p, lr=0.01),
    "rmsprop": lambda p: OPTIM.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda p: OPTIM.Rprop(p, lr=0.01),
    "adagrad": lambda p: OPTIM.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adadelta": lambda p: OPTIM.Adadelta(p, lr=0.5),
    "adafactor": lambda p: OPTIM.Adafactor(p, lr=0.01),
    "asgd": lambda p: OPTIM.ASGD(p, lr=0.05, t0=3),
    "groups": lambda p: OPTIM.SGD(
        [{"params": list(p)[::2], "lr": 0.1, "momentum": 0.5}, {"params": list(p)[1::2], "weight_decay": 0.1}], lr=0.05
    ),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5, 9], 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 15, 2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 4), lr_scheduler.MultiStepLR(o, [3, 5], 0.5)], [5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


def replica(net: nn.Module) -> Replica:
    return replicate(net, Config(), 1, World(1).ends[0].allocate)


def server(net: nn.Module, optimizer: Any) -> FlatOptimizer:
    return FlatOptimizer(replica(net), optimizer)


def ones(own: FlatOptimizer, present: list[float] | None = None, clip: float | None = None) -> None:
    """A step with a gradient of ones."""
    for _, grad in own.replica.flat.named(own.replica.push.gradients):
        grad.fill_(1)
    own.step(present or [1.0] * len(own.weights), clip)


def gradients(number: int) -> list[Tensor]:
    """The gradients of step `number`, for an `mlp`."""
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator) for shape in ((33, 12), (33,), (5, 33), (5,))]


def push(own: FlatOptimizer, numbers: range) -> None:
    """Server steps."""
    for number in numbers:
        views = own.replica.flat.named(own.replica.push.gradients)
        for (_, grad), new in zip(views, gradients(number), strict=True):
            grad.copy_(new)
        own.step([1.0] * 4, clip=None)


def script(net: nn.Module, optimizer: torch.optim.Optimizer, number: int, scheduler: Any = None) -> float:
    """One step as a script takes it, with mpips or without; the learning rate that it was taken with."""
    for p, grad in zip(net.parameters(), gradients(number), strict=True):
        p.grad = grad
    rate = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(number))
    elif scheduler:
        scheduler.step()
    return rate


def plainly(net: nn.Module, make: MakeOptimizer, numbers: range, scheduler: Any = None) -> list[float]:
    """The oracle: the same steps without mpips."""
    optimizer = make(list(net.parameters()))
    made = scheduler(optimizer) if scheduler else None
    return [script(net, optimizer, number, made) for number in numbers]


def through_a_file(own: FlatOptimizer) -> dict[str, Any]:
    path = checkpoint.save(Path(), 1, own.state_dict() | take_model(own.replica))
    return checkpoint.load(path)


def restored(tree: dict[str, Any], net: nn.Module, make: Any) -> FlatOptimizer:
    own = server(net, make)
    put_model(tree, own.replica)
    own.load_state_dict(tree)
    return own


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("made", ["instance", "function"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_as_in_plain_pytorch(optimizer: str, made: str) -> None:
    make = OPTIMIZERS[optimizer]
    net, other = mlp(), mlp()
    push(server(net, make(list(net.parameters())) if made == "instance" else make), range(8))
    plainly(other, make, range(8))
    assert_same(net, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_exactly_after_a_checkpoint(optimizer: str, dtype: torch.dtype) -> None:
    make = OPTIMIZERS[optimizer]
    whole, first, second = (mlp().to(dtype) for _ in range(3))
    uninterrupted = server(whole, make)
    push(uninterrupted, range(10))
    own = server(first, make)
    push(own, range(4))
    tree = through_a_file(own)
    nn.init.zeros_(second[0].weight)  # all comes from the file
    push(restored(tree, second, make), range(4, 10))
    assert_same(second, whole)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("optimizer", ["nesterov", "adam", "groups"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_goes_on_exactly_after_a_checkpoint(scheduler: str, optimizer: str, size: int) -> None:
    make, schedule = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
    if scheduler in ("one cycle", "cyclic") and optimizer == "groups":
        make = OPTIMIZERS["nesterov"]  # these cycle the momentum, too, which all groups must have

    def program(communicator: Communicator, steps: int, **settings: Any) -> tuple[list[float], nn.Module]:
        net = mlp()
        own = make(list(net.parameters()))
        made = schedule(own)
        ps = mpips.connect(
            net, own, communicator=communicator, run_dir="run", checkpoint={"epochs": 0}, **settings
        )  # but at the end
        return [script(net, own, number, made) for number in ps.epochs(steps)], net

    plain = mlp()
    expected = plainly(plain, make, range(12), schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ((rates, _),) = World(size).run(lambda e: program(e, 5))
        ((more, net),) = World(size).run(lambda e: program(e, 12, resume="auto"))
    assert rates + more == expected
    assert len(set(expected)) > 1
    assert_same(net, plain)


def test_a_scheduler_made_after_connect_goes_on_too() -> None:
    def program(steps: int, **settings: Any) -> list[float]:
        net = mlp()
        own = OPTIMIZERS["adam"](net.parameters())
        ps = mpips.connect(net, own, communicator=World(1).ends[0], run_dir="run", **settings)
        made = lr_scheduler.OneCycleLR(own, max_lr=0.1, total_steps=20)
        return [script(net, own, number, made) for number in ps.epochs(steps)]

    expected = plainly(mlp(), OPTIMIZERS["adam"], range(12), SCHEDULERS["one cycle"])
    assert program(5) + program(12, resume="auto") == expected


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_script_sets_in_its_groups_is_what_the_server_steps_with(dtype: torch.dtype, size: int) -> None:
    def made(net: nn.Module) -> torch.optim.Optimizer:
        return OPTIM.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.02}], lr=0.01)

    def work(net: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        for number in range(6):
            first, second = optimizer.param_groups
            first["lr"], second["weight_decay"] = 0.1 / (number + 1), 0.01 * number
            second["betas"] = (0.5, 0.9 + 0.01 * number)
            for p, grad in zip(net.parameters(), gradients(number), strict=True):
                p.grad = grad.to(dtype).to(p.dtype)
            optimizer.step()
        return net

    def program(communicator: Communicator) -> nn.Module:
        net = mlp().to(dtype)
        optimizer = made(net)
        mpips.connect(net, optimizer, communicator=communicator, run_dir="run")
        return work(net, optimizer)

    plain = mlp().to(dtype).float()  # the master weights
    work(plain, made(plain))
    for net in World(size).run(program):
        assert_same(net, plain.to(dtype))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_that_set_other_numbers_are_told_so(mode: str) -> None:
    def program(communicator: Communicator) -> None:
        net = mlp()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", mode=mode)
        optimizer.param_groups[0]["lr"] = 0.5 if ps.worker else 0.25
        script(net, optimizer, 0)

    if mode == "async":  # whoever steps, steps with its own
        World(3).run(program)
        return
    words = r"do not agree: worker 0 \(rank 1\) has param_groups\[0\]\['lr'\] = 0\.25, worker 1 \(rank 2\) has 0\.5;"
    with pytest.raises(CallError, match=words):
        World(3).run(program)


def test_groups_of_an_instance_keep_their_settings_and_lose_frozen_parameters() -> None:
    net, other = mlp(), mlp()
    for model in (net, other):
        model[0].requires_grad_(False)
    groups = lambda m: [{"params": m[0].parameters(), "lr": 9.0}, {"params": m[2].parameters(), "lr": 0.5}]  # noqa: E731
    own = server(net, OPTIM.SGD(groups(net), lr=0.1))
    assert [group["lr"] for group in own.torch.param_groups] == [9.0, 0.5]
    assert [len(group["params"]) for group in own.torch.param_groups] == [0, 2]
    ones(own)
    plain = OPTIM.SGD(groups(other), lr=0.1)
    for p in other[2].parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    assert_same(net, other)


def test_the_state_of_a_given_optimizer_moves_to_the_masters() -> None:
    """An optimizer that has stepped before, or that makes its state when it is made."""
    net = nn.Linear(2, 1, bias=False).bfloat16()
    optimizer = OPTIM.SGD(net.parameters(), lr=1.0, momentum=1.0)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    before = net.weight.detach().clone()
    own = server(net, optimizer)
    ones(own)
    (buffer,) = [state["momentum_buffer"] for state in own.torch.state.values()]
    assert buffer.dtype == torch.float32
    assert buffer.tolist() == [[2.0, 2.0]]
    assert torch.equal(net.weight, (before.float() - 2).bfloat16())


def test_a_parameter_that_nobody_has_a_gradient_for_is_passed_over() -> None:
    net = mlp()
    own = server(net, lambda p: OPTIM.AdamW(p, lr=0.1, weight_decay=0.5))
    before = [p.detach().clone() for p in net.parameters()]
    ones(own, present=[0, 2, 0, 1])
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [False, True, False, True]
    assert len(own.torch.state) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_grad_between_steps_changes_nothing_on_the_server(dtype: torch.dtype) -> None:
    """A script calls it on every rank: with None for a gradient the optimizer would quietly do nothing."""
    net = mlp().to(dtype)
    own = server(net, OPTIM.SGD(net.parameters(), lr=1.0))
    before = [p.detach().float().clone() for p in net.parameters()]
    own.torch.zero_grad()
    net.zero_grad()
    ones(own)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, (old - 1).to(dtype))


def test_the_norm_is_clipped_over_all_parameters_that_have_a_gradient() -> None:
    net, other = mlp(), mlp()
    own = server(net, OPTIMIZERS["sgd"])
    ones(own, present=[1, 0, 1, 1], clip=0.5)
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    for i, p in enumerate(other.parameters()):
        p.grad = None if i == 1 else torch.ones_like(p)
    nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    optimizer.step()
    assert_same(net, other)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clip_is_plain_pytorch_s_clipping(clip: float) -> None:
    net, other = mlp(), mlp()
    ps = mpips.connect(net, OPTIMIZERS["adam"], communicator=World(1).ends[0], run_dir="run", clip=clip)
    optimizer = OPTIMIZERS["adam"](other.parameters())
    for _ in ps.epochs(1):
        for x, y in ps.batches(data(40), 8, shuffle=False):
            for model in (net, other):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            ps.step(loss)
            nn.utils.clip_grad_norm_(other.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(net, other)


@pytest.mark.parametrize(("optimizer", "words"), [
    (lambda p: OPTIM.SGD(mlp().parameters(), lr=1), r"4 parameter\(s\) that are not the model's"),
    (OPTIM.SGD(mlp().parameters(), lr=1), r"4 parameter\(s\) that are not the model's"),
])  # fmt: skip
def test_optimizers_that_cannot_serve_are_refused(optimizer: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        server(mlp(), optimizer)


def test_a_function_must_use_the_masters_it_is_given() -> None:
    net = mlp().bfloat16()
    with pytest.raises(ConfigError, match="a function that makes one of the parameters it is given"):
        server(net, lambda p: OPTIM.SGD(net.parameters(), lr=1))


@pytest.mark.parametrize(("make", "words"), [
    (OPTIMIZERS["nesterov"], "has optimizer Adam, this run SGD"),
    (lambda p: OPTIM.Adam([{"params": p[:1]}, {"params": p[1:]}]), "other parameter groups"),
    (lambda p: OPTIM.Adam(p[::-1]), "other parameter groups"),
])  # fmt: skip
def test_a_checkpoint_of_another_optimizer_is_refused(make: Any, words: str) -> None:
    own = server(mlp(), OPTIMIZERS["adam"])
    push(own, range(2))
    with pytest.raises(SnapshotError, match=words):
        restored(through_a_file(own), mlp(), make)


def test_the_masters_are_exact_in_a_checkpoint() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    own = server(net, lambda p: OPTIM.SGD(p, lr=2**-12))
    ones(own)
    assert net.weight.item() == 1
    again = restored(through_a_file(own), nn.Linear(1, 1, bias=False).bfloat16(), lambda p: OPTIM.SGD(p, lr=2**-12))
    assert again.weights[0].item() == 1 - 2**-12


class Own(OPTIM.SGD):
    """A script's own: what it does beside the step is not left out."""

    seen = 0

    def step(self, closure: Any = None) -> Any:
        Own.seen += 1
        return super().step(closure)


@pytest.mark.parametrize(
    "who", ["pre hook", "post hook", "global pre hook", "global post hook", "scheduler", "profiler", "class", "wrapper"]
)
def test_whoever_looks_on_sees_every_step(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.optim import optimizer as hooks

    seen: list[object] = []
    net = mlp()
    Own.seen = 0
    made: Any = (Own if who == "class" else OPTIM.SGD)(net.parameters(), lr=0.1)
    held: Any = None
    if who == "pre hook":
        made.register_step_pre_hook(lambda *_: seen.append(1))
    elif who == "global pre hook":
        held = hooks.register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    elif who == "global post hook":
        held = hooks.register_optimizer_step_post_hook(lambda *_: seen.append(1))
    elif who == "scheduler":
        lr_scheduler.StepLR(made, 1)
    elif who == "wrapper":
        genuine = OPTIM.SGD.step
        wrapper = functools.wraps(genuine)(lambda *given: seen.append(1) or genuine(*given))
        monkeypatch.setattr(OPTIM.SGD, "step", wrapper)
    mpips.connect(net, made, communicator=World(1).ends[0], run_dir="run")
    assert Own.seen in (0, 2)  # the trial of a class that is not torch's, with a copy
    Own.seen = 0
    if who == "post hook":  # it may come after connect as well
        made.register_step_post_hook(lambda *_: seen.append(1))
    try:
        with torch.profiler.profile() if who == "profiler" else warnings.catch_warnings() as found:
            for number in range(3):
                script(net, made, number)
    finally:
        if held is not None:
            held.remove()
    if who == "scheduler":
        assert made._opt_called
    elif who == "profiler":
        assert sum("Optimizer.step#SGD.step" in event.name for event in found.events()) == 3
    else:
        assert len(seen) + Own.seen == 3
