"""Ending all processes of a run by id, even if the launcher is killed.

Invariant: every process of a run has `MPIPS_LAUNCH_DIR=<this run's private folder>` in its initial environment, and only
processes with it are ever signalled.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "MPIPS_LAUNCH_DIR"
LOOK_EVERY = 0.05  # seconds
AFTER_TERM = 5.0  # seconds from SIGTERM to SIGKILL


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Run a keeper process: if the launcher is killed, the pipe between them closes, and the keeper ends the run.

    mpiexec killed by SIGKILL leaves its ranks running. The keeper works for any MPI, and for ranks that ignore SIGTERM.
    """
    listen, speak = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(speak)
        _keep(folder, listen)
    os.close(listen)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # the keeper has been killed
            os.write(speak, b".")
        os.close(speak)
        os.waitpid(child, 0)


def _keep(folder: Path, listen: int) -> None:
    """Run as the keeper process; never returns."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # else the keeper would keep the launcher's output pipes open
            os.dup2(nothing, stream)
        if not os.read(listen, 1):
            end_all(folder, patience=AFTER_TERM)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def end_all(folder: Path, *, patience: float) -> None:
    """End every process of this run on this machine: by SIGTERM, and after `patience` seconds by SIGKILL."""
    until = time.monotonic() + patience
    if patience:
        _signal_all(folder, signal.SIGTERM)
    while processes(folder) and time.monotonic() < until:
        time.sleep(LOOK_EVERY)
    for _ in range(50):  # processes may be created meanwhile
        if not _signal_all(folder, signal.SIGKILL):
            break
        time.sleep(LOOK_EVERY)
    for file in folder.glob("memory_*"):  # what the ranks' MPI library leaves in shared memory when it is killed
        for name in file.read_bytes().splitlines():
            with suppress(OSError):
                os.unlink(name)


def _signal_all(folder: Path, number: signal.Signals) -> int:
    """Send a signal to every process of the run; return their number."""
    found = processes(folder)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)


def processes(folder: Path) -> list[int]:
    """Return the ids of the processes with this run's folder in their initial environment."""
    return [pid for entry in Path("/proc").glob("[0-9]*") if is_of(folder, pid := int(entry.name))]


def is_of(folder: Path, pid: int) -> bool:
    """Return whether a process has this run's folder in its initial environment."""
    mark = f"\0{FOLDER}={folder}\0".encode()
    with suppress(OSError):  # it has ended, or belongs to another user
        return mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    return False
