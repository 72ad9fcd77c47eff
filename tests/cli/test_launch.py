"""The command that is built, and what becomes of it: status, signals, DONE, the first failure, nothing left behind.

Most runs use a fake mpiexec, a shell script that starts one or more copies of the script; a few use the real one.
"""

import dataclasses
import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from mpips.cli import launch
from mpips.cli.launch import command, job, keeper, launch_command
from mpips.cli.launch.ranks import Fallen, Ranks
from mpips.cli.launch.watch import CLOCKS, Failure, Stderr, Watch, first_failure
from mpips.cli.screen import Lines
from mpips.process.environment import Mpiexec, find_mpiexec
from mpips.process.lifecycle import tell_launcher
from tests.helpers.deadlines import patient

pytestmark = pytest.mark.skipif(
    any(int(os.environ.get(name, 1)) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
    reason="a launcher started by every rank of another launcher",
)

OPENMPI_5 = Mpiexec("/opt/mpiexec", "Open MPI", "5.0.11")
OPENMPI_4 = Mpiexec("/opt/mpiexec", "Open MPI", "4.1.4")
MPICH = Mpiexec("/opt/mpiexec", "MPICH", "5.0.2")


# The command


@pytest.fixture
def machine(monkeypatch):
    """Four cores, eight hyper-threads, a user who is root."""
    monkeypatch.setattr(command, "cores", lambda: 8)
    monkeypatch.setattr(command, "physical_cores", lambda: 4)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
FREE_5 = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
FREE_4 = {"OMPI_MCA_hwloc_base_binding_policy": "none"}
CROWD_5 = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "1"}
CROWD_4 = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.mark.parametrize(
    ("mpiexec", "size", "expected"),
    [
        (OPENMPI_5, 4, {"OMP_NUM_THREADS": "2", **ROOT, **FREE_5}),
        (OPENMPI_5, 5, {"OMP_NUM_THREADS": "1", **ROOT, **FREE_5, **CROWD_5}),
        (OPENMPI_4, 2, {"OMP_NUM_THREADS": "4", **ROOT, **FREE_4}),
        (OPENMPI_4, 20, {"OMP_NUM_THREADS": "1", **ROOT, **FREE_4, **CROWD_4}),
        (MPICH, 20, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_each_mpi_gets_what_it_needs(machine, mpiexec, size, expected):
    made = launch_command(size, ["x.py"], environ={}, mpiexec=mpiexec)
    assert made.variables == {"PYTHONUNBUFFERED": "1", **expected}
    assert made.command == ("/opt/mpiexec", "-n", str(size), sys.executable, "x.py")


def test_root_is_allowed_only_for_root(machine, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not set(ROOT) & set(launch_command(9, ["x.py"], environ={}, mpiexec=OPENMPI_5).variables)


def test_what_the_user_has_set_stays(machine):
    given = {"OMP_NUM_THREADS": "7", "PRTE_MCA_hwloc_default_binding_policy": "core", "PYTHONUNBUFFERED": ""}
    assert not set(given) & set(launch_command(9, ["x.py"], environ=given, mpiexec=OPENMPI_5).variables)


def test_an_allocation_has_the_cores_of_all_its_nodes(machine, tmp_path):
    assert launch_command(16, ["x.py"], environ={"SLURM_JOB_NUM_NODES": "4"}, mpiexec=MPICH).variables["OMP_NUM_THREADS"] == "2"
    nodes = tmp_path / "nodes"
    nodes.write_text("a\na\nb\n")
    for name in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        assert launch_command(16, ["x.py"], environ={name: str(nodes)}, mpiexec=MPICH).variables["OMP_NUM_THREADS"] == "1"


def test_without_a_home_the_users_own_is_given(machine, monkeypatch):
    monkeypatch.delenv("HOME")
    assert Path(launch_command(2, ["x.py"], environ={}, mpiexec=OPENMPI_5).variables["HOME"]).is_dir()
    assert "HOME" not in launch_command(2, ["x.py"], environ={"HOME": "/h"}, mpiexec=OPENMPI_5).variables


@pytest.mark.parametrize(
    ("mpiexec", "name"), [(OPENMPI_5, "PRTE_MCA_prte_tmpdir_base"), (OPENMPI_4, "OMPI_MCA_orte_tmpdir_base")]
)
def test_open_mpi_keeps_its_files_where_files_can_be_made(machine, mpiexec, name):
    usable = tempfile.gettempdir()
    assert launch_command(2, ["x.py"], environ={"TMPDIR": "/sys"}, mpiexec=mpiexec).variables[name] == usable
    assert name not in launch_command(2, ["x.py"], environ={"TMPDIR": usable}, mpiexec=mpiexec).variables
    assert name not in launch_command(2, ["x.py"], environ={}, mpiexec=mpiexec).variables


@pytest.mark.parametrize("hosts", [["--hostfile", "h"], ["--host=a,b"], ["-f", "h"]])
def test_on_hosts_that_the_user_names_no_cores_are_guessed(machine, hosts):
    made = launch_command(50, ["x.py"], mpi_args=hosts, environ={}, mpiexec=OPENMPI_5)
    assert not {"OMP_NUM_THREADS", *CROWD_5} & set(made.variables)
    assert made.warnings == ()


def test_more_ranks_than_cores_is_a_warning(machine):
    assert launch_command(8, ["x.py"], environ={}, mpiexec=MPICH).warnings == ()
    assert "9 ranks on 8 cores" in launch_command(9, ["x.py"], environ={}, mpiexec=MPICH).warnings[0]


def test_the_printed_line_is_what_a_shell_runs(tmp_path):
    fake = tmp_path / "my mpiexec"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c \'import json, os, sys\n'
                    'print(json.dumps([sys.argv[1:], os.environ["MPIEXEC_TIMEOUT"]]))\' "$@"\n')  # fmt: skip
    fake.chmod(0o755)
    script = ["my script.py", "--name", "it's $HOME", ""]
    made = launch_command(2, script, mpi_args=["-x", "A B"], timeout=60, mpiexec=Mpiexec(str(fake), "unknown", ""))
    printed = subprocess.check_output(["sh", "-c", str(made)], text=True, timeout=patient(20))
    assert json.loads(printed) == [["-n", "2", "-x", "A B", sys.executable, *script], "60"]


@pytest.mark.parametrize(("mpiexec", "more"), [(OPENMPI_5, ["-x", "MPIPS_SET"]), (OPENMPI_4, ["-x", "MPIPS_SET"]), (MPICH, [])])
def test_settings_go_to_the_ranks_of_all_nodes(machine, mpiexec, more):
    settings = {"clip": "1.0", "run_dir": "it's"}
    made = launch_command(
        2, ["x.py"], mpi_args=["--host", "a,b"], settings=settings, environ={"MPIPS_SET": "{}"}, mpiexec=mpiexec
    )
    assert json.loads(made.variables["MPIPS_SET"]) == settings
    assert list(made.command) == ["/opt/mpiexec", "-n", "2", *more, "--host", "a,b", sys.executable, "x.py"]
    assert "MPIPS_SET" not in launch_command(2, ["x.py"], environ={}, mpiexec=mpiexec).variables


def test_fault_tolerance_is_asked_for_where_it_is_to_be_had(machine):
    made = launch_command(2, ["x.py"], tolerant=True, environ={}, mpiexec=OPENMPI_5)
    assert list(made.command) == ["/opt/mpiexec", "-n", "2", "--with-ft", "ulfm", sys.executable, "x.py"]
    for other in (OPENMPI_4, MPICH):
        with pytest.raises(LookupError, match="expected Open MPI 5"):
            launch_command(2, ["x.py"], tolerant=True, environ={}, mpiexec=other)


# A run under a fake mpiexec

SAY = """
import json, os, pathlib, sys, time
launch = pathlib.Path(os.environ["MPIPS_LAUNCH_DIR"])
folder = pathlib.Path("run").absolute()
folder.mkdir(exist_ok=True)
def event(kind, **facts):
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": kind, "rank": 0, **facts}) + "\\n")
def run_dir():
    beside = launch / f"beside{os.getpid()}"  # of each rank of a fake run
    beside.write_text(str(folder))
    beside.rename(launch / "run_dir")
def fail(rank, text, ago=0.0, status=1):
    report = {"time": time.time() - ago, "rank": rank, "host": "h", "traceback": text, "status": status}
    (launch / f"failure_{rank}.json").write_text(json.dumps(report))
def done():
    (folder / "DONE").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Run a script's text through a fake mpiexec that starts it once; its outcome."""
    monkeypatch.chdir(tmp_path)

    def start(source, timeout=None):
        return launch.run(script_command(tmp_path, source), Lines(), timeout=timeout)

    return start


def script_command(folder, source):
    mpiexec, script = folder / "mpiexec", folder / "script.py"
    mpiexec.write_text('#!/bin/sh\nshift 2\n"$@"\n')  # not exec: as with a real one, the ranks are its children
    mpiexec.chmod(0o755)
    script.write_text(SAY + textwrap.dedent(source))
    return launch_command(1, [str(script)], mpiexec=Mpiexec(str(mpiexec), "unknown", ""))


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 1),
        ("sys.exit(75)", 75),
        ("fail(0, 'boom'); sys.exit(75)", 1),  # MPICH joins the statuses of all ranks bit by bit
        ("fail(0, 'boom')", 1),
        ("sys.exit(2)", 2),
        ("fail(0, 'mpips: clip: given', status=2); sys.exit(2)", 2),
        ("fail(0, 'mpips: clip: given', status='x'); sys.exit(2)", 2),
        ("run_dir(); fail(1, 'boom', status=1); sys.exit(2)", 1),
        ("run_dir(); done()", 0),
        ("run_dir(); done(); sys.exit(3)", 3),  # after its run the script failed by itself
        ("run_dir(); done(); (launch / 'left_0').touch(); sys.exit(-1)", 255),
        ("run_dir(); done(); (launch / 'left_0').touch(); sys.exit(200)", 200),
        ("run_dir(); done(); (launch / 'left_0').touch(); print(NAMED, file=sys.stderr); sys.exit(139)", 139),
        ("run_dir(); done(); (launch / 'left_0').touch(); sys.exit(139)", 0),  # mpiexec says so of a signal
        ("run_dir()", 1),
        ("run_dir(); sys.exit(75)", 75),
        ("run_dir(); done(); fail(1, 'the final test'); sys.exit(1)", 1),
        ("run_dir(); done(); fail(1, 'the final test')", 1),
        ("run_dir(); done(); os.kill(os.getpid(), 11)", 1),
        ("run_dir(); done(); (launch / 'left_0').touch(); os.kill(os.getpid(), 11)", 0),  # in MPI's finalisation
        ("run_dir(); done(); os.utime(folder / 'DONE', (1, 1))", 1),  # an earlier run's
        ("os.kill(os.getpid(), 11)", 1),
    ],
)
def test_exit_status(fake, source, status):
    assert fake(f"NAMED = 'Process name: [prterun-x-1@1,0]'\n{source}").exit == status


def test_outcome_tells_how_far_the_run_came(fake, tmp_path):
    (tmp_path / "run").mkdir()
    old = {"time": time.time() - 60, "event": "done", "rounds": 9, "value": 9, "checkpoint": "old.h5"}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(old) + "\n")
    outcome = fake("run_dir(); event('round', round=7); event('validate', value=0.5); event('checkpoint', path='c.h5')")
    assert (outcome.rounds, outcome.value, outcome.checkpoint) == (7, 0.5, "c.h5")
    assert (outcome.run_dir, outcome.failed_rank) == (str(tmp_path / "run"), None)


DIED = "(launch / 'fault_0').write_text('Fatal'); print('TERMINATED WITH THE EXIT STRING: x (signal 11)'); sys.exit(11)"


@pytest.mark.parametrize(("left", "status"), [("", 1), ("(launch / 'left_0').touch()\n", 0)])
def test_a_death_after_done_is_told_from_a_status_of_the_same_number(fake, left, status):
    """MPICH's mpiexec ends with the signal's number; in MPI's finalisation that is no failure."""
    outcome = fake(f"run_dir(); done()\n{left}{DIED}")
    assert (outcome.exit, outcome.failed_rank) == (status, 0 if status else None)


def test_a_run_folder_of_any_name_is_found(fake):
    outcome = fake("folder = pathlib.Path(os.fsdecode(b'l\\xe4ufe ')).absolute(); folder.mkdir(); (launch / 'run_dir')."
                   "write_bytes(os.fsencode(folder)); done()")  # fmt: skip
    assert (outcome.exit, Path(outcome.run_dir).name) == (0, os.fsdecode(b"l\xe4ufe "))


def test_a_hang_after_done_is_ended_and_is_success(fake, monkeypatch):
    monkeypatch.setattr(job, "AFTER_DONE", 0.4)
    began = time.monotonic()
    assert fake("run_dir(); done(); (launch / 'left_0').touch(); time.sleep(600)").exit == 0
    assert 0.4 < time.monotonic() - began < patient(10)


def test_timeout_ends_a_run_whose_mpiexec_does_not(fake, monkeypatch, capfd):
    monkeypatch.setattr(job, "AFTER_TERM", 0.3)
    assert fake("time.sleep(60)", timeout=0.3).exit == 1
    assert capfd.readouterr().err.endswith("mpips: the run was ended by --timeout\n")


def test_a_run_longer_than_its_timeout_is_no_success(fake):
    assert fake("time.sleep(0.6)", timeout=0.3).exit == 1  # as when MPICH's mpiexec ends the ranks and returns 0


def test_ranks_write_to_our_streams_unchanged(fake, capfdbinary):
    fake("os.write(1, b'a\\r\\x1b[1mb\\xff\\n'); os.write(2, b'e\\r\\n')")
    assert capfdbinary.readouterr() == (b"a\r\x1b[1mb\xff\n", b"e\r\n")


def test_a_log_has_no_nul(fake, capfdbinary):
    assert fake("os.write(2, b'a message\\0\\n')").exit == 0
    assert b"a message\n" in capfdbinary.readouterr().err


def test_the_first_failure_is_the_last_thing_on_the_screen(fake, capfd):
    outcome = fake("""
        fail(0, 'Traceback\\nRuntimeError: a rank is lost', ago=1)
        fail(2, 'Traceback\\nValueError: the cause', ago=2)
        run_dir(); (folder / 'logs').mkdir(); (folder / 'logs' / 'rank_0002.log').touch()
        print('collateral', file=sys.stderr)
        sys.exit(1)
    """)
    assert outcome.failed_rank == 2
    err = capfd.readouterr().err
    log = Path(outcome.run_dir, "logs", "rank_0002.log")
    expected = f"mpips: rank 2 failed first (1 more after it); its log: {log}\nTraceback\nValueError: the cause\n"
    assert err.endswith(expected)
    assert err.count("a rank is lost") == 0


def test_without_a_report_the_traceback_on_stderr_is_repeated(fake, capfd):
    fake("raise ValueError('boom')")
    err = capfd.readouterr().err
    last = err[err.rindex("mpips: one rank failed first") :]
    assert last.startswith("mpips: one rank failed first\nTraceback (most recent call last)")
    assert last.endswith("ValueError: boom\n")


def test_nothing_of_a_run_is_left(fake, tmp_path):
    fake("""
        import subprocess
        if not os.fork():
            os.setsid(); time.sleep(60)
        (pathlib.Path('launch')).write_text(str(launch))
        sys.exit(1)
    """)
    folder = Path((tmp_path / "launch").read_text())
    assert keeper.processes(folder) == []
    assert not folder.exists()


def test_end_all_touches_only_its_own_run(tmp_path):
    mine, other, longer = tmp_path / "a", tmp_path / "b", tmp_path / "ab"
    sleepers = [subprocess.Popen(["sleep", "60"], env={"X": "1", keeper.FOLDER: str(f)}) for f in (mine, other, longer)]
    try:
        keeper.end_all(mine, patience=0.0)
        assert sleepers[0].wait(5) == -signal.SIGKILL
        assert [sleeper.poll() for sleeper in sleepers[1:]] == [None, None]
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


# What stderr tells


def listened(text):
    stderr = Stderr()
    for i in range(0, len(text), 7):
        stderr.feed(text[i : i + 7].encode())
    return stderr


def test_a_chained_traceback_is_kept_whole_and_collateral_is_not():
    first = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
KeyError: 1

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in <module>
ValueError: boom"""
    later = first.replace("boom", "collateral")
    assert "\n".join(listened(f"noise\n{first}\n\n----\n{later}\n").block).rstrip() == first


def test_a_syntax_error_counts_as_a_traceback():
    text = '  File "x.py", line 3\n    def (\n        ^\nSyntaxError: invalid syntax\n'
    assert "\n".join(listened(f"{text}{text}more\n").block) == text.rstrip()


PRTERUN = "prterun noticed that process rank 1 with PID 4364 on node vm exited on\nsignal 9 (Killed).\n"


@pytest.mark.parametrize(
    ("text", "rank", "number"),
    [
        (PRTERUN, 1, 9),
        ("   Process name: [prterun-vm-4343@1,12]\n   Exit code:    1\n", 12, None),
        ("MPI_ABORT was invoked on rank 3 in communicator MPI_COMM_WORLD\n" + PRTERUN, 3, None),
        ("Abort(3) on node 1: application called MPI_Abort(MPI_COMM_WORLD, 3) - process 1\n", 1, None),
        ("nothing of the kind, rank 5\n", None, None),
    ],
)
def test_mpiexec_names_the_rank_that_fell(text, rank, number):
    stderr = listened(text)
    assert (stderr.rank, stderr.signal) == (rank, number)


BY_SIGNAL = b"=   PID 4364 RUNNING AT vm\nYOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"


def test_mpich_says_on_stdout_that_a_rank_was_killed():
    stderr = Stderr()
    for i in range(0, len(BY_SIGNAL), 7):
        stderr.hear(BY_SIGNAL[i : i + 7])
    assert first_failure([], stderr) == Failure(None, "ended by signal 9: Killed", died=True)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS])
def test_a_crashed_rank_says_itself_where_it_was(tmp_path, number):
    program = f"import os, mpips\ndef crash(): os.kill(os.getpid(), {int(number)})\ncrash()"
    variables = {"PMI_RANK": "3", "PMI_SIZE": "4", keeper.FOLDER: str(tmp_path)}
    ranks = [subprocess.run([sys.executable, "-c", end], env={**os.environ, **variables | {"PMI_RANK": rank}})
             for rank, end in (("2", "import mpips, os; os._exit(0)"), ("3", program))]  # fmt: skip
    assert [rank.returncode for rank in ranks] == [0, -number]
    failure = first_failure([], Stderr(), Watch(tmp_path, 4).fault())
    assert failure.rank == 3
    assert {signal.SIGSEGV: "Segmentation fault", signal.SIGBUS: "Bus error"}[number] in failure.text
    assert "in crash" in failure.text


def test_the_rank_that_was_killed_first_is_named(fake, capfd):
    """As under MPICH, whose mpiexec ends the others and says how one of all has ended."""
    outcome = fake("""
        import subprocess
        run_dir()
        ranks = [subprocess.Popen(['sleep', '60']) for _ in range(3)]
        for rank, child in enumerate(ranks):
            (launch / f'process_{rank}').write_text(str(child.pid))
        time.sleep(0.5)
        ranks[1].kill()
        time.sleep(0.5)
        fail(0, 'rank 1 is gone')
        for rank in ranks[0], ranks[2]:
            rank.terminate()
        print('YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Terminated (signal 15)')
        sys.exit(15)
    """)
    assert outcome.failed_rank == 1
    assert capfd.readouterr().err.endswith("ended by signal 9: Killed\n")


def fell(status):
    return Fallen(2, status, time=5.0)


def test_how_a_rank_fell_is_its_status_else_what_mpiexec_says_of_one():
    heard = Stderr()
    heard.hear(BY_SIGNAL)
    assert first_failure([], heard, None, fell(-15)).text == "ended by signal 15: Terminated"
    assert first_failure([], heard, None, fell(3)).text == "ended with status 3"
    assert first_failure([], heard, None, fell(None)) == Failure(2, "ended by signal 9: Killed", died=True)
    heard.feed(b"Traceback (most recent call last):\nValueError: early\n")
    assert first_failure([], heard, None, fell(None)).text.endswith("ValueError: early")
    before, after = ({"rank": 0, "time": time, "traceback": "failed"} for time in (4.0, 6.0))
    assert first_failure([before], heard, None, fell(None)).text == "failed"
    assert first_failure([after], heard, None, fell(None)) == Failure(2, "ended by signal 9: Killed", 1, died=True)


def test_a_rank_that_came_to_its_end_has_not_fallen(tmp_path):
    with selectors.DefaultSelector() as selector:
        ranks = Ranks(tmp_path, selector)
        environ = {**os.environ, keeper.FOLDER: str(tmp_path)}
        sleeping = [subprocess.Popen(["sleep", "60"], env=environ) for _ in range(2)]
        (tmp_path / "process_0").write_text("")  # being written
        strange = subprocess.Popen(["sleep", "60"])
        (tmp_path / "process_1").write_text(str(strange.pid))  # another machine's number, here somebody else's process
        ranks.look()
        for rank, child in zip((0, 2), sleeping, strict=True):
            (tmp_path / f"process_{rank}").write_text(str(child.pid))
        (tmp_path / "left_2").touch()
        ranks.look()
        strange.kill()
        strange.wait()
        for child in sleeping[::-1]:
            child.kill()
            for key, _ in selector.select(5):
                ranks.note(key.fd)
            child.wait()
        assert [(one.rank, one.status) for one in ranks.fallen] == [(2, -9), (0, -9)]
        assert ranks.first(until=time.time()) == ranks.fallen[1]
        assert ranks.first(until=0.0) is None
        ranks.close()


@pytest.mark.parametrize(("reports", "rank", "died"), [([6.0], 2, True), ([4.0], 0, False), ([], 0, False)])
def test_who_aborts_after_a_death_is_not_the_first(reports, rank, died):
    """Under MPI's fault tolerance mpiexec tells of the rank that ended all, and not of the one that died before."""
    heard = listened("MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD\n")
    told = [{"rank": 0, "time": time, "traceback": "failed"} for time in reports]
    failure = first_failure(told, heard, None, fell(None))
    assert (failure.rank, failure.died) == (rank, died)


def test_a_death_that_others_tell_of_is_described_as_it_was(tmp_path, monkeypatch):
    """The launcher may note the end of a process later than the ranks do; a report of the rank itself is not replaced."""
    monkeypatch.setenv("MPIPS_LAUNCH_DIR", str(tmp_path))
    tell_launcher(0, "died", 1, died=True)
    tell_launcher(2, "CommunicatorError: rank 0 has died", 1)
    told = Watch(tmp_path, 4).failures(until=math.inf)
    late = Fallen(0, -9, time.time())
    assert first_failure(told, Stderr(), None, late) == Failure(0, "ended by signal 9: Killed", 1, died=True)
    assert first_failure(told, Stderr()) == Failure(0, "died", 1, died=True)
    tell_launcher(2, "died", 1, died=True)
    assert Watch(tmp_path, 4).failures(until=math.inf) == told


@pytest.mark.parametrize("folder", ["gone", "a file"])
@pytest.mark.parametrize("died", [False, True])
def test_no_error_of_the_disk_keeps_a_rank_from_ending_all(folder, died, tmp_path, monkeypatch):
    """The thread that watches the others would end by it, and everybody wait for ever."""
    monkeypatch.setenv("MPIPS_LAUNCH_DIR", str(tmp_path / "there"))
    if folder == "a file":
        (tmp_path / "there").touch()
    tell_launcher(2, "died", 1, died=died)


def test_a_rank_that_ends_before_it_has_left_its_id_is_known_as_a_child_of_mpiexec(tmp_path):
    environ = {**os.environ, keeper.FOLDER: str(tmp_path), "OMPI_COMM_WORLD_RANK": "3"}
    with selectors.DefaultSelector() as selector, subprocess.Popen(["sleep", "60"], env=environ) as child:
        ranks = Ranks(tmp_path, selector, parent=os.getpid())
        ranks.look()
        child.kill()
        for key, _ in selector.select(5):
            ranks.note(key.fd)
        assert [one.rank for one in ranks.fallen] == [3]
        ranks.close()


@pytest.mark.parametrize("begun", [False, True])
def test_where_mpiexec_lets_ranks_live_the_launcher_ends_them(tmp_path, begun, monkeypatch, capfd):
    """After the failure of one, or the end of one before the run has begun; a death in a run is the run's to judge."""
    monkeypatch.setattr(job, "AFTER_FAILURE", 0.2)
    monkeypatch.chdir(tmp_path)
    script = "run_dir(); event('start'); fail(0, 'boom'); time.sleep(300)" if begun else "time.sleep(300)"
    command = script_command(tmp_path, script)
    fallen = "" if begun else "(export OMPI_COMM_WORLD_RANK=1; exec sh -c 'sleep 0.5; exit 3') &\n"
    (tmp_path / "mpiexec").write_text(f'#!/bin/sh\nshift 2\n{fallen}"$@"\n')
    began = time.monotonic()
    outcome = launch.run(dataclasses.replace(command, tolerant=True), Lines())
    assert outcome.exit == 1
    assert time.monotonic() - began < patient(15)
    what = "the failure of rank 0" if begun else "the end of rank 1, before the run began"
    assert f"the run was ended after {what}" in capfd.readouterr().err


def test_a_killed_rank_comes_before_the_reports_of_those_who_noticed():
    noticed = [{"rank": 0, "time": 1.0, "traceback": "MPI_ERR_PROC_FAILED"}]
    failure = first_failure(noticed, listened(PRTERUN))
    assert (failure.rank, failure.text, failure.others) == (1, "ended by signal 9: Killed", 1)
    own = [{"rank": 1, "time": 1.0, "traceback": "ValueError"}]
    assert first_failure(own, listened(PRTERUN)).text == "ValueError"


def test_a_damaged_failure_report_is_passed_over(tmp_path):
    watch = Watch(tmp_path, 1)
    (tmp_path / "failure_0.json").write_text('{"time": 1')
    (tmp_path / "failure_1.json").write_text('{"rank": "one", "time": 1}')
    (tmp_path / "failure_2.json").write_text('{"rank": 2, "time": 5.0, "status": 1, "traceback": "t"}')
    assert [report["rank"] for report in watch.failures(until=9.0)] == [2]
    assert watch.failures(until=4.0) == []


def test_events_of_an_earlier_run_are_not_this_run(tmp_path):
    (tmp_path / "run_dir").write_text(str(tmp_path))
    old, new = time.time() - CLOCKS - 5, time.time()
    lines = [{"event": "done", "time": old}, {"event": "start", "time": new}, {"event": "timeless"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [event["event"] for event in Watch(tmp_path, 1).events()] == ["start", "timeless"]


# Signals, with the launcher as a process of its own

DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
from mpips.process.environment import Mpiexec
from mpips.cli.launch import command; from mpips.cli.launch import job; from mpips.cli.launch import keeper
from mpips.cli.main import main
keeper.AFTER_TERM = 0.3
if sys.argv[1]:
    command.find_mpiexec = lambda: Mpiexec(sys.argv[1], "unknown", "")
sys.exit(main(sys.argv[2:]))
"""

# Starts its ranks as a real mpiexec does: each in a session of its own, and passes signals on.
FAKE = """#!/bin/sh
n=$2; shift 2
for i in $(seq $n); do setsid "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids; wait' USR1
trap 'kill -TERM $pids; wait; exit 1' TERM INT
for pid in $pids; do
    while wait $pid; code=$?; [ $code -gt 128 ]; do :; done
done
exit $code
"""


class Launcher:
    """`mpips run -n 2` as a process, and the ranks that it started."""

    def __init__(self, folder, source, mpiexec=None, flags=(), before="", stdin=subprocess.DEVNULL):
        script = folder / "script.py"
        script.write_text("import os, signal, sys, time\nopen(f'pid{os.getpid()}', 'w').close()\n" + source)
        argv = [sys.executable, "-c", before + DRIVER, str(mpiexec or ""), "run", "-n", "2", *flags, str(script)]
        self.folder = folder
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(argv, cwd=folder, **streams, text=True)

    def pids(self):
        return [int(path.name[3:]) for path in self.folder.glob("pid*")]

    def up(self):
        until = time.monotonic() + patient(20)
        while len(list(self.folder.glob("up*"))) < 2:
            assert time.monotonic() < until, "the ranks did not start"
            time.sleep(0.02)
        return self

    def all_gone(self, seconds=10.0):
        until = time.monotonic() + patient(seconds)
        while any(alive(pid) for pid in self.pids()) and time.monotonic() < until:
            time.sleep(0.02)
        return len(self.pids()) == 2 and not any(alive(pid) for pid in self.pids())

    def end(self):
        output, _ = self.process.communicate(timeout=patient(30))
        return self.process.returncode, output


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


UP = "open(f'up{os.getpid()}', 'w').close()\n"
SLEEP = UP + "time.sleep(600)\n"
STUBBORN = "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\n" + SLEEP


@pytest.fixture
def fake_mpiexec(tmp_path):
    path = tmp_path / "mpiexec"
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


def test_killing_the_launcher_leaves_no_rank_not_even_a_stubborn_one(tmp_path, fake_mpiexec):
    launcher = Launcher(tmp_path, STUBBORN, fake_mpiexec).up()
    launcher.process.kill()
    assert launcher.all_gone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks_and_is_no_success(tmp_path, fake_mpiexec, number):
    launcher = Launcher(tmp_path, SLEEP, fake_mpiexec).up()
    launcher.process.send_signal(number)
    status, output = launcher.end()
    assert (status, launcher.all_gone()) == (1, True)
    assert output.endswith(f"mpips: the run was ended by {number.name}\n")


def test_a_second_signal_ends_stubborn_ranks_now(tmp_path, fake_mpiexec):
    launcher = Launcher(tmp_path, STUBBORN, fake_mpiexec).up()
    began = time.monotonic()
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    assert launcher.process.poll() is None
    launcher.process.send_signal(signal.SIGINT)
    assert (launcher.end()[0], launcher.all_gone()) == (1, True)
    assert time.monotonic() - began < patient(8)


PREEMPTIBLE = (
    "time.sleep(1)\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
    + SAY
    + """
open(f'up{os.getpid()}', 'w').close()
while len(list(pathlib.Path().glob('up*'))) < 2: time.sleep(0.02)  # as in a run, which begins when all have come
run_dir(); event('start')
"""
)


@pytest.mark.parametrize("early", [False, True])
def test_usr1_reaches_the_ranks_once_they_can_end_with_75(tmp_path, fake_mpiexec, early):
    launcher = Launcher(tmp_path, PREEMPTIBLE + SLEEP, fake_mpiexec)
    for _ in range(2 if early else 0):
        while not launcher.pids():
            time.sleep(0.02)
        launcher.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    launcher.up()
    if not early:
        launcher.process.send_signal(signal.SIGUSR1)
    status, output = launcher.end()
    assert (status, launcher.all_gone()) == (75, True)
    assert "--mpips.resume auto" in output.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_to_end_a_run_is_for_a_checkpoint(tmp_path, fake_mpiexec, number):
    launcher = Launcher(tmp_path, PREEMPTIBLE + SLEEP, fake_mpiexec).up()
    while not (tmp_path / "run" / "events.jsonl").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    launcher.process.send_signal(number)
    status, output = launcher.end()
    assert (status, launcher.all_gone()) == (75, True)
    assert f"{number.name}: ending the run with a checkpoint, within 25 s; once more to end it now" in output


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_writes_no_checkpoint_is_ended(tmp_path, fake_mpiexec, again):
    """After the grace, or by a second signal."""
    before = "" if again else "from mpips.cli.launch import job; job.GRACE = 0.5\n"
    deaf = PREEMPTIBLE.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")
    launcher = Launcher(tmp_path, deaf + STUBBORN, fake_mpiexec, before=before).up()
    time.sleep(0.5)
    began = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(0.4)
        assert launcher.process.poll() is None
        launcher.process.send_signal(signal.SIGTERM)
    status, output = launcher.end()
    assert (status, launcher.all_gone()) == (1, True)
    assert output.splitlines()[-1] == "mpips: the run was ended by SIGTERM"
    assert time.monotonic() - began < patient(8)


def test_usr1_before_the_launcher_has_started_anything_is_remembered(tmp_path, fake_mpiexec):
    before = "import os, signal, mpips; os.kill(os.getpid(), signal.SIGUSR1)\n"
    status, _ = Launcher(tmp_path, PREEMPTIBLE + SLEEP, fake_mpiexec, before=before).end()
    assert status == 75


def test_what_is_on_stdin_is_left_to_who_started_the_launcher(tmp_path, fake_mpiexec):
    launcher = Launcher(tmp_path, "sys.stdin.read()", fake_mpiexec, stdin=subprocess.PIPE)
    launcher.process.stdin.write("next line")
    assert launcher.end()[0] == 0  # the pipe is still open: who reads it waits


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_closed_streams_end_no_run(tmp_path, fake_mpiexec, closed):
    source = (
        "time.sleep(0.5); assert pathlib.Path(os.environ['MPIPS_LAUNCH_DIR']).is_dir(); (folder / str(os.getpid())).touch()"
    )
    before = f"import os; [os.close(number) for number in {closed}]\n"
    assert Launcher(tmp_path, SAY + source, fake_mpiexec, before=before).end()[0] == 0
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize("stream", [1, 2])
def test_a_full_disk_under_a_stream_ends_no_run(tmp_path, fake_mpiexec, stream):
    before = f"import os; os.dup2(os.open('/dev/full', os.O_WRONLY), {stream})\n"
    source = "print('a' * 99999); print('b' * 99999, file=sys.stderr); sys.exit(75)"
    assert Launcher(tmp_path, source, fake_mpiexec, before=before).end()[0] == 75


# The real mpiexec


@pytest.fixture
def real():
    try:
        return find_mpiexec()
    except FileNotFoundError as error:
        pytest.skip(str(error))


RANK = "rank = int(os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', 0)))\n"


def test_real_ranks_and_their_output(real, tmp_path):
    launcher = Launcher(tmp_path, RANK + "print('rank', rank)", flags=["--json"])
    status, output = launcher.end()
    lines = output.splitlines()
    assert status == 0
    assert shlex.split(lines[0])[-1] == str(tmp_path / "script.py")
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank 0", "rank 1"]
    assert json.loads(lines[-1])["exit"] == 0


def test_real_ranks_print_their_settings_once(real, tmp_path):
    source = "import argparse, mpips\nargparse.ArgumentParser().parse_args()\nmpips.configure(seed=3)\nprint('went on')\n"
    launcher = Launcher(tmp_path, source, flags=["--set", 'run_dir=it\'s = "a", ;b', "--print_config"])
    status, output = launcher.end()
    shown = " ".join(output.split())
    assert status == 0
    assert shown.count("mode: sync # default") == shown.count("seed: 3 # connect") == 1
    assert "run_dir: 'it''s = \"a\", ;b' # --set" in shown
    assert "went on" not in output


def test_real_failure_ends_with_the_traceback(real, tmp_path):
    status, output = Launcher(tmp_path, RANK + "if rank == 1: raise ValueError('boom')\ntime.sleep(2)").end()
    assert status == 1
    assert " failed first\nTraceback" in output
    assert output.endswith("ValueError: boom\n")


def test_real_preemption_status_passes_through(real, tmp_path):
    assert Launcher(tmp_path, "sys.exit(75)").end()[0] == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_run_ends_with_a_checkpoint_from_which_it_goes_on(real, tmp_path, number):
    source = """
import torch, mpips
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ps = mpips.connect(model, optimizer, run_dir="run")
for (x,) in ps.shard(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(99, 3)), 1)):
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    if ps.round == 5:
        [open(f"up{number}", "w").close() for number in (0, 1)]
        time.sleep(1)
"""
    launcher = Launcher(tmp_path, source).up()
    launcher.process.send_signal(number)
    status, output = launcher.end()
    assert (status, launcher.all_gone()) == (75, True), output
    assert len(list((tmp_path / "run" / "checkpoints").glob("round_*.h5"))) == 1
    status, output = Launcher(tmp_path, source + "print('steps', ps.round)", flags=["--set", "resume=auto"]).end()
    assert (status, "steps 99" in output) == (0, True), output


def test_killing_the_launcher_of_real_ranks_leaves_none(real, tmp_path):
    launcher = Launcher(tmp_path, STUBBORN).up()
    launcher.process.kill()
    assert launcher.all_gone()


def test_a_killed_mpiexec_leaves_neither_ranks_nor_temporary_files(real, tmp_path, monkeypatch):
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setenv("TMPDIR", str(files))
    launcher = Launcher(tmp_path, SLEEP).up()
    (mpiexec,) = [pid for pid in parents(launcher.pids()[0]) if launcher.process.pid in parents(pid)[:1]]
    assert any(path.name.startswith(("ompi", "mpips-")) for path in files.iterdir())
    os.kill(mpiexec, signal.SIGKILL)
    status, _ = launcher.end()
    assert (status, launcher.all_gone()) == (1, True)
    assert [path.name for path in files.iterdir()] == []


def parents(pid):
    """The ids of a process's ancestors, the nearest first."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


def test_interrupting_the_launcher_of_real_ranks_leaves_none(real, tmp_path):
    launcher = Launcher(tmp_path, SLEEP).up()
    launcher.process.send_signal(signal.SIGINT)
    assert (launcher.end()[0], launcher.all_gone()) == (1, True)


def test_real_timeout(real, tmp_path):
    status, output = Launcher(tmp_path, SLEEP, flags=["--timeout", "1"]).end()
    assert status == 1
    assert output.endswith("mpips: the run was ended by --timeout\n")


def test_a_reader_that_does_not_read_keeps_nothing_from_ending_the_run(tmp_path, fake_mpiexec):
    """A pager, Ctrl-S, a stopped tee: the launcher waited to write, and heard neither the time limit nor signals."""
    launcher = Launcher(tmp_path, UP + "while True: print('x' * 10_000, flush=True)\n", mpiexec=fake_mpiexec).up()
    time.sleep(1)  # the pipe is full, and so is what the launcher keeps
    for _ in range(2):
        launcher.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert launcher.process.wait(15) == 1
    assert launcher.all_gone()
    launcher.process.stdout.close()


def test_output_that_is_read_late_is_whole(tmp_path, fake_mpiexec):
    launcher = Launcher(tmp_path, UP + "for n in range(3000): print(n, '~' * 1000, flush=True)\n", mpiexec=fake_mpiexec)
    launcher.up()
    time.sleep(3)
    _, output = launcher.end()
    assert output.count("~") == 2 * 3000 * 1000
