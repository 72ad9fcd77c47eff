"""One run from mpiexec's start to its last process.

Invariant: whatever ends a run (itself, a signal, a time limit, our own error), none of its processes is left.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mpips.cli.launch.command import Plan
from mpips.cli.launch.keeper import AFTER_TERM, FOLDER, end_all, kept
from mpips.cli.launch.ranks import Ranks
from mpips.cli.launch.watch import Failure, Stderr, Watch, first_failure
from mpips.cli.screen import Progress, View
from mpips.config import BAD_CONFIGURATION
from mpips.process import lifecycle as process

TICK = 0.1  # seconds between two looks at the run
AFTER_DONE = 10.0  # seconds that mpiexec may take to end once all programs have; Open MPI sometimes never does (ULFM)
DIED = 128  # statuses from here on are signals
AFTER_EXIT = 1.0  # seconds to wait for the last output once mpiexec has ended
GRACE = {signal.SIGINT: 10.0, signal.SIGTERM: 30.0, signal.SIGHUP: 30.0}  # seconds for a checkpoint before all is ended
FORWARDED = (*GRACE, signal.SIGUSR1)
PREEMPTED = 75
TIMEOUT = "by --timeout"
AFTER_END = "after DONE"


@dataclass(frozen=True)
class Outcome:
    """How a run ended; the fields are those of `mpips run --json`."""

    exit: int
    run_dir: str | None
    seconds: float
    rounds: object
    value: object
    checkpoint: object
    failed_rank: int | None
    command: tuple[str, ...]


@dataclass
class Job:
    """A running mpiexec: what to read from it, what was asked of it, and when patience ends."""

    process: subprocess.Popen[bytes]
    folder: Path
    limit: float  # when --timeout is over; mpiexec itself watches it, we only where it does not
    asked: deque[int] = field(default_factory=deque)  # signals that have come and are not yet forwarded
    preempted: bool = False  # SIGUSR1 has come, and waits for the run to begin
    ended_by: str = ""  # why the launcher ended it; "" while it runs or ended by itself
    ended_at: float = float("inf")  # by the wall clock, as in the ranks' failure reports
    kill_at: float = float("inf")
    done_at: float = float("inf")
    exited_at: float = float("inf")

    def __post_init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.ranks = Ranks(self.folder, self.selector)
        for stream, file in ((1, self.process.stdout), (2, self.process.stderr)):
            assert file is not None
            self.selector.register(file, selectors.EVENT_READ, stream)

    def read(self) -> Iterator[tuple[int, bytes]]:
        """(stream, bytes) that came within a tick."""
        self.ranks.look()
        if not self.selector.get_map():
            time.sleep(TICK)
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
        """Whether mpiexec has ended and nothing more is to be read."""
        if self.process.poll() is None:
            return False
        self.exited_at = min(self.exited_at, time.monotonic())
        if self.exited_at > self.limit:  # whatever mpiexec's status: MPICH's may be 0
            self.ended_by = self.ended_by or TIMEOUT
        return not self.selector.get_map() or time.monotonic() > self.exited_at + AFTER_EXIT

    def forward(self, view: View, begun: bool) -> None:
        """Pass signals on to mpiexec, which passes them to the ranks; a second wish to stop ends them now.

        Args:
            begun: whether all ranks have come so far that SIGUSR1 does not kill them, but ends them with a checkpoint.
        """
        while self.asked:
            number = signal.Signals(self.asked.popleft())
            if number not in GRACE:
                self.preempted = True
                if not begun:
                    view.tell(f"{number.name}: ending the run with a checkpoint, once it has begun")
            elif self.ended_by:
                self.kill_at = 0.0
            else:
                self._signal(number)
                self.kill_at = time.monotonic() + GRACE[number]
                self.ended_by, self.ended_at = f"by {number.name}", time.time()
                view.tell(f"{number.name}: ending the ranks within {GRACE[number]:.0f} s; once more to end them now")
        if self.preempted and begun:
            self.preempted = False
            self._signal(signal.SIGUSR1)

    def mind(self, done: bool) -> None:
        """Look at the clock: a hang after DONE, the run's own time limit, patience after a signal."""
        now = time.monotonic()
        self.done_at = min(self.done_at, now) if done else float("inf")
        if not self.ended_by and now > self.done_at + AFTER_DONE:
            self._end(AFTER_END)
        if not self.ended_by and now > self.limit + AFTER_TERM:
            self._end(TIMEOUT)
        if now > self.kill_at:
            end_all(self.folder, patience=0.0)
            self._signal(signal.SIGKILL)

    def _end(self, why: str) -> None:
        self.kill_at = time.monotonic() + AFTER_TERM
        self.ended_by, self.ended_at = why, time.time()
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def run(plan: Plan, view: View, *, timeout: float | None = None) -> Outcome:
    """Run the plan to its end; whatever happens to it or to us, no process of it is left."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mpips-") as name:
        folder = Path(name)
        watch, progress, stderr = Watch(folder, plan.ranks), Progress(), Stderr()
        with kept(folder), started(plan, folder, timeout) as job:
            follow(job, watch, view, progress, stderr)
        reports = watch.failures(until=job.ended_at)
        failure = first_failure(reports, stderr, watch.fault(), job.ranks.first(until=job.ended_at))
        status = exit_status(job, watch, reports, died=stderr.signal is not None)
        if status not in (0, PREEMPTED, BAD_CONFIGURATION):  # whose one line has been said
            explain(view, job, watch.run_dir(), failure)
        if status == 0 and watch.run_dir():
            view.tell(f"run folder {watch.run_dir()}")
            if checkpoint := progress.result()["checkpoint"]:
                view.tell(f"checkpoint {checkpoint}")
        if status == PREEMPTED:
            view.tell("preempted: the checkpoint is written; start again with --mpips.resume auto")
        run_dir = watch.run_dir()
    return Outcome(
        exit=status,
        run_dir=str(run_dir) if run_dir else None,
        seconds=round(time.monotonic() - began, 3),
        **progress.result(),
        failed_rank=failure.rank if status not in (0, PREEMPTED) else None,
        command=plan.command,
    )


@contextmanager
def started(plan: Plan, folder: Path, timeout: float | None) -> Iterator[Job]:
    """The running job, its signals forwarded; at the end of the block everything of it that still runs is ended."""
    environ = {**os.environ, **plan.variables, FOLDER: str(folder)}
    asked: deque[int] = deque([signal.SIGUSR1] if process.preempted() else [])

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN}
    try:
        # A terminal's own Ctrl-C reaches only us (new session). What is on our stdin is for whoever started us: a shell's
        # `while read` loop, a keyboard.
        with subprocess.Popen(
            plan.command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        ) as mpiexec:
            try:
                limit = float("inf") if timeout is None else time.monotonic() + timeout
                job = Job(mpiexec, folder, limit, asked)
                yield job
                job.ranks.close()
            finally:
                end_all(folder, patience=AFTER_TERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(job: Job, watch: Watch, view: View, progress: Progress, stderr: Stderr) -> None:
    """The launcher's loop: output, signals, events, clocks."""
    while not job.over():
        for stream, data in job.read():
            view.write(stream, data)
            if not job.ended_by:  # what the ranks say as we end them is no failure
                (stderr.feed if stream == 2 else stderr.hear)(data)
        take(watch, view, progress)
        job.forward(view, begun="start" in progress.latest)
        view.show(progress)
        job.mind(watch.done() and watch.left() >= watch.ranks)
    take(watch, view, progress)
    view.close(progress)


def take(watch: Watch, view: View, progress: Progress) -> None:
    """Take the new events in."""
    while events := watch.events():
        for event in events:
            progress.update(event)
            view.note(event)


def exit_status(job: Job, watch: Watch, reports: list[dict[str, object]], *, died: bool) -> int:
    """0, 1, 2, 75, or the status that the script has ended with after its run.

    DONE says that the run is complete. Of what comes after it DONE excuses MPI's own finalisation alone, which may die or hang.

    Args:
        reports: the ranks' own, of failures.
        died: whether a rank was ended by a signal; of which MPICH's mpiexec makes a status like any other.
    """
    code = job.process.returncode
    died = died or code >= DIED
    if reports:
        return int(str(reports[0]["status"]))
    if code in (PREEMPTED, BAD_CONFIGURATION):
        return code
    if watch.done():
        excused = job.ended_by == AFTER_END or (died and watch.left() >= watch.ranks and not job.ended_by)
        return 0 if excused else code if code >= 0 and not died else 1
    return 0 if code == 0 and watch.run_dir() is None and not job.ended_by else 1


def explain(view: View, job: Job, run_dir: Path | None, failure: Failure) -> None:
    """The last words on a failed run; the first failing rank's traceback at the very end."""
    code = job.process.returncode
    if job.ended_by:
        view.tell(f"the run was ended {job.ended_by}")
    elif code == 0 and not failure.text:
        view.tell(f"mpiexec ended with 0, but {run_dir}/DONE is missing: the run did not come to its end")
    if failure.rank is not None or failure.text:
        view.tell(blame(run_dir, failure))
    elif code and not job.ended_by:
        view.tell(f"mpiexec ended with status {code}")


def blame(run_dir: Path | None, failure: Failure) -> str:
    """The first failing rank, its log, and its traceback as it was."""
    line = "one rank failed first" if failure.rank is None else f"rank {failure.rank} failed first"
    line += f" ({failure.others} more after it)" if failure.others else ""
    log = run_dir / "logs" / f"rank_{failure.rank or 0:04d}.log" if run_dir and failure.rank is not None else None
    line += f"; its log: {log}" if log and log.exists() else ""
    return f"{line}\n{failure.text}".rstrip()
