from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpips import checkpoint, folder
from mpips.config import ConfigError


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
        folder.check_resume("no.h5")


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
    assert folder.folders(str(path), "no") == (path, None)


def test_a_folder_is_held_by_one_process() -> None:
    Path("run").mkdir()
    folder.hold(Path("run").absolute())
    folder.hold(Path("run").absolute())  # of the same process
    code = "from pathlib import Path; from mpips import folder; folder.hold(Path('run').absolute())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert other.returncode
    assert f"which process {os.getpid()} on {socket.gethostname()} writes to" in other.stderr


PROGRAM = """
import torch, mpips
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ps = mpips.connect(model, optimizer)
for _ in range(3):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""


def test_a_run_is_not_written_over() -> None:
    """The second one is refused in one line and leaves all as it was, also where the folder cannot be made."""
    Path("train.py").write_text(PROGRAM)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    Path("run").mkdir()
    assert start("--mpips.run_dir", "run").returncode == 0, "an empty folder will do"
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    Path("file").touch()
    for given, why in (("run", "holds a run"), ("file", "cannot be written")):
        second = start("--mpips.run_dir", given)
        assert second.returncode == 2
        (line,) = (second.stdout + second.stderr).splitlines()
        assert why in line
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert start("--mpips.run_dir", "run", "--mpips.resume", "auto").returncode == 0
