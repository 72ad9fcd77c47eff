from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mpips
from mpips import checkpoint
from mpips.checkpoint import CheckpointError
from mpips.comm.simulated import World
from mpips.config import ConfigError, check_resume
from mpips.optim.snapshot import SnapshotError
from mpips.report import run_report as report
from mpips.run import run_folder as folder
from tests.helpers.deadlines import patient
from tests.helpers.programs import data, mlp


def run(name: str, *steps: int) -> Path:
    path = Path("runs", name)
    (path / "checkpoints").mkdir(parents=True)
    for step in steps:
        checkpoint.save(path / "checkpoints", step, {"x": torch.zeros(1)})
    return path.absolute()


def test_a_new_run_gets_a_folder_of_its_own() -> None:
    found = [folder.new_folder() for _ in range(5)]
    assert len(set(found)) == 5
    for path in found:
        assert path.is_dir(), "made, so that nobody else has it"
        assert path.parent == Path("runs").absolute()
        assert path.name.endswith("-test"), "named after the script"


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    Path("runs").touch()
    with pytest.raises(ConfigError, match=r"run_dir: given none, and '.*runs/.*' cannot be made \(Not a directory\)"):
        folder.new_folder()


def test_auto_takes_this_scripts_newest_run_with_a_checkpoint() -> None:
    assert folder.folders(None, "auto")[1] is None
    old, new = run("2026-01-01-000000-test", 5), run("2026-01-02-000000-test", 3, 7)
    run("2026-01-03-000000-test")
    run("2026-01-04-000000-other", 9)
    os.utime(old, (1, 1))
    assert folder.folders(None, "auto") == (new, new / "checkpoints" / "round_00000007.h5")
    assert folder.folders(str(old), "auto") == (old, old / "checkpoints" / "round_00000005.h5")


def test_auto_in_an_empty_run_dir_starts_afresh() -> None:
    assert folder.folders("mine", "auto") == (Path("mine").absolute(), None)


def test_a_file_and_a_run_folder_can_be_named() -> None:
    path = run("2026-01-01-000000-test", 5, 8)
    early = path / "checkpoints" / "round_00000005.h5"
    assert folder.folders(None, str(early)) == (path, early)
    assert folder.folders("mine", str(early)) == (Path("mine").absolute(), early)
    assert folder.folders(None, str(path)) == (path, path / "checkpoints" / "round_00000008.h5")
    lone = early.rename("lone.h5")
    assert folder.folders(None, str(lone))[0].parent == Path("runs").absolute()


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resume: given 'no\.h5', allowed"):
        check_resume("no.h5")


def test_another_script_s_run_is_not_taken_whatever_its_name() -> None:
    for other in ("test-2", "test.2", "a-test", "test.run2"):
        run(f"2026-01-02-000000-{other}", 3)
    assert folder.last_folder() is None
    ours = run("2026-01-02-000000.2-test", 3)
    assert folder.last_folder() == ours


def test_a_run_of_which_every_checkpoint_is_damaged_is_not_begun_anew_unasked() -> None:
    path = run("2026-01-01-000000-test", 5, 8)
    (path / "checkpoints" / "round_00000008.h5").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="passing over"):
        assert folder.folders(None, "auto")[1] == path / "checkpoints" / "round_00000005.h5"
    (path / "checkpoints" / "round_00000005.h5").write_bytes(b"damaged")
    for run_dir, resume in ((None, "auto"), (str(path), "auto"), (None, str(path))):
        with (
            pytest.warns(UserWarning, match="passing over"),
            pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged"),
        ):
            folder.folders(run_dir, resume)
    assert folder.folders(str(path), "aside") == (path, None)


def test_a_folder_is_held_by_one_process() -> None:
    Path("run").mkdir()
    folder.hold(Path("run").absolute())
    folder.hold(Path("run").absolute())  # of the same process
    code = "from pathlib import Path; from mpips.run import run_folder as folder; folder.hold(Path('run').absolute())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=patient(60))
    assert other.returncode
    assert f"which process {os.getpid()} on {socket.gethostname()} writes to" in other.stderr


def test_runs_of_one_process_leave_no_lock_behind() -> None:
    """A script of a thousand runs, one after another, would run out of descriptors."""
    for number in range(3):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir=f"run{number}")
        assert Path(f"run{number}").absolute() / ".lock" in folder._held
        ps.close()
    assert not {f"run{number}" for number in range(3)} & {path.parent.name for path in folder._held}


PROGRAM = """
import torch, mpips
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ps = mpips.connect(model, optimizer)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""


def test_a_run_is_not_written_over() -> None:
    """The second one is refused in one line and leaves all as it was, also where the folder cannot be made."""
    Path("train.py").write_text(PROGRAM)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(120))

    Path("run/logs").mkdir(parents=True)
    Path("run/events.jsonl").touch()
    assert start("--mpips.run_dir", "run").returncode == 0, "a folder in which none has begun will do"
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    Path("file").touch()
    for given, why in (("run", "holds a run"), ("file", "cannot be written")):
        second = start("--mpips.run_dir", given)
        assert second.returncode == 2
        (line,) = (second.stdout + second.stderr).splitlines()
        assert why in line
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert start("--mpips.run_dir", "run", "--mpips.resume", "auto").returncode == 0


def test_a_run_is_set_aside_where_it_is_asked_for() -> None:
    for number in (1, 2):
        path = run("mine", number)
        assert folder.folders("runs/mine", "aside") == (path, None)
        assert not path.exists()
        assert Path("runs", f"mine.{number}", "checkpoints", f"round_{number:08d}.h5").exists()
    run("mine", 3)
    Path("link").symlink_to("runs/mine")
    assert folder.folders("link", "aside")[0] == Path("runs", "mine").absolute()
    assert Path("runs", "mine.3").is_dir()
    Path("runs", "empty").mkdir()
    assert folder.folders("runs/empty", "aside")[0].is_dir(), "which holds no run"
    assert folder.folders(None, "aside")[0].parent == Path("runs").absolute()


def test_a_run_that_goes_on_does_not_write_over_another() -> None:
    ours, other = run("ours", 3), run("other", 5)
    checkpoint_file = str(ours / "checkpoints" / "round_00000003.h5")
    for resume in (str(ours), checkpoint_file):
        assert folder.folders(str(ours), resume)[0] == ours
        Path("link").unlink(missing_ok=True)
        Path("link").symlink_to(ours)
        for other_way in ("link", "runs/../runs/ours", "runs/ours/"):
            where, start = folder.folders(other_way, resume)
            assert start is not None
            assert start.parent == where / "checkpoints", "so that it is known for the run's own"
        assert folder.folders("runs/new", resume)[0] == Path("runs", "new").absolute()
        with pytest.raises(ConfigError, match=r"run_dir: given '.*other', which holds a run"):
            folder.folders(str(other), resume)


def test_auto_takes_the_run_that_was_written_to_last() -> None:
    old, new = run("2026-01-01-000000-test", 5), run("2026-01-02-000000-test", 3)
    for path, when in ((old, 9), (new, 5)):
        (path / "events.jsonl").touch()
        os.utime(path / "events.jsonl", (when, when))
    assert folder.last_folder() == old


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_moved_or_deleted_in_mid_run_ends_it_by_name(what: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every = {"every": 4, "epochs": 0, "keep": 1}
    ps = mpips.connect(model, optimizer, communicator=World(1).ends[0], run_dir="run", checkpoint=every)
    with pytest.raises(
        CheckpointError, match="run: the run's folder has been moved or deleted since the run began; the run ends"
    ):
        for number, (x, y) in enumerate(ps.batches(data(160), 8)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if number == 9:
                assert ps._roles.server
                ps._roles.server.end_save()
                shutil.rmtree("run") if what == "deleted" else Path("run").rename("moved")
                if what == "replaced":
                    shutil.copytree("moved", "run")
    assert number == 11
    assert not Path("run", "checkpoints", "round_00000012.h5").exists()


def test_what_is_newer_than_the_checkpoint_that_a_run_goes_on_from_is_set_aside() -> None:
    path = run("mine", 1, 2, 3) / "checkpoints"
    assert checkpoint.set_newer_aside(path / "round_00000003.h5") is None
    first = checkpoint.set_newer_aside(path / "round_00000001.h5")
    assert checkpoint.newest(path) == path / "round_00000001.h5"
    checkpoint.save(path, 2, {"x": torch.ones(1)})
    second = checkpoint.set_newer_aside(path / "round_00000001.h5")
    assert (first, second) == (path / "aside.1", path / "aside.2")
    for aside, found in ((path / "aside.1", {2: 0, 3: 0}), (path / "aside.2", {2: 1})):
        names = {f"round_{step:08d}.h5{end}" for step in found for end in ("", ".sha256")}
        assert {file.name for file in aside.iterdir()} == names
        for step, value in found.items():
            assert checkpoint.load(aside / f"round_{step:08d}.h5")["x"] == value


def train(resume: str, until: int = 6) -> None:
    """Six rounds, or fewer if the script breaks off, with a checkpoint after each."""
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    ps = mpips.connect(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        communicator=World(1).ends[0],
        run_dir="run",
        resume=resume,
        checkpoint={"every": 1, "epochs": 0, "keep": 9},
    )
    for _ in ps.epochs(6):
        for number, (x,) in enumerate(ps.batches((torch.ones(1, 2),), batch_size=1)):
            loss = net(x).sum()
            loss.backward()
            ps.step(loss)
            assert not number
        if ps.round == until:
            break
    ps.close()


def test_auto_goes_on_with_the_line_of_the_last_resume_and_every_file_says_whose_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train("no")
    folder_ = Path("run")
    whole = (folder_ / "metrics.csv").read_bytes()
    names = {f"round_{number:08d}.h5" for number in range(1, 7)}
    assert {path.name for path in folder_.glob("checkpoints/*.h5")} == names
    train("run/checkpoints/round_00000002.h5", 4)
    assert "newer than round_00000002.h5 are in" in capsys.readouterr().out
    assert max(folder_.glob("checkpoints/*.h5")).name == "round_00000004.h5", "of the line that was broken off"
    assert len(list(folder_.glob("checkpoints/aside.1/*.h5"))) == 4
    train("auto")
    resumes = [json.loads(line) for line in (folder_ / "events.jsonl").read_text().splitlines() if '"resume"' in line]
    assert [event["round"] for event in resumes] == [2, 4]
    assert (folder_ / "metrics.csv").read_bytes() == whole

    run = report.run_id(folder_)
    assert len(run) == 12
    for name in ("config.yaml", "env.json", "events.jsonl", "logs/rank_0000.log", "DONE"):
        assert run in (folder_ / name).read_text(), name
    for path in folder_.glob("checkpoints/**/*.h5"):
        assert checkpoint.load(path)["run"] == run

    train("aside")
    assert report.run_id(Path("run.1")) == run != report.run_id(folder_), "a run of its own"
    foreign = folder_ / "checkpoints" / "round_00000009.h5"
    for end in ("", ".sha256"):
        text = (Path("run.1/checkpoints") / f"round_00000006.h5{end}").read_bytes()
        foreign.with_name(foreign.name + end).write_bytes(text.replace(b"00000006.h5", b"00000009.h5") if end else text)
    with pytest.raises(SnapshotError, match=f"round_00000009.h5: of run {run}, its folder of run {report.run_id(folder_)}"):
        train("auto")


def test_a_resume_sees_what_another_run_has_written_until_the_folder_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job before, still at its end, was undone: its last rounds went aside, and were trained again."""
    train("no", 4)
    late, hidden = Path("run/checkpoints"), Path("hidden")
    hidden.mkdir()
    for path in late.glob("round_0000000[34].*"):
        path.rename(hidden / path.name)
    lock = folder.hold

    def hold(given: Path) -> None:
        for path in list(hidden.iterdir()):
            path.rename(late / path.name)
        lock(given)

    monkeypatch.setattr(folder, "hold", hold)
    train("auto")
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "resume"] == [4]
    assert not Path("run/checkpoints/aside.1").exists()


def test_a_folder_that_cannot_be_locked_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folder.fcntl, "lockf", refuse)
    folder.hold(Path("run"))
    assert "'run' cannot be locked (Function not implemented): see that no other run" in capsys.readouterr().err


FOLDS = """
import torch, mpips
for fold in range(2):
    torch.manual_seed(fold)
    model = torch.nn.Linear(2, 1)
    ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint={"every": 1, "epochs": 0, "keep": 9})
    for _ in ps.epochs(3):
        for x, in ps.batches((torch.randn(4, 2),), batch_size=4):
            loss = model(x).square().mean(); loss.backward(); ps.step(loss)
    if ps.worker == 0:
        print("weights", model.weight.tolist(), flush=True)
    ps.close()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_gone_on_with_by_the_run_of_the_script_that_it_is_of(ranks: int, mpirun: Any, tmp_path: Path) -> None:
    script = tmp_path / "folds.py"
    script.write_text(FOLDS)

    def start(*words: str) -> tuple[int, list[str], str]:
        if ranks > 1:
            done = mpirun(ranks, script, *words)
        else:
            command = [sys.executable, str(script), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(120))
        return done.returncode, [line for line in done.stdout.splitlines() if line.startswith("weights")], done.stderr

    _, whole, _ = start("--mpips.run_dir", "a")
    assert len(whole) == 2
    first, second = Path("a/checkpoints/round_00000001.h5"), Path("a-2/checkpoints/round_00000001.h5")
    shutil.copytree("a", "b")
    assert start("--mpips.resume", "b/checkpoints/round_00000001.h5", "--mpips.run_dir", "b")[:2] == (0, whole)
    assert second.exists()
    assert Path("b-2").is_dir(), "a new run, not one that goes on from the first one's checkpoint"
    status, _, said = start("--mpips.resume", str(second))
    assert status
    assert "of its script's run number 2, this is number 1" in said
    status, weights, said = start("--mpips.resume", str(first), "--mpips.run_dir", "a")
    assert (status, weights) == (2, whole[:1])
    assert "a-2', which holds a run" in said
