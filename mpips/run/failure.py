"""A failing rank ends all ranks: an unhandled exception on one would otherwise leave the others waiting for ever.

The failing rank's traceback goes to its log, to the screen and to the launcher, which shows the first one last.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mpips.checkpoint import CheckpointError
from mpips.comm import SERVER, Communicator
from mpips.config import BAD_CONFIGURATION, ConfigError
from mpips.model.message import CallError, NonFiniteError
from mpips.optim.snapshot import SnapshotError
from mpips.process import lifecycle as process
from mpips.report.run_report import LOG, stop_copying
from mpips.server.contract import ContractError

FAILED, PREEMPTED = 1, 75  # exit statuses; 75 is EX_TEMPFAIL: start again with --mpips.resume auto
PATIENCE = 0.5  # seconds for rank 0 to say what a rank that refuses a setting would say
TOGETHER = (CallError, ContractError, NonFiniteError)  # raised on all ranks at once, with one text
SAYS_ALL = (*TOGETHER, CheckpointError, SnapshotError)  # the place in the code says nothing that the text does not


_failures: list[BaseException] = []


def happened() -> bool:
    """Whether an exception that nobody caught is ending this process."""
    return bool(_failures)


def end_all_on_exception(communicator: Communicator) -> None:
    """From now on an exception that nobody catches ends all ranks with status 1."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _failures.append(error)
        status = BAD_CONFIGURATION if issubclass(kind, ConfigError) else FAILED
        try:
            _tell(communicator, kind, error, trace, status)
        finally:  # whatever keeps a rank from saying why it ends, it ends
            if communicator.size > 1:
                communicator.abort(status)
            elif status != FAILED:
                with suppress(Exception):
                    sys.stdout.flush()
                os._exit(status)  # Python's own status after an excepthook is 1

    sys.excepthook = hook
    process.guarded()


def _tell(
    communicator: Communicator, kind: type[BaseException], error: BaseException, trace: TracebackType | None, status: int
) -> None:
    """Say in the log, to the launcher and on the screen why this rank ends; where one of them cannot be written, the others."""
    text = "".join(traceback.format_exception(kind, error, trace))
    if LOG.handlers:  # else logging prints it on the screen
        with suppress(Exception):
            LOG.error("failed\n%s", text)
    if issubclass(kind, ConfigError):
        if communicator.rank != SERVER:
            time.sleep(PATIENCE)  # where all refuse alike rank 0 prints and ends all
        text = f"mpips: {error}{f', on rank {communicator.rank}' if communicator.rank != SERVER else ''}\n"
    if issubclass(kind, SAYS_ALL):
        text = f"{kind.__name__}: {error}\n"
    if issubclass(kind, TOGETHER) and communicator.rank != SERVER:
        communicator.barrier(patience=3)  # rank 0 prints and ends all
    with suppress(Exception):
        process.tell_launcher(communicator.rank, text, status)
    if communicator.size > 1 and not issubclass(kind, ConfigError):
        text = f"mpips: rank {communicator.rank} on {socket.gethostname()} failed:\n{text}"
    stop_copying()  # it is in the log
    with suppress(Exception):
        sys.stderr.write(text.encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding))
        sys.stderr.flush()


def tell_left(rank: int) -> None:
    """Tell the launcher that this rank's program has come to its end."""
    if launch := os.environ.get("MPIPS_LAUNCH_DIR"):
        with suppress(OSError):
            Path(launch, f"left_{rank}").touch()
