from __future__ import annotations

import os
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
    first = folder.new_folder()
    first.mkdir(parents=True)
    second = folder.new_folder()
    assert first != second
    assert first.parent == Path("runs").absolute()
    assert first.name.endswith("-test"), "named after the script"


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
