"""Settings that are paths: whether they exist or can be created. Only the machine that uses a path can tell."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from mpips.config.error import ConfigError, check, shown

ANSWERS = ("no", "auto", "aside")  # values of `resume` that are no path


def check_resume(resume: str) -> None:
    """Raise ConfigError if `resume` names a path that does not exist."""
    ok = resume in ANSWERS or os.path.exists(resume)
    check("resume", resume, "no, auto, aside, or an existing checkpoint or run folder", ok)


def check_run_dir(run_dir: str | None) -> None:
    """Raise ConfigError if the folder neither exists nor can be created. Creates nothing."""
    if run_dir is None:
        return
    path = Path(run_dir).absolute()
    try:
        while not _there(path):
            path = path.parent
        mode = path.stat().st_mode  # raises for a dangling link
    except OSError as error:
        raise no_folder(run_dir, error) from None
    if not stat.S_ISDIR(mode):
        raise no_folder(run_dir, NotADirectoryError(0, f"{path} is no folder"))
    if not os.access(path, os.W_OK | os.X_OK):
        raise no_folder(run_dir, PermissionError(0, f"{path} cannot be written to"))


def _there(path: Path) -> bool:
    """Return whether the path exists; a dangling link does."""
    with suppress(FileNotFoundError):
        return bool(path.lstat())
    return False


def no_folder(run_dir: str, error: OSError) -> ConfigError:
    """Return the error for a run folder that cannot be written."""
    why = error.strerror or str(error)
    return ConfigError(
        f"run_dir: given {shown(run_dir)}, which cannot be written ({why}), allowed: a folder that can be made, by "
        f"--mpips.run_dir"
    )
