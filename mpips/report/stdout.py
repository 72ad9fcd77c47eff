"""Printing a command's output: either all of it is written, or the command ends with an exit status that says so."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from mpips.process import lifecycle as process

FAILED = 1
CUT = 128 + signal.SIGPIPE  # the shell's status for a command whose reader (such as `head`) has closed the pipe


class OutputError(Exception):
    """Output that could not be written. `status` is the exit status; the text is empty if nothing is to be printed about it."""

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


def write(text: str) -> None:
    """Print a text and a newline, and flush stdout.

    Raises:
        OutputError: stdout is closed, its disk is full, or its reader has gone.
    """
    if 1 in process.closed:
        raise OutputError("stdout is closed, expected a terminal, file or pipe")
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a path, say, that the stream's encoding has no form of
            coding = sys.stdout.encoding
            print(text.encode(coding, "backslashreplace").decode(coding), flush=True)
    except BrokenPipeError:
        _forget()
        raise OutputError("", CUT) from None
    except OSError as error:
        _forget()
        raise OutputError(f"stdout cannot be written ({error.strerror})") from None


def _forget() -> None:
    """Redirect stdout to /dev/null: Python would try to write the rest at exit, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
