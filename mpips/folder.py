"""Where a run writes, and from which checkpoint it goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path

from mpips import checkpoint
from mpips.config import ConfigError
from mpips.report import script_name


def new_folder() -> Path:
    """A folder for a new run of this script, not yet made."""
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{script_name()}"
    folder = Path("runs") / name
    number = 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder.absolute()


def last_folder() -> Path | None:
    """The newest run of this script that has a checkpoint."""
    ours = re.compile(rf"\d{{4}}-\d\d-\d\d-\d{{6}}-{re.escape(script_name())}(-\d+)?")
    found = [path for path in Path("runs").glob("*") if ours.fullmatch(path.name)]
    runs = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((run.absolute() for run in runs if any(run.glob("checkpoints/*.h5"))), None)


def check_resume(resume: str) -> None:
    """Raise ConfigError if `resume` names something that is not there."""
    if resume not in ("no", "auto") and not Path(resume).exists():
        raise ConfigError(f"resume: given {resume!r}, allowed: no, auto, or an existing checkpoint or run folder")


def folders(run_dir: str | None, resume: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from if any."""
    given = Path(run_dir).absolute() if run_dir else None
    if resume == "no":
        return given or new_folder(), None
    if resume == "auto":
        folder = given or last_folder() or new_folder()
        return folder, checkpoint.newest(folder / "checkpoints")
    source = Path(resume).absolute()
    if source.is_dir():
        return given or source, checkpoint.newest(source / "checkpoints")
    own = source.parent.parent if source.parent.name == "checkpoints" else new_folder()
    return given or own, source
