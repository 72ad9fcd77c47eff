"""What a checkpoint that cannot be written or read says: the path, what is wrong, what to do.

One class for all causes, so that a training loop needs one `except`; the operating system's error is its `__cause__`.
"""

import errno
from pathlib import Path

_REMEDY = {
    errno.ENOENT: "create the folder first, or correct its name",
    errno.ENOTDIR: "give a folder",
    errno.ENOSPC: "free some space, keep fewer checkpoints or choose another disk",
    errno.EDQUOT: "free some of your quota, keep fewer checkpoints or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may read and write",
    errno.EPERM: "choose a folder that you may read and write",
}


class CheckpointError(Exception):
    """A checkpoint could not be saved, or is not one that may be loaded."""

    @classmethod
    def from_os(cls, path: Path, action: str, error: OSError) -> "CheckpointError":
        """Return the error that says which `action` on `path` failed, why, and what to do."""
        remedy = _REMEDY.get(error.errno or 0, "check the disk")
        return cls(f"{path}: cannot {action} ({error.strerror or error}); {remedy}")
