"""An MPI parameter server for PyTorch: rank 0 serves the weights inside `connect`, the script continues on the workers.

    ps = mpips.connect(model, optimizer)  # with several ranks, rank 0 serves in this call and exits
    loader = ps.shard(loader)  # this worker's shard
    for epoch in ps.epochs(5):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()  # push, reduce, step on the server, pull
        ps.validate(lambda: accuracy(model, test_set))

Importing this package does not initialise MPI. It removes flags that begin with `--mpips.` from `sys.argv`. Unless
SIGUSR1 has a handler already, it also installs one: that signal then ends the run with a checkpoint.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mpips.process import __version__ as __version__
from mpips.process import lifecycle as process

if TYPE_CHECKING:
    from mpips.config import Config, ConfigError, add_arguments
    from mpips.data.clients import Clients
    from mpips.run import frameworks
    from mpips.run.connect import connect
    from mpips.run.run import Run
    from mpips.run.start import configure, device, join, worker_index, workers
    from mpips.server.parameter_server import ParameterServer
    from mpips.server.round_server import Server
    from mpips.worker.async_worker import Client
    from mpips.worker.round_worker import Worker

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
    "frameworks",
    "join",
    "worker_index",
    "workers",
]

_HOMES = {
    "mpips.worker.async_worker": ("Client",),
    "mpips.data.clients": ("Clients",),
    "mpips.config": ("Config", "ConfigError", "add_arguments"),
    "mpips.server.parameter_server": ("ParameterServer",),
    "mpips.run.connect": ("connect",),
    "mpips.run.run": ("Run",),
    "mpips.server.round_server": ("Server",),
    "mpips.run.start": ("configure", "device", "join", "worker_index", "workers"),
    "mpips.worker.round_worker": ("Worker",),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line starts without waiting for torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    if name == "frameworks":
        return import_module("mpips.run.frameworks")
    raise AttributeError(f"module 'mpips' has no attribute {name!r}")


process.begin()
if any(word.startswith("--mpips.") for word in sys.argv[1:]):
    import_module("mpips.config").take_flags()
