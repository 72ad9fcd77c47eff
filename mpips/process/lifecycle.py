"""What a process owes from the moment that mpips is imported, before there is a run.

Descriptors 0 to 2 are open, so that no file of a run gets the number of a stream. SIGUSR1 is remembered until a run can end
with a checkpoint. A rank that ends without `connect` tells the others, who would wait for it in MPI for ever. One whose
launcher is gone ends.

Imported with the package: little but the standard library, until it is needed.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mpips.process.environment import launch

# What tells a rank from its launcher, whose own environment lacks these or has others.
MARKS = ("PMIX_NAMESPACE", "PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI_PORT", "SLURM_STEP_ID", "SLURM_PROCID")
LOOK_EVERY = 1.0  # seconds between two looks at whether the launcher lives
PATIENCE = 10.0  # seconds to be ended by a rank that has left
ANSWER = 30.0  # seconds after MPI's initialisation for the others to say whether they have joined; some may not know of mpips

closed: set[int] = set()  # of descriptors 0 to 2, those that were when mpips was imported
_status = 0  # with which this process is known to end, if that is not 0
_joined = False  # whether this process has joined the other ranks
_guarded = False  # whether an exception ends all ranks by itself
_asked = False  # whether SIGUSR1 has come
_note: Callable[[], None] | None = None


def begin() -> None:
    """Once, when mpips is imported."""
    open_streams()
    with suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, _preempt)
    told = launch()
    if told.launcher and told.size != 1 and not _is_of_a_rank():
        atexit.register(leave, os.getpid())
        _leave_word(told.rank)


def open_streams() -> None:
    """Open /dev/null in the place of stdin, stdout and stderr where they are closed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, mode, closefd=False))


def emit(stream: int, text: str | bytes) -> None:
    """Write to stdout (1) or stderr (2), past its buffer.

    What cannot be written, the disk being full or nobody reading, is dropped: that is no reason to end a run.
    """
    file, given = (sys.stdout, sys.__stdout__) if stream == 1 else (sys.stderr, sys.__stderr__)
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    with suppress(OSError, ValueError, AttributeError):
        file.flush()
    if file is not given:  # a notebook's, or the script's own
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


def _preempt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if _note:
        _note()  # nothing else happens in the handler


def on_preemption(note: Callable[[], None]) -> None:
    """Call `note`, and no longer that of a run before, when SIGUSR1 comes, or now if it has come.

    Where the script handles the signal itself, that is all that happens.
    """
    global _note
    _note = note
    if _asked:
        note()


def preempted() -> bool:
    """Whether SIGUSR1 has come."""
    return _asked


def ends_with(status: int) -> None:
    """Note the status with which this process is about to end."""
    global _status
    _status = status


def end(status: int) -> NoReturn:
    """End this process now: no line of the script any more, but the libraries' own handlers, as after the script's end.

    MPICH says from such a handler that the rank has ended well; without that mpiexec kills the others (5.0.2).
    """
    ctypes.PyDLL(None).exit(status)  # with the interpreter's lock, so that no other thread runs meanwhile
    raise AssertionError("exit has returned")


def guarded() -> None:
    """Note that an exception on this rank ends all from now on."""
    global _guarded
    _guarded = True


def is_guarded() -> bool:
    """Whether an exception on this rank ends all."""
    return _guarded


def join() -> None:
    """Meet the other ranks in MPI, once, before anything else is done with them: none has ended without joining.

    Their launcher is watched from now on.
    Returns only if all have joined; else one that has not ends this process, too.

    Raises:
        RuntimeError: it does not.
    """
    global _joined
    if _joined:
        return
    _joined = True
    if missing := _attend(True, float("inf")):
        time.sleep(PATIENCE)
        raise RuntimeError(_text(missing[0], "another node"))
    if launcher := _launcher():
        threading.Thread(target=_watch, args=(launcher,), name="mpips-launcher", daemon=True).start()


def _attend(joins: bool, patience: float) -> list[int]:
    """Which ranks have not joined, as each says of itself; none if not all have said so after `patience` seconds."""
    from mpi4py import MPI

    until = time.monotonic() + patience
    said = bytearray(MPI.COMM_WORLD.size)
    told = MPI.COMM_WORLD.Iallgather(bytearray([joins]), said)
    while not told.Test():
        if time.monotonic() > until:
            return []
        time.sleep(0.001)
    return [rank for rank, word in enumerate(said) if not word]


def leave(born: int) -> None:
    """At the end of a rank that has not joined, or failed before an exception ended all: end the others, if they have joined.

    To tell them it takes part in MPI's initialisation, that they wait in. Open MPI's mpiexec ends them itself when one fails,
    if that has not initialised MPI, whose finalisation would wait for them.
    """
    if _guarded or os.getpid() != born:
        return
    failed = bool(_status) or hasattr(sys, "last_value")
    begun = "mpi4py.MPI" in sys.modules
    if (_joined and not failed) or (failed and not begun and "OMPI_COMM_WORLD_SIZE" in os.environ):
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # then the others have not joined either
        return
    if MPI.Is_finalized():  # then nobody waits for this rank in MPI's initialisation
        return
    missing = [MPI.COMM_WORLD.rank] if failed and begun else _attend(False, ANSWER)  # they may wait anywhere
    if len(missing) in (0, MPI.COMM_WORLD.size):
        return
    if MPI.COMM_WORLD.rank == missing[0]:
        error = getattr(sys, "last_value", None)
        text = "".join(traceback.format_exception(error)) if error else ""
        say(MPI.COMM_WORLD.rank, text + _text(missing[0], socket.gethostname()))
    else:
        time.sleep(PATIENCE)
    MPI.COMM_WORLD.Abort(_status or 1)


def _text(rank: int, host: str) -> str:
    return f"rank {rank} on {host} has ended without mpips.connect(), in which the others wait; every rank must call it"


def say(rank: int, text: str) -> None:
    """Say why this rank ends all: to the launcher, and on the screen."""
    with suppress(Exception):
        tell_launcher(rank, text, _status or 1)
    emit(2, f"mpips: {text.splitlines()[-1]}\n")


def tell_launcher(rank: int, text: str, status: int) -> None:
    """Leave a failure report in the folder of `mpips run`, if there is one."""
    if folder := os.environ.get("MPIPS_LAUNCH_DIR"):
        facts = {"time": time.time(), "rank": rank, "host": socket.gethostname(), "status": status, "traceback": text}
        Path(folder, f"failure_{rank}.json").write_text(json.dumps(facts))


def _leave_word(rank: int | None) -> None:
    """Let `mpips run` know this process, and a crash of it: of a rank that dies MPICH's mpiexec tells a status, no more."""
    folder = os.environ.get("MPIPS_LAUNCH_DIR")
    if rank is None or not folder:
        return
    with suppress(OSError):
        Path(folder, f"process_{rank}").write_text(str(os.getpid()))
    if "OMPI_COMM_WORLD_RANK" not in os.environ and not faulthandler.is_enabled():
        with suppress(OSError):
            faulthandler.enable(Path(folder, f"fault_{rank}").open("w"))  # noqa: SIM115  for as long as the process lives


def _watch(launcher: int) -> None:
    """End this rank soon after its launcher: whoever waits for another in shared memory would never learn of that."""
    while _alive(launcher):
        time.sleep(LOOK_EVERY)
    emit(2, f"mpips: mpiexec (process {launcher}) is gone: this rank ends\n")
    os._exit(1)


def stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on, as proc(5) lists it; nothing if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    return stat(pid)[:1] not in ([], ["Z"], ["X"])


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 1:
        yield pid
        pid = int((stat(pid)[1:2] or ["0"])[0])


def _launcher() -> int | None:
    """The process that has started this rank: its nearest ancestor without the rank's variables; None if unknown."""
    found = next((pid for pid in _ancestors() if not _has_variables(pid)), None)
    return found if found and _alive(found) else None


def _is_of_a_rank() -> bool:
    """Whether a Python with this rank's variables has started this one, perhaps through a shell.

    A shell alone is none: the rank's command is wrapped in it.
    """
    return any(map(_runs_python, takewhile(_has_variables, _ancestors())))


def _runs_python(pid: int) -> bool:
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def _environ(pid: int) -> Mapping[str, str]:
    """With what a process has begun; nothing if it is somebody else's."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).partition("=")[::2] for pair in pairs)


def _has_variables(pid: int) -> bool:
    """Whether a process has begun with the variables that tell this rank from its launcher."""
    environ = _environ(pid)
    return all(environ.get(name) == os.environ.get(name) for name in MARKS)
