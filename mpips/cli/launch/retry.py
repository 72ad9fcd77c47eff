"""Starting a run again after a rank has died, from its last checkpoint.

A rank, a node or mpiexec that died is worth another attempt. So is an exception, or a status that the script ended with, if
the attempt has written a checkpoint: then the next one begins elsewhere. A bad setting, a preemption, a run that is complete,
and one that was ended by a signal to the launcher or by its time limit stay as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from mpips.cli.launch.command import LaunchCommand
from mpips.cli.launch.job import PREEMPTED, Ending, Outcome, attempt
from mpips.cli.screen import View
from mpips.config import ANSWERS, BAD_CONFIGURATION, settings_of

MakeCommand = Callable[[Mapping[str, str], int | None], LaunchCommand]  # from settings and a time limit


def run_again(
    command: MakeCommand, settings: Mapping[str, str], view: View, *, retries: int, timeout: int | None = None
) -> Outcome:
    """Run a command to its end, and after a death again, `retries` times at most; return the last outcome.

    Args:
        command: makes the command of an attempt from the settings that override all others and the seconds that are left.
        settings: the settings of the first attempt.
        view: where the attempts are shown.
        retries: how many times the run may be started again.
        timeout: seconds for all attempts together.
    """
    began, now, saved, tail = time.monotonic(), dict(settings), False, None
    for number in itertools.count(1):
        left = None if timeout is None else max(1, math.ceil(timeout - (time.monotonic() - began)))
        ending = attempt(command(now, left), view, timeout=left, before=tail)
        saved = saved or ending.saved
        reason = _refused(ending)
        if reason is not None or number > retries:
            return _give_up(ending, view, reason, number, retries, time.monotonic() - began)
        now = _next_settings(ending, now, settings, saved, view)
        tail = ending.tail if ending.tail and ending.tail.path.exists() else None  # the folder may have been renamed
        still = ", with no checkpoint since the attempt before" if number > 1 and not ending.saved else ""
        view.tell(f"{_how(ending)}{still}: attempt {number} of {retries} to go on, {_from(ending, view)}")
    raise AssertionError


def _refused(ending: Ending) -> str | None:
    """Return why a run is not started again, "" if that needs no word; None if it may be."""
    if ending.outcome.exit in (0, PREEMPTED, BAD_CONFIGURATION) or ending.asked or ending.done:
        return ""
    if ending.failure.died or ending.saved:
        return None
    return "not started again: nobody was killed, and there is no new checkpoint, so the next attempt would end as this one"


def _give_up(ending: Ending, view: View, reason: str | None, number: int, retries: int, seconds: float) -> Outcome:
    """Explain the last failure; return the outcome of all attempts."""
    for text in ending.why:
        view.tell(text)
    text = f"no attempt is left of {retries}" if reason is None else reason
    if retries and text and ending.why:
        view.tell(text)
    return dataclasses.replace(ending.outcome, attempts=number, seconds=round(seconds, 3))


def _next_settings(ending: Ending, now: Mapping[str, str], first: Mapping[str, str], saved: bool, view: View) -> dict[str, str]:
    """Return the settings with which the run goes on, whatever its `resume` was.

    Before it has begun, nothing is there that it could go on with: the settings stay. A checkpoint that `resume` names stays
    the one to begin from until the run has written its own.

    Args:
        ending: how the attempt ended.
        now: the settings of this attempt.
        first: the settings of the first attempt.
        saved: whether any attempt has written a checkpoint.
        view: where it is said that a folder was renamed.
    """
    if not ending.begun or ending.outcome.run_dir is None:
        return dict(now)
    folder = Path(ending.outcome.run_dir)
    if saved or _resume(folder) in ANSWERS:
        return {**first, "run_dir": str(folder), "resume": "auto"}
    if not any(folder.glob("checkpoints/*.h5")):  # with other checkpoints than its own a run is refused in its folder
        aside = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(aside)
        view.tell(f"what this attempt has written is in {aside} now")
    return dict(now)


def _resume(folder: Path) -> str:
    """Return the setting `resume` of the run in a folder."""
    return str(settings_of(str(folder / "config.yaml"))["resume"])


def _how(ending: Ending) -> str:
    """Return which rank died, and how."""
    failure, who = ending.failure, "a rank" if ending.failure.rank is None else f"rank {ending.failure.rank}"
    lines = failure.text.strip().splitlines()
    if not lines:
        return "mpiexec, or a node, died" if failure.rank is None else f"{who} failed"
    return f"{who} {lines[-1]}" if failure.died and len(lines) == 1 else f"{who} failed, {lines[0 if failure.died else -1]}"


def _from(ending: Ending, view: View) -> str:
    """Return where the next attempt goes on: from its newest whole checkpoint, or from the beginning."""
    from mpips import checkpoint  # imports torch

    if ending.outcome.run_dir is None:
        return "from where the settings say, as no run folder is known"
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        newest = checkpoint.newest(Path(ending.outcome.run_dir) / "checkpoints")
    for warning in passed_over:
        view.tell(f"warning: {warning.message}")
    return f"from {newest.name}" if newest else "from the beginning: there is no checkpoint"
