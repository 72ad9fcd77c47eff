"""What a command prints: all of it is written, or it ends with a status that says that it is not."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from mpips.process import lifecycle as process

FAILED = 1
CUT = 128 + signal.SIGPIPE  # what a shell says of a command whose reader, `head` say, has had enough


class OutputError(Exception):
    """What was to be printed is not: `status` is the exit status, the text is empty where nothing is to be said."""

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


def write(text: str) -> None:
    """Print a text, which ends its last line, and see that it is out.

    Raises:
        OutputError: stdout is closed, its disk is full, or nobody reads it any more.
    """
    if 1 in process.closed:
        raise OutputError("stdout is closed, expected a terminal, file or pipe")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _forget()
        raise OutputError("", CUT) from None
    except OSError as error:
        _forget()
        raise OutputError(f"stdout cannot be written ({error.strerror})") from None


def _forget() -> None:
    """Let go of what is not written: Python would try once more at its end, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
