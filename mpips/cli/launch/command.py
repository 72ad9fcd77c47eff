"""The command that starts the ranks with the MPI that belongs to this Python.

Invariant: a variable is set only if the user has not set it, and the printed command is the command that runs, but for secrets
in it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpips.config import SET
from mpips.process.environment import SESSIONS, Mpiexec, cores, find_mpiexec, home, physical_cores, without_secrets

HOST_FLAGS = {
    "--host",
    "-host",
    "-H",
    "--hosts",
    "-hosts",
    "--hostfile",
    "-hostfile",
    "--machinefile",
    "-machinefile",
    "-f",
}
NODE_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE")  # files with one line for each slot, the name of its node
BIND = {4: "OMPI_MCA_hwloc_base_binding_policy", 5: "PRTE_MCA_hwloc_default_binding_policy"}
CROWD = {
    4: {"OMPI_MCA_rmaps_base_oversubscribe": "1"},
    5: {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
}


@dataclass(frozen=True)
class LaunchCommand:
    """A command, and the environment variables set for it because the user has not set them.

    Attributes:
        ranks: the number of ranks.
        tolerant: whether MPI lets the others go on when a rank dies.
        warnings: what is worth a warning.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    ranks: int = 0
    tolerant: bool = False
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self._line(self.command)

    def shown(self) -> str:
        """Return the line as it may be printed into a log: the values of the script's secrets are hidden."""
        return self._line(without_secrets(self.command))

    def _line(self, command: Sequence[str]) -> str:
        return " ".join([f"{name}={shlex.quote(value)}" for name, value in self.variables.items()] + [shlex.join(command)])


def launch_command(
    size: int,
    script: Sequence[str],
    *,
    mpi_args: Sequence[str] = (),
    timeout: int | None = None,
    settings: Mapping[str, str] | None = None,
    tolerant: bool = False,
    environ: Mapping[str, str] = os.environ,
    mpiexec: Mpiexec | None = None,
) -> LaunchCommand:
    """Return the command that starts `size` ranks of a script.

    Args:
        size: the number of ranks.
        script: a file and its flags.
        mpi_args: further flags for mpiexec.
        timeout: seconds after which mpiexec ends the run.
        settings: settings of mpips that override all others.
        tolerant: whether MPI is to let the others go on when a rank dies.
        environ: the environment.
        mpiexec: the mpiexec; by default the one that belongs to this Python.

    Raises:
        FileNotFoundError: there is no mpiexec.
        LookupError: it does not let the other ranks live when one dies, and is to.
    """
    mpiexec = mpiexec or find_mpiexec()
    nodes = None if HOST_FLAGS & {argument.split("=")[0] for argument in mpi_args} else _nodes(environ)
    defaults = {"PYTHONUNBUFFERED": "1", **_variables(mpiexec, size, nodes, environ)}  # ranks of MPICH write to pipes
    chosen = {name: value for name, value in defaults.items() if name not in environ}
    if timeout is not None:
        chosen["MPIEXEC_TIMEOUT"] = str(timeout)  # the only time limit that all mpiexecs know
    if settings:
        chosen[SET] = json.dumps(settings)
        if mpiexec.family == "Open MPI":  # it passes only its own variables to other nodes
            mpi_args = ("-x", SET, *mpi_args)
    if tolerant:
        if mpiexec.family != "Open MPI" or mpiexec.major < 5:
            raise LookupError(f"--ft or min_workers: given with {mpiexec} at {mpiexec.path}, expected Open MPI 5")
        mpi_args = ("--with-ft", "ulfm", *mpi_args)
    command = (mpiexec.path, "-n", str(size), *mpi_args, sys.executable, *script)
    return LaunchCommand(command, chosen, size, tolerant, _crowded(size, nodes))


def _variables(mpiexec: Mpiexec, size: int, nodes: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that let an unprepared machine run it: as root, on few cores, with torch's threads.

    `nodes` is None if the number of nodes is unknown.
    """
    defaults: dict[str, str] = {}
    if nodes:
        defaults["OMP_NUM_THREADS"] = str(max(1, nodes * cores() // size))
    if mpiexec.family != "Open MPI":
        return defaults
    series = 4 if 0 < mpiexec.major < 5 else 5
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    defaults |= home()
    given, usable = environ.get("TMPDIR"), tempfile.gettempdir()
    if given and os.path.abspath(given) != usable:  # TMPDIR is read-only or full: Open MPI could not start there
        defaults[SESSIONS[series]] = usable
    defaults[BIND[series]] = "none"  # the default binds a rank with all its torch threads to one core
    if nodes and size > nodes * physical_cores():
        defaults |= CROWD[series]
        defaults["OMPI_MCA_mpi_yield_when_idle"] = "1"  # else waiting ranks take the cores from those that compute
    return defaults


def _nodes(environ: Mapping[str, str]) -> int:
    """Return the number of nodes of the allocation; 1, this machine, if there is none."""
    for name in NODE_FILES:
        with suppress(KeyError, OSError):
            return max(1, len(set(Path(environ[name]).read_text().split())))
    given = environ.get("SLURM_JOB_NUM_NODES", "1")
    return int(given) if given.isdigit() else 1


def _crowded(size: int, nodes: int | None) -> tuple[str, ...]:
    """Return a warning if there are more ranks than cores."""
    if nodes and size > nodes * cores():
        return (f"{size} ranks on {nodes * cores()} cores: it runs, but the ranks take turns",)
    return ()
