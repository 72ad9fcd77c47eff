"""An MPI parameter server for PyTorch: rank 0 serves the weights inside `connect`, the script goes on on the workers.

    ps = mpips.connect(model, optimizer)  # of several ranks, rank 0 serves in here and ends
    loader = ps.shard(loader)  # this worker's part of it
    for epoch in ps.epochs(5):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()  # push, combine, step on the server, pull
        ps.validate(lambda: accuracy(model, test_set))

Importing this package does not initialise MPI. It takes flags that begin with `--mpips.` out of `sys.argv`, and remembers
SIGUSR1, which ends a run with a checkpoint, from then on.
"""

__version__ = "0.1.0"

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mpips import process

if TYPE_CHECKING:
    from mpips.client import Client
    from mpips.clients import Clients
    from mpips.config import Config, ConfigError, add_arguments
    from mpips.parameter_server import ParameterServer
    from mpips.run import Run, connect
    from mpips.server import Server
    from mpips.start import configure, device, join, worker_index, workers
    from mpips.worker import Worker

__all__ = [
    "Client",
    "Clients",
    "Config",
    "ConfigError",
    "ParameterServer",
    "Run",
    "Server",
    "Worker",
    "add_arguments",
    "configure",
    "connect",
    "device",
    "join",
    "worker_index",
    "workers",
]

_HOMES = {
    "mpips.client": ("Client",),
    "mpips.clients": ("Clients",),
    "mpips.config": ("Config", "ConfigError", "add_arguments"),
    "mpips.parameter_server": ("ParameterServer",),
    "mpips.run": ("Run", "connect"),
    "mpips.server": ("Server",),
    "mpips.start": ("configure", "device", "join", "worker_index", "workers"),
    "mpips.worker": ("Worker",),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line starts without waiting for torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'mpips' has no attribute {name!r}")


process.begin()
if any(word.startswith("--mpips.") for word in sys.argv[1:]):
    import_module("mpips.config").take_flags()
