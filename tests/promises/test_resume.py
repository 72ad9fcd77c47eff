"""Kill the job anywhere, start it again with --resume auto: the bits are those of the run that nobody killed."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mpips
from mpips import checkpoint
from mpips.comm.simulated import Killed, World
from mpips.optim import snapshot
from tests.conftest import ROOT
from tests.helpers.programs import OPTIMIZERS, data, dropout_mlp, metrics, sha, train

SCRIPT = ROOT / "tests" / "helpers" / "resumable.py"


def weights(out: str) -> str:
    found = re.findall(r"weights\s+(\w{64})", out)  # a line of the launcher may come between
    assert len(found) == 1, out
    return found[0]


def last(folder: Path) -> dict[str, Any]:
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=where)
    elif hasattr(a, "shape"):
        assert (a == b).all(), where
    else:
        assert a == b or a != a, where


def assert_same_runs(a: Path, b: Path) -> None:
    """The last checkpoints and the metrics of two runs, but for what names the run itself."""
    one, other = last(a), last(b)
    for tree in (one, other):
        del tree["config"], tree["run"]
        for rank in tree["ranks"].values():  # the scripts seed torch alone
            for part in ("streams", "orders"):
                rank[part] = {name: state for name, state in rank[part].items() if name.split()[-1] not in ("python", "numpy")}
    assert_same(one, other)
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_one_process_killed_and_resumed(optimizer: str, solo: Any, tmp_path: Path) -> None:
    flags = ["--optimizer", optimizer, "--model", "dropout"]
    whole = solo(SCRIPT, *flags, "--run_dir", "whole")
    at = random.Random(optimizer).randint(5, 60)
    killed = solo(SCRIPT, *flags, "--run_dir", "killed", "--die-at", at)
    assert killed.returncode == -9, killed.stderr
    resumed = solo(SCRIPT, *flags, "--run_dir", "killed", "--resume", "auto")
    assert weights(resumed.stdout) == weights(whole.stdout)
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("workers", "optimizer", "flags"), [
    (1, "adam", []),
    (3, "adamw", ["--deterministic"]),
    (2, "adam", ["--server_trains", "--deterministic"]),
    (2, "sgd", ["--buffers", "local", "--deterministic"]),
])  # fmt: skip
def test_a_job_killed_twice_and_resumed(workers: int, optimizer: str, flags: list[str], mpirun: Any, tmp_path: Path) -> None:
    ranks = workers + ("--server_trains" not in flags)
    given = ["--optimizer", optimizer, *flags]
    whole = mpirun(ranks, SCRIPT, *given, "--run_dir", "whole")
    rounds = len(metrics(tmp_path / "whole"))
    chance = random.Random(f"{workers} {optimizer}")
    first, second = sorted(chance.sample(range(4, rounds - 1), 2))
    for at in (first, second):
        victim = chance.randrange(0 if "--server_trains" in flags else 1, ranks)
        killed = mpirun(ranks, SCRIPT, *given, "--run_dir", "killed", "--resume", "auto", "--die-at", at, "--die-rank", victim)
        assert killed.returncode != 0
        assert not (tmp_path / "killed" / "DONE").exists()
    resumed = mpirun(ranks, SCRIPT, *given, "--run_dir", "killed", "--resume", "auto")
    assert weights(resumed.stdout) == weights(whole.stdout), resumed.stdout + resumed.stderr
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_preempted_then_resumed(mpirun: Any, tmp_path: Path) -> None:
    given = ["--deterministic"]
    whole = mpirun(3, SCRIPT, *given, "--run_dir", "whole")
    early = mpirun(3, SCRIPT, *given, "--run_dir", "early", "--preempt-at", 13, "--die-rank", 2)
    assert early.returncode == 75, early.stdout + early.stderr
    assert "preempted" in early.stdout
    assert last(tmp_path / "early")["round"] == 14
    resumed = mpirun(3, SCRIPT, *given, "--run_dir", "early", "--resume", "auto")
    assert weights(resumed.stdout) == weights(whole.stdout)
    assert_same_runs(tmp_path / "whole", tmp_path / "early")


def test_preempted_where_requests_are_answered_then_resumed(mpirun: Any, tmp_path: Path) -> None:
    """Which worker takes which batch is chance, but each item is taken once in each of the three epochs."""
    flags = ["--mode", "async", "--overlap"]
    early = mpirun(3, SCRIPT, *flags, "--run_dir", "run", "--preempt-at", 13, "--die-rank", 2)
    assert early.returncode == 75, early.stdout + early.stderr
    assert "preempted" in early.stdout
    assert not (tmp_path / "run" / "DONE").exists()
    saved = last(tmp_path / "run")["round"]
    assert 13 <= saved == len(metrics(tmp_path / "run")) < 63
    resumed = mpirun(3, SCRIPT, *flags, "--run_dir", "run", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert weights(resumed.stdout)
    assert (tmp_path / "run" / "DONE").exists()
    taken = metrics(tmp_path / "run")
    assert [row["round"] for row in taken] == list(range(1, 64)), "21 batches an epoch"
    for epoch in range(3):
        assert sum(row["samples"] for row in taken if row["epoch"] == epoch) == 330


def simulated(world: World, folder: str, **settings: Any) -> list[str]:

    def program(communicator: Any) -> str:
        net = dropout_mlp()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        train(communicator, net, optimizer, data(107), epochs=3, shuffle=True, run_dir=folder, **settings)
        return sha(net)

    return world.run(program)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_killed_at_any_call_and_resumed(size: int, record_property: Any) -> None:
    """The death of each rank in turn, all along the run, in the simulated world."""
    settings = {"checkpoint": {"every": 3}}
    whole = World(size, seed=3)
    expected = simulated(whole, "whole", **settings)
    for call in range(6, whole.calls[0], 7):
        world = World(size, seed=call)
        world.kill(call % size, call)
        with pytest.raises(Killed):
            simulated(world, f"killed-{call}", **settings)
        again = simulated(World(size, seed=-call), f"killed-{call}", resume="auto", **settings)
        assert again == expected, f"killed at call {call}"
    record_property("faults", len(range(6, whole.calls[0], 7)))


@pytest.mark.parametrize(("before", "after"), [(3, 5), (5, 2), (4, 1), (1, 3)])
def test_another_number_of_workers_takes_each_sample_once(before: int, after: int) -> None:
    """The documented rule: what nobody had taken is dealt out anew."""
    seen: list[int] = []

    def program(communicator: Any, rounds: int, **settings: Any) -> None:

        net = torch.nn.Linear(1, 1)
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=0.0), communicator=communicator, run_dir="run", **settings)
        numbers = torch.arange(103.0).view(-1, 1)
        for _ in ps.epochs(1):
            for (x,) in ps.batches((numbers,), 4):
                loss, number = net(x).sum(), ps.round
                loss.backward()
                ps.step(loss)
                if ps.round > number:  # not in a loop that is done, whose body is executed once for its names
                    seen.extend(x.view(-1).int().tolist())
                if ps.round == rounds:
                    ps.preempt()

    with pytest.raises(SystemExit, match="75"):
        World(before, seed=1).run(lambda e: program(e, 3))
    assert 0 < len(seen) < 103
    with pytest.raises(SystemExit, match="75"):  # a second change in the same epoch
        World(before + 1, seed=1).run(lambda e: program(e, 5, resume="auto"))
    World(after, seed=2).run(lambda e: program(e, -1, resume="auto"))
    assert sorted(seen) == list(range(103))


def test_a_checkpoint_of_another_model_is_refused(solo: Any, tmp_path: Path) -> None:
    assert solo(SCRIPT, "--model", "cnn", "--epochs", "1", "--run_dir", "run").returncode == 0
    other = solo(SCRIPT, "--model", "dropout", "--epochs", "1", "--run_dir", "run", "--resume", "auto")
    assert other.returncode == 1
    assert "parameter 0.weight: the checkpoint has nothing" in other.stderr
    assert len(metrics(tmp_path / "run")) == 21, "a refused resume costs nothing"


def test_a_damaged_newest_checkpoint_falls_back(solo: Any, tmp_path: Path) -> None:
    whole = solo(SCRIPT, "--run_dir", "whole")
    solo(SCRIPT, "--run_dir", "hurt", "--die-at", 30)
    newest = checkpoint.newest(tmp_path / "hurt" / "checkpoints")
    assert newest is not None
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    resumed = solo(SCRIPT, "--run_dir", "hurt", "--resume", "auto")
    assert newest.name in resumed.stderr
    assert weights(resumed.stdout) == weights(whole.stdout)


def test_resume_names_a_file_or_a_run_folder(solo: Any, tmp_path: Path) -> None:
    whole = solo(SCRIPT, "--run_dir", "whole", "--checkpoint.keep", "100")
    early = tmp_path / "whole" / "checkpoints" / "round_00000008.h5"
    from_file = solo(SCRIPT, "--run_dir", "from-file", "--resume", early)
    from_folder = solo(SCRIPT, "--run_dir", "from-folder", "--resume", tmp_path / "whole")
    assert weights(from_file.stdout) == weights(from_folder.stdout) == weights(whole.stdout)
    missing = solo(SCRIPT, "--resume", "nothing.h5")
    assert (missing.returncode, missing.stderr) == (
        2,
        "mpips: resume: given 'nothing.h5', allowed: no, auto, aside, or an existing checkpoint or run folder "
        "(flag --resume)\n",
    )


def test_a_checkpoint_that_is_not_this_run_s_is_refused_in_one_line(solo: Any, tmp_path: Path) -> None:
    """It was 30 lines of two tracebacks, the reason last."""
    solo(SCRIPT, "--run_dir", "whole", "--checkpoint.keep", "100")
    early = tmp_path / "whole" / "checkpoints" / "round_00000008.h5"
    other = solo(SCRIPT, "--run_dir", "other", "--resume", early, "--optimizer", "sgd")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert other.stderr.startswith(f"SnapshotError: {early}: the checkpoint has optimizer Adam, this run SGD")
    damaged = solo(SCRIPT, "--run_dir", "other", "--resume", SCRIPT)
    assert (damaged.returncode, damaged.stderr.count("\n")) == (1, 1)
    assert damaged.stderr.startswith(f"CheckpointError: {SCRIPT}: no SHA-256 for it")


def test_gradients_not_yet_pushed_survive_the_end_of_an_epoch() -> None:
    """5 batches an epoch, a step every 3: two batches of each epoch wait for the next."""

    def program(folder: str, stop_after: int, **settings: Any) -> float:

        net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(net.weight)
        ps = mpips.connect(
            net, lambda p: torch.optim.SGD(p, lr=1.0), communicator=World(1).ends[0], run_dir=folder, seed=1, **settings
        )
        number = 0
        for _ in ps.epochs(stop_after):
            for (x,) in ps.batches((torch.ones(5, 1),), 1):
                net(x).sum().backward()
                number += 1
                if number % 3 == 0:
                    ps.step(0.0)
        return net.weight.item()

    whole = program("whole", 3)
    program("cut", 1)
    saved = last(Path("cut"))
    assert whole == -15
    assert saved["ranks"]["0"]["place"]["samples"] == 2
    assert saved["ranks"]["0"]["gradients"]["weight"].item() == 2
    # 3 in the first step; the resumed script counts from 0 again, so its steps have 2 + 3, 3 and 3.
    assert program("cut", 3, resume="auto") == -14


def test_a_parameter_without_a_gradient_has_none_after_a_resume() -> None:
    """Else the next step would decay it, or give it momentum."""

    def program(**settings: Any) -> str:

        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
        optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.5)
        ps = mpips.connect(net, optimizer, communicator=World(1).ends[0], run_dir="run", **settings)
        for _ in ps.epochs(1):
            for used in ("b", "a"):
                optimizer.zero_grad()
                net[used](torch.ones(1, 1)).sum().backward()
                ps.save()
                optimizer.step()
        return sha(net)

    expected = program()
    for file in sorted(Path("run", "checkpoints").glob("*.h5"))[:-1]:
        assert program(resume=str(file)) == expected, file.stem


@pytest.mark.parametrize("after", [2, 4])
def test_data_of_ones_own_begins_its_loop_anew_on_another_number_of_workers(after: int) -> None:
    seen: list[int] = []

    def program(communicator: Any, rounds: int, **settings: Any) -> None:

        net = torch.nn.Linear(1, 1)
        ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=0.0), communicator=communicator, run_dir="run", **settings)
        for (x,) in ps.batches((torch.arange(6.0).view(-1, 1),), 1, shuffle=False, shard=False):
            seen.append(int(x))
            loss = net(x).sum()
            loss.backward()
            ps.step(loss)
            if ps.round == rounds:
                ps.preempt()

    with pytest.raises(SystemExit, match="75"):
        World(3).run(lambda e: program(e, 2))
    seen.clear()
    World(after).run(lambda e: program(e, -1, resume="auto"))
    assert sorted(seen) == sorted(list(range(6)) * (after - 1))


def drawing(folder: str, draws: str, epochs: int, **settings: Any) -> tuple[str, list[tuple[float, ...]]]:
    """A dropout model, and a script that draws numbers of its own at some place."""

    net = dropout_mlp()
    torch.manual_seed(9)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    ps = mpips.connect(net, optimizer, communicator=World(1).ends[0], run_dir=folder, **settings)

    def loop() -> None:
        for x, y in ps.batches(data(40), 8):
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            ps.step(loss)

    for _ in ps.epochs(epochs):
        if draws == "before":
            torch.rand(1)
        loop()
        ps.validate(lambda: float(torch.rand(1)) if draws == "validating" else 0.5)
        if draws == "saving":
            ps.save()
        if draws == "two loops":
            loop()
            torch.rand(1)
    assert ps._roles.server
    return sha(net), ps._roles.server.report.values


@pytest.mark.parametrize("draws", ["nothing", "before", "validating", "saving", "two loops"])
def test_resume_from_every_checkpoint_is_exact(draws: str, record_property: Any) -> None:
    """At the end of loops and epochs, in the middle, and between a validation and the end of its epoch."""
    import shutil

    every = {"every": 1, "keep": 1000}
    expected = drawing("whole", draws, 3, checkpoint=every)
    files = sorted(Path("whole", "checkpoints").glob("*.h5"))
    assert len(files) > 14
    for file in files:
        assert drawing(f"from-{file.stem}", draws, 3, resume=str(file), checkpoint=every) == expected, file.stem
        shutil.rmtree(f"from-{file.stem}")
    record_property("faults", len(files))


def averaging(communicator: Any, folder: str, preempt_at: int = -1, **settings: Any) -> list[Any]:
    """A script that does something of its own after each step: a scheduler, an average, random numbers."""

    net = dropout_mlp()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    average = torch.optim.swa_utils.AveragedModel(net)
    ps = mpips.connect(net, optimizer, communicator=communicator, run_dir=folder, **settings)
    ps.keep(average=average)
    for _ in ps.epochs(2):
        for x, y in ps.batches(data(16 * ps.workers * 3), 16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            if ps.round == preempt_at:
                ps.preempt()
            optimizer.step()
            scheduler.step()
            average.update_parameters(net)
            torch.rand(1)
    return [sha(net), sha(average), optimizer.param_groups[0]["lr"], scheduler.last_epoch, float(torch.rand(1))]


WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}), "one worker": (2, {}), "two workers": (3, {}), "rank 0 trains": (2, {"server_trains": True}),
    "local steps": (3, {"mode": "local_sgd", "local": {"steps": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_script_does_after_a_step_is_in_the_checkpoint_of_that_step(world: str) -> None:
    size, settings = WORLDS[world]
    settings = settings | {"checkpoint": {"every": 1, "keep": 100}}
    expected = World(size).run(lambda e: averaging(e, "whole", **settings))
    assert [last_epoch for _, _, _, last_epoch, _ in expected] == [6] * max(1, size - ("server_trains" not in settings))
    for file in sorted(Path("whole", "checkpoints").glob("*.h5"))[:-1]:
        again = World(size).run(lambda e, file=file: averaging(e, f"from-{file.stem}", resume=str(file), **settings))
        assert again == expected, file.stem
    for at in range(5):
        with pytest.raises(SystemExit, match="75"):
            World(size).run(lambda e, at=at: averaging(e, f"early-{at}", preempt_at=at, **settings))
        again = World(size).run(lambda e, at=at: averaging(e, f"early-{at}", resume="auto", **settings))
        assert again == expected, f"preempted in round {at}"


def between(communicator: Any, folder: str, preempt_at: int = -1, **settings: Any) -> list[Any]:
    """A script that does everything before, between and behind its loops, and preempts itself at one of its lines."""

    torch.manual_seed(3)
    body = [torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 1)]
    net = torch.nn.Sequential(*body).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    average = torch.optim.swa_utils.AveragedModel(net)
    ps = mpips.connect(net, optimizer, communicator=communicator, run_dir=folder, **settings)
    ps.keep(average=average)
    lines = 0

    def line() -> None:
        nonlocal lines
        lines += 1
        if lines == preempt_at:
            ps.preempt()

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (net(x) - 1).pow(2).mean()
        loss.backward()
        line()
        optimizer.step()
        return loss

    items = torch.randn(12 * ps.workers, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mine = items[:7]
    for _ in ps.epochs(2):
        torch.rand(1)
        step(torch.cat([mine, torch.rand(1, 4, dtype=torch.float64)]))
        for x in ps.batches(items, 4):
            loss = step(x)
            scheduler.step()
            if ps.round == 12:
                break
        scheduler.step()
        float(loss.detach())  # a name that the loop has set
        line()
        ps.validate(lambda: float(net(mine).sum() + torch.rand(1)), "first")
        average.update_parameters(net)
        net(torch.randn(8, 4, dtype=torch.float64))  # BatchNorm's statistics
        for _ in range(2):
            optimizer.zero_grad()
            (net(mine).sum() * float(torch.rand(1))).backward()
            line()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
        optimizer.zero_grad()
        net(mine).sum().backward()  # gradients that the next loop's first step has, too
        line()
        ps.save()
        torch.rand(1)
        for x in ps.batches(items, 4):
            loss = (net(x) - 2).pow(2).mean()
            loss.backward()
            line()
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(net)
        float(loss.detach())
        line()
        ps.validate(lambda: 0.5 + float(torch.rand(1)), "second")
        scheduler.step()
    table = [tuple(row.values()) for row in metrics(Path(folder))] if ps._roles.server else []
    return [sha(net), sha(average), optimizer.param_groups[0]["lr"], scheduler.last_epoch, float(torch.rand(1)), repr(table)]


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_script_does_between_its_loops_is_done_once(world: str, record_property: Any) -> None:
    """Steps, validations, schedulers, gradients, statistics: a resumed run does nothing twice, and has the names of loops."""
    size, settings = WORLDS[world]
    settings = settings | {"checkpoint": {"every": 1, "keep": 1000}}
    expected = World(size).run(lambda e: between(e, "whole", **settings))
    files = sorted(Path("whole", "checkpoints").glob("*.h5"))
    assert len(files) > 15
    record_property("faults", len(files[:-1]) + len(range(1, 24)))
    for file in files[:-1]:
        again = World(size).run(lambda e, file=file: between(e, f"from-{file.stem}", resume=str(file), **settings))
        assert again == expected, file.stem
    settings["checkpoint"] = {"every": 0}
    for at in range(1, 24):
        with pytest.raises(SystemExit, match="75"):
            World(size).run(lambda e, at=at: between(e, f"early-{at}", preempt_at=at, **settings))
        again = World(size).run(lambda e, at=at: between(e, f"early-{at}", resume="auto", **settings))
        assert again == expected, f"preempted at line {at}"


NODES: dict[str, Any] = {"shares": True, "nodes": (2, 2)}
OTHER_WAYS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "requests": (2, {}, {"mode": "async"}), "overlapping requests": (2, {}, {"mode": "async", "overlap": True}),
    "two local steps": (3, {}, {"mode": "local_sgd", "local": {"steps": 2}}),
    "overlap": (4, NODES, {"overlap": True, "plan": "sharded"}),
}  # fmt: skip


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_what_a_script_does_between_its_loops_is_done_once_in_other_ways(way: str, record_property: Any) -> None:
    record_property("faults", len(range(1, 24)))
    size, world, settings = OTHER_WAYS[way]
    expected = World(size, **world).run(lambda e: between(e, "whole", **settings))
    for at in range(1, 24):
        with pytest.raises(SystemExit, match="75"):
            World(size, **world).run(lambda e, at=at: between(e, f"early-{at}", at, checkpoint={"every": 1}, **settings))
        again = World(size, **world).run(lambda e, at=at: between(e, f"early-{at}", resume="auto", **settings))
        assert again == expected, f"preempted at line {at}"


@pytest.mark.parametrize("changed", ["nothing", "batch size", "length", "contents", "own contents"])
def test_other_data_than_the_checkpoints_are_said(changed: str, capsys: pytest.CaptureFixture[str]) -> None:
    def program(e: Any, resume: str, batch: int, items: torch.Tensor) -> None:
        net = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        every = {"every": 1, "epochs": 0}
        ps = mpips.connect(net, optimizer, communicator=e, run_dir="run", resume=resume, checkpoint=every)
        loader: Any = torch.utils.data.DataLoader(items, batch, shuffle=True)
        loader = ps.batches(loader, shard=False) if changed == "own contents" else ps.shard(loader)
        for _ in ps.epochs(2):
            for number, x in enumerate(loader):
                optimizer.zero_grad()
                net(x).sum().backward()
                optimizer.step()
                if resume == "no" and number == 2:
                    ps.preempt()

    items = torch.arange(160.0).view(40, 4)
    with pytest.raises(SystemExit, match="75"):
        World(3).run(lambda e: program(e, "no", 4, items))
    again = {
        "batch size": (5, items),
        "length": (4, items[:36]),
        "contents": (4, items + 1),
        "own contents": (4, items + 1),
    }.get(changed, (4, items))
    World(3).run(lambda e: program(e, "auto", *again))
    assert capsys.readouterr().out.count("the data or the batch size of this loop are not those") == (
        changed in ("batch size", "length", "contents")
    )


def test_an_exception_in_a_loop_is_no_break() -> None:
    def program(folder: str, fails: bool = False, **settings: Any) -> str:

        net = dropout_mlp()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        settings = settings | {"checkpoint": {"every": 1}}
        ps = mpips.connect(net, optimizer, communicator=World(1).ends[0], run_dir=folder, **settings)
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(40), 8):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                if fails and ps.round == 7:
                    raise KeyboardInterrupt
        return sha(net)

    expected = program("whole")
    with pytest.raises(KeyboardInterrupt):
        program("cut", fails=True)
    assert program("cut", resume="auto") == expected


def test_weights_that_a_resumed_script_changes_before_it_goes_on_are_refused() -> None:
    def program(resume: str = "no") -> None:

        net = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        ps = mpips.connect(net, optimizer, communicator=World(1).ends[0], run_dir="run", resume=resume, checkpoint={"every": 1})
        torch.nn.init.ones_(net.weight)
        for _ in ps.epochs(1):
            for (x,) in ps.batches((torch.ones(4, 1),), 1):
                optimizer.zero_grad()
                net(x).sum().backward()
                optimizer.step()
                if ps.round == 2:
                    ps.preempt()

    with pytest.raises(SystemExit, match="75"):
        program()
    with pytest.raises(RuntimeError, match=r"has changed weight between connect and where the run goes on"):
        program(resume="auto")


def adversaries(communicator: Any, folder: str, optimizers: int, preempt_at: int = -1, **settings: Any) -> list[Any]:
    """A GAN's loop: the critic steps on each batch, the generator on each second one too, by one optimizer or two."""

    torch.manual_seed(4)
    generator, critic = torch.nn.Linear(3, 2).double(), torch.nn.Linear(2, 1).double()
    both = torch.nn.ModuleDict({"g": generator, "d": critic})
    if optimizers == 2:
        steps = [torch.optim.Adam(generator.parameters(), 0.05), torch.optim.Adam(critic.parameters(), 0.05)]
    else:
        steps = [torch.optim.Adam(both.parameters(), 0.05)] * 2
    given: Any = steps if optimizers == 2 else steps[0]
    ps = mpips.connect(both, given, communicator=communicator, run_dir=folder, checkpoint={"epochs": 0}, **settings)
    real = torch.randn(24 * ps.workers, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in ps.epochs(2):
        for index, batch in ps.batches((torch.arange(len(real)), real), 4, shuffle=False):
            number = int(index[0]) // (4 * ps.workers)
            for step in [steps[1], steps[0]][: 1 + number % 2]:
                made = generator(torch.randn(len(batch), 3, dtype=torch.float64))
                loss = critic(made).mean() - critic(batch).mean() if step is steps[1] else -critic(made).mean()
                both.zero_grad()
                loss.backward()
                if ps.round == preempt_at:
                    ps.preempt()
                step.step()
    return [sha(both), float(torch.rand(1))]


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_a_preempted_run_takes_all_steps_of_its_batches(size: int, optimizers: int) -> None:
    """A resumed run begins with the next batch: a generator's step on the last one was lost."""
    expected = World(size).run(lambda e: adversaries(e, "whole", optimizers))
    for at in range(11):
        with pytest.raises(SystemExit, match="75"):
            World(size).run(lambda e, at=at: adversaries(e, f"early-{at}", optimizers, preempt_at=at))
        again = World(size).run(lambda e, at=at: adversaries(e, f"early-{at}", optimizers, resume="auto"))
        assert again == expected, f"preempted in round {at}"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_job_that_is_about_to_end_is_preempted(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM says when; rounds of 10 s leave time for a few more, and for a checkpoint."""
    from mpips.server import base

    now = [1000.0]
    monkeypatch.setattr(base.time, "time", lambda: now[0])
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1101")
    world = World(2)

    def program(communicator: Any) -> None:

        net = torch.nn.Linear(1, 1)
        sgd = torch.optim.SGD(net.parameters(), 0.01)
        ps = mpips.connect(net, sgd, communicator=communicator, run_dir="run", mode=mode, checkpoint={"epochs": 0})
        for x in ps.batches(torch.ones(100, 1), 1):
            now[0] += 10.0
            world.sleep(communicator.rank, 10.0)
            net(x).sum().backward()
            sgd.step()
            sgd.zero_grad()

    with pytest.raises(SystemExit, match="75"):
        world.run(program)
    assert last(Path("run"))["round"] in (6, 7), "until 20 + 3 * 10 s are left, and one more"
    assert now[0] <= 1101 - 20


def test_a_script_whose_name_begins_alike_is_not_resumed() -> None:
    from mpips.run import run_folder as folder

    for name in ("test-big", "test-2"):
        other = Path("runs", f"2026-01-01-000000-{name}", "checkpoints")
        other.mkdir(parents=True)
        checkpoint.save(other, 1, {"x": torch.zeros(1)})
    assert folder.last_folder() is None
    again = Path("runs", "2026-01-01-000000.2-test", "checkpoints")
    again.mkdir(parents=True)
    checkpoint.save(again, 1, {"x": torch.zeros(1)})
    assert folder.last_folder() == again.parent.absolute()


UNEVEN: dict[str, tuple[bool, dict[str, Any]]] = {  # whether data is each rank's own, and settings
    "own": (True, {}),
    "own, rank 0 trains": (True, {"server_trains": True}),
    "own, async": (True, {"mode": "async"}),
    "dealt": (False, {"mode": "async"}),
}


@pytest.mark.parametrize("own, settings", UNEVEN.values(), ids=list(UNEVEN))
@pytest.mark.parametrize("stop_at", [0, 2], ids=["before any push", "after a few"])
def test_a_worker_that_took_no_item_goes_on_with_its_streams(own: bool, settings: dict[str, Any], stop_at: int) -> None:
    """Each rank draws before every loop; the first loop is cut, and in that the last rank takes nothing."""
    size = 4

    def program(communicator: Any, folder: str, cut: bool, resume: str = "no") -> list[float]:

        torch.manual_seed(communicator.rank)
        net, idle = torch.nn.Linear(1, 1), communicator.rank == communicator.size - 1
        sgd = torch.optim.SGD(net.parameters(), lr=0.0)
        ps = mpips.connect(net, sgd, communicator=communicator, run_dir=folder, resume=resume, **settings)
        drawn = []
        for _ in ps.epochs(1):
            for loop in range(2):
                torch.rand(1)
                if cut and not stop_at:
                    ps.preempt()
                for (x,) in ps.batches((torch.ones(0 if own and idle and not loop else 6, 1),), 1, shard=not own):
                    loss = net(x).sum()
                    loss.backward()
                    ps.step(loss)
                    if cut and ps.round >= stop_at:
                        ps.preempt()
                drawn.append(float(torch.rand(1)))
        return drawn

    whole = World(size, seed=1).run(lambda e: program(e, "whole", False))
    with pytest.raises(SystemExit, match="75"):
        World(size, seed=1).run(lambda e: program(e, "cut", True))
    assert last(Path("cut"))["ranks"][str(size - 1)]["place"]["taken"] == 0 or not own
    resumed = World(size, seed=2).run(lambda e: program(e, "cut", False, "auto"))
    assert resumed == whole


def one_run(folder: str, **settings: Any) -> None:
    """A model of 16 bits in one process, with momentum, and something that the script keeps."""

    torch.manual_seed(1)
    net = torch.nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ps = mpips.connect(net, optimizer, communicator=World(1).ends[0], run_dir=folder, **settings)
    ps.keep(average=torch.optim.swa_utils.AveragedModel(net))
    for _ in ps.epochs(2):
        for (x,) in ps.batches((torch.ones(6, 3).bfloat16(),), 2):
            net(x).sum().backward()
            ps.step(0.0)
        ps.validate(lambda: 0.5)


def places(tree: dict[str, Any], where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inside = [place for key, kept in tree.items() if isinstance(kept, dict) for place in places(kept, (*where, key))]
    return [(*where, key) for key in tree] + inside


def changed(folder: str, place: tuple[str, ...], *put: Any) -> Path:
    """A checkpoint of a run in which what is at a place is gone, or something else."""
    tree = last(Path("whole"))
    group = tree
    for key in place[:-1]:
        group = group[key]
    del group[place[-1]]
    if put:
        group[place[-1]] = put[0]
    Path(folder).mkdir(exist_ok=True)
    return checkpoint.save(Path(folder), 6, tree)


def refusal(path: Path) -> str:
    with pytest.raises((checkpoint.CheckpointError, snapshot.SnapshotError)) as error:
        one_run("again", resume=str(path))
    text = str(error.value)
    assert text.startswith(f"{path.absolute()}: ") and "\n" not in text and len(text) < 500, text
    return text


def test_a_checkpoint_that_lacks_something_is_refused_by_name() -> None:
    one_run("whole")
    everything = places(last(Path("whole")))
    assert ("optimizer", "state", "weight", "momentum_buffer") in everything and ("masters", "bias") in everything
    for place in everything:
        if place[0] == "ranks" and {*place} & {"streams", "orders", "own", "buffers", "gradients"} - {place[-1]}:
            continue  # what is kept of these is each its own
        if place[0] == "kept" and place[1:] not in ((), ("param_groups",)):
            continue  # the script's
        if place[0] in ("versions", "rule", "world") and len(place) == 2 and place[1] not in ("size", "name"):
            continue  # for people
        text = refusal(changed("hurt", place))
        assert place[0].rstrip("s") in text, (place, text)
        assert place[-1] in text or place[:2] == ("optimizer", "state"), (place, text)


@pytest.mark.parametrize(("place", "put", "said"), [
    (("parameters",), {}, "parameter weight: the checkpoint has nothing"),
    (("parameters", "weight"), torch.ones(2, 3), "parameter weight: the checkpoint has torch.float32 (2, 3)"),
    (("masters",), {}, "master weight: the checkpoint has nothing"),
    (("masters", "weight"), torch.ones(1), "master weight: the checkpoint has torch.float32 (1,)"),
    (("optimizer",), {}, "has no /optimizer/class"),
    (("optimizer", "state"), {}, "optimizer/state: the checkpoint has 0 of 2 entries"),
    (("optimizer", "state", "weight"), {}, "optimizer/state: the checkpoint has 1 of 2 entries"),
    (("optimizer", "state", "weight", "momentum_buffer"), torch.ones(3), "has the shape (3,), the parameter (2, 3)"),
    (("ranks",), {}, "has no /ranks/0"),
    (("ranks", "0", "place"), {"epoch": 1}, "has no /ranks/0/place/loop"),
    (("kept",), {}, "has no /kept/param_groups"),
    (("stopping",), {}, "has no /stopping/"),
    (("stopping", "best"), torch.ones(3).double(), "ValueError"),
    (("metrics",), 3, "TypeError"),
    (("round",), "many", "ValueError"),
    (("world", "size"), None, "TypeError"),
])  # fmt: skip
def test_a_checkpoint_that_holds_something_else_is_refused(place: tuple[str, ...], put: Any, said: str) -> None:
    one_run("whole")
    assert said in refusal(changed("hurt", place, put))


def test_a_worker_s_own_state_that_is_missing_is_named_there() -> None:
    """It has travelled: the worker knows of no file."""

    def program(communicator: Any, **settings: Any) -> None:

        torch.manual_seed(1)
        net = torch.nn.Linear(3, 2)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        ps = mpips.connect(net, sgd, communicator=communicator, run_dir="whole", mode="local_sgd", **settings)
        for (x,) in ps.batches((torch.ones(6, 3),), 2):
            net(x).sum().backward()
            ps.step(0.0)

    World(3).run(program)
    path = changed("whole/checkpoints", ("ranks", "2", "own", "inner", "optimizer"))
    with pytest.raises(checkpoint.CheckpointError, match="the state of worker 1 in the checkpoint: has no /inner/optimizer"):
        World(3).run(lambda e: program(e, resume=str(path)))


@pytest.mark.parametrize("zeroes", ["first", "last"])
@pytest.mark.parametrize(("size", "shares"), [(1, False), (3, False), (3, True)])
def test_steps_outside_of_loops_and_epochs_go_on_by_the_round(
    size: int, shares: bool, zeroes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in reinforcement learning. A checkpoint was taken in the next step, behind the random numbers of its batch."""

    def program(e: Any, folder: str, resume: str) -> list[torch.Tensor]:
        net = dropout_mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        every = {"every": 1, "keep": 9}
        ps = mpips.connect(net, optimizer, communicator=e, run_dir=folder, resume=resume, checkpoint=every)
        for _ in range(ps.round, 6):
            if zeroes == "first":
                optimizer.zero_grad()
            net(torch.randn(4, 12)).square().sum().backward()
            optimizer.step()
            if zeroes == "last":
                optimizer.zero_grad()
        return [p.detach().clone() for p in net.parameters()]

    whole = World(size, shares=shares).run(lambda e: program(e, "whole", "no"))
    assert "cannot find its place" not in capsys.readouterr().out
    for at in range(1, 6):
        named = f"whole/checkpoints/round_{at:08d}.h5"
        again = World(size, shares=shares).run(lambda e, at=at, named=named: program(e, f"from-{at}", named))
        torch.testing.assert_close(again, whole, atol=0, rtol=0)
        line = f"cannot find its place: round {at} is followed by the first step of the script; count by ps.round"
        assert capsys.readouterr().out.count(line) == 1
