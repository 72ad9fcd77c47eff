"""The SHA-256 of a checkpoint, stored beside it as `<name>.sha256`, in the format that `sha256sum -c` reads.

The bytes that were hashed are the bytes that are read: `verified` returns the open file, not its name. While a checkpoint of
the same step is being replaced, the sidecar lists both hashes, so that after a crash either the old or the new file is valid.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mpips.checkpoint.error import CheckpointError

_BLOCK = 1 << 20
_LONGEST = 1 << 16  # bytes of a sidecar; a line is about 90


def beside(checkpoint: Path) -> Path:
    """Return the path of the checkpoint's sidecar."""
    return checkpoint.with_name(f"{checkpoint.name}.sha256")


def digest(file: BinaryIO) -> str:
    """Return the SHA-256 of the whole file, and rewind the file."""
    file.seek(0)
    sha = hashlib.sha256()
    while block := file.read(_BLOCK):
        sha.update(block)
    file.seek(0)
    return sha.hexdigest()


def lines(checkpoint: Path, digests: list[str]) -> bytes:
    """Return the sidecar's contents for a checkpoint that may have any of these digests."""
    return "".join(f"{digest}  {checkpoint.name}\n" for digest in digests).encode()


def digests(checkpoint: Path) -> list[str]:
    """Return the digests that the sidecar lists for this checkpoint: none, one, or two during a replacement."""
    if not beside(checkpoint).is_file():
        return []
    with open(beside(checkpoint), "rb") as file:
        text = file.read(_LONGEST).decode(errors="replace")
    return re.findall(rf"^([0-9a-f]{{64}}) [ *]{re.escape(checkpoint.name)}$", text, re.MULTILINE)


@contextmanager
def verified(checkpoint: Path) -> Iterator[BinaryIO]:
    """Open the checkpoint for reading after checking its SHA-256; raise CheckpointError if it is wrong."""
    try:
        if checkpoint.exists() and not checkpoint.is_file():  # a pipe would block
            raise CheckpointError(f"{checkpoint}: not a regular file; give the path of a checkpoint")
        with open(checkpoint, "rb") as file:
            _check(checkpoint, file)
            yield file
    except OSError as error:
        raise CheckpointError.from_os(checkpoint, "read the checkpoint", error) from error


def _check(checkpoint: Path, file: BinaryIO) -> None:
    """Raise CheckpointError unless the file's SHA-256 is listed in the sidecar."""
    expected = digests(checkpoint)
    if not expected:
        raise CheckpointError(
            f"{checkpoint}: no SHA-256 for it in {beside(checkpoint).name}; expected a line as sha256sum writes it; "
            "restore that file too, or use another checkpoint"
        )
    found = digest(file)
    if found not in expected:
        raise CheckpointError(
            f"{checkpoint}: damaged: SHA-256 {found[:12]}.. of {os.fstat(file.fileno()).st_size} bytes, "
            f"expected {expected[0][:12]}..; restore it, or use another checkpoint"
        )
