"""Faults made on purpose in a real run (the setting `chaos`), so that recovery can be seen where it will be needed.

A run without the setting does not import this module. With it some methods of this rank's worker and server are replaced by
ones that first make the faults which are due. A fault is noted in the run folder before it is made, so that it is made once,
however often the run is started again from a checkpoint.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpips.config.chaos import Fault, faults
from mpips.process.files import private
from mpips.process.lifecycle import drain, emit
from mpips.report.run_report import LOG
from mpips.server.base import Service
from mpips.server.parameter_server import ParameterServer
from mpips.worker.round_worker import Worker

NOTES = "chaos.log"  # in the run folder: a line for each fault that has been made


def install(text: str, folder: Path, rank: int, server: Service | None, worker: Worker | None) -> None:
    """Let this rank make its faults.

    Args:
        text: the setting.
        folder: the run folder.
        rank: this rank.
        server: the server on this rank, if there is one.
        worker: the worker on this rank, if there is one.
    """
    notes = Notes(folder / NOTES, rank)
    own = [fault for fault in faults(text) if fault.rank == rank and not notes.made(fault)]
    if server:
        full = {fault.at: fault for fault in own if fault.kind == "enospc"}
        _replace(server, "save_model", lambda save: _Saves(save, server.end_save, full, notes))
    faulty: Any = worker or server
    in_rounds = InRounds([fault for fault in own if fault.kind != "enospc"], notes, int(faulty.control.round))

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*given: Any, **named: Any) -> Any:
            in_rounds.make(int(faulty.control.round) + 1)
            return call(*given, **named)

        return replaced

    if worker:
        _replace(worker, "step", before)
        _replace(worker, "adopt", before)
    else:
        _replace(server, "update_parameters" if isinstance(server, ParameterServer) else "collect_updates", before)


def _replace(whose: Any, method: str, by: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a method of one object."""
    setattr(whose, method, by(getattr(whose, method)))


class Notes:
    """The notes of the faults that have been made.

    Args:
        path: the file.
        rank: this rank.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        self._made: set[str] = set()
        with suppress(OSError):
            self._made = {line.partition("  ")[0] for line in path.read_text().splitlines()}

    def made(self, fault: Fault) -> bool:
        """Return whether the fault has been made."""
        return fault.text in self._made

    def note(self, fault: Fault, what: str) -> None:
        """Say that a fault is about to be made, and note it, to the disk."""
        self._made.add(fault.text)
        with suppress(OSError):  # this rank's machine has not the run folder
            line = f"{fault.text}  {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} {what}\n"
            with open(self._path, "ab", opener=private) as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        LOG.info("chaos: %s", what)
        emit(2, f"mpips: chaos: rank {self._rank} {what}\n")


class InRounds:
    """The faults of one rank in rounds.

    Args:
        due: the faults that are not made yet.
        notes: where they are noted.
        done: the number of rounds done; what was due in them is not made.
    """

    def __init__(self, due: list[Fault], notes: Notes, done: int) -> None:
        self._due, self._notes, self._round = [fault for fault in due if not 0 < fault.at <= done], notes, done

    def make(self, number: int) -> None:
        """Make what is due in the round `number`, once in each."""
        new, self._round = number > self._round, number
        for fault in list(self._due) if new else ():
            if fault.at <= number:
                if fault.at:
                    self._due.remove(fault)
                self._make(fault, number)

    def _make(self, fault: Fault, number: int) -> None:
        if fault.kind == "delay":
            if fault.at:
                self._notes.note(fault, f"sleeps for {fault.seconds:g} s in round {number}")
            time.sleep(fault.seconds)
        elif fault.kind == "kill":
            self._notes.note(fault, f"kills itself in round {number}")
            drain()  # mpiexec drops what it has not read
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self._notes.note(fault, f"stops itself in round {number}{f' for {fault.seconds:g} s' if fault.seconds else ''}")
            _stop(fault.seconds)


def _stop(seconds: float) -> None:
    """Stop this process by SIGSTOP; a child process lets it go on."""
    if not seconds:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    nothing = subprocess.DEVNULL
    later = ["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]
    with subprocess.Popen(later, stdin=nothing, stdout=nothing, stderr=nothing):
        os.kill(os.getpid(), signal.SIGSTOP)


class _Saves:
    """The server's `save_model`, under which the disk is full at some of its calls.

    Args:
        save: the method.
        end_save: waits for the checkpoint that is being written, whose disk is not full.
        full: number of the call, from 1 -> the fault.
        notes: where it is noted.
    """

    def __init__(self, save: Callable[..., Any], end_save: Callable[[], None], full: dict[int, Fault], notes: Notes) -> None:
        self._save, self._end_save, self._full, self._notes, self._count = save, end_save, full, notes, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._count += 1
        fault = self._full.get(self._count)
        if fault is None:
            return self._save(*given, **named)
        self._end_save()
        self._notes.note(fault, f"finds its disk full at checkpoint {self._count}")
        _fill_disk()
        return self._save(*given, **named)


def _fill_disk() -> None:
    """Let the next write to a checkpoint, on whichever thread, be half done and fail as on a full disk."""
    pwrite = os.pwrite

    def half(fd: int, data: Any, offset: int) -> int:
        if not Path(os.readlink(f"/proc/self/fd/{fd}")).name.startswith(".tmp.round_"):
            return pwrite(fd, data, offset)
        os.pwrite = pwrite
        pwrite(fd, memoryview(data)[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = half
