"""What a process owes before it has a run: open streams, a remembered SIGUSR1, and no rank that waits for one that is gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IMPORTABLE, ROOT, launch_environment, mpiexec_of, run
from tests.helpers.deadlines import patient
from tests.promises.test_failure import LOOP, PREAMBLE, script, trouble
from tests.test_under_mpi import MPICH


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=patient(60),
    )


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_no_file_of_a_run_gets_the_number_of_a_stream(closed: tuple[int, ...], tmp_path: Path) -> None:
    close = "".join(f"os.close({number})\n" for number in closed)
    said = tmp_path / "said"
    program = f"import os\n{close}import mpips\nfile = open({str(said)!r}, 'w')\nprint(file.fileno(), file=file)\nprint('x')"
    python(program)
    assert int(said.read_text()) > 2


def test_streams_that_are_none_can_be_written_to() -> None:
    inner = "import os, mpips, sys\nsys.stdout.write('lost')\nsys.stderr.write('lost')\nassert sys.stdin.read() == ''"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, inner], timeout=patient(60))
    assert done.returncode == 0


def test_emit_drops_what_cannot_be_written_and_goes_on() -> None:
    full = "import os, mpips\nfrom mpips.process.lifecycle import emit\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    done = python(full + "emit(1, 'x' * 99999)\nemit(2, 'l\\udce4ufe')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "l\udce4ufe")


def test_drain_waits_until_the_pipe_is_read() -> None:
    """MPICH's mpiexec drops what it has not read when a rank aborts."""
    program = "import mpips, sys\nfrom mpips.process.lifecycle import drain\nsys.stderr.write('last words')\ndrain()"
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    written = select.poll()  # select.select refuses descriptors above 1,023
    written.register(child.stderr, select.POLLIN)
    assert written.poll(60_000)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    assert child.stderr.read() == "last words"
    assert child.wait(60) == 0


@pytest.mark.parametrize("moment", ["import", "connect"])
def test_usr1_before_the_first_round_ends_with_75_and_a_checkpoint(moment: str, solo: Any, tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), 10)\n"
    body = kill + LOOP.format(trouble="pass")
    if moment == "connect":
        body = LOOP.format(trouble="pass").replace("for _ in", kill + "for _ in")
    done = solo(script(tmp_path, body))
    assert done.returncode == 75
    assert (tmp_path / "run" / "checkpoints" / "round_00000001.h5").exists()


def test_usr1_again_and_again_until_the_end_is_one_preemption(tmp_path: Path) -> None:
    program = """
        import torch, mpips
        model = torch.nn.Linear(4, 1)
        ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.1))
        print("connected", flush=True)
        for x in ps.batches(torch.ones(100_000, 4), 2):
            model(x).sum().backward()
            ps.step(0.0)
    """
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(program))
    environment = launch_environment() | {"PYTHONPATH": os.pathsep.join(map(str, IMPORTABLE))}
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout
        while child.stdout.readline() != b"connected\n":
            pass
        while child.poll() is None:
            child.send_signal(signal.SIGUSR1)
            time.sleep(0.001)
    assert child.returncode == 75


def test_a_script_that_handles_usr1_itself_is_left_to_it(solo: Any, tmp_path: Path) -> None:
    path = script(tmp_path, "")
    own = "import signal\nsignal.signal(10, lambda *_: print('own'))\n"
    path.write_text(own + PREAMBLE.format(root=str(ROOT)) + "os.kill(os.getpid(), 10)\n")
    assert solo(path).stdout == "own\n"


FORK = (
    "if ps.round == 3:\n            child = os.fork()\n            if child == 0: sys.exit(0)\n            os.waitpid(child, 0)"
)


def test_a_forked_child_that_ends_takes_no_part_in_the_run(mpirun: Any, tmp_path: Path) -> None:
    done = mpirun(3, script(tmp_path, trouble(FORK)), timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
@pytest.mark.parametrize("how", ["sys.exit(0)", "raise ValueError('early')"])
def test_a_rank_that_ends_before_connect_ends_all(how: str, library: str, mpirun: Any, tmp_path: Path) -> None:
    if library == "mpich" and not MPICH.exists():
        pytest.skip("no Python with MPICH")
    body = f"if rank == 1:\n    open('trouble', 'w').close()\n    {how}\n" + LOOP.format(trouble="pass")
    done = mpirun(3, script(tmp_path, body), timeout=60, python=str(MPICH) if library == "mpich" else sys.executable)
    ended = time.time()
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr or "ValueError: early" in done.stderr
    assert ended - (tmp_path / "trouble").stat().st_mtime < 10
    assert not (tmp_path / "run" / "DONE").exists()


BARRIER = "MPI.COMM_WORLD.Barrier()"
ASKED = "from mpips.comm import mpi; mpi._library()"  # by which the end of MPI is ours


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
@pytest.mark.parametrize(
    ("before", "others"), [("pass", "pass"), ("pass", BARRIER), ("process.join()", BARRIER), (ASKED, "pass")]
)
def test_an_exception_ends_all_where_mpi_has_begun(before: str, others: str, library: str, mpirun: Any, tmp_path: Path) -> None:
    """MPI's finalisation waited for the others, and so they for this rank."""
    if library == "mpich" and not MPICH.exists():
        pytest.skip("no Python with MPICH")
    begun = f"from mpi4py import MPI\nfrom mpips.process import lifecycle as process\n{before}\n"
    body = f"{begun}if rank == 1: raise ValueError('early')\n{others}\n"
    text = script(tmp_path, body + LOOP.format(trouble="pass"))
    done = mpirun(3, text, timeout=40, python=str(MPICH) if library == "mpich" else sys.executable)
    assert done.returncode == 1
    assert "ValueError: early" in done.stderr
    assert "rank 1 on " in done.stderr
    assert not (tmp_path / "run" / "DONE").exists()


def test_under_mpich_too_the_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    if not MPICH.exists():
        pytest.skip("no Python with MPICH")
    body = trouble("if (ps.worker, ps.round) == (1, 3): os.kill(os.getpid(), 9)")
    done = run([str(MPICH.with_name("mpips")), "run", "-n", "4", str(script(tmp_path, body))], tmp_path, timeout=60)
    assert done.returncode == 1
    log = tmp_path / "run" / "logs" / "rank_0002.log"
    assert done.stderr.endswith(f"mpips: rank 2 failed first; its log: {log}\nended by signal 9: Killed\n")


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
def test_a_worker_may_take_long_to_end_and_its_status_counts(library: str, mpirun: Any, tmp_path: Path) -> None:
    """MPICH's mpiexec kills the others when a process has gone without the MPI library's own handlers at its end."""
    if library == "mpich" and not MPICH.exists():
        pytest.skip("no Python with MPICH")
    late = "import atexit, os, time\nif os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '2': "
    path = script(tmp_path, LOOP.format(trouble="pass") + "sys.exit(3 * (rank == 2))\n")
    path.write_text(late + "atexit.register(time.sleep, 1)\n" + path.read_text())  # registered first, and so the last to run
    done = mpirun(3, path, timeout=60, python=str(MPICH) if library == "mpich" else sys.executable)
    assert done.returncode == 3


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
@pytest.mark.parametrize("closes", ["ps.close()", "pass"])
def test_a_script_may_finalize_mpi_itself(closes: str, library: str, mpirun: Any, tmp_path: Path) -> None:
    """Rank 0 would wait to hear whether the workers connect again, and they in MPI's finalisation for rank 0."""
    if library == "mpich" and not MPICH.exists():
        pytest.skip("no Python with MPICH")
    path = script(tmp_path, LOOP.format(trouble="pass") + f"{closes}\nfrom mpi4py import MPI\nMPI.Finalize()\nsys.exit(4)\n")
    done = mpirun(3, path, timeout=60, python=str(MPICH) if library == "mpich" else sys.executable)
    assert done.returncode == 4
    assert list((tmp_path / "run" / "checkpoints").glob("*.h5")), done.stdout


def test_ranks_that_all_end_before_connect_end_as_they_would(mpirun: Any, tmp_path: Path) -> None:
    done = mpirun(2, script(tmp_path, "print('over')"), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\nover\n", "")


RANK = {"PMI_RANK": "1", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "1"}


def test_what_a_rank_starts_is_no_rank() -> None:
    inner = "from mpips.process import lifecycle as process; print(process._is_of_a_rank())"
    outer = f"import subprocess, sys; {inner}; sys.stdout.flush(); subprocess.run([sys.executable, '-c', {inner!r}])"
    assert python(outer, **RANK).stdout.split() == ["False", "True"]
    shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable]
    wrapped = subprocess.run([*shell, inner], env={**os.environ, **RANK}, capture_output=True, text=True)
    assert wrapped.stdout == "False\n"  # sh is what the launcher has started
    through = f"import subprocess, sys; from mpips.process import lifecycle as process; subprocess.run([*{shell!r}, {inner!r}])"
    assert python(through, **RANK).stdout == "True\n"


def test_a_rank_in_a_wrapper_that_ends_before_connect_ends_all(tmp_path: Path) -> None:
    """`mpirun ./bind.sh python train.py`: the others waited for ever, as the rank took the shell for a rank."""
    text = script(tmp_path, "if rank == 1: sys.exit(0)\n" + LOOP.format(trouble="pass"))
    command = [*mpiexec_of(sys.executable), "-n", "3", "sh", "-c", '"$0" "$1"; exit $?', sys.executable, str(text)]
    done = run(command, tmp_path, timeout=40)
    assert done.returncode == 1
    assert "mpips: rank 1 on " in done.stderr


def test_a_rank_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    """The launcher has started a shell, that one the rank; so nobody near the rank notices."""
    inner = (
        "import os, threading, time\nfrom mpips.process import lifecycle as process\n"
        "threading.Thread(target=process._watch, args=(process._launcher(),), daemon=True).start()\n"
        "open('up', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    shell = f"PMI_RANK=1 exec sh -c '{sys.executable} -c \"$PROGRAM\"; true'; true"
    launcher = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sh', '-c', sys.argv[1]])", shell]
    environ = {**os.environ, "PROGRAM": inner, "TMPDIR": str(tmp_path)}
    started = subprocess.Popen(launcher, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)
    for number in (started.pid, 1):  # as Open MPI's mpiexec makes one, which cannot remove it when it is killed
        (tmp_path / f"ompi.{number}" / "inner").mkdir(parents=True)
    up = tmp_path / "up"
    until = time.monotonic() + 30
    while not (up.exists() and up.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int(up.read_text())
    started.send_signal(signal.SIGKILL)
    started.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    gone = not Path(f"/proc/{pid}").exists()
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone
    assert sorted(path.name for path in tmp_path.glob("ompi.*")) == ["ompi.1"]


MAPPED = """
import os, time
import mpips
from mpips.process import lifecycle
mpips.join(mpips.configure())
with open(f"mapped_{os.getpid()}.part", "w") as file:
    print(lifecycle._launcher(), *lifecycle.segments(), sep="\\n", file=file)
os.rename(file.name, file.name.removesuffix(".part"))
time.sleep(60)
"""


@pytest.mark.parametrize("library", ["openmpi", "mpich"])
@pytest.mark.parametrize("how", ["mpiexec", "mpips run"])
def test_a_killed_mpiexec_leaves_nothing_in_shared_memory(how: str, library: str, tmp_path: Path) -> None:
    """The MPI library's own files stay there for ever: nobody else knows of them."""
    if library == "mpich" and not MPICH.exists():
        pytest.skip("no Python with MPICH")
    interpreter = str(MPICH) if library == "mpich" else sys.executable
    (tmp_path / "script.py").write_text(MAPPED)
    command = [*mpiexec_of(interpreter), "-n", "2", interpreter, "script.py"]
    if how == "mpips run":
        command = [str(Path(interpreter).with_name("mpips")), "run", "-n", "2", "script.py"]
    environ = launch_environment() | {"TMPDIR": str(tmp_path)}
    quiet = subprocess.DEVNULL
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=quiet, stderr=quiet)
    until = time.monotonic() + 60
    while len(told := list(tmp_path.glob("mapped_*[0-9]"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    ranks = [int(path.name.partition("_")[2]) for path in told]
    (mpiexec, *first), (_, *second) = (path.read_text().split() for path in told)
    files = [Path(name) for name in {*first, *second}]
    assert files
    assert all(path.exists() for path in files)
    os.kill(int(mpiexec), signal.SIGKILL)
    launcher.wait(30)
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < until + 30:
        time.sleep(0.05)
    assert [path for path in files if path.exists()] == []
    assert list(tmp_path.glob("ompi.*")) == []


STARTS = """
import subprocess, time
import torch
import mpips

def main():
    model = torch.nn.Linear(4, 1)
    ps = mpips.connect(model, torch.optim.SGD(model.parameters(), lr=0.01), run_dir="run")
    data = torch.utils.data.TensorDataset(torch.randn(4000, 4))
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, multiprocessing_context="forkserver")
    helper = subprocess.Popen(["sleep", "60"])
    try:
        for number, (x,) in enumerate(ps.shard(loader)):
            loss = model(x).square().mean()
            loss.backward()
            ps.step(loss)
            if number == 3:
                open("up", "w").close()
            time.sleep(0.05)
    finally:
        print("helper", helper.poll(), flush=True)
        helper.kill()

if __name__ == "__main__":
    main()
"""


def test_a_preemption_kills_none_of_the_processes_that_a_rank_has_started(tmp_path: Path) -> None:
    """mpiexec signals whole process groups: a spawned worker of a DataLoader died of it, and the run with it."""
    (tmp_path / "script.py").write_text(STARTS)
    command = [*mpiexec_of(sys.executable), "-n", "2", sys.executable, "script.py"]
    environ, quiet = launch_environment() | {"TMPDIR": str(tmp_path)}, subprocess.DEVNULL
    started = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=quiet, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < until:
        time.sleep(0.05)
    started.send_signal(signal.SIGUSR1)
    said, _ = started.communicate(timeout=patient(60))
    assert (started.returncode, "helper None" in said) == (75, True)
    assert list((tmp_path / "run" / "checkpoints").glob("*.h5"))
