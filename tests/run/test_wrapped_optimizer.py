"""The script's optimizer after connect: the same object, and everything that a script does with one."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import ConfigError
from mpips.model.message import CallError
from tests.helpers.programs import data, mlp, sha

SHARED = pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])


def alone() -> Communicator:
    return World(1).ends[0]


def connected(optimizer: Any = torch.optim.Adam, **settings: Any) -> tuple[nn.Module, Any, mpips.Run]:
    model = mlp()
    made = optimizer(model.parameters(), lr=0.01)
    return model, made, mpips.connect(model, made, communicator=alone(), run_dir="run", **settings)


def one_step(model: nn.Module, optimizer: Any) -> None:
    x, y = data(16)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_it_is_the_same_object_and_an_instance_of_its_class() -> None:
    model, optimizer, ps = connected()
    assert isinstance(optimizer, torch.optim.Adam)
    assert type(optimizer).__name__ == "Adam"
    assert ps.optimizers == [optimizer]
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())


def test_after_the_run_it_is_what_it_was() -> None:
    model, optimizer, ps = connected()
    one_step(model, optimizer)
    rounds = ps.round
    ps.close()
    assert type(optimizer) is torch.optim.Adam
    before = sha(model)
    one_step(model, optimizer)
    assert (ps.round, sha(model) == before) == (rounds, False)


def test_a_further_group_is_refused_when_it_is_given() -> None:
    _, optimizer, _ = connected()
    with pytest.raises(RuntimeError, match=r"add_param_group\(\) after connect"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_group_that_is_put_there_is_refused_at_the_next_step() -> None:
    model, optimizer, _ = connected()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": []})
    with pytest.raises(RuntimeError, match="other param_groups than it had at connect"):
        one_step(model, optimizer)


@SHARED
@pytest.mark.parametrize("plan", ["root", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_whole_and_plain_pytorch_loads_it(shares: bool, plan: str, dtype: torch.dtype) -> None:
    """Worker 0 alone asks for it, as a script does that saves on one rank."""

    def program(e: Communicator) -> tuple[Any, str]:
        model = mlp().to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", plan=plan)
        state = {}
        for step in range(4):
            x, y = (t[ps.worker :: ps.workers] for t in data(16))
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(dtype)), y).backward()
            optimizer.step()
            if step == 3 and ps.worker == 0:
                state = optimizer.state_dict()
        return state, sha(model)

    (state, _), *_ = World(3, shares=shares).run(program)
    plain = mlp().to(dtype)
    other = torch.optim.Adam(plain.parameters(), lr=1.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.01
    for p in plain.parameters():
        assert other.state[p]["exp_avg"].shape == p.shape
        assert float(other.state[p]["step"]) == 4
        assert bool(other.state[p]["exp_avg"].any())


@SHARED
@pytest.mark.parametrize("plan", ["root", "sharded"])
@pytest.mark.parametrize("trains", [False, True], ids=["rank 0 serves", "rank 0 trains"])
def test_state_dict_between_two_steps_changes_no_bit(shares: bool, plan: str, trains: bool) -> None:
    """All workers ask for it, and the state is that after as many steps; so is a pickled optimizer's, and a copy's."""

    def program(e: Communicator, asks: bool) -> str:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=f"run{asks}", plan=plan, server_trains=trains)
        for step in range(5):
            x, y = (t[ps.worker :: ps.workers] for t in data(16))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if asks:
                tree = optimizer.state_dict()["state"]
                assert [float(state["step"]) for state in tree.values()] == [step + 1] * 4
                for own in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                    assert type(own) is torch.optim.Adam
                    for mine, theirs in zip(own.state.values(), tree.values(), strict=True):
                        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        return sha(model)

    assert World(3, shares=shares).run(lambda e: program(e, True)) == World(3, shares=shares).run(lambda e: program(e, False))


@SHARED
@pytest.mark.parametrize("trains", [False, True], ids=["rank 0 serves", "rank 0 trains"])
@pytest.mark.parametrize("who", [0, 1])
def test_state_dict_on_one_worker_while_another_steps_ends_the_run(shares: bool, trains: bool, who: int) -> None:
    """The step of the others would lack its contribution."""

    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", server_trains=trains)
        for step in range(4):
            one_step(model, optimizer)
            if step == 1 and ps.worker == who:
                optimizer.state_dict()

    with pytest.raises(CallError, match=rf"worker {who} \(rank \d\) at optimizer.state_dict\(\).*Every worker .*state_dict"):
        World(3, shares=shares).run(program)


BY_HAND: dict[str, Any] = {
    "in place": lambda p: p.grad.clamp_(-0.01, 0.01),
    "through data": lambda p: p.grad.data.clamp_(-0.01, 0.01),
    "assigned": lambda p: setattr(p, "grad", p.grad.sign()),
    "zeroed after all": lambda p: p.grad.zero_(),
}
NOTHING: dict[str, Any] = {
    "read": lambda p: p.grad.norm(),
    "copied": lambda p: setattr(p, "grad", p.grad.clone()),
    "dropped": lambda p: setattr(p, "grad", None),
}


HOOKS: dict[str, tuple[Any, bool]] = {
    "clipped": (lambda grad: grad.clamp(-0.01, 0.01), True),
    "clipped in place": (lambda grad: print(grad.clamp_(-0.01, 0.01)), True),
    "read": (lambda grad: print(grad.norm()), False),
}


@SHARED
@pytest.mark.parametrize("when", ["before connect", "after connect", "removed"])
@pytest.mark.parametrize("what", HOOKS)
def test_gradients_that_a_hook_changes_on_each_worker_are_said(
    what: str, when: str, shares: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, changes = HOOKS[what]

    def program(e: Communicator) -> list[int]:
        model, called = mlp(), [0]

        def counted(grad: torch.Tensor) -> Any:
            called[0] += 1
            return hook(grad)

        handles = [p.register_hook(counted) for p in model.parameters()] if when == "before connect" else []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        mpips.connect(model, optimizer, communicator=e, run_dir="run")
        if when != "before connect":
            handles = [p.register_hook(counted) for p in model.parameters()]
        for _ in range(3):
            if when == "removed":
                for handle in handles:
                    handle.remove()
            one_step(model, optimizer)
        return called

    calls = World(3, shares=shares).run(program)
    assert calls == [[0 if when == "removed" else 3 * len(list(mlp().parameters()))]] * 2
    assert capsys.readouterr().out.count("the script changes the gradient of ") == (changes and when != "removed")


@SHARED
@pytest.mark.parametrize("what", [*BY_HAND, *NOTHING, "averaged", "one worker"])
def test_gradients_that_each_worker_changes_by_hand_are_said(
    what: str, shares: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        x, y = data(16)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if what == "averaged":
                ps.average()
            for p in model.parameters():
                (BY_HAND | NOTHING).get(what, BY_HAND["in place"])(p)
            optimizer.step()

    World(2 if what == "one worker" else 3, shares=shares).run(program)
    said = capsys.readouterr().out.count("the script changes the gradient of ")
    assert said == (what in BY_HAND)


def test_hooks_run_once_a_step_where_the_script_calls_it() -> None:
    model, optimizer, _ = connected()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    one_step(model, optimizer)
    one_step(model, optimizer)
    assert seen == ["pre", "post"] * 2


def test_the_profiler_sees_a_step_as_torch_s_own() -> None:
    model, optimizer, _ = connected()
    with torch.profiler.profile() as profile:
        one_step(model, optimizer)
    assert [event.name for event in profile.events() or () if "Optimizer.step#Adam.step" in event.name]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_plain_optimizer(how: Any) -> None:
    _, optimizer, _ = connected()
    assert type(how(optimizer)) is torch.optim.Adam


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "by hand": None,
    "numpy": None,
    "a tensor": None,
}


def scheduled(name: str, before: bool, connect: Any) -> tuple[list[float], nn.Module]:
    model = mlp()
    rate: Any = torch.tensor(0.1) if name == "a tensor" else np.float32(0.125) if name == "numpy" else 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
    make = SCHEDULERS[name]
    scheduler = make(optimizer) if make and before else None
    share = connect(model, optimizer)
    scheduler = scheduler or (make(optimizer) if make else None)
    rates = []
    x, y = (t[share] for t in data(16))
    for step in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([1.0] if name == "plateau" else []))
        elif name == "a tensor":
            optimizer.param_groups[0]["lr"].mul_(0.5)
        else:
            for group in optimizer.param_groups:
                group["lr"] = np.float32(0.5 ** (step + 3)) if name == "numpy" else 0.1 / (2 + step)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates, model


@pytest.mark.filterwarnings("error:Detected call of:UserWarning", "error:Seems like:UserWarning")
@pytest.mark.parametrize("before", [True, False], ids=["made before connect", "made after it"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_whatever_sets_the_rate_works_as_in_plain_pytorch(name: str, before: bool) -> None:
    expected, plain = scheduled(name, before, lambda *_: slice(None))

    def program(e: Communicator, plan: str) -> tuple[list[float], str]:
        def connect(model: nn.Module, optimizer: Any) -> slice:
            mpips.connect(model, optimizer, communicator=e, run_dir="run", plan=plan)
            return slice(None)

        rates, model = scheduled(name, before, connect)
        return rates, sha(model)

    for world, plan in ((World(1), "auto"), (World(2), "auto"), (World(2, shares=True), "sharded")):
        assert world.run(lambda e, plan=plan: program(e, plan)) == [(expected, sha(plain))]


@SHARED
def test_workers_that_disagree_are_named(shares: bool) -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        one_step(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + ps.worker)
        one_step(model, optimizer)

    line = r"worker 0 \(rank 1\) has param_groups\[0\]\['lr'\] = 0\.1, worker 1 \(rank 2\) has 0\.05"
    with pytest.raises(RuntimeError, match=line):
        World(3, shares=shares).run(program)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("world", [{"size": 1}, {"size": 2}, {"size": 2, "shares": True}], ids=str)
def test_gradients_are_those_of_plain_pytorch_before_and_after_a_step(to_none: bool, world: dict[str, Any]) -> None:
    """After a step they stay until the script clears them; not cleared, the next backward adds to them."""

    def steps(model: nn.Module, optimizer: Any) -> list[Any]:
        x, y = data(16)
        seen = []
        for number in range(5):
            if number != 2:
                optimizer.zero_grad(set_to_none=to_none)
            seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen.append([p.grad.clone() for p in model.parameters()])
        return seen

    def program(e: Communicator) -> list[Any]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        mpips.connect(model, optimizer, communicator=e, run_dir="run")
        return steps(model, optimizer)

    model = mlp()
    expected = steps(model, torch.optim.Adam(model.parameters(), lr=0.01))
    for own in World(**world).run(program):
        for ours, theirs in zip(own, expected, strict=True):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_step_that_somebody_has_replaced_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="whose step has been replaced"):
        mpips.connect(model, optimizer, communicator=alone(), run_dir="run")


def test_an_optimizer_is_of_one_run() -> None:
    model, optimizer, _ = connected()
    with pytest.raises(ConfigError, match="given one of a run that goes on"):
        mpips.connect(model, optimizer, communicator=alone(), run_dir="other")


@pytest.mark.parametrize("name", ["LBFGS", "SAM"])
def test_a_step_that_needs_a_closure_and_gets_none_says_so(name: str) -> None:
    from tests.run.test_loops import SAM

    model = mlp()
    kinds: dict[str, Any] = {"LBFGS": torch.optim.LBFGS, "SAM": SAM}
    optimizer = kinds[name](model.parameters())
    mpips.connect(model, optimizer, communicator=alone(), run_dir="run")
    with pytest.raises((ConfigError, AssertionError), match="closure"):
        one_step(model, optimizer)


def test_a_changed_rate_is_said_at_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    def program(rate: float, resume: str) -> float:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        ps = mpips.connect(model, optimizer, communicator=alone(), run_dir="run", resume=resume)
        one_step(model, optimizer)
        ps.save()
        return float(optimizer.param_groups[0]["lr"])

    assert program(0.1, "no") == 0.1
    assert program(0.01, "auto") == 0.1
    line = "the script gives param_groups[0]['lr'] = 0.01, the run began with 0.1; the checkpoint's is used"
    assert line in capsys.readouterr().out
    assert any(json.loads(text)["event"] == "warning" for text in Path("run", "events.jsonl").read_text().splitlines())


def test_sparse_gradients_with_sparse_adam_are_plain_pytorch_s() -> None:
    def steps(table: nn.Embedding, optimizer: Any) -> None:
        for rows in (torch.tensor([1, 2]), torch.tensor([1, 5])):
            optimizer.zero_grad()
            table(rows).pow(2).mean().backward()
            optimizer.step()

    def table() -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(10, 2, sparse=True)

    def program(e: Communicator) -> torch.Tensor:
        own = table()
        optimizer = torch.optim.SparseAdam(own.parameters(), lr=0.1)
        mpips.connect(own, optimizer, communicator=e, run_dir="run")
        steps(own, optimizer)
        return own.weight.detach().clone()

    plain = table()
    steps(plain, torch.optim.SparseAdam(plain.parameters(), lr=0.1))
    for world in (World(1), World(2), World(2, shares=True)):
        assert torch.equal(world.run(program)[0], plain.weight)
    with pytest.raises(SystemExit, match="2"):
        World(3).run(program)


@SHARED
def test_gradients_of_several_workers_stay_after_a_step(shares: bool) -> None:
    """Each worker's are its own, as after a step of DDP's ranks before they were reduced."""

    def program(e: Communicator) -> list[Any]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        seen = []
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(33)), batch_size=11)
        for x, y in ps.shard(loader):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            seen.append((before, [p.grad.clone() for p in model.parameters()]))
        return seen

    for worker in World(4, shares=shares).run(program):
        assert len(worker) == 1
        for before, after in worker:
            torch.testing.assert_close(after, before, rtol=3e-7, atol=0)


def rewind(model: nn.Module, optimizer: Any) -> str:
    """Three steps are taken twice, from the state that the optimizer had before."""
    for _ in range(3):
        one_step(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        one_step(model, optimizer)
    optimizer.load_state_dict(state)
    for _ in range(3):
        one_step(model, optimizer)
    return sha(model) + str(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["sync", "local_sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_state_that_the_script_loads_is_the_one_that_steps(kind: Any, dtype: torch.dtype, mode: str) -> None:
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model, plain = mlp(), mlp()
    optimizer = kind(model.parameters(), lr=0.01, **more)
    mpips.connect(model, optimizer, communicator=alone(), run_dir="run", mode=mode, local={"steps": 100})
    assert rewind(model, optimizer) == rewind(plain, kind(plain.parameters(), lr=0.01, **more))


@SHARED
def test_a_state_that_a_server_elsewhere_would_not_have_is_refused(shares: bool) -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        state = optimizer.state_dict()
        mpips.connect(model, optimizer, communicator=e, run_dir="run")
        optimizer.load_state_dict(state)

    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) after connect: the state lies with the server"):
        World(3, shares=shares).run(program)


def test_hooks_run_at_ps_step_too() -> None:
    model, optimizer, ps = connected()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    loss = model(data(16)[0]).square().mean()
    loss.backward()
    ps.step(loss)
    assert (seen, ps.round, ps.loss) == (["pre", "post"], 1, loss.item())


@SHARED
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"mode": "async"}, {"mode": "async", "overlap": True}], ids=str)
@pytest.mark.parametrize("when", ["at once", "after steps"])
def test_weights_written_through_data_are_noticed(when: str, settings: dict[str, Any], size: int, shares: bool) -> None:
    """Of which autograd is not told: first weights drawn after `connect`, as DCGAN's, and WGAN's clipping."""

    def program(e: Communicator) -> None:
        model, optimizer, _ = _connected_to(e, **settings)
        for number in range(3):
            if when == "at once" or number:
                for p in model.parameters():
                    p.data.clamp_(-0.01, 0.01)
            one_step(model, optimizer)

    with pytest.raises(RuntimeError, match=r"has changed 0\.weight in place, outside optimizer\.step\(\), after connect"):
        World(size, shares=shares).run(program)


def _connected_to(e: Communicator, **settings: Any) -> tuple[nn.Module, Any, mpips.Run]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, mpips.connect(model, optimizer, communicator=e, run_dir="run", **settings)


@SHARED
@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("through", ["data", "no_grad"])
def test_an_average_s_weights_may_be_swapped_in_while_the_model_is_measured(through: str, restored: bool, shares: bool) -> None:
    def program(e: Communicator) -> tuple[float, str]:
        model, optimizer, ps = _connected_to(e)
        one_step(model, optimizer)

        def measure() -> float:
            own = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.data.fill_(0.5) if through == "data" else p.fill_(0.5)
            found = float(model(torch.ones(1, 12)).sum())
            if restored:
                for p, was in zip(model.parameters(), own, strict=True):
                    p.data.copy_(was) if through == "data" else p.copy_(was)
            return found

        found = ps.validate(measure)
        one_step(model, optimizer)
        return found, sha(model)

    if not restored:
        with pytest.raises(RuntimeError, match=r"has changed 0\.weight.*put back at the end of what ps\.validate"):
            World(3, shares=shares).run(program)
        return
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        one_step(model, optimizer)
    for p in (other := mlp()).parameters():
        nn.init.constant_(p, 0.5)
    value = other(torch.ones(1, 12)).sum().item()
    for found, weights in World(2, shares=shares).run(program):
        assert (found, weights) == (value, sha(model))


@pytest.mark.parametrize("plan", ["root", "sharded"])
def test_adagrad_keeps_the_state_of_frozen_parameters(plan: str) -> None:
    """Adagrad makes its state with the optimizer, for all parameters."""

    def program(e: Any) -> dict[str, Any]:
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        net[0].weight.requires_grad_(False)
        optimizer = torch.optim.Adagrad(net.parameters(), 0.1)
        ps = mpips.connect(net, optimizer, communicator=e, run_dir="run", plan=plan)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        tree = optimizer.state_dict()
        ps.close()
        return tree

    for tree in World(3, shares=True).run(program):
        assert {number: float(state["step"]) for number, state in tree["state"].items()} == {0: 0.0, 1: 2.0, 2: 2.0, 3: 2.0}


AGAIN = """
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import mpips

x = torch.randn(48, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(batch, connects):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        ps = mpips.connect(model, optimizer) if connects else None
        loader = DataLoader(TensorDataset(x), batch)
        for _ in ps.epochs(2) if ps else range(2):
            for (rows,) in ps.shard(loader) if ps else loader:
                optimizer.zero_grad()
                model(rows).square().mean().backward()
                optimizer.step()
        if ps:
            ps.close()
    for (rows,) in loader:  # plain steps, on a plain optimizer
        optimizer.zero_grad()
        model(rows[:3]).square().mean().backward()
        optimizer.step()
        break
    return [*model.parameters(), *(v for state in optimizer.state_dict()["state"].values() for v in state.values())], ps


plain, _ = train(12, False)
shared, ps = train(6, True)
assert len(plain) == len(shared) == 4 + 4 * 3
far = max(float((a - b).abs().max()) for a, b in zip(plain, shared))
print(f"worker {ps.worker} is", "near" if far < 1e-12 else f"{far} off", flush=True)
"""


def test_after_close_the_optimizer_has_its_state_and_the_next_run_begins_with_it(mpirun: Any, tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    done = mpirun(3, script)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if " is " in line) == ["worker 0 is near", "worker 1 is near"]


def test_an_optimizer_whose_state_stays_with_an_asynchronous_server_is_refused_afterwards() -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", mode="async")
        for x, y in ps.batches(data(32), 8):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        ps.close()
        assert isinstance(optimizer, torch.optim.Adam)
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(
                RuntimeError, match=r"after ps\.close\(\): given one of a run in mode async, .*; expected a new"
            ):
                call()

    World(2).run(program)
