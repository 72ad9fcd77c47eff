"""The sbatch files of slurm/, submitted to a real SLURM that is started here for the purpose."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpips import checkpoint
from mpips.comm import SERVER
from tests.conftest import ROOT, launch_environment
from tests.helpers import one_node_slurm
from tests.helpers.deadlines import patient
from tests.helpers.one_node_slurm import Slurm, wait

FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
COMMON = "# ---- from here on"
EPOCHS = 8
ALL_GPUS = {"0,1,2,3", "None"}  # CUDA_VISIBLE_DEVICES of a rank that may reach all GPUs of its node
SCRIPT = f"""
import argparse, random, time
import numpy
import torch
import torch.nn.functional as F
import mpips

parser = argparse.ArgumentParser()
parser.add_argument("--nap", type=float, default=0.0, help="seconds in each round")
mpips.add_arguments(parser)
args = parser.parse_args()

torch.manual_seed(0)
random.seed(0)
numpy.random.seed(0)
x = torch.randn(96, 8)
y = x.sum(1, keepdim=True).sin()
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(16, 1))
ps = mpips.connect(model, torch.optim.Adam(model.parameters(), lr=0.01))
for _ in ps.epochs({EPOCHS}):
    for some_x, some_y in ps.batches((x, y), 8):
        loss = F.mse_loss(model(some_x), some_y)
        loss.backward()
        ps.step(loss)
        time.sleep(args.nap)
"""
STARTS_LATE = (  # the first time it is still importing when the signal comes
    """
import os, pathlib, time
pathlib.Path("imports").touch()
time.sleep(0 if "SLURM_RESTART_COUNT" in os.environ else 60)
"""
    + SCRIPT
)
KILLED_ONCE = SCRIPT.replace(
    "        time.sleep(args.nap)\n",
    """
        if ps.worker == 1 and ps.round == 15 and not pathlib.Path("died").exists():
            pathlib.Path("died").touch()
            os.kill(os.getpid(), 9)
""",
).replace("import argparse", "import os, pathlib, argparse")
NOTES_ITS_PLACE = (  # before connect, in which the server stays
    """
import os
print("place", os.environ["SLURM_PROCID"], os.environ["SLURMD_NODENAME"], os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""
    + SCRIPT
)


def mpi_flag() -> str:
    """What srun must be told for the MPI that is installed."""
    try:
        distribution("mpich")
    except PackageNotFoundError:
        return "--mpi=pmix"
    return "--mpi=pmi2"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := one_node_slurm.missing():
        pytest.skip(why)
    beside_python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the jobs' `python` is this one
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), launch_environment() | {"PATH": beside_python})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Job:
    """One submitted job in a folder of its own."""

    def __init__(self, slurm: Slurm, folder: Path, file: str, *flags: str, options: tuple[str, ...] = (), text: str = SCRIPT):
        self.slurm, self.folder = slurm, folder
        (folder / "train.py").write_text(text)
        template = (ROOT / "slurm" / file).read_text()
        (folder / file).write_text(template.replace("--mpi=pmix", mpi_flag()))  # as a user of MPICH edits it
        done = slurm.run("sbatch", "--parsable", *options, file, "train.py", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        self.run_dir = folder / "runs" / f"mpips-{self.id}"

    def says(self) -> str:
        return (self.folder / f"mpips-{self.id}.out").read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.run_dir / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]

    def rounds(self) -> list[int]:
        file = self.run_dir / "metrics.csv"
        return [int(line.partition(",")[0]) for line in file.read_text().splitlines()[1:]] if file.exists() else []

    def state(self) -> str:
        return self.slurm.field(self.id, "JobState")

    def places(self) -> dict[int, tuple[str, str]]:
        """Each rank's node and the GPUs that it sees; of the script NOTES_ITS_PLACE."""
        said = [line.split()[1:] for line in self.says().splitlines() if line.startswith("place ")]
        return {int(rank): (node, gpus) for rank, node, gpus in said}

    def preempt(self) -> None:
        """Send what `--signal=B:USR1@120` sends, and let the requeued job start soon, not after SLURM's two minutes.

        Not at once: a slurmd takes a job that starts in the second in which it was killed for the killed one.
        """
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.id)
        self.wait(lambda: self.state() == "PENDING", "the requeue")
        self.slurm.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")

    def end(self) -> str:
        """Wait until the job has ended, and return how."""
        self.wait(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
        return self.state()

    def succeed(self) -> None:
        """Wait until the job has ended, as it should."""
        assert self.end() == "COMPLETED", self.says()
        assert (self.run_dir / "DONE").exists(), self.says()

    def wait(self, happened: Any, what: str) -> None:
        try:
            wait(happened, 60, what)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.says()}\n{self.slurm.logs()}")

    def state_at_the_end(self) -> dict[str, str]:
        """The SHA-256 of every array in the last checkpoint: weights, optimizer state, metrics, random streams."""
        newest = checkpoint.newest(self.run_dir / "checkpoints")
        assert newest
        return dict(_digests("", checkpoint.load(newest)))


def _digests(path: str, tree: Any) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _digests(f"{path}/{key}", branch)
    elif isinstance(tree, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(tree)
        yield path, hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


@pytest.mark.slurm
def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_happened(slurm: Slurm, tmp_path: Path) -> None:
    for name in ("whole", "preempted"):
        (tmp_path / name).mkdir()
    whole = Job(slurm, tmp_path / "whole", "cpu.sbatch", options=("--ntasks-per-node=3",))
    whole.succeed()
    assert [event["size"] for event in whole.events("start")] == [3]
    every_round = list(range(1, 6 * EPOCHS + 1))
    assert whole.rounds() == every_round

    job = Job(slurm, tmp_path / "preempted", "cpu.sbatch", "--nap", "0.15", options=("--ntasks-per-node=3",))
    job.wait(lambda: len(job.rounds()) > 8, "round 8")
    job.preempt()
    job.succeed()
    assert [event["reason"] for event in job.events("stop")] == ["preempted"]
    (resumed,) = job.events("resume")
    assert 8 < resumed["round"] < len(every_round)
    assert job.rounds() == every_round  # none was done twice
    assert slurm.field(job.id, "Restarts") == "1"
    assert len(job.state_at_the_end()) > 20
    assert job.state_at_the_end() == whole.state_at_the_end()


@pytest.mark.slurm
def test_a_signal_before_the_script_has_connected_loses_nothing(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "cpu.sbatch", options=("--ntasks-per-node=1",), text=STARTS_LATE)
    job.wait((tmp_path / "imports").exists, "the start of the script")
    job.preempt()
    job.succeed()
    assert "was preempted (status 138)" in job.says()
    assert len(job.rounds()) == 12 * EPOCHS


@pytest.mark.slurm
def test_a_failing_job_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "cpu.sbatch", options=("--ntasks-per-node=1",), text="raise SystemExit(3)")
    assert (job.end(), slurm.field(job.id, "ExitCode")) == ("FAILED", "3:0")
    assert slurm.field(job.id, "Restarts") == "0"


@pytest.mark.slurm
def test_one_job_spans_two_gpu_nodes(slurm: Slurm, tmp_path: Path) -> None:
    if len(slurm.nodes) < 2:
        pytest.skip("no second host name: unshare --uts is not allowed here")
    job = Job(slurm, tmp_path, "gpu-nodes.sbatch", options=("--ntasks-per-node=2",), text=NOTES_ITS_PLACE)
    job.succeed()
    (start,) = job.events("start")
    assert (start["size"], start["workers"], start["server_trains"]) == (4, 4, True)
    first, second = slurm.nodes
    places = job.places()
    assert {rank: node for rank, (node, _) in places.items()} == {0: first, 1: first, 2: second, 3: second}
    assert {gpus for _, gpus in places.values()} <= ALL_GPUS


@pytest.mark.slurm
def test_a_heterogeneous_job_has_its_server_on_one_node_and_its_workers_on_another(slurm: Slurm, tmp_path: Path) -> None:
    if len(slurm.nodes) < 2:
        pytest.skip("no second host name: unshare --uts is not allowed here")
    if mpi_flag() != "--mpi=pmix":
        pytest.skip("shown with PMIx only")
    job = Job(slurm, tmp_path, "cpu-server-gpu-workers.sbatch", text=NOTES_ITS_PLACE)
    # DONE is what tells that a run has ended well: SLURM 22.05's srun now and then stays when all tasks of a heterogeneous
    # step have ended (both slurmds then say "done with job"), so the end of the job is not waited for.
    job.wait((job.run_dir / "DONE").exists, "DONE")
    job.wait(lambda: len(job.places()) == 5, "the output of 5 ranks")
    slurm.run("scancel", job.id)
    (start,) = job.events("start")
    assert (start["size"], start["workers"], start["server_trains"]) == (5, 4, False)
    places = job.places()
    server = places.pop(SERVER)
    assert server[1] == "None"
    (elsewhere,) = set(slurm.nodes) - {server[0]}
    assert {rank: node for rank, (node, _) in places.items()} == dict.fromkeys((1, 2, 3, 4), elsewhere)
    assert {gpus for _, gpus in places.values()} <= ALL_GPUS


@pytest.mark.slurm
def test_srun_without_the_right_mpi_is_refused_at_once_with_the_fix(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    began = time.monotonic()
    done = slurm.run("srun", "--ntasks=2", "--mpi=none", "python", "train.py", cwd=tmp_path)
    assert time.monotonic() - began < patient(20)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mpips:")]
    assert "2 ranks were started, but each is alone" in line
    assert "srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for MPICH" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_slurm_accepts(slurm: Slurm, file: Path) -> None:
    if "--nodes=2" in file.read_text() and len(slurm.nodes) < 2:
        pytest.skip("no second host name: unshare --uts is not allowed here")
    done = slurm.run("sbatch", "--test-only", file)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_is_sound_shell(file: Path) -> None:
    assert subprocess.run(["bash", "-n", file], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", file], capture_output=True, text=True).stdout == ""


def test_files_have_their_common_part_in_common() -> None:
    assert len(FILES) == 4
    assert len({file.read_text().partition(COMMON)[2] for file in FILES}) == 1
    assert all(COMMON in file.read_text() for file in FILES)


def test_a_step_that_does_not_end_from_the_signal_is_killed_and_the_job_requeued(tmp_path: Path) -> None:
    job = tmp_path / "job.sbatch"
    job.write_text((ROOT / "slurm" / "cpu.sbatch").read_text().replace("sleep 90", "sleep 1"))
    (tmp_path / "srun").write_text("#!/bin/bash\ntrap '' USR1\ntouch started\nexec sleep 30\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$*" > asked\n')
    for command in ("srun", "scontrol"):
        (tmp_path / command).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NAME": "mpips", "SLURM_JOB_ID": "7"}
    shell = subprocess.Popen(["bash", job], cwd=tmp_path, env=variables)
    try:
        wait((tmp_path / "started").exists, 10, "srun")
        shell.send_signal(signal.SIGUSR1)
        assert shell.wait(10) == 128 + signal.SIGKILL
    finally:
        shell.kill()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("deaths", "status", "starts"), [(1, 0, 2), (9, 137, 4)])
def test_when_a_rank_is_killed_the_ranks_start_again_a_few_times(tmp_path: Path, deaths: int, status: int, starts: int) -> None:
    srun = f"#!/bin/bash\necho >>starts\n(($(wc -l <starts) > {deaths})) || kill -KILL $$\n"
    (tmp_path / "srun").write_text(srun)
    (tmp_path / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NAME": "mpips", "SLURM_JOB_ID": "7"}
    bash = ["bash", str(ROOT / "slurm" / "cpu.sbatch")]
    done = subprocess.run(bash, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=patient(30))
    assert done.returncode == status
    line = "mpips: a rank was killed (status 137): the ranks start again from the newest checkpoint in runs/mpips-7"
    assert done.stdout.count(line) == starts - 1
    assert (tmp_path / "starts").read_text().count("\n") == starts
    assert "requeue" not in done.stderr


@pytest.mark.slurm
def test_a_killed_rank_costs_no_job(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "cpu.sbatch", options=("--ntasks-per-node=3",), text=KILLED_ONCE)
    job.succeed()
    assert "mpips: a rank was killed (status 137)" in job.says()
    (resumed,) = job.events("resume")
    assert resumed["round"] == 12
    assert job.rounds() == list(range(1, 6 * EPOCHS + 1))
    assert slurm.field(job.id, "Restarts") == "0"


@pytest.mark.parametrize(("status", "says"), [(75, True), (1, False), (0, False)])
def test_where_scontrol_is_missing_the_job_says_how_to_go_on(tmp_path: Path, status: int, says: bool) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(f"#!{shutil.which('bash')}\nexit {status}\n")
    (commands / "srun").chmod(0o755)
    variables = {"PATH": str(commands), "SLURM_JOB_NAME": "mpips", "SLURM_JOB_ID": "7"}
    bash = [str(shutil.which("bash")), str(ROOT / "slurm" / "cpu.sbatch")]
    done = subprocess.run(bash, env=variables, capture_output=True, text=True, timeout=patient(30))
    assert done.returncode == status
    assert ("submit it again with the flag --mpips.run_dir runs/mpips-7" in done.stderr) == says
