"""Where a run writes, and from which checkpoint it goes on."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

from mpips import checkpoint
from mpips.config import Config, ConfigError
from mpips.report import script_name

_used: set[str] = set()  # run folders given in this process


def new_folder(count: int = 1) -> Path:
    """A folder for a new run of this script, not yet made; of its run number `count`."""
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{_name(count)}"
    folder = Path("runs") / name
    number = 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder.absolute()


def of_run(config: Config, count: int) -> Config:
    """The settings of a script's run number `count`, from 1: one in the folder of an earlier run gets one beside it."""
    given = config.run_dir
    if given is None:
        return config
    again = given in _used
    _used.add(given)
    return dataclasses.replace(config, run_dir=f"{given}-{count}") if again else config


def _name(count: int) -> str:
    return script_name() if count == 1 else f"{script_name()}.run{count}"


def last_folder(count: int = 1) -> Path | None:
    """The newest run of this script, its run number `count`, that has a checkpoint."""
    ours = re.compile(rf"\d{{4}}-\d\d-\d\d-\d{{6}}-{re.escape(_name(count))}(-\d+)?")
    found = [path for path in Path("runs").glob("*") if ours.fullmatch(path.name)]
    runs = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((run.absolute() for run in runs if any(run.glob("checkpoints/*.h5"))), None)


def check_resume(resume: str) -> None:
    """Raise ConfigError if `resume` names something that is not there."""
    if resume not in ("no", "auto") and not Path(resume).exists():
        raise ConfigError(f"resume: given {resume!r}, allowed: no, auto, or an existing checkpoint or run folder")


def folders(run_dir: str | None, resume: str, count: int = 1) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from if any."""
    given = Path(run_dir).absolute() if run_dir else None
    if resume == "no":
        return given or new_folder(count), None
    if resume == "auto":
        folder = given or last_folder(count) or new_folder(count)
        return folder, checkpoint.newest(folder / "checkpoints")
    source = Path(resume).absolute()
    if source.is_dir():
        return given or source, checkpoint.newest(source / "checkpoints")
    own = source.parent.parent if source.parent.name == "checkpoints" else new_folder(count)
    return given or own, source
