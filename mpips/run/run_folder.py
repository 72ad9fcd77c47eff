"""The folder that a run writes to, and the checkpoint that it resumes from."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import re
import socket
import time
from pathlib import Path

from mpips import checkpoint
from mpips.config import ANSWERS, Config, ConfigError
from mpips.process.lifecycle import emit
from mpips.report.run_report import script_name

_used: set[str] = set()  # run folders that this process has used
_held: dict[Path, int] = {}  # lock files held by this process, open: closing one releases its lock


def new_folder(count: int = 1) -> Path:
    """Make a new folder for run number `count` of this script.

    Raises:
        ConfigError: the folder cannot be made.
    """
    now = time.strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs", f"{now}{f'.{number}' if number > 1 else ''}-{_name(count)}").absolute()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"run_dir: given none, and {str(folder)!r} cannot be made ({error.strerror}), allowed: a folder that can be "
                f"made, by --mpips.run_dir"
            ) from error
        return folder
    raise AssertionError


def hold(folder: Path) -> None:
    """Lock a run's folder until `release`, or until this process ends, so that no other run writes to it. Make it if need be.

    Raises:
        ConfigError: another run has locked it.
    """
    path = folder / ".lock"
    if path in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows both
        owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise ConfigError(
            f"run_dir: given {str(folder)!r}, which {owner} writes to, allowed: for each run a folder of its own, by "
            f"--mpips.run_dir"
        ) from error
    except OSError as error:
        os.close(file)
        emit(2, f"mpips: {str(folder)!r} cannot be locked ({error.strerror}): see that no other run writes to it\n")
        return
    _held[path] = file
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def release(folder: Path) -> None:
    """Unlock a run's folder: the run has ended, and the process may go on. A folder that is not locked stays as it is."""
    file = _held.pop(folder / ".lock", None)
    if file is not None:
        os.close(file)


def of_run(config: Config, count: int) -> Config:
    """Return the settings of the script's run number `count`, from 1.

    A run whose folder an earlier run of the process uses gets a folder beside it. A checkpoint or folder that `resume` names
    applies to the first run only; later runs are new.
    """
    if count > 1 and config.resume not in ANSWERS:
        config = dataclasses.replace(config, resume="no")
    given = config.run_dir
    if given is None:
        return config
    again = given in _used
    _used.add(given)
    return dataclasses.replace(config, run_dir=f"{given}-{count}") if again else config


def check_new(config: Config) -> None:
    """Raise ConfigError if a new run is to write to a folder that holds another run."""
    if config.run_dir and config.resume == "no" and holds_run(Path(config.run_dir)):
        raise _holds_another(Path(config.run_dir), "to go on with that run, by --mpips.resume auto")


def holds_run(folder: Path) -> bool:
    """Return whether a run has begun in the folder. A run that was refused leaves only its log and events."""
    return any((folder / name).exists() for name in ("env.json", "metrics.csv")) or _has_checkpoints(folder)


def _has_checkpoints(folder: Path) -> bool:
    """Return whether the folder has checkpoints."""
    return any(folder.glob("checkpoints/*.h5"))


def set_aside(folder: Path) -> Path:
    """Rename a run's folder to the first unused name of `<name>.1`, `<name>.2`, ..., and return the new path.

    Raises:
        ConfigError: another process writes to the folder, or it cannot be renamed.
    """
    hold(folder)
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.{number}")
        if os.path.lexists(aside):
            continue
        try:
            folder.rename(aside)
        except OSError as error:
            raise ConfigError(
                f"resume: given 'aside', but {str(folder)!r} cannot be renamed ({error.strerror}), allowed: another run_dir"
            ) from error
        release(folder)
        return aside
    raise AssertionError


def _name(count: int) -> str:
    """Return the script's name, with the run's number if it is not the first."""
    return script_name() if count == 1 else f"{script_name()}.run{count}"


def last_folder(count: int = 1) -> Path | None:
    """Return the folder with a checkpoint that run number `count` of this script has written to last, or None."""
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d-\d{{6}}(\.\d+)?-{re.escape(_name(count))}")
    runs = [path.absolute() for path in Path("runs").glob("*") if pattern.fullmatch(path.name) and _has_checkpoints(path)]
    return max(runs, key=_written, default=None)


def _written(folder: Path) -> float:
    """Return the time of the last write to a run's folder."""
    events = folder / "events.jsonl"  # a resumed run writes here first
    return (events if events.exists() else folder).stat().st_mtime


def folders(run_dir: str | None, resume: str, count: int = 1) -> tuple[Path, Path | None]:
    """Return the run folder, and the checkpoint to resume from, if any.

    Raises:
        ConfigError: the run would write where another has, or every checkpoint is damaged.
    """
    given = Path(run_dir).absolute() if run_dir else None
    if resume in ("no", "aside"):
        if given and resume == "aside" and holds_run(given):
            given = given.resolve()  # rename the target of a link, not the link
            set_aside(given)
        return given or new_folder(count), None
    if resume == "auto":
        folder = given or last_folder(count) or new_folder(count)
        return folder, _newest(folder, resume)
    source = Path(resume).absolute()
    own = source if source.is_dir() else source.parent.parent if source.parent.name == "checkpoints" else None
    start = _newest(source, resume) if source.is_dir() else source
    if given and own and given.exists() and own.exists() and given.samefile(own):
        return own, start  # not `given`: the same folder, but checkpoints are compared by path
    if given and holds_run(given):
        raise _holds_another(given, "none, which is to go on in the checkpoint's own")
    return given or own or new_folder(count), start


def newest_now(folder: Path, start: Path | None, resume: str) -> Path | None:
    """Return the checkpoint to resume from, now that the folder is locked: another run may have written since `folders`.

    Args:
        folder: the run folder.
        start: the checkpoint that `folders` has found.
        resume: the setting.
    """
    chosen = resume == "auto" or (start is not None and start.parent == folder / "checkpoints" and Path(resume).is_dir())
    return _newest(folder, resume) if chosen else start


def _holds_another(given: Path, instead: str) -> ConfigError:
    """Return the error for a folder that holds another run."""
    return ConfigError(
        f"run_dir: given {str(given)!r}, which holds a run, allowed: a new folder, or {instead}, or to set it aside and begin "
        f"anew, by --mpips.resume aside"
    )


def _newest(folder: Path, resume: str) -> Path | None:
    """Return the newest valid checkpoint; raise ConfigError if there are checkpoints, but all are damaged."""
    found = checkpoint.newest(folder / "checkpoints")
    if found is None and _has_checkpoints(folder):
        raise ConfigError(
            f"resume: given {resume!r}, but every checkpoint in {str(folder / 'checkpoints')!r} is damaged, allowed: another "
            f"run, or to begin from nothing, by --mpips.resume aside"
        )
    return found
