"""The job scripts of pbs/, lsf/ and flux/: each is run for real, by bash, under commands that play the scheduler's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpips.process.environment import LAUNCHERS
from tests.conftest import ROOT, launch_environment
from tests.helpers.one_node_slurm import wait

FILES = [file for folder in ("pbs", "lsf", "flux") for file in sorted((ROOT / folder).iterdir())]
COMMON = "# ---- from here on"
PREFIX = {"pbs": "#PBS ", "lsf": "#BSUB ", "flux": "# flux: "}
STARTS = {"openmpi": "mpirun", "mpirun": "mpirun", "pals": "mpiexec", "jsrun": "jsrun", "batch": "flux"}
# What the launchers of these commands do that matters here: they note what they were asked, start one rank, hand USR1 to it.
LAUNCHER = """#!/bin/bash
echo "$(basename "$0") $*" >>asked
until [[ $1 == python ]]; do shift; done
echo $$ >step.pid
exec "$@"
"""
FLUX = """#!/bin/bash
case "$1 $2" in
  "getattr jobid") echo f7 ;;
  "getattr size") echo 1 ;;
  "job id") echo 7 ;;
  "job last") echo f8 ;;
  "job kill") kill -"${3#--signal=}" "$(cat step.pid)" ;;
  "--parent batch") echo "flux $* $run_dir $layout $args" >>asked ;;
  *) set -- "$@"; source ./bin/launcher ;;
esac
"""
QSUB = """#!/bin/bash
echo "qsub $* $run_dir $layout $args" >>asked
exit "$(cat qsub.status 2>/dev/null || echo 0)"
"""
QSTAT = """#!/bin/bash
printf 'Job Id: %s\\n    Resource_List.place = pack\\n    Resource_List.walltime = %s\\n' "$2" "$(cat walltime)"
"""
RANK = """#!/bin/bash
echo "$OMP_NUM_THREADS" >threads
printf '%s\\n' "$@" >rank
trap 'exit 75' USR1
touch started
[[ -e ends ]] && exit "$(cat ends)"
while true; do sleep 0.05; done
"""
KILLED = """#!/bin/bash
left=$(cat deaths)
echo $((left - 1)) >deaths
((left <= 0)) || kill -KILL $$
"""
DEAF = RANK.replace("exit 75", ":")


class Cluster:
    """A folder with a scheduler's commands, in which one job script is run."""

    def __init__(self, folder: Path, file: Path, rank: str | None = RANK) -> None:
        self.folder, self.kind, self.launcher = folder, file.parent.name, STARTS[file.stem]
        commands = folder / "bin"
        commands.mkdir()
        written = {"launcher": LAUNCHER, self.launcher: FLUX if self.kind == "flux" else LAUNCHER, "qsub": QSUB, "qstat": QSTAT}
        for name, text in (written | ({"python": rank} if rank else {})).items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.script = folder / file.name
        self.script.write_text(file.read_text().replace("after 90 kill", "after 1 kill"))
        (folder / "walltime").write_text("10:00:00")
        (folder / "nodes").write_text("a\na\na\na\nb\nb\n")
        path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.variables = launch_environment() | {"PATH": path, "OMP_NUM_THREADS": "2"}
        self.variables |= {"PBS_JOBID": "7.head", "PBS_O_WORKDIR": str(folder), "PBS_NODEFILE": str(folder / "nodes")}
        self.variables |= {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "6"}

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        given = {"args": " ".join(words)} if words and self.kind != "flux" else {}
        return subprocess.Popen(
            ["bash", self.script, *(words if self.kind == "flux" else ())],
            cwd=self.folder,
            env=self.variables | given | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, job: subprocess.Popen[str], timeout: float = 20) -> str:
        """Wait for its end; nothing of it is left."""
        try:
            said, _ = job.communicate(timeout=timeout)
            wait(lambda: not self.left(job), 2, "the end of all processes")
        finally:
            for pid in self.left(job):
                os.kill(pid, signal.SIGKILL)
        return said

    def left(self, job: subprocess.Popen[str]) -> list[int]:
        found = subprocess.run(["pgrep", "-s", str(job.pid)], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


def each(**keywords: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}", **keywords)  # type: ignore[arg-type]


@each()
def test_file_is_sound_shell(file: Path) -> None:
    assert subprocess.run(["bash", "-n", file], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):  # SC2329: it does not see that a trap calls a function
        assert subprocess.run(["shellcheck", "-e", "SC2329", file], capture_output=True, text=True).stdout == ""


def test_files_have_their_common_part_in_common() -> None:
    assert len(FILES) == 5
    assert all(COMMON in file.read_text() for file in FILES)
    assert len({file.read_text().partition(COMMON)[2] for file in FILES}) == 1


@each()
def test_the_scheduler_is_told_of_the_signal_the_limit_and_the_restart(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line.startswith(PREFIX[file.parent.name])]
    told = " ".join(line.split("#")[1] if file.parent.name != "flux" else line for line in lines)
    expected = {
        "pbs": ["-l walltime=01:00:00", "-r y"],
        "lsf": ["-W 1:00", "-wa USR1", "-wt 2", "-Q 75", "-r"],
        "flux": ["--time-limit=1h", "--signal=SIGUSR1@120s"],
    }
    for word in expected[file.parent.name]:
        assert word in told
    # Directives end at the first line that is none: no line of shell comes before the last.
    text = file.read_text()
    assert text.rindex("\n" + PREFIX[file.parent.name]) < text.index("\nlayout=")


@each()
@pytest.mark.parametrize("layout", ["cpu", "gpu", "server"])
def test_ranks_are_started_as_the_layout_says(file: Path, layout: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, file)
    (tmp_path / "ends").write_text("0")
    job = cluster.start("train.py", "--name", "'a b'" if file.parent.name != "flux" else "a b", layout=layout)
    assert "preempted" not in cluster.end(job)
    assert job.returncode == 0
    (asked,) = cluster.asked()
    given = (tmp_path / "rank").read_text().splitlines()
    own = ["-u", "train.py", "--name", "a b", "--mpips.resume", "auto", "--mpips.run_dir", "runs/mpips-7"]
    own += ["--mpips.server_trains=true"] if layout == "gpu" else []
    assert given[: len(own)] == own
    assert (tmp_path / "threads").read_text() == "2\n"
    counts = {
        "mpirun": "-n 6" if layout != "server" else ": --bind-to none -n 5" if "--bind-to none -n 5" in asked else ": -n 5",
        "mpiexec": "-n 6 --ppn 4" if layout != "server" else ": -n 5 --ppn 4",
        "jsrun": "--nrs 1 --rs_per_host 1 --tasks_per_rs 4",
        "flux": "run --nodes=1 --tasks-per-node=4",
    }
    assert counts[cluster.launcher] in asked
    assert ("CUDA_VISIBLE_DEVICES=" in asked) == (layout == "server")
    if cluster.launcher in ("mpirun", "mpiexec") and layout == "server":
        assert asked.index("-n 1 ") < asked.index("env CUDA_VISIBLE_DEVICES= python") < asked.index(" : ")
    if cluster.launcher == "jsrun":
        assert ("--gpu_per_rs 0" in asked) == (layout == "cpu")


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in ("jsrun", "batch")], ids=lambda file: file.stem)
def test_the_first_rank_alone_serves_without_a_gpu(file: Path, tmp_path: Path) -> None:
    (line,) = [line for line in file.read_text().splitlines() if "train=(bash -c" in line]
    name = next(launcher.rank for launcher in LAUNCHERS if launcher.rank in line)
    seen = {}
    for rank in ("0", "1"):
        shell = f'train=(printenv CUDA_VISIBLE_DEVICES)\n{line}\n"${{train[@]}}"'
        variables = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "0,1", name: rank}
        seen[rank] = subprocess.run(["bash", "-c", shell], env=variables, capture_output=True, text=True).stdout
    assert seen == {"0": "\n", "1": "0,1\n"}


@each()
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_job_is_started_again(file: Path, number: signal.Signals, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, file)
    job = cluster.start("train.py", "--epochs", "50", layout="gpu")
    wait((tmp_path / "started").exists, 10, "the rank")
    job.send_signal(number)
    said = cluster.end(job)
    assert job.returncode == 75
    assert "mpips: job 7 was preempted (status 75) and goes on later from runs/mpips-7" in said
    again = {
        "pbs": [f"qsub -v run_dir,args,layout,self pbs/{file.name} runs/mpips-7 gpu train.py --epochs 50"],
        "lsf": [],  # the exit status does it
        "flux": [f"flux --parent batch {cluster.script} runs/mpips-7 gpu train.py --epochs 50 "],
    }
    assert cluster.asked()[1:] == again[cluster.kind]


@each()
def test_a_step_that_does_not_end_from_the_signal_is_killed_and_the_job_started_again(file: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, file, DEAF)
    job = cluster.start()
    wait((tmp_path / "started").exists, 10, "the rank")
    job.send_signal(signal.SIGUSR1)
    said = cluster.end(job)
    assert (job.returncode, "was preempted (status 137)" in said) == (75, True)
    assert len(cluster.asked()) == (1 if cluster.kind == "lsf" else 2)


@each()
def test_a_failing_job_is_not_started_again(file: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, file)
    (tmp_path / "ends").write_text("3")
    job = cluster.start()
    assert "preempted" not in cluster.end(job)
    assert job.returncode == 3
    assert len(cluster.asked()) == 1


@each()
@pytest.mark.parametrize(("deaths", "status", "starts"), [(1, 0, 2), (9, 137, 4)])
def test_when_a_rank_is_killed_the_ranks_start_again_a_few_times(
    file: Path, deaths: int, status: int, starts: int, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, file, KILLED)
    (tmp_path / "deaths").write_text(f"{deaths}\n")
    job = cluster.start()
    said = cluster.end(job)
    assert (job.returncode, "preempted" in said) == (status, False)
    line = "mpips: a rank was killed (status 137): the ranks start again from the newest checkpoint in runs/mpips-7"
    assert said.count(line) == starts - 1
    assert len([asked for asked in cluster.asked() if not asked.startswith("qsub")]) == starts


@pytest.mark.parametrize("file", FILES[:2], ids=lambda file: file.stem)
def test_pbs_jobs_send_themselves_the_signal_before_the_time_limit(file: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, file)
    (tmp_path / "walltime").write_text("00:02:01")
    (tmp_path / "qsub.status").write_text("1")
    job = cluster.start()
    said = cluster.end(job)
    assert job.returncode == 75
    assert "To go on, submit it with the variable run_dir=runs/mpips-7" in said


@pytest.mark.parametrize("limit", ["00:02:00", "", "unknown"])
def test_a_pbs_job_without_a_known_limit_is_not_signalled(limit: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, FILES[0])
    (tmp_path / "walltime").write_text(limit)
    (tmp_path / "ends").write_text("0")
    job = cluster.start()
    assert f"no walltime above 120 s ('{limit}')" in cluster.end(job)
    assert job.returncode == 0


def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import time, torch, mpips
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.01))
for _ in ps.epochs(4):
    for x, in ps.batches((torch.randn(32, 4),), 4):
        loss = model(x).pow(2).mean()
        loss.backward()
        ps.step(loss)
        time.sleep(0.05)
"""
    )
    cluster = Cluster(tmp_path, ROOT / "pbs" / "openmpi.pbs", rank=None)
    rows = tmp_path / "runs" / "mpips-7" / "metrics.csv"
    job = cluster.start("train.py")
    wait(lambda: rows.exists() and len(rows.read_text().splitlines()) > 5, 60, "round 5")
    job.send_signal(signal.SIGUSR1)
    cluster.end(job, 60)
    assert job.returncode == 75
    job = cluster.start("train.py", PBS_JOBID="8.head", run_dir="runs/mpips-7")  # as qsub -v hands it on
    cluster.end(job, 60)
    assert job.returncode == 0
    assert (rows.parent / "DONE").exists()
    assert [int(line.split(",")[0]) for line in rows.read_text().splitlines()[1:]] == list(range(1, 33))
