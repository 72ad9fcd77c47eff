"""Thousands of seeded schedules of the real server and workers in the simulated world, with faults.

A seed chooses how a run works (mode, rule, plan, messages or shared memory, one node or two), the order in which its ranks get
on, and what goes wrong: ranks that are slow, die or are preempted, a disk that fails. After the fault the run is resumed.

What must hold, after each seed:

    I1  all ranks have the same weights
    I2  each round is in metrics.csv once, and each epoch takes each item once
    I3  the weights are those of the run in which nothing went wrong, bit for bit
    I4  no rank waits forever: the simulated world raises an error where none can go on
    I5  each checkpoint is whole, and is one of the undisturbed run's after the same round
    I6  the version of the weights never goes back

In modes with requests the order of the ranks changes the result: I3 and the second half of I5 do not apply.
A failing seed is printed; `python -m tests.promises.test_simulated_faults SEED` replays it.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mpips
from mpips import checkpoint
from mpips.checkpoint import background
from mpips.cli.verify import verdicts
from mpips.comm.simulated import Killed, World
from mpips.run import run_folder
from tests.helpers.programs import metrics, sha

SEEDS = int(os.environ.get("SIMULATED_SEEDS", "1000"))  # .ci/run plays 10,000
SECONDS = 60 * float(os.environ.get("SIMULATED_MINUTES", "inf"))  # and no more than there is time for, on a slow machine
CHUNK = 250
PLAYED_FOR = [0.0]  # seconds, by this process
ITEMS, EPOCHS = 8, 2
SGD, ADAM = "sgd", "adam"

Way = tuple[int, dict[str, Any], dict[str, Any], str]  # the number of ranks, of the world, of the run, and the optimizer


def ways() -> list[Way]:
    """How a run may work."""
    worlds: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (2, {}, {}),
        (2, {"shares": True}, {"server_trains": True}),
        (3, {}, {"server_trains": True}),
        (3, {"shares": True}, {"plan": "root"}),
        (3, {"shares": True}, {"plan": "sharded"}),
        (4, {"shares": True, "nodes": (2, 2)}, {"plan": "root"}),
        (4, {"shares": True, "nodes": (2, 2)}, {"plan": "sharded", "server_trains": True}),
    ]
    runs: list[tuple[dict[str, Any], str]] = [
        ({}, SGD),
        ({}, ADAM),
        ({"clip": 0.1}, ADAM),
        ({"deterministic": True}, SGD),
        ({"nonfinite": "drop"}, SGD),
        ({"mode": "local_sgd", "local": {"steps": 2}}, ADAM),
        ({"mode": "slowmo", "local": {"steps": 2}}, SGD),
        ({"mode": "diloco", "local": {"steps": 2}}, ADAM),
    ]
    rules: list[dict[str, Any]] = [{"rule": "median"}, {"rule": "normclip", "robust": {"clip_radius": 0.1}}, {"rule": "rfa"}]
    requests: list[dict[str, Any]] = [
        {"mode": "async"},
        {"mode": "ssp", "staleness": {"bound": 1}},
        {"mode": "easgd", "local": {"steps": 1}},
    ]
    found: list[Way] = [(size, world, own | run, kind) for size, world, own in worlds for run, kind in runs]
    found += [(size, world, own | run, SGD) for size, world, own in worlds if size > 2 for run in rules]
    return found + [(size, {}, run, SGD) for size in (2, 3, 4) for run in requests]


WAYS = ways()


def program(communicator: Any, way: Way, folder: str, slow: random.Random | None, preempt_at: int, resume: str) -> str:
    """What the script does."""
    _, _, settings, optimizer = way
    torch.default_generator.manual_seed(3)  # torch.manual_seed notes a stack for CUDA, which takes longer than a round
    model = torch.nn.Linear(3, 1).double()
    kind = torch.optim.SGD(model.parameters(), 0.05) if optimizer == SGD else torch.optim.Adam(model.parameters(), 0.05)
    keeping = {"every": 0 if "mode" in settings else 2, "keep": 100}
    ps = mpips.connect(model, kind, communicator=communicator, run_dir=folder, resume=resume, checkpoint=keeping, **settings)
    items = torch.randn(ITEMS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for _ in ps.epochs(EPOCHS):
        for batch in ps.batches(items, 2):
            if slow:
                communicator.world.sleep(communicator.rank, slow.choice((0.0, 0.001, 1.0)))
            kind.zero_grad()
            loss = model(batch).pow(2).mean()
            loss.backward()
            if ps.round >= preempt_at:
                ps.preempt()
            ps.step(loss)
    return sha(model)


class Later(Future[Any]):
    """What a thread does behind training, done at a seeded time: when somebody has looked at it for the `looks`-th time.

    It is never done if the rank dies before, like what the thread of a process does that dies.
    """

    def __init__(self, looks: int, work: Callable[[], Any]) -> None:
        super().__init__()
        self.looks, self.work = looks, work

    def done(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self._finish()
        return super().done()

    def result(self, timeout: float | None = None) -> Any:
        self._finish()
        return super().result(timeout)

    def _finish(self) -> None:
        if super().done():
            return
        try:
            self.set_result(self.work())
        except Exception as error:
            self.set_exception(error)


def run(way: Way, seed: float, folder: str, resume: str = "no", **fault: Any) -> tuple[list[str], World]:
    """One attempt; a rank dies in it if the fault says so."""
    size, world_of, _, _ = way
    world = World(size, seed=seed, **world_of)
    for rank, call in fault.get("kill", ()):
        world.kill(rank, call)
    slow, preempt_at = fault.get("slow"), fault.get("preempt_at", sys.maxsize)
    with writing_later(random.Random(seed)):
        return world.run(lambda end: program(end, way, folder, slow, preempt_at, resume)), world


@contextmanager
def writing_later(looks: random.Random) -> Iterator[None]:
    """Let checkpoints be written behind training at seeded times."""

    class Executor:
        def __init__(self, **given: Any) -> None:
            pass

        def submit(self, work: Callable[..., Any], *args: Any) -> Later:
            return Later(looks.choice((0, 0, 1, 3, 9)), lambda: work(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "ThreadPoolExecutor", Executor)
        yield


@contextmanager
def failing_disk(after: int, code: int) -> Iterator[None]:
    """Let the write number `after` to checkpoints, and all that follow, fail."""
    write, left = os.pwrite, [after]

    def failing(fd: int, *given: Any) -> int:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name.startswith(".tmp.round_"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
        return write(fd, *given)

    os.pwrite = failing
    try:
        yield
    finally:
        os.pwrite = write


@cache
def undisturbed(number: int) -> tuple[list[str], list[int], dict[int, str], list[dict[str, float]]]:
    """The run without faults: weights, calls by rank, weights by checkpoint, metrics."""
    folder = Path(f"whole-{number}")
    weights, world = run(WAYS[number], 0, str(folder))
    saved = {tree["round"]: weights_in(tree) for tree in map(checkpoint.load, checkpoint.listed(folder / "checkpoints"))}
    found = weights, list(world.calls), saved, metrics(folder)
    shutil.rmtree(folder)
    return found


def weights_in(tree: dict[str, Any]) -> str:
    """The weights in a checkpoint, as a text."""
    return " ".join(f"{name}={tensor.tolist()}" for name, tensor in sorted(tree["parameters"].items()))


def check(way: Way, folder: Path, weights: list[str], number: int) -> None:
    """I1, I2, I3, I5, I6 after a run that has come to its end."""
    expected, _, saved, table = undisturbed(number)
    exact = way[2].get("mode") not in ("async", "ssp", "easgd")
    assert len(set(weights)) == 1, "I1: the ranks' weights differ"
    rows = metrics(folder)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1)), "I2: a round is missing, or twice in metrics.csv"
    for epoch in range(EPOCHS):
        assert sum(row["samples"] for row in rows if row["epoch"] == epoch) == ITEMS, f"I2: epoch {epoch}"
    versions = [row["version"] for row in rows]
    assert versions == sorted(versions), "I6: the version goes back"
    if exact:
        assert weights == expected, "I3: the weights are not those of the undisturbed run"
        assert rows == table, "I3: the metrics are not those of the undisturbed run"
    check_checkpoints(folder, saved if exact else None)


def check_checkpoints(folder: Path, saved: dict[int, str] | None) -> None:
    """I5."""
    for verdict in verdicts(folder):
        assert not verdict.why, f"I5: {verdict}"
        if saved is not None and verdict.round in saved:
            assert weights_in(checkpoint.load(verdict.path)) == saved[verdict.round], f"I5: other weights in {verdict.path}"


def disturbed(seed: int) -> Iterator[Callable[[str, str], list[str]]]:
    """Yield attempts that end early, and one that does not; each is called with a folder and what to resume."""
    choose = random.Random(seed)
    number = choose.randrange(len(WAYS))
    way, calls = WAYS[number], undisturbed(number)[1]
    kind = choose.choice(["slow", "kill", "kill", "kill twice", "preempt", "disk"])
    attempts = {"slow": 0, "kill twice": 2}.get(kind, 1)
    for _ in range(attempts):
        fault: dict[str, Any] = {"slow": random.Random(choose.random()) if choose.random() < 0.5 else None}
        schedule, code = choose.random(), choose.choice([errno.ENOSPC, errno.EIO])
        if kind in ("kill", "kill twice"):
            rank = choose.randrange(way[0])
            fault["kill"] = [(rank, choose.randrange(calls[rank]))]
        if kind == "preempt":
            fault["preempt_at"] = choose.randrange(8)
        after = choose.randrange(60) if kind == "disk" else sys.maxsize

        def early(folder: str, resume: str, fault=fault, schedule=schedule, after=after, code=code) -> list[str]:  # type: ignore[no-untyped-def]
            with failing_disk(after, code):
                return run(way, schedule, folder, resume, **fault)[0]

        yield early
    slow = random.Random(choose.random())
    schedule = choose.random()
    yield lambda folder, resume: run(way, schedule, folder, resume, slow=slow)[0]


def play(seed: int) -> None:
    """Play one seed, and check what must hold."""
    number = random.Random(seed).randrange(len(WAYS))
    way, folder, resume = WAYS[number], Path(f"seed-{seed}"), "no"
    *early, last = disturbed(seed)
    weights: list[str] = []
    for attempt in [*early, last]:
        try:
            weights = attempt(str(folder), resume)
        except (Killed, checkpoint.CheckpointError):
            pass
        except SystemExit as end:
            assert end.code == 75, f"status {end.code}"
        else:
            break  # the fault was never due, or it was the last attempt
        exact = way[2].get("mode") not in ("async", "ssp", "easgd")
        check_checkpoints(folder, undisturbed(number)[2] if exact else None)
        resume = "auto"
    check(way, folder, weights, number)
    run_folder.release(folder.absolute())  # a dead process's lock is gone; this one lives on
    shutil.rmtree(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: power cuts are simulated in tests/checkpoint/test_crash.py."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_whatever_goes_wrong_the_run_ends_as_if_it_had_not(first: int, quick: None, record_property: Any) -> None:
    if PLAYED_FOR[0] > SECONDS:
        pytest.skip(f"seeds from {first} on: SIMULATED_MINUTES are over")
    record_property("faults", CHUNK)
    begin = time.monotonic()
    for seed in range(first, first + CHUNK):
        try:
            play(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {WAYS[random.Random(seed).randrange(len(WAYS))]}: {type(error).__name__}: {error}")
    PLAYED_FOR[0] += time.monotonic() - begin


if __name__ == "__main__":
    play(int(sys.argv[1]))
