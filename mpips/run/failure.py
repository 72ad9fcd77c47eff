"""A failing rank ends all ranks: otherwise the others would wait forever after an uncaught exception on one rank.

The failing rank's traceback goes to its log, to the screen and to the launcher, which shows the first traceback last.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from types import TracebackType

from mpips.checkpoint import CheckpointError
from mpips.comm import SERVER, Communicator
from mpips.config import BAD_CONFIGURATION, ConfigError
from mpips.model.message import CallError, NonFiniteError, WorkersLostError
from mpips.optim.snapshot import SnapshotError
from mpips.process import lifecycle as process
from mpips.report.run_report import LOG, stop_copying
from mpips.server.contract import ContractError

FAILED, PREEMPTED = 1, 75  # exit statuses; 75 is EX_TEMPFAIL: resume with --mpips.resume auto
TOGETHER_WITHIN = 3  # seconds within which all ranks end together
PATIENCE = 0.5  # seconds that a rank gives rank 0 to print the same refusal first
TOGETHER = (CallError, ContractError, NonFiniteError)  # raised on all ranks with the same text
SAYS_ALL = (*TOGETHER, CheckpointError, SnapshotError)  # printed without a traceback, which would add nothing


_failures: list[BaseException] = []


def happened() -> bool:
    """Return whether an uncaught exception is ending this process."""
    return bool(_failures)


def end_all_on_exception(communicator: Communicator) -> None:
    """Install an exception hook: from now on an uncaught exception ends all ranks, with status 1, or 2 for a bad setting.

    In a forked child, such as a DataLoader's worker, the hook that was there before is called: the child is no rank.
    """
    born, before = os.getpid(), sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != born:
            before(kind, error, trace)
            return
        _failures.append(error)
        status = BAD_CONFIGURATION if issubclass(kind, ConfigError) else FAILED
        try:
            _tell(communicator, kind, error, trace, status)
        finally:  # end even if the reason cannot be told
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
    """Write the reason to the log, to the launcher and to the screen. A failure of one of them does not stop the others."""
    text = "".join(traceback.format_exception(kind, error, trace))
    if LOG.handlers:  # else logging would print to the screen
        with suppress(Exception):
            LOG.error("failed\n%s", text)
    if issubclass(kind, ConfigError):
        if communicator.rank != SERVER:
            time.sleep(PATIENCE)  # if all ranks refuse, rank 0 prints and ends all
        text = f"mpips: {error}{f', on rank {communicator.rank}' if communicator.rank != SERVER else ''}\n"
    if issubclass(kind, SAYS_ALL):
        text = f"{kind.__name__}: {error}\n"
    if issubclass(kind, TOGETHER) and communicator.rank != SERVER:
        communicator.barrier(TOGETHER_WITHIN)  # rank 0 prints and ends all
    with suppress(Exception):
        process.tell_launcher(communicator.rank, text, status, died=issubclass(kind, WorkersLostError))
    if communicator.size > 1 and not issubclass(kind, ConfigError):
        text = f"mpips: rank {communicator.rank} on {socket.gethostname()} failed:\n{text}"
    stop_copying()  # the log has it already
    with suppress(Exception):
        sys.stderr.write(text.encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding))
        sys.stderr.flush()
