"""Failing well: one rank's trouble ends all ranks soon, with the cause on the screen and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, launch_environment, mpiexec_of
from tests.helpers.deadlines import patient

PREAMBLE = """
import os, sys, time
import torch
import torch.nn.functional as F
import mpips
sys.path.insert(0, {root!r})
from tests.helpers.programs import data, mlp
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
began = time.time()
"""
LOOP = """
model = mlp()
ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir="run")
for _ in ps.epochs(3):
    for x, y in ps.batches(data(), 16):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        {trouble}
        ps.step(loss)
    ps.validate(lambda: 1.0)
"""


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(PREAMBLE.format(root=str(ROOT)) + body)
    return path


def trouble(line: str) -> str:
    return LOOP.format(trouble=line)


def failing(mpirun: Any, folder: Path, body: str, n: int = 3, seconds: float = 5.0) -> subprocess.CompletedProcess[str]:
    """Run a script that marks the moment of its trouble by a file; it must be over within `seconds` from then."""
    done = mpirun(n, script(folder, body), timeout=60)
    ended = time.time()
    assert done.returncode != 0
    assert not (folder / "run" / "DONE").exists()
    if (folder / "trouble").exists():
        assert ended - (folder / "trouble").stat().st_mtime < seconds
    return done


RAISE = "if rank == {rank} and ps.round == 5: open('trouble', 'w').close(); raise ZeroDivisionError('on purpose')"


@pytest.mark.parametrize("rank", [1, 2])
def test_an_exception_ends_all_ranks_with_its_traceback(rank: int, mpirun: Any, tmp_path: Path) -> None:
    done = failing(mpirun, tmp_path, trouble(RAISE.format(rank=rank)))
    assert done.stderr.count("Traceback") == 1
    assert f"rank {rank} on" in done.stderr
    assert "ZeroDivisionError: on purpose" in done.stderr
    assert "ZeroDivisionError: on purpose" in (tmp_path / "run" / "logs" / f"rank_{rank:04d}.log").read_text()


def test_an_exception_in_a_measure_ends_all_ranks(mpirun: Any, tmp_path: Path) -> None:
    body = LOOP.format(trouble="pass").replace("lambda: 1.0", "lambda: 1 / 0 if open('trouble', 'w') else 0")
    done = failing(mpirun, tmp_path, body)
    assert "rank 1 on" in done.stderr  # worker 0, which measures
    assert "ZeroDivisionError" in done.stderr


def test_an_exception_in_a_forked_child_is_the_childs_own(mpirun: Any, tmp_path: Path) -> None:
    """As a DataLoader's worker has one when its parent is killed; the child inherits the rank's connections."""
    program = """
        import os, sys
        import torch, mpips
        model = torch.nn.Linear(4, 1)
        ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for x in ps.batches(torch.ones(16, 4), 2):
            model(x).sum().backward()
            if ps.worker == 0 and ps.round == 1:
                child = os.fork()
                if not child:
                    try:
                        raise ConnectionResetError("the parent is gone")
                    except ConnectionResetError:
                        sys.excepthook(*sys.exc_info())
                    os._exit(0)
                os.waitpid(child, 0)
            ps.step(0.0)
        ps.print("the end")
    """
    script = tmp_path / "forks.py"
    script.write_text(textwrap.dedent(program))
    done = mpirun(3, script)
    assert (done.returncode, done.stdout.count("the end")) == (0, 1), done.stderr
    assert done.stderr.count("ConnectionResetError: the parent is gone") == 1
    assert "failed" not in done.stderr


def test_sys_exit_inside_the_loop_ends_the_run_for_all(mpirun: Any, tmp_path: Path) -> None:
    line = "if rank == 1 and ps.round == 5: open('trouble', 'w').close(); sys.exit(3)"
    done = failing(mpirun, tmp_path, trouble(line))
    assert done.returncode == 3
    assert "stops after round 6: left, by rank 1" in done.stdout


def test_sys_exit_between_loops_ends_all_ranks(mpirun: Any, tmp_path: Path) -> None:
    body = LOOP.format(trouble="pass").replace(
        "    ps.validate", "    if rank == 1: open('trouble', 'w').close(); sys.exit(3)\n    ps.validate"
    )
    done = failing(mpirun, tmp_path, body, seconds=9)
    assert "worker 0 (rank 1) at the end of its script; worker 1 (rank 2) at ps.validate()" in done.stderr


def test_a_nan_is_named_by_rank_tensor_and_round_on_one_screen(mpirun: Any, tmp_path: Path) -> None:
    line = "if rank == 2 and ps.round == 4: open('trouble', 'w').close(); model[2].weight.grad[1, 2] = float('nan')"
    done = failing(mpirun, tmp_path, trouble(line))
    assert done.stderr.count("NonFiniteError: rank 2 has a NaN or Inf in the gradient of 2.weight, round 5") == 1
    assert "Traceback" not in done.stderr


MISMATCHES = {  # more of them are in tests/server/test_contract.py
    "dtype": ("model = mlp().to(torch.float64 if rank == 1 else torch.float32)", "parameter 0.weight = torch.float32"),
    "version": ("model = mlp()\nif rank == 1: mpips.__version__ = '9.9'", "version of mpips = "),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_names_rank_and_first_difference(what: str, mpirun: Any, tmp_path: Path) -> None:
    make, line = MISMATCHES[what]
    connect = "\nopen('trouble', 'w').close()\nmpips.connect(model, lambda p: torch.optim.SGD(p, lr=1.0), run_dir='run')"
    done = failing(mpirun, tmp_path, make + connect)
    assert done.stderr.count("ContractError: the ranks do not agree") == 1
    assert f"rank 0 has `{line}" in done.stderr
    assert "rank 1 has `" in done.stderr


def test_bad_configuration_is_one_line_and_status_2(mpirun: Any, solo: Any, tmp_path: Path) -> None:
    path = script(tmp_path, LOOP.format(trouble="pass"))
    alone = solo(path, "--mpips.clip", "-1")
    assert (alone.returncode, alone.stderr) == (2, "mpips: clip: given -1.0, allowed: a number above 0 (flag --mpips.clip)\n")
    many = mpirun(3, path, "--mpips.rule", "krumm")
    assert many.returncode == 2
    assert many.stderr.count("mpips: rule: given 'krumm', allowed: mean, median, ") == 1
    assert not (tmp_path / "run").exists()


REFUSALS = {
    "one rank's": ("sys.argv += ['--mpips.clip', 'x'] if rank == 2 else []",
                   "clip: given 'x', allowed: a number or null (flag --mpips.clip), on rank 2"),
    "another on one rank": ("sys.argv += ['--mpips.clip', '2'] if rank == 1 else []",
                            "clip: given None on ranks 0, 2, 2.0 on rank 1, allowed: one value on all ranks"),
    "a folder of the server's machine": ("os.environ['MPIPS_RUN_DIR'] = 'run' if rank else '/proc/none'",
                                         "run_dir: given '/proc/none', which cannot be written "),
}  # fmt: skip


def test_a_later_run_s_setting_that_one_rank_refuses_is_one_line(mpirun: Any, tmp_path: Path) -> None:
    again = (
        "\nps.close()\nmpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1), clip=-1.0 if rank == 2 else None)\n"
    )
    done = mpirun(3, script(tmp_path, LOOP.format(trouble="pass") + again), timeout=40)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("mpips: clip: given -1.0, allowed: a number above 0, on rank 2\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", REFUSALS)
def test_a_setting_is_refused_in_one_line_whichever_rank_has_it(what: str, mpirun: Any, tmp_path: Path) -> None:
    first, line = REFUSALS[what]
    body = "\nmodel = mlp(); open('trouble', 'w').close(); mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1))"
    done = failing(mpirun, tmp_path, first + body)
    assert done.returncode == 2
    said = [text for text in done.stderr.splitlines() if text.startswith("mpips: ")]
    assert len(said) == 1
    assert said[0].startswith(f"mpips: {line}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_only_the_server_s_machine_has_is_no_fault(mpirun: Any, tmp_path: Path) -> None:
    """A worker without it writes no log of its own; what only the server reads it does not look for."""
    first = "os.environ |= {'MPIPS_RUN_DIR': '/proc/none', 'MPIPS_RESUME': 'nowhere'} if rank else {'MPIPS_RUN_DIR': 'run'}\n"
    hide = "from pathlib import Path\nfrom mpips.report import run_report as report\n"
    hide += "if rank: report.log_to = lambda folder, rank, run, real=report.log_to: real(Path('/proc/none'), rank, run)\n"
    done = mpirun(3, script(tmp_path, first + hide + LOOP.format(trouble="pass").replace(', run_dir="run"', "")))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "DONE").exists()
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["rank_0000.log"]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE"])
def test_jobs_of_one_rank_each_are_refused(name: str, tmp_path: Path) -> None:
    """The launcher says four, MPI says one: each rank would believe that it is the server."""
    environment = launch_environment() | {name: "4"}
    command = [sys.executable, str(script(tmp_path, LOOP.format(trouble="pass")))]
    if name == "OMPI_COMM_WORLD_SIZE":  # Open MPI's own variable makes its MPI_Init wait for a launcher: give it one of size 1
        command = [*mpiexec_of(sys.executable), "-n", "1", "env", f"{name}=4", *command]
        environment.pop(name)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 2
    assert "4 ranks were started, but each is alone" in done.stderr
    assert ("srun --mpi=pmix" in done.stderr) == (name == "SLURM_STEP_NUM_TASKS")
    assert ("flux run -o pmi=pmix" in done.stderr) == (name == "FLUX_JOB_SIZE")
    assert "\0" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_ends_the_job_and_leaves_a_checkpoint(mpirun: Any, tmp_path: Path) -> None:
    from mpips import checkpoint

    line = "if rank == 1 and ps.round == 25: open('trouble', 'w').close(); os.kill(os.getpid(), 9)"
    failing(mpirun, tmp_path, trouble(line), seconds=10)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest)["round"] == 20


def test_a_full_disk_is_one_clear_error(solo: Any, tmp_path: Path) -> None:
    body = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nimport signal\n"
    body += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + LOOP.format(trouble="pass")
    done = solo(script(tmp_path, body))
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "File too large" in done.stderr


def test_nothing_is_left_running(mpirun: Any, tmp_path: Path) -> None:
    path = script(tmp_path, trouble(RAISE.format(rank=1)))
    mpirun(3, path)
    assert subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True).stdout == ""


def test_usr1_in_one_process_checkpoints_and_says_75(tmp_path: Path) -> None:
    line = "if ps.round == 7: os.kill(os.getpid(), 10)"
    assert signal.SIGUSR1 == 10
    path = script(tmp_path, trouble(line))
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=patient(60), env={**os.environ}
    )
    assert done.returncode == 75
    assert "start again with --mpips.resume auto" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "round_00000008.h5").exists()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(
    "first",
    [
        "os.environ['MPIPS_LAUNCH_DIR'] = '/of/another/machine'",
        "os.close(2)",
        "sys.stderr = None",
        "sys.stdout = open('/dev/full', 'w'); print('lost')",
    ],
)
def test_whatever_keeps_a_rank_from_saying_why_it_ends_all_end(mpirun: Any, tmp_path: Path, first: str) -> None:
    """A launcher's folder of another machine, closed streams, a full disk."""
    line = f"if rank == 1 and ps.round == 5: open('trouble', 'w').close(); {first}; raise ZeroDivisionError('on purpose')"
    failing(mpirun, tmp_path, trouble(line))
    assert "ZeroDivisionError: on purpose" in (tmp_path / "run" / "logs" / "rank_0001.log").read_text()


MOVED_AND_SAVED = "os.rename('run', 'moved') if rank == 0 else None; ps.save()"
MOVED_AND_CLOSED = MOVED_AND_SAVED.replace("save", "close")  # the others have gone on to their end by then
CAUGHT = """
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ps = mpips.connect(model, optimizer, run_dir="run", server_trains={trains})
def measure():
    raise FileNotFoundError("no validation data")
x, y = data()
F.cross_entropy(model(x), y).backward()
optimizer.step()
try:
    {call}
except Exception as error:
    open("trouble", "w").close()
    print("caught", error, flush=True)
"""


@pytest.mark.parametrize(
    ("call", "trains"),
    [("ps.validate(measure)", False), ("ps.validate(measure)", True), (MOVED_AND_SAVED, True), (MOVED_AND_CLOSED, True)],
)
def test_what_a_script_catches_on_one_rank_ends_all(mpirun: Any, tmp_path: Path, call: str, trains: bool) -> None:
    """The others wait for the rest of the call, where this rank does not come any more."""
    done = failing(mpirun, tmp_path, CAUGHT.format(trains=trains, call=call), seconds=10)
    assert "cannot go on after what the script has caught on this rank" in done.stdout + done.stderr
