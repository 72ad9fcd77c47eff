"""The command that starts the ranks with the MPI that belongs to this Python.

Invariant: a variable of others is set only where the user has not set it, and what is printed is what is run.
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
from mpips.process.environment import Mpiexec, cores, find_mpiexec, home, physical_cores

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
NODE_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE")  # a line for each slot: its node's name
BIND = {4: "OMPI_MCA_hwloc_base_binding_policy", 5: "PRTE_MCA_hwloc_default_binding_policy"}
SESSIONS = {4: "OMPI_MCA_orte_tmpdir_base", 5: "PRTE_MCA_prte_tmpdir_base"}
CROWD = {
    4: {"OMPI_MCA_rmaps_base_oversubscribe": "1"},
    5: {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
}


@dataclass(frozen=True)
class Plan:
    """One command, and the variables set for it because the user has not set them."""

    command: tuple[str, ...]
    variables: Mapping[str, str]
    ranks: int = 0
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{name}={shlex.quote(value)}" for name, value in self.variables.items()] + [shlex.join(self.command)])


def plan(
    size: int,
    script: Sequence[str],
    *,
    mpi_args: Sequence[str] = (),
    timeout: int | None = None,
    settings: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    mpiexec: Mpiexec | None = None,
) -> Plan:
    """The command that starts `size` ranks of `script` (a file and its flags), with mpips' `settings` above all others."""
    mpiexec = mpiexec or find_mpiexec()
    here = None if HOST_FLAGS & {argument.split("=")[0] for argument in mpi_args} else _nodes(environ)
    wanted = {"PYTHONUNBUFFERED": "1", **_variables(mpiexec, size, here, environ)}  # MPICH's ranks write to pipes
    chosen = {name: value for name, value in wanted.items() if name not in environ}
    if timeout is not None:
        chosen["MPIEXEC_TIMEOUT"] = str(timeout)  # the one watchdog that all mpiexecs know
    if settings:
        chosen[SET] = json.dumps(settings)
        if mpiexec.family == "Open MPI":  # it hands only its own variables to ranks on other nodes
            mpi_args = ("-x", SET, *mpi_args)
    command = (mpiexec.path, "-n", str(size), *mpi_args, sys.executable, *script)
    return Plan(command, chosen, size, _crowded(size, here))


def _variables(mpiexec: Mpiexec, size: int, nodes: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """What lets a newcomer's machine run it: root, few cores, torch's threads. `nodes` is None when it is not known."""
    wanted: dict[str, str] = {}
    if nodes:
        wanted["OMP_NUM_THREADS"] = str(max(1, nodes * cores() // size))
    if mpiexec.family != "Open MPI":
        return wanted
    series = 4 if 0 < mpiexec.major < 5 else 5
    if os.geteuid() == 0:
        wanted |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    wanted |= home()
    given, usable = environ.get("TMPDIR"), tempfile.gettempdir()
    if given and os.path.abspath(given) != usable:  # read-only or full: there Open MPI could not begin
        wanted[SESSIONS[series]] = usable
    wanted[BIND[series]] = "none"  # by default a rank with all its torch threads is bound to one core
    if nodes and size > nodes * physical_cores():
        wanted |= CROWD[series]
        wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"  # else waiting ranks burn the cores that others compute on
    return wanted


def _nodes(environ: Mapping[str, str]) -> int:
    """Nodes of the allocation, this machine when there is none."""
    for name in NODE_FILES:
        with suppress(KeyError, OSError):
            return max(1, len(set(Path(environ[name]).read_text().split())))
    given = environ.get("SLURM_JOB_NUM_NODES", "1")
    return int(given) if given.isdigit() else 1


def _crowded(size: int, nodes: int | None) -> tuple[str, ...]:
    if nodes and size > nodes * cores():
        return (f"{size} ranks on {nodes * cores()} cores: it runs, but the ranks take turns",)
    return ()
