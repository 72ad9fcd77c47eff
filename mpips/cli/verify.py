"""`mpips verify`: which checkpoints of a run are whole, and what a resume would take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpips import checkpoint
from mpips.report.run_report import run_id


@dataclass(frozen=True)
class Verdict:
    """What is known of one checkpoint.

    Attributes:
        path: the file.
        bytes: its size; 0 if it cannot be read.
        round: the round after which it was written; None if it is not whole.
        why: why no run can go on from it; "" if one can.
    """

    path: Path
    bytes: int
    round: int | None
    why: str


def verdicts(given: Path) -> Iterator[Verdict]:
    """Yield a verdict on each checkpoint, the oldest first.

    Every byte of a checkpoint is compared with its SHA-256, and all that is in it is read.

    Args:
        given: a run folder, its folder of checkpoints, or one checkpoint.
    """
    paths = checkpoint.listed(folder_of(given))[::-1] if given.is_dir() else [given]
    for path in paths:
        verdict = _verdict(path, run_id(path.parent.parent) if given.is_dir() else "")
        if path.exists() or not (verdict.why and given.is_dir()):  # else a run that goes on has pruned it meanwhile
            yield verdict


def folder_of(given: Path) -> Path:
    """Return the folder of checkpoints of a run folder; the folder itself if it has no such folder."""
    inner = given / "checkpoints"
    return inner if inner.is_dir() else given


def _verdict(path: Path, run: str) -> Verdict:
    size = 0
    try:
        size = path.stat().st_size
        tree = checkpoint.load(path)
        number, other = int(tree["round"]), tree.get("run", run)
    except (KeyError, TypeError, ValueError):
        return Verdict(path, size, None, "it holds no round: no run has written it")
    except checkpoint.CheckpointError as error:
        return Verdict(path, size, None, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return Verdict(path, 0, None, error.strerror or str(error))
    foreign = f"it is of run {other}, its folder of run {run}" if run and other != run else ""
    return Verdict(path, size, number, foreign)


def resumed_from(given: Path, found: list[Verdict]) -> str:
    """Return in words what `--mpips.resume auto` would do with the run folder, or `resume` with the one checkpoint."""
    if not given.is_dir():
        return f"resume takes {given.name}" if not found[0].why else f"resume refuses {given.name}"
    if not found:
        return "there is no checkpoint: a resume begins anew"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdicts have said it
        newest = checkpoint.newest(folder_of(given))
    if newest is None:
        return "resume refuses the folder: every checkpoint is damaged"
    why = next((one.why for one in found if one.path == newest), "")
    if not why:
        return f"resume takes {newest.name}"
    usable = next((one.path.name for one in reversed(found) if not one.why), None)
    return f"resume would take {newest.name}, and refuse it; {f'name {usable} instead' if usable else 'none can be taken'}"
