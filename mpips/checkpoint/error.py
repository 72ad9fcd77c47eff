"""The error for a checkpoint that cannot be written or read: the path, what is wrong, and a remedy.

There is one class for all causes, so that a training loop needs one `except`. The operating system's error is its `__cause__`.
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
    """A checkpoint that could not be saved, or a file that may not be loaded as one."""

    @classmethod
    def from_os(cls, path: Path, action: str, error: OSError) -> "CheckpointError":
        """Return the error for an `action` on `path` that failed with an OSError, with a remedy."""
        remedy = _REMEDY.get(error.errno or 0, "check the disk")
        return cls(f"{path}: cannot {action} ({error.strerror or error}); {remedy}")
