"""A checkpoint is written while training goes on: what it holds, one at a time, errors, and the end of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mpips
from mpips import checkpoint
from mpips.checkpoint import CheckpointError, Parts, Writer, background, joined, load, newest
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.deadlines import patient
from tests.helpers.programs import data, mlp

PATIENCE = 30.0  # seconds


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


# ---------------------------------------------------------------- the writer


def tree(number: int) -> dict[str, Any]:
    weight = torch.full((300, 200), float(number))
    small = {str(n): torch.full((3,), float(number)) for n in range(5)}
    bits = torch.full((4,), float(number)).bfloat16()
    return {
        "round": number,
        "w": weight,
        "tied": weight,
        "t": weight.t(),
        "state": small,
        "bits": bits,
        "a": np.full(9, number),
    }


def change(values: dict[str, Any]) -> None:
    """Change every tensor of a tree in place, as the next rounds do."""
    for value in values.values():
        if isinstance(value, dict):
            change(value)
        elif isinstance(value, torch.Tensor):
            value.fill_(-1)
        elif isinstance(value, np.ndarray):
            value[:] = -1


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            same(a[key], b[key])
        else:
            assert np.array_equal(np.asarray(torch.as_tensor(a[key]).float()), np.asarray(torch.as_tensor(b[key]).float())), key


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path: Path) -> None:
    held = threading.Event()
    writer = Writer(tmp_path / "made", 2, before=lambda: held.wait(PATIENCE))
    for number in (1, 2, 3):  # the later ones in memory that is used again
        given = tree(number)
        writer.begin(number, given)
        assert writer.busy
        assert not writer.done
        change(given)
        held.set()
        written = writer.wait()
        held.clear()
        assert written is not None
        assert (written.step, written.path) == (number, tmp_path / "made" / f"round_0000000{number}.h5")
        assert written.nbytes == written.path.stat().st_size
        same(load(written.path), tree(number))
    assert writer.wait() is None
    assert [path.name for path in sorted((tmp_path / "made").glob("*.h5"))] == ["round_00000002.h5", "round_00000003.h5"]


def test_a_tensor_in_pieces_is_stored_whole_and_what_lies_still_is_not_copied(tmp_path: Path) -> None:
    whole = torch.arange(7 * 4000.0).view(7, 4000)
    blob = bytearray(whole[3:].numpy().tobytes())
    still = torch.frombuffer(blob, dtype=torch.float32)
    pieces = (whole[:3].reshape(-1).clone(), still, torch.zeros(0))
    small = torch.tensor([1.0, 2.0, 3.0]).bfloat16()
    given = {
        "w": Parts(pieces, (7, 4000)),
        "still": still.view(4, 4000),
        "bits": Parts((small[:1], small[1:]), (3,)),
        "one": small,
    }
    held = threading.Event()
    writer = Writer(tmp_path, 2, before=lambda: held.wait(PATIENCE))
    writer.begin(1, given, still=[blob])
    pieces[0].fill_(-1)
    held.set()
    writer.wait()
    assert writer._buffer._memory.nbytes < pieces[0].nbytes + 1024, "only the piece that may change was copied"
    read = load(newest(tmp_path))
    assert torch.equal(read["w"], whole)
    assert torch.equal(read["still"], whole[3:])
    assert torch.equal(read["bits"], small)
    assert torch.equal(read["one"], small)
    (tmp_path / "now").mkdir()
    checkpoint.save(tmp_path / "now", 1, {"w": given["w"]})
    assert torch.equal(load(newest(tmp_path / "now"))["w"][3:], whole[3:])
    assert torch.equal(joined({"a": {"w": given["w"]}, "b": 1})["a"]["w"][3:], whole[3:])


def test_memory_is_used_again_and_grows() -> None:
    buffer = background.Buffer()
    first = buffer.of(1000, pinned=False)
    assert buffer.of(500, pinned=False) is first
    assert len(buffer.of(2000, pinned=False)) >= 2000


def test_an_error_is_raised_once_and_the_next_write_is_as_if_there_was_none(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3)
    writer.write(1, tree(1))
    (tmp_path / "round_00000002.h5").mkdir()  # what cannot be replaced
    writer.begin(2, tree(2))
    while not writer.done:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match=r"round_00000002.h5: cannot save the checkpoint"):
        writer.wait()
    assert writer.wait() is None
    (tmp_path / "round_00000002.h5").rmdir()
    assert newest(tmp_path) == tmp_path / "round_00000001.h5"
    writer.begin(3, tree(3))
    assert writer.wait() is not None
    same(load(tmp_path / "round_00000003.h5"), tree(3))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = Writer(tmp_path / "file" / "checkpoints", 3)
    writer.begin(1, tree(1))
    with pytest.raises(CheckpointError, match=r"file/checkpoints: cannot make the folder of checkpoints .*; give a folder"):
        writer.wait()


def test_what_cannot_be_stored_is_said_at_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3)
    with pytest.raises(TypeError, match="'what'"):
        writer.begin(1, {"what": object()})
    assert writer.wait() is None


def test_two_writes_at_a_time_are_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3)
    writer.begin(1, tree(1))
    with pytest.raises(AssertionError, match="two writers"):
        writer.begin(2, tree(2))
    with pytest.raises(AssertionError, match="two writers"):
        writer.write(2, tree(2))
    assert writer.wait() is not None


def test_python_exits_when_it_is_written_and_writes_what_is_begun_at_its_exit(tmp_path: Path) -> None:
    script = """
        import atexit, sys, time, torch
        from pathlib import Path
        from mpips.checkpoint import Writer
        writer = Writer(Path(sys.argv[1]), 3, before=lambda: time.sleep(0.5))
        def late():
            assert writer.wait().step == 1
            writer.begin(2, {"w": torch.ones(4_000_000)})  # no thread can be begun any more
            assert writer.wait().step == 2
            print("late")
        atexit.register(late)
        writer.begin(1, {"w": torch.ones(4)})
        print("end", flush=True)
    """
    lines = "\n".join(line.removeprefix("        ") for line in script.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", lines, str(tmp_path)], capture_output=True, text=True, timeout=patient(60), check=False
    )
    assert (done.stdout, done.stderr) == ("end\nlate\n", "")
    assert newest(tmp_path) == tmp_path / "round_00000002.h5"
    assert len(load(tmp_path / "round_00000001.h5")["w"]) == 4


# ---------------------------------------------------------------- a run


class Slow:
    """Writes that take as long as is wanted; notes when each begins and ends, and in which round.

    Args:
        monkeypatch: pytest's.
        hold: called in each write, with its step, before anything is written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hold: Any) -> None:
        self.round = 0
        self.events: list[tuple[str, int, int]] = []
        save = background.save_snapshot

        def slow(folder: Path, step: int, snapshot: Any) -> Path:
            self.events.append(("begin", step, self.round))
            hold(step)
            path = save(folder, step, snapshot)
            self.events.append(("end", step, self.round))
            return path

        monkeypatch.setattr(background, "save_snapshot", slow)

    @property
    def steps(self) -> list[int]:
        return [step for kind, step, _ in self.events if kind == "end"]

    def check_one_at_a_time(self) -> None:
        kinds = [kind for kind, _, _ in self.events]
        assert kinds == ["begin", "end"] * (len(kinds) // 2)
        assert [step for _, step, _ in self.events[::2]] == [step for _, step, _ in self.events[1::2]]


def train(e: Communicator, note: Any = lambda ps: None, epochs: int = 1, n: int = 288, **settings: Any) -> mpips.Run:
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=e, **{"run_dir": "run", **settings})
    for _ in ps.epochs(epochs):
        for x, y in ps.batches(data(n), 8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
            note(ps)
    return ps


WHERE = [
    (1, {}),
    (3, {}),
    (3, {"server_trains": True}),
    (3, {"mode": "local_sgd", "local": {"steps": 1}}),
    (3, {"mode": "async"}),
    (1, {"mode": "async"}),
    (1, {"overlap": True}),
]


@pytest.mark.parametrize(("size", "settings"), WHERE)
def test_rounds_go_on_while_a_checkpoint_is_written(size: int, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on = threading.Event()
    went_on = []
    slow = Slow(monkeypatch, lambda step: went_on.append(on.wait(PATIENCE)))

    def note(ps: mpips.Run) -> None:
        slow.round = max(slow.round, ps.round)
        if slow.round >= 11:
            on.set()

    World(size).run(lambda e: train(e, note, checkpoint={"every": 6, "epochs": 0}, **settings))
    assert went_on[0]  # round 11 came while the checkpoint of round 6 waited to be written


@pytest.mark.parametrize(("size", "settings"), WHERE)
def test_the_next_checkpoint_waits_for_the_one_before(size: int, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, lambda step: time.sleep(0.05))
    World(size).run(lambda e: train(e, checkpoint={"every": 2, "keep": 100}, epochs=2, n=64, **settings))
    slow.check_one_at_a_time()
    assert len(slow.steps) >= 4
    assert [int(path.stem.split("_")[1]) for path in sorted(Path("run/checkpoints").glob("*.h5"))] == sorted(set(slow.steps))
    events = map(json.loads, Path("run/events.jsonl").read_text().splitlines())
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["round"] for event in saved] == slow.steps
    assert all(0 < event["held"] <= event["seconds"] and event["seconds"] > 0.05 for event in saved)


@pytest.mark.parametrize(("size", "settings"), WHERE)
def test_the_last_one_is_there_before_done(size: int, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    slow = Slow(monkeypatch, lambda step: (time.sleep(0.2), found.append(Path("run/DONE").exists())))
    World(size).run(lambda e: train(e, n=64, **settings))
    assert found == [False] * len(found)
    done = json.loads(Path("run/DONE").read_text())
    assert done["checkpoint"] == str(newest(Path("run/checkpoints").resolve()))
    assert done["checkpoint"].endswith(f"{slow.steps[-1]:08d}.h5")


@pytest.mark.parametrize("size", [1, 3])
def test_ps_save_returns_when_it_is_written(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, lambda step: time.sleep(0.2))

    def note(ps: mpips.Run) -> None:
        if ps.round == 3:
            ps.save()
            assert newest(Path("run/checkpoints")) == Path("run/checkpoints/round_00000003.h5")

    World(size).run(lambda e: train(e, note, checkpoint={"every": 3}))
    slow.check_one_at_a_time()
    assert slow.steps[:2] == [3, 3]


@pytest.mark.parametrize("size", [1, 3])
def test_an_error_of_a_write_ends_the_run_at_the_next_round(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, rounds = threading.Event(), []

    def hold(step: int) -> None:
        failed.set()
        raise CheckpointError(f"step {step} on purpose")

    Slow(monkeypatch, hold)

    def note(ps: mpips.Run) -> None:
        rounds.append(ps.round)
        if ps.round > 4:
            assert failed.wait(PATIENCE)
            time.sleep(0.05)

    with pytest.raises(CheckpointError, match="step 4 on purpose"):
        World(size).run(lambda e: train(e, note, checkpoint={"every": 4}))
    assert 4 <= max(rounds) <= 6
    assert not Path("run/DONE").exists()


def test_an_error_of_the_last_write_ends_the_run_without_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(step: int) -> None:
        time.sleep(0.2)
        raise CheckpointError("on purpose")

    Slow(monkeypatch, hold)
    with pytest.raises(CheckpointError, match="on purpose"):
        World(3).run(train)
    assert not Path("run/DONE").exists()


def test_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, lambda step: None)
    world = World(3)

    def note(ps: mpips.Run) -> None:
        time.sleep(0.01)  # the write is over
        for rank in range(3):
            world.time[rank] = max(world.time[rank], 10.0 * ps.round)  # a round takes 10 seconds

    world.run(lambda e: train(e, note, checkpoint={"every": "30s", "keep": 100}))
    assert slow.steps[-1] == 18
    assert set(np.diff([0, *slow.steps[:-1]])) <= {3, 4, 5}


def test_a_checkpoint_of_seconds_never_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on = threading.Event()
    slow = Slow(monkeypatch, lambda step: on.wait(PATIENCE))
    world = World(3)

    def note(ps: mpips.Run) -> None:
        for rank in range(3):
            world.time[rank] = max(world.time[rank], 10.0 * ps.round)
        if ps.round == 10 and not on.is_set():  # the first worker that comes here
            assert slow.steps == []
            on.set()

    world.run(lambda e: train(e, note, checkpoint={"every": "10s"}))
    slow.check_one_at_a_time()


SCRIPT = """
import os, signal, sys
import torch
import torch.nn.functional as F
import mpips
from mpips.checkpoint import latch, writer
from tests.helpers.programs import data, mlp, sha

real, deadly = writer.pwrite_all, int(sys.argv[1])
def pwrite_all(fd, view, offset):
    global deadly
    real(fd, view, offset)
    deadly -= 1
    if not deadly:
        os.kill(os.getpid(), signal.SIGKILL)
writer.pwrite_all = pwrite_all
model = mlp()
ps = mpips.connect(model, torch.optim.Adam(model.parameters()), checkpoint={"every": 3})
for _ in ps.epochs(2):
    for x, y in ps.batches(data(160), 8):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        ps.step(loss)
ps.print("weights", sha(model))
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_process_killed_in_a_write_behind_resumes_from_the_one_before(
    ranks: int, solo: Any, mpirun: Any, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(*words: Any) -> Any:
        given = tmp_path / "script.py", *words
        return solo(*given) if ranks == 1 else mpirun(ranks, *given)

    whole = start(0, "--mpips.run_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    killed = start(20, "--mpips.run_dir", "killed")
    assert killed.returncode != 0
    folder = tmp_path / "killed" / "checkpoints"
    left = [name for name in os.listdir(folder) if name.startswith(".tmp.round_") and "sha256" not in name]
    assert len(left) == 1
    found = newest(folder)
    assert found is not None
    assert int(left[0].split("_")[1][:8]) == load(found)["round"] + 3
    resumed = start(0, "--mpips.run_dir", "killed", "--mpips.resume", "auto")
    assert resumed.stdout.split("weights")[1] == whole.stdout.split("weights")[1], resumed.stderr
    assert not [name for name in os.listdir(folder) if name.startswith(".tmp")]
