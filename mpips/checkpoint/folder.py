"""The checkpoints of one run in one folder: `round_00000042.h5`, each with its sidecar.

At every instant, even after a crash or a power cut, `newest` finds the last checkpoint that was published completely, or the
one before it. A published checkpoint is never modified in place.
"""

import itertools
import os
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mpips.checkpoint import sidecar
from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.latch import fsync, if_supported, pwrite_all
from mpips.checkpoint.layout import Tree
from mpips.checkpoint.snapshot import Snapshot
from mpips.checkpoint.writer import write

_NAME = re.compile(r"round_(\d{8,})\.h5(\.sha256)?")  # a checkpoint, or its sidecar


def save(folder: Path, step: int, tree: Tree, keep: int = 3) -> Path:
    """Write `tree` as the checkpoint of `step`, delete all but the `keep` newest checkpoints up to it, and return its path.

    Raises:
        CheckpointError: the operating system failed. Every older checkpoint is unchanged.
        ValueError: `step` or `keep` is out of range, or the tree holds something that cannot be stored.
        TypeError: the tree holds something that cannot be stored.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step={step}, keep={keep}: expected a step of at least 0 and at least 1 checkpoint to keep")
    path = save_snapshot(folder, step, Snapshot(tree))
    prune(path.parent, step, keep)
    return path


def save_snapshot(folder: Path, step: int, snapshot: Snapshot) -> Path:
    """Write a snapshot as `save` does, but keep all older checkpoints; return its path."""
    path = Path(folder) / f"round_{step:08d}.h5"
    try:
        _remove_stale(path.parent)
        with _temporary(path, 0o600) as file:
            _publish(path, file, write(file.fileno(), snapshot))
    except OSError as error:
        raise CheckpointError.from_os(path, "save the checkpoint", error) from error
    return path


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the `keep` newest up to `step`, the one just written."""
    try:
        # In sorted order a checkpoint is removed before its sidecar, so none is ever left without.
        found = [(int(match[1]), name) for name in sorted(os.listdir(folder)) if (match := _NAME.fullmatch(name))]
        steps = sorted(saved for saved, name in found if name.endswith(".h5") and saved <= step)
        for saved, name in found:
            if saved < steps[-keep:][0]:
                os.unlink(folder / name)
    except OSError as error:
        warnings.warn(f"{folder}: cannot remove old checkpoints ({error}); remove them by hand", stacklevel=3)


def set_newer_aside(path: Path) -> Path | None:
    """Move the checkpoints newer than `path`, from which a run resumes, to a folder beside it: their continuation is abandoned.

    Returns:
        The folder, `aside.1` or the next unused name; None if there are no newer checkpoints.

    Raises:
        CheckpointError: the operating system failed.
    """
    found = listed(path.parent)
    newer = found[: found.index(path)]
    if not newer:
        return None
    try:
        number = next(n for n in itertools.count(1) if not (path.parent / f"aside.{n}").exists())
        aside = path.parent / f"aside.{number}"
        aside.mkdir()
        for old in newer:  # the newest first: after a crash the rest is consistent, each checkpoint with its hash
            beside = sidecar.beside(old)
            if beside.exists():
                shutil.copy(beside, aside / beside.name)  # with its mode
            os.replace(old, aside / old.name)
            beside.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError.from_os(path.parent, "set newer checkpoints aside", error) from error
    return aside


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose SHA-256 is right, with a warning for each newer one whose SHA-256 is wrong."""
    for path in listed(Path(folder)):
        try:
            with sidecar.verified(path):
                return path
        except CheckpointError as error:
            warnings.warn(f"passing over a checkpoint: {error}", stacklevel=2)
    return None


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, whole or not, newest first; an empty list if the folder does not exist yet."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError.from_os(folder, "list the checkpoints", error) from error
    steps = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name)) and not match[2]}
    return [folder / name for name in sorted(steps, key=steps.__getitem__, reverse=True)]


def _publish(path: Path, file: BinaryIO, new: str) -> None:
    """Make the finished temporary file visible as `path`. The order of these steps makes a save safe against crashes.

    Args:
        path: the checkpoint's path.
        file: the temporary file.
        new: its SHA-256.
    """
    old = sidecar.digests(path) if path.exists() else []
    _write_sidecar(path, [new, *old])
    mode = stat.S_IMODE(os.stat(sidecar.beside(path)).st_mode)  # the owner's alone, and what the umask leaves of it
    if_supported(os.fchmod, file.fileno(), mode)
    fsync(file.fileno())
    _sync(path.parent)  # the hash must be durable before the checkpoint is visible
    os.replace(_temporary_name(path), path)
    _sync(path.parent)
    if old:
        _write_sidecar(path, [new])
        _sync(path.parent)


def _write_sidecar(path: Path, digests: list[str]) -> None:
    """Replace the sidecar of `path` by one that lists these hashes."""
    target = sidecar.beside(path)
    with _temporary(target, 0o600) as file:
        pwrite_all(file.fileno(), memoryview(sidecar.lines(path, digests)), 0)
        fsync(file.fileno())
        os.replace(_temporary_name(target), target)


@contextmanager
def _temporary(path: Path, mode: int) -> Iterator[BinaryIO]:
    """Create the file that is to replace `path`. Its temporary name is removed at the end of the context."""
    name = _temporary_name(path)
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "w+b") as file:
            yield file
    finally:
        with suppress(OSError):
            os.unlink(name)


def _temporary_name(path: Path) -> Path:
    """Return the name of the temporary file for `path`, which contains this host and process id."""
    return path.with_name(f".tmp.{path.name}@{socket.gethostname()}.{os.getpid()}")


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of dead processes of this host, and of an earlier process with this process's id."""
    for name in os.listdir(folder):
        match = re.fullmatch(rf"\.tmp\.round_.+@{re.escape(socket.gethostname())}\.(\d{{1,9}})", name)
        if match and not _runs(int(match[1])):
            with suppress(OSError):
                os.unlink(folder / name)


def _runs(pid: int) -> bool:
    """Return whether another process with this id exists."""
    try:
        os.kill(pid, 0)  # signal 0 only checks for existence
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _sync(folder: Path) -> None:
    """Make the names in the folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)
