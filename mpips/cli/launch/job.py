"""One run, from the start of mpiexec to the end of its last process.

Invariant: whatever ends a run (the run itself, a signal, a time limit, an error of the launcher), none of its processes is
left.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from mpips.cli.launch.command import LaunchCommand
from mpips.cli.launch.keeper import AFTER_TERM, FOLDER, end_all, kept
from mpips.cli.launch.ranks import Ranks
from mpips.cli.launch.watch import Failure, Stderr, Watch, first_failure
from mpips.cli.screen import Progress, Tail, View, outlet
from mpips.config import BAD_CONFIGURATION
from mpips.process import lifecycle as process
from mpips.process.environment import session_folder, without_secrets

TICK = 0.1  # seconds between two checks of the run
AFTER_DONE = 10.0  # seconds for mpiexec to end after all programs have; Open MPI sometimes never does (ULFM)
SIGNALS = range(129, 193)  # statuses that stand for signals, if mpiexec names no rank that has ended with one
AFTER_FAILURE = 3.0  # seconds for the ranks to end after the failure of one, where mpiexec does not end them
AFTER_ABORT = 1.0  # seconds from SIGTERM to SIGKILL then
AFTER_EXIT = 1.0  # seconds to wait for the last output once mpiexec has ended
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 25.0  # seconds for a checkpoint after one of these; SLURM kills all 30 s after SIGTERM
FORWARDED = (*ENDING, signal.SIGUSR1)
PREEMPTED = 75
TIMEOUT = "by --timeout"
AFTER_END = "after DONE"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The fields are those of `mpips run --json`."""

    exit: int
    run_dir: str | None
    seconds: float
    rounds: object
    value: object
    checkpoint: object
    failed_rank: int | None
    command: tuple[str, ...]
    attempts: int


@dataclass(frozen=True)
class Ending:
    """How one attempt to run ended, and what a decision on another attempt needs to know.

    Attributes:
        outcome: the result.
        failure: the first failure; without a rank and a text if there was none.
        why: the lines that explain a failure; none for success, a preemption and a bad setting.
        begun: whether the run had begun, so that its settings are in its folder.
        saved: whether this attempt has written a checkpoint.
        done: whether the run is complete.
        asked: whether the launcher ended the run, by a signal to it or by the time limit, or was asked for a preemption.
        tail: the reader of the run's events, which has read them all.
    """

    outcome: Outcome
    failure: Failure
    why: tuple[str, ...]
    begun: bool
    saved: bool
    done: bool
    asked: bool
    tail: Tail | None


@dataclass
class Job:
    """A running mpiexec: its output, the signals received for it, and the deadlines."""

    process: subprocess.Popen[bytes]
    folder: Path
    limit: float  # when --timeout expires; mpiexec enforces it, and the launcher if mpiexec does not
    tolerant: bool = False  # whether mpiexec lets the other ranks live when one dies
    asked: deque[int] = field(default_factory=deque)  # signals received and not yet forwarded
    preempted: bool = False  # whether a SIGUSR1 waits for the run to begin
    asked_to_end: bool = False  # whether a signal, or the time limit, has asked for the end of the run
    asked_by: str = ""  # the signal after which a checkpoint is waited for; "" if there is none
    wait_until: float = float("inf")  # until when it is waited for
    ended_by: str = ""  # why the launcher ended the run; "" if it has not
    ended_at: float = float("inf")  # wall clock, as in the ranks' failure reports
    kill_at: float = float("inf")
    done_at: float = float("inf")
    failed_at: float = float("inf")
    exited_at: float = float("inf")

    def __post_init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.ranks = Ranks(self.folder, self.selector, self.process.pid if self.tolerant else 0)
        for stream, file in ((1, self.process.stdout), (2, self.process.stderr)):
            assert file is not None
            self.selector.register(file, selectors.EVENT_READ, stream)

    def read(self, held_up: bool) -> Iterator[tuple[int, bytes]]:
        """Yield (stream, bytes) for the output that comes within a tick; none if the launcher's own output is held up."""
        self.ranks.look()
        if held_up or not self.selector.get_map():
            time.sleep(TICK)
        if held_up:
            self.exited_at = float("inf")  # what has not been read yet is still to come
            return
        for key, _ in self.selector.select(TICK):
            if key.data is self.ranks:
                self.ranks.note(key.fd)
                continue
            data = os.read(key.fd, 1 << 16)
            if data:
                yield int(key.data), data
            else:
                self.selector.unregister(key.fileobj)

    def over(self) -> bool:
        """Return whether mpiexec has ended and no more output will come."""
        if self.process.poll() is None:
            return False
        self.exited_at = min(self.exited_at, time.monotonic())
        if self.exited_at > self.limit:  # whatever mpiexec's status, which may be 0 with MPICH
            self.ended_by, self.asked_to_end = self.ended_by or TIMEOUT, True
        return not self.selector.get_map() or time.monotonic() > self.exited_at + AFTER_EXIT

    def forward(self, view: View, begun: bool, done: bool) -> None:
        """Forward signals to mpiexec, which forwards them to the ranks. A second request to end kills the ranks.

        `begun` says whether all ranks are so far that SIGUSR1 ends them with a checkpoint instead of killing them. The first
        request to end is then for that, too, unless the run is complete (`done`).
        """
        while self.asked:
            number, self.asked_to_end = signal.Signals(self.asked.popleft()), True
            if number not in ENDING:
                self.preempted = True
                if not begun:
                    view.tell(f"{number.name}: ending the run with a checkpoint, once it has begun")
            elif self.ended_by or self.asked_by:
                self._end(self.ended_by or f"by {number.name}", 0.0)
            elif begun and not done:
                self.preempted, self.asked_by, self.wait_until = True, f"by {number.name}", time.monotonic() + GRACE
                view.tell(f"{number.name}: ending the run with a checkpoint, within {GRACE:.0f} s; once more to end it now")
            else:
                self._end(f"by {number.name}")
                view.tell(f"{number.name}: ending the ranks within {AFTER_TERM:.0f} s; once more to end them now")
        if self.preempted and begun:
            self.preempted = False
            self._signal(signal.SIGUSR1)

    def close(self) -> None:
        """Stop watching the ranks and the output."""
        self.ranks.close()
        self.selector.close()

    def mind(self, done: bool, failure: str = "") -> None:
        """Enforce the deadlines: a hang after DONE or after a failure, the run's time limit, the grace after a signal."""
        now = time.monotonic()
        self.failed_at = min(self.failed_at, now) if failure else float("inf")
        if not self.ended_by and now > self.failed_at + AFTER_FAILURE:
            self._end(f"after {failure}", AFTER_ABORT)
        if not self.ended_by and now > self.wait_until:
            self._end(self.asked_by)
        self.done_at = min(self.done_at, now) if done else float("inf")
        if not self.ended_by and now > self.done_at + AFTER_DONE:
            self._end(AFTER_END)
        if not self.ended_by and now > self.limit + AFTER_TERM:
            self.asked_to_end = True
            self._end(TIMEOUT)
        if now > self.kill_at:
            end_all(self.folder, patience=0.0)
            self._signal(signal.SIGKILL)

    def _end(self, why: str, patience: float = AFTER_TERM) -> None:
        """End the run by SIGTERM, and after `patience` seconds by SIGKILL."""
        self.kill_at = time.monotonic() + patience
        self.ended_by, self.ended_at = why, time.time()
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        """Send mpiexec a signal, if it is running."""
        if self.process.poll() is None:
            self.process.send_signal(number)


def run(launch: LaunchCommand, view: View, *, timeout: float | None = None) -> Outcome:
    """Run the command to its end, and explain a failure. No process of the run is left; see `attempt`."""
    ending = attempt(launch, view, timeout=timeout)
    for text in ending.why:
        view.tell(text)
    return ending.outcome


def attempt(launch: LaunchCommand, view: View, *, timeout: float | None = None, before: Tail | None = None) -> Ending:
    """Run the command to its end. Whatever happens to the run or to the launcher, no process of the run is left.

    `before` is the reader of an earlier attempt's events, which are not this one's.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mpips-") as name:
        folder = Path(name)
        watch, progress, stderr = Watch(folder, launch.ranks, before), Progress(), Stderr()
        with kept(folder), started(launch, folder, timeout) as job:
            follow(job, watch, view, progress, stderr)
        reports = watch.failures(until=job.ended_at)
        failure = first_failure(reports, stderr, watch.fault(), job.ranks.first(until=job.ended_at))
        code = job.process.returncode
        died = stderr.signal is not None or (code in SIGNALS and stderr.rank is None)
        status = exit_status(job, watch, reports, died)
        if status == 0 and watch.run_dir():
            view.tell(f"run folder {watch.run_dir()}")
            if checkpoint := progress.result()["checkpoint"]:
                view.tell(f"checkpoint {checkpoint}")
        if status == PREEMPTED:
            view.tell("preempted: the checkpoint is written; start again with --mpips.resume auto")
        run_dir, done = watch.run_dir(), watch.done()
    outcome = Outcome(
        exit=status,
        run_dir=str(run_dir) if run_dir else None,
        seconds=round(time.monotonic() - began, 3),
        **progress.result(),
        failed_rank=failure.rank if status not in (0, PREEMPTED) else None,
        command=tuple(without_secrets(launch.command)),
        attempts=1,
    )
    if job.process.returncode < 0:
        failure = replace(failure, died=True)  # mpiexec was killed, and its ranks ended after it
    failed = status not in (0, PREEMPTED, BAD_CONFIGURATION)  # a bad setting's line has been printed
    return Ending(
        outcome,
        failure,
        why=tuple(explain(job, run_dir, failure)) if failed else (),
        begun="start" in progress.latest,
        saved="checkpoint" in progress.latest,
        done=done,
        asked=job.asked_to_end,
        tail=watch.tail,
    )


@contextmanager
def started(launch: LaunchCommand, folder: Path, timeout: float | None) -> Iterator[Job]:
    """Start the job and forward signals to it; at the end of the context, kill whatever is left of it."""
    environ = {**os.environ, **launch.variables, FOLDER: str(folder)}
    received: deque[int] = deque([signal.SIGUSR1] if process.preempted() else [])

    def ask(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, ask) for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN}
    try:
        # In a session of its own, so that a terminal's Ctrl-C reaches the launcher only. Stdin belongs to the launcher's
        # caller: a shell's `while read` loop, a keyboard.
        with subprocess.Popen(
            launch.command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        ) as mpiexec:
            try:
                limit = float("inf") if timeout is None else time.monotonic() + timeout
                job = Job(mpiexec, folder, limit, launch.tolerant, received)
                try:
                    yield job
                finally:
                    job.close()
            finally:
                end_all(folder, patience=AFTER_TERM)
                shutil.rmtree(session_folder(environ, mpiexec.pid), ignore_errors=True)  # left there if mpiexec was killed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(job: Job, watch: Watch, view: View, progress: Progress, stderr: Stderr) -> None:
    """Follow the job until it is over: output, signals, events, deadlines."""
    with outlet.behind():
        while not job.over():
            for stream, data in job.read(held_up=outlet.full and not job.asked_to_end):
                if stream == 2:
                    data = data.replace(b"\0", b"")  # Open MPI ends a message by one, and a log with it is no text
                view.write(stream, data)
                if not job.ended_by:  # output of ranks that are being ended is no failure
                    (stderr.feed if stream == 2 else stderr.hear)(data)
            take(watch, view, progress)
            job.forward(view, begun="start" in progress.latest, done=watch.done())
            view.show(progress)
            job.mind(watch.done() and watch.left() >= watch.ranks, failed(job, watch, begun="start" in progress.latest))
        take(watch, view, progress)
        view.close(progress)
        _wait_for_reader(job)


def _wait_for_reader(job: Job) -> None:
    """Wait until all output is written; not for long if the run has been asked to end, as the reader may never read."""
    until = float("inf")
    while outlet.waiting and time.monotonic() < until:
        if job.asked or job.asked_to_end:
            until = min(until, time.monotonic() + AFTER_EXIT)
        time.sleep(TICK / 10)


def failed(job: Job, watch: Watch, begun: bool) -> str:
    """Return the failure after which the ranks are to end, where mpiexec does not end them itself; empty if there is none."""
    if not job.tolerant:
        return ""
    if reports := watch.failures(until=float("inf")):
        return f"the failure of rank {reports[0]['rank']}"
    dead = None if begun else job.ranks.first(until=float("inf"))
    return f"the end of rank {dead.rank}, before the run began" if dead else ""


def take(watch: Watch, view: View, progress: Progress) -> None:
    """Pass new events on."""
    while events := watch.events():
        for event in events:
            progress.update(event)
            view.note(event)


def exit_status(job: Job, watch: Watch, reports: list[dict[str, object]], died: bool) -> int:
    """Return 0, 1, 2, 75, or the status with which the script has ended after its run.

    DONE means that the run is complete. After DONE, only a crash or hang in MPI's finalisation is ignored.

    Args:
        job: the job that is over.
        watch: the run's files.
        reports: the ranks' failure reports.
        died: whether a rank was ended by a signal, and not with a status of its own.
    """
    code = job.process.returncode
    if reports:
        return int(str(reports[0]["status"]))
    if code in (PREEMPTED, BAD_CONFIGURATION):
        return code
    if watch.done():
        excused = job.ended_by == AFTER_END or (died and watch.left() >= watch.ranks and not job.ended_by)
        return 0 if excused else code if code >= 0 and not died else 1
    return 0 if code == 0 and watch.run_dir() is None and not job.ended_by else 1


def explain(job: Job, run_dir: Path | None, failure: Failure) -> Iterator[str]:
    """Yield lines that say why a run failed, the first failing rank's traceback at the end."""
    code = job.process.returncode
    if job.ended_by:
        yield f"the run was ended {job.ended_by}"
    elif code == 0 and not failure.text:
        yield f"mpiexec ended with 0, but {run_dir}/DONE is missing: the run did not come to its end"
    if failure.rank is not None or failure.text:
        yield blame(run_dir, failure)
    elif code and not job.ended_by:
        yield f"mpiexec ended with status {code}"


def blame(run_dir: Path | None, failure: Failure) -> str:
    """Return a text with the first failing rank, its log and its traceback."""
    line = "one rank failed first" if failure.rank is None else f"rank {failure.rank} failed first"
    line += f" ({failure.others} more after it)" if failure.others else ""
    log = run_dir / "logs" / f"rank_{failure.rank or 0:04d}.log" if run_dir and failure.rank is not None else None
    line += f"; its log: {log}" if log and log.exists() else ""
    return f"{line}\n{failure.text}".rstrip()
