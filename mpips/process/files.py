"""Files that only their owner may read and write, whatever the umask: a run's folder may hold what the script has printed."""

from __future__ import annotations

import os
from pathlib import Path


def private(path: str, flags: int) -> int:
    """Open a file, created for its owner alone: an `opener` for `open`. A file that exists keeps its mode."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, data: bytes) -> None:
    """Write a file; a new one has mode 0600."""
    with open(path, "wb", opener=private) as file:
        file.write(data)
