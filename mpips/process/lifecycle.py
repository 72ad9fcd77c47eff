"""What mpips does for a process from its import on, before there is a run.

It opens descriptors 0 to 2, so that no file of a run gets the number of a standard stream. It remembers SIGUSR1 until a run can
end with a checkpoint. If a rank ends without `connect`, it tells the other ranks, which would wait for that rank in MPI
forever. It ends a rank whose launcher is gone.

The package imports this module, so it imports little except the standard library until more is needed.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import faulthandler
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat as stat_mode
import struct
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mpips.process.environment import launch, session_folder

# Variables that distinguish a rank from its launcher, whose environment lacks them or has other values.
MARKS = ("PMIX_NAMESPACE", "PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI_PORT", "SLURM_STEP_ID", "SLURM_PROCID")
LOOK_EVERY = 1.0  # seconds between two checks that the launcher lives
PATIENCE = 10.0  # seconds to wait for the rank that has left to end this one
DRAIN = 2.0  # seconds at most for the launcher to read what this rank has written
RELAY = 0.1  # seconds for a launcher's daemon to send on what it has read
SEGMENTS = ("sm_segment.", "vader_segment.", "mpich_shm_")  # how the names of MPI libraries' files in shared memory begin
ANSWER = 30.0  # seconds after MPI's initialisation for all ranks to say whether they have joined; some may not run mpips

closed: set[int] = set()  # descriptors among 0 to 2 that were closed when mpips was imported
_status = 0  # the exit status of this process, if it is known not to be 0
_joined = False  # whether this process has joined the other ranks
_guarded = False  # whether an uncaught exception ends all ranks already
_asked = False  # whether SIGUSR1 has come
_note: Callable[[], None] | None = None
_spares_children = False  # whether SIGUSR1 is kept from the processes that this one starts


def begin() -> None:
    """Prepare the process. Called once, when mpips is imported."""
    open_streams()
    with suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, _preempt)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # in a process that a run's script has started
            atexit.register(_ignore_preemption)
    launched = launch()
    if launched.launcher and launched.size != 1 and not _is_of_a_rank():
        atexit.register(leave, os.getpid())
        _announce(launched.rank)


def open_streams() -> None:
    """Open /dev/null as stdin, stdout and stderr where these are closed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, mode, closefd=False))


def emit(stream: int, text: str | bytes) -> None:
    """Write to stdout (1) or stderr (2), bypassing the stream's buffer.

    Text that cannot be written, because the disk is full or the reader has gone, is dropped: that is no reason to end a run.
    """
    file, given = (sys.stdout, sys.__stdout__) if stream == 1 else (sys.stderr, sys.__stderr__)
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    with suppress(OSError, ValueError, AttributeError):
        file.flush()
    if file is not given:  # replaced by a notebook or the script
        with suppress(OSError, ValueError, AttributeError):
            file.buffer.write(data) if hasattr(file, "buffer") else file.write(data.decode(errors="replace"))
            file.flush()
        return
    while data:
        try:
            data = data[os.write(stream, data) :]
        except BlockingIOError:
            select.select([], [stream], [])
        except OSError:
            return


def drain() -> None:
    """Wait until the launcher has read what this rank has written to its standard streams, where they are pipes.

    MPICH's mpiexec drops what it has not read when a rank aborts (5.0.2).
    """
    until = time.monotonic() + DRAIN
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or on a full disk
            stream.flush()
    with suppress(OSError):
        while max(_unread(1), _unread(2)) and time.monotonic() < until:
            time.sleep(0.001)
    time.sleep(RELAY)


def _unread(number: int) -> int:
    """Return how many bytes of a pipe its reader has not read; 0 for a descriptor that is not a pipe."""
    if not stat_mode.S_ISFIFO(os.fstat(number).st_mode):
        return 0
    return int(struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, bytes(4)))[0])


def _preempt(number: int, frame: FrameType | None) -> None:
    """Handle SIGUSR1: remember it, and notify the run."""
    global _asked
    _asked = True
    if _note:
        _note()  # nothing else happens in the handler


def _ignore_preemption() -> None:
    """Ignore SIGUSR1 from now on, at exit: Python gives its handlers up before the process ends, and a signal would kill it."""
    with suppress(ValueError):
        if signal.getsignal(signal.SIGUSR1) is _preempt:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def on_preemption(note: Callable[[], None]) -> None:
    """Call `note` when SIGUSR1 comes, or now if it has come already. It replaces the `note` of an earlier run.

    If the script handles the signal itself, `note` is called only for a signal that came before.
    """
    global _note
    _note = note
    if _asked:
        note()
    if launch().launcher and not _spares_children:
        _spare_children()


def _spare_children() -> None:
    """Take SIGUSR1 on a thread, and block it on this one: what this process starts inherits that.

    mpiexec and srun send a signal to all processes of a rank, and it would kill those that do not know it: workers of a
    DataLoader that are spawned, a tracker's helper.
    """
    global _spares_children
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) is _preempt:
        _spares_children = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=_pass_preemption_on, name="mpips-preemption", daemon=True).start()


def _pass_preemption_on() -> None:
    """Let the main thread handle each SIGUSR1, by whatever handler it has then."""
    while True:
        signal.sigwait({signal.SIGUSR1})
        _thread.interrupt_main(signal.SIGUSR1)


def preempted() -> bool:
    """Return whether SIGUSR1 has come."""
    return _asked


def ends_with(status: int) -> None:
    """Note the exit status with which this process is about to end."""
    global _status
    _status = status


def end(status: int) -> NoReturn:
    """End this process now by C's `exit`: no more of the script runs, but exit handlers of libraries do.

    MPICH tells its mpiexec from such a handler that the rank has ended normally; otherwise mpiexec kills the other ranks
    (5.0.2).
    """
    ctypes.PyDLL(None).exit(status)  # with the interpreter's lock, so that no other thread runs meanwhile
    raise AssertionError("exit has returned")


def guarded() -> None:
    """Note that from now on an uncaught exception on this rank ends all ranks."""
    global _guarded
    _guarded = True


def is_guarded() -> bool:
    """Return whether an uncaught exception on this rank ends all ranks."""
    return _guarded


def join() -> None:
    """Meet the other ranks in MPI, once, before any other communication, to be sure that none has ended without joining.

    Afterwards the launcher is watched. Returns only if all ranks have joined; otherwise a rank that has not joined ends this
    process, too.

    Raises:
        RuntimeError: some rank has not joined, and has not ended this process.
    """
    global _joined
    if _joined:
        return
    _joined = True
    if missing := _attend(True, float("inf")):
        time.sleep(PATIENCE)
        raise RuntimeError(_text(missing[0], "another node"))
    if folder := os.environ.get("MPIPS_LAUNCH_DIR"):
        with suppress(OSError):
            Path(folder, f"memory_{os.getpid()}").write_bytes(b"\n".join(map(os.fsencode, segments())))
    if launcher := _launcher():
        threading.Thread(target=_watch, args=(launcher,), name="mpips-launcher", daemon=True).start()


def _attend(joins: bool, patience: float) -> list[int]:
    """Return the ranks that have not joined. Every rank says whether it has.

    Args:
        joins: whether this rank has joined.
        patience: seconds to wait for all ranks; after that, the list is empty.
    """
    from mpi4py import MPI

    until = time.monotonic() + patience
    joined = bytearray(MPI.COMM_WORLD.size)
    request = MPI.COMM_WORLD.Iallgather(bytearray([joins]), joined)
    while not request.Test():
        if time.monotonic() > until:
            return []
        time.sleep(0.001)
    return [rank for rank, word in enumerate(joined) if not word]


def leave(born: int) -> None:
    """At the exit of a rank that has not joined, or has failed, end the other ranks if they have joined.

    To tell them, this rank takes part in MPI's initialisation, in which they wait. It does nothing if Open MPI's mpiexec ends
    the other ranks itself: that is so for a failed rank that has not initialised MPI. (Once initialised, MPI would wait for
    them in its finalisation.)

    Args:
        born: the process id at import. A forked child has another one and does nothing.
    """
    if _guarded or os.getpid() != born:
        return
    failed = bool(_status) or hasattr(sys, "last_value")
    begun = "mpi4py.MPI" in sys.modules
    ends_all = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_mpi_ft_enable" not in os.environ  # Open MPI's mpiexec
    if (_joined and not failed) or (failed and not begun and ends_all):
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # without MPI the others cannot have joined
        return
    if MPI.Is_finalized():  # then no rank waits for this one in MPI's initialisation
        return
    missing = (
        [MPI.COMM_WORLD.rank] if failed and begun else _attend(False, ANSWER)
    )  # in the first case they may wait in any call
    if len(missing) in (0, MPI.COMM_WORLD.size):
        return
    if MPI.COMM_WORLD.rank == missing[0]:
        error = getattr(sys, "last_value", None)
        text = "".join(traceback.format_exception(error)) if error else ""
        say(MPI.COMM_WORLD.rank, text + _text(missing[0], socket.gethostname(), _joined))
    else:
        time.sleep(PATIENCE)
    drain()
    MPI.COMM_WORLD.Abort(_status or 1)


def _text(rank: int, host: str, joined: bool = False) -> str:
    """Return the error text for a rank that has ended without `connect`, or while the ranks joined each other in it."""
    if joined:
        return f"rank {rank} on {host} failed while the ranks joined each other: the run ends"
    return f"rank {rank} on {host} has ended without mpips.connect(), in which the others wait; every rank must call it"


def say(rank: int, text: str) -> None:
    """Tell the launcher and the screen why this rank ends all ranks."""
    with suppress(Exception):
        tell_launcher(rank, text, _status or 1)
    emit(2, f"mpips: {text.splitlines()[-1]}\n")


def tell_launcher(rank: int, text: str, status: int, died: bool = False) -> None:
    """Write a failure report to the folder of `mpips run`, if there is one.

    Args:
        rank: the rank that has failed.
        text: its traceback, or how it failed.
        status: the status with which the run is to end.
        died: whether the failure is a death, so that the run may be started again. Several ranks may notice it; what the rank
            itself has written stays.

    No error of the disk is raised: whoever calls this is about to end all ranks.
    """
    if folder := os.environ.get("MPIPS_LAUNCH_DIR"):
        facts = {"time": time.time(), "rank": rank, "host": socket.gethostname(), "status": status, "traceback": text}
        facts |= {"died": died}
        with suppress(OSError), Path(folder, f"failure_{rank}.json").open("x" if died else "w") as file:
            file.write(json.dumps(facts))


def tell_left(rank: int) -> None:
    """Tell the launcher that a rank's program has come to its end, or that the run has gone on without that rank."""
    if launch := os.environ.get("MPIPS_LAUNCH_DIR"):
        with suppress(OSError):
            Path(launch, f"left_{rank}").touch()


def _announce(rank: int | None) -> None:
    """Write this process's id to the folder of `mpips run`, and enable a traceback there in case of a crash.

    MPICH's mpiexec reports no more than a status for a rank that dies.
    """
    folder = os.environ.get("MPIPS_LAUNCH_DIR")
    if rank is None or not folder:
        return
    with suppress(OSError):
        Path(folder, f"process_{rank}").write_text(str(os.getpid()))
    if "OMPI_COMM_WORLD_RANK" not in os.environ and not faulthandler.is_enabled():
        with suppress(OSError):
            faulthandler.enable(Path(folder, f"fault_{rank}").open("w"))  # noqa: SIM115  stays open


def _watch(launcher: int) -> None:
    """End this rank soon after its launcher: a rank that waits in shared memory would not notice."""
    while _alive(launcher):
        time.sleep(LOOK_EVERY)
    try:
        emit(2, f"mpips: mpiexec (process {launcher}) is gone: this rank ends\n")
        shutil.rmtree(session_folder(os.environ, launcher), ignore_errors=True)  # it cannot do so itself
        for path in segments():
            path.unlink(missing_ok=True)
    finally:
        os._exit(1)


def segments() -> list[Path]:
    """Return the files in shared memory that this process's MPI library has mapped; one that is killed leaves them there."""
    with suppress(OSError):
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
        mapped = {line.split(maxsplit=5)[-1] for line in lines if "/dev/shm/" in line}
        return [Path(name) for name in sorted(mapped) if Path(name).name.startswith(SEGMENTS) and os.path.exists(name)]
    return []


def stat(pid: int) -> list[str]:
    """Return a process's fields of /proc/PID/stat (proc(5)), from its state on; an empty list if there is no such process."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/stat").read_bytes()).rsplit(")", 1)[1].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    """Return whether the process exists and has not ended."""
    return stat(pid)[:1] not in ([], ["Z"], ["X"])


def _ancestors() -> Iterator[int]:
    """Yield the ids of this process's ancestors, the parent first."""
    pid = os.getppid()
    while pid > 1:
        yield pid
        pid = int((stat(pid)[1:2] or ["0"])[0])


def _launcher() -> int | None:
    """Return the process that has started this rank, its nearest ancestor without the rank's variables; None if unknown."""
    found = next((pid for pid in _ancestors() if not _has_variables(pid)), None)
    return found if found and _alive(found) else None


def _is_of_a_rank() -> bool:
    """Return whether an ancestor of this process is a Python process of the same rank.

    A shell in between does not count: the rank's command may be wrapped in one.
    """
    return any(map(_runs_python, takewhile(_has_variables, _ancestors())))


def _runs_python(pid: int) -> bool:
    """Return whether a process runs Python."""
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Return the ids of a process's children; an empty list if there is no such process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def environ(pid: int) -> Mapping[str, str]:
    """Return the environment with which a process was started; empty if it may not be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).partition("=")[::2] for pair in pairs)


def _has_variables(pid: int) -> bool:
    """Return whether a process was started with the variables that distinguish this rank from its launcher."""
    given = environ(pid)
    return all(given.get(name) == os.environ.get(name) for name in MARKS)
