"""The source distribution holds what the repository holds, so that whoever unpacks it can run the tests and the examples."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.deadlines import patient

ROOT = Path(__file__).resolve().parent.parent
OF_THE_REPOSITORY = {".ci/run", ".gitignore"}  # nothing that a release needs


def tracked() -> list[str]:
    """The files that git holds, and that are there."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git repository here to compare the sdist with")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=patient(60)
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_sdist_holds_what_git_holds(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the package `build` makes the sdist; it is in the extra dev")
    expected = tracked()
    tree = tmp_path / "tree"  # a copy, as a build leaves files behind, and takes along what lies about
    for name in expected:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    (tree / "examples" / "__pycache__").mkdir()
    (tree / "examples" / "__pycache__" / "digits.cpython-311.pyc").write_bytes(b"")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as held:
        names = {member.name.partition("/")[2] for member in held.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or name.startswith("mpips.egg-info/")}  # by the build
    assert names - made == set(expected) - OF_THE_REPOSITORY
