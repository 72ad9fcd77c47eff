"""What all workers call for together: validate, save, epochs, average; and calls that only some make."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips import checkpoint
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model.message import CallError
from mpips.server import agreement
from tests.helpers.deadlines import patient
from tests.helpers.programs import data, metrics, mlp

PLACES = pytest.mark.parametrize("shares", [False, True], ids=["messages", "shared memory"])


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def steps(ps: mpips.Run, model: nn.Module, batches: Any) -> None:
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        ps.step(loss)


def one_rank_alone(e: Communicator, call: Any, where: str) -> None:
    """Worker 0 alone calls: in the middle of a loop, or between two."""
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
    for _ in range(2):
        for number, (x, y) in enumerate(ps.batches(data(48), 8, shuffle=False)):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
            if where == "inside" and ps.worker == 0 and number == 1:
                call(ps)
        if where == "between" and ps.worker == 0:
            call(ps)


@PLACES
@pytest.mark.parametrize("where", ["inside", "between"])
@pytest.mark.parametrize(
    ("call", "name"), [(lambda ps: ps.validate(lambda: 1.0), r"ps\.validate\(\)"), (lambda ps: ps.save(), r"ps\.save\(\)")]
)
def test_a_call_of_one_worker_is_named_with_who_is_where(call: Any, name: str, where: str, shares: bool) -> None:
    line = rf"the workers do not make the same calls: .*worker 0 \(rank 1\) at {name}; worker 1 \(rank 2\) at"
    with pytest.raises(RuntimeError, match=line):
        World(3, shares=shares).run(lambda e: one_rank_alone(e, call, where))


def looping(e: Communicator, evaluates: str, loops: int = 2) -> bool:
    """Loop over a shard, in which worker 0 alone evaluates as well: its first batch before, or all after each loop or the last.

    Returns:
        Whether worker 0 has come to its end.
    """
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
    loader = ps.shard(DataLoader(TensorDataset(*data(48)), 8))
    if evaluates == "first" and ps.worker == 0:
        next(iter(loader))
    for number in range(loops if ps.worker == 0 else 2):
        steps(ps, model, loader)
        if ps.worker == 0 and (evaluates == "each" or (evaluates == "last" and number == 1)):
            list(loader)
    return ps.worker == 0


@pytest.mark.parametrize("evaluates", ["first", "each"])
def test_a_loop_over_its_shard_of_one_worker_is_said_and_then_refused(
    evaluates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others train in that loop without it, and it would train in one more without them."""
    line = r"worker 0 \(rank 1\) at the beginning of a loop over its shard; worker 1 \(rank 2\) at the end of its script"
    with pytest.raises(CallError, match=line):
        World(3).run(lambda e: looping(e, evaluates))
    assert capsys.readouterr().out.count("worker 0 (rank 1) has looped over its shard without a step") == 1


USES: dict[str, tuple[Callable[[Any, Any, Any, Any], object], bool]] = {
    "measures": (lambda ps, model, loader, optimizer: [model(x) for x, _ in ps.shard(loader)], True),
    "measures all": (lambda ps, model, loader, optimizer: [model(x) for x, _ in loader], False),
    "measures its own": (lambda ps, model, loader, optimizer: [model(x) for x, _ in ps.batches(loader, shard=False)], False),
    "looks at one": (lambda ps, model, loader, optimizer: next(iter(ps.shard(loader))), False),
    "collects gradients": (
        lambda ps, model, loader, optimizer: (
            [F.cross_entropy(model(x), y).backward() for x, y in ps.shard(loader)],
            optimizer.step(),
        ),
        False,
    ),
    "steps": (lambda ps, model, loader, optimizer: steps(ps, model, ps.shard(loader)), False),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_a_loop_over_a_shard_that_measures_its_part_is_said(use: str, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Worker 0 prints what it has measured: a half of the test data was taken for all of them."""

    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        for _ in range(2):
            USES[use][0](ps, model, DataLoader(TensorDataset(*data(48)), 8), optimizer)

    World(workers + 1).run(program)
    said = capsys.readouterr().out.count(
        "mpips: a loop over a shard has ended without a step: each worker has seen its own part"
    )
    assert said == (USES[use][1] and workers > 1)


def test_a_loop_over_a_shard_that_another_worker_does_not_make_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert World(3).run(lambda e: looping(e, "never", loops=3)) == [True, False]
    assert (
        capsys.readouterr().out.count("worker 1 (rank 2) has come to the end of its script, and the others go on without") == 1
    )


def test_a_last_look_at_its_shard_is_one_worker_s_own_affair() -> None:
    assert World(3).run(lambda e: looping(e, "last")) == [True, False]


INSIDE: dict[str, Callable[[mpips.Run, Any, Any], Any]] = {
    "a loop over a shard": lambda ps, loader, _: list(loader),
    "ps.save()": lambda ps, *_: ps.save(),
    "ps.validate()": lambda ps, *_: ps.validate(lambda: 1.0),
    "optimizer.state_dict()": lambda ps, _, optimizer: optimizer.state_dict(),
    "a step": lambda ps, _, optimizer: optimizer.step(),
}


@PLACES
@pytest.mark.parametrize(
    ("what", "mode"),
    [(what, mode) for what in INSIDE for mode in ("sync", "diloco", "async") if mode == "sync" or "state_dict" not in what],
)
def test_what_all_ranks_do_together_is_refused_inside_what_validate_measures(what: str, mode: str, shares: bool) -> None:
    """Worker 0 measures alone, and the others wait for the number."""

    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", mode=mode)
        loader = ps.shard(DataLoader(TensorDataset(*data(48)), 8))
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        ps.validate(lambda: (INSIDE[what](ps, loader, optimizer), 1.0)[1])

    with pytest.raises(RuntimeError, match=rf"{re.escape(what)} inside what ps\.validate\(\) measures, on worker 0 alone"):
        World(3, shares=shares).run(program)


class Whole:
    """A script's object whose state has the optimizer's, or as many numbers as there are batches in a shard."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.of.state_dict() if isinstance(self.of, torch.optim.Optimizer) else len(list(self.of))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("what", ["optimizer.state_dict()", "a loop over a shard"])
def test_what_all_ranks_do_together_is_refused_in_the_state_of_what_is_kept(what: str) -> None:
    """Worker 0 alone gives that state, when a checkpoint is due."""

    def program(e: Communicator) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        loader = ps.shard(DataLoader(TensorDataset(*data(48)), 8))
        ps.keep(trainer=Whole(loader if "loop" in what else optimizer))

    with pytest.raises(RuntimeError, match=rf"{re.escape(what)} inside the state_dict\(\) of what ps\.keep\(\) is given"):
        World(3).run(program)
    World(1).run(program)


def test_clipping_on_one_worker_alone_is_named() -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for x, y in ps.batches(data(48), 8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if ps.worker == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            ps.step(loss)

    with pytest.raises(RuntimeError, match=r"worker 0 \(rank 1\) at ps\.average\(\) or the clipping of gradients; worker 1"):
        World(3).run(program)


@pytest.mark.parametrize("call", ["validate", "save"])
def test_one_rank_alone_is_named_within_seconds_under_mpi(call: str, mpirun: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch, mpips
model = torch.nn.Linear(3, 1)
ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in ps.epochs(3):
    for (x,) in ps.batches((torch.ones(12, 3),), batch_size=2):
        loss = model(x).mean(); loss.backward(); ps.step(loss)
    if ps.worker == 0:
        ps.validate(lambda: 1.0) if {call == "validate"} else ps.save()
""")
    begun = time.monotonic()
    done = mpirun(3, script, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count(f"worker 0 (rank 1) at ps.{call}()") == 1, done.stderr
    assert time.monotonic() - begun < patient(40)  # of which starting takes most, on a busy machine


def test_validate_measures_on_worker_0_in_eval_mode_and_tells_all() -> None:
    measured: list[int] = []

    def program(e: Communicator) -> Any:
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")

        def measure() -> float:
            assert not model.training
            assert not torch.is_grad_enabled()
            measured.append(e.rank)
            return 40.0 + e.rank

        return ps.validate(measure), model.training

    assert World(4).run(program) == [(41.0, True)] * 3
    assert measured == [1]


@pytest.mark.parametrize("mode", ["local_sgd", "diloco", "easgd", "fedbuff", "async"])
def test_validate_sees_the_servers_weights_in_every_mode(mode: str) -> None:
    def program(e: Communicator) -> tuple[float, float]:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run", mode=mode, local={"steps": 3} if mode != "async" else {})
        for _ in ps.epochs(1):
            steps(ps, model, ps.batches(data(80), 8, shuffle=False))
            value = ps.validate(lambda: model[0].weight.double().sum())
        return value, ps.round

    (value, _), *_ = World(3).run(program)
    newest = checkpoint.newest(Path("run", "checkpoints"))
    assert newest is not None
    assert value == float(checkpoint.load(newest)["parameters"]["0.weight"].double().sum())


def test_several_numbers_are_judged_apart() -> None:
    def program(e: Communicator) -> tuple[int, str, Any]:
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run", early_stopping={"patience": 2})
        for epoch in ps.epochs(6):
            ps.validate(lambda epoch=epoch: 0.1 * epoch, "accuracy")
            ps.validate(lambda epoch=epoch: 2.0 - 0.1 * epoch, "loss")
            told = ps.validate(lambda: {"f1": 0.5, "auc": np.float32(0.25)}, "both")
        return epoch, ps.stopping, told

    assert World(3).run(program) == [(5, "", {"f1": 0.5, "auc": 0.25})] * 2


def test_which_number_stops_is_a_setting() -> None:
    def program(e: Communicator) -> tuple[int, str]:
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run", early_stopping={"patience": 2, "monitor": "loss"})
        for epoch in ps.epochs(6):
            ps.validate(lambda epoch=epoch: 0.1 * epoch, "accuracy")
            ps.validate(lambda epoch=epoch: 2.0 - 0.1 * epoch, "loss")
        return epoch, ps.stopping

    assert World(3).run(program) == [(2, "patience")] * 2


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (None, "None"),
        ((0.5, 0.9), r"\(0\.5, 0\.9\)"),
        ("0.5", "'0.5'"),
        (1j, "1j"),
        (torch.ones(2), r"a Tensor of shape \(2,\)"),
    ],
)
def test_anything_but_numbers_is_refused_by_name(value: Any, given: str) -> None:
    ps = mpips.connect(mlp(), sgd, communicator=World(1).ends[0], run_dir="run")
    with pytest.raises(TypeError, match=rf"validate\(\): the function returned {given} for 'accuracy'; expected a number"):
        ps.validate(lambda: value, "accuracy")


@pytest.mark.parametrize("value", [0.5, True, np.float32(0.5), np.array([0.5]), torch.tensor([[0.5]])])
def test_every_kind_of_number_is_one(value: Any) -> None:
    ps = mpips.connect(mlp(), sgd, communicator=World(1).ends[0], run_dir="run")
    assert ps.validate(lambda: value) == float(np.asarray(value).item())


@pytest.mark.parametrize("size", [1, 3])
def test_the_server_validates_where_it_was_given_the_means(size: int) -> None:
    where: list[int] = []

    def program(e: Communicator) -> Any:
        model = mlp()

        def measure(held: Any) -> float:
            where.append(e.rank)
            return float(model(held)[0, 0])

        ps = mpips.connect(
            model,
            sgd,
            communicator=e,
            run_dir="run",
            validate=measure,
            validation_data=lambda: data(8)[0],
            early_stopping={"target": -100.0},
        )
        for _ in ps.epochs(3):
            steps(ps, model, ps.batches(data(48), 8, shuffle=False))
        return ps.stopping, float(model(data(8)[0])[0, 0].detach())

    for stopping, value in World(size).run(program):
        assert stopping == "target", "the first value reached it"
        assert json.loads(Path("run", "DONE").read_text())["validation"] == [value]
    assert where == [0]


def test_a_stop_is_obeyed_while_another_worker_waits_at_its_end() -> None:
    """Worker 0 has two batches fewer; worker 1 stops in its last one."""

    def program(e: Communicator) -> tuple[float, str]:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for _ in ps.epochs(2):
            own = tuple(t[: 16 + 16 * ps.worker] for t in data(48))
            for x, y in ps.batches(own, 8, shard=False):
                if ps.worker == 1 and ps.round == 3:
                    ps.stop()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: 0.5)
        return ps.round, ps.stopping

    assert World(3).run(program) == [(4, "requested")] * 2


class Average:
    """An average of weights, as a script may keep."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.steps = 0

    def update(self, model: nn.Module) -> None:
        self.steps += 1
        for name, p in model.named_parameters():
            self.own[name].lerp_(p.detach(), 0.25)

    def state_dict(self) -> dict[str, Any]:
        return {"own": self.own, "steps": self.steps, "nested": [(1, "a"), {2: None}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["nested"] == [(1, "a"), {2: None}]
        self.own, self.steps = state["own"], state["steps"]


@pytest.mark.parametrize("size", [1, 3])
def test_what_the_script_keeps_is_in_the_file_and_given_back(size: int) -> None:
    def program(e: Communicator, folder: str, epochs: int, resume: str = "no") -> Average:
        model = mlp()
        optimizer = sgd(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=folder, resume=resume)
        average = Average(model)
        ps.keep(average=average)
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(48), 8, shuffle=False):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                average.update(model)
        return average

    (whole, *_) = World(size).run(lambda e: program(e, "whole", 4))
    World(size).run(lambda e: program(e, "cut", 2))
    newest = checkpoint.newest(Path("cut", "checkpoints"))
    assert newest is not None
    assert checkpoint.load(newest)["kept"]["average"]["tensors"].keys() == {
        f"own.{name}" for name, _ in mlp().named_parameters()
    }
    for resumed in World(size).run(lambda e: program(e, "cut", 4, "auto")):
        assert resumed.steps == whole.steps
        assert all(torch.equal(resumed.own[name], whole.own[name]) for name in whole.own)


def test_what_a_checkpoint_does_not_have_of_what_is_kept_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """It went on from its beginning without a word."""

    def program(e: Communicator, epochs: int, **kept: Average) -> None:
        model = mlp()
        optimizer = sgd(model.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run", resume="auto")
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for _ in kept]
        ps.keep(**kept)
        ps.keep(**kept)  # once more is no other
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(48), 8):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step()

    words = "mpips: resume: the checkpoint has no {!r}: it goes on from what the script has made it\n"
    World(3).run(lambda e: program(e, 1))
    assert "has no" not in capsys.readouterr().out
    World(3).run(lambda e: program(e, 2, average=Average(mlp())))
    out = capsys.readouterr().out
    assert [out.count(words.format(name)) for name in ("average", "ExponentialLR")] == [1, 1]
    assert out.count("has no") == 2
    World(3).run(lambda e: program(e, 3, average=Average(mlp())))
    assert "has no" not in capsys.readouterr().out


def test_what_cannot_be_kept_is_refused_where_it_is_said() -> None:
    ps = mpips.connect(mlp(), sgd, communicator=World(1).ends[0], run_dir="run")
    with pytest.raises(TypeError, match=r"ps\.keep\(thing=\.\.\.\): given a int, expected an object with state_dict"):
        ps.keep(thing=3)

    class Odd:
        def state_dict(self) -> Any:
            return {"inner": {"handle": object()}}

        def load_state_dict(self, state: Any) -> None:
            """Never."""

    with pytest.raises(TypeError, match=r"the state of odd holds a object at inner\.handle"):
        ps.keep(odd=Odd())


def test_two_schedulers_of_a_class_are_kept_by_names_or_refused() -> None:
    model = mlp()
    optimizer = sgd(model.parameters())
    both = [torch.optim.lr_scheduler.StepLR(optimizer, n, 0.5) for n in (2, 3)]
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run")
    model(torch.ones(2, 12)).sum().backward()
    for call in (optimizer.step, ps.save):  # not only at the first checkpoint
        with pytest.raises(TypeError, match="two StepLR of one optimizer"):
            call()
    ps.keep(first=both[0], second=both[1])
    optimizer.step()
    ps.save()


@pytest.mark.parametrize("size", [1, 3])
def test_a_teacher_that_the_script_moves_is_saved_and_resumed(size: int) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.student, self.teacher = nn.Linear(12, 5), nn.Linear(12, 5).requires_grad_(False)

    def program(e: Communicator, folder: str, epochs: int, resume: str = "no") -> dict[str, torch.Tensor]:
        model = Pair()
        optimizer = sgd(model.student.parameters())
        ps = mpips.connect(model, optimizer, communicator=e, run_dir=folder, resume=resume)
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(48), 8, shuffle=False):
                optimizer.zero_grad()
                (F.cross_entropy(model.student(x), y) + (model.student(x) - model.teacher(x)).square().mean()).backward()
                optimizer.step()
                with torch.no_grad():
                    for t, s in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                        t.lerp_(s, 0.25)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    (whole, *_) = World(size).run(lambda e: program(e, "whole", 4))
    (cut, *_) = World(size).run(lambda e: program(e, "cut", 2))
    newest = checkpoint.newest(Path("cut", "checkpoints"))
    assert newest is not None
    assert torch.equal(checkpoint.load(newest)["parameters"]["teacher.weight"], cut["teacher.weight"])
    (resumed, *_) = World(size).run(lambda e: program(e, "cut", 4, "auto"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_rounds_in_which_all_only_wait_are_not_counted() -> None:
    def program(e: Communicator) -> int:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for _ in ps.epochs(2):
            steps(ps, model, ps.batches(data(44), 8, shuffle=False))
            ps.validate(lambda: 0.5)
            ps.save()
        return ps.round

    assert World(3).run(program) == [6, 6]
    assert [row["samples"] for row in metrics(Path("run"))] == [16, 16, 12] * 2


def test_several_runs_one_after_another_in_one_script(mpirun: Any, tmp_path: Path) -> None:
    """The server has left the script: it serves the later models by their names and tensors."""
    script = tmp_path / "folds.py"
    script.write_text("""
import atexit, os, sys, torch, mpips
torch.set_num_threads(1)
x = torch.randn(48, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
y = x.sum(1, keepdim=True)
for fold in range(3):
    torch.manual_seed(fold)
    layers = torch.nn.Linear(3, 4 + fold), torch.nn.BatchNorm1d(4 + fold), torch.nn.Linear(4 + fold, 1)
    model = torch.nn.Sequential(*layers).double()
    model[1].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05 / (1 + fold))
    ps = mpips.connect(model, optimizer)
    for _ in ps.epochs(2):
        for a, b in ps.batches((x, y), 24 // ps.workers, shuffle=False):
            optimizer.zero_grad(); ((model(a) - b) ** 2).mean().backward(); optimizer.step()
    ps.print(f"fold {fold} {float(((model(x) - y) ** 2).mean()):.12f} {ps.folder.name.partition('folds')[2]}")
""")
    alone, three = mpirun(1, script, timeout=60), mpirun(3, script, timeout=90)
    folds = [[line for line in done.stdout.splitlines() if line.startswith("fold")] for done in (alone, three)]
    assert (alone.returncode, three.returncode) == (0, 0), alone.stderr + three.stderr
    assert [line.split()[-1] for line in folds[1][1:]] == [".run2", ".run3"]
    assert [line.split()[:3] for line in folds[0]] == [line.split()[:3] for line in folds[1]]
    assert len(folds[0]) == 3


def test_a_dedicated_server_executes_no_line_after_connect_but_atexit(mpirun: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import atexit, os, torch, mpips
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
def note(what): open(f"{what}-{rank}", "w").close()
atexit.register(note, "atexit")
model = torch.nn.Linear(3, 1)
try:
    mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run")
    note("after")
except BaseException:
    note("except")
    raise
finally:
    note("finally")
""")
    done = mpirun(3, script, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {path.name for path in tmp_path.iterdir() if "-" in path.name}
    ranks = {"after": "12", "finally": "12", "atexit": "012"}
    assert found == {f"{what}-{rank}" for what, own in ranks.items() for rank in own}


def test_who_waits_for_whom_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a worker takes more steps than others that is no fault, but nobody has to guess."""
    monkeypatch.setattr(agreement, "WAITING", -1.0)

    def program(e: Communicator) -> int:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        for _ in range(2 + 4 * ps.worker):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        ps.save()
        return ps.round

    assert World(3).run(program) == [6, 6]
    said = "worker 0 (rank 1) at ps.save(); worker 1 (rank 2) at a step; who waits goes on when all workers make that call"
    assert capsys.readouterr().out.count(said) == 1
    events = [json.loads(line) for line in Path("run", "events.jsonl").read_text().splitlines()]
    assert [event["message"] for event in events if event["event"] == "warning"] == [said]


def test_ranks_that_nobody_has_seeded_alike_are_told(mpirun: Any, tmp_path: Path) -> None:
    """What each has drawn before `connect` is then its own: targets, a split."""
    script = tmp_path / "script.py"
    body = "import torch, mpips\n{}\nm = torch.nn.Linear(2, 1)\nmpips.connect(m, torch.optim.SGD(m.parameters(), lr=0.1))\n"
    for seeding, times in (("", 1), ("torch.manual_seed(3)", 0)):
        script.write_text(body.format(seeding))
        done = mpirun(3, script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("torch is not seeded alike on all ranks") == times
